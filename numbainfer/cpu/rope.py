"""Rotary position embedding, alone and fused with the per-head norms and the store into the KV cache."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy import float32

from numbainfer.cpu.compile import kernel
from numbainfer.cpu.elementwise import norm_row
from numbainfer.cpu.launch import Stream
from numbainfer.cpu.simd import advance, fma, load, put, splat, store

PAGE = 64  # positions of a KV page


@njit
def _rotate(head, cos, sin, half):
    """Rotates the first 2 * half values of a head; cos and sin [half] of its position."""
    whole = half // 16 * 16
    zero = splat(float32(0))
    for i in range(0, whole, 16):
        a, b, c, s = load(head, i), load(head, half + i), load(cos, i), load(sin, i)
        store(head, i, fma(a, c, zero - b * s))
        store(head, half + i, fma(b, c, a * s))
    for i in range(whole, half):
        a1, b1 = head[i], head[half + i]
        head[i] = a1 * cos[i] - b1 * sin[i]
        head[half + i] = b1 * cos[i] + a1 * sin[i]


@kernel
def _rope(task, worker, x, heads, head_dim, positions, cos, sin, half):
    row = positions[task] * half
    for h in range(heads):
        _rotate(advance(x, (task * heads + h) * head_dim), advance(cos, row), advance(sin, row), half)


def rope(stream: Stream, x: np.ndarray, heads: int, positions: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> None:
    """See registry.rope. A task is a token."""
    tokens, head_dim = x.shape[0], x.shape[1] // heads
    if 2 * cos.shape[1] > head_dim or x.shape[1] % heads:
        raise ValueError(f"rope: x {x.shape} of {heads} heads, tables {cos.shape}")
    stream.launch(_rope, tokens, x, heads, head_dim, positions, cos, sin, cos.shape[1])


@njit
def _copy(source, target, count):
    """float32 to the element type of the cache."""
    whole = count // 16 * 16
    for i in range(0, whole, 16):
        store(target, i, load(source, i))
    for i in range(whole, count):
        put(target, i, source[i])


@kernel
def _rope_and_store(
    task,
    worker,
    qkv,
    heads,
    kv_heads,
    head_dim,
    q_norm,
    k_norm,
    normed,
    eps,
    positions,
    sequences,
    cos,
    sin,
    half,
    k_pages,
    v_pages,
    page_table,
    pages_per_sequence,
):
    position = positions[task]
    row = position * half
    token = advance(qkv, task * (heads + 2 * kv_heads) * head_dim)
    for h in range(heads + kv_heads):  # the key heads stand behind the query heads
        head = advance(token, h * head_dim)
        if normed:
            norm_row(head, q_norm if h < heads else k_norm, head_dim, eps, head)
        _rotate(head, advance(cos, row), advance(sin, row), half)
    page = page_table[sequences[task] * pages_per_sequence + position // PAGE]
    for g in range(kv_heads):
        slot = ((page * kv_heads + g) * PAGE + position % PAGE) * head_dim
        _copy(advance(token, (heads + g) * head_dim), advance(k_pages, slot), head_dim)
        _copy(advance(token, (heads + kv_heads + g) * head_dim), advance(v_pages, slot), head_dim)


def rope_and_store(
    stream: Stream,
    qkv: np.ndarray,
    heads: int,
    q_norm: np.ndarray | None,
    k_norm: np.ndarray | None,
    eps: float,
    positions: np.ndarray,
    sequences: np.ndarray,
    cos: np.ndarray | None,
    sin: np.ndarray | None,
    k_pages: np.ndarray,
    v_pages: np.ndarray,
    page_table: np.ndarray,
    apart: bool = False,
) -> None:
    """See registry.rope_and_store. A task is a token."""
    kv_heads, head_dim = check_pages(qkv, heads, k_pages, v_pages)
    if (q_norm is None) != (k_norm is None):
        raise ValueError("rope_and_store: q_norm and k_norm come together")
    half = 0 if cos is None else cos.shape[1]
    if 2 * half > head_dim:
        raise ValueError(f"rope_and_store: heads of {head_dim}, tables of {half} pairs")
    stream.launch(
        _rope_and_store,
        *(qkv.shape[0], qkv, heads, kv_heads, head_dim, q_norm, k_norm, int(q_norm is not None), eps),
        *(positions, sequences, cos, sin, half, k_pages, v_pages, page_table, page_table.shape[1]),
    )


def check_pages(qkv: np.ndarray, heads: int, k_pages: np.ndarray, v_pages: np.ndarray) -> tuple[int, int]:
    """(kv_heads, head_dim), after checking that qkv [T, (H + 2 K) d] and the pages [P, K, 64, d] agree."""
    _, kv_heads, slots, head_dim = k_pages.shape
    fits = k_pages.shape == v_pages.shape and slots == PAGE and heads % kv_heads == 0
    if not fits or qkv.shape[1] != (heads + 2 * kv_heads) * head_dim:
        raise ValueError(f"qkv {qkv.shape} of {heads} heads and pages {k_pages.shape}, {v_pages.shape} do not fit")
    return kv_heads, head_dim
