"""The inner part of attention for decoding: some keys, up to 8 query heads that share them, on the tensor cores.

A warp takes 16 keys at a time, with an online softmax of its own. Its products are `mma.m16n8k16` (PTX ISA, "matrix
fragments for mma.m16n8k16"; lane = 4 g + t):

- Scores: A has the queries as rows, B the keys as columns. A query is a pair of float16, high + low; the high parts are
  rows 0 to 7 and the low parts rows 8 to 15, so that one product gives both and their sum is as exact as float32. The
  order of the dimensions in the sum is free: a lane's 16 bytes of a key stay the words that they are.
- Values: A has 16 dimensions of the values as rows, B the weights of 8 heads as columns, high and low parts one after
  the other. The rows are an order of the dimensions in which a lane's 16 bytes of a value are again its words:
  `position` here is a place in that order, `dimension` turns it into 0 to d - 1.

What each warp has summed, a *piece*, goes to shared memory, as does the step's own key; `weigh` and `element` merge.
Kernels take the functions out of `make_core` before they use them: Numba knows no functions in tuples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from numba import cuda
from numpy import float32, int32, int64

from numbainfer.gpu.arithmetic import (
    exp2,
    halves_to_floats,
    multiply_16x8x16,
    pack_halves,
    permute,
    round_halves,
    still,
)
from numbainfer.gpu.compile import device_function
from numbainfer.gpu.ptx import (
    address,
    load_i32x4,
    shared_f32,
    shared_f32x4,
    shared_i32x4,
    shared_store_f32,
    shared_store_i32,
)
from numbainfer.gpu.reduce import warp_max, warp_sum
from numbainfer.gpu.rope import PAGE, PAGE_BITS, as_stored

KEYS = 16  # that a warp takes at a time
NOTHING = -1e30  # the largest score of a piece that saw no key
MOST_PARTS = 32  # of the keys: a lane each when they are merged


def heads_together(heads: int, kv_heads: int) -> int:
    """Query heads of one key/value head that a block serves: up to 8, as many in each block."""
    of_key = heads // kv_heads
    return next(n for n in range(min(8, of_key), 0, -1) if of_key % n == 0)


@dataclass(frozen=True)
class Layout:
    """How a block's shared memory is laid out: byte offsets, multiples of 16.

    head_dim: 64 or 128. shared: query heads of a block, 1 to 8. warps: of the block, at most 31; behind the pieces
    of its warps is one for the step's own key.
    """

    head_dim: int
    shared: int
    warps: int

    @property
    def raw(self) -> int:
        """float32 [shared + 2, d]: the query heads (turned, not scaled), the step's own key, its value."""
        return 0

    @property
    def row(self) -> int:
        """Bytes of a row of `queries`. 16 words more than it needs: the rows of 8 lanes meet in no bank."""
        return 4 * (self.head_dim + 16)

    @property
    def queries(self) -> int:
        """8 rows, of the query heads times a factor and then of zeros, as words of two float16: of each 16 columns what
        lanes t = 0 to 3 take, high and low part of their first word, then of their second."""
        return 4 * (self.shared + 2) * self.head_dim

    @property
    def piece(self) -> int:
        """Bytes of a head's row of `values`. 4 words more than it needs: `attend` meets in no bank."""
        return 4 * (self.head_dim + 4)

    @property
    def values(self) -> int:
        """float32 [piece, head, d + 4]: sums of values, by position."""
        return self.queries + 8 * self.row

    @property
    def tops(self) -> int:
        """float32 [head, 32]: a piece's largest score, as a power of 2; after `weigh`, its factor."""
        return self.values + (self.warps + 1) * self.shared * self.piece

    @property
    def totals(self) -> int:
        """float32 [head, 32]: a piece's sum of weights."""
        return self.tops + 4 * 32 * self.shared

    @property
    def summary(self) -> int:
        """float32 [head, 2]: the largest score of all pieces, the sum of weights relative to it."""
        return self.totals + 4 * 32 * self.shared

    @property
    def nbytes(self) -> int:
        return self.summary + (8 * self.shared + 15) // 16 * 16


class Core(NamedTuple):
    """Functions for kernels, made for one Layout; `memory` is the address of its start. See make_core."""

    fetch: Any
    prepare: Any
    compare: Any
    soften: Any
    add_values: Any
    write_piece: Any
    attend: Any
    own_key: Any
    weigh: Any
    element: Any
    dimension: Any


