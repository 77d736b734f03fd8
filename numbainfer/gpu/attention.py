"""Causal attention over the paged KV cache, with the online softmax: the form for any shape.

A block is one query head of one token; its warps take keys in turn, each with a softmax of its own, and merge at the
end. attention_decode.py and attention_prefill.py have the forms for the shapes of models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from numba import cuda
from numpy import float32, int64

from numbainfer.gpu import attention_decode, attention_prefill
from numbainfer.gpu.compile import family, kernel
from numbainfer.gpu.half_rows import HalfRows, to_halves
from numbainfer.gpu.launch import Stream
from numbainfer.gpu.memory import DeviceArray
from numbainfer.gpu.ptx import advance, wait_for_previous_kernel
from numbainfer.gpu.quantize import FEW, HeldActivations, HeldRows, quantize
from numbainfer.gpu.reduce import element, warp_sum
from numbainfer.gpu.rope import PAGE, HeldRope, check_pages
from numbainfer.quantization import QuantizedRows

WARPS = 8
LARGEST_HEAD = 512


@family(("float32", 4), ("float16", 4), ("float32", 16), ("float16", 16))
def _attention(dtype: str, parts: int):
    """parts: 32 times this is at least head_dim."""
    pages, load = element(np.dtype(dtype))
    padded = 32 * parts

    @kernel(f"f32p i32 i32 i32 f32 i32 i32p i32p {pages} {pages} i32p i32 f32p", threads=32 * WARPS)
    def attention(
        qkv, heads, kv_heads, head_dim, scale, window, positions, sequences, k_pages, v_pages, page_table,
        pages_per_sequence, out,
    ):  # fmt: skip
        wait_for_previous_kernel()
        token, h = cuda.blockIdx.x, cuda.blockIdx.y
        warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
        g = h // (heads // kv_heads)
        head = advance(qkv, (token * (heads + 2 * kv_heads) + h) * head_dim)
        q, acc = cuda.local.array(parts, float32), cuda.local.array(parts, float32)
        for j in range(parts):
            i = lane + 32 * j
            q[j] = head[i] * scale if i < head_dim else float32(0)
            acc[j] = float32(0)
        top, total = float32(-np.inf), float32(0)
        table = advance(page_table, sequences[token] * pages_per_sequence)
        length = positions[token] + 1
        first = max(0, length - window) if window else 0
        for key in range(first + warp, length, WARPS):
            slot = ((int64(table[key // PAGE]) * kv_heads + g) * PAGE + key % PAGE) * head_dim
            score = float32(0)
            for j in range(parts):
                i = lane + 32 * j
                if i < head_dim:
                    score += q[j] * load(k_pages, slot + i)
            score = warp_sum(score)
            larger = max(top, score)
            decay, weight = math.exp(top - larger), math.exp(score - larger)  # decay is 0 at the first key
            top, total = larger, total * decay + weight
            for j in range(parts):
                i = lane + 32 * j
                if i < head_dim:
                    acc[j] = acc[j] * decay + weight * load(v_pages, slot + i)
        tops, totals = cuda.shared.array(WARPS, float32), cuda.shared.array(WARPS, float32)
        values = cuda.shared.array((WARPS, padded), float32)
        tops[warp], totals[warp] = top, total
        for j in range(parts):
            values[warp, lane + 32 * j] = acc[j]
        cuda.syncthreads()
        top, total = float32(-np.inf), float32(0)
        for w in range(WARPS):
            top = max(top, tops[w])
        for w in range(WARPS):
            total += totals[w] * math.exp(tops[w] - top)  # 0 for a warp that had no key
        row = advance(out, (token * heads + h) * head_dim)
        for i in range(cuda.threadIdx.x, head_dim, 32 * WARPS):
            value = float32(0)
            for w in range(WARPS):
                value += values[w, i] * math.exp(tops[w] - top)
            row[i] = value / total

    return attention


def attention(
    stream: Stream,
    qkv: DeviceArray,
    heads: int,
    scale: float,
    window: int,
    positions: DeviceArray,
    sequences: DeviceArray,
    k_pages: DeviceArray,
    v_pages: DeviceArray,
    page_table: DeviceArray,
    out: DeviceArray | QuantizedRows,
) -> None:
    """See registry.attention."""
    _, head_dim = check_pages(qkv, heads, k_pages, v_pages)
    tokens, width = qkv.shape[0], heads * head_dim
    if out.shape != (tokens, width):
        raise ValueError(f"attention: {tokens} tokens of {heads} heads of {head_dim} do not give {out.shape}")
    held = stream.take_held()
    if held is not None and not (isinstance(held, HeldRope) and held.is_before(qkv, k_pages)):
        held.launch()
        held = None
    where = (positions, sequences, k_pages, v_pages, page_table)
    if attention_decode.fits(tokens, head_dim, k_pages.dtype):
        run = partial(attention_decode.decode, stream, qkv, heads, scale, window, held, *where)
    else:
        if held is not None:
            held.launch()
        run = partial(_launch, stream, qkv, heads, scale, window, *where)
    if isinstance(out, QuantizedRows) and tokens <= FEW:  # the product quantizes by itself, or takes codes
        values = stream.scratch("attention", out.shape)
        run(values)
        quantize(stream, values, out)
    elif isinstance(out, QuantizedRows):
        out.halves = None
        stream.hold(HeldAttention(stream, run, out))
    else:
        run(out)


class HeldAttention(HeldActivations):
    """Attention of many tokens, not launched yet: a product may follow and want its result in float16."""

    def __init__(self, stream: Stream, run: Callable[[DeviceArray | HalfRows], None], out: QuantizedRows) -> None:
        self.stream, self.run, self.out = stream, run, out

    def launch(self) -> None:
        """Attention, then its quantization."""
        values = self.stream.scratch("attention", self.out.shape)
        self.run(values)
        HeldRows(self.stream, "plain", values, None, 0.0, self.out).launch()

    def launch_halves(self, halves: HalfRows) -> None:
        """Straight to float16."""
        self.run(halves)


def _launch(
    stream: Stream,
    qkv: DeviceArray,
    heads: int,
    scale: float,
    window: int,
    positions: DeviceArray,
    sequences: DeviceArray,
    k_pages: DeviceArray,
    v_pages: DeviceArray,
    page_table: DeviceArray,
    out: DeviceArray | HalfRows,
) -> None:
    """Attention of many tokens, or of shapes that only the readable kernel takes."""
    (_, kv_heads, _, head_dim), tokens = k_pages.shape, qkv.shape[0]
    where = (positions, sequences, k_pages, v_pages, page_table)
    if attention_prefill.serves(head_dim, k_pages.dtype):
        attention_prefill.attention_prefill(stream, qkv, heads, scale, window, *where, out)
        return
    values = stream.scratch("attention", (tokens, heads * head_dim)) if isinstance(out, HalfRows) else out
    stream.launch(
        _attention(str(k_pages.dtype), 4 if head_dim <= 128 else 16),
        *((tokens, heads), qkv, heads, kv_heads, head_dim, scale, window, positions, sequences),
        *(k_pages, v_pages, page_table, page_table.shape[1], values),
    )
    if isinstance(out, HalfRows):
        to_halves(stream, "plain", values, None, 0.0, out)
