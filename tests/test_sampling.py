"""Sampling against plain definitions: what each parameter keeps, how often each token is drawn, what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from numbainfer.errors import NumbaInferError
from numbainfer.generation import token_logprob
from numbainfer.sampling import Sampler, SamplingParams, draw, largest, nucleus

Logits = NDArray[np.float32]


def random_logits(seed: int, size: int = 500) -> Logits:
    return (3 * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def definition(
    logits: Logits, p: SamplingParams, prompt: Sequence[int] = (), reply: Sequence[int] = ()
) -> NDArray[np.float64]:
    """The probability of each token, every step as its paper has it, one after another over the whole vocabulary."""
    x = logits.astype(np.float64)
    for token, bias in p.logit_bias.items():
        x[token] += bias
    for token in {*prompt, *reply}:
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token in set(reply):
        x[token] -= p.frequency_penalty * reply.count(token) + p.presence_penalty
    weights = np.exp((x - x.max()) / p.temperature)
    order = sorted(range(x.size), key=lambda i: (-x[i], i))  # the most likely first, of equals the lower id
    if p.mirostat_tau > 0:  # at the start: mu = 2 tau
        shares = weights / weights.sum()
        weights[[i for i in order[1:] if -math.log2(max(shares[i], 1e-300)) > 2 * p.mirostat_tau]] = 0
        return weights / weights.sum()
    if p.top_k > 0:
        weights[order[p.top_k :]] = 0
    weights /= weights.sum()
    if p.top_p < 1:  # the smallest set of the most likely that reaches top_p
        weights[keep_until(order, weights, p.top_p)] = 0
    weights[weights < p.min_p * weights.max()] = 0
    if p.typical_p < 1:  # the same, of those whose surprise is nearest to the entropy
        weights /= weights.sum()
        possible = np.flatnonzero(weights)
        surprise = -np.log(weights[possible])
        distance = np.abs(surprise - (weights[possible] * surprise).sum())
        weights[keep_until(possible[np.argsort(distance, kind="stable")].tolist(), weights, p.typical_p)] = 0
    return weights / weights.sum()


def keep_until(order: list[int], weights: NDArray[np.float64], share: float) -> list[int]:
    """What comes after the first of `order` that together have that share of the weights."""
    reached, dropped = 0.0, []
    for token in order:
        if reached >= share * weights.sum():
            dropped.append(token)
        reached += weights[token]
    return dropped


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
    {"typical_p": 0.5},
    {"typical_p": 0.95, "temperature": 1.3},
    {"typical_p": 1e-9},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.8},
    {"mirostat_tau": 1.0},
    {"mirostat_tau": 3.0, "top_k": 3},  # which it replaces
    {"mirostat_tau": 0.001},
    {"logit_bias": {7: 9.0, 8: -math.inf, 499: 2.5}, "top_k": 20},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_each_filter_keeps_what_its_definition_keeps(filters: dict[str, Any], penalty: float) -> None:
    """Evenly spaced draws hit each token in proportion, so counts are probabilities to within one draw."""
    draws = 400
    params = SamplingParams(**{"temperature": 1.0, **filters}, repetition_penalty=penalty)
    for seed in range(3):
        logits = random_logits(seed)
        prompt = [3, 5, 5, 400, int(logits.argmax())]
        counts = frequencies(params, logits, draws, prompt)
        expected = definition(logits, params, prompt)
        assert np.abs(counts - expected).max() <= 1.01 / draws
        assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(expected))


def frequencies(
    params: SamplingParams, logits: Logits, draws: int, prompt: Sequence[int] = (), reply: Sequence[int] = ()
) -> NDArray[np.float64]:
    """How often a sampler draws each token, all draws from the same state: after a prompt and a reply."""
    sampler = Sampler(params, prompt)
    for token in reply:
        assert sampler(np.where(np.arange(logits.size) == token, 1e6, 0).astype(np.float32)) == token
    sampler._random = Fixed(draws)  # type: ignore[assignment]
    mu = sampler._mu
    counts = np.zeros(logits.size)
    for _ in range(draws):
        sampler._mu = mu
        counts[sampler._choose(logits.copy())] += 1
    return counts / draws


@pytest.mark.parametrize(
    "penalties",
    [
        {"frequency_penalty": 0.7},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -0.4, "presence_penalty": -0.2},
        {"frequency_penalty": 0.3, "presence_penalty": 0.5, "repetition_penalty": 1.2, "logit_bias": {5: 1.0}},
    ],
    ids=str,
)
def test_penalties_for_what_the_reply_has_said(penalties: dict[str, Any]) -> None:
    params = SamplingParams(temperature=1.0, top_k=60, **penalties)
    for seed in range(3):
        logits = random_logits(seed)
        likely = np.argsort(-logits)[:4].tolist()
        prompt, reply = [9, likely[3]], [likely[0], likely[0], likely[1], likely[0], 5]
        expected = definition(logits, params, prompt, reply)
        assert np.abs(frequencies(params, logits, 400, prompt, reply) - expected).max() <= 1.01 / 400


def test_mirostat_holds_the_surprise() -> None:
    """Over a flat and a steep distribution in turn, the mean surprise in bits is what was asked for."""
    for tau in (2.0, 4.0):
        sampler = Sampler(SamplingParams(temperature=1.0, mirostat_tau=tau, seed=1), [])
        surprises, mus = [], [sampler._mu]
        for step in range(2000):
            logits = random_logits(step % 7, 2000) * (1.0 if step % 2 else 0.5)
            p = np.exp(logits - logits.max(), dtype=np.float64)
            p /= p.sum()
            kept = p >= min(2.0 ** -mus[-1], p.max())
            token = sampler(logits)
            surprises.append(-math.log2(p[token] / p[kept].sum()))
            mus.append(sampler._mu)
            assert mus[-1] == pytest.approx(mus[-2] - 0.1 * (surprises[-1] - tau), abs=1e-4)
        assert np.mean(surprises) == pytest.approx(tau, abs=0.1)


def test_the_largest() -> None:
    """Against sorting all; with ties, with values that cannot come, in vocabularies of every size."""
    rng = np.random.default_rng(0)
    for size in (1, 5, 63, 64, 65, 1000, 5000, 40_000):
        for values in (rng.standard_normal(size), rng.integers(0, 9, size), np.zeros(size)):
            values = values.astype(np.float32)  # noqa: PLW2901
            values[rng.random(size) < 0.1] = -np.inf
            order = [i for i in np.lexsort((np.arange(size), -values)).tolist() if values[i] > -np.inf]
            for k in (1, 2, 40, 64, 700, size, size + 5):
                assert largest(values, k).tolist() == order[:k]
    sparse = np.full(10_000, -np.inf, np.float32)
    sparse[[9000, 17]] = 1, 2
    assert largest(sparse, 50).tolist() == [17, 9000]


def test_the_nucleus_grows_as_far_as_it_must() -> None:
    flat = np.ones(20_000, np.float32)
    for share in (0.001, 0.02, 0.5, 0.999):
        assert nucleus(flat, flat, share).tolist() == list(range(math.ceil(share * 20_000)))


@pytest.mark.parametrize("size", [1, 511, 512, 513, 20_000])
def test_draw_is_the_inverse_of_the_cumulative_distribution(size: int) -> None:
    rng = np.random.default_rng(size)
    weights = (rng.random(size) * (rng.random(size) < 0.3)).astype(np.float32)
    weights[rng.integers(size)] = 1
    reached = np.cumsum(weights, dtype=np.float64) / weights.sum(dtype=np.float64)
    numbers = np.concatenate([rng.random(500), reached[:300], [0, 1 - 2**-53]])
    for number in numbers[numbers < 1]:
        index = draw(weights, number)
        assert weights[index] > 0
        before = reached[index - 1] if index else 0
        assert before - 1e-9 <= number <= reached[index] + 1e-9


def test_log_probabilities() -> None:
    for seed in range(5):
        logits = random_logits(seed)
        p = np.exp(logits - logits.max(), dtype=np.float64)
        p /= p.sum()
        order = np.argsort(-p, kind="stable")
        for count in (0, 1, 5):
            told = token_logprob(logits, 77, count)
            assert told.token == 77
            assert told.logprob == pytest.approx(math.log(p[77]), abs=1e-5)
            assert [token for token, _ in told.top] == order[:count].tolist()
            assert [value for _, value in told.top] == pytest.approx(np.log(p[order[:count]]).tolist(), abs=1e-5)


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


def drawn_with(seed: int | None, count: int = 50) -> list[int]:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), [])
    return [sampler(random_logits(i)) for i in range(count)]


def test_seeds() -> None:
    assert drawn_with(7) == drawn_with(7)
    assert drawn_with(0) == drawn_with(0)
    texts = [drawn_with(seed) for seed in (0, 1, 7, 2**32, 2**64 - 1)]
    assert len({tuple(text) for text in texts}) == len(texts)
    # Without a seed each sampler draws one of its own, and says which.
    samplers = [Sampler(SamplingParams(temperature=1.0), []) for _ in range(2)]
    assert samplers[0].seed != samplers[1].seed
    assert drawn_with(samplers[0].seed) == [samplers[0](random_logits(i)) for i in range(50)]


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
    banned = SamplingParams(logit_bias=dict.fromkeys(range(10), -np.inf))
    with pytest.raises(NumbaInferError, match="no token is left to choose"):
        Sampler(banned, [])(np.zeros(10, np.float32))


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
        ("frequency_penalty", [math.inf, math.nan]),
        ("presence_penalty", [-math.inf, math.nan]),
        ("typical_p", [0, -0.5, 1.01, math.nan]),
        ("mirostat_tau", [-1.0, math.inf]),
        ("mirostat_eta", [0, math.nan]),
        ("logit_bias", [{-1: 0.0}, {1: math.nan}, {1: math.inf}, [1, 2]]),
        ("logprobs", [-1, 101]),
        ("max_tokens", [-1]),
        ("seed", [-1, 2**64]),
        ("stop", [("",), ("a", ""), "abc"]),  # a lone text would be taken for its letters
    ],
)
def test_bad_parameters(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(NumbaInferError, match=f"^{name} must be "):
            SamplingParams(**{name: value})
