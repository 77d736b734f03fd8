"""The operators of mixtures of experts: routing with ties, grouping, the experts' matrices, and the sum."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from machine import Machine, assert_close, assert_within, normal
from numpy.testing import assert_array_equal
from test_linear import host_matrix, host_rows
from test_operators import stored_as

from numbainfer.quantization import Matrix


@pytest.mark.parametrize("renormalise", [0, 1])
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (4, 2), (8, 8), (60, 4), (128, 8)])
@pytest.mark.parametrize("tokens", [1, 9])
def test_route(machine: Machine, tokens: int, experts: int, k: int, renormalise: int) -> None:
    logits = 3 * normal(experts, tokens, experts)
    if experts > 4:  # equals, among them at the border between chosen and not
        logits[0] = np.repeat(logits[0, : experts // 4], 4)
        logits[-1, 3::2] = logits[-1].max()
    chosen, weights = machine.out(tokens, k, dtype=np.int32), machine.out(tokens, k)
    machine.run("route", machine.put(logits), renormalise, chosen, weights)
    expected, expected_weights = reference.route(logits, k, bool(renormalise))
    assert_array_equal(machine.get(chosen), expected)
    assert_within(machine.get(weights), expected_weights, 1e-6 * expected_weights)


def test_route_where_all_are_equal(machine: Machine) -> None:
    chosen, weights = machine.out(2, 3, dtype=np.int32), machine.out(2, 3)
    machine.run("route", machine.put(np.zeros((2, 16), np.float32)), 0, chosen, weights)
    assert_array_equal(machine.get(chosen), [[0, 1, 2]] * 2)
    assert_array_equal(machine.get(weights), np.full((2, 3), 1 / 16, np.float32))


def choices(tokens: int, experts: int, k: int, seed: int = 0) -> np.ndarray:
    """k different experts for each token, some of them favoured and some never chosen. int32 [T, k]."""
    rng = np.random.default_rng(seed)
    wanted = np.exp(2 * rng.standard_normal(experts))
    wanted[experts // 2] = wanted[experts // 2] if k > experts // 2 else 0
    rows = [rng.choice(experts, k, replace=False, p=wanted / wanted.sum()) for _ in range(tokens)]
    return np.array(rows, np.int32)


def group(machine: Machine, chosen: np.ndarray, experts: int) -> tuple:
    """starts, tokens, places on the device."""
    out = [machine.out(n, dtype=np.int32) for n in (experts + 1, chosen.size)]
    places = machine.out(*chosen.shape, dtype=np.int32)
    machine.run("group_by_expert", machine.put(chosen), *out, places)
    return (*out, places)


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (4, 2), (60, 4), (128, 8)])
@pytest.mark.parametrize("tokens", [1, 2, 70])
def test_group_by_expert(machine: Machine, tokens: int, experts: int, k: int) -> None:
    chosen = choices(tokens, experts, k)
    starts, by_place, places = map(machine.get, group(machine, chosen, experts))
    order = np.argsort(chosen.ravel(), kind="stable")
    assert_array_equal(starts, np.concatenate([[0], np.cumsum(np.bincount(chosen.ravel(), minlength=experts))]))
    assert_array_equal(by_place, order // k)
    assert_array_equal(places.ravel()[order], np.arange(tokens * k))


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16", (32, 1), (32, 2), (64, 2), (128, 1)])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 8, 2), (1, 3, 3), (3, 16, 2), (70, 6, 2), (33, 16, 4)])
@pytest.mark.parametrize(("width", "outs"), [(128, 31), (384, 97)])
def test_linear_experts(
    machine: Machine, width: int, outs: int, tokens: int, experts: int, k: int, storage: str | tuple[int, int]
) -> None:
    """With x by token and by place; few places and many, experts with none, one tile and several."""
    chosen = choices(tokens, experts, k, seed=1)
    starts, by_place, _ = group(machine, chosen, experts)
    values = 0.05 * normal(30, experts * outs, width)
    for gathered in (True, False):
        x = normal(31, tokens if gathered else tokens * k, width)
        if isinstance(storage, str):
            stored, w = stored_as(values, storage)
            weight, source, host_x = Matrix(machine.put(stored)), machine.put(x), x.astype(np.float64)
        else:
            weight, source = machine.matrix(values, storage[0]), machine.quantized_rows(x, *storage)
            w, host_x = host_matrix(machine, weight), host_rows(machine, source)
        out = machine.out(tokens * k, outs)
        machine.run("linear_experts", source, weight, starts, by_place if gathered else None, out)
        x_rows = host_x[machine.get(by_place)] if gathered else host_x
        matrices = w.reshape(experts, outs, width)[np.sort(chosen.ravel())]
        expected = np.einsum("pd,pnd->pn", x_rows, matrices)
        assert_within(machine.get(out), expected, 1e-6 * np.einsum("pd,pnd->pn", abs(x_rows), abs(matrices)))


def test_experts_that_are_not_chosen_are_not_read(machine: Machine) -> None:
    """Their matrices may hold anything."""
    weight = np.full((4, 8, 32), np.nan, np.float32)
    weight[2] = 1
    for tokens in (1, 5):
        starts, by_place, _ = group(machine, np.full((tokens, 1), 2, np.int32), 4)
        out = machine.out(tokens, 8)
        x = machine.put(np.ones((tokens, 32), np.float32))
        machine.run("linear_experts", x, Matrix(machine.put(weight.reshape(32, 32))), starts, by_place, out)
        assert_array_equal(machine.get(out), np.full((tokens, 8), 32))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(("tokens", "k", "width"), [(1, 8, 600), (5, 2, 48), (33, 4, 100)])
def test_combine(machine: Machine, tokens: int, k: int, width: int, in_place: bool, shared: bool) -> None:
    values, residual = normal(32, tokens * k, width), normal(33, tokens, width)
    places = np.random.default_rng(34).permutation(tokens * k).astype(np.int32).reshape(tokens, k)
    weights, also, gate = abs(normal(35, tokens, k)), normal(36, tokens, width), 4 * normal(37, tokens, 1)
    out = machine.put(residual) if in_place else machine.out(tokens, width)
    more = (machine.put(also), machine.put(gate)) if shared else (None, None)
    machine.run(
        *("combine", machine.put(values), machine.put(places), machine.put(weights), *more),
        *(out if in_place else machine.put(residual), out),
    )
    expected = residual.astype(np.float64) + np.einsum("tk,tkd->td", weights, values[places].astype(np.float64))
    if shared:
        expected += reference.sigmoid(gate) * also
    assert_close(machine.get(out), expected)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("storage", ["float32", 32])
def test_the_operators_together_are_a_mixture(machine: Machine, storage: str | int, tokens: int) -> None:
    experts, k, width, inner = 8, 3, 64, 96
    x, logits = normal(40, tokens, width), normal(41, tokens, experts)
    gate_up, down = 0.1 * normal(42, experts * 2 * inner, width), 0.1 * normal(43, experts * width, inner)
    chosen, weights = machine.out(tokens, k, dtype=np.int32), machine.out(tokens, k)
    machine.run("route", machine.put(logits), 1, chosen, weights)
    starts, by_place, places = group(machine, machine.get(chosen), experts)
    first, second = machine.out(tokens * k, 2 * inner), machine.out(tokens * k, width)
    if isinstance(storage, int):
        matrices = [machine.matrix(m, storage) for m in (gate_up, down)]
        hidden, source = machine.rows(tokens * k, inner, storage, 2), machine.quantized_rows(x, storage, 2)
        gate_up, down = (host_matrix(machine, m) for m in matrices)
        x = host_rows(machine, source)
    else:
        matrices = [Matrix(machine.put(m)) for m in (gate_up, down)]
        hidden, source = machine.out(tokens * k, inner), machine.put(x)
    machine.run("linear_experts", source, matrices[0], starts, by_place, first)
    machine.run("swiglu", first, hidden)
    machine.run("linear_experts", hidden, matrices[1], starts, None, second)
    out, residual = machine.out(tokens, width), machine.put(np.zeros((tokens, width), np.float32))
    machine.run("combine", second, places, weights, None, None, residual, out)
    expected = reference.mixture(
        x,
        *reference.route(logits, k, True),
        *(gate_up.reshape(experts, 2 * inner, width), down.reshape(experts, width, inner)),
    )
    # the hidden values are rounded to two planes of int8 on the way
    assert_close(machine.get(out), expected, relative=2e-4 if isinstance(storage, int) else 2e-6)


def test_operands_that_do_not_fit_are_refused(machine: Machine) -> None:
    starts, by_place, places = group(machine, np.array([[0, 1]], np.int32), 2)
    x, out = machine.put(normal(1, 1, 32)), machine.out(2, 8)
    weight = Matrix(machine.put(normal(2, 16, 32)))
    machine.run("linear_experts", x, weight, starts, by_place, out)
    for arguments in [
        (x, weight, starts, None, out),
        (x, Matrix(machine.put(normal(2, 15, 32))), starts, by_place, out),
        (machine.put(normal(1, 1, 31)), weight, starts, by_place, out),
        (machine.quantized_rows(normal(1, 1, 32), 32), weight, starts, by_place, out),
        (x, machine.matrix(normal(2, 16, 32), 32), starts, by_place, out),
    ]:
        with pytest.raises(ValueError, match="linear_experts"):
            machine.run("linear_experts", *arguments)
    with pytest.raises(ValueError, match="combine"):
        machine.run("combine", out, places, machine.out(1, 2), None, x, machine.out(1, 8), machine.out(1, 8))
    with pytest.raises(ValueError, match="route"):
        machine.run("route", machine.out(1, 2), 0, machine.out(1, 3, dtype=np.int32), machine.out(1, 3))
