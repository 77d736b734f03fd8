"""One reply on its way: what has been generated, when it ends, what it took."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from numbainfer.kv_cache import Sequence
from numbainfer.sampling import Constraint, Sampler, largest, log_softmax
from numbainfer.sampling_params import SamplingParams
from numbainfer.tokenizer import Tokenizer


@dataclass
class Statistics:
    """What a generation took. Seconds are wall-clock; decode counts the tokens after the first. `tokens` counts the
    EOS that ended the reply, which Generation.tokens leaves out."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in the KV cache
    prompt_seconds: float = 0.0
    tokens: int = 0
    decode_seconds: float = 0.0
    time_to_first_token: float = 0.0
    drafted_tokens: int = 0  # guessed by speculation
    accepted_tokens: int = 0  # of these, what the model said too
    seed: int | None = None

    @property
    def prompt_tokens_per_second(self) -> float:
        return _rate(self.prompt_tokens - self.cached_tokens, self.prompt_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        return _rate(self.tokens - 1, self.decode_seconds)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; rates included, numbers rounded to what the clock means."""
        values = {
            **asdict(self),
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 and count > 0 else 0.0


@dataclass
class TokenLogprob:
    """How likely a token was, as a natural logarithm; `top`: the most likely ones as (token, log-probability)."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass
class Generation:
    """One reply, filled in while it streams. finish_reason: "stop", "length" or "cancelled" (until it ends: "").
    logprobs: one per token of `tokens`, where they were asked for."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    context_full: bool = False
    logprobs: list[TokenLogprob] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)


class Reply:
    """What it takes to go on with a generation: `pending` are the tokens that the model has to see next, the last
    `drafts` of them guesses; `take` gets the logits that it computed."""

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        eos_ids: set[int],
        ctx_size: int,
        *,
        continues: bool = True,
        constraint: Constraint | None = None,
    ) -> None:
        self.generation = Generation(prompt=list(prompt))
        self.params = params
        self.sequence: Sequence | None = None  # its place in the KV cache, while it has one
        self.pending = list(prompt)
        self.drafts = 0
        self.limit = min(params.max_tokens, ctx_size - len(prompt))
        self._eos_ids = eos_ids
        self._sampler = Sampler(params, prompt, constraint)
        self._decoder = tokenizer.stream(at_start=not continues)
        self._constraint = constraint
        self._gate = StopGate(params.stop)
        self._started = self._first = 0.0  # seconds, on perf_counter's clock
        self.generation.statistics.seed = self._sampler.seed
        self.generation.statistics.prompt_tokens = len(prompt)

    @property
    def done(self) -> bool:
        return self.generation.finish_reason != ""

    @property
    def left(self) -> int:
        """How many tokens may still come."""
        return self.limit - self.generation.statistics.tokens

    def start(self, sequence: Sequence) -> None:
        """Gets its place in the cache, where the beginning of the prompt may be already."""
        self.sequence = sequence
        self.pending = self.generation.prompt[len(sequence) :]
        self.generation.statistics.cached_tokens = len(sequence)
        self._started = time.perf_counter()

    def take(self, logits: np.ndarray) -> tuple[str, int]:
        """Chooses the next token, and the ones after it as long as they are the drafts; returns the text that is new
        and how many of the rows were used.

        logits [1 + drafts, vocabulary]: after the last certain token, and after each draft.
        """
        statistics = self.generation.statistics
        if self._first == 0:
            statistics.prompt_seconds = time.perf_counter() - self._started
            if self.limit == 0:
                return self._end("length"), 1
        drafts = self.pending[len(self.pending) - self.drafts :]
        statistics.drafted_tokens += len(drafts)
        text, used = "", 0
        for row, draft in zip(logits, [*drafts, None], strict=True):
            token, piece = self._next(row)
            text, used = text + piece, used + 1
            if self.done or token != draft:
                break
            statistics.accepted_tokens += 1
        self.pending, self.drafts = [token], 0
        return text, used

    @property
    def decodes_greedily(self) -> bool:
        """Whether its next tokens are those with the largest logits, one after another."""
        begun = self._first > 0 and len(self.pending) == 1
        return begun and self.params.plain and self._constraint is None and self.left > 0

    def accept(self, token: int) -> str:
        """Goes on with a token that was chosen elsewhere, instead of `take`; returns the text that is new."""
        self.pending = [token]
        return self._append(token, None)

    def _next(self, logits: np.ndarray) -> tuple[int, str]:
        before = logits.copy() if self.params.logprobs is not None else None
        token = self._sampler(logits)
        return token, self._append(token, before)

    def _append(self, token: int, logits: np.ndarray | None) -> str:
        """The text that a chosen token adds. logits: that it was chosen from, where log-probabilities are wanted."""
        generation, statistics = self.generation, self.generation.statistics
        now = time.perf_counter()
        if self._first == 0:
            self._first = now
            statistics.time_to_first_token = now - self._started
        statistics.decode_seconds = now - self._first
        statistics.tokens += 1
        if token in self._eos_ids:
            return self._end("stop")
        generation.tokens.append(token)
        if logits is not None and self.params.logprobs is not None:
            generation.logprobs.append(token_logprob(logits, token, self.params.logprobs))
        piece = self._gate.push(self._decoder.push(token))
        generation.text += piece
        if self._gate.stopped:
            generation.finish_reason = "stop"
        elif self._constraint is not None and self._constraint.finished:
            piece += self._end("stop")
        elif self.left == 0:
            generation.context_full = self.limit < self.params.max_tokens
            piece += self._end("length")
        return piece

    def _end(self, reason: str) -> str:
        """Ends it; returns the text that was held back."""
        rest = self._gate.push(self._decoder.flush()) + self._gate.flush()
        self.generation.text += rest
        self.generation.finish_reason = "stop" if self._gate.stopped else reason
        return rest


def token_logprob(logits: np.ndarray, token: int, count: int) -> TokenLogprob:
    """The log-probability of a token, and the `count` highest."""
    values = log_softmax(logits)
    top = largest(values, count) if count else np.empty(0, np.int64)
    return TokenLogprob(token, float(values[token]), [(int(i), float(values[i])) for i in top])


class StopGate:
    """Lets text through until a stop text appears; holds back an end that may be the beginning of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What can be shown now."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        self._held += text
        found = [i for i in (self._held.find(stop) for stop in self._stops) if i >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max(overlap(self._held, stop) for stop in self._stops)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, when nothing follows."""
        shown, self._held = self._held, ""
        return shown


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of a text that begins `stop` without being all of it."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
