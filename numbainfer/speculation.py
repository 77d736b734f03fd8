"""Prompt lookup: guesses at the next tokens without a second model (Saxena 2023; Yang et al. 2023, "Inference with
reference").

What a text says next it has often said before: code that is edited, a quotation, a list. The last few tokens are looked
up in the text so far, and what followed them there is the guess. The model then checks all guesses in one step,
which costs it little more than one token, as the weights are read once. Only what it would have said anyway is kept, so
the output is the same.
"""

from __future__ import annotations

import numpy as np

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
