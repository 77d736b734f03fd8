"""From logits to the next token: greedy, temperature, top-k, top-p, min-p, repetition penalty, seed.

The steps stand in the order of HF transformers: penalty, temperature, top-k, top-p, min-p, draw.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from numbainfer.errors import NumbaInferError


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    temperature: 0 chooses the most likely token (greedy). top_k: only the k most likely (0: all). top_p: the most
    likely that together reach this probability (1: all; Holtzman et al. 2019). min_p: those at least this fraction
    as likely as the most likely one (0: all; Nguyen et al. 2024). repetition_penalty: divides positive logits of
    tokens that were there, multiplies negative ones (1: off; Keskar et al. 2019). seed: same seed, same text; None
    draws a seed. max_tokens: new tokens at most. stop: texts that end the reply, not shown.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = 512
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        def require(name: str, holds: bool, what: str) -> None:
            value = getattr(self, name)
            if not (holds and (not isinstance(value, float) or math.isfinite(value))):
                raise NumbaInferError(f"{name} must be {what}, not {value!r}")

        require("temperature", self.temperature >= 0, "0 or more")
        require("top_k", self.top_k >= 0, "0 or more")
        require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        require("min_p", 0 <= self.min_p <= 1, "from 0 to 1")
        require("repetition_penalty", self.repetition_penalty > 0, "above 0")
        require("max_tokens", self.max_tokens >= 0, "0 or more")
        require("seed", self.seed is None or 0 <= self.seed < 2**64, "from 0 to 2^64 - 1")
        require("stop", not isinstance(self.stop, str) and all(self.stop), "texts that are not empty")


class Sampler:
    """Draws tokens for one sequence."""

    def __init__(self, params: SamplingParams, prompt: Iterable[int]) -> None:
        self.params = params
        self.seed = params.seed if params.seed is not None else secrets.randbits(32)
        self._random = np.random.Generator(np.random.PCG64(self.seed))
        self._seen = set(prompt)

    def __call__(self, logits: np.ndarray) -> int:
        """The next token, from float32 logits [vocabulary]; `logits` may be changed."""
        token = self._choose(logits)
        if self.params.repetition_penalty != 1:
            self._seen.add(token)
        return token

    def _choose(self, logits: np.ndarray) -> int:
        p = self.params
        if p.repetition_penalty != 1 and self._seen:
            seen = np.fromiter((t for t in self._seen if t < logits.size), np.int64)
            values = logits[seen]
            penalty = np.float32(p.repetition_penalty)
            logits[seen] = np.where(values > 0, values / penalty, values * penalty)
        best = int(np.argmax(logits))  # NaN counts as largest: the check catches it
        if not math.isfinite(logits[best]):
            raise NumbaInferError("the model computed NaN or infinite logits: its weights are damaged or overflow")
        if p.temperature == 0:
            return best
        if 0 < p.top_k < logits.size:
            # All that equal the k-th largest, until sorting has told which of them have the lower ids
            candidates = np.flatnonzero(logits >= np.partition(logits, -p.top_k)[-p.top_k])
        elif p.min_p > 0 and p.top_p == 1:
            # What min_p drops anyway need not be sorted: p_i / p_max = e^((l_i - l_max) / temperature).
            # Not so with top_p, which comes before it and counts the probability of all.
            candidates = np.flatnonzero(logits >= logits[best] + p.temperature * math.log(p.min_p))
        else:
            candidates = np.arange(logits.size)
        # Sorted by falling logit, the lower id first among equals, so that a seed gives one text everywhere.
        candidates = candidates[np.lexsort((candidates, -logits[candidates]))][: p.top_k or None]
        below = logits[candidates].astype(np.float64) - float(logits[best])
        with np.errstate(over="ignore"):  # a temperature near zero makes all others infinitely less likely
            weights = np.exp(below / p.temperature)
        weights /= weights.sum()
        if p.top_p < 1:
            before = np.cumsum(weights) - weights  # what the more likely ones reach without this one
            weights = weights[before < p.top_p]
        if p.min_p > 0:
            weights = weights[weights >= p.min_p * weights[0]]
        cumulative = np.cumsum(weights)
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(candidates[min(int(drawn), len(weights) - 1)])
