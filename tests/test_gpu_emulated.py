"""Attention for decoding and products of batches, run in Python (simt.py) against the float64 reference."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the gpu extra is not installed")

import reference
import simt
from machine import assert_within, normal, poison
from numba import cuda
from numpy import float32, int32
from simt_world import Array
from test_attention import Cache

from numbainfer.gpu.attention_core import Layout, make_core
from numbainfer.gpu.attention_decode import WARPS, _decode
from numbainfer.gpu.attention_prefill import attention_prefill
from numbainfer.gpu.compile import Kernel, kernel
from numbainfer.gpu.elementwise import rmsnorm, swiglu
from numbainfer.gpu.half_rows import HalfRows, pack, unpack
from numbainfer.gpu.launch import Stream
from numbainfer.gpu.linear_int8 import linear_int8
from numbainfer.gpu.linear_mma import linear_mma
from numbainfer.gpu.mma_plan import Plan
from numbainfer.gpu.ptx import shared_address, shared_f32, shared_store_f32
from numbainfer.gpu.quantize import as_codes, quantize
from numbainfer.quantization import QuantizedMatrix, QuantizedRows, dequantize

PAGE = 64
LOG2_E = float(np.log2(np.e))


def pages_of(keys: int, kv_heads: int, head_dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pages of that many keys, in a random order, and of their values; NaN behind the last key. And the order."""
    pages = keys // PAGE + 1
    rng = np.random.default_rng(keys)
    order = rng.permutation(pages).astype(np.int32)
    k_pages, v_pages = (rng.standard_normal((pages, kv_heads, PAGE, head_dim)).astype(np.float16) for _ in range(2))
    for each in k_pages, v_pages:
        each[order[-1], :, keys % PAGE :] = np.nan
    return k_pages, v_pages, order


def in_order(pages: np.ndarray, order: np.ndarray) -> np.ndarray:
    """[keys, kv_heads, d] of pages."""
    return pages[order].transpose(0, 2, 1, 3).reshape(-1, pages.shape[1], pages.shape[3]).astype(np.float64)


