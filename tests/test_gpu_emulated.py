"""Attention for decoding, run in Python (simt.py) against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the gpu extra is not installed")

import reference
import simt
from machine import assert_within, normal

from numbainfer.gpu.attention_core import Layout
from numbainfer.gpu.attention_decode import WARPS, _decode

PAGE = 64


@pytest.mark.parametrize(
    ("head_dim", "shared", "position", "window", "fused"),
    [(64, 2, 600, 0, True), (128, 1, 299, 90, True)],
)
def test_attention_of_one_token(head_dim: int, shared: int, position: int, window: int, fused: bool) -> None:
    """With RoPE, norms and the store in the same kernel (fused) or without; keys in one part and in several."""
    kv_heads, heads, pages = 1, shared, position // PAGE + 1
    rng = np.random.default_rng(position)
    order = rng.permutation(pages).astype(np.int32)
    k_pages, v_pages = (rng.standard_normal((pages, kv_heads, PAGE, head_dim)).astype(np.float16) for _ in range(2))
    qkv = normal(1, 1, (heads + 2 * kv_heads) * head_dim)
    q_norm, k_norm = 1 + 0.1 * normal(2, head_dim), 1 + 0.1 * normal(3, head_dim)
    frequencies = reference.rope_inv_freq(head_dim, 1e4)
    angles = np.arange(position + 1)[:, None] * frequencies
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    rows = qkv.reshape(1, -1, head_dim)
    q, k, v = rows[:, :heads], rows[:, heads : heads + 1], rows[:, heads + 1 :]
    if fused:
        q, k = (
            reference.rope(reference.rmsnorm(x, w, 1e-5), [position], frequencies)
            for x, w in ((q, q_norm), (k, k_norm))
        )
    keys, values = (
        p[order].transpose(0, 2, 1, 3).reshape(-1, kv_heads, head_dim).astype(np.float64) for p in (k_pages, v_pages)
    )
    if fused:
        keys[position], values[position] = k[0].astype(np.float16), v[0].astype(np.float16)
    first = max(0, position + 1 - window) if window else 0
    expected = reference.attention(q, [keys[first:]], [values[first:]], [0], [position - first])

    plan, shift = Layout(head_dim, shared, WARPS), 1
    out = np.full((1, heads * head_dim), np.nan, np.float32)
    parts, statistics = np.zeros((2, shared * head_dim), np.float32), np.zeros((2, shared * 2), np.float32)
    counters, k_bits, v_bits = np.zeros(1, np.int32), k_pages.view(np.uint16), v_pages.view(np.uint16)
    simt.launch(
        _decode(head_dim, shared, fused),
        *((2, 1, 1), qkv, heads, kv_heads, 1, head_dim**-0.5, window, q_norm, k_norm, 1, 1e-5),
        *(np.array([position], np.int32), np.array([0], np.int32), cos, sin, head_dim // 2),
        *(k_bits, v_bits, order, pages, shift, parts, statistics, counters, out),
        shared=plan.nbytes,
    )
    assert_within(out.reshape(expected.shape), expected, 2e-3 if fused else 1e-5)  # a rounding of the own key may flip
    assert counters[0] == 0
    if fused:
        page, slot = order[position // PAGE], position % PAGE
        np.testing.assert_allclose(k_pages[page, 0, slot], k[0, 0], rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(v_pages[page, 0, slot], v[0, 0].astype(np.float16))
