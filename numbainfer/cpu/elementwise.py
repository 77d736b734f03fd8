"""Operators over rows: embedding, RMSNorm, SwiGLU, add, softmax. A task is a token's row."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy import float32

from numbainfer.cpu.compile import kernel
from numbainfer.cpu.launch import Stream
from numbainfer.cpu.quantize import check_rows, quantize_row, row_arguments, row_of
from numbainfer.cpu.simd import (
    advance,
    exp,
    fma,
    get,
    hmax,
    hsum,
    load,
    load_i8x16,
    maximum,
    splat,
    store,
    to_f32,
)
from numbainfer.quantization import Matrix, QuantizedMatrix, QuantizedRows


@kernel
def _embedding(task, worker, tokens, table, vocabulary, width, out):
    token = tokens[task]
    row = advance(out, task * width)
    for i in range(width):
        row[i] = get(table, token * width + i) if 0 <= token < vocabulary else float32(0)


@kernel
def _embedding_int8(task, worker, tokens, codes, scales, vocabulary, width, group, out):
    token = tokens[task]
    row = advance(out, task * width)
    if not 0 <= token < vocabulary:
        for i in range(width):
            row[i] = float32(0)
        return
    for i in range(0, width, 16):
        scale = get(scales, (token * width + i) // group)
        store(row, i, to_f32(load_i8x16(codes, token * width + i)) * splat(scale))


def embedding(stream: Stream, tokens: np.ndarray, table: Matrix | QuantizedMatrix, out: np.ndarray) -> None:
    """See registry.embedding."""
    vocabulary, width = table.shape
    if out.shape != (tokens.shape[0], width):
        raise ValueError(f"embedding: {tokens.shape[0]} tokens of a table {table.shape} do not give {out.shape}")
    if isinstance(table, QuantizedMatrix):
        arrays = (tokens, table.codes, table.scales, vocabulary, width, table.group, out)
        stream.launch(_embedding_int8, tokens.shape[0], *arrays)
    else:
        stream.launch(_embedding, tokens.shape[0], tokens, table.data, vocabulary, width, out)


@njit
def norm_row(x, weight, width, eps, out):
    """RMSNorm of one row of `width` values; out may be x."""
    whole = width // 16 * 16
    squares = splat(float32(0))
    for i in range(0, whole, 16):
        v = load(x, i)
        squares = fma(v, v, squares)
    total = hsum(squares)
    for i in range(whole, width):
        total += x[i] * x[i]
    factor = float32(1) / math.sqrt(total / float32(width) + eps)
    for i in range(0, whole, 16):
        store(out, i, load(x, i) * splat(factor) * load(weight, i))
    for i in range(whole, width):
        out[i] = x[i] * factor * weight[i]


@kernel
def _rmsnorm(task, worker, x, weight, width, eps, out):
    norm_row(advance(x, task * width), weight, width, eps, advance(out, task * width))


@kernel
def _rmsnorm_quantize(
    task, worker, x, weight, width, eps, group, planes, codes, stride, scales, sums, outliers, scratch, floats
):
    row = advance(scratch, worker * floats)
    norm_row(advance(x, task * width), weight, width, eps, row)
    quantize_row(row, width, *row_of(task, 0, width, group, planes, codes, stride, scales, sums, outliers))


def rmsnorm(stream: Stream, x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray | QuantizedRows) -> None:
    """See registry.rmsnorm."""
    tokens, width = x.shape
    if weight.shape != (width,) or out.shape != x.shape:
        raise ValueError(f"rmsnorm: x {x.shape}, weight {weight.shape}, out {out.shape} do not fit")
    if isinstance(out, QuantizedRows):
        check_rows(out, tokens, width)
        scratch = stream.scratch(width)
        arrays = (x, weight, width, eps, *row_arguments(out), scratch, scratch.shape[1])
        stream.launch(_rmsnorm_quantize, tokens, *arrays)
    else:
        stream.launch(_rmsnorm, tokens, x, weight, width, eps, out)


@njit
def _swiglu_row(gate, up, width, out):
    whole = width // 16 * 16
    one, zero = splat(float32(1)), splat(float32(0))
    for i in range(0, whole, 16):
        z = load(gate, i)
        store(out, i, z / (one + exp(zero - z)) * load(up, i))
    for i in range(whole, width):
        out[i] = gate[i] / (float32(1) + math.exp(-gate[i])) * up[i]


@kernel
def _swiglu(task, worker, gate_up, width, out):
    gate = advance(gate_up, task * 2 * width)
    _swiglu_row(gate, advance(gate, width), width, advance(out, task * width))


@kernel
def _swiglu_quantize(
    task, worker, gate_up, width, per_task, parts, group, planes, codes, stride, scales, sums, outliers, scratch, floats
):
    token, first = task // parts, task % parts * per_task
    columns = min(per_task, width - first)
    gate = advance(gate_up, token * 2 * width + first)
    values = advance(scratch, worker * floats)
    _swiglu_row(gate, advance(gate, width), columns, values)
    quantize_row(values, columns, *row_of(token, first, width, group, planes, codes, stride, scales, sums, outliers))


def swiglu(stream: Stream, gate_up: np.ndarray, out: np.ndarray | QuantizedRows) -> None:
    """See registry.swiglu."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    if out.shape != (tokens, width):
        raise ValueError(f"swiglu: gate_up {gate_up.shape}, out {out.shape} do not fit")
    if isinstance(out, QuantizedRows):
        check_rows(out, tokens, width)
        # Two planes know no outliers, so a row may be split: one token's work spreads over the cores. 1024 is a
        # multiple of every group, and about 1 us of work.
        per_task = 1024 if out.planes == 2 else width
        parts = -(-width // per_task)
        scratch = stream.scratch(per_task)
        arrays = (gate_up, width, per_task, parts, *row_arguments(out), scratch, scratch.shape[1])
        stream.launch(_swiglu_quantize, tokens * parts, *arrays)
    else:
        stream.launch(_swiglu, tokens, gate_up, width, out)


@kernel
def _add(task, worker, x, y, width, out):
    base = task * width
    whole = width // 16 * 16
    for i in range(base, base + whole, 16):
        store(out, i, load(x, i) + load(y, i))
    for i in range(base + whole, base + width):
        out[i] = x[i] + y[i]


def add(stream: Stream, x: np.ndarray, y: np.ndarray, out: np.ndarray) -> None:
    """See registry.add."""
    if x.shape != y.shape or x.shape != out.shape:
        raise ValueError(f"add: x {x.shape}, y {y.shape}, out {out.shape} differ")
    stream.launch(_add, x.shape[0], x, y, x.shape[1], out)


@njit
def softmax_row(x, width, out):
    """softmax of one row of `width` values; out may be x."""
    whole = width // 16 * 16
    largest = float32(-np.inf)
    if whole:
        top = load(x, 0)
        for i in range(16, whole, 16):
            top = maximum(top, load(x, i))
        largest = hmax(top)
    for i in range(whole, width):
        largest = max(largest, x[i])
    sums = splat(float32(0))
    for i in range(0, whole, 16):
        e = exp(load(x, i) - splat(largest))
        store(out, i, e)
        sums = sums + e
    total = hsum(sums)
    for i in range(whole, width):
        e1 = math.exp(x[i] - largest)
        out[i] = e1
        total += e1
    inverse = float32(1) / total
    for i in range(0, whole, 16):
        store(out, i, load(out, i) * splat(inverse))
    for i in range(whole, width):
        out[i] = out[i] * inverse


@kernel
def _softmax(task, worker, x, width, out):
    softmax_row(advance(x, task * width), width, advance(out, task * width))


def softmax(stream: Stream, x: np.ndarray, out: np.ndarray) -> None:
    """See registry.softmax."""
    if x.shape != out.shape or x.shape[1] == 0:
        raise ValueError(f"softmax: x {x.shape}, out {out.shape}")
    stream.launch(_softmax, x.shape[0], x, x.shape[1], out)