@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "shared", "position", "window", "form", "active"),
    [
        (64, 1, 4, 600, 0, "fused", 2),
        (64, 1, 3, 519, 0, "floats", 2),
        (64, 1, 8, 150, 0, "fused", 1),
        (64, 2, 1, 70, 17, "floats", 1),
        (128, 1, 1, 299, 90, "fused", 1),
        (128, 1, 4, 300, 0, "floats", 2),
        (128, 1, 8, 270, 200, "fused", 2),
        (64, 2, 3, 0, 0, "fused", 1),
        (64, 1, 7, 5, 0, "fused", 1),
        (128, 2, 3, 0, 0, "floats", 1),
        (128, 1, 4, 5, 3, "floats", 1),
        (64, 2, 3, 600, 0, "halves", 2),
        (128, 1, 4, 77, 0, "halves", 1),
        (64, 2, 7, 599, 0, "fused halves", 2),
        (128, 1, 8, 77, 0, "fused halves", 1),
    ],
)
def test_attention_of_one_token(
    head_dim: int, kv_heads: int, shared: int, position: int, window: int, form: str, active: int
) -> None:
    """With RoPE, norms and the store in the same kernel (fused) or without, in float32 or float16; in as many parts as
    `active` says."""
    heads, fused, halves = kv_heads * shared, "fused" in form, "halves" in form
    k_pages, v_pages, order = pages_of(position if fused else position + 1, kv_heads, head_dim)
    qkv = normal(1, 1, (heads + 2 * kv_heads) * head_dim)
    q_norm, k_norm = 1 + 0.1 * normal(2, head_dim), 1 + 0.1 * normal(3, head_dim)
    frequencies = reference.rope_inv_freq(head_dim, 1e4)
    angles = np.arange(position + 1)[:, None] * frequencies
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    turned = qkv.reshape(1, -1, head_dim)
    q, k, v = turned[:, :heads], turned[:, heads : heads + kv_heads], turned[:, heads + kv_heads :]
    keys, values = (in_order(pages, order)[: position + 1] for pages in (k_pages, v_pages))
    if fused:
        q, k = (
            reference.rope(reference.rmsnorm(x, w, 1e-5), [position], frequencies)
            for x, w in ((q, q_norm), (k, k_norm))
        )
        keys[position], values[position] = k[0].astype(np.float16), v[0].astype(np.float16)
    first = max(0, position + 1 - window) if window else 0
    expected = reference.attention(q, [keys[first:]], [values[first:]], [0], [position - first])

    layout, shift = Layout(head_dim, shared, WARPS), 1
    out = np.full((1, heads * head_dim), np.nan, np.float32)
    rows = HalfRows(pack(out, 128), 1, heads * head_dim)
    parts = np.full((kv_heads, 2, shared * head_dim), np.nan, np.float32)
    statistics = np.full((kv_heads, 2, shared * 2), np.nan, np.float32)
    counters, k_bits, v_bits = np.zeros(kv_heads, np.int32), k_pages.view(np.uint16), v_pages.view(np.uint16)
    simt.launch(
        _decode(head_dim, shared, fused, halves),
        *((2, 1, kv_heads), qkv, heads, kv_heads, 1, head_dim**-0.5, window, q_norm, k_norm, 1, 1e-5),
        *(np.array([position], np.int32), np.array([0], np.int32), cos, sin, head_dim // 2),
        *(k_bits, v_bits, order, order.size, shift, parts, statistics, counters, rows.data if halves else out, 128),
        shared=layout.nbytes,
    )
    out = unpack(rows) if halves else out
    bound = 2e-3 if fused else 2**-11 if halves else 1e-5  # fused: a rounding of the own key may flip
    assert_within(out.reshape(expected.shape), expected, bound)
    assert not counters.any()
    assert np.isfinite(statistics).all() == (active == 2)
    if fused:
        page, slot = order[position // PAGE], position % PAGE
        np.testing.assert_allclose(k_pages[page, :, slot], k[0], rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(v_pages[page, :, slot], v[0].astype(np.float16))


def attention_of_a_block(head_dim: int, shared: int, warps: int, mine: bool) -> Kernel:
    """A kernel of attention_core alone: raw [shared + 2, d], and `summary` behind the sums in `out`."""
    layout, width = Layout(head_dim, shared, warps), shared * head_dim
    core = make_core(head_dim, shared, warps)
    fetch, prepare, attend, own_key = core.fetch, core.prepare, core.attend, core.own_key
    weigh, element, dimension = core.weigh, core.element, core.dimension
    threads, words, at_summary = 32 * warps, head_dim // 4, layout.summary

    @kernel("f32p u16p u16p i32p i32 i32 f32 f32p", threads=threads)
    def block(raw, k_pages, v_pages, table, end, lowest, factor, out):
        memory = shared_address(cuda.shared.array(0, float32, alignment=16))
        thread, warp, lane = cuda.threadIdx.x, cuda.threadIdx.x >> 5, cuda.threadIdx.x & 31
        k, v = cuda.local.array(words, int32), cuda.local.array(words, int32)
        base = 16 * warp
        if base < end:
            fetch(k, v, k_pages, v_pages, table, 1, 0, base, end, lane)
        for i in range(thread, width + 2 * head_dim, threads):
            shared_store_f32(memory + 4 * i, raw[i])
        cuda.syncthreads()
        prepare(memory, factor, thread, threads)
        cuda.syncthreads()
        attend(memory, k, v, k_pages, v_pages, table, 1, 0, base, end, lowest, warp, lane)
        for h in range(warp, shared, warps):
            own_key(memory, factor, h, lane, mine)
        cuda.syncthreads()
        for h in range(warp, shared, warps):
            weigh(memory, warps + 1, h, lane)
        cuda.syncthreads()
        for i in range(thread, width, threads):
            h, position = i // head_dim, i % head_dim
            out[h * head_dim + dimension(position)] = element(memory, warps + 1, h, position)
        if thread < 2 * shared:
            out[width + thread] = shared_f32(memory + at_summary + 4 * thread)

    return block


@pytest.mark.parametrize(
    ("head_dim", "shared", "warps", "keys", "lowest", "mine"),
    [(64, 5, 2, 77, 20, True), (64, 2, 1, 40, 0, False), (128, 6, 3, 33, 0, True), (64, 3, 2, 0, 0, True)],
)
def test_inner_part(head_dim: int, shared: int, warps: int, keys: int, lowest: int, mine: bool) -> None:
    """Fewer warps than heads, and a step's own key that is another block's."""
    k_pages, v_pages, order = pages_of(keys, 1, head_dim)
    raw = normal(4, shared + 2, head_dim)
    scale, stored = head_dim**-0.5, raw[shared:].astype(np.float16).astype(np.float64)
    seen, values = (in_order(pages, order)[lowest:keys, 0] for pages in (k_pages, v_pages))
    if mine:
        seen, values = np.vstack([seen, stored[:1]]), np.vstack([values, stored[1:]])
    scores = raw[:shared].astype(np.float64) @ seen.T * scale
    weights = np.exp(scores - scores.max(1, keepdims=True))

    out = np.full(shared * head_dim + 2 * shared, np.nan, np.float32)
    simt.launch(
        attention_of_a_block(head_dim, shared, warps, mine),
        *((1,), raw, k_pages.view(np.uint16), v_pages.view(np.uint16), order, keys, lowest, scale * LOG2_E, out),
        shared=Layout(head_dim, shared, warps).nbytes,
    )
    assert_within(out[: shared * head_dim].reshape(shared, head_dim), weights @ values, 1e-5)
    largest, total = out[shared * head_dim :].reshape(shared, 2).T
    assert_within(largest, scores.max(1) * LOG2_E, 1e-5)
    assert_within(total, weights.sum(1), 1e-5)


class Emulated(Stream):
    """A stream whose kernels run in Python. It is the pool too."""

    def __init__(self, multiprocessors: int, order: int | None) -> None:
        self.gpu: Any = SimpleNamespace(capability=(8, 0), multiprocessors=multiprocessors)
        self.order, self.launched = order, list[str]()
        self._held, self._scratch = None, {}

    def launch(self, kernel: Kernel, grid: Any, *arguments: Any, **options: Any) -> None:
        self.flush()
        self.launched.append(kernel.name)
        simt.launch(kernel, grid, *arguments, **options, order=self.order)

    def scratch(self, name: str, shape: int | tuple[int, ...], dtype: Any = np.float32) -> Any:
        wanted = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if name not in self._scratch or self._scratch[name].nbytes < wanted:
            self._scratch[name] = np.full(wanted, 0xFF, np.uint8).view(Array)  # NaN
        return self._scratch[name][:wanted].view(dtype).reshape(shape)

    def counters(self, count: int) -> Any:
        return np.zeros(count, np.int32).view(Array)

    def zeros(self, shape: Any, dtype: Any) -> Any:
        return np.zeros(shape, dtype).view(Array)


def int8_matrix(seed: int, rows: int, columns: int) -> tuple[QuantizedMatrix, np.ndarray]:
    codes, scales = reference.quantize_groups(0.1 * normal(seed, rows, columns), 32)
    matrix = QuantizedMatrix(codes.view(Array), scales.astype(np.float16).view(Array), 32)
    return matrix, dequantize(matrix)


@pytest.mark.parametrize(
    ("tokens", "inner", "width", "multiprocessors", "order"),
    [(5, 64, 96, 2, None), (20, 512, 96, 4, 1), (40, 32, 192, 1, 3)],
)
def test_norm_as_part_of_products(tokens: int, inner: int, width: int, multiprocessors: int, order: int | None) -> None:
    """A product added to the residual stream, its norm, and two products of that: QKV, and a SwiGLU of gate and up; one
    after the other, with columns in parts (20 tokens) and several tiles for a block (40). Then the norm's codes."""
    stream, eps = Emulated(multiprocessors, order), 0.1
    x, weight, bias = normal(1, tokens, width), 1 + 0.5 * normal(2, width), normal(3, 160)
    (down, d), (qkv, q), (gate_up, g) = (
        int8_matrix(i, *s) for i, s in ((4, (width, inner)), (5, (160, width)), (6, (192, width)))
    )
    before, normed, hidden = (QuantizedRows.empty(stream, tokens, n, 32, 2) for n in (inner, width, 96))
    values = normal(7, tokens, inner)
    before.halves = HalfRows(pack(values, 128).view(Array), tokens, inner)
    out, product, residual = np.zeros((tokens, 160), np.float32), np.zeros((tokens, 192), np.float32), x.copy()
    out, product, residual, weight, bias = (a.view(Array) for a in (out, product, residual, weight, bias))

    linear_int8(stream, before, down, None, residual, residual)
    rmsnorm(stream, residual, weight, eps, normed)
    linear_int8(stream, normed, qkv, bias, None, out)
    linear_int8(stream, normed, gate_up, None, None, product)
    swiglu(stream, product, hidden)
    linear_int8(stream, hidden, int8_matrix(8, 32, 96)[0], None, None, np.zeros((tokens, 32), np.float32).view(Array))
    assert stream.launched == ["linear_mma"] * 3

    expected = reference.linear(values, d, None, x)
    assert_within(residual, expected, 2**-10 * (reference.linear(abs(values), abs(d)) + abs(x)))
    expected = reference.rmsnorm(expected, weight, eps)
    assert_within(unpack(normed.halves), expected, 1e-2)
    assert_within(out, reference.linear(expected, q, bias), 2e-3 * reference.linear(abs(expected), abs(q)))
    gates = reference.linear(expected, g)
    assert_within(unpack(hidden.halves), reference.swiglu(gates[:, :96], gates[:, 96:]), 2e-2)
    again, narrower = np.zeros_like(out), Plan(16, False, 1, 2 * -(-tokens // 16))
    linear_mma(stream, normed.halves, qkv, bias, None, again, narrower)
    assert_within(again, out, 1e-5)
    as_codes(stream, normed)
    assert_within(normed.dequantize(), expected, 1e-2)


def test_norm_alone() -> None:
    """Of a sum: where somebody reads the residual stream before a product comes, and where its result goes to the
    memory that the sum's product reads."""
    stream, x = Emulated(2, 2), normal(1, 20, 160)
    weight, matrix, w = np.ones(160, np.float32).view(Array), *int8_matrix(2, 160, 160)
    rows, other = (QuantizedRows.empty(stream, 20, 160, 32, 2) for _ in range(2))
    residual, out = x.copy().view(Array), np.zeros((20, 160), np.float32).view(Array)
    quantize(stream, x.view(Array), rows)
    linear_int8(stream, rows, matrix, None, residual, residual)
    rmsnorm(stream, residual, weight, 1e-5, other)
    stream.flush()
    assert stream.launched == ["halves", "linear_mma", "quantize_rows"]
    once = reference.linear(x, w, None, x)
    bound = 2**-10 * (reference.linear(abs(x), abs(w)) + abs(x))
    assert_within(residual, once, bound)
    assert_within(other.dequantize(), reference.rmsnorm(once, weight, 1e-5), 1e-2)

    linear_int8(stream, rows, matrix, None, residual, residual)
    rmsnorm(stream, residual, weight, 1e-5, rows)
    linear_int8(stream, rows, matrix, None, None, out)
    stream.flush()
    assert stream.launched[3:] == ["linear_mma", "halves", "linear_mma"]
    assert_within(residual, 2 * once - x, 2 * bound)
    values = reference.rmsnorm(residual, weight, 1e-5)
    assert_within(out, reference.linear(values, w), 2e-3 * reference.linear(abs(values), abs(w)))


def tokens_of(*runs: tuple[int, int, int]) -> list[tuple[int, int]]:
    """(sequence, position) of the tokens of runs: a sequence, its first position, the one behind its last."""
    return [(sequence, position) for sequence, first, end in runs for position in range(first, end)]


PROMPT = tokens_of((0, 30, 100))  # after some cached tokens
BATCH = tokens_of((0, 126, 131), (1, 0, 12), (2, 64, 65), (0, 131, 133))  # a sequence comes again


@pytest.mark.parametrize("form", ["floats", "halves"])
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "step", "window", "order"),
    [
        (64, 4, 2, PROMPT, 0, None),
        (64, 3, 1, BATCH, 0, 1),
        (64, 2, 1, tokens_of((0, 110, 140), (1, 200, 207)), 50, 2),
        (128, 2, 1, tokens_of((0, 130, 160)), 70, 3),
        (128, 3, 3, BATCH, 0, None),
        (72, 2, 1, PROMPT, 0, None),
        (72, 5, 1, BATCH, 7, 4),
        (256, 2, 1, BATCH, 0, None),
    ],
)
def test_attention_of_prompts(
    head_dim: int, heads: int, kv_heads: int, step: list, window: int, order: int | None, form: str
) -> None:
    """Pages that no token sees are poisoned, as is what stays unwritten: the rows beyond the tokens."""
    cache, tokens, width = Cache(step, kv_heads, head_dim, "float16"), len(step), heads * head_dim
    seen, rng = cache.seen(window), np.random.default_rng(head_dim)
    keys, values = (
        [rng.standard_normal((r.stop, kv_heads, head_dim)).astype(np.float16) for r in seen] for _ in range(2)
    )
    qkv = poison((tokens, (heads + 2 * kv_heads) * head_dim), np.float32)  # only the queries are read
    qkv[:, :width] = 2 * normal(1, tokens, width)
    out = poison((tokens + 3, width), np.float32)
    rows = HalfRows(poison((-(-width // 64), 128, 64), np.uint16), tokens, width)
    attention_prefill(
        *(Emulated(2, order), qkv, heads, head_dim**-0.5, window, cache.positions, cache.sequences),
        *(cache.filled(keys, seen), cache.filled(values, seen), cache.table, rows if form == "halves" else out),
    )
    q = qkv[:, :width].reshape(tokens, heads, head_dim)
    expected = reference.attention(q, keys, values, cache.sequences, cache.positions, window=window)
    if form == "halves":
        out = unpack(HalfRows(rows.data, 128, 64 * len(rows.data)))
    # queries and weights are float16
    assert_within(out[:tokens, :width], expected.reshape(tokens, width), 4e-3)
    assert np.isfinite(out).sum() == expected.size
