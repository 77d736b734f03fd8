"""Perplexity of a text, as llama.cpp's `perplexity` defines it, so that numbers compare."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np

from numbainfer.engine import Engine
from numbainfer.errors import NumbaInferError
from numbainfer.progress import Progress, silent

_MAX_NLL = 700.0  # e^700 is about what a float holds; a model that knows nothing of a text is at 10 to 20


@dataclass
class Perplexity:
    """perplexity = exp(nll); nll: mean negative log likelihood in nats over `tokens` scored tokens."""

    perplexity: float
    nll: float
    tokens: int
    chunks: int
    seconds: float


@dataclass
class Score:
    """The sum so far, with which a running value and its uncertainty are known."""

    total: float = 0.0
    squares: float = 0.0
    tokens: int = 0
    chunks: int = 0
    start: float = field(default_factory=time.perf_counter)

    def add(self, nll: float) -> None:
        self.total += nll
        self.squares += nll * nll
        self.tokens += 1

    @property
    def nll(self) -> float:
        return self.total / self.tokens

    @property
    def uncertainty(self) -> float:
        """The standard error of the perplexity: that of the mean nll, times the perplexity."""
        if self.tokens < 2:
            return 0.0
        variance = max(0.0, self.squares / self.tokens - self.nll**2)
        return math.exp(self.nll) * math.sqrt(variance / (self.tokens - 1))

    def result(self) -> Perplexity:
        """What is known after the chunks so far."""
        if not self.nll < _MAX_NLL:
            raise NumbaInferError("the model computed NaN or infinite logits: its weights are damaged or overflow")
        seconds = time.perf_counter() - self.start
        return Perplexity(math.exp(self.nll), self.nll, self.tokens, self.chunks, seconds)


def perplexity(
    engine: Engine, text: str, ctx_size: int, progress: Progress | None = None, score: Score | None = None
) -> Perplexity:
    """Scores a text in non-overlapping chunks of `ctx_size` tokens.

    Each chunk is a context of its own, its first token replaced by BOS where the tokenizer adds one; the tokens of its
    second half are scored. What is left over at the end is not used. A `score` that is given holds the sum so far
    after every chunk, also when Ctrl-C ends the loop.
    """
    if not 4 <= ctx_size <= engine.ctx_size:
        raise NumbaInferError(f"--ctx-size {ctx_size}: must be from 4 to {engine.ctx_size} here")
    score, report = score if score is not None else Score(), progress or silent
    tokens = engine.tokenizer.encode(text)
    chunks = len(tokens) // ctx_size
    if chunks == 0:
        raise NumbaInferError(
            f"the text has {len(tokens)} tokens, fewer than one chunk of {ctx_size}: lower --ctx-size"
        )
    for chunk in range(chunks):
        part = tokens[chunk * ctx_size : (chunk + 1) * ctx_size]
        if engine.tokenizer.add_bos and engine.tokenizer.bos_id is not None:
            part[0] = engine.tokenizer.bos_id
        losses = [
            negative_log_likelihood(row, part[first + i + 1])
            for first, logits in engine.logits(part)
            for i, row in enumerate(logits)
            if ctx_size // 2 <= first + i < ctx_size - 1
        ]
        for loss in losses:  # of a whole chunk, or none
            score.add(loss)
        score.chunks += 1
        report("perplexity", chunk + 1, chunks, f"{math.exp(min(score.nll, _MAX_NLL)):.4f}")
    return score.result()


def negative_log_likelihood(logits: np.ndarray, token: int) -> float:
    """-log softmax(logits)[token], in nats."""
    largest = logits.max()
    total = np.exp(logits - largest).sum(dtype=np.float64)
    return math.log(total) - float(logits[token] - largest)
