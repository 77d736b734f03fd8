"""Quantization to int8 groups: activations between operators, and weights when a model is converted."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy import float32, int32

from numbainfer.cpu.compile import kernel
from numbainfer.cpu.launch import Stream
from numbainfer.cpu.simd import (
    absolute,
    advance,
    count_up,
    fma,
    get,
    high_byte,
    hmax,
    hsum,
    hsum_i32,
    load,
    load_word,
    low_byte,
    maximum,
    next_up,
    put,
    round_i32,
    splat,
    splat_i32,
    store_i8x16,
    store_word,
    times256,
)
from numbainfer.quantization import QuantizedMatrix, QuantizedRows

CLIP = float32(4)
"""With one plane, 127 stands for at most this many times the row's root mean square; what is larger has a high byte.

Rounding then costs at most CLIP / 127 / sqrt(12) = 0.9% of the row's size, however large its outliers are; 0.6 to 0.8%
on real models, as much as int8 weights do, where plain int8 costs 0.7 to 1.4% (1.8% at worst). One block of 4 columns
in 50 then has a high byte."""


@njit
def quantize_row(x, width, group, planes, codes, low, scales, sums, outliers):
    """x[width] to one row of codes (its second half from `low` on), scales, sums and, for one plane, outliers."""
    limit = clip(x, width) if planes == 1 else float32(0)
    found = 0
    for g in range(width // group):
        first = g * group
        largest = absolute(load(x, first))
        for i in range(first + 16, first + group, 16):
            largest = maximum(largest, absolute(load(x, i)))
        m = hmax(largest)
        # What becomes 127 of one plane, or 32512 where there are high bytes. It must not be so small that the
        # inverse is infinite: a group of values under 1e-33 counts as zeros.
        top, at = float32(32512), m
        if planes == 1 and m <= limit:
            top = float32(127)
        elif planes == 1 and limit * float32(256) > m:
            top, at = float32(127), limit
        inverse = splat(top / at if m > float32(1e-33) else float32(0))
        total = splat_i32(int32(0))
        if planes == 1 and m <= limit:
            for i in range(first, first + group, 16):
                q = round_i32(load(x, i) * inverse)
                store_i8x16(codes, i, q)
                total = total + q
        else:
            lows, highs = (first + low, first) if planes == 2 else (first, low + 4 * found)
            for i in range(0, group, 16):
                q = round_i32(load(x, first + i) * inverse)
                high = high_byte(q)
                low_part = low_byte(q, high)
                store_i8x16(codes, highs + i, high)
                store_i8x16(codes, lows + i, low_part)
                total = total + times256(high) + low_part
            if planes == 1:
                found = _pack_outliers(codes, low, group, first, outliers, found)
        scales[g] = at / top
        sums[g] = hsum_i32(total)
    if planes == 1:
        outliers[0] = found


@njit
def clip(x, width):
    """CLIP times the root mean square of x[width]."""
    squares = splat(float32(0))
    for i in range(0, width, 16):
        v = load(x, i)
        squares = fma(v, v, squares)
    return CLIP * float32(math.sqrt(hsum(squares) / float32(width)))


@njit
def _pack_outliers(codes, low, group, column, outliers, found):
    """Of a group's high bytes, written behind `found` packed blocks, keeps the blocks of 4 that are not zero."""
    fresh = low + 4 * found
    for i in range(0, group, 4):
        word = load_word(codes, fresh + i)
        store_word(codes, low + 4 * found, word)
        outliers[1 + found] = int32(column + i)
        found += 1 if word != 0 else 0
    return found


@njit
def row_of(row, first, width, group, planes, codes, stride, scales, sums, outliers):
    """What quantize_row takes behind (x, width), for the columns from `first` on of that row of QuantizedRows."""
    half, at = stride // 2, (row * width + first) // group
    codes, outliers = advance(codes, row * stride + first), advance(outliers, row * (1 + half // 4))
    return group, planes, codes, half, advance(scales, at), advance(sums, at), outliers


@kernel
def _quantize(task, worker, x, width, group, planes, codes, stride, scales, sums, outliers):
    row = row_of(task, 0, width, group, planes, codes, stride, scales, sums, outliers)
    quantize_row(advance(x, task * width), width, *row)


def quantize(stream: Stream, x: np.ndarray, out: QuantizedRows) -> None:
    """See registry.quantize. A task is a row."""
    tokens, width = x.shape
    check_rows(out, tokens, width)
    stream.launch(_quantize, tokens, x, width, *row_arguments(out))


def row_arguments(rows: QuantizedRows) -> tuple:
    """(group, planes, codes, stride, scales, sums, outliers), as kernels that quantize take them."""
    return (rows.group, rows.planes, rows.codes, rows.stride, rows.scales, rows.sums, rows.outliers)


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
