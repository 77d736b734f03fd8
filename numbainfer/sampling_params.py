"""SamplingParams: what a user can say about how tokens are chosen and when a text ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from numbainfer.errors import NumbaInferError

MAX_LOGPROBS = 100


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    How to choose, in the order in which it is applied:
        logit_bias: token id to what is added to its logit; -inf bans it.
        repetition_penalty: divides positive logits of tokens that were there, in the prompt or since, and multiplies
            negative ones (1: off; Keskar et al. 2019).
        frequency_penalty, presence_penalty: taken off the logits of tokens of the reply, once for each time that they
            came, or once if they came at all (0: off; as OpenAI's API defines them).
        json_schema, regex, grammar: the text has to match: a JSON schema (text or a dictionary; {} for any JSON), a
            regular expression, or a grammar as Lark writes them. One of the three; needs the package `llguidance`.
        temperature: 0 chooses the most likely token (greedy).
        top_k: only the k most likely (0: all).
        top_p: the most likely that together reach this probability (1: all; Holtzman et al. 2019).
        min_p: those at least this fraction as likely as the most likely one (0: all; Nguyen et al. 2024).
        typical_p: those nearest to the expected surprise that together reach this probability (1: all; Meister et al.
            2022).
        mirostat_tau: above 0, the surprise in bits to hold instead of the four filters above (Basu et al. 2021,
            version 2); mirostat_eta: how fast to correct it.
        seed: same seed, same text; None draws one.
    When to stop:
        max_tokens: new tokens at most.
        stop: texts that end the reply, not shown.
    What to tell:
        logprobs: log-probabilities of each token and of this many most likely ones, by the model itself: before
            penalties, temperature and filters (None: no log-probabilities).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    mirostat_tau: float = 0.0
    mirostat_eta: float = 0.1
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    seed: int | None = None
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    @property
    def plain(self) -> bool:
        """Whether the next token is the one with the largest logit, and nothing else is asked of the logits."""
        return self == replace(
            SamplingParams(),
            **{name: getattr(self, name) for name in ("top_k", "top_p", "min_p", "typical_p", "mirostat_eta", "seed")},
            max_tokens=self.max_tokens,
            stop=self.stop,
        )

    def __post_init__(self) -> None:
        def require(name: str, holds: bool, what: str) -> None:
            value = getattr(self, name)
            if not (holds and (not isinstance(value, float) or math.isfinite(value))):
                raise NumbaInferError(f"{name} must be {what}, not {value!r}")

        require("temperature", self.temperature >= 0, "0 or more")
        require("top_k", self.top_k >= 0, "0 or more")
        require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        require("min_p", 0 <= self.min_p <= 1, "from 0 to 1")
        require("typical_p", 0 < self.typical_p <= 1, "above 0 and at most 1")
        require("mirostat_tau", self.mirostat_tau >= 0, "0 or more")
        require("mirostat_eta", self.mirostat_eta > 0, "above 0")
        require("repetition_penalty", self.repetition_penalty > 0, "above 0")
        require("frequency_penalty", True, "a finite number")
        require("presence_penalty", True, "a finite number")
        biases = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else [(-1, 0.0)]
        require("logit_bias", all(t >= 0 and b < math.inf for t, b in biases), "token ids to numbers or -inf")
        require("max_tokens", self.max_tokens >= 0, "0 or more")
        require("seed", self.seed is None or 0 <= self.seed < 2**64, "from 0 to 2^64 - 1")
        require("stop", not isinstance(self.stop, str) and all(self.stop), "texts that are not empty")
        require("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}")
        if sum(form is not None for form in (self.json_schema, self.regex, self.grammar)) > 1:
            raise NumbaInferError("json_schema, regex and grammar: give one of them")
