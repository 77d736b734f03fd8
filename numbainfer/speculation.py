"""Speculation: guesses at the next tokens, which the model then checks several at a time.

A step of a few tokens costs little more than one of a single token, as the weights are read once. Only what the model
would have said anyway is kept, so the output is the same: each token is drawn as it would be without guesses, and a
guess is right if it is the one that is drawn (compare Leviathan et al. 2023). Two ways to guess:

- `lookup`: what a text says next it has often said before: code that is edited, a quotation, a list. The last few
  tokens are looked up in the text so far, and what followed them there is the guess (prompt lookup; Saxena 2023).
- `DraftModel`: a smaller model with the same vocabulary.
"""

from __future__ import annotations

import numpy as np

from numbainfer.engine import Engine
from numbainfer.errors import NumbaInferError
from numbainfer.tokenizer import Tokenizer

LONGEST, SHORTEST = 5, 2  # tokens that have to match, tried in this order


def lookup(tokens: list[int], count: int) -> list[int]:
    """Up to `count` tokens that followed the latest earlier occurrence of the text's last tokens; [] for none."""
    text = np.array(tokens, np.int64)
    if count <= 0 or text.size <= SHORTEST:
        return []
    ends = np.flatnonzero(text[:-1] == text[-1])  # where the last token stood before
    best = np.empty(0, np.int64)
    for length in range(2, LONGEST + 1):
        ends = ends[ends >= length - 1]
        ends = ends[text[ends - length + 1] == text[-length]]
        if ends.size == 0:
            break
        best = ends
    if best.size == 0:
        return []
    start = int(best[-1]) + 1
    return tokens[start : start + count]


class DraftModel:
    """Guesses with a smaller model, greedily. Its own KV cache follows the text."""

    def __init__(self, engine: Engine, target: Engine) -> None:
        if not _same_vocabulary(engine.tokenizer, target.tokenizer):
            raise NumbaInferError("the draft model has another vocabulary: take a smaller model of the same family")
        self._engine = engine
        self._rows = target.model.config.vocab_size  # one of the two may be padded further

    def __call__(self, tokens: list[int], count: int) -> list[int]:
        """Up to `count` tokens; [] where the text does not fit its context."""
        if len(tokens) + count > self._engine.ctx_size:
            return []
        logits, drafts = self._engine.prefill(tokens), list[int]()
        while True:
            drafts.append(int(np.argmax(logits[-1, : self._rows])))
            if len(drafts) == count:
                return drafts
            logits = self._engine.decode(drafts[-1])


def _same_vocabulary(one: Tokenizer, other: Tokenizer) -> bool:
    """By the bytes of a thousand tokens from all over it."""
    if one.vocab_size != other.vocab_size:
        return False
    ids = {*range(0, one.vocab_size, 1 + one.vocab_size // 1000), *one.eos_ids}
    return all(one.token_bytes(i) == other.token_bytes(i) for i in ids)
