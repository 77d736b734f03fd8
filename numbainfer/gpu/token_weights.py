"""How a block of the whole-token kernel brings what it reads: one warp copies, another fetches ahead, 16 work
(token_kernel.py).

The ring is some slots of shared memory, each for as many rows of a matrix as fit, or pieces of rows that are longer
than a slot, with their scales, or for some chunks of the sequence's earlier keys and values. A slot has a barrier that
its copies complete (`full`). None says that it is empty: each warp says how far it is (`progress`), and a slot is free
when all are past it. Most of what is in the slots is none of a warp's, and it does not wait for that:
token_plan.longest_way says how far it may go.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from numba import cuda
from numpy import int32, int64, uint32

from numbainfer.gpu.arithmetic import divide, shift_right
from numbainfer.gpu.attention_core import KEYS
from numbainfer.gpu.compile import device_function
from numbainfer.gpu.pipeline import barrier_wait, copy_bulk, expect_bytes, prefetch_bulk
from numbainfer.gpu.ptx import clock, load_i32, shared_i32, shared_i32x4, shared_i64, shared_peek_i32, shared_store_i32
from numbainfer.gpu.rope import PAGE, PAGE_BITS
from numbainfer.gpu.token_plan import (
    AREAS,
    AREAS_SHIFT,
    COLUMNS,
    GATE_SHAPE,
    HEAD_SHAPE,
    K_PAGES,
    LEAD,
    PAGES,
    SHAPE,
    V_PAGES,
    WINDOW,
    Plan,
)


@cache
def make_in_ring(slots: int) -> Any:
    """in_ring(number) -> of all slots that are filled, where this one is in the ring, and the parity of its turn."""

    @device_function
    def in_ring(number):
        turns = uint32(number) // uint32(slots)
        return int32(number - turns * slots), int32(turns & 1)

    return in_ring


@cache
def make_share(warps: int, shared: int) -> Any:
    """share(position, window, block, heads, parts_shift) -> what a block has of a layer's earlier keys in attention,
    for blocks of so many warps and query heads."""
    at_once = warps * KEYS

    @device_function
    def share(position, window, block, heads, parts_shift):
        """A block is one unit of query heads and one part of the keys: those from `start` on that are before `end`, in
        so many chunks. here: whether it is one of the blocks that have a part, if an empty one. size: of a part.
        sources: how many parts OUTPUT's input is the sum of: as many as have an area of their own, while they are
        short; else all blocks have a part, and the parts' sums are merged first, which costs an exchange."""
        begin = int32(max(int32(0), int32(position + 1 - window)) & int32(-PAGE)) if window else int32(0)
        keys, shift = int32(position - begin), min(int32(AREAS_SHIFT), parts_shift)
        size = int32(shift_right(int32(keys + int32(int32(PAGE) << shift) - 1), int32(shift + PAGE_BITS)) * PAGE)
        size, sources = max(size, int32(PAGE)), int32(1)
        if size <= at_once:
            for p in range(1, AREAS):
                sources += int32(1) if keys > p * size else int32(0)
        else:
            size = shift_right(int32(keys + int32((int32(1) << parts_shift) - 1)), parts_shift)
            size = max(int32(at_once), int32(int32(size + int32(KEYS - 1)) & int32(-KEYS)))
        unit, part = shift_right(block, parts_shift), int32(block & int32((int32(1) << parts_shift) - 1))
        start = int32(begin + part * size)
        end = min(int32(start + size), position)
        here = int32(unit * shared) < heads and (part == 0 or start < position)
        chunks = int32(uint32(max(int32(end - start), int32(0)) + KEYS - 1) // uint32(KEYS)) if here else int32(0)
        return start, end, chunks, here, size, sources

    return share


class Movers(NamedTuple):
    """What the warps that don't work do, as device functions."""

    copy_all: Any
    fetch_ahead: Any


def make_movers(plan: Plan) -> Movers:
    """The functions for a plan."""
    warps, slots, in_flight, ahead, pace = plan.warps, plan.slots, plan.in_flight, plan.ahead, plan.pace
    slot_bytes, slot_codes, in_ring = plan.slot, plan.slot_codes, make_in_ring(plan.slots)
    at_full, at_progress, at_table, at_shapes = plan.full, plan.progress, plan.table, plan.shapes
    at_copied, at_pages, at_page_numbers, at_begun = plan.copied, plan.pages, plan.page_numbers, plan.begun
    at_position = plan.position
    shift, share = plan.group.bit_length() - 1, make_share(plan.warps, plan.shared)
    half_chunk, halves, row = plan.chunk // 2, plan.halves, 2 * plan.head_dim
    found = 32 // halves * halves  # halves whose places lanes find together

    @device_function
    def copy(memory, number, lane, source, size, to, total):
        """Fills slot `number` with `total` bytes: each lane with `size` of its own, from `source` to place `to`."""
        if number >= slots and lane < warps:  # all warps have to be done with what is in the slot
            while shared_peek_i32(int32(memory + at_progress + 4 * lane)) <= int32(number - slots):
                pass
        cuda.syncwarp()
        # No more under way than memory needs: what blocks exchange would have to queue behind it. The first times
        # through, the phase before a new barrier's first one counts as complete.
        slot, _ = in_ring(number)
        before, parity = in_ring(int32(number + slots - in_flight))
        barrier_wait(int32(memory + at_full + 8 * before), int32(parity ^ 1))
        full = int32(memory + at_full + 8 * slot)
        if lane == 0:
            expect_bytes(full, total)
            shared_store_i32(int32(memory + at_copied), int32(number + 1))
        cuda.syncwarp()
        if size > 0:
            copy_bulk(int32(memory + slot * slot_bytes + to), source, size, full)

    @device_function
    def fetch(memory, number, lane, source, size, to, total):
        """Brings what `copy` will fill slot `number` with to the second-level cache, unless that is about to do so by
        itself: memory gives more where nothing is asked for twice."""
        while True:
            copied = cuda.shfl_sync(0xFFFFFFFF, shared_peek_i32(int32(memory + at_copied)), 0)
            if number < copied:
                return
            going_on = lane >= warps or shared_peek_i32(int32(memory + at_progress + 4 * lane)) > int32(copied - slots)
            soon = cuda.all_sync(0xFFFFFFFF, going_on) and number < int32(copied + LEAD)  # no warp is waited for
            if number < int32(copied + ahead) and not soon:
                break
        start = clock()
        if size > 0:
            prefetch_bulk(source, size)
        pause = shift_right(int32(total * pace), int32(16))
        while int32(clock() - start) < pause:
            pass

    def make_walk(visit: Any) -> Any:
        """The function that visits all that the block reads, in the order of its use."""

        @device_function
        def walk_keys(memory, row_of_table, number, lane, block, heads, kv_heads, units_per_key, parts_shift):
            """Keys and values: lanes are halves of chunks, keys and values in turn."""
            while shared_peek_i32(int32(memory + at_begun)) == 0:
                pass
            window = shared_i32(int32(row_of_table + 8 * WINDOW))
            position = shared_i32(int32(memory + at_position))
            base, _, chunks, _, _, _ = share(position, window, block, heads, parts_shift)
            g, half = divide(shift_right(block, parts_shift), units_per_key), int32(0)
            count = int32(2 * chunks)
            while half < count:
                mine, source = int32(half + lane), int64(0)
                if mine < count:
                    pages = shared_i64(int32(row_of_table + 8 * (V_PAGES if mine & 1 else K_PAGES)))
                    key = int32(base + KEYS * int32(mine >> 1))
                    page = shift_right(key, int32(PAGE_BITS))
                    if page < PAGES:
                        page = shared_i32(int32(memory + at_page_numbers + 4 * page))
                    else:
                        page = load_i32(shared_i64(int32(memory + at_pages)) + 4 * page)
                    in_page = int32(key & int32(PAGE - 1))
                    source = pages + int64(int32(page * kv_heads + g)) * (PAGE * row) + int32(in_page * row)
                first, end = int32(0), min(int32(found), int32(count - half))
                while first < end:
                    of_slot, some = int32(lane - first), min(int32(halves), int32(end - first))
                    size = int32(half_chunk) if 0 <= of_slot < some else int32(0)
                    visit(memory, number, lane, source, size, int32(half_chunk * of_slot), int32(half_chunk * some))
                    first, number = int32(first + halves), int32(number + 1)
                half = int32(half + found)
            return number

        @device_function
        def walk(memory, layers, with_head, lane, block, heads, kv_heads, units_per_key, parts_shift):
            """Of each layer: QKV, earlier keys and values, output, gate and up in turn, down; then the head."""
            number, layer = int32(0), int32(0)
            while layer <= layers:
                matrices = int32(HEAD_SHAPE) if layer < layers else int32(with_head)
                matrix = int32(0)
                while matrix < matrices:
                    shape = int32(HEAD_SHAPE) if layer == layers else matrix
                    shape_at = int32(memory + at_shapes + 4 * SHAPE * shape)
                    first, left, width, rows = shared_i32x4(int32(shape_at + 32))  # of pieces, as good as rows
                    row_of_table = int32(memory + at_table + 8 * COLUMNS * layer)
                    # Lane 0 has the codes, lane 1 the scales, whose copies begin and end at multiples of 16.
                    a_row = int32(int32(width >> shift) << 1) if lane else width
                    pointer = int32(row_of_table + 16 * (matrix + (matrix == HEAD_SHAPE - 1)) + (8 if lane else 0))
                    source, gated, up = shared_i64(pointer) + int64(first) * a_row, matrix == GATE_SHAPE, False
                    while left > 0:
                        lead = int32(source) & int32(15)
                        size = int32(int32(lead + min(rows, left) * a_row + 15) & int32(-16)) if lane < 2 else int32(0)
                        to, total = int32(slot_codes) if lane else int32(0), size
                        total = int32(total + cuda.shfl_xor_sync(0xFFFFFFFF, size, 1))
                        visit(memory, number, lane, source - lead, size, to, total)
                        number = int32(number + 1)
                        if gated:  # up's slots come between gate's
                            to_up = shared_i64(int32(pointer + 16)) - shared_i64(pointer)
                            up, source = not up, source - to_up if up else source + to_up
                        if not up:
                            source, left = source + rows * a_row, int32(left - rows)
                    if matrix == 0 and layer < layers:
                        number = walk_keys(
                            memory, row_of_table, number, lane, block, heads, kv_heads, units_per_key, parts_shift
                        )
                    matrix = int32(matrix + 1)
                layer = int32(layer + 1)

        return walk

    return Movers(make_walk(copy), make_walk(fetch))
