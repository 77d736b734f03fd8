"""Causal attention over the paged KV cache, with the online softmax.

A task is one token and one key/value head: its query heads share every key and value that is read. Keys come page by
page: the scores of a page, their maximum, what this page adds to the sum of weights and to the weighted values.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy import float32

from numbainfer.cpu.compile import kernel
from numbainfer.cpu.launch import Stream
from numbainfer.cpu.quantize import check_rows, quantize
from numbainfer.cpu.rope import PAGE, check_pages
from numbainfer.cpu.simd import advance, exp, fma, get, hmax, hsum, load, maximum, splat, store
from numbainfer.quantization import QuantizedRows


@njit
def _dot(q, k, count):
    whole = count // 16 * 16
    acc = splat(float32(0))
    for i in range(0, whole, 16):
        acc = fma(load(q, i), load(k, i), acc)
    total = hsum(acc)
    for i in range(whole, count):
        total += q[i] * get(k, i)
    return total


@njit
def _weigh(weights, v, keys, count, decay, out):
    """out = out * decay + weights[keys] @ v[keys, count]"""
    whole = count // 16 * 16
    for i in range(0, whole, 16):
        acc = load(out, i) * splat(decay)
        for j in range(keys):
            acc = fma(splat(weights[j]), load(v, j * count + i), acc)
        store(out, i, acc)
    for i in range(whole, count):
        total = out[i] * decay
        for j in range(keys):
            total += weights[j] * get(v, j * count + i)
        out[i] = total


@njit
def _exponentials(scores, largest):
    """scores[64] to e^(score - largest) in place; returns their sum."""
    sums = splat(float32(0))
    for i in range(0, PAGE, 16):
        e = exp(load(scores, i) - splat(largest))
        store(scores, i, e)
        sums = sums + e
    return hsum(sums)


@kernel
def _attention(
    task,
    worker,
    qkv,
    heads,
    kv_heads,
    head_dim,
    scale,
    positions,
    sequences,
    k_pages,
    v_pages,
    page_table,
    pages_per_sequence,
    out,
    scratch,
    floats,
):
    token, g = task // kv_heads, task % kv_heads
    shared = heads // kv_heads  # query heads that read this key/value head
    q = advance(qkv, (token * (heads + 2 * kv_heads) + g * shared) * head_dim)
    o = advance(out, (token * heads + g * shared) * head_dim)
    tops = advance(scratch, worker * floats)  # [shared] running maxima, then [shared] sums, then [64] scores
    sums = advance(tops, shared)
    scores = advance(sums, shared)
    for h in range(shared):
        tops[h] = float32(-np.inf)
        sums[h] = float32(0)
        for i in range(head_dim):
            o[h * head_dim + i] = float32(0)
    table = advance(page_table, sequences[token] * pages_per_sequence)
    length = positions[token] + 1
    for first in range(0, length, PAGE):
        keys = min(PAGE, length - first)
        page = (table[first // PAGE] * kv_heads + g) * PAGE * head_dim
        k, v = advance(k_pages, page), advance(v_pages, page)
        for h in range(shared):
            for j in range(keys):
                scores[j] = _dot(advance(q, h * head_dim), advance(k, j * head_dim), head_dim) * scale
            for j in range(keys, PAGE):
                scores[j] = float32(-np.inf)
            top = hmax(maximum(maximum(load(scores, 0), load(scores, 16)), maximum(load(scores, 32), load(scores, 48))))
            top = max(top, tops[h])
            decay = math.exp(tops[h] - top)  # 0 on the first page
            tops[h] = top
            sums[h] = sums[h] * decay + _exponentials(scores, top)
            _weigh(scores, v, keys, head_dim, decay, advance(o, h * head_dim))
    for h in range(shared):
        inverse = float32(1) / sums[h]
        for i in range(head_dim):
            o[h * head_dim + i] *= inverse


def attention(
    stream: Stream,
    qkv: np.ndarray,
    heads: int,
    scale: float,
    positions: np.ndarray,
    sequences: np.ndarray,
    k_pages: np.ndarray,
    v_pages: np.ndarray,
    page_table: np.ndarray,
    out: np.ndarray | QuantizedRows,
) -> None:
    """See registry.attention."""
    kv_heads, head_dim = check_pages(qkv, heads, k_pages, v_pages)
    tokens, width = qkv.shape[0], heads * head_dim
    if out.shape != (tokens, width):
        raise ValueError(f"attention: {tokens} tokens of {heads} heads of {head_dim} do not give {out.shape}")
    values = out if isinstance(out, np.ndarray) else stream.buffer(tokens * width).reshape(tokens, width)
    shared = heads // kv_heads
    scratch = stream.scratch(2 * shared + PAGE)
    stream.launch(
        _attention,
        *(tokens * kv_heads, qkv, heads, kv_heads, head_dim, scale, positions, sequences, k_pages, v_pages),
        *(page_table, page_table.shape[1], values, scratch, scratch.shape[1]),
    )
    if isinstance(out, QuantizedRows):
        check_rows(out, tokens, width)
        quantize(stream, values, out)
