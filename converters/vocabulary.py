"""Tokenizer files for checkpoints that carry their vocabulary in a form of their own.

A GGUF keeps the vocabulary among its metadata, llama2.c in a tokenizer.bin. Both become the files that
Hugging Face models have (tokenizer.json or tokenizer.model, tokenizer_config.json), so that the engine
knows one form only and other tools can open a converted model. Nothing of the vocabulary is lost: ids,
merges, scores and the kinds of tokens are those of the source.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numbainfer.converters.pre_tokenizers import PreTokenizer, pre_tokenizer_of
from numbainfer.converters.sentencepiece_writer import TokenType, guess_type, sentencepiece_model
from numbainfer.errors import NumbaInferError

# Tokens that end a turn or a document wherever a vocabulary has them. A GGUF names only one of a model's
# EOS ids; the others, which HF lists in generation_config.json, are known by their text alone.
_END_TOKENS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>")


@dataclass(frozen=True)
class _Vocabulary:
    """A GGUF's `tokenizer.ggml.*` after its lengths, types and ids were checked."""

    metadata: Mapping[str, Any]
    tokens: list[str]
    types: list[int]
    scores: list[float]

    @classmethod
    def read(cls, metadata: Mapping[str, Any]) -> _Vocabulary:
        tokens = _list_of(metadata, "tokens", str)
        if not tokens:
            raise NumbaInferError("the GGUF has no vocabulary (tokenizer.ggml.tokens)")
        if len(set(tokens)) != len(tokens):
            raise NumbaInferError("the GGUF's vocabulary has the same token twice")
        types = _list_of(metadata, "token_type", int) or [TokenType.NORMAL] * len(tokens)
        scores = _list_of(metadata, "scores", (int, float)) or [0.0] * len(tokens)
        for name, values in (("token_type", types), ("scores", scores)):
            if len(values) != len(tokens):
                raise NumbaInferError(f"tokenizer.ggml.{name} has {len(values)} entries for {len(tokens)} tokens")
        return cls(metadata, tokens, types, scores)

    def id(self, name: str) -> int | None:
        """A special token's id, by the key's name ("bos" for tokenizer.ggml.bos_token_id)."""
        value = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is None:
            return None
        if not isinstance(value, int) or not 0 <= value < len(self.tokens):
            raise NumbaInferError(f"tokenizer.ggml.{name}_token_id is {value!r}, not an id of its vocabulary")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        return default if value is None else bool(value)

    def eos_ids(self) -> list[int]:
        """Every id that ends a generation, the model's own EOS first."""
        named = [self.id(name) for name in ("eos", "eot", "eom")]
        known = {
            token: index
            for index, token in enumerate(self.tokens)
            if token in _END_TOKENS and self.types[index] == TokenType.CONTROL
        }
        ids = [*named, *(known.get(token) for token in _END_TOKENS)]
        return [index for index in dict.fromkeys(ids) if index is not None]


def gguf_tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The tokenizer files of a GGUF, as `Tokenizer.from_files` takes them.

    metadata: the GGUF's keys with plain Python values. "gpt2" vocabularies become a tokenizer.json,
    "llama" ones a tokenizer.model; both come with a tokenizer_config.json (special tokens, chat template)
    and a generation_config.json (all EOS ids). Raises NumbaInferError for an unknown kind of vocabulary
    or pre-tokenizer, and for one that contradicts itself.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise NumbaInferError(f"the GGUF's tokenizer.ggml.model is {kind!r}; only 'gpt2' and 'llama' are known")
    vocabulary = _Vocabulary.read(metadata)
    if kind == "gpt2":
        rules = pre_tokenizer_of(metadata)
        adds_bos = vocabulary.flag("add_bos_token", rules.bos) and vocabulary.id("bos") is not None
        files = {"tokenizer.json": _byte_level_json(vocabulary, rules, adds_bos)}
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    else:
        adds_bos = vocabulary.flag("add_bos_token", True)
        files = {"tokenizer.model": _sentencepiece_from_gguf(vocabulary)}
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": True}

    config |= {"add_bos_token": adds_bos, "clean_up_tokenization_spaces": False}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = vocabulary.id(name)
        config[f"{key}_token"] = None if index is None else vocabulary.tokens[index]
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = str(template)
    files["tokenizer_config.json"] = _json(config)

    generation = {"bos_token_id": vocabulary.id("bos"), "eos_token_id": vocabulary.eos_ids() or None}
    files["generation_config.json"] = _json({k: v for k, v in generation.items() if v is not None})
    return files


