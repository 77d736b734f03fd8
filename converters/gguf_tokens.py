"""A tokenizer as the keys of a GGUF, from its files: the way back of vocabulary.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from numbainfer.converters.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from numbainfer.converters.sentencepiece_writer import TokenType, guess_type
from numbainfer.errors import NumbaInferError
from numbainfer.tokenizer import Tokenizer

# Of several names for one way to cut, the one that llama.cpp's own converter writes.
_NAMES = ("llama-bpe", "qwen2", "smollm", "gpt-2", "tekken", "qwen35", "olmo", "dbrx")


def tokenizer_keys(files: Mapping[str, bytes], rows: int, generation: Mapping[str, Any] | None) -> dict[str, Any]:
    """The `tokenizer.*` keys. rows: of the embedding, to which the vocabulary is padded.

    Raises NumbaInferError for a vocabulary that llama.cpp has no kind for.
    """
    extra = {"generation_config.json": json.dumps(generation).encode()} if generation else {}
    tokenizer = Tokenizer.from_files({**files, **extra}, rows)
    if "tokenizer.json" in files:
        content = json.loads(files["tokenizer.json"])
        byte_level = any(step.get("type") == "ByteLevel" for step in _steps(content.get("decoder"), "decoders"))
        keys = _byte_level(content) if byte_level else _like_sentencepiece(content)
    else:
        keys = _sentencepiece(files["tokenizer.model"], tokenizer)
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    if len(tokens) > rows:
        raise NumbaInferError(f"the tokenizer has {len(tokens)} tokens and the model only {rows} rows")
    padding = range(len(tokens), rows)
    tokens += [f"[PAD{index}]" for index in padding]
    types += [int(TokenType.UNUSED)] * len(padding)
    if "tokenizer.ggml.scores" in keys:
        keys["tokenizer.ggml.scores"] += [-10000.0] * len(padding)

    eos = tokenizer.token_to_id(tokenizer.special_tokens.get("eos_token", ""))
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_ids[0] if eos is None and tokenizer.eos_ids else eos}
    for name, ours in (("padding", "pad_token"), ("unknown", "unk_token")):
        ids[name] = tokenizer.token_to_id(tokenizer.special_tokens.get(ours, ""))
    keys |= {f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items() if index is not None}
    keys["tokenizer.ggml.add_bos_token"] = tokenizer.add_bos
    if tokenizer.chat_template is not None:
        keys["tokenizer.chat_template"] = tokenizer.chat_template
    return keys


def _byte_level(content: Mapping[str, Any]) -> dict[str, Any]:
    tokens, types = _tokens(content)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer_name(content),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(content)],
    }


def _like_sentencepiece(content: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json that was made of a sentencepiece model, without its scores: those say only what merges first."""
    tokens, types = _tokens(content)
    scores = [0.0] * len(tokens)
    index = {token: i for i, token in enumerate(tokens)}
    for order, pair in enumerate(_merges(content)):
        made = index.get("".join(pair))
        if made is not None and scores[made] == 0.0:
            scores[made] = -1.0 - order
    steps = _steps(content.get("normalizer"), "normalizers") + _steps(content.get("pre_tokenizer"), "pretokenizers")
    prefixed = any(s.get("type") == "Prepend" or s.get("prepend_scheme") in ("first", "always") for s in steps)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [
            guess_type(token) if kind == TokenType.NORMAL else kind for token, kind in zip(tokens, types, strict=True)
        ],
        "tokenizer.ggml.add_space_prefix": prefixed,
    }


def _sentencepiece(data: bytes, tokenizer: Tokenizer) -> dict[str, Any]:
    from sentencepiece import SentencePieceProcessor

    library = SentencePieceProcessor()
    library.LoadFromSerializedProto(data)
    pieces = library.get_piece_size()
    tokens, scores, types = [], [], []
    for index in range(tokenizer.vocab_size):
        if index < pieces:
            kind = TokenType.NORMAL
            for is_kind, name in (
                (library.is_unknown, TokenType.UNKNOWN),
                (library.is_control, TokenType.CONTROL),
                (library.is_unused, TokenType.UNUSED),
                (library.is_byte, TokenType.BYTE),
            ):
                kind = name if is_kind(index) else kind
            tokens.append(library.id_to_piece(index))
            scores.append(float(library.get_score(index)))
        else:  # an added token, which is matched as it stands
            text = tokenizer.token_bytes(index).decode("utf-8", "replace")
            kind = TokenType.CONTROL if text else TokenType.UNUSED
            tokens.append(text or f"[PAD{index}]")
            scores.append(-1000.0)
        types.append(int(kind))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": library.normalize("x").startswith("\u2581"),
    }


def _tokens(content: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Texts and types by id; ids that nothing has are unused."""
    model = content.get("model") or {}
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise NumbaInferError(
            f"tokenizer.json: a {model.get('type')} vocabulary can't be written as GGUF; only BPE can"
        )
    ids: dict[int, tuple[str, int]] = {index: (token, TokenType.NORMAL) for token, index in model["vocab"].items()}
    for added in content.get("added_tokens") or []:
        kind = TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED
        ids[added["id"]] = (added["content"], kind)
    unknown = model.get("unk_token")
    size = max(ids, default=-1) + 1
    unused = [ids.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(size)]
    return [text for text, _ in unused], [
        int(TokenType.UNKNOWN if text == unknown and kind == TokenType.CONTROL else kind) for text, kind in unused
    ]


def _merges(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in content["model"]["merges"]]
    return [(pair[0], pair[1]) for pair in pairs]


def _steps(part: Any, key: str) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder as the list of its steps."""
    if not isinstance(part, dict):
        return []
    return part[key] if part.get("type") == "Sequence" else [part]


def _pre_tokenizer_name(content: Mapping[str, Any]) -> str:
    steps = _steps(content.get("pre_tokenizer"), "pretokenizers")
    patterns = [step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split"]
    found = PreTokenizer(
        pattern="|".join(patterns),
        digits=any(step.get("type") == "Digits" and step.get("individual_digits") for step in steps),
        nfc=any(step.get("type") == "NFC" for step in _steps(content.get("normalizer"), "normalizers")),
        whole_words=bool(content["model"].get("ignore_merges")),
    )
    known = {name: PRE_TOKENIZERS[name] for name in _NAMES}
    for same in (
        lambda rules: (rules.pattern, rules.digits, rules.nfc, rules.whole_words),
        lambda rules: (rules.pattern, rules.digits, rules.whole_words),
        lambda rules: (rules.pattern, rules.digits),
    ):
        for name, rules in known.items():
            if same(rules) == same(found) and len(patterns) <= 1:
                return name
    raise NumbaInferError(
        "tokenizer.json cuts texts in a way that no known GGUF pre-tokenizer has; it can't be written as GGUF"
    )
