"""Activations for the tensor cores: float16, packed so that a tile of tokens is one piece of memory.

Data is [D / 64 blocks, rows, 64] float16: for 64 columns all tokens, then for the next 64. A tile of tokens of one
block is then contiguous, and one bulk copy brings it to shared memory in the layout that wgmma reads ("128-byte
swizzle").
Inside a token's 64 columns two permutations apply, both free for whoever writes them:

- columns: column 16j + 2c + e (j < 4, c < 8, e < 2) stands in 16-byte chunk c at half 2j + e. The 16 columns that share
  a j are what one thread needs of a weight row for four products of 16 columns, so that it loads them at once;
- chunks: chunk c of token t stands at place c XOR (t mod 8), so that the same chunk of 8 tokens lies in 8 different
  sets of memory banks.

float16 has 11 bits where bfloat16 has 8, and its range is made to suffice: a buffer stands for `factor` times its
numbers (a power of two chosen by who writes it), and values beyond 65504 saturate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numba import cuda
from numpy import float32, int32, int64

from numbainfer.gpu.arithmetic import float_to_half, half_to_float, pack_halves
from numbainfer.gpu.compile import Kernel, device_function, family, kernel
from numbainfer.gpu.launch import Stream
from numbainfer.gpu.memory import DeviceArray
from numbainfer.gpu.ptx import address, let_next_kernel_start, load_f32x4, store_i32x4, wait_for_previous_kernel
from numbainfer.gpu.reduce import block_sum
from numbainfer.memory import MemoryPool
from numbainfer.quantization import QuantizedRows

BLOCK = 64  # columns
THREADS = 256
HIDDEN_FACTOR = 64.0
"""What MLP activations are divided by in float16: silu(gate) * up has outliers in the thousands in some models, and
16-bit floats lose nothing down to 2^-14 of a unit, so 4 million and 4e-3 are both within reach."""
SUM_FACTOR = 8.0
"""The same for sums of the residual stream times a norm's weights, before they are divided by their root mean square:
outliers reach thousands in some models, and 524,000 is within reach; 8 * 2^-25 = 2.4e-7 is what small ones lose."""


def padded(tokens: int) -> int:
    """Rows for so many tokens: whole tiles of the widest that products take of them (mma_plan.py)."""
    return 128 if tokens <= 128 else -(-tokens // 256) * 256


@dataclass
class HalfRows:
    """tokens x width activations in float16: data [blocks, rows, 64] as uint16 bits, standing for factor * data.

    squares, where they are still to be divided by the root of their mean square + eps: float32 [tokens, blocks], the
    sum over each block's columns. (Of the numbers before the norm's weights: data has them.)
    """

    data: Any
    tokens: int
    width: int
    factor: float = 1.0
    squares: Any = None
    eps: float = 0.0

    @classmethod
    def empty(cls, pool: MemoryPool, tokens: int, width: int, factor: float = 1.0) -> HalfRows:
        return cls(pool.zeros((-(-width // BLOCK), padded(tokens), BLOCK), np.uint16), tokens, width, factor)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.tokens, self.width)

    @property
    def rows(self) -> int:
        """Tokens that there is room for."""
        return self.data.shape[1]

    def first(self, tokens: int) -> HalfRows:
        """The same memory, holding that many tokens."""
        return replace(self, tokens=tokens)

    def release(self, pool: MemoryPool) -> None:
        pool.release(self.data)


def pack(values: np.ndarray, rows: int, factor: float = 1.0) -> np.ndarray:
    """float [T, D] to the data of HalfRows, on the host: what the kernels' layout is tested against."""
    tokens, width = values.shape
    blocks = -(-width // BLOCK)
    padded = np.zeros((rows, blocks * BLOCK), np.float32)
    padded[:tokens, :width] = np.clip(values / factor, -65504, 65504)
    chunks = padded.astype(np.float16).reshape(rows, blocks, 4, 8, 2).transpose(1, 0, 3, 2, 4)  # [block, row, c, j, e]
    chunks = chunks.reshape(blocks, rows, 8, 8)
    token = np.arange(rows)[:, None]
    swizzled = np.empty_like(chunks)
    swizzled[:, token, np.arange(8)[None] ^ (token % 8)] = chunks
    return swizzled.reshape(blocks, rows, BLOCK).view(np.uint16)


def unpack(rows: HalfRows) -> np.ndarray:
    """The values of HalfRows as float64 [T, D], on the host."""
    data = np.asarray(rows.data).view(np.float16)
    blocks, count, _ = data.shape
    token = np.arange(count)[:, None]
    chunks = data.reshape(blocks, count, 8, 4, 2)[:, token, np.arange(8)[None] ^ (token % 8)]
    values = chunks.transpose(1, 0, 3, 2, 4).reshape(count, blocks * BLOCK)
    values = values[: rows.tokens, : rows.width].astype(np.float64) * rows.factor
    if rows.squares is None:
        return values
    total = np.asarray(rows.squares)[: rows.tokens].sum(axis=1, keepdims=True, dtype=np.float64)
    return values / np.sqrt(total / rows.width + rows.eps)


@device_function
def store_unit(data, rows, token, block, quarter, v0, v1, v2, v3, inverse):
    """Writes a token's columns 16j + 4 * quarter to + 3 of a block, j = 0 to 3: v[j], four numbers each."""
    at = address(data) + (int64(block) * rows + token) * 128
    place = (2 * quarter) ^ (token & 7)
    for half in range(2):  # the two chunks of this quarter
        e = 2 * half
        store_i32x4(
            at + 16 * (place ^ half),
            pack_halves(v0[e] * inverse, v0[e + 1] * inverse),
            pack_halves(v1[e] * inverse, v1[e + 1] * inverse),
            pack_halves(v2[e] * inverse, v2[e + 1] * inverse),
            pack_halves(v3[e] * inverse, v3[e + 1] * inverse),
        )


@device_function
def load_four(at, column, width):
    """Columns column to + 3 of a row of `width`, a multiple of 4; zeros beyond."""
    if column < width:
        return load_f32x4(at + 4 * column)
    return (float32(0), float32(0), float32(0), float32(0))


@device_function
def load_unit(at, unit, width):
    """What `store_unit` writes of a row, block unit / 4 and quarter unit % 4; zeros beyond the row."""
    column = int32(64 * (unit >> 2) + 4 * (unit & 3))
    first, second = load_four(at, column, width), load_four(at, column + 16, width)
    return first, second, load_four(at, column + 32, width), load_four(at, column + 48, width)


@device_function
def squares_of(v):
    """The sum of four squares."""
    return v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3]


