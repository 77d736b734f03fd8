"""The elementary operators on every device, against the float64 reference, over odd shapes and odd values."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from machine import Machine, assert_close, assert_quantizes, assert_within, normal, poison
from numpy.testing import assert_array_equal

from numbainfer.quantization import (
    Matrix,
    QuantizedMatrix,
    QuantizedRows,
    bfloat16_to_float32,
    dequantize,
    float32_to_bfloat16,
)

# Below, at and above one vector of 16 lanes and multiples of it; the widths of small models; a wide one.
WIDTHS = [8, 16, 48, 72, 100, 172, 288, 576, 2048]
# Around the tiles of 4 and 8 tokens, and more than one chunk of anything.
TOKENS = [1, 2, 3, 4, 5, 7, 8, 9, 17, 33, 70]
# (width, group), some an odd number of groups of 32, so that a row ends in half a vector of bytes.
GROUPED = [(32, 32), (96, 32), (160, 32), (288, 32), (64, 64), (576, 64), (128, 128), (384, 128), (2048, 128)]


def mixed_rows(seed: int, tokens: int, width: int) -> np.ndarray:
    """Normal values, with rows that are huge, tiny, and all zeros."""
    x = normal(seed, tokens, width)
    x[1::5] *= np.float32(1e15)
    x[2::5] *= np.float32(1e-15)
    x[3::5] = 0
    return x


# --- embedding ---------------------------------------------------------------------------------------------------

IDS = np.array([0, 30, 7, 7, -1, 31, 2**31 - 1, -(2**31)], np.int32)  # the last four lie outside


def expected_rows(table: np.ndarray) -> np.ndarray:
    rows = np.zeros((len(IDS), table.shape[1]))
    rows[:4] = reference.embedding(IDS[:4], table)
    return rows


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("width", WIDTHS)
def test_embedding(machine: Machine, width: int, dtype: str) -> None:
    values = normal(width, 31, width)
    if dtype == "bfloat16":
        stored = float32_to_bfloat16(values)
        values = bfloat16_to_float32(stored)
    else:
        stored = values = values.astype(dtype)
    out = machine.out(len(IDS), width)
    machine.run("embedding", machine.put(IDS), Matrix(machine.put(stored)), out)
    assert_array_equal(machine.get(out), expected_rows(values))


@pytest.mark.parametrize(("width", "group"), GROUPED)
def test_embedding_int8(machine: Machine, width: int, group: int) -> None:
    table = machine.matrix(normal(width, 31, width), group)
    out = machine.out(len(IDS), width)
    machine.run("embedding", machine.put(IDS), table, out)
    # 7 bits of code times 11 of scale fit into float32: exact
    host = QuantizedMatrix(machine.get(table.codes), machine.get(table.scales), group)
    assert_array_equal(machine.get(out), expected_rows(dequantize(host)))


# --- rows to rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", WIDTHS)
def test_rmsnorm(machine: Machine, tokens: int, width: int) -> None:
    x, weight = mixed_rows(width + tokens, tokens, width), normal(1, width)
    expected = reference.rmsnorm(x, weight, 1e-5)
    out = machine.out(tokens, width)
    machine.run("rmsnorm", machine.put(x), machine.put(weight), 1e-5, out)
    assert_close(machine.get(out), expected)
    in_place = machine.put(x)
    machine.run("rmsnorm", in_place, machine.put(weight), 1e-5, in_place)
    assert_array_equal(machine.get(in_place), machine.get(out))


def test_rmsnorm_keeps_eps(machine: Machine) -> None:
    # mean of 9 and 16 is 12.5; with eps 3.5 the root is 4
    out = machine.out(1, 2)
    machine.run("rmsnorm", machine.put(np.float32([[3, 4]])), machine.put(np.float32([2, 10])), 3.5, out)
    assert_array_equal(machine.get(out), [[1.5, 10.0]])


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu(machine: Machine, tokens: int, width: int) -> None:
    gate_up = np.concatenate([4 * normal(2, tokens, width), mixed_rows(3, tokens, width)], axis=1)
    gate_up[0, :width:3] = [(-1e4, 1e4, -90.0, 90.0, 0.0, -0.0)[i % 6] for i in range(len(range(0, width, 3)))]
    out = machine.out(tokens, width)
    machine.run("swiglu", machine.put(gate_up), out)
    assert_close(machine.get(out), reference.swiglu(gate_up[:, :width], gate_up[:, width:]))


@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("width", WIDTHS)
def test_add(machine: Machine, tokens: int, width: int) -> None:
    x, y = mixed_rows(4, tokens, width), normal(5, tokens, width)
    for alias in (None, 0, 1):
        operands = [machine.put(x), machine.put(y)]
        out = machine.out(tokens, width) if alias is None else operands[alias]
        machine.run("add", *operands, out)
        assert_array_equal(machine.get(out), x + y)  # one rounding: exact


@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("width", [1, 2, 15, *WIDTHS, 151])
def test_softmax(machine: Machine, tokens: int, width: int) -> None:
    x = 5 * normal(6, tokens, width)
    x[:, 1::4] = -np.inf
    x[1::3] *= 1000  # a difference past 87 underflows to 0
    x[2::3] += 30000
    expected = reference.softmax(x)
    out = machine.out(tokens, width)
    machine.run("softmax", machine.put(x), out)
    assert_close(machine.get(out), expected)
    assert (machine.get(out)[:, 1::4] == 0).all()
    in_place = machine.put(x)
    machine.run("softmax", in_place, in_place)
    assert_array_equal(machine.get(in_place), machine.get(out))


def test_softmax_of_equal_values_at_both_ends_of_float32(machine: Machine) -> None:
    x = np.full((3, 33), 3.0e38, np.float32)
    x[1] = -3.0e38
    x[2, 1:] = -3.0e38  # the difference overflows to -inf, which is weight 0
    out = machine.out(3, 33)
    machine.run("softmax", machine.put(x), out)
    expected = np.full((3, 33), 1 / 33)
    expected[2] = [1.0] + [0.0] * 32
    assert_close(machine.get(out), expected)


# --- quantization ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("width", "group"), GROUPED)
def test_quantize(machine: Machine, tokens: int, width: int, group: int, planes: int) -> None:
    x = mixed_rows(width + tokens, tokens, width)
    x[::2, :group] = 0  # a group of zeros among others
    x[1::4, group // 2 : group] = np.float32(3e38)
    out = machine.rows(tokens, width, group, planes)
    machine.run("quantize", machine.put(x), out)
    assert_quantizes(machine, out, x)


def test_quantize_rounds_ties_to_even(machine: Machine) -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :8] = [127, 0.5, 1.5, -2.5, -3.5, 126.5, 127, -127]  # the scale is 1
    out = machine.rows(1, 32, 32)
    machine.run("quantize", machine.put(x), out)
    codes, scales, sums = machine.get_rows(out)
    assert codes[0, :8].tolist() == [127, 0, 2, -2, -4, 126, 127, -127]
    assert (scales[0, 0], sums[0, 0]) == (1.0, 127 + 2 - 2 - 4 + 126)


def test_quantize_keeps_outliers_beside_one_plane(machine: Machine) -> None:
    """Three values far above the rest: these keep their precision, and the large ones lose none of theirs."""
    x = normal(11, 1, 2048)
    x[0, [7, 500, 501]] = [300, -400, 100]
    out = machine.rows(1, 2048, 64)
    machine.run("quantize", machine.put(x), out)
    blocks, *columns = machine.get(out.outliers)[0, :3]
    assert (blocks, columns) == (2, [4, 500])
    codes, scales, _ = machine.get_rows(out)
    error = np.abs(reference.dequantize(codes, scales) - x)
    assert error.max() <= 4 * np.sqrt((x.astype(np.float64) ** 2).mean()) / 127 / 2 * 1.01
    assert np.delete(error.reshape(-1, 64), [0, 500 // 64], axis=0).max() < 4.5 / 127 / 2  # groups without: their own


def test_quantize_splits_two_planes(machine: Machine) -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :8] = [32512, -32512, 128, 127, -128, -129, 32383, -32384]  # the scale is 1
    out = machine.rows(1, 32, 32, planes=2)
    machine.run("quantize", machine.put(x), out)
    planes = machine.get(out.codes)[0].reshape(2, -1)
    assert planes[0, :8].tolist() == [127, -127, 1, 0, 0, -1, 126, -126]
    assert planes[1, :8].tolist() == [0, 0, -127, 127, -127, 127, 127, -127]  # twice for -128, which no byte holds
    assert machine.get(out.sums)[0, 0] == x.sum() + 3


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize(("width", "group"), GROUPED)
def test_fused_forms_are_the_composition(machine: Machine, tokens: int, width: int, group: int, planes: int) -> None:
    """out = QuantizedRows against the float32 form: 1e-6 is what the two may differ by."""
    x, weight = mixed_rows(7, tokens, width), 1 + 0.1 * normal(8, width)
    out = machine.rows(tokens, width, group, planes)
    machine.run("rmsnorm", machine.put(x), machine.put(weight), 1e-5, out)
    plain, composed = machine.out(tokens, width), machine.rows(tokens, width, group, planes)
    machine.run("rmsnorm", machine.put(x), machine.put(weight), 1e-5, plain)
    machine.run("quantize", plain, composed)
    assert_quantizes(machine, out, machine.get(plain), relative=1e-6)
    assert_same_codes(machine, out, composed)

    gate_up = np.concatenate([4 * normal(9, tokens, width), x], axis=1)
    out = machine.rows(tokens, width, group, planes)
    machine.run("swiglu", machine.put(gate_up), out)
    plain, composed = machine.out(tokens, width), machine.rows(tokens, width, group, planes)
    machine.run("swiglu", machine.put(gate_up), plain)
    machine.run("quantize", plain, composed)
    assert_quantizes(machine, out, machine.get(plain), relative=1e-6)
    assert_same_codes(machine, out, composed)


def assert_same_codes(machine: Machine, fused: QuantizedRows, composed: QuantizedRows) -> None:
    """Few codes differ, and by one: those that stand on a rounding edge, within top * 2e-7 of a half.

    (By two where the low byte of one of them, -128, became -127.)
    """
    a, b = (machine.get_rows(rows)[0] for rows in (fused, composed))
    assert np.abs(a - b).max() <= 2
    assert (a != b).mean() <= 0.02


@pytest.mark.parametrize("planes", [1, 2])
def test_swiglu_quantizes_rows_wider_than_one_task(machine: Machine, planes: int) -> None:
    gate_up = normal(10, 2, 2 * 2080)  # 2048 + 32: a split into parts of 1024 leaves a short one
    out = machine.rows(2, 2080, 32, planes)
    machine.run("swiglu", machine.put(gate_up), out)
    plain = machine.out(2, 2080)
    machine.run("swiglu", machine.put(gate_up), plain)
    assert_quantizes(machine, out, machine.get(plain), relative=1e-6)


def quantize_matrix(machine: Machine, stored: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """codes, scales and faults."""
    rows, width = stored.shape
    codes, scales = machine.out(rows, width, dtype=np.int8), machine.out(rows, width // group, dtype=np.float16)
    faults = machine.put(np.zeros(2, np.int32))
    machine.run("quantize_matrix", machine.put(stored), QuantizedMatrix(codes, scales, group), faults)
    return machine.get(codes), machine.get(scales), machine.get(faults).tolist()


def stored_as(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """What a file holds, and the float32 values that it means."""
    if dtype == "bfloat16":
        bits = float32_to_bfloat16(values)
        return bits, bfloat16_to_float32(bits)
    stored = values.astype(dtype)
    return stored, stored.astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("width", "group"), GROUPED)
@pytest.mark.parametrize("rows", [1, 31, 97])
def test_quantize_matrix(machine: Machine, rows: int, width: int, group: int, dtype: str) -> None:
    stored, values = stored_as(0.02 * normal(rows, rows, width), dtype)
    codes, scales, faults = quantize_matrix(machine, stored, group)
    grouped = values.astype(np.float64).reshape(rows, -1, group)
    exact = np.abs(grouped).max(axis=-1) / 127
    assert_array_equal(scales, exact.astype(np.float32).astype(np.float16))
    quotient = grouped / scales.astype(np.float64)[..., None]
    # a float16 scale may be 2^-11 too small, so a quotient may reach 127.06; the code's own rounding as in quantize
    assert_within(codes.reshape(grouped.shape), quotient, 0.5 + 127 * 2**-23)
    assert np.abs(codes.astype(np.int32)).max() == 127
    assert faults == [0, 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantize_matrix_at_the_ends_of_float16(machine: Machine, dtype: str) -> None:
    """Scales that are float16 subnormals, zero, and the largest; the error stays half a step of the next one."""
    magnitudes = np.float32([2.0**-e for e in range(0, 60)] + [1e-30, 1e-40, 0.0, 65000 * 127, 60000 * 127])
    stored, values = stored_as(normal(11, len(magnitudes), 64) / 8 * magnitudes[:, None], dtype)
    values = np.clip(values, -magnitudes[:, None], magnitudes[:, None]).astype(np.float32)
    values[:, 5] = magnitudes
    stored, values = stored_as(values, dtype)
    codes, scales, faults = quantize_matrix(machine, stored, 64)
    assert faults == [0, 0]
    assert np.abs(codes.astype(np.int32)).max() == 127
    assert (scales >= 0).all()
    step = np.maximum(np.abs(values).max(axis=-1) / 127 * (1 + 2**-10), 2.0**-24)  # 2^-24: float16's smallest
    step += 2.0**-24 * (step < 2.0**-14)  # a subnormal scale may be the next one up
    error = np.abs(codes * scales.astype(np.float64) - values)
    assert (error <= 0.5001 * step[:, None]).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_quantize_matrix_counts_groups_that_are_not_finite(machine: Machine, bad: float, dtype: str) -> None:
    values = normal(12, 40, 96)
    for lane in range(32):  # in every lane of both vectors of a group
        values[lane, 32 * (lane % 3) + lane] = bad
    values[0, 0:32] = bad  # many in one group count as one
    stored, values = stored_as(values, dtype)
    codes, scales, faults = quantize_matrix(machine, stored, 32)
    assert faults == [32, 0]
    expected_codes, expected_scales, _ = quantize_matrix(machine, np.where(np.isfinite(values), values, 0), 32)
    good = np.isfinite(values.reshape(40, 3, 32)).all(axis=-1)
    assert_array_equal(scales[good], expected_scales[good])
    assert_array_equal(codes.reshape(40, 3, 32)[good], expected_codes.reshape(40, 3, 32)[good])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantize_matrix_counts_what_no_scale_reaches(machine: Machine, dtype: str) -> None:
    values = normal(13, 20, 128)
    values[3, 64] = 65504 * 127 * 1.1
    values[7, 5] = -3e38
    values[7, 100] = 3e38
    values[9, 7] = np.inf
    assert quantize_matrix(machine, stored_as(values, dtype)[0], 64)[2] == [1, 3]
    assert quantize_matrix(machine, np.full((1, 32), 65504 * 127, np.float32), 32)[2] == [0, 0]  # the last that fits


# --- choosing ----------------------------------------------------------------------------------------------------


def odd_logits(tokens: int, width: int) -> np.ndarray:
    """Few distinct values, so that ties are common, with infinities and NaN among them."""
    rng = np.random.default_rng(width)
    x = rng.integers(-5, 5, (tokens, width)).astype(np.float32)
    x[1::4] = normal(14, *x[1::4].shape)
    x[:, rng.integers(0, width, width // 5)] = -np.inf
    x[2::4, rng.integers(0, width, width // 3)] = np.nan
    x[3::8] = np.nan
    x[7::8, width // 2 :] = np.inf
    x[0] = -np.inf
    return x


@pytest.mark.parametrize("width", [1, 2, 16, 31, 33, 97, 151, 2048])
def test_argmax_and_top_k(machine: Machine, width: int) -> None:
    x = odd_logits(33, width)
    smallest = np.where(np.isnan(x), -np.inf, x)
    index = machine.out(33, dtype=np.int32)
    machine.run("argmax", machine.put(x), index)
    assert_array_equal(machine.get(index), reference.argmax(smallest))
    for k in sorted({1, min(2, width), min(40, width), width}):
        values, indices = machine.out(33, k), machine.out(33, k, dtype=np.int32)
        machine.run("top_k", machine.put(x), values, indices)
        expected_values, expected_indices = reference.top_k(smallest, k)
        assert_array_equal(machine.get(indices), expected_indices)
        assert_array_equal(machine.get(values), expected_values)


def test_greedy(machine: Machine) -> None:
    logits = odd_logits(5, 151)
    expected = reference.argmax(np.where(np.isnan(logits), -np.inf, logits))
    positions = np.array([0, 6, 7, 8, 100], np.int32)
    tokens, history = machine.out(5, dtype=np.int32), machine.put(np.full((8, 5), -1, np.int32))
    there = machine.put(positions)
    machine.run("greedy", machine.put(logits), tokens, there, history)
    assert_array_equal(machine.get(tokens), expected)
    assert_array_equal(machine.get(there), positions + 1)
    slots = np.full((8, 5), -1)
    slots[(positions + 1) % 8, np.arange(5)] = expected
    assert_array_equal(machine.get(history), slots)


def test_poison_is_nan() -> None:
    assert np.isnan(poison((3,), np.float32)).all()
    assert (poison((2, 2), np.int32) == -1).all()
