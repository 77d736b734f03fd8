"""linear on every device: float and int8 weights, every tile edge, bias and residual in every combination."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from machine import Machine, assert_within, normal
from numpy.testing import assert_array_equal
from test_operators import GROUPED, TOKENS, WIDTHS, stored_as

from numbainfer.quantization import Matrix, QuantizedMatrix, QuantizedRows, dequantize

OUTS = [1, 31, 33, 97, 151]  # around one and several tiles of 32 rows


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 9, 33])
@pytest.mark.parametrize("width", WIDTHS)
def test_float_weights(machine: Machine, width: int, tokens: int, dtype: str) -> None:
    x = normal(tokens, tokens, width)
    for outs in OUTS:
        stored, w = stored_as(normal(outs, outs, width), dtype)
        out = machine.out(tokens, outs)
        machine.run("linear", machine.put(x), Matrix(machine.put(stored)), None, None, out)
        assert_within(
            machine.get(out),
            reference.linear(x, w),
            machine.sum_error(tokens, dtype) * reference.linear(abs(x), abs(w)),
        )


def host_rows(machine: Machine, rows: QuantizedRows) -> np.ndarray:
    """The float64 values that the codes stand for."""
    codes, scales, _ = machine.get_rows(rows)
    return reference.dequantize(codes, scales)  # codes of two planes are as good as those of one: integers


def host_matrix(machine: Machine, weight: QuantizedMatrix) -> np.ndarray:
    return dequantize(QuantizedMatrix(machine.get(weight.codes), machine.get(weight.scales), weight.group))


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("width", "group"), GROUPED)
def test_int8_weights(machine: Machine, tokens: int, width: int, group: int, planes: int) -> None:
    rows = machine.quantized_rows(normal(tokens, tokens, width), group, planes)
    x = host_rows(machine, rows)
    for outs in OUTS:
        weight = machine.matrix(0.02 * normal(outs, outs, width), group)
        w = host_matrix(machine, weight)
        out = machine.out(tokens, outs)
        machine.run("linear", rows, weight, None, None, out)
        bound = machine.sum_error(tokens) * reference.linear(abs(x), abs(w))
        assert_within(machine.get(out), reference.linear(x, w), bound)


@pytest.mark.parametrize(("planes", "unit"), [(1, 1), (2, 1), (2, 256)])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 2, 7, 9, 70])
def test_int8_sums_of_the_largest_codes_are_exact(
    machine: Machine, tokens: int, group: int, planes: int, unit: int
) -> None:
    """With scales that are powers of two every product and sum is an integer below 2^24 times such a power.

    Of two planes only one holds values here, the low one (unit 1) or the high one (unit 256).
    """
    rng = np.random.default_rng(group)
    width, outs = 384, 37
    x = rng.choice(np.array([-127, 127, 126, 0, 1], np.int32), (tokens, width))
    w = rng.choice(np.array([-127, 127, -126, 0, -1], np.int8), (outs, width))
    x[0], w[0], w[1] = 127, 127, -127
    rows = machine.rows_of(unit * x, np.full((tokens, width // group), 0.25 / unit, np.float32), group, planes)
    scales = machine.put(np.full((outs, width // group), 2.0**-24, np.float16))  # the smallest float16
    out = machine.out(tokens, outs)
    machine.run("linear", rows, QuantizedMatrix(machine.put(w), scales, group), None, None, out)
    exact = x.astype(np.int64) @ w.T.astype(np.int64)
    assert np.abs(exact).max() == 384 * 127 * 127 < 2**24
    assert_array_equal(machine.get(out), (exact * 2.0**-26).astype(np.float32))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 5, 9])
def test_int8_sums_of_two_full_planes_do_not_overflow(machine: Machine, tokens: int, group: int) -> None:
    """A group's sum reaches 128 * 127 * 32512, a quarter of int32."""
    rng = np.random.default_rng(group)
    width, outs = 2 * group, 37
    x = rng.choice(np.array([-32512, 32512, 32511, 32385], np.int32), (tokens, width))
    w = rng.choice(np.array([-127, 127, 126], np.int8), (outs, width))
    x[0], w[0], w[1] = 32512, 127, -127
    rows = machine.rows_of(x, np.ones((tokens, 2), np.float32), group, planes=2)
    weight = QuantizedMatrix(machine.put(w), machine.put(np.ones((outs, 2), np.float16)), group)
    out = machine.out(tokens, outs)
    machine.run("linear", rows, weight, None, None, out)
    wide = w.astype(np.float64)
    bound = machine.sum_error(tokens) * reference.linear(abs(x), abs(wide))
    assert_within(machine.get(out), reference.linear(x, wide), bound)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 5, 9])
