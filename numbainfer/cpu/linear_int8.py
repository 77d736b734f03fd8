"""out = x @ W.T with int8 weights and int8 activations, on the machine's int8 dot product.

Two forms, by the number of tokens:
- rows as stored, up to ROW_FORM_TOKENS tokens. A row of W streams through once, and meets one token after the other.
  One row at a time follows the memory at its read bandwidth, with a prefetch 8 KiB ahead
  into the second-level cache: into the first, the stream would push out the activations (12 instead of 21 GB/s a core
  at 8,192 columns).
- packed panels, beyond. 32 rows are packed as [in / 4][32][4] bytes, so that one vector holds 4 columns of 16 rows,
  and meet TILE_TOKENS tokens in registers (tile.py). Packing as we go costs about 3% at 500 tokens, and spares a
  second copy of W.

Where the dot product wants unsigned bytes, weights count as w + OFFSET; the surplus, OFFSET * sum(x), is known per
group from the activations' sums. Panels take it back exactly; the row form takes it back in one lane of a group, before
the lanes are added in float32, which costs digits where all activations have one sign (errors of 1e-4 of the output's
spread at 8,192 columns, against 1e-6: still far below what quantization does).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy import float32, int32

from numbainfer.cpu.compile import Kernel, kernel
from numbainfer.cpu.dot import dot4, dot4_packed
from numbainfer.cpu.isa import detect
from numbainfer.cpu.launch import Stream
from numbainfer.cpu.quantize import check_rows
from numbainfer.cpu.simd import (
    advance,
    as_bytes,
    first_lanes,
    fma,
    get,
    hsum,
    lane0,
    load,
    load_i8,
    load_i8_half,
    load_i32,
    load_word,
    local_floats,
    prefetch,
    splat,
    splat2,
    splat_i32,
    splat_word,
    store,
    store_word,
    times256,
    to_f32,
)
from numbainfer.cpu.tile import (
    TILE_ROWS,
    TILE_TOKENS,
    tile_add_scaled,
    tile_dot,
    tile_next_plane,
    tile_spill,
    tile_start,
    tile_transpose,
    tile_zero,
    tile_zero_i32,
    transpose16,
)
from numbainfer.quantization import GROUPS, QuantizedMatrix, QuantizedRows

OFFSET = detect().weight_offset
OFFSET_BYTES = -2139062144 if OFFSET else 0  # 0x80808080: xor adds 128 to each of four bytes
AHEAD = 8192  # bytes of prefetch distance
ROW_FORM_TOKENS = 4


@njit
def finish(value, row, at, bias, residual, flags, y):
    """y[at] = value + bias[row] + residual[at], where flags say so."""
    if flags & 1:
        value += bias[row]
    if flags & 2:
        value += residual[at]
    y[at] = value


def _make_row_kernel(group: int) -> tuple[Kernel, Any]:
    """The row form, and the product of one row with one token."""

    @njit
    def scale(factors, i):
        """The factors of the lanes of the 64-byte block at column i."""
        g = i // group
        if group == 32:  # a block is two groups
            return splat2(factors[g], factors[g + 1])
        return splat(factors[g])

    @njit
    def dot_row(w_row, ahead, ws_row, x, low, xs, sums, width, factors, readable):
        """A row of W times a token of two planes.

        ahead: where the memory fetches as many bytes from meanwhile. factors [16]: for weight scale times activation
        scale, 16 groups at a time. readable: how many elements may be read from ws_row, xs and sums on, which go on
        with the next row's.
        """
        groups = width // group
        acc = surplus = splat(float32(0))
        for first in range(0, groups, 16):
            count = min(16, groups - first)
            if first + 16 <= readable:
                both = first_lanes(load(ws_row, first) * load(xs, first), count)
                store(factors, 0, both)
                surplus = fma(both, to_f32(load_i32(sums, first)), surplus)
            else:
                for g in range(16):
                    factors[g] = get(ws_row, first + g) * xs[first + g] if g < count else float32(0)
                for g in range(count):
                    surplus = fma(splat(factors[g]), to_f32(lane0(sums[first + g])), surplus)
            for i in range(0, count * group, 64):
                column = first * group + i
                prefetch(ahead, column)
                # the last block of a row may have 32 columns
                w = load_i8(w_row, column) if width - column >= 64 else load_i8_half(w_row, column)
                high = dot4(splat_i32(int32(0)), w, load_i8(x, column))
                acc = fma(to_f32(dot4(times256(high), w, load_i8(x, low + column))), scale(factors, i), acc)
        if OFFSET:
            acc = fma(surplus, splat(float32(-OFFSET)), acc)
        return hsum(acc)

    @kernel
    def gemv(task, worker, w, ws, x, low, xs, sums, bias, residual, flags, y, rows, width, per_task, workers, tokens):
        groups = width // group
        factors = local_floats()
        end = (task + 1) * per_task
        for row in range(task * per_task, min(rows, end)):
            w_row, ws_row = advance(w, row * width), advance(ws, row * groups)
            # Past this task's rows begin another worker's: the memory goes on with those of this one's next task.
            skip = (workers - 1) * per_task * width if row * width + AHEAD >= end * width else 0
            ahead = advance(w_row, AHEAD + skip)
            for t in range(tokens):
                at, token = t * rows + row, advance(x, t * 2 * low)
                # x has a multiple of 8 rows, so 5 for each of 4 tokens; the same for all of them, so that a token's
                # result does not depend on how many it is computed with, which speculation relies on.
                readable = min(rows - row, 5) * groups
                numbers, totals = advance(xs, t * groups), advance(sums, t * groups)
                value = dot_row(w_row, ahead, ws_row, token, low, numbers, totals, width, factors, readable)
                finish(value, row, at, bias, residual, flags, y)

    return gemv, dot_row


@njit
def pack_panel(w, ws, valid, width, groups, panel, scales):
    """Rows of W as panel [width / 4][32][4] (with the offset added) and scales [groups][32]; absent rows as zeros."""
    for half in range(0, TILE_ROWS, 16):
        whole, whole_groups = 0, 0  # what is packed 16 rows at a time
        if valid >= half + 16:
            whole, whole_groups = width // 64 * 64, groups // 16 * 16
        for i in range(0, whole, 64):
            tile_transpose(advance(w, half * width + i), width, advance(panel, (i * TILE_ROWS + half * 4)))
        for g in range(0, whole_groups, 16):
            transpose16(advance(ws, half * groups + g), groups, advance(scales, g * TILE_ROWS + half), TILE_ROWS)
        for r in range(half, half + 16):  # the last columns, or the last rows, one by one
            for i in range(whole, width, 4):
                word = load_word(w, r * width + i) if r < valid else int32(0)
                store_word(panel, i * TILE_ROWS + r * 4, word ^ int32(OFFSET_BYTES))
            for g in range(whole_groups, groups):
                scales[g * TILE_ROWS + r] = get(ws, r * groups + g) if r < valid else float32(0)


@njit
def _prefetch_rows(w, width):
    """One cache line of each row of a panel."""
    for r in range(TILE_ROWS):
        prefetch(w, r * width)


@njit
def add_outliers(row, panel, scales, group, codes, low, xs, outliers):
    """row[32] += the products of a token's high bytes: 4 columns by 32 rows at a time."""
    a0, a1 = load(row, 0), load(row, 16)
    for block in range(outliers[0]):
        column = outliers[1 + block]
        g = column // group
        four, at = splat_word(codes, low + 4 * block), column * TILE_ROWS
        factor = splat(xs[g] * float32(256))
        d0 = to_f32(dot4_packed(splat_i32(int32(0)), load_i8(panel, at), four))
        d1 = to_f32(dot4_packed(splat_i32(int32(0)), load_i8(panel, at + 64), four))
        a0 = fma(d0, load(scales, g * TILE_ROWS) * factor, a0)
        a1 = fma(d1, load(scales, g * TILE_ROWS + 16) * factor, a1)
    store(row, 0, a0)
    store(row, 16, a1)


