"""The generate loop: prefill in chunks, decode, stop, stream; for one prompt or for many at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing

import numpy as np

from numbainfer.constraints import constraint_of
from numbainfer.errors import NumbaInferError
from numbainfer.generation import Generation, Reply, Statistics
from numbainfer.kv_cache import Sequence
from numbainfer.model import Model
from numbainfer.sampling import SamplingParams
from numbainfer.tokenizer import Tokenizer

DEFAULT_CTX_SIZE = 4096  # positions, where the model allows as many
Drafter = Callable[[list[int], int], list[int]]
"""From the tokens so far, and a number: up to so many tokens that may follow."""

DRAFTS = 3  # tokens that speculation guesses: with the one before them, what a step takes at the cost of little more
# than one, and computes bit for bit as one after another (linear_int8.ROW_FORM_TOKENS)


class Engine:
    """A model and its tokenizer.

    The KV cache stays between calls: a prompt that begins as an earlier one did is computed from where they differ.
    drafter: guesses how a text goes on (speculation.py), for the model to check several tokens in one step.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        eos_ids: tuple[int, ...] | None = None,
        *,
        drafter: Drafter | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.eos_ids = set(tokenizer.eos_ids if eos_ids is None else eos_ids)
        self.drafter = drafter
        # Those that no reply is using, the longest unused first. They keep their tokens for prompts that begin alike.
        self._idle = [model.cache.add_sequence() for _ in range(len(model.cache.page_table))]
        self._sequence = self._idle[0]  # of prefill and decode, which leave it among the idle ones
        self._length = -1  # of that, as they left it

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
        reply = self.reply(prompt, params, continues=continues)
        return reply.generation, self._texts(reply)

    def _texts(self, reply: Reply) -> Iterator[str]:
        with closing(self.run([reply])) as pieces:
            for _, piece in pieces:
                yield piece

    def reply(self, prompt: list[int], params: SamplingParams, *, continues: bool = True) -> Reply:
        """A generation that has not begun; NumbaInferError for a prompt or parameters that can't be run."""
        vocabulary = self.model.config.vocab_size
        if not prompt:
            raise NumbaInferError("the prompt is empty: give some text")
        if len(prompt) >= self.ctx_size:
            raise NumbaInferError(
                f"the prompt has {len(prompt)} tokens and the context holds {self.ctx_size}: "
                "shorten it or raise --ctx-size"
            )
        for what, ids in (("the prompt", prompt), ("the logit bias", params.logit_bias)):
            wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
            if wrong is not None:
                raise NumbaInferError(f"{what} has token {wrong}, which is not in the model's vocabulary")
        constraint = constraint_of(params, self.tokenizer, frozenset(self.eos_ids), vocabulary)
        return Reply(
            *(prompt, params, self.tokenizer, self.eos_ids, self.ctx_size), continues=continues, constraint=constraint
        )

    def run(self, replies: list[Reply]) -> Generator[tuple[Reply, str], None, None]:
        """Brings all replies to their end, with the pieces of their texts as they come: continuous batching (Yu et
        al. 2022). As many as there are free sequences take part in every step; the next joins when one ends."""
        waiting, active = deque(replies), list[Reply]()
        try:
            while waiting or active:
                while waiting and (self._idle or not active):
                    sequence = self._borrow(waiting[0].generation.prompt)
                    active.append(waiting.popleft())
                    active[-1].start(sequence)
                greedy = self.model.runs_ahead and self.drafter is None and all(r.decodes_greedily for r in active)
                for reply, piece in self._decode(active) if greedy else self._advance(active):
                    if piece:
                        yield reply, piece
                for reply in [reply for reply in active if reply.done]:
                    active.remove(reply)
                    self._give_back(reply)
        except (KeyboardInterrupt, GeneratorExit):
            for reply in replies:
                reply.generation.finish_reason = reply.generation.finish_reason or "cancelled"
            raise
        finally:
            for reply in active:
                self._give_back(reply)

    def _borrow(self, prompt: list[int]) -> Sequence:
        """The idle sequence that has most of the prompt's beginning, cut to what they share."""
        if not self._idle:
            raise NumbaInferError("all sequences of the KV cache are in use: end another reply first")
        # All but the last token, which is run anyway: for its logits
        sequence = max(self._idle, key=lambda one: self._shared(one, prompt))  # of equals the first
        self._idle.remove(sequence)
        self.model.cache.truncate(sequence, self._shared(sequence, prompt))
        return sequence

    def _shared(self, sequence: Sequence, prompt: list[int]) -> int:
        """How many tokens of a prompt a sequence has, whose keys and values hold for the prompt too."""
        return shared_prefix(sequence.tokens, prompt[:-1]) if self.model.can_share(sequence, len(prompt)) else 0

    def _give_back(self, reply: Reply) -> None:
        assert reply.sequence is not None
        self._idle.append(reply.sequence)
        reply.sequence = None

    def _decode(self, active: list[Reply]) -> Iterator[tuple[Reply, str]]:
        """Greedy decoding, which the device does by itself, until one of the replies ends."""
        sequences = [reply.sequence for reply in active if reply.sequence is not None]
        count = min(reply.left for reply in active)
        with closing(self.model.greedy([reply.pending[0] for reply in active], sequences, count)) as steps:
            for tokens in steps:
                for reply, token in zip(active, tokens, strict=True):
                    yield reply, reply.accept(token)
                if any(reply.done for reply in active):
                    return

    def _advance(self, active: list[Reply]) -> Iterator[tuple[Reply, str]]:
        """One step for all: a token of each reply that decodes, and as much of the prompts as a step has room for."""
        room = self.model.chunk
        parts: list[tuple[Reply, list[int]]] = []  # tokens whose logits nobody wants
        ends: list[tuple[Reply, list[int]]] = []  # and those, after them, that others follow
        for reply in sorted(active, key=lambda reply: len(reply.pending)):
            if self.drafter is not None and len(active) == 1 and len(reply.pending) == 1:
                self._guess(reply, self.drafter)
            tokens = reply.pending[:room]
            room -= len(tokens)
            rows = 1 + reply.drafts if len(tokens) == len(reply.pending) else 0
            inner = len(tokens) - rows
            parts.append((reply, tokens[:inner]))
            if rows:
                ends.append((reply, tokens[inner:]))
        step = [(reply.sequence, tokens) for reply, tokens in parts + ends if reply.sequence is not None and tokens]
        reading = (r for r in active if r.sequence is not None and len(r.sequence) < len(r.generation.prompt))
        longest = max((len(reply.generation.prompt) for reply in reading), default=0)
        logits = self._step(step, sum(len(tokens) for _, tokens in ends), longest)
        for reply, tokens in parts:
            reply.pending = reply.pending[len(tokens) :]
        for reply, tokens in ends:
            assert logits is not None
            assert reply.sequence is not None
            text, used = reply.take(logits[: len(tokens)])
            logits = logits[len(tokens) :]
            self.model.cache.truncate(reply.sequence, len(reply.sequence) - len(tokens) + used)
            yield reply, text

    def _guess(self, reply: Reply, drafter: Drafter) -> None:
        """Appends drafts to a reply's one pending token."""
        text = reply.generation.prompt + reply.generation.tokens
        room = min(DRAFTS, reply.left - 1, self.model.chunk - 1, self.ctx_size - len(text))
        drafts = drafter(text, room) if room > 0 else []
        reply.pending += drafts
        reply.drafts = len(drafts)

    def prefill(self, prompt: list[int], statistics: Statistics | None = None) -> np.ndarray:
        """For loops of one's own: brings the cache to hold exactly `prompt`; logits [1, vocabulary] after its last
        token. `decode` goes on from there, as long as nothing else is generated in between."""
        sequence = self._sequence = self._borrow(prompt)
        self._idle.append(sequence)
        if statistics is not None:
            statistics.cached_tokens = len(sequence)
        logits = None
        for start in range(len(sequence), len(prompt), self.model.chunk):
            part = prompt[start : start + self.model.chunk]
            logits = self._step([(sequence, part)], int(start + len(part) == len(prompt)), len(prompt))
        assert logits is not None
        self._length = len(sequence)
        return logits

    def decode(self, token: int) -> np.ndarray:
        """Appends one token; logits [1, vocabulary] after it."""
        if self._sequence not in self._idle or len(self._sequence) != self._length:
            raise NumbaInferError("decode goes on from prefill, and something else was generated in between")
        logits = self._step([(self._sequence, [token])], 1)
        assert logits is not None
        self._length += 1
        return logits

    def logits(self, tokens: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """(first position, logits [n, vocabulary]) for chunk after chunk of a fresh sequence of tokens."""
        sequence = self._borrow([])
        try:
            for start in range(0, len(tokens), self.model.chunk):
                part = tokens[start : start + self.model.chunk]
                result = self._step([(sequence, part)], len(part), len(tokens))
                assert result is not None
                yield start, result
        finally:
            self._idle.append(sequence)

    def _step(self, parts: list[tuple[Sequence, list[int]]], rows: int, length: int = 0) -> np.ndarray | None:
        """Appends tokens to sequences in one step; logits of the last `rows` of them. Each sequence may come twice.
        length: of the longest prompt that some of the tokens belong to."""
        cache = self.model.cache
        before = [(sequence, len(sequence)) for sequence, _ in parts]
        tokens, positions, sequences = list[int](), list[int](), list[int]()
        try:
            for sequence, part in parts:
                start = len(sequence)
                cache.append(sequence, part)
                tokens += part
                positions += range(start, start + len(part))
                sequences += [sequence.row] * len(part)
            return self.model.step(tokens, positions, sequences, rows, length)
        except BaseException:
            for sequence, start in reversed(before):
                cache.truncate(sequence, start)  # what was not stored must not be found later
            raise


def shared_prefix(one: list[int], other: list[int]) -> int:
    """How many tokens two lists have in common from the start."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # by halves: comparing slices is far faster than comparing numbers one by one
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
