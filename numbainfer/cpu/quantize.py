"""Quantization to int8 groups: activations between operators, and weights when a model is converted."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy import float32, int32

from numbainfer.cpu.compile import kernel
from numbainfer.cpu.launch import Stream
from numbainfer.cpu.simd import (
    absolute,
    advance,
    count_up,
    get,
    high_byte,
    hmax,
    hsum,
    hsum_i32,
    load,
    low_byte,
    maximum,
    next_up,
    put,
    round_i32,
    splat,
    splat_i32,
    store_i8x16,
    times256,
)
from numbainfer.quantization import QuantizedMatrix, QuantizedRows


@njit
def quantize_row(x, width, group, planes, codes, low, scales, sums):
    """x[width] to one row of codes (low bytes from `low` on, for two planes), scales and sums."""
    for g in range(width // group):
        largest = absolute(load(x, g * group))
        for i in range(g * group + 16, (g + 1) * group, 16):
            largest = maximum(largest, absolute(load(x, i)))
        m = hmax(largest)
        top = float32(127) if planes == 1 else float32(127 * 256)
        # top / m must stay finite, so a group of values under 1e-33 counts as zeros
        inverse = splat(top / m if m > float32(1e-33) else float32(0))
        total = splat_i32(int32(0))
        for i in range(g * group, (g + 1) * group, 16):
            q = round_i32(load(x, i) * inverse)
            if planes == 2:
                high = high_byte(q)
                low_part = low_byte(q, high)
                store_i8x16(codes, i, high)
                store_i8x16(codes, low + i, low_part)
                total = total + times256(high) + low_part
            else:
                store_i8x16(codes, i, q)
                total = total + q
        scales[g] = m / top
        sums[g] = hsum_i32(total)


@kernel
def _quantize(task, worker, x, width, group, planes, codes, stride, scales, sums):
    groups = width // group
    row, at = advance(codes, task * stride), task * groups
    quantize_row(
        advance(x, task * width), width, group, planes, row, stride // planes, advance(scales, at), advance(sums, at)
    )


def quantize(stream: Stream, x: np.ndarray, out: QuantizedRows) -> None:
    """See registry.quantize. A task is a row."""
    tokens, width = x.shape
    check_rows(out, tokens, width)
    stream.launch(_quantize, tokens, x, width, *row_arguments(out))


def row_arguments(rows: QuantizedRows) -> tuple:
    """(group, planes, codes, stride, scales, sums), as kernels that quantize take them."""
    return (rows.group, rows.planes, rows.codes, rows.stride, rows.scales, rows.sums)


def check_rows(rows: QuantizedRows, tokens: int, width: int) -> None:
    """The shapes that kernels rely on."""
    if rows.shape != (tokens, width) or rows.codes.shape[0] < tokens or width % rows.group or rows.group % 16:
        raise ValueError(f"QuantizedRows {rows.shape} of group {rows.group} can't hold [{tokens}, {width}]")


@kernel
def _quantize_matrix(task, worker, x, rows, width, group, rows_per_task, codes, scales, faults):
    for row in range(task * rows_per_task, min(rows, (task + 1) * rows_per_task)):
        for g in range(width // group):
            start = row * width + g * group
            largest = splat(float32(0))
            check = splat(float32(0))
            for i in range(0, group, 16):
                v = load(x, start + i)
                largest = maximum(largest, absolute(v))
                check = check + v * splat(float32(0))  # NaN if any value is NaN or infinite
            m = hmax(largest)
            at = row * (width // group) + g
            if hsum(check) != 0:  # a sum: maxima may drop a NaN
                count_up(faults, 0)
                m = float32(0)
            elif m > float32(65504 * 127):
                count_up(faults, 1)
                m = float32(0)
            put(scales, at, m / float32(127))
            # Scales below 6e-5 are float16 subnormals, rounded to coarse steps: take the next step up where the
            # largest code would not fit in 127.
            if m > get(scales, at) * float32(127.49):
                next_up(scales, at)
            s = get(scales, at)
            inverse = splat(float32(1) / s if s > 0 else float32(0))
            for i in range(0, group, 16):
                store_i8x16(codes, start + i, round_i32(load(x, start + i) * inverse))


def quantize_matrix(stream: Stream, x: np.ndarray, out: QuantizedMatrix, faults: np.ndarray) -> None:
    """See registry.quantize_matrix. A task is about 64 Ki values."""
    rows, width = x.shape
    if out.shape != x.shape or width % out.group:
        raise ValueError(f"can't quantize {x.shape} into {out.shape} in groups of {out.group}")
    per_task = max(1, 65536 // width)
    tasks = -(-rows // per_task)
    x = np.ascontiguousarray(x)
    stream.launch(_quantize_matrix, tasks, x, rows, width, out.group, per_task, out.codes, out.scales, faults)
