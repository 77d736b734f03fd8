"""Choosing from logits: argmax and top-k. A task is a row."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy import float32, int32

from numbainfer.cpu.compile import kernel
from numbainfer.cpu.launch import Stream
from numbainfer.cpu.simd import advance


@kernel
def _argmax(task, worker, x, width, out):
    row = advance(x, task * width)
    best, index = float32(-np.inf), 0
    for i in range(width):
        if row[i] > best:
            best, index = row[i], i
    out[task] = int32(index)


def argmax(stream: Stream, x: np.ndarray, out: np.ndarray) -> None:
    """See registry.argmax."""
    if out.shape != (x.shape[0],) or x.shape[1] == 0:
        raise ValueError(f"argmax: x {x.shape}, out {out.shape}")
    stream.launch(_argmax, x.shape[0], x, x.shape[1], out)


@kernel
def _feed_back(task, worker, tokens, positions, history, slots, count):
    positions[task] += int32(1)
    history[positions[task] % slots * count + task] = tokens[task]


def greedy(stream: Stream, logits: np.ndarray, tokens: np.ndarray, positions: np.ndarray, history: np.ndarray) -> None:
    """See registry.greedy."""
    if history.shape[1:] != tokens.shape or positions.shape != tokens.shape:
        raise ValueError(f"greedy: tokens {tokens.shape}, positions {positions.shape}, history {history.shape}")
    argmax(stream, logits, tokens)
    stream.launch(_feed_back, len(tokens), tokens, positions, history, len(history), len(tokens))


@njit
def _comes_first(value, index, other, other_index):
    return value > other or (value == other and index < other_index)


@njit
def _sift_down(values, indices, start, count):
    """Restores the heap whose root is the element that comes last, below `start`."""
    root = start
    while 2 * root + 1 < count:
        child = 2 * root + 1
        if child + 1 < count and _comes_first(values[child], indices[child], values[child + 1], indices[child + 1]):
            child += 1
        if not _comes_first(values[root], indices[root], values[child], indices[child]):
            return
        values[root], values[child] = values[child], values[root]
        indices[root], indices[child] = indices[child], indices[root]
        root = child


@kernel
def _top_k(task, worker, x, width, k, values, indices):
    # A heap of the k best so far, the last of them at its root; sorted in place at the end.
    row, values, indices = advance(x, task * width), advance(values, task * k), advance(indices, task * k)
    for i in range(k):
        values[i] = row[i] if row[i] == row[i] else float32(-np.inf)  # NaN counts as smallest
        indices[i] = int32(i)
    for i in range(k // 2 - 1, -1, -1):
        _sift_down(values, indices, i, k)
    for i in range(k, width):
        if row[i] > values[0]:  # an equal value with a higher index comes later
            values[0], indices[0] = row[i], int32(i)
            _sift_down(values, indices, 0, k)
    for end in range(k - 1, 0, -1):
        values[0], values[end] = values[end], values[0]
        indices[0], indices[end] = indices[end], indices[0]
        _sift_down(values, indices, 0, end)


def top_k(stream: Stream, x: np.ndarray, values: np.ndarray, indices: np.ndarray) -> None:
    """See registry.top_k."""
    (tokens, width), k = x.shape, values.shape[1]
    if values.shape != indices.shape or values.shape[0] != tokens or not 1 <= k <= width:
        raise ValueError(f"top_k: x {x.shape}, values {values.shape}, indices {indices.shape}")
    stream.launch(_top_k, tokens, x, width, k, values, indices)
