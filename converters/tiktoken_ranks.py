"""LLaMA 3's tokenizer.model, a list of tiktoken ranks, as the vocabulary of a byte-level BPE.

Each line has a token's bytes in base64 and its rank. tiktoken merges the two neighbours that together are the token
of the lowest rank; so every way to cut a token in two known ones is a merge, and merges come in the order of ranks.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from numbainfer.converters.sentencepiece_writer import TokenType
from numbainfer.errors import NumbaInferError
from numbainfer.tokenizer_backends import BYTE_OF_CHARACTER

_RESERVED = 256  # ids after the ranks, for special tokens
# Those of LLaMA 3.1 and later by their place; LLaMA 3 has the same but for names that it does not use.
_SPECIAL = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
_MAX_TOKEN_BYTES = 512


def is_ranks(data: bytes) -> bool:
    """Whether a tokenizer.model is such a list."""
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data) is not None


def ranks_metadata(data: bytes, vocab_size: object) -> dict[str, Any]:
    """The vocabulary in GGUF's terms. vocab_size: the model's, ranks and special tokens together, if known."""
    ranks: dict[bytes, int] = {}
    for line in data.splitlines():
        text, _, rank = line.partition(b" ")
        try:
            token = base64.b64decode(text, validate=True)
        except binascii.Error:
            token = b""
        if not 0 < len(token) <= _MAX_TOKEN_BYTES or rank != str(len(ranks)).encode() or token in ranks:
            raise NumbaInferError(f"damaged at its line {len(ranks) + 1}; fetch it again")
        ranks[token] = len(ranks)
    if isinstance(vocab_size, int) and vocab_size != len(ranks) + _RESERVED:
        raise NumbaInferError(
            f"{len(ranks)} ranks, which with {_RESERVED} special tokens are not the model's "
            f"{vocab_size}; use the file that came with the weights"
        )
    shown = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}
    names = {token: "".join(map(shown.__getitem__, token)) for token in ranks}
    merges = []
    for token in ranks:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        cuts.sort(key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
        merges += [f"{names[left]} {names[right]}" for left, right in cuts]
    unnamed = iter(range(_RESERVED))
    special = [_SPECIAL.get(i) or f"<|reserved_special_token_{next(unnamed)}|>" for i in range(_RESERVED)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*names.values(), *special],
        "tokenizer.ggml.token_type": [TokenType.NORMAL] * len(names) + [TokenType.CONTROL] * _RESERVED,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(names),
        "tokenizer.ggml.eos_token_id": len(names) + 1,
    }
