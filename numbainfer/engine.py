"""The generate loop: prefill in chunks, decode, stop, stream, statistics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from numbainfer.errors import NumbaInferError
from numbainfer.model import Model
from numbainfer.sampling import Sampler, SamplingParams
from numbainfer.tokenizer import Tokenizer

DEFAULT_CTX_SIZE = 4096  # positions, where the model allows as many


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
            **self.__dict__,
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 and count > 0 else 0.0


@dataclass
class Generation:
    """One reply, filled in while it streams. finish_reason: "stop", "length" or "cancelled" (until it ends: "")."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    context_full: bool = False
    statistics: Statistics = field(default_factory=Statistics)


class Engine:
    """A model and its tokenizer, generating for one sequence at a time.

    The KV cache stays between calls: a prompt that begins as the last one did is computed from where they differ.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, eos_ids: tuple[int, ...] | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.eos_ids = set(tokenizer.eos_ids if eos_ids is None else eos_ids)
        self._sequence = model.cache.add_sequence()

    @property
    def ctx_size(self) -> int:
        return self.model.cache.ctx_size

    def generate(
        self, prompt: list[int], params: SamplingParams, *, continues: bool = True
    ) -> tuple[Generation, Iterator[str]]:
        """The generation and the pieces of its text, as they become whole; iterate to make it go on.

        continues: whether the text goes on from the prompt's, so that a leading space belongs to it.
        Closing the iterator early ends it with finish_reason "cancelled". A bad prompt raises NumbaInferError at once.
        """
        if not prompt:
            raise NumbaInferError("the prompt is empty: give some text")
        if len(prompt) >= self.ctx_size:
            raise NumbaInferError(
                f"the prompt has {len(prompt)} tokens and the context holds {self.ctx_size}: "
                "shorten it or raise --ctx-size"
            )
        if max(prompt) >= self.model.config.vocab_size or min(prompt) < 0:
            wrong = next(token for token in prompt if not 0 <= token < self.model.config.vocab_size)
            raise NumbaInferError(f"the prompt has token {wrong}, which is not in the model's vocabulary")
        generation = Generation(prompt=list(prompt))
        return generation, self._stream(generation, params, continues)

    def _stream(self, generation: Generation, params: SamplingParams, continues: bool) -> Iterator[str]:
        decoder = self.tokenizer.stream(at_start=not continues)
        gate = StopGate(params.stop)
        try:
            for token in self._tokens(generation, params):
                generation.tokens.append(token)
                piece = gate.push(decoder.push(token))
                generation.text += piece
                if piece:
                    yield piece
                if gate.stopped:
                    generation.finish_reason = "stop"
                    return
            rest = gate.push(decoder.flush()) + gate.flush()
            generation.text += rest
            if gate.stopped:
                generation.finish_reason = "stop"
            if rest:
                yield rest
        except (KeyboardInterrupt, GeneratorExit):
            generation.finish_reason = "cancelled"
            raise

    def _tokens(self, generation: Generation, params: SamplingParams) -> Iterator[int]:
        """The tokens of a reply, without the EOS that ends it."""
        statistics = generation.statistics
        sampler = Sampler(params, generation.prompt)
        statistics.seed = sampler.seed
        statistics.prompt_tokens = len(generation.prompt)
        start = time.perf_counter()
        logits = self.prefill(generation.prompt, statistics)
        statistics.prompt_seconds = time.perf_counter() - start
        room = self.ctx_size - len(generation.prompt)
        first = None
        for _ in range(min(params.max_tokens, room)):
            token = sampler(logits[-1])
            now = time.perf_counter()
            if first is None:
                first = now
                statistics.time_to_first_token = now - start
            statistics.decode_seconds = now - first
            statistics.tokens += 1
            if token in self.eos_ids:
                generation.finish_reason = "stop"
                return
            yield token
            if statistics.tokens < min(params.max_tokens, room):
                logits = self.decode(token)
        generation.finish_reason = "length"
        generation.context_full = room < params.max_tokens

    def prefill(self, prompt: list[int], statistics: Statistics | None = None) -> np.ndarray:
        """Brings the cache to hold exactly `prompt`; logits [1, vocabulary] after its last token."""
        sequence, model = self._sequence, self.model
        shared = 0
        for have, want in zip(sequence.tokens, prompt[:-1], strict=False):  # the last is run anyway: for its logits
            if have != want:
                break
            shared += 1
        model.cache.truncate(sequence, shared)
        if statistics is not None:
            statistics.cached_tokens = shared
        logits = None
        for start in range(shared, len(prompt), model.chunk):
            part = prompt[start : start + model.chunk]
            last = start + len(part) == len(prompt)
            logits = self._step(part, "last" if last else "none")
        assert logits is not None
        return logits

    def decode(self, token: int) -> np.ndarray:
        """Appends one token; logits [1, vocabulary] after it."""
        logits = self._step([token], "last")
        assert logits is not None
        return logits

    def _step(self, tokens: list[int], logits: str) -> np.ndarray | None:
        sequence = self._sequence
        start = len(sequence)
        positions = np.arange(start, start + len(tokens), dtype=np.int32)
        try:
            self.model.cache.append(sequence, tokens)
            return self.model.step(tokens, positions, sequence.row, logits)
        except BaseException:
            self.model.cache.truncate(sequence, start)  # what was not stored must not be found later
            raise

    def logits(self, tokens: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """(first position, logits [n, vocabulary]) for chunk after chunk of a fresh sequence of tokens."""
        self.model.cache.truncate(self._sequence, 0)
        for start in range(0, len(tokens), self.model.chunk):
            part = tokens[start : start + self.model.chunk]
            result = self._step(part, "all")
            assert result is not None
            yield start, result


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
        keep = max(self._overlap(stop) for stop in self._stops)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, when nothing follows."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """The length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