def test_int8_with_one_large_weight_in_a_group(machine: Machine, tokens: int, group: int, planes: int) -> None:
    """Positive activations against codes near 0: the worst case for a dot product that counts weights as w + 128.

    The surplus of 128 * sum(x) then outweighs the sum that counts, and its float32 roundings stay behind: the bound
    is relative to sum(|x| (|w| + 128)).
    """
    width, outs = 8 * group, 33
    rng = np.random.default_rng(group)
    codes = rng.integers(-1, 2, (outs, width), np.int8)
    codes[:, ::group] = 127
    scales = rng.uniform(0.5, 2, (outs, width // group)).astype(np.float16)
    weight = QuantizedMatrix(machine.put(codes), machine.put(scales), group)
    rows = machine.quantized_rows(np.abs(normal(15, tokens, width)) + 1, group, planes)
    out = machine.out(tokens, outs)
    machine.run("linear", rows, weight, None, None, out)
    x, w = host_rows(machine, rows), host_matrix(machine, weight)
    surplus = 128 * np.repeat(scales.astype(np.float64), group, axis=1)
    bound = machine.sum_error(tokens) * reference.linear(abs(x), abs(w) + surplus)
    assert_within(machine.get(out), reference.linear(x, w), bound)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual", ["none", "apart", "in place"])
@pytest.mark.parametrize("tokens", [1, 3, 8, 9])
@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16", 32, 64, 128])
def test_bias_and_residual(machine: Machine, storage: str | int, tokens: int, residual: str, bias: bool) -> None:
    width, outs = 384, 45
    values, x = normal(16, outs, width), normal(17, tokens, width)
    b = normal(18, outs) if bias else None
    r = normal(19, tokens, outs) if residual != "none" else None
    out = machine.put(r) if residual == "in place" else machine.out(tokens, outs)
    apart = machine.put(r) if residual == "apart" else None
    weight: Matrix | QuantizedMatrix
    if isinstance(storage, int):
        rows = machine.quantized_rows(x, storage, planes=1 + tokens % 2)
        weight = machine.matrix(values, storage)
        source, host_x, w = rows, host_rows(machine, rows), host_matrix(machine, weight)
    else:
        stored, w = stored_as(values, storage)
        weight, source, host_x = Matrix(machine.put(stored)), machine.put(x), x
    machine.run(
        "linear",
        *(source, weight, None if b is None else machine.put(b), out if residual == "in place" else apart, out),
    )
    magnitude = reference.linear(abs(host_x), abs(w)) + 10  # no bias and no residual is above 5
    assert_within(machine.get(out), reference.linear(host_x, w, b, r), machine.sum_error(tokens) * magnitude)
    if apart is not None:
        assert_array_equal(machine.get(apart), r)


@pytest.mark.parametrize("planes", [1, 2])
def test_rows_for_fewer_tokens_than_the_memory_holds(machine: Machine, planes: int) -> None:
    """QuantizedRows.first: what the rows behind hold does not matter."""
    rows, weight = machine.quantized_rows(normal(20, 9, 96), 32, planes), machine.matrix(normal(21, 33, 96), 32)
    every, some = machine.out(9, 33), machine.out(5, 33)
    machine.run("linear", rows, weight, None, None, every)
    machine.run("linear", rows.first(5), weight, None, None, some)
    bound = (
        machine.sum_error(9) * reference.linear(abs(host_rows(machine, rows)), abs(host_matrix(machine, weight)))[:5]
    )
    assert_within(machine.get(some), machine.get(every)[:5], bound)


def test_operands_that_do_not_fit_are_refused(machine: Machine) -> None:
    x, out = machine.put(normal(22, 2, 128)), machine.out(2, 33)
    rows = machine.quantized_rows(normal(22, 2, 128), 64)
    weight, int8 = Matrix(machine.put(normal(23, 33, 128))), machine.matrix(normal(23, 33, 128), 64)
    machine.run("linear", x, weight, None, None, out)
    machine.run("linear", rows, int8, None, None, out)
    for a, w, o in [
        (rows, weight, out),
        (x, int8, out),
        (rows, machine.matrix(normal(23, 33, 128), 32), out),  # another group
        (rows, machine.matrix(normal(23, 33, 192), 64), out),
        (x, Matrix(machine.put(normal(23, 33, 127))), out),
        (x, weight, machine.out(3, 33)),
        (rows, int8, machine.out(2, 32)),
        (rows.first(1), int8, out),
    ]:
        with pytest.raises(ValueError, match=r"linear|QuantizedRows"):
            machine.run("linear", a, w, None, None, o)
