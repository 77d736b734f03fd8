"""Causal attention over the paged KV cache, with the online softmax.

Keys come page by page: the scores of a page, their maximum, what this page adds to the sum of weights and to the
weighted values. Two forms:

- few tokens (decode): a task is one token and one key/value head, whose query heads share every key that is read.
- many (prefill): a task is BLOCK tokens and one key/value head. Each page is widened to float32 once, keys transposed,
  and meets four queries at a time in registers: scores and weighted values are both sums of outer products.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy import float32

from numbainfer.cpu.compile import kernel
from numbainfer.cpu.launch import Stream
from numbainfer.cpu.quantize import quantize
from numbainfer.cpu.rope import PAGE, check_pages
from numbainfer.cpu.simd import advance, exp, fma, get, hmax, hsum, load, maximum, splat, store
from numbainfer.cpu.tile import outer_add, outer_load, outer_store, outer_zero
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
def _largest(scores):
    """The largest of scores[64]."""
    return hmax(maximum(maximum(load(scores, 0), load(scores, 16)), maximum(load(scores, 32), load(scores, 48))))


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
    window,
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
    oldest = max(0, length - window) if window else 0
    for first in range(oldest // PAGE * PAGE, length, PAGE):
        unseen, keys = max(0, oldest - first), min(PAGE, length - first)
        page = (table[first // PAGE] * kv_heads + g) * PAGE * head_dim
        k, v = advance(k_pages, page), advance(v_pages, page)
        for h in range(shared):
            for j in range(unseen):
                scores[j] = float32(-np.inf)
            for j in range(unseen, keys):
                scores[j] = _dot(advance(q, h * head_dim), advance(k, j * head_dim), head_dim) * scale
            for j in range(keys, PAGE):
                scores[j] = float32(-np.inf)
            top = max(_largest(scores), tops[h])
            decay = math.exp(tops[h] - top)  # 0 on the first page
            tops[h] = top
            sums[h] = sums[h] * decay + _exponentials(scores, top)
            _weigh(scores, v, keys, head_dim, decay, advance(o, h * head_dim))
    for h in range(shared):
        inverse = float32(1) / sums[h]
        for i in range(head_dim):
            o[h * head_dim + i] *= inverse


BLOCK = 16  # tokens of a prefill task
QUERIES = 4  # queries in registers at a time
BLOCK_FORM_TOKENS = 8  # from here on, tokens are taken in blocks
LOWEST = float32(-1e38)  # stands for the top of no scores: e^(-inf - LOWEST) is 0, e^(-inf + inf) is not a number


@njit
def _widen_page(k, v, keys, head_dim, columns, k_turned, v_wide):
    """Keys [keys, d] as float32 [d, 64], values as [64, columns]; absent keys and columns as zeros."""
    for j in range(PAGE):
        for i in range(head_dim):
            k_turned[i * PAGE + j] = get(k, j * head_dim + i) if j < keys else float32(0)
        for i in range(columns):
            v_wide[j * columns + i] = get(v, j * head_dim + i) if j < keys and i < head_dim else float32(0)


@kernel
def _attention_block(
    task, worker, tokens, qkv, heads, kv_heads, head_dim, scale, window, positions, sequences, k_pages, v_pages,
    page_table, pages_per_sequence, out, scratch, floats
):  # fmt: skip
    g, shared = task % kv_heads, heads // kv_heads
    first = task // kv_heads * BLOCK
    last = min(first + BLOCK, tokens)
    columns = -(-head_dim // 64) * 64
    k_turned = advance(scratch, worker * floats)  # [d, 64]
    v_wide = advance(k_turned, head_dim * PAGE)  # [64, columns]
    scores = advance(v_wide, PAGE * columns)  # [QUERIES, 64]
    sums = advance(scores, QUERIES * PAGE)  # per query of the block: [BLOCK * shared + QUERIES]
    tops = advance(sums, BLOCK * shared + QUERIES)
    queries = advance(tops, BLOCK * shared + QUERIES)  # [BLOCK * shared + QUERIES, d], scaled
    values = advance(queries, (BLOCK * shared + QUERIES) * head_dim)  # [BLOCK * shared + QUERIES, columns]
    while first < last:  # a run of tokens of one sequence
        sequence, length, oldest, run = sequences[first], 0, positions[first], first
        while run < last and sequences[run] == sequence:
            length = max(length, positions[run] + 1)
            oldest = min(oldest, max(0, positions[run] + 1 - window) if window else 0)
            run += 1
        count = (run - first) * shared  # query q is head q % shared of token first + q // shared
        for q in range(-(-count // QUERIES) * QUERIES):
            tops[q], sums[q] = float32(-np.inf), float32(0)
            source = ((first + q // shared) * (heads + 2 * kv_heads) + g * shared + q % shared) * head_dim
            for i in range(head_dim):
                queries[q * head_dim + i] = qkv[source + i] * scale if q < count else float32(0)
            for i in range(columns):
                values[q * columns + i] = float32(0)
        for start in range(oldest // PAGE * PAGE, length, PAGE):
            page = (page_table[sequence * pages_per_sequence + start // PAGE] * kv_heads + g) * PAGE * head_dim
            keys = min(PAGE, length - start)
            _widen_page(advance(k_pages, page), advance(v_pages, page), keys, head_dim, columns, k_turned, v_wide)
            for q in range(0, count, QUERIES):
                latest, earliest = 0, length
                for j in range(q, min(q + QUERIES, count)):
                    latest = max(latest, positions[first + j // shared])
                    earliest = min(earliest, positions[first + j // shared])
                if latest < start or (window and earliest + 1 - window >= start + PAGE):
                    continue  # none of these queries sees this page
                acc = outer_zero()
                for i in range(head_dim):
                    acc = outer_add(acc, advance(queries, q * head_dim + i), head_dim, advance(k_turned, i * PAGE))
                outer_store(acc, scores, PAGE)
                for j in range(QUERIES):
                    position = positions[min(first + (q + j) // shared, run - 1)]
                    row = advance(scores, j * PAGE)
                    for i in range(max(0, min(PAGE, position + 1 - start)), PAGE):
                        row[i] = float32(-np.inf)
                    if window:
                        for i in range(min(PAGE, position + 1 - window - start)):
                            row[i] = float32(-np.inf)
                    # A query that sees no key of its first page goes on with a top that leaves all of it 0.
                    top = max(_largest(row), tops[q + j], LOWEST)
                    decay = math.exp(tops[q + j] - top)  # 0 on the first page
                    tops[q + j] = top
                    sums[q + j] = sums[q + j] * decay + _exponentials(row, top)
                    for i in range(0, columns, 16):
                        at = (q + j) * columns + i
                        store(values, at, load(values, at) * splat(decay))
                for c in range(0, columns, 64):
                    corner = advance(values, q * columns + c)
                    acc = outer_load(corner, columns)
                    for j in range(keys):
                        acc = outer_add(acc, advance(scores, j), PAGE, advance(v_wide, j * columns + c))
                    outer_store(acc, corner, columns)
        for q in range(count):
            inverse = float32(1) / sums[q]
            target = ((first + q // shared) * heads + g * shared + q % shared) * head_dim
            for i in range(head_dim):
                out[target + i] = values[q * columns + i] * inverse
        first = run


def attention(
    stream: Stream,
    qkv: np.ndarray,
    heads: int,
    scale: float,
    window: int,
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
    if tokens >= BLOCK_FORM_TOKENS:
        rows, columns = BLOCK * shared + QUERIES, -(-head_dim // 64) * 64
        scratch = stream.scratch((head_dim + columns + QUERIES) * PAGE + rows * (2 + head_dim + columns))
        stream.launch(
            _attention_block,
            *(-(-tokens // BLOCK) * kv_heads, tokens, qkv, heads, kv_heads, head_dim, scale, window, positions),
            *(sequences, k_pages, v_pages, page_table, page_table.shape[1], values, scratch, scratch.shape[1]),
        )
    else:
        scratch = stream.scratch(2 * shared + PAGE)
        stream.launch(
            _attention,
            *(tokens * kv_heads, qkv, heads, kv_heads, head_dim, scale, window, positions, sequences, k_pages, v_pages),
            *(page_table, page_table.shape[1], values, scratch, scratch.shape[1]),
        )
    if isinstance(out, QuantizedRows):
        quantize(stream, values, out)
