"""Matrices as operators see them: floating point, or int8 with one scale per group.

The codec (more in docs/format.md): a group is `group` consecutive values of a row;
s = max|w| / 127 rounded to float16, q = round(w / s) in -127 to 127, w' = q * s. Symmetric: no zero point.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from numbainfer.memory import MemoryPool

GROUPS = (128, 64, 32)

# How floating-point matrices are stored. NumPy has no bfloat16: its bits travel as uint16.
STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}


@dataclass(frozen=True)
class Matrix:
    """A weight matrix in floating point: data [out, in], float32, float16 or bfloat16 (as uint16 bits)."""

    data: Any

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def input_buffer(self, pool: MemoryPool, tokens: int) -> Any:
        """Where the operator before puts this matrix's input: float32 [tokens, in]."""
        return pool.empty((tokens, self.shape[1]), np.float32)


@dataclass(frozen=True)
class QuantizedMatrix:
    """An int8 weight matrix: codes [out, in] int8, scales [out, in / group] float16."""

    codes: Any
    scales: Any
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def input_buffer(self, pool: MemoryPool, tokens: int) -> QuantizedRows:
        """Where the operator before puts this matrix's input, quantized in the same groups."""
        return QuantizedRows.empty(pool, tokens, self.shape[1], self.group, planes=2)


@dataclass
class QuantizedRows:
    """Activations as integers with a scale per group: value = scale * q, q = 256 * high + low in -32512 to 32512.

    Two forms in the same memory, codes [rows, 2 * padded] int8:
    - planes 2: a row's high bytes, then its low bytes. 15 bits, as good as float32 for what follows, at twice the dot
      products of plain int8.
    - planes 1: a row's low bytes; of the high bytes only the blocks of 4 columns where one is not 0, packed behind
      each other. outliers [rows, 1 + padded / 4] int32 has their number and the first column of each.

    scales [rows, in / group] float32; sums [rows, in / group] int32: of q. `rows` is rounded up to a multiple of 8
    and `padded` to one of 64, so that kernels read whole tiles; the padding columns of a plane are zero. `tokens` rows
    and `width` columns hold values.
    """

    codes: Any
    scales: Any
    sums: Any
    outliers: Any
    tokens: int
    width: int
    group: int
    planes: int
    halves: Any = field(default=None, init=False, repr=False)
    """On the GPU: the same values for its tensor cores, where a product of many tokens asked for nothing else; `codes`
    then mean nothing."""

    @classmethod
    def empty(cls, pool: MemoryPool, tokens: int, width: int, group: int, planes: int) -> QuantizedRows:
        rows, padded = -(-tokens // 8) * 8, -(-width // 64) * 64
        codes = pool.zeros((rows, 2 * padded), np.int8)
        scales = pool.zeros((rows, width // group), np.float32)
        sums = pool.zeros((rows, width // group), np.int32)
        outliers = pool.zeros((rows, 1 + padded // 4), np.int32)
        return cls(codes, scales, sums, outliers, tokens, width, group, planes)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.tokens, self.width)

    @property
    def stride(self) -> int:
        """Bytes from one row to the next."""
        return self.codes.shape[1]

    def integers(self) -> np.ndarray:
        """q [tokens, in] int32: for tests and for looking at them."""
        halves = np.asarray(self.codes, np.int8)[: self.tokens].reshape(self.tokens, 2, -1)
        if self.planes == 2:
            q = 256 * halves[:, 0].astype(np.int32) + halves[:, 1]
        else:
            q = halves[:, 0].astype(np.int32)
            for row, blocks, (count, *columns) in zip(q, halves[:, 1], np.asarray(self.outliers), strict=False):
                for block, column in enumerate(columns[:count]):
                    row[column : column + 4] += 256 * blocks[4 * block : 4 * block + 4].astype(np.int32)
        return q[:, : self.width]

    def dequantize(self) -> np.ndarray:
        """The values [tokens, in] in float64: for tests and for looking at them."""
        grouped = self.integers().reshape(self.tokens, -1, self.group)
        scales = np.asarray(self.scales, np.float64)[: self.tokens, :, None]
        return (grouped * scales).reshape(self.tokens, self.width)

    def first(self, tokens: int, planes: int | None = None) -> QuantizedRows:
        """The same memory, holding that many tokens, in the form of `planes` (None: as here)."""
        return replace(self, tokens=tokens, planes=planes or self.planes)

    def release(self, pool: MemoryPool) -> None:
        for array in (self.codes, self.scales, self.sums, self.outliers):
            pool.release(array)


AnyMatrix = Matrix | QuantizedMatrix


def choose_group(width: int, asked: int) -> int | None:
    """The largest group of 128, 64, 32 not above `asked` that divides `width`; None: the matrix can't be int8."""
    return next((g for g in GROUPS if g <= asked and width % g == 0), None)


def dequantize(matrix: QuantizedMatrix) -> np.ndarray:
    """The float32 matrix [out, in] that the codes stand for."""
    rows, width = matrix.shape
    grouped = np.asarray(matrix.codes, np.float32).reshape(rows, width // matrix.group, matrix.group)
    return (grouped * np.asarray(matrix.scales, np.float32)[..., None]).reshape(rows, width)


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) as float32: exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16 bits (uint16), to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