@family(("plain",), ("norm",), ("swiglu",))
def _halves(kind: str) -> Kernel:
    """To HalfRows: x [T, width] ("plain"), its RMSNorm ("norm"), or SwiGLU of x [T, 2 width]. A token to a block."""

    @kernel("f32p f32p i32 f32 i32 f32 u16p", threads=THREADS, hot=True, fast=True)
    def halves(x, weight, width, eps, rows, inverse, out):
        let_next_kernel_start()
        wait_for_previous_kernel()
        token = int32(cuda.blockIdx.x)
        at = address(x) + int64(token) * width * (8 if kind == "swiglu" else 4)
        units = ((width + 63) >> 6) * 4
        unit = int32(cuda.threadIdx.x)
        v = load_unit(at, unit, width)
        if kind == "norm":
            # The thread's first unit stays in registers: all of a row of up to 4096.
            w = load_unit(address(weight), unit, width)
            partial = cuda.shared.array(32, float32)
            squares = squares_of(v[0]) + squares_of(v[1]) + squares_of(v[2]) + squares_of(v[3])
            for column in range(16 * THREADS + 4 * cuda.threadIdx.x, width, 4 * THREADS):
                squares += squares_of(load_f32x4(at + 4 * column))
            inverse *= float32(1) / math.sqrt(block_sum(squares, partial) / float32(width) + eps)
        while unit < units:
            v0, v1, v2, v3 = v
            if kind == "norm":
                v0, v1, v2, v3 = times(v0, w[0]), times(v1, w[1]), times(v2, w[2]), times(v3, w[3])
            if kind == "swiglu":
                u = load_unit(at + 4 * width, unit, width)
                v0, v1, v2, v3 = gate(v0, u[0]), gate(v1, u[1]), gate(v2, u[2]), gate(v3, u[3])
            store_unit(out, rows, token, int32(unit >> 2), int32(unit & 3), v0, v1, v2, v3, inverse)
            unit = int32(unit + THREADS)
            if unit < units:
                v = load_unit(at, unit, width)
                if kind == "norm":
                    w = load_unit(address(weight), unit, width)

    return halves