@njit
def _finish_row(row, valid, bias, residual, flags, y):
    """y[valid] = row + bias + residual, where flags say so."""
    if valid == TILE_ROWS:
        for r in range(0, TILE_ROWS, 16):
            value = load(row, r)
            if flags & 1:
                value = value + load(bias, r)
            if flags & 2:
                value = value + load(residual, r)
            store(y, r, value)
        return
    for r in range(valid):
        finish(row[r], r, r, bias, residual, flags, y)


def _make_panel_kernel(group: int, planes: int) -> tuple[Kernel, Any]:
    """The panel form; and the product of one panel with one tile of tokens, but for outliers."""

    @njit
    def tile_product(panel, scales, x_tile, low, stride, xs, sums, groups, fetch, ahead):
        """low: where the low bytes of two planes begin in a row of x. fetch: whether the memory fetches 32 rows from
        `ahead` on meanwhile, as wide as these."""
        acc = tile_zero()
        for g in range(groups):
            if fetch:
                for i in range(g * group, (g + 1) * group, 64):
                    _prefetch_rows(advance(ahead, i), groups * group)
            if planes == 2:
                d = tile_zero_i32()
                for k in range(g * group, (g + 1) * group, 4):
                    d = tile_dot(d, advance(panel, k * TILE_ROWS), advance(x_tile, k), stride)
                d = tile_next_plane(d, advance(sums, g), groups)
                for k in range(g * group, (g + 1) * group, 4):
                    d = tile_dot(d, advance(panel, k * TILE_ROWS), advance(x_tile, low + k), stride)
            else:
                d = tile_start(advance(sums, g), groups)
                for k in range(g * group, (g + 1) * group, 4):
                    d = tile_dot(d, advance(panel, k * TILE_ROWS), advance(x_tile, k), stride)
            acc = tile_add_scaled(acc, d, advance(scales, g * TILE_ROWS), advance(xs, g), groups)
        return acc

    @kernel
    def gemm(
        task, worker, w, ws, x, low, xs, sums, outliers, bias, residual, flags, y, rows, width, tokens, workers,
        scratch, floats
    ):  # fmt: skip
        groups, found = width // group, 1 + low // 4
        first = task * TILE_ROWS
        valid = min(TILE_ROWS, rows - first)
        corner = advance(scratch, worker * floats)  # this worker's: a finished tile, then scales, then the panel
        scales = advance(corner, TILE_TOKENS * TILE_ROWS)
        panel = as_bytes(advance(scales, groups * TILE_ROWS))
        pack_panel(advance(w, first * width), advance(ws, first * groups), valid, width, groups, panel, scales)
        for token in range(0, tokens, TILE_TOKENS):  # rows of x are padded to 8, so a whole tile may be read
            x_tile, group_at = advance(x, token * 2 * low), token * groups
            numbers, totals = advance(xs, group_at), advance(sums, group_at)
            # meanwhile the memory fetches the panel that this worker is likely to take next
            ahead = advance(w, (first + workers * TILE_ROWS) * width)
            acc = tile_product(panel, scales, x_tile, low, 2 * low, numbers, totals, groups, token == 0, ahead)
            tile_spill(acc, corner)
            for j in range(min(TILE_TOKENS, tokens - token)):
                at, row = (token + j) * rows + first, advance(corner, j * TILE_ROWS)
                codes, blocks = advance(x_tile, j * 2 * low), advance(outliers, (token + j) * found)
                if planes == 1 and blocks[0]:
                    add_outliers(row, panel, scales, group, codes, low, advance(numbers, j * groups), blocks)
                _finish_row(row, valid, advance(bias, first), advance(residual, at), flags, advance(y, at))

    return gemm, tile_product


