"""Quantization to int8 groups: activations between operators, and weights when a model is converted."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy import float32, int32

from numbainfer.cpu.compile import kernel
from numbainfer.cpu.launch import Stream
from numbainfer.cpu.simd import (
    absolute,
    get,
    hmax,
    hsum_i32,
    load,
    maximum,
    next_up,
    put,
    round_i32,
    splat,
    splat_i32,
    store_i8x16,
)
from numbainfer.quantization import QuantizedMatrix, QuantizedRows


@njit
def quantize_row(x, base, width, group, codes, code_base, scales, sums, group_base):
    """x[base : base + width] to codes[code_base :], and a scale and a sum of codes per group from group_base on."""
    for g in range(width // group):
        start = base + g * group
        largest = absolute(load(x, start))
        for i in range(16, group, 16):
            largest = maximum(largest, absolute(load(x, start + i)))
        m = hmax(largest)
        # 127 / m must stay finite, so a group of values under 1e-35 counts as zeros
        inverse = splat(float32(127) / m if m > float32(1e-35) else float32(0))
        total = splat_i32(int32(0))
        for i in range(0, group, 16):
            q = round_i32(load(x, start + i) * inverse)
            total = total + q
            store_i8x16(codes, code_base + g * group + i, q)
        scales[group_base + g] = m / float32(127)
        sums[group_base + g] = hsum_i32(total)


@kernel
def _quantize(task, worker, x, width, group, codes, code_stride, scales, sums):
    quantize_row(x, task * width, width, group, codes, task * code_stride, scales, sums, task * (width // group))


def quantize(stream: Stream, x: np.ndarray, out: QuantizedRows) -> None:
    """See registry.quantize. A task is a row."""
    tokens, width = x.shape
    check_rows(out, tokens, width)
    stream.launch(_quantize, tokens, x, width, out.group, out.codes, out.codes.shape[1], out.scales, out.sums)


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
            finite = hmax(absolute(check)) == 0 and m < float32(3.4e38)
            at = row * (width // group) + g
            if not finite:
                faults[0] = 1
                m = float32(0)
            elif m > float32(65504 * 127):
                faults[1] = 1
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
