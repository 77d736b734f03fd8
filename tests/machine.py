"""A device under test: puts NumPy arrays on it, runs operators there, and brings the results back.

The tests of operators are written against this class alone, so that one table of cases serves every device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from numpy.typing import ArrayLike, NDArray

from numbainfer.quantization import QuantizedMatrix, QuantizedRows
from numbainfer.registry import Operators

GUARD = 64  # elements behind every output that no kernel may touch

TOP = 127 * 256  # the largest code of QuantizedRows
TINY = 1e-33  # a group whose values are all below counts as zeros: top / m has to stay finite in float32

Array = NDArray[Any]


def poison(shape: tuple[int, ...], dtype: Any) -> Array:
    """All bits set: NaN in floating point, -1 in integers, so a place that is never written shows."""
    array = np.empty(shape, dtype)
    array.view(np.uint8)[...] = 0xFF
    return array


class Machine:
    """The operators of a device. With `captured` set, every launch goes through a captured program."""

    def __init__(self, ops: Operators, captured: bool = False) -> None:
        self.ops, self.captured = ops, captured
        self._held: list[Any] = []
        self._guarded: list[tuple[Any, int]] = []

    def put(self, array: ArrayLike) -> Any:
        """A copy on the device."""
        host = np.ascontiguousarray(array)
        device = self.ops.pool.empty(host.shape, host.dtype)
        self._held.append(device)
        if hasattr(device, "copy_to_device"):
            device.copy_to_device(host)
        else:
            device[...] = host
        return device

    def get(self, array: Any) -> Array:
        """A copy of a device's array."""
        return array.copy_to_host() if hasattr(array, "copy_to_host") else np.array(array)

    def out(self, *shape: int, dtype: Any = np.float32) -> Any:
        """A poisoned array for results, with guarded elements behind it."""
        size = int(np.prod(shape))
        flat = self.put(poison((size + GUARD,), dtype))
        self._guarded.append((flat, size))
        return flat[:size].reshape(shape)

    def matrix(self, values: Array, group: int) -> QuantizedMatrix:
        """Weights quantized by the reference, with scales as float16."""
        codes, scales = reference.quantize_groups(values, group)
        return QuantizedMatrix(self.put(codes), self.put(scales.astype(np.float16)), group)

    def rows(self, tokens: int, width: int, group: int, planes: int = 1) -> QuantizedRows:
        """Poisoned QuantizedRows for results; only the padding columns are zero, as their contract says."""
        if planes not in {self.ops.backend.activation_planes(tokens) for tokens in (1, 1024)}:
            pytest.skip(f"{self.ops.device.kind} has no rows of {planes} planes")
        rows = QuantizedRows.empty(self.ops.pool, tokens, width, group, planes)
        self._held += [rows.codes, rows.scales, rows.sums, rows.outliers]
        host = [poison(a.shape, a.dtype) for a in (rows.codes, rows.scales, rows.sums, rows.outliers)]
        halves = host[0].reshape(len(host[0]), 2, -1)
        halves[:, :planes, width:] = 0
        return QuantizedRows(*map(self.put, host), tokens, width, group, planes)

    def quantized_rows(self, values: Array, group: int, planes: int = 1) -> QuantizedRows:
        """Quantized activations. Rows past the last token stay poisoned."""
        scales = reference.activation_scales(values, group, planes).astype(np.float32)
        codes = np.rint(values.astype(np.float64).reshape(len(values), -1, group) / scales[..., None])
        return self.rows_of(codes.reshape(values.shape).astype(np.int32), scales, group, planes)

    def rows_of(self, codes: Array, scales: Array, group: int, planes: int = 1) -> QuantizedRows:
        """Activations with these codes (as int32) and scales."""
        tokens, width = codes.shape
        rows = self.rows(tokens, width, group, planes)
        host = [self.get(a) for a in (rows.codes, rows.scales, rows.sums, rows.outliers)]
        halves = host[0][:tokens].reshape(tokens, 2, -1)
        high = (codes + 128) >> 8
        low = np.maximum(codes - 256 * high, -127)
        if planes == 2:
            halves[:, 0, :width], halves[:, 1, :width] = high, low
        else:
            halves[:, 0, :width] = low
            blocks = high.astype(np.int8).reshape(tokens, -1, 4)
            for token, found in enumerate(blocks.any(axis=-1)):
                packed = blocks[token, found].reshape(-1)
                halves[token, 1, : len(packed)] = packed
                host[3][token, 0] = found.sum()
                host[3][token, 1 : 1 + found.sum()] = 4 * np.flatnonzero(found)
        host[1][:tokens] = scales
        host[2][:tokens] = (256 * high + low).reshape(tokens, -1, group).sum(axis=-1, dtype=np.int32)
        return QuantizedRows(*map(self.put, host), tokens, width, group, planes)

    def get_rows(self, rows: QuantizedRows) -> tuple[Array, Array, Array]:
        """codes (as int32), scales and sums of the tokens, after checking the codes' form."""
        tokens, width = rows.shape
        host = [self.get(a)[:tokens] for a in (rows.codes, rows.scales, rows.sums, rows.outliers)]
        planes = host[0].reshape(tokens, 2, -1)[:, : rows.planes]
        assert not planes[..., width:].any(), "padding columns were written"
        assert planes.min(initial=0) > -128, "a dot product may take the absolute value of a byte"
        return QuantizedRows(*host, *rows.shape, rows.group, rows.planes).integers(), host[1], host[2]

    def sum_error(self, tokens: int, dtype: str = "int8") -> float:
        """Error of a product's sums for so many tokens, relative to the sum of the products' magnitudes.

        In float32 about 16 roundings of 2^-24: a sum in 16 lanes of up to 128 each could be off by 8 times that if all
        roundings went one way; random ones add like a root. The GPU's tensor cores take both sides in float16.
        """
        return 2**-11 if self.ops.device.kind == "cuda" and tokens > 4 and dtype != "float32" else 1e-6

    def run(self, name: str, *arguments: Any) -> None:
        """Runs the operator `name`."""
        operator = getattr(self.ops, name)
        if not self.captured:
            operator(*arguments)
            return
        with self.ops.stream.capture() as program:
            operator(*arguments)
        program.run()

    def close(self) -> None:
        """Checks the guards and returns the memory."""
        overrun = [size for flat, size in self._guarded if (self.get(flat)[size:].view(np.uint8) != 0xFF).any()]
        for array in self._held:
            self.ops.pool.release(array)
        self._held, self._guarded = [], []
        assert not overrun, f"written past the end of outputs of {overrun} elements"


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    """Standard normal float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_within(actual: Array, expected: Array, bound: ArrayLike) -> None:
    """|actual - expected| <= bound everywhere; NaN never is."""
    expected = np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    excess = np.abs(actual - expected) - bound
    if not (excess <= 0).all():
        worst = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), excess.shape)
        raise AssertionError(f"at {worst}: {actual[worst]!r}, expected {expected[worst]!r}, {excess[worst]} too far")


def assert_close(actual: Array, expected: Array, relative: float = 1e-6) -> None:
    """Within `relative` of the row's largest magnitude.

    1e-6 is 16 roundings of float32 (2^-24 each): what a sum of some thousand values in 16 lanes needs at most, as
    random roundings add up like a root.
    """
    assert_within(actual, expected, relative * np.abs(expected).max(axis=-1, keepdims=True))


def assert_quantizes(machine: Machine, rows: QuantizedRows, values: Array, relative: float = 0.0) -> None:
    """`rows` hold `values` [tokens, width], quantized; `relative` is the error that the values themselves may have.

    The scales' roundings move a quotient by a 2^-22nd of itself (one plane: by 2e-6, for the root mean square behind
    it); within that, and the values' own error, of a half the code may be either neighbour. A low byte is never -128:
    -127 stands for both.
    """
    codes, scales, sums = machine.get_rows(rows)
    values = np.asarray(values)
    expected = reference.activation_scales(values, rows.group, rows.planes)
    relative += 2**-23 if rows.planes == 2 else 2e-6
    assert_within(scales, expected, relative * expected + 2**-149)
    grouped = values.astype(np.float64).reshape(len(codes), -1, rows.group)
    codes = codes.reshape(grouped.shape)
    quotient = grouped * np.divide(1, expected, out=np.zeros_like(expected), where=expected > TINY / 127)[..., None]
    assert_within(codes, quotient, 0.5 + ((codes + 128) % 256 == 1) + 2 * relative * np.abs(quotient))
    assert_within(np.abs(codes), 0 * codes, TOP)
    np.testing.assert_array_equal(sums, codes.sum(axis=-1, dtype=np.int32))
