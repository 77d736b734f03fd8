"""A device under test: puts NumPy arrays on it, runs operators there, and brings the results back.

The tests of operators are written against this class alone, so that one table of cases serves every device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import reference
from numpy.typing import ArrayLike, NDArray

from numbainfer.quantization import QuantizedMatrix, QuantizedRows
from numbainfer.registry import Operators

GUARD = 64  # elements behind every output that no kernel may touch

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

    def rows(self, tokens: int, width: int, group: int) -> QuantizedRows:
        """Poisoned QuantizedRows for results; only the padding columns are zero, as their contract says."""
        rows = QuantizedRows.empty(self.ops.pool, tokens, width, group)
        self._held += [rows.codes, rows.scales, rows.sums]
        codes = poison(rows.codes.shape, np.int8)
        codes[:, width:] = 0
        scales, sums = poison(rows.scales.shape, np.float32), poison(rows.sums.shape, np.int32)
        return QuantizedRows(self.put(codes), self.put(scales), self.put(sums), tokens, width, group)

    def quantized_rows(self, values: Array, group: int) -> QuantizedRows:
        """Activations quantized by the reference. Rows past the last token stay poisoned."""
        codes, scales = reference.quantize_groups(values, group)
        return self.rows_of(codes, scales.astype(np.float32), group)

    def rows_of(self, codes: Array, scales: Array, group: int) -> QuantizedRows:
        """Activations with these codes and scales."""
        tokens, width = codes.shape
        rows = self.rows(tokens, width, group)
        host = [self.get(a) for a in (rows.codes, rows.scales, rows.sums)]
        host[0][:tokens, :width] = codes
        host[1][:tokens] = scales
        host[2][:tokens] = codes.reshape(tokens, -1, group).sum(axis=-1, dtype=np.int32)
        return QuantizedRows(*map(self.put, host), tokens, width, group)

    def get_rows(self, rows: QuantizedRows) -> tuple[Array, Array, Array]:
        """codes, scales and sums of the tokens, after checking that the padding columns are still zero."""
        tokens, width = rows.shape
        codes, scales, sums = (self.get(a)[:tokens] for a in (rows.codes, rows.scales, rows.sums))
        assert not codes[:, width:].any(), "padding columns were written"
        return codes[:, :width], scales, sums

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

    Scales: m / 127, rounded once. Codes: the multiplication by 127 / m rounds twice, so a quotient of up to 127 is
    off by at most 127 * 2^-23; within that (and the values' own error) of a half the code may be either neighbour.
    """
    codes, scales, sums = machine.get_rows(rows)
    grouped = np.asarray(values, np.float64).reshape(len(codes), -1, rows.group)
    largest = np.abs(grouped).max(axis=-1)
    assert_within(scales, largest / 127, (2**-24 + relative) * largest / 127 + 2**-149)
    assert_within(np.abs(codes.astype(np.int32)).reshape(grouped.shape).max(axis=-1), 127 * (largest > 1e-35), 0)
    quotient = grouped * np.divide(127, largest, out=np.zeros_like(largest), where=largest > 1e-35)[..., None]
    assert_within(codes.reshape(grouped.shape), quotient, 0.5 + 127 * (2**-23 + 2 * relative))
    np.testing.assert_array_equal(sums, codes.reshape(grouped.shape).sum(axis=-1, dtype=np.int32))
