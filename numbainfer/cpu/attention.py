"""Causal attention over the paged KV cache, with the online softmax, in one form for prefill and decode.

A task is up to BLOCK tokens, one key/value head, and a share of the keys. Keys come page by page: a page is widened to
float32 once, keys transposed, and meets four queries at a time in registers; scores and weighted values are both sums
of outer products. The queries of a task are all query heads of its tokens that share the key/value head. After each
page their running maxima, sums of weights and weighted values are brought up to date (Dao et al. 2022, algorithm 1).

Where tokens and heads make too few tasks for the cores, as in decoding, the keys are split, and a second launch
merges what the splits found (Dao et al. 2023, "Flash-Decoding").
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
from numbainfer.cpu.simd import advance, exp, first_lane, get, hmax, hsum, load, maximum, splat, store
from numbainfer.cpu.tile import outer_add, outer_load, outer_store, outer_zero, transpose16
from numbainfer.quantization import QuantizedRows

BLOCK = 32  # tokens of a task, at most
QUERIES = 4  # queries in registers at a time
TASKS = 16  # at least so many: not by the number of threads, so that results don't depend on it
DIRECT_QUERIES = 8  # up to here the values of a page are read where they are instead of being widened first
LOWEST = float32(-1e38)  # stands for the top of no scores: e^(-inf - LOWEST) is 0, e^(-inf + inf) is not a number


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


@njit
def _turn_keys(k, keys, head_dim, out):
    """Keys [keys, d] as float32 [d, 64]. What stands for absent keys means nothing."""
    whole = head_dim // 16 * 16
    for j in range(0, keys, 16):  # a page has room for 64, so 16 can always be read
        for i in range(0, whole, 16):
            transpose16(advance(k, j * head_dim + i), head_dim, advance(out, i * PAGE + j), PAGE)
    for i in range(whole, head_dim):
        for j in range(keys):
            out[i * PAGE + j] = get(k, j * head_dim + i)


@njit
def _widen_values(v, keys, head_dim, columns, out):
    """Values [keys, d] as float32 [keys, columns]. What stands in the padding columns means nothing."""
    whole = head_dim // 16 * 16
    for j in range(keys):
        for i in range(0, whole, 16):
            store(out, j * columns + i, load(v, j * head_dim + i))
        for i in range(whole, head_dim):
            out[j * columns + i] = get(v, j * head_dim + i)


@njit
def _mask(row, start, position, window):
    """-inf for the keys of a page from `start` on that a token at `position` does not see."""
    for i in range(max(0, min(PAGE, position + 1 - start)), PAGE):
        row[i] = float32(-np.inf)
    if window:
        for i in range(min(PAGE, position + 1 - window - start)):
            row[i] = float32(-np.inf)


@kernel
def _attention(
    task, worker, tokens, block, splits, qkv, heads, kv_heads, head_dim, scale, window, positions, sequences, k_pages,
    v_pages, page_table, pages_per_sequence, out, partial, scratch, floats
):  # fmt: skip
    split, g, shared = task % splits, task // splits % kv_heads, heads // kv_heads
    first = task // splits // kv_heads * block
    last = min(first + block, tokens)
    columns, most = -(-head_dim // 64) * 64, block * shared + QUERIES
    k_turned = advance(scratch, worker * floats)  # [d, 64]
    v_wide = advance(k_turned, head_dim * PAGE)  # [64, columns]
    scores = advance(v_wide, PAGE * columns)  # [QUERIES, 64]
    values = advance(scores, QUERIES * PAGE)  # [most, columns]
    queries = advance(values, most * columns)  # [most, d], scaled
    sums = advance(queries, most * head_dim)  # [most]
    tops = advance(sums, most)  # [most]
    while first < last:  # a run of tokens of one sequence
        sequence, length, oldest, run = sequences[first], 0, positions[first], first
        while run < last and sequences[run] == sequence:
            length = max(length, positions[run] + 1)
            oldest = min(oldest, max(0, positions[run] + 1 - window) if window else 0)
            run += 1
        count = (run - first) * shared  # query q is head q % shared of token first + q // shared
        for q in range(-(-count // QUERIES) * QUERIES):
            tops[q], sums[q] = LOWEST, float32(0)
            source = ((first + q // shared) * (heads + 2 * kv_heads) + g * shared + q % shared) * head_dim
            for i in range(head_dim):
                queries[q * head_dim + i] = qkv[source + i] * scale if q < count else float32(0)
            for i in range(columns):
                values[q * columns + i] = float32(0)
        direct = count <= DIRECT_QUERIES and columns == head_dim
        page, pages = oldest // PAGE, -(-length // PAGE) - oldest // PAGE
        for at in range(page + pages * split // splits, page + pages * (split + 1) // splits):
            start = at * PAGE
            place = (page_table[sequence * pages_per_sequence + at] * kv_heads + g) * PAGE * head_dim
            keys, v_page = min(PAGE, length - start), advance(v_pages, place)
            _turn_keys(advance(k_pages, place), keys, head_dim, k_turned)
            if not direct:
                _widen_values(v_page, keys, head_dim, columns, v_wide)
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
                    row = advance(scores, j * PAGE)
                    position = positions[min(first + (q + j) // shared, run - 1)]
                    if position + 1 - start < PAGE or window:
                        _mask(row, start, position, window)
                    # A query that has seen no key yet goes on with a top that leaves all of its weights 0.
                    top = max(_largest(row), tops[q + j])
                    if top > tops[q + j]:
                        decay = exp(splat(tops[q + j] - top))
                        for i in range((q + j) * columns, (q + j + 1) * columns, 16):
                            store(values, i, load(values, i) * decay)
                        sums[q + j] *= first_lane(decay)
                        tops[q + j] = top
                    sums[q + j] += _exponentials(row, top)
                for c in range(0, columns, 64):
                    corner = advance(values, q * columns + c)
                    acc = outer_load(corner, columns)
                    if direct:
                        for j in range(keys):
                            acc = outer_add(acc, advance(scores, j), PAGE, advance(v_page, j * columns + c))
                    else:
                        for j in range(keys):
                            acc = outer_add(acc, advance(scores, j), PAGE, advance(v_wide, j * columns + c))
                    outer_store(acc, corner, columns)
        for q in range(count):
            row = (first + q // shared) * heads + g * shared + q % shared
            if splits == 1:
                _copy_scaled(advance(values, q * columns), head_dim, float32(1) / sums[q], advance(out, row * head_dim))
            else:  # [row, split]: top, sum, values
                found = advance(partial, (row * splits + split) * (2 + head_dim))
                found[0], found[1] = tops[q], sums[q]
                _copy_scaled(advance(values, q * columns), head_dim, float32(1), advance(found, 2))
        first = run


@njit
def _copy_scaled(source, count, factor, target):
    whole = count // 16 * 16
    for i in range(0, whole, 16):
        store(target, i, load(source, i) * splat(factor))
    for i in range(whole, count):
        target[i] = source[i] * factor


@kernel
def _merge(task, worker, splits, head_dim, partial, out):
    """What the splits found for one query head of one token."""
    width = 2 + head_dim
    found = advance(partial, task * splits * width)
    top, total = LOWEST, float32(0)
    for s in range(splits):
        top = max(top, found[s * width])
    for s in range(splits):
        factor = math.exp(found[s * width] - top)
        total += found[s * width + 1] * factor
        found[s * width] = factor
    for i in range(head_dim):
        value = float32(0)
        for s in range(splits):
            value += found[s * width] * found[s * width + 2 + i]
        out[task * head_dim + i] = value / total


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
    block = min(BLOCK, tokens)
    tasks = -(-tokens // block) * kv_heads
    splits = -(-TASKS // tasks)
    # What lies between two launches: values to be quantized, what the splits found.
    plain = 0 if isinstance(out, np.ndarray) else tokens * width
    found = tokens * heads * splits * (2 + head_dim) if splits > 1 else 0
    buffer = stream.buffer(plain + found)
    values = out if isinstance(out, np.ndarray) else buffer[:plain].reshape(tokens, width)
    most, columns = block * heads // kv_heads + QUERIES, -(-head_dim // 64) * 64
    scratch = stream.scratch((head_dim + columns + QUERIES) * PAGE + most * (2 + head_dim + columns))
    stream.launch(
        _attention,
        *(tasks * splits, tokens, block, splits, qkv, heads, kv_heads, head_dim, scale, window, positions, sequences),
        *(k_pages, v_pages, page_table, page_table.shape[1], values, buffer[plain:], scratch, scratch.shape[1]),
    )
    if splits > 1:
        stream.launch(_merge, tokens * heads, splits, head_dim, buffer[plain:], values)
    if isinstance(out, QuantizedRows):
        quantize(stream, values, out)