def llama2c_tokenizer_files(data: bytes, vocab_size: int) -> dict[str, bytes]:
    """The tokenizer files of a llama2.c tokenizer.bin.

    data: little-endian int32 length of the longest token, then per token a float32 score, an int32
    length and that many bytes. vocab_size: the model's, which the file has to match, since the file does
    not say it. Ids 0, 1 and 2 are unknown, BOS and EOS. Raises NumbaInferError where the file is cut off
    or does not fit.
    """
    advice = "use the tokenizer.bin that was made for this model"
    if len(data) < 4:
        raise NumbaInferError(f"tokenizer.bin is cut off; {advice}")
    (longest,) = struct.unpack_from("<i", data)
    offset = 4
    pieces: list[tuple[str, float, int]] = []
    while offset < len(data):
        if offset + 8 > len(data):
            raise NumbaInferError(f"tokenizer.bin is cut off in token {len(pieces)}; {advice}")
        score, length = struct.unpack_from("<fi", data, offset)
        offset += 8
        if not 0 < length <= min(longest, len(data) - offset):
            raise NumbaInferError(
                f"tokenizer.bin: token {len(pieces)} claims {length} bytes, where "
                f"{len(data) - offset} are left and the longest has {longest}; {advice}"
            )
        try:
            text = data[offset : offset + length].decode()
        except UnicodeDecodeError as error:
            raise NumbaInferError(f"tokenizer.bin: token {len(pieces)} is not UTF-8; {advice}") from error
        offset += length
        pieces.append((text, score, guess_type(text)))
    if len(pieces) != vocab_size or vocab_size < 3:
        raise NumbaInferError(f"tokenizer.bin has {len(pieces)} tokens, the model {vocab_size}; {advice}")
    # llama2.c writes the sentencepiece's space plainly and sets line breaks around BOS and EOS.
    plain = [(text.replace(" ", "\u2581"), score, kind) for text, score, kind in pieces]
    for index, kind in enumerate((TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL)):
        plain[index] = (pieces[index][0].strip(), 0.0, kind)
    return {"tokenizer.model": sentencepiece_model(plain, unk=0, bos=1, eos=2)}


def _sentencepiece_from_gguf(vocabulary: _Vocabulary) -> bytes:
    types = list(vocabulary.types)
    if "tokenizer.ggml.token_type" not in vocabulary.metadata:
        types = [guess_type(token) for token in vocabulary.tokens]
    unk = vocabulary.id("unknown")
    if unk is None:
        unk = types.index(TokenType.UNKNOWN) if TokenType.UNKNOWN in types else 0
    bos, eos = vocabulary.id("bos"), vocabulary.id("eos")
    # sentencepiece wants exactly one unknown token, and finds BOS and EOS among the control tokens only.
    types = [TokenType.CONTROL if kind == TokenType.UNKNOWN else kind for kind in types]
    for index in (bos, eos):
        if index is not None:
            types[index] = TokenType.CONTROL
    types[unk] = TokenType.UNKNOWN
    return sentencepiece_model(
        list(zip(vocabulary.tokens, vocabulary.scores, types, strict=True)),
        unk=unk,
        bos=bos,
        eos=eos,
        add_dummy_prefix=vocabulary.flag("add_space_prefix", True),
        remove_extra_whitespaces=vocabulary.flag("remove_extra_whitespaces", False),
    )


def _byte_level_json(vocabulary: _Vocabulary, rules: PreTokenizer, adds_bos: bool) -> bytes:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    merges = []
    for merge in _list_of(vocabulary.metadata, "merges", str):
        left, space, right = merge.partition(" ")
        if not left or not space or not right:
            raise NumbaInferError(f"tokenizer.ggml.merges: {merge!r} is not a pair of tokens")
        merges.append((left, right))
    # Unused ids only pad the embedding to a round number of rows; HF's vocabularies do not have them.
    entries = list(enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)))
    ids = {token: index for index, (token, kind) in entries if kind != TokenType.UNUSED}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=rules.whole_words))
    except Exception as error:  # the library raises plain Exception
        raise NumbaInferError(f"the GGUF's vocabulary contradicts itself: {error}") from error

    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind in special, normalized=False)
            for _, (token, kind) in entries
            if kind in special or kind == TokenType.USER_DEFINED
        ]
    )
    if rules.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rules.digits else []
    if rules.pattern:
        steps.append(pre_tokenizers.Split(Regex(rules.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not rules.pattern))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    bos = vocabulary.id("bos")
    if adds_bos and bos is not None:
        name = vocabulary.tokens[bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[name, "$A"], pair=[name, "$A", "$B"], special_tokens=[(name, bos)]
        )
    return tokenizer.to_str().encode()


def _list_of(metadata: Mapping[str, Any], name: str, kinds: type | tuple[type, ...]) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{name}", [])
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, kinds) for value in values):
        raise NumbaInferError(f"the GGUF's tokenizer.ggml.{name} is not the list that it should be")
    return list(values)


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=2).encode()
