"""Activations for the tensor cores: float16, packed so that a tile of tokens is one piece of memory.

Data is [D / 64 blocks, rows, 64] float16: for 64 columns all tokens, then for the next 64. A tile of tokens of one block
is then contiguous, and one bulk copy brings it to shared memory in the layout that wgmma reads ("128-byte swizzle").
Inside a token's 64 columns two permutations apply, both free for whoever writes them:

- columns: column 16j + 2c + e (j < 4, c < 8, e < 2) stands in 16-byte chunk c at half 2j + e. The 16 columns that share
  a j are what one thread needs of a weight row for four products of 16 columns, so that it loads them at once;
- chunks: chunk c of token t stands at place c XOR (t mod 8), so that the same chunk of 8 tokens lies in 8 different
  sets of memory banks.

float16 has 11 bits where bfloat16 has 8, and its range is made to suffice: a buffer stands for `factor` times its
numbers (a power of two chosen by who writes it), and values beyond 65504 saturate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numba import cuda, types
from numpy import float32

from numbainfer.gpu.compile import device_function, kernel
from numbainfer.gpu.ptx import address, load_f32x4, pack_halves, store_i32x4, wait_for_previous_kernel
from numbainfer.memory import MemoryPool

TILE = 128  # rows are a multiple of this: the widest tile of tokens
BLOCK = 64  # columns
THREADS = 256
HIDDEN_FACTOR = 64.0
"""What MLP activations are divided by in float16: silu(gate) * up has outliers in the thousands in some models, and
16-bit floats lose nothing down to 2^-14 of a unit, so 4 million and 4e-3 are both within reach."""


@dataclass
class HalfRows:
    """tokens x width activations in float16: data [blocks, rows, 64] as uint16 bits, standing for factor * data."""

    data: Any
    tokens: int
    width: int
    factor: float = 1.0

    @classmethod
    def empty(cls, pool: MemoryPool, tokens: int, width: int, factor: float = 1.0) -> HalfRows:
        rows = -(-tokens // TILE) * TILE
        return cls(pool.zeros((-(-width // BLOCK), rows, BLOCK), np.uint16), tokens, width, factor)

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
    return values[: rows.tokens, : rows.width].astype(np.float64) * rows.factor


@device_function
def store_unit(data, rows, token, block, quarter, v0, v1, v2, v3, inverse):
    """Writes a token's columns 16j + 4 * quarter to + 3 of a block, j = 0 to 3: v[j], four numbers each."""
    at = address(data) + (types.int64(block) * rows + token) * 128
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


@kernel("f32p i32 i32 f32 u16p", threads=THREADS, hot=True)
def halves(x, rows, width, inverse, out):
    """float32 [T, width] to HalfRows. A block of threads does a token."""
    wait_for_previous_kernel()
    token = cuda.blockIdx.x
    at = address(x) + types.int64(token) * width * 4
    for unit in range(cuda.threadIdx.x, ((width + 63) >> 6) * 4, THREADS):
        block, quarter = unit >> 2, unit & 3
        column = 64 * block + 4 * quarter
        v0, v1 = load_four(at, column, width), load_four(at, column + 16, width)
        v2, v3 = load_four(at, column + 32, width), load_four(at, column + 48, width)
        store_unit(out, rows, token, block, quarter, v0, v1, v2, v3, inverse)
