"""out = x @ W.T with weights in float32, float16 or bfloat16 and float32 arithmetic.

A task is a block of rows of W; each row meets up to four tokens at a time, so it is read from memory once.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy import float32

from numbainfer.cpu.compile import kernel
from numbainfer.cpu.launch import Stream
from numbainfer.cpu.linear_int8 import finish, linear_int8, rows_per_task
from numbainfer.cpu.simd import advance, fma, get, hsum, load, prefetch, splat
from numbainfer.quantization import Matrix, QuantizedMatrix, QuantizedRows

AHEAD = 2048  # elements of prefetch distance


@njit
def dot_row(w, x, width):
    """The product of a row and a token, in two chains of additions, or the adder's latency would be the limit."""
    whole = width // 16 * 16  # columns in full vectors
    a = b = splat(float32(0))
    for i in range(0, whole - 16, 32):
        prefetch(w, i + AHEAD)
        a = fma(load(w, i), load(x, i), a)
        b = fma(load(w, i + 16), load(x, i + 16), b)
    if whole % 32:
        a = fma(load(w, whole - 16), load(x, whole - 16), a)
    total = hsum(a + b)
    for i in range(whole, width):
        total += get(w, i) * x[i]
    return total


@njit
def _dot4(w, x0, x1, x2, x3, width):
    """dot_row of four tokens, which does the same in the same order for each."""
    whole = width // 16 * 16
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = splat(float32(0))
    for i in range(0, whole - 16, 32):
        v = load(w, i)
        a0, a1 = fma(v, load(x0, i), a0), fma(v, load(x1, i), a1)
        a2, a3 = fma(v, load(x2, i), a2), fma(v, load(x3, i), a3)
        v = load(w, i + 16)
        b0, b1 = fma(v, load(x0, i + 16), b0), fma(v, load(x1, i + 16), b1)
        b2, b3 = fma(v, load(x2, i + 16), b2), fma(v, load(x3, i + 16), b3)
    if whole % 32:
        v, i = load(w, whole - 16), whole - 16
        a0, a1 = fma(v, load(x0, i), a0), fma(v, load(x1, i), a1)
        a2, a3 = fma(v, load(x2, i), a2), fma(v, load(x3, i), a3)
    t0, t1, t2, t3 = hsum(a0 + b0), hsum(a1 + b1), hsum(a2 + b2), hsum(a3 + b3)
    for i in range(whole, width):
        weight = get(w, i)
        t0 += weight * x0[i]
        t1 += weight * x1[i]
        t2 += weight * x2[i]
        t3 += weight * x3[i]
    return t0, t1, t2, t3


@kernel
def _linear(task, worker, w, x, bias, residual, flags, y, rows, width, per_task, tokens):
    begin, end, last = task * per_task, min(rows, (task + 1) * per_task), tokens - 1
    if tokens == 1:
        for row in range(begin, end):
            finish(dot_row(advance(w, row * width), x, width), row, row, bias, residual, flags, y)
        return
    for first in range(0, tokens, 4):  # a token past the end repeats the last, and its result is dropped
        x0 = advance(x, first * width)
        x1 = advance(x, min(first + 1, last) * width)
        x2 = advance(x, min(first + 2, last) * width)
        x3 = advance(x, min(first + 3, last) * width)
        for row in range(begin, end):
            values = _dot4(advance(w, row * width), x0, x1, x2, x3, width)
            for j in range(min(4, tokens - first)):
                finish(values[j], row, (first + j) * rows + row, bias, residual, flags, y)


def linear(
    stream: Stream,
    x: np.ndarray | QuantizedRows,
    weight: Matrix | QuantizedMatrix,
    bias: np.ndarray | None,
    residual: np.ndarray | None,
    out: np.ndarray,
) -> None:
    """See registry.linear."""
    if isinstance(weight, QuantizedMatrix):
        if not isinstance(x, QuantizedRows):
            raise ValueError("linear: an int8 matrix takes QuantizedRows")
        return linear_int8(stream, x, weight, bias, residual, out)
    if isinstance(x, QuantizedRows):
        raise ValueError("linear: a floating-point matrix takes a float32 array")
    (rows, width), tokens = weight.shape, x.shape[0]
    if x.shape[1] != width or out.shape != (tokens, rows):
        raise ValueError(f"linear: x {x.shape}, weight {weight.shape}, out {out.shape} do not fit")
    flags = (bias is not None) + 2 * (residual is not None)
    per_task = rows_per_task(rows, width * weight.data.itemsize, stream.threads)
    tasks = -(-rows // per_task)
    stream.launch(_linear, tasks, weight.data, x, bias, residual, flags, out, rows, width, per_task, tokens)
    return None
