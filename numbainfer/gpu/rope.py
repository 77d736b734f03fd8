"""Rotary position embedding, and the step between the QKV product and attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import cuda
from numpy import float32, int32, int64

from numbainfer.gpu.arithmetic import float_to_half, half_to_float, still
from numbainfer.gpu.compile import device_function, family, kernel
from numbainfer.gpu.launch import Held, Stream
from numbainfer.gpu.memory import DeviceArray
from numbainfer.gpu.ptx import advance, let_next_kernel_start, wait_for_previous_kernel
from numbainfer.gpu.reduce import warp_sum

PAGE_BITS = 6
PAGE = 1 << PAGE_BITS  # positions, as kv_cache.py has it
THREADS = 128
WARPS = 8


@kernel("f32p i32 i32 i32p f32p f32p i32", threads=THREADS)
def _rope(x, heads, head_dim, positions, cos, sin, half):
    wait_for_previous_kernel()
    token, h = cuda.blockIdx.x, cuda.blockIdx.y
    head, row = advance(x, (token * heads + h) * head_dim), positions[token] * half
    for i in range(cuda.threadIdx.x, half, THREADS):
        first, second = head[i], head[i + half]
        head[i] = first * cos[row + i] - second * sin[row + i]
        head[i + half] = second * cos[row + i] + first * sin[row + i]


def rope(
    stream: Stream, x: DeviceArray, heads: int, positions: DeviceArray, cos: DeviceArray, sin: DeviceArray
) -> None:
    """See registry.rope."""
    tokens, head_dim = x.shape[0], x.shape[1] // heads
    if x.shape[1] != heads * head_dim or 2 * cos.shape[1] > head_dim:
        raise ValueError(f"rope: x {x.shape} of {heads} heads, tables {cos.shape}")
    stream.launch(_rope, (tokens, heads), x, heads, head_dim, positions, cos, sin, cos.shape[1])


@device_function
def put_f32(pages, i, value):
    """pages[i] = value"""
    pages[i] = value


@device_function
def saturated(value):
    """Within float16's range. NaN stays NaN: comparisons with it are false."""
    value = float32(65504) if value > float32(65504) else value
    return float32(-65504) if value < float32(-65504) else value


@device_function
def put_f16(pages, i, value):
    """pages[i] = value as float16, to nearest even; saturated."""
    pages[i] = float_to_half(saturated(value))


@device_function
def as_stored(value):
    """What put_f16 makes of a value."""
    return half_to_float(float_to_half(saturated(value)))