@device_function
def times(a, b):
    """Four products."""
    return a[0] * b[0], a[1] * b[1], a[2] * b[2], a[3] * b[3]


@device_function
def gate(a, b):
    """silu(a) * b of four numbers."""
    return silu(a[0]) * b[0], silu(a[1]) * b[1], silu(a[2]) * b[2], silu(a[3]) * b[3]


@device_function
def silu(value):
    """value / (1 + e^-value)"""
    return value / (float32(1) + math.exp(-value))


@kernel("i8p i32 f32p i32 i32 i32 u16p", threads=THREADS)
def _from_codes(codes, stride, scales, group, width, rows, out):
    """QuantizedRows of two planes to HalfRows; a token to a block."""
    wait_for_previous_kernel()
    token, groups = cuda.blockIdx.x, width // group
    line = int64(token) * stride
    for i in range(cuda.threadIdx.x, (width + 63) & -64, THREADS):
        value = float32(0)
        if i < width:
            q = (int32(codes[line + i]) << 8) + int32(codes[line + stride // 2 + i])
            value = float32(q) * scales[int64(token) * groups + i // group]
        out[half_index(rows, token, i)] = float_to_half(min(max(value, float32(-65504)), float32(65504)))


@kernel("u16p i32 i32 f32 f32p f32 f32p", threads=THREADS)
def _to_floats(halves, rows, width, factor, squares, eps, out):
    """HalfRows to float32 [T, width]; a token to a block."""
    wait_for_previous_kernel()
    token = cuda.blockIdx.x
    if address(squares) != 0:
        blocks, total = (width + 63) >> 6, float32(0)
        for block in range(blocks):
            total += squares[token * blocks + block]
        factor /= math.sqrt(total / float32(width) + eps)
    for i in range(cuda.threadIdx.x, width, THREADS):
        out[int64(token) * width + i] = half_to_float(halves[half_index(rows, token, i)]) * factor


@device_function
def half_index(rows, token, column):
    """Where a number stands in the data of HalfRows."""
    j, c, e = (column >> 4) & 3, (column >> 1) & 7, column & 1
    return ((int64(column >> 6) * rows + token) * 8 + (c ^ (token & 7))) * 8 + 2 * j + e


def scratch_halves(stream: Stream, name: str, tokens: int, width: int, factor: float = 1.0) -> HalfRows:
    """HalfRows in the stream's scratch memory of that name."""
    shape = (-(-width // BLOCK), padded(tokens), BLOCK)
    return HalfRows(stream.scratch(name, shape, np.uint16), tokens, width, factor)


def to_halves(stream: Stream, kind: str, x: DeviceArray, weight: DeviceArray | None, eps: float, out: HalfRows) -> None:
    """x to HalfRows ("plain"), its RMSNorm ("norm"), or its SwiGLU ("swiglu": x is gate_up)."""
    arrays = (x, weight, out.width, eps, out.rows, 1 / out.factor, out.data)
    stream.launch(_halves(kind), out.tokens, *arrays)


def halves_of_codes(stream: Stream, x: QuantizedRows, out: HalfRows) -> None:
    """The values of QuantizedRows."""
    arrays = (x.codes, x.stride, x.scales, x.group, x.width, out.rows, out.data)
    stream.launch(_from_codes, x.tokens, *arrays)


def floats_of_halves(stream: Stream, x: HalfRows, out: DeviceArray) -> None:
    """The values of HalfRows in float32 [T, width]."""
    stream.launch(_to_floats, x.tokens, x.data, x.rows, x.width, x.factor, x.squares, x.eps, out)