def make_loads(head_dim: int, load: Any, row_at: Any) -> tuple[Any, Any]:
    """The functions that bring a lane's part of 16 keys and of their values, from `start` on, to registers: int32
    [d / 4]. load: 16 bytes at an address. row_at(start, base, end, i, offset): where a byte of the row of key base + i
    is, or of the last key's, end - 1."""
    loads, halves = head_dim // 32, head_dim // 64

    @device_function
    def load_keys(k, start, base, end, lane):
        """Keys base + g and base + 8 + g: of each 32 dimensions the lane's 8."""
        for n in range(2):
            at = row_at(start, base, end, 8 * n + (lane >> 2), 16 * (lane & 3))
            for i in range(loads):
                j = 4 * (2 * i + n)
                k[j], k[j + 1], k[j + 2], k[j + 3] = load(at + 64 * i)

    @device_function
    def load_values(v, start, base, end, lane):
        """Values of the keys base + 2t, 2t + 1, 2t + 8, 2t + 9: of each 64 dimensions the lane's 8."""
        for r in range(4):
            at = row_at(start, base, end, 2 * (lane & 3) + (r & 1) + 8 * (r >> 1), 16 * (lane >> 2))
            for i in range(halves):
                j = 4 * (4 * i + r)
                v[j], v[j + 1], v[j + 2], v[j + 3] = load(at + 128 * i)

    return load_keys, load_values


