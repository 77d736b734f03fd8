"""How the byte-level BPE vocabularies in GGUFs cut a text into words before they merge.

A GGUF names the way (`tokenizer.ggml.pre`); what stands behind a name is in the tokenizer.json of the
model that it was first used for, and that is what this table says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numbainfer.errors import NumbaInferError


@dataclass(frozen=True)
class PreTokenizer:
    """How a byte-level BPE cuts a text into words before merging.

    pattern: the words' regular expression; "" is GPT-2's, which the library has built in.
    digits: cut every digit off first. nfc: compose characters first (Unicode NFC). whole_words: a word
    that is a token is that token, without merging. bos: start with BOS where the file does not say.
    """

    pattern: str = ""
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    bos: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(number: str) -> str:
    """The pattern that LLaMA 3 and Qwen share but for how many digits make a number."""
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


_GPT2 = PreTokenizer()
_NEOX = PreTokenizer(nfc=True)
_STARCODER = PreTokenizer(digits=True)
_LLAMA3 = PreTokenizer(_words(r"\p{N}{1,3}"), whole_words=True, bos=True)
_QWEN2 = PreTokenizer(_words(r"\p{N}"), nfc=True)
_QWEN35 = PreTokenizer(
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    rf"|{_SPACES}",
    nfc=True,
)
_TEKKEN = PreTokenizer(
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
    whole_words=True,
    bos=True,
)

# The names that `tokenizer.ggml.pre` takes. A name that is not here is refused: a vocabulary under the
# wrong cut still gives text, only worse, and nobody would see why.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "mpt": _NEOX,
    "olmo": _NEOX,
    "smollm": _STARCODER,
    "starcoder": _STARCODER,
    "refact": _STARCODER,
    "codeshell": _STARCODER,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "dbrx": PreTokenizer(_LLAMA3.pattern),
    "smaug-bpe": PreTokenizer(_LLAMA3.pattern),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "qwen35": _QWEN35,
    "tekken": _TEKKEN,
}


def pre_tokenizer_of(metadata: Mapping[str, Any]) -> PreTokenizer:
    """The entry for a GGUF's metadata. Raises NumbaInferError for a name that the table lacks."""
    name = metadata.get("tokenizer.ggml.pre")
    if name is None:
        # Files from before April 2024 do not say. All Qwen models cut alike; of the others no one can tell.
        if str(metadata.get("general.architecture", "")).startswith("qwen"):
            return _QWEN2
        raise NumbaInferError("the GGUF is too old to name its pre-tokenizer; get one made after April 2024")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise NumbaInferError(
            f"the GGUF's pre-tokenizer {name!r} is not known (tokenizer.ggml.pre); convert the model's "
            "original Hugging Face files instead"
        )
    return PRE_TOKENIZERS[name]
