"""Sampling against plain definitions: what each parameter keeps, how often each token is drawn, what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from numbainfer.errors import NumbaInferError
from numbainfer.sampling import Sampler, SamplingParams

Logits = NDArray[np.float32]


def random_logits(seed: int, size: int = 500) -> Logits:
    return (3 * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def definition(logits: Logits, p: SamplingParams, seen: set[int] = frozenset()) -> NDArray[np.float64]:  # type: ignore[assignment]
    """The probability of each token, every filter as its paper has it, one after another over the whole vocabulary."""
    x = logits.astype(np.float64)
    for token in seen:
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    weights = np.exp((x - x.max()) / p.temperature)
    order = sorted(range(x.size), key=lambda i: (-x[i], i))  # the most likely first, of equals the lower id
    if p.top_k > 0:
        weights[order[p.top_k :]] = 0
    weights /= weights.sum()
    reached = 0.0
    for token in order:  # the smallest set of the most likely that reaches top_p
        weight = weights[token]
        if p.top_p < 1 and reached >= p.top_p:
            weights[token] = 0
        reached += weight
    weights[weights < p.min_p * weights.max()] = 0
    return weights / weights.sum()


class Fixed:
    """Stands for the random generator: each draw is the next of evenly spaced numbers from 0 to 1."""

    def __init__(self, draws: int) -> None:
        self._numbers = iter((np.arange(draws) + 0.5) / draws)

    def random(self) -> float:
        return float(next(self._numbers))


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 499},
    {"top_k": 500},
    {"top_k": 10_000},
    {"top_p": 0.9},
    {"top_p": 0.1},
    {"top_p": 1e-9},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_p": 0.9, "min_p": 0.02},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 40, "min_p": 0.05},
    {"top_k": 100, "top_p": 0.95, "min_p": 0.01, "temperature": 1.7},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_each_filter_keeps_what_its_definition_keeps(filters: dict[str, Any], penalty: float) -> None:
    """Evenly spaced draws hit each token in proportion, so counts are probabilities to within one draw."""
    draws = 400
    params = SamplingParams(**{"temperature": 1.0, **filters}, repetition_penalty=penalty)
    for seed in range(3):
        logits = random_logits(seed)
        expected = definition(logits, params, {3, 5, 400, int(logits.argmax())})
        sampler = Sampler(params, [3, 5, 5, 400, int(logits.argmax())])
        sampler._random = Fixed(draws)  # type: ignore[assignment]
        counts = np.zeros(logits.size)
        for _ in range(draws):
            counts[sampler._choose(logits.copy())] += 1
        assert np.abs(counts / draws - expected).max() <= 1.01 / draws
        assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(expected))


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_k": 4, "top_p": 0.7}, {"top_p": 0.004}], ids=str)
def test_of_equal_logits_the_lower_ids_stay(filters: dict[str, Any]) -> None:
    params = SamplingParams(temperature=1.0, seed=1, **filters)
    logits = np.full(1000, 1.0, np.float32)
    logits[500:] = 2
    expected = set(np.flatnonzero(definition(logits, params)))
    sampler = Sampler(params, [])
    drawn = {sampler(logits.copy()) for _ in range(200)}
    assert drawn == expected


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 20,000 draws. With k degrees of freedom it is k +- sqrt(2 k); the bound is five of these."""
    params = SamplingParams(temperature=0.9, top_k=30, top_p=0.97, seed=12345)
    logits = random_logits(9, 100) / 2
    expected = definition(logits, params) * 20_000
    sampler = Sampler(params, [])
    counts = np.bincount([sampler(logits.copy()) for _ in range(20_000)], minlength=100)
    kept = expected > 0
    assert not counts[~kept].any()
    chi_square = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert 10 < freedom < 29  # both filters cut something off
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def draw(seed: int | None, count: int = 50) -> list[int]:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), [])
    return [sampler(random_logits(i)) for i in range(count)]


def test_seeds() -> None:
    assert draw(7) == draw(7)
    assert draw(0) == draw(0)
    texts = [draw(seed) for seed in (0, 1, 7, 2**32, 2**64 - 1)]
    assert len({tuple(text) for text in texts}) == len(texts)
    # Without a seed each sampler draws one of its own, and says which.
    samplers = [Sampler(SamplingParams(temperature=1.0), []) for _ in range(2)]
    assert samplers[0].seed != samplers[1].seed
    assert draw(samplers[0].seed) == [samplers[0](random_logits(i)) for i in range(50)]


def test_greedy() -> None:
    logits = np.float32([1, 3, -np.inf, 3, 2])
    greedy = Sampler(SamplingParams(), [])
    assert greedy(logits.copy()) == 1  # of equals the first
    # the other parameters keep the most likely token, so they change nothing
    filtered = SamplingParams(temperature=0, top_k=2, top_p=0.5, min_p=0.5, seed=3)
    for seed in range(20):
        assert Sampler(filtered, [])(random_logits(seed)) == random_logits(seed).argmax()


def test_repetition_penalty_counts_what_was_chosen() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), [0])
    logits = np.float32([4.0, 3.5, 3.0, -1.0])
    # 4 is halved from the start, 3.5 and 3 once they were chosen; then all are 2 at most, and 2 is the first.
    assert [sampler(logits.copy()) for _ in range(4)] == [1, 2, 0, 0]
    # a negative logit becomes less likely too, and prompt ids past the logits are passed over
    negative = Sampler(SamplingParams(repetition_penalty=2.0), [0, 99])
    assert negative(np.float32([-1.0, -1.5])) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_logits_that_are_not_numbers(bad: float, temperature: float, penalty: float) -> None:
    params = SamplingParams(temperature=temperature, repetition_penalty=penalty, top_k=5)
    for logits in (random_logits(0), np.full(500, -np.inf, np.float32)):
        logits[7] = bad
        with pytest.raises(NumbaInferError, match="NaN or infinite logits"):
            Sampler(params, [7])(logits)
    with pytest.raises(NumbaInferError, match="NaN or infinite logits"):
        Sampler(params, [])(np.full(10, -np.inf, np.float32))


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e-3])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 9}], ids=str)
def test_a_temperature_near_zero_is_nearly_greedy(temperature: float, filters: dict[str, Any]) -> None:
    logits = random_logits(4)
    logits[3] = -np.inf
    sampler = Sampler(SamplingParams(temperature=temperature, seed=0, **filters), [])
    assert {sampler(logits.copy()) for _ in range(20)} == {int(logits.argmax())}


def test_tokens_that_cannot_come_are_never_drawn() -> None:
    logits = np.full(100, -np.inf, np.float32)
    logits[[4, 50]] = 1
    sampler = Sampler(SamplingParams(temperature=5.0, top_k=80, seed=0), [])
    assert {sampler(logits.copy()) for _ in range(100)} == {4, 50}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf]),
        ("top_k", [-1]),
        ("top_p", [0, -0.5, 1.01, math.nan]),
        ("min_p", [-0.01, 1.5, math.nan]),
        ("repetition_penalty", [0, -1.0, math.inf, math.nan]),
        ("max_tokens", [-1]),
        ("seed", [-1, 2**64]),
        ("stop", [("",), ("a", ""), "abc"]),  # a lone text would be taken for its letters
    ],
)
def test_bad_parameters(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(NumbaInferError, match=f"^{name} must be "):
            SamplingParams(**{name: value})