@cache
def make_core(head_dim: int, shared: int, warps: int) -> Core:
    """The functions for heads of head_dim and blocks of that many query heads and warps."""
    plan = Layout(head_dim, shared, warps)
    at_queries, row_bytes = plan.queries, plan.row
    at_values, piece_bytes = plan.values, plan.piece
    at_tops, at_totals, at_summary = plan.tops, plan.totals, plan.summary
    at_key, at_value = 4 * shared * head_dim, 4 * (shared + 1) * head_dim
    loads = head_dim // 32  # of 16 bytes: a lane's of a key
    tiles, sums = head_dim // 16, head_dim // 4
    roomy = head_dim == 64  # registers for keys and values at once, at 16 warps a block
    most, shift = int32(8 * head_dim // 2), head_dim.bit_length() - 2  # words of a plane, of a row as a power of 2

    @device_function
    def row_at(start, base, end, i, offset):
        """In the page that begins at `start`."""
        key = min(int32(base + i), int32(end - 1)) & (PAGE - 1)
        return start + int32(2 * head_dim * key + offset)

    load_keys, load_values = make_loads(head_dim, load_i32x4, row_at)

    @device_function
    def fetch_keys(k, k_pages, page, base, end, lane):
        """Keys from `base` on. page: its number times kv_heads, plus the head's."""
        load_keys(k, address(k_pages) + int64(page) * (2 * PAGE * head_dim), base, end, lane)

    @device_function
    def fetch_values(v, v_pages, page, base, end, lane):
        """Their values."""
        load_values(v, address(v_pages) + int64(page) * (2 * PAGE * head_dim), base, end, lane)

    @device_function
    def fetch(k, v, k_pages, v_pages, table, kv_heads, g, base, end, lane):
        """The lane's part of the 16 keys from `base`, a multiple of 16, and if there is room of their values; k, v:
        int32 [d / 4]. A key past the last, end - 1, repeats it: what stands behind it in the page may be NaN."""
        page = int32(table[int32(base) >> PAGE_BITS] * kv_heads + g)
        fetch_keys(k, k_pages, page, base, end, lane)
        if roomy:
            fetch_values(v, v_pages, page, base, end, lane)

    @device_function
    def prepare(memory, factor, thread, threads):
        """All threads of the block: the raw queries times a factor, to `queries`. Between two barriers."""
        i = int32(thread)
        while i < most:
            i = still(i)
            h, word = int32(i >> shift), int32(i & (head_dim // 2 - 1))
            at = memory + 4 * head_dim * min(h, int32(shared - 1)) + 8 * word
            a, b = shared_f32(at) * factor, shared_f32(at + 4) * factor
            if h >= shared:
                a, b = float32(0), float32(0)
            high = pack_halves(a, b)
            c, d = halves_to_floats(high)
            # The word is number word % 4 of the 16 bytes that lane t = word / 4 % 4 has of 32 columns.
            place = (word >> 4 << 5) + ((word & 2) << 3) + ((word & 12) + 2 * (word & 1))
            at = memory + at_queries + row_bytes * h + 4 * place
            shared_store_i32(at, high)
            shared_store_i32(at + 4, pack_halves(a - c, b - d))
            i = int32(i + threads)

    @device_function
    def compare(memory, k, scores, lane):
        """Scores of 16 keys, float32 [8], sums of 0 and 2, 1 and 3 and so on: head g, keys 2t, 2t + 1, 2t + 8, 2t + 9,
        with the queries' high and low parts."""
        queries = int32(memory + at_queries + row_bytes * (lane >> 2) + 16 * (lane & 3))
        for i in range(8):
            scores[i] = float32(0)
        for i in range(2 * loads):
            a0, a1, a2, a3 = shared_i32x4(queries + 64 * i)
            for n in range(2):
                j, m = 4 * (2 * (i >> 1) + n) + 2 * (i & 1), 4 * n
                scores[m], scores[m + 1], scores[m + 2], scores[m + 3] = multiply_16x8x16(
                    *(a0, a1, a2, a3, k[j], k[j + 1]), scores[m], scores[m + 1], scores[m + 2], scores[m + 3]
                )

    @device_function
    def soften(scores, top, base, end, lowest, lane):
        """scores[0 to 3]: weights of the lane's keys, relative to the largest score so far, which was `top`. That
        score, and what earlier sums are now worth. Keys from `end` on and before `lowest` are not seen."""
        larger, t = top, int32(lane & 3)
        for i in range(4):
            j = 4 * (i >> 1) + (i & 1)
            key = int32(base + 2 * t + (i & 1) + 8 * (i >> 1))
            scores[i] = scores[j] + scores[j + 2] if key < end and key >= lowest else float32(2 * NOTHING)
            larger = max(larger, scores[i])
        larger = max(larger, cuda.shfl_xor_sync(0xFFFFFFFF, larger, 1))
        larger = max(larger, cuda.shfl_xor_sync(0xFFFFFFFF, larger, 2))
        for i in range(4):
            scores[i] = exp2(scores[i] - larger)  # 0 of what is not seen, even if nothing was so far
        return larger, exp2(top - larger)

    @device_function
    def add_values(acc, v, scores, decay, lane):
        """Adds the values with the weights of `soften` to the sums, float32 [d / 4], of heads 2t and 2t + 1."""
        t = int32(lane & 3)
        b0, b1 = round_halves(scores[0], scores[1]), round_halves(scores[2], scores[3])
        c, d = halves_to_floats(b0)
        low0 = round_halves(scores[0] - c, scores[1] - d)
        c, d = halves_to_floats(b1)
        low1 = round_halves(scores[2] - c, scores[3] - d)
        even = cuda.shfl_sync(0xFFFFFFFF, decay, int32(8 * t))
        odd = cuda.shfl_sync(0xFFFFFFFF, decay, int32(8 * t + 4))
        for i in range(tiles):
            j, m = 16 * (i >> 2) + (i & 3), 4 * i
            a0, a1 = permute(v[j], v[j + 4], int32(0x5410)), permute(v[j], v[j + 4], int32(0x7632))
            a2, a3 = permute(v[j + 8], v[j + 12], int32(0x5410)), permute(v[j + 8], v[j + 12], int32(0x7632))
            c0, c1, c2, c3 = acc[m] * even, acc[m + 1] * odd, acc[m + 2] * even, acc[m + 3] * odd
            c0, c1, c2, c3 = multiply_16x8x16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)
            c0, c1, c2, c3 = multiply_16x8x16(a0, a1, a2, a3, low0, low1, c0, c1, c2, c3)
            acc[m], acc[m + 1], acc[m + 2], acc[m + 3] = c0, c1, c2, c3

    @device_function
    def write_piece(memory, acc, top, total, warp, lane):
        """A warp's sums as its piece. top: of head g; total: of this lane's keys."""
        t = int32(lane & 3)
        total += cuda.shfl_xor_sync(0xFFFFFFFF, total, 1)
        total += cuda.shfl_xor_sync(0xFFFFFFFF, total, 2)
        if t == 0 and lane < 4 * shared:
            at = memory + 32 * lane + 4 * warp  # 128 bytes a head
            shared_store_f32(at + at_tops, top)
            shared_store_f32(at + at_totals, total)
        at = memory + at_values + piece_bytes * (shared * warp + 2 * t) + 4 * (lane >> 2)
        if 2 * t < shared:
            for i in range(2 * tiles):
                shared_store_f32(at + 32 * i, acc[2 * i])
        if 2 * t + 1 < shared:
            for i in range(2 * tiles):
                shared_store_f32(at + piece_bytes + 32 * i, acc[2 * i + 1])

    @device_function
    def attend(memory, k, v, k_pages, v_pages, table, kv_heads, g, base, end, lowest, warp, lane):
        """A warp: keys from `base` on, 16 of every 16 * warps, those before `lowest` not seen. The caller has fetched
        the first ones, if base < end. Writes the warp's piece."""
        base, end, lowest = int32(base), int32(end), int32(lowest)
        acc = cuda.local.array(sums, float32)
        scores = cuda.local.array(8, float32)
        for i in range(sums):
            acc[i] = float32(0)
        top, total = float32(NOTHING), float32(0)
        while base < end:
            base = still(base)
            following = int32(base + 16 * warps)
            page = int32(0)
            if following < end:
                page = int32(table[following >> PAGE_BITS] * kv_heads + g)
            compare(memory, k, scores, lane)
            if not roomy:
                fetch_values(v, v_pages, int32(table[base >> PAGE_BITS] * kv_heads + g), base, end, lane)
            elif following < end:
                fetch_keys(k, k_pages, page, following, end, lane)
            top, decay = soften(scores, top, base, end, lowest, lane)
            total *= decay
            for i in range(4):
                total += scores[i]
            add_values(acc, v, scores, decay, lane)
            if following < end and roomy:
                fetch_values(v, v_pages, page, following, end, lane)
            elif following < end:
                fetch_keys(k, k_pages, page, following, end, lane)
            base = following
        write_piece(memory, acc, top, total, warp, lane)

    @device_function
    def own_key(memory, factor, h, lane, mine):
        """A warp: the piece of the step's own key for head h, from the raw rows; both rounded as the cache has them.
        Where it is not this block's (mine), a piece that saw nothing."""
        score = float32(0)
        for j in range(head_dim // 32):
            i = lane + 32 * j
            key = as_stored(shared_f32(memory + at_key + 4 * i))
            score += shared_f32(memory + 4 * (head_dim * h + i)) * key
            from_value = memory + at_value + 4 * dimension(i)
            value = as_stored(shared_f32(from_value)) if mine else float32(0)
            shared_store_f32(memory + at_values + piece_bytes * (shared * warps + h) + 4 * i, value)
        score = warp_sum(score) * factor
        if lane == 0:
            at = memory + 4 * (32 * h + warps)
            shared_store_f32(at + at_tops, score if mine else float32(NOTHING))
            shared_store_f32(at + at_totals, float32(1) if mine else float32(0))

    @device_function
    def weigh(memory, pieces, h, lane):
        """A warp: the factors of the first `pieces` pieces of head h, for `element`, and their summary."""
        at = memory + 4 * (32 * h + lane)
        inside = lane < pieces
        top = shared_f32(at + at_tops) if inside else float32(NOTHING)
        largest = warp_max(top)
        factor = exp2(top - largest)
        weights = warp_sum(factor * shared_f32(at + at_totals) if inside else float32(0))
        shared_store_f32(at + at_tops, factor if inside else float32(0))
        if lane == 0:
            shared_store_f32(memory + at_summary + 8 * h, largest)
            shared_store_f32(memory + at_summary + 8 * h + 4, weights)

    @device_function
    def element(memory, pieces, h, position):
        """What the pieces have at a position of head h, all together; not divided by the sum of weights yet."""
        factors = int32(memory + at_tops + 128 * h)
        values = int32(memory + at_values + piece_bytes * h + 4 * position)
        last, at = int32(values + piece_bytes * shared * (pieces - 1)), values
        value = float32(0)
        while at <= last:
            at = still(at)
            four = shared_f32x4(factors)  # zeros after the last piece's
            for i in range(4):
                value += four[i] * shared_f32(min(int32(at + piece_bytes * shared * i), last))
            factors, at = int32(factors + 16), int32(at + 4 * piece_bytes * shared)
        return value

    @device_function
    def dimension(position):
        """The dimension of a position, and as well the position of a dimension."""
        return (position & ~63) | (position & 7) << 3 | (position >> 3 & 7)

    return Core(fetch, prepare, compare, soften, add_values, write_piece, attend, own_key, weigh, element, dimension)
