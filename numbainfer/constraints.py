"""Text that must match a JSON schema, a regular expression or a grammar: which tokens may come next.

The library `llguidance` keeps the state of the parser and turns it into a bit per token; here it meets our tokenizer
and the sampler. It is an optional dependency.
"""

from __future__ import annotations

import importlib.util
import json
from functools import lru_cache
from typing import Any

import numpy as np

from numbainfer.errors import NumbaInferError
from numbainfer.sampling_params import SamplingParams
from numbainfer.tokenizer import Tokenizer

# Between the tokens of JSON: a space, or a new line and its indent. Without a bound some models never stop.
_JSON_SPACE = r"( |\n[ \t]{0,20})"


def constraint_of(
    params: SamplingParams, tokenizer: Tokenizer, eos_ids: frozenset[int], vocab_size: int
) -> Constraint | None:
    """What the parameters ask of the text; None for nothing. Raises NumbaInferError where they don't make sense."""
    if params.json_schema is None and params.regex is None and params.grammar is None:
        return None
    require_library()
    from llguidance import LLMatcher

    if params.json_schema is not None:
        name = "json_schema"
        schema = params.json_schema if isinstance(params.json_schema, str) else json.dumps(dict(params.json_schema))
        try:
            json.loads(schema)
            form = LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _JSON_SPACE})
        except ValueError as error:
            raise NumbaInferError(f"json_schema: {error}") from error
    elif params.regex is not None:
        name, form = "regex", LLMatcher.grammar_from_regex(params.regex)
    else:
        assert params.grammar is not None
        name, form = "grammar", LLMatcher.grammar_from_lark(params.grammar)
    return Constraint(name, LLMatcher(_vocabulary(tokenizer, eos_ids, vocab_size), form, log_level=0), vocab_size)


def require_library() -> None:
    """NumbaInferError where the library is missing."""
    if importlib.util.find_spec("llguidance") is None:
        raise NumbaInferError(
            "a JSON schema, a regular expression or a grammar needs the package llguidance: pip install llguidance"
        )


class Constraint:
    """The state of one text (sampling.Constraint)."""

    def __init__(self, name: str, matcher: Any, vocab_size: int) -> None:
        self._name, self._matcher, self._size = name, matcher, vocab_size
        self._bits = np.zeros(vocab_size // 32 + 1, np.uint32)
        self._check()

    @property
    def finished(self) -> bool:
        """Whether the text is whole and nothing more can follow."""
        return self._matcher.is_stopped()

    def mask(self, logits: np.ndarray) -> None:
        """Sets the logits [vocabulary] of all tokens that cannot come next to -inf."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        allowed = np.unpackbits(self._bits.view(np.uint8), count=self._size, bitorder="little")
        np.copyto(logits, -np.inf, where=allowed == 0)

    def accept(self, token: int) -> None:
        """Goes on after a token."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            what = self._matcher.get_error().strip().splitlines() or ["it cannot be followed"]
            raise NumbaInferError(f"{self._name}: {what[0].rstrip(':')}")


_START = "\x02"  # no text has it, and no token joins it with what follows


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer, eos_ids: frozenset[int], vocab_size: int) -> Any:
    """Our tokenizer as llguidance knows it: the bytes of every token, and which ones are no text."""
    from llguidance import LLTokenizer, TokenizerWrapper

    special = {i for i in range(vocab_size) if tokenizer.is_special(i)}
    spelled = {tokenizer.token_bytes(i): i for i in range(vocab_size - 1, -1, -1) if i not in special}
    start = tokenizer.encode(_START, bos=False)

    def encode(text: str | bytes) -> list[int]:
        """As the model is used to see it in the middle of a text, with no token that is a mark."""
        text = text if isinstance(text, str) else text.decode()
        ids = tokenizer.encode(_START + text, bos=False)
        if ids[: len(start)] == start and not special.intersection(ids):
            return ids[len(start) :]
        data, found = text.encode(), list[int]()
        while data:  # the longest token that fits
            length = next((n for n in range(min(len(data), 64), 0, -1) if data[:n] in spelled), None)
            if length is None:
                raise ValueError(f"no token for {data!r}")
            found.append(spelled[data[:length]])
            data = data[length:]
        return found

    # A text may end with any of eos_ids; where there is none, with one past the vocabulary, which never comes.
    ends = sorted(eos_ids) or [vocab_size]

    class Wrapped:
        def __init__(self) -> None:
            self.eos_token_id, self.bos_token_id = ends[0], tokenizer.bos_id
            self.special_token_ids = [*sorted(special), vocab_size]
            self.tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)] + [b"<none>"]

        def __call__(self, text: str | bytes) -> list[int]:
            return encode(text)

    return LLTokenizer(TokenizerWrapper(Wrapped()), n_vocab=vocab_size + 1, eos_token=ends)
