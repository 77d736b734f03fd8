"""How a model is cut for the kernel that runs one token through all of it (token_kernel.py): its constants."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from functools import cached_property

from numbainfer.gpu.attention_core import KEYS, Layout

WARPS = 16
ARRIVED, QUANTIZED, MULTIPLIED = 2, 3, 4  # barriers of these warps and the one that watches (token_watch.py)
MOST_PART = 2048  # bytes of a row that a warp takes at a time

SLOT = 12 << 10  # bytes of a slot of the ring, where a block has twice as many of every matrix
SMALL_SLOT = 8 << 10  # where it has not
SPARE = 5  # slots of the ring, if it has so many, beside those with the chunks that warps wait for at a time
AT_ONCE = 2  # copies of a part whose codes are in registers first: with all of them, two rows would not fit
ENTRIES = 16  # a warp's pieces of rows whose places in the ring it finds at a time
IN_FLIGHT = 48 << 10  # bytes that are under way to the ring, at most: more would only hold up what blocks exchange
FETCHED = 112 << 10  # bytes that are brought to the second-level cache ahead of the copies to the ring
FETCH_RATE = 1.1  # how fast, as a share of what memory can do at most
LEAD = 2  # slots that the next copies bring by themselves: fetching these too would only cost memory time

# Areas of what attention gives: for so many parts of the keys, at most, which the readers of `mixed` add up by
# themselves. It is float32 [AREAS, heads, d], then [heads, AREAS, 2]: a part's largest score and its sum of weights.
AREAS_SHIFT = 1
AREAS = 1 << AREAS_SHIFT

MERGED_ROWS = 4 * 256  # where, behind largest scores and sums of weights of up to four heads, the parts' sums are
SHORT_OUTPUT = 1024  # numbers of attention's output whose parts few blocks merge: see Plan.asks_first

SHAPES = 5  # of matrices: QKV, attention's output, gate and up, down, head
OUTPUT_SHAPE, GATE_SHAPE, HEAD_SHAPE = 1, 2, 4

# Columns of the table of pointers, int64 [layers + 1, COLUMNS]: codes and scales of QKV, output, gate, up and down;
# biases, norms, the rest of the layer. The row behind the layers is the head's, as QKV, and the norm's before it.
BIAS, UP_BIAS, DOWN_BIAS, NORM, MLP_NORM = 10, 13, 14, 15, 16  # BIAS: of QKV, output, gate
K_PAGES, V_PAGES, Q_NORM, WINDOW, ROTATED = 17, 18, 19, 21, 22  # behind Q_NORM the keys' norm
COLUMNS = 24
SHAPE = 12  # numbers that a block keeps of each shape
ROLE = SHAPES * SHAPE  # behind those of all shapes: which of the blocks it is
NUMBERS = 64  # two for each lane
PAGES = 512  # of the page table that a block keeps: a multiple of 4


@dataclass(frozen=True)
class Plan:
    """The kernel's constants, and by them the layout of a block's shared memory, in bytes.

    mixed: numbers that attention gives; widest: of the matrices' inputs; part: most columns of a row that a warp takes
    at a time; items: most of these that a block has of a matrix; slot_codes: bytes of codes in a slot of the ring;
    slots: of it; in_flight: those that copies are under way to; pace: cycles for 64 KiB that are fetched ahead; warps:
    that multiply.
    """

    head_dim: int
    shared: int  # query heads of a block, in attention
    layers: int
    hidden: int
    mixed: int
    widest: int
    group: int
    part: int
    items: int
    slot_codes: int
    slots: int
    in_flight: int
    pace: int
    warps: int

    @property
    def numbers(self) -> tuple[int, ...]:
        """All of them."""
        return astuple(self)

    @property
    def copies(self) -> int:
        """Pieces of 16 bytes of a part, for a lane."""
        return -(-self.part // 512)

    @property
    def mostly_narrow(self) -> bool:
        """Whether most rows have no more copies than AT_ONCE. Then it pays to ask before the others are loaded; else
        it costs."""
        return self.hidden <= 512 * AT_ONCE

    @property
    def quads(self) -> int:
        """Of a step's input, for a thread."""
        return -(-self.widest // (128 * self.warps))

    @property
    def norm_quads(self) -> int:
        """The same where a norm is before it."""
        return -(-self.hidden // (128 * self.warps))

    @property
    def mixed_quads(self) -> int:
        """The same of attention's output."""
        return -(-self.mixed // (128 * self.warps))

    @property
    def slot(self) -> int:
        """Of the ring: codes, then their scales, with what is before and behind them in their 16 bytes."""
        return self.slot_codes + (2 * (self.slot_codes // self.group) + 45) // 16 * 16

    @property
    def chunk(self) -> int:
        """KEYS keys and their values, which a warp takes at a time."""
        return 4 * KEYS * self.head_dim

    @property
    def halves(self) -> int:
        """How many halves of chunks a slot has, keys and values in turn: at most one for each lane that copies."""
        return min(32, self.slot_codes // (self.chunk // 2))

    @property
    def attending(self) -> int:
        """Warps that take keys in turn: all, if the ring is long enough for their chunks and some copies more."""
        warps = self.warps
        while warps > 1 and slots_of(warps, self.halves) + SPARE > self.slots:
            warps //= 2
        return warps

    @property
    def ahead(self) -> int:
        """Slots that are fetched ahead."""
        return FETCHED // self.slot

    @property
    def full(self) -> int:
        """Barriers: a slot is full."""
        return self.slots * self.slot

    @property
    def progress(self) -> int:
        """Of each warp: the number of the slot that it is at, of all that were filled."""
        return self.full + 16 * -(-self.slots // 2)

    @property
    def copied(self) -> int:
        """Of the copying warp: the number of slots that it filled."""
        return self.progress + 4 * self.warps

    @property
    def begun(self) -> int:
        """Whether the numbers of pages are there."""
        return self.copied + 4

    @property
    def factor(self) -> int:
        """Of the norm before a step."""
        return self.copied + 8

    @property
    def keys(self) -> int:
        """Of a layer's attention, eight numbers: see token_watch.watch."""
        return self.copied + 16

    @property
    def table(self) -> int:
        return self.keys + 32

    @property
    def shapes(self) -> int:
        return self.table + 8 * (self.layers + 1) * COLUMNS

    @property
    def role(self) -> int:
        """Which of the blocks it is, for each lane."""
        return self.shapes + 4 * NUMBERS

    @property
    def angles(self) -> int:
        return self.role + 128

    @property
    def squares(self) -> int:
        return self.angles + 4 * self.head_dim

    @property
    def pages(self) -> int:
        """The address of the sequence's row of the page table."""
        return self.squares + 4 * self.warps

    @property
    def position(self) -> int:
        return self.pages + 8

    @property
    def before(self) -> int:
        """How many layers came before, in all launches."""
        return self.position + 4

    @property
    def page_numbers(self) -> int:
        """The first PAGES numbers of the page table's row."""
        return self.before + 4

    @property
    def own(self) -> int:
        return self.page_numbers + 4 * PAGES

    @property
    def sums(self) -> int:
        return self.own + 128 * self.warps

    @property
    def entries(self) -> int:
        """Of each warp ENTRIES times four numbers: where its next rows are in the ring."""
        return self.sums + 16 * -(-self.items // 4)

    @property
    def area(self) -> int:
        """What the steps use in turn: a product's input, or attention's."""
        return self.entries + 16 * ENTRIES * self.warps

    @property
    def scales(self) -> int:
        return self.area + 2 * self.widest

    @cached_property
    def attention(self) -> Layout:
        return Layout(self.head_dim, self.shared, self.attending)

    @property
    def asks_first(self) -> bool:
        """Whether a block that merges has one warp ask until parts have come. Else all do, which is sooner done, but
        holds up those who still write, where they are many."""
        return self.mixed > SHORT_OUTPUT

    @property
    def columns_shift(self) -> int:
        """log2 of the columns that a block merges of a long text's parts, at least: whole lines of memory."""
        return 5 if self.asks_first else 4

    @property
    def merging(self) -> int:
        """Bytes that a block needs for that, at most, of 32 parts: see token_attention.merge."""
        columns = max(32 << self.columns_shift, 2 * self.shared * self.head_dim)
        return MERGED_ROWS + 4 * (columns + 32)

    @property
    def nbytes(self) -> int:
        of_products, of_attention = self.scales + 4 * (self.widest // self.group), self.attention.nbytes
        return max(of_products, self.area + max(of_attention, self.merging))


def slots_of(chunks: int, halves: int) -> int:
    """Slots for so many chunks of keys and values, where a slot has so many halves of them."""
    return -(-2 * chunks // halves)


@dataclass(frozen=True)
class Shape:
    """A kind of matrix. pairs: its rows, or where it is gate and up, half of them; parts: of each row, each for a warp
    of its own, a power of two."""

    pairs: int
    halves: int
    width: int
    parts: int
    part: int  # columns of a part: whole groups
    split: int  # pieces of a row, of some parts each: a slot of the ring has some pieces. A power of two

    @property
    def piece(self) -> int:
        """Columns of a piece."""
        return self.width // self.split


def slot_size(matrices: list[tuple[int, int]], blocks: int) -> int:
    """Bytes of codes in a slot, for matrices of so many (pairs, columns)."""
    return SLOT if all(pairs // blocks * width >= 2 * SLOT for pairs, width in matrices) else SMALL_SLOT


def cut(pairs: int, halves: int, width: int, group: int, blocks: int, warps: int, slot: int) -> Shape | None:
    """The parts of a row with which the busiest warp has least to do: a part costs as much as 512 bytes of it do. The
    last ones may be empty. Rows longer than a slot are cut where all parts are alike. None: rows are too wide."""
    best = None
    parts = 1
    while parts <= warps:
        part = -(-(width // group) // parts) * group
        rounds = -(-(-(-pairs // blocks) * parts) // warps) * halves
        cost = rounds * (512 + 512 * -(-part // 512))
        if part <= MOST_PART and (best is None or cost < best[0]):
            best = cost, parts, part
        parts *= 2
    if best is None:
        return None
    _, parts, part = best
    splits = [1 << i for i in range(parts.bit_length())] if parts * part == width > slot else [1]
    filled = [slot // (width // split) * (width // split) for split in splits]  # bytes of a slot
    split = next(split for split, some in zip(splits, filled, strict=True) if some >= 7 * max(filled) // 8)
    return Shape(pairs, halves, width, parts, part, split)


def make_plan(
    head_dim: int,
    shared: int,
    layers: int,
    hidden: int,
    group: int,
    shapes: list[Shape],
    blocks: int,
    warps: int,
    slot: int,
    most: int,
    memory_rate: float,
) -> Plan | None:
    """The plan with the longest ring that fits `most` bytes; None where it would be too short (`longest_way`).
    memory_rate: see driver.Gpu."""
    widest = max(shape.width for shape in shapes)
    items = max(-(-shape.pairs // blocks) * shape.halves * shape.parts for shape in shapes)
    part, slot_codes = max(shape.part for shape in shapes), max(slot, *(shape.piece for shape in shapes))
    for slots in range(32, 1, -1):
        plan = Plan(
            *(head_dim, shared, layers, hidden, shapes[OUTPUT_SHAPE].width, widest, group),
            *(part, items, slot_codes, slots, 0, 0, warps),
        )
        if plan.nbytes <= most:
            way = max(longest_way(shape, blocks, slot_codes, warps) for shape in shapes)
            pace = int(65536 / max(1.0, FETCH_RATE * memory_rate))
            in_flight = max(1, min(IN_FLIGHT // slot_codes, slots - way))
            return replace(plan, in_flight=in_flight, pace=pace) if way < slots else None
    return None


def longest_way(shape: Shape, blocks: int, slot_codes: int, warps: int) -> int:
    """Slots from one that a warp waits for to its next one, at most.

    A barrier tells the parity of a phase only. So a warp may wait for a filling of a slot when the one before in the
    same slot is known to be complete: all are that are `in_flight` or more behind one that the warp has seen complete.
    (For keys and values it asks how many slots are being filled: see token_attention.py.)
    Slots of gate and up come in turn, and a warp waits for both.
    """
    stride, way = warps // shape.parts * shape.split, 0
    for count in (shape.pairs // blocks, -(-shape.pairs // blocks)):
        pieces = count * shape.split
        slots = -(-pieces // (slot_codes // shape.piece))  # of a half
        of_slot = (pieces - 1) // slots + 1
        within = min(-(-stride // of_slot), slots)  # or from the end of the matrix before
        way = max(way, within if shape.halves == 1 else 2 * within - 1)
    return way
