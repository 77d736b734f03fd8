"""Mixtures of experts: routing tokens to experts, the experts' matrices, and adding up what they found.

The experts' product has two forms, by how many places there are:
- few (decode): a task is one place and some rows of its expert. Only chosen experts are read, each once for each place.
- many (prefill): a task is 32 rows of one expert, which meet all of its places, as linear's panels meet all tokens.
  The tokens of a tile stand apart in x, so they are copied together first: a tenth of the work at 2,048 columns.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy import float32, int32, int64

from numbainfer.cpu.compile import Kernel, kernel
from numbainfer.cpu.elementwise import softmax_row
from numbainfer.cpu.launch import Stream
from numbainfer.cpu.linear_float import dot_row
from numbainfer.cpu.linear_int8 import AHEAD, PANEL_KERNELS, ROW_KERNELS, add_outliers, pack_panel, rows_per_task
from numbainfer.cpu.quantize import check_rows
from numbainfer.cpu.simd import (
    advance,
    as_bytes,
    as_floats,
    as_ints,
    fma,
    load,
    local_floats,
    splat,
    store,
)
from numbainfer.cpu.tile import TILE_ROWS, TILE_TOKENS, tile_spill
from numbainfer.quantization import GROUPS, Matrix, QuantizedMatrix, QuantizedRows


@kernel
def _route(task, worker, logits, count, k, renormalise, experts, weights, scratch, floats):
    probabilities = advance(scratch, worker * floats)
    softmax_row(advance(logits, task * count), count, probabilities)
    total = float32(0)
    for j in range(k):
        best = 0
        for e in range(1, count):
            if probabilities[e] > probabilities[best]:
                best = e
        experts[task * k + j] = int32(best)
        weights[task * k + j] = probabilities[best]
        total += probabilities[best]
        probabilities[best] = float32(-1)  # chosen
    if renormalise:
        for j in range(k):
            weights[task * k + j] /= total


def route(stream: Stream, logits: np.ndarray, renormalise: int, experts: np.ndarray, weights: np.ndarray) -> None:
    """See registry.route. A task is a token."""
    (tokens, count), k = logits.shape, experts.shape[1]
    if experts.shape != (tokens, k) or weights.shape != (tokens, k) or not 1 <= k <= count:
        raise ValueError(f"route: logits {logits.shape}, experts {experts.shape}, weights {weights.shape}")
    scratch = stream.scratch(count)
    stream.launch(_route, tokens, logits, count, k, renormalise, experts, weights, scratch, scratch.shape[1])


@kernel
def _group_by_expert(task, worker, experts, choices, k, count, starts, tokens, places):
    for e in range(count + 1):
        starts[e] = int32(0)
    for i in range(choices):
        starts[experts[i] + 1] += int32(1)
    for e in range(count):
        starts[e + 1] += starts[e]
    for i in range(choices):  # starts[e] is the next place of e meanwhile, and ends as the first of e + 1
        e = experts[i]
        place = starts[e]
        places[i], tokens[place] = place, int32(i // k)
        starts[e] = place + int32(1)
    for e in range(count, 0, -1):
        starts[e] = starts[e - 1]
    starts[0] = int32(0)


def group_by_expert(
    stream: Stream, experts: np.ndarray, starts: np.ndarray, tokens: np.ndarray, places: np.ndarray
) -> None:
    """See registry.group_by_expert. A counting sort, in one task: 10 us for 4,096 choices."""
    if places.shape != experts.shape or tokens.shape != (experts.size,):
        raise ValueError(f"group_by_expert: experts {experts.shape}, tokens {tokens.shape}, places {places.shape}")
    arrays = (experts, experts.size, experts.shape[1], starts.shape[0] - 1, starts, tokens, places)
    stream.launch(_group_by_expert, 1, *arrays)


@njit
def _expert_of(place, starts):
    e = 0
    while starts[e + 1] <= place:
        e += 1
    return e


@njit
def _copy_floats(source, target, count):
    whole = count // 16 * 16
    for i in range(0, whole, 16):
        store(target, i, load(source, i))
    for i in range(whole, count):
        target[i] = source[i]


def _make_int8_kernels(group: int, planes: int) -> tuple[Kernel, Kernel]:
    """The form for few places (of two planes), and the one for many."""
    _, dot_row = ROW_KERNELS[group]
    _, tile_product = PANEL_KERNELS[group, planes]

    @kernel
    def few(task, worker, w, ws, x, low, xs, sums, starts, tokens, gathered, y, rows, width, per_task, parts):
        place, first = task // parts, task % parts * per_task
        at, groups = _expert_of(place, starts) * rows, width // group
        source = int64(tokens[place]) if gathered else place
        x, xs, sums = advance(x, source * 2 * low), advance(xs, source * groups), advance(sums, source * groups)
        factors = local_floats()
        for row in range(first, min(rows, first + per_task)):
            w_row, ws_row = advance(w, (at + row) * width), advance(ws, (at + row) * groups)
            y[place * rows + row] = dot_row(
                w_row, advance(w_row, AHEAD), ws_row, x, low, xs, sums, width, factors, groups
            )

    @kernel
    def many(
        task, worker, w, ws, x, low, xs, sums, outliers, starts, tokens, gathered, y, rows, width, panels, scratch,
        floats
    ):  # fmt: skip
        expert, first = task // panels, task % panels * TILE_ROWS
        begin, end = int64(starts[expert]), int64(starts[expert + 1])
        if begin == end:
            return
        groups, valid = width // group, min(TILE_ROWS, rows - first)
        at = expert * rows + first
        w, ws = advance(w, at * width), advance(ws, at * groups)
        # This worker's: a finished tile, the panel's scales, the tile's scales, sums and codes, the panel.
        corner = advance(scratch, worker * floats)
        scales = advance(corner, TILE_TOKENS * TILE_ROWS)
        xs_tile = advance(scales, groups * TILE_ROWS)
        sums_tile = as_ints(advance(xs_tile, TILE_TOKENS * groups))
        x_tile = advance(xs_tile, 2 * TILE_TOKENS * groups)
        stride = planes * low  # of a row in the tile
        words = stride // 4  # its bytes, as floats to be copied
        panel = as_bytes(advance(x_tile, TILE_TOKENS * words))
        pack_panel(w, ws, valid, width, groups, panel, scales)
        for tile in range(begin, end, TILE_TOKENS):
            for j in range(TILE_TOKENS):  # a place past the end repeats the last, and its result is dropped
                place = min(tile + j, end - 1)
                source = int64(tokens[place]) if gathered else place
                _copy_floats(as_floats(advance(x, source * 2 * low)), advance(x_tile, j * words), words)
                for g in range(groups):
                    xs_tile[j * groups + g] = xs[source * groups + g]
                    sums_tile[j * groups + g] = sums[source * groups + g]
            codes = as_bytes(x_tile)
            acc = tile_product(panel, scales, codes, low, stride, xs_tile, sums_tile, groups, False, w)
            tile_spill(acc, corner)
            for j in range(min(TILE_TOKENS, end - tile)):
                source, row = int64(tokens[tile + j]) if gathered else tile + j, advance(corner, j * TILE_ROWS)
                codes, blocks = advance(x, source * 2 * low), advance(outliers, source * (1 + low // 4))
                if planes == 1 and blocks[0]:
                    add_outliers(row, panel, scales, group, codes, low, advance(xs_tile, j * groups), blocks)
                _copy_floats(row, advance(y, (tile + j) * rows + first), valid)

    return few, many


_INT8_KERNELS = {(g, planes): _make_int8_kernels(g, planes) for g in GROUPS for planes in (1, 2)}


@kernel
def _few_float(task, worker, w, x, starts, tokens, gathered, y, rows, width, per_task, parts):
    place, first = task // parts, task % parts * per_task
    at = _expert_of(place, starts) * rows
    x = advance(x, (int64(tokens[place]) if gathered else place) * width)
    for row in range(first, min(rows, first + per_task)):
        y[place * rows + row] = dot_row(advance(w, (at + row) * width), x, width)


@kernel
def _many_float(task, worker, w, x, starts, tokens, gathered, y, rows, width, per_task, parts):
    expert, first = task // parts, task % parts * per_task
    for row in range(first, min(rows, first + per_task)):  # a row stays in the cache for all of its places
        w_row = advance(w, (expert * rows + row) * width)
        for place in range(starts[expert], starts[expert + 1]):
            source = int64(tokens[place]) if gathered else place
            y[place * rows + row] = dot_row(w_row, advance(x, source * width), width)


def linear_experts(
    stream: Stream,
    x: np.ndarray | QuantizedRows,
    weight: Matrix | QuantizedMatrix,
    starts: np.ndarray,
    tokens: np.ndarray | None,
    out: np.ndarray,
) -> None:
    """See registry.linear_experts."""
    experts, (places, rows), width = starts.shape[0] - 1, out.shape, weight.shape[1]
    fits = weight.shape[0] == experts * rows and x.shape[1] == width
    if not fits or (x.shape[0] if tokens is None else tokens.shape[0]) != places:
        raise ValueError(f"linear_experts: x {x.shape}, {experts} experts of {weight.shape}, out {out.shape}")
    if isinstance(x, QuantizedRows) != isinstance(weight, QuantizedMatrix):
        raise ValueError("linear_experts: an int8 matrix takes QuantizedRows, a floating-point one a float32 array")
    few = 2 * places <= experts  # so that most experts have one place or none
    where = (starts, tokens, int(tokens is not None), out, rows, width)
    if isinstance(weight, Matrix):
        per_task = rows_per_task(rows, width * weight.data.itemsize, stream.threads)
        parts = -(-rows // per_task)
        kernel, count = (_few_float, places) if few else (_many_float, experts)
        stream.launch(kernel, count * parts, weight.data, x, *where, per_task, parts)
        return
    assert isinstance(x, QuantizedRows)
    check_rows(x, x.tokens, width)
    if x.group != weight.group:
        raise ValueError(f"linear_experts: x {x.shape} of group {x.group}, weight of group {weight.group}")
    low = x.stride // 2
    arrays = (weight.codes, weight.scales, x.codes, low, x.scales, x.sums)
    kernel_few, kernel_many = _INT8_KERNELS[weight.group, x.planes]
    if few and x.planes == 2:
        per_task = rows_per_task(rows, width, stream.threads)
        parts = -(-rows // per_task)
        stream.launch(kernel_few, places * parts, *arrays, *where, per_task, parts)
        return
    groups, panels = width // weight.group, -(-rows // TILE_ROWS)
    tile = TILE_TOKENS * (TILE_ROWS + 2 * groups + x.planes * low // 4)
    scratch = stream.scratch(tile + groups * TILE_ROWS + width * TILE_ROWS // 4)
    stream.launch(kernel_many, experts * panels, *arrays, x.outliers, *where, panels, scratch, scratch.shape[1])


_COMBINE_COLUMNS = 512  # of a task: one token's work spreads over the cores


@kernel
def _combine(task, worker, values, places, weights, k, shared, gate, has_shared, residual, width, parts, out):
    token, first = task // parts, task % parts * _COMBINE_COLUMNS
    columns = min(_COMBINE_COLUMNS, width - first)
    at = token * width + first
    factor = float32(0)
    if has_shared:
        factor = float32(1) / (float32(1) + math.exp(-gate[token]))
    whole = columns // 16 * 16
    for i in range(0, whole, 16):
        acc = load(residual, at + i)
        for j in range(k):
            place = places[token * k + j]
            acc = fma(splat(weights[token * k + j]), load(values, place * width + first + i), acc)
        if has_shared:
            acc = fma(splat(factor), load(shared, at + i), acc)
        store(out, at + i, acc)
    for i in range(whole, columns):
        total = residual[at + i]
        for j in range(k):
            total += weights[token * k + j] * values[places[token * k + j] * width + first + i]
        if has_shared:
            total += factor * shared[at + i]
        out[at + i] = total


def combine(
    stream: Stream,
    values: np.ndarray,
    places: np.ndarray,
    weights: np.ndarray,
    shared: np.ndarray | None,
    gate: np.ndarray | None,
    residual: np.ndarray,
    out: np.ndarray,
) -> None:
    """See registry.combine."""
    (tokens, k), width = places.shape, values.shape[1]
    fits = weights.shape == places.shape and values.shape[0] == tokens * k
    fits = fits and residual.shape == out.shape == (tokens, width)
    if shared is not None and gate is not None:
        fits = fits and shared.shape == (tokens, width) and gate.shape == (tokens, 1)
    if not fits or (shared is None) != (gate is None):
        raise ValueError(f"combine: values {values.shape}, places {places.shape}, out {out.shape} do not fit")
    parts = -(-width // _COMBINE_COLUMNS)
    arrays = (values, places, weights, k, shared, gate, int(shared is not None), residual, width, parts, out)
    stream.launch(_combine, tokens * parts, *arrays)
