"""Perplexity of a text, as llama.cpp's `perplexity` defines it, so that numbers compare."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np

from numbainfer.engine import Engine
from numbainfer.errors import NumbaInferError
from numbainfer.progress import Progress

_MAX_NLL = 700.0  # e^700 is about what a float holds; a model that knows nothing of a text is at 10 to 20


@dataclass
class Perplexity:
    """perplexity = exp(nll); nll: mean negative log likelihood in nats over `tokens` scored tokens."""

    perplexity: float
    nll: float
    tokens: int
    chunks: int
    seconds: float


def perplexity(engine: Engine, text: str, ctx_size: int, progress: Progress | None = None) -> Perplexity:
    """Scores a text in non-overlapping chunks of `ctx_size` tokens.

    Each chunk is a context of its own, its first token replaced by BOS where the tokenizer adds one; the tokens of its
    second half are scored. What is left over at the end is not used.
    """
    if not 4 <= ctx_size <= engine.ctx_size:
        raise NumbaInferError(f"--ctx-size {ctx_size}: must be from 4 to {engine.ctx_size} here")
    start = time.perf_counter()
    tokens = engine.tokenizer.encode(text)
    chunks = len(tokens) // ctx_size
    if chunks == 0:
        raise NumbaInferError(
            f"the text has {len(tokens)} tokens, fewer than one chunk of {ctx_size}: lower --ctx-size"
        )
    total, scored = 0.0, 0
    for chunk in range(chunks):
        part = tokens[chunk * ctx_size : (chunk + 1) * ctx_size]
        if engine.tokenizer.add_bos and engine.tokenizer.bos_id is not None:
            part[0] = engine.tokenizer.bos_id
        for first, logits in engine.logits(part):
            for i, row in enumerate(logits):
                position = first + i
                if ctx_size // 2 <= position < ctx_size - 1:
                    total += negative_log_likelihood(row, part[position + 1])
                    scored += 1
        if progress is not None:
            progress("perplexity", chunk + 1, chunks)
    nll = total / scored
    if not nll < _MAX_NLL:
        raise NumbaInferError("the model computed NaN or infinite logits: its weights are damaged or overflow")
    return Perplexity(math.exp(nll), nll, scored, chunks, time.perf_counter() - start)


def negative_log_likelihood(logits: np.ndarray, token: int) -> float:
    """-log softmax(logits)[token], in nats."""
    largest = logits.max()
    total = np.exp(logits - largest).sum(dtype=np.float64)
    return math.log(total) - float(logits[token] - largest)