ROW_KERNELS = {g: _make_row_kernel(g) for g in GROUPS}
PANEL_KERNELS = {(g, planes): _make_panel_kernel(g, planes) for g in GROUPS for planes in (1, 2)}


def linear_int8(
    stream: Stream,
    x: QuantizedRows,
    weight: QuantizedMatrix,
    bias: np.ndarray | None,
    residual: np.ndarray | None,
    out: np.ndarray,
) -> None:
    """See registry.linear."""
    (rows, width), tokens, group = weight.shape, x.tokens, weight.group
    check_rows(x, tokens, width)
    if x.group != group or out.shape != (tokens, rows):
        raise ValueError(f"linear: x {x.shape} of group {x.group}, weight {weight.shape} of group {group}, {out.shape}")
    flags = (bias is not None) + 2 * (residual is not None)
    low = x.stride // 2  # where the second half of a row of codes begins
    sources = (weight.codes, weight.scales, x.codes, low, x.scales, x.sums)
    results = (bias, residual, flags, out, rows, width)
    if x.planes == 1 or tokens > ROW_FORM_TOKENS:
        floats = TILE_TOKENS * TILE_ROWS + (width // group) * TILE_ROWS + width * TILE_ROWS // 4
        scratch = stream.scratch(floats)
        tasks = -(-rows // TILE_ROWS)
        arrays = (*sources, x.outliers, *results, tokens, stream.threads, scratch, scratch.shape[1])
        stream.launch(PANEL_KERNELS[group, x.planes][0], tasks, *arrays)
        return
    per_task = rows_per_task(rows, width, stream.threads)
    tasks = -(-rows // per_task)
    stream.launch(ROW_KERNELS[group][0], tasks, *sources, *results, per_task, stream.threads, tokens)


def rows_per_task(rows: int, row_bytes: int, threads: int) -> int:
    """About 4 tasks a thread, so that none waits long for the last, of 16 KiB to 512 KiB of weights each: the longer
    a core reads on, the better its prefetchers do (9% on a 1B model, against tasks of 64 KiB)."""
    wanted = rows * row_bytes // (4 * threads)
    return max(1, min(max(wanted, 16 << 10), 512 << 10) // row_bytes)