@family(("float32",), ("float16",))
def _rope_and_store(dtype: str):
    pages, put = ("f32p", put_f32) if dtype == "float32" else ("u16p", put_f16)

    @kernel(
        f"f32p i32 i32 i32 f32p f32p i32 f32 i32p i32p f32p f32p i32 {pages} {pages} i32p i32",
        threads=32 * WARPS,
        blocks=4,
    )
    def rope_and_store(
        qkv, heads, kv_heads, head_dim, q_norm, k_norm, normed, eps, positions, sequences, cos, sin, half,
        k_pages, v_pages, page_table, pages_per_sequence,
    ):  # fmt: skip
        # A block is a token, or a part of its heads; a warp takes one head at a time, a lane both elements of a pair.
        # Query heads come first, then those of keys and of values.
        let_next_kernel_start()
        wait_for_previous_kernel()
        token, warp, lane = cuda.blockIdx.x, cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
        position = positions[token]
        cos, sin = advance(cos, position * half), advance(sin, position * half)
        page = page_table[sequences[token] * pages_per_sequence + position // PAGE]
        for h in range(cuda.blockIdx.y * WARPS + warp, heads + 2 * kv_heads, cuda.gridDim.y * WARPS):
            head = advance(qkv, (token * (heads + 2 * kv_heads) + h) * head_dim)
            g = h - heads if h < heads + kv_heads else h - heads - kv_heads
            slot = ((int64(page) * kv_heads + g) * PAGE + position % PAGE) * head_dim
            if h >= heads + kv_heads:
                i = int32(lane)
                while i < head_dim:
                    i = still(i)
                    put(v_pages, slot + i, head[i])
                    i = int32(i + 32)
            else:
                factor, norm = float32(1), q_norm if h < heads else k_norm
                if normed:
                    squares = float32(0)
                    i = int32(lane)
                    while i < head_dim:
                        i = still(i)
                        squares += head[i] * head[i]
                        i = int32(i + 32)
                    factor = float32(1) / math.sqrt(warp_sum(squares) / float32(head_dim) + eps)
                i = int32(lane)
                while i < half:
                    i = still(i)
                    first, second = head[i] * factor, head[i + half] * factor
                    if normed:
                        first, second = first * norm[i], second * norm[i + half]
                    c, s = cos[i], sin[i]
                    turned, other = first * c - second * s, second * c + first * s
                    if h < heads:
                        head[i], head[i + half] = turned, other
                    else:
                        put(k_pages, slot + i, turned)
                        put(k_pages, slot + i + half, other)
                    i = int32(i + 32)
                i = int32(2 * half + lane)
                while i < head_dim:  # what is not rotated
                    i = still(i)
                    value = head[i] * factor * (norm[i] if normed else float32(1))
                    if h < heads:
                        head[i] = value
                    else:
                        put(k_pages, slot + i, value)
                    i = int32(i + 32)

    return rope_and_store


@dataclass
class HeldRope(Held):
    """rope_and_store of tokens apart, not launched yet: the attention that follows may do it on the way."""

    stream: Stream
    qkv: DeviceArray
    heads: int
    q_norm: DeviceArray | None
    k_norm: DeviceArray | None
    eps: float
    positions: DeviceArray
    sequences: DeviceArray
    cos: DeviceArray | None
    sin: DeviceArray | None
    k_pages: DeviceArray
    v_pages: DeviceArray
    page_table: DeviceArray

    def is_before(self, qkv: DeviceArray, k_pages: DeviceArray) -> bool:
        """Whether it is that of this attention."""
        same = self.qkv.pointer == qkv.pointer and self.qkv.shape == qkv.shape
        return same and self.k_pages.pointer == k_pages.pointer

    def launch(self) -> None:
        """rope_and_store by itself."""
        _, kv_heads, _, head_dim = self.k_pages.shape
        half = 0 if self.cos is None else self.cos.shape[1]
        tokens, most = self.qkv.shape[0], -(-(self.heads + 2 * kv_heads) // WARPS)
        parts = min(most, -(-4 * self.stream.gpu.multiprocessors // tokens))  # of a token, where there are few tokens
        self.stream.launch(
            _rope_and_store(str(self.k_pages.dtype)),
            *((tokens, parts), self.qkv, self.heads, kv_heads, head_dim),
            *(self.q_norm, self.k_norm, int(self.q_norm is not None), self.eps, self.positions, self.sequences),
            *(self.cos, self.sin, half, self.k_pages, self.v_pages, self.page_table, self.page_table.shape[1]),
        )


def rope_and_store(
    stream: Stream,
    qkv: DeviceArray,
    heads: int,
    q_norm: DeviceArray | None,
    k_norm: DeviceArray | None,
    eps: float,
    positions: DeviceArray,
    sequences: DeviceArray,
    cos: DeviceArray | None,
    sin: DeviceArray | None,
    k_pages: DeviceArray,
    v_pages: DeviceArray,
    page_table: DeviceArray,
    apart: bool = False,
) -> None:
    """See registry.rope_and_store. Of tokens `apart`, attention may do it: it then leaves q as it was."""
    _, head_dim = check_pages(qkv, heads, k_pages, v_pages)
    if (q_norm is None) != (k_norm is None):
        raise ValueError("rope_and_store: q_norm and k_norm come together")
    half = 0 if cos is None else cos.shape[1]
    if 2 * half > head_dim:
        raise ValueError(f"rope_and_store: heads of {head_dim}, tables of {half} pairs")
    held = HeldRope(
        *(stream, qkv, heads, q_norm, k_norm, eps, positions, sequences, cos, sin, k_pages, v_pages, page_table)
    )
    if apart or qkv.shape[0] == 1:
        stream.hold(held)
    else:
        held.launch()


def check_pages(qkv: DeviceArray, heads: int, k_pages: DeviceArray, v_pages: DeviceArray) -> tuple[int, int]:
    """(kv_heads, head_dim), after checking that qkv [T, (H + 2 K) d] and the pages [P, K, 64, d] agree."""
    _, kv_heads, slots, head_dim = k_pages.shape
    fits = k_pages.shape == v_pages.shape and slots == PAGE and heads % kv_heads == 0 and head_dim <= 512
    if not fits or qkv.shape[1] != (heads + 2 * kv_heads) * head_dim or k_pages.dtype not in (np.float32, np.float16):
        raise ValueError(f"qkv {qkv.shape} of {heads} heads and pages {k_pages.shape}, {v_pages.shape} do not fit")
    return kv_heads, head_dim
