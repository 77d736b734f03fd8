"""Vocabularies from GGUFs and tokenizer.bin files against the tokenizers that they were made from."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tiny_tokenizers import (
    CORPUS,
    TEXTS,
    byte_level,
    gguf_metadata_of,
    llama2c_file,
    needs_real_files,
    real_file,
    sentencepiece_model,
)

from numbainfer.converters.vocabulary import gguf_tokenizer_files, llama2c_tokenizer_files
from numbainfer.errors import NumbaInferError
from numbainfer.tokenizer import Tokenizer

TOK512 = (Path(__file__).parent / "data" / "tok512.bin").read_bytes()


def spm_metadata() -> dict[str, Any]:
    library = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    ids = range(library.vocab_size())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [library.id_to_piece(index) for index in ids],
        "tokenizer.ggml.scores": [library.get_score(index) for index in ids],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(ids) - 259),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "smollm", "gpt-2"])
def test_a_bpe_gguf_gives_the_ids_of_the_original(pre):
    original = byte_level(pre)
    metadata = gguf_metadata_of(original, pre)
    files = gguf_tokenizer_files(metadata)
    ours = Tokenizer.from_files(files, vocab_size=len(metadata["tokenizer.ggml.tokens"]))
    written = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    for text in TEXTS + CORPUS:
        ids = original.encode(text).ids
        assert written.encode(text).ids == ids
        assert ours.encode(text, bos=False) == original.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == original.decode(ids)
    assert ours.bos_id == 1
    assert ours.add_bos == (pre == "llama-bpe")
    assert ours.eos_ids == (2, 0)  # its own, then <|endoftext|>
    assert ours.chat_template == "{{ messages[0].content }}"
    assert ours.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def test_a_sentencepiece_gguf_gives_the_ids_of_the_original():
    original = Tokenizer.from_files({"tokenizer.model": sentencepiece_model()})
    metadata = spm_metadata()
    untyped = {key: value for key, value in metadata.items() if key != "tokenizer.ggml.token_type"}
    for source in (metadata, untyped):
        ours = Tokenizer.from_files(gguf_tokenizer_files(source), vocab_size=500)
        for text in [*TEXTS, *CORPUS, "<s>hello</s>"]:
            assert ours.encode(text) == original.encode(text)
            assert ours.decode(ours.encode(text)) == original.decode(original.encode(text))
        assert (ours.bos_id, ours.eos_ids, ours.add_bos) == (1, (2,), True)


def test_a_sentencepiece_gguf_without_the_leading_space():
    ours = Tokenizer.from_files(gguf_tokenizer_files(spm_metadata() | {"tokenizer.ggml.add_space_prefix": False}))
    with_space = Tokenizer.from_files(gguf_tokenizer_files(spm_metadata()))
    assert ours.encode(" hello") == with_space.encode("hello")
    assert ours.decode(ours.encode(" hello")) == " hello"


def test_user_defined_and_control_tokens_of_a_sentencepiece_gguf():
    metadata = spm_metadata()
    types = list(metadata["tokenizer.ggml.token_type"])
    for name, extra in (("tokens", ["<|user|>", "<tool>", "[PAD]"]), ("scores", [0.0, 0.0, 0.0])):
        metadata[f"tokenizer.ggml.{name}"] = [*metadata[f"tokenizer.ggml.{name}"], *extra]
    metadata["tokenizer.ggml.token_type"] = [*types, 3, 4, 5]
    ours = Tokenizer.from_files(gguf_tokenizer_files(metadata))
    hello = ours.encode("hello", bos=False)
    assert ours.encode("<|user|>hello", bos=False) == [500, *hello]
    assert ours.encode("hello<tool>", bos=False) == [*hello, 501]
    assert ours.decode([500, 501]) == "<tool>"


def broken(**changes: object) -> dict[str, Any]:
    metadata = gguf_metadata_of(byte_level("gpt-2"), "gpt-2")
    return {**metadata, **{f"tokenizer.ggml.{name}": value for name, value in changes.items()}}


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({}, "tokenizer.ggml.model"),
        (broken(model="t5"), "'t5'"),
        (broken(pre="chameleon"), "'chameleon'"),
        (broken(pre=None), "too old"),
        (broken(tokens=[]), "no vocabulary"),
        (broken(tokens=[1, 2]), "tokens"),
        (broken(tokens=["a", "a"]), "twice"),
        (broken(token_type=[1]), "token_type"),
        (broken(merges=["nospace"]), "nospace"),
        (broken(merges=["never seen"]), "never"),
        (broken(eos_token_id=10**6), "eos_token_id"),
        ({**spm_metadata(), "tokenizer.ggml.scores": [0.0]}, "scores"),
        ({**spm_metadata(), "tokenizer.ggml.scores": [float("nan")] * 500}, "score"),
    ],
)
def test_a_gguf_that_makes_no_sense(metadata, named):
    with pytest.raises(NumbaInferError, match=named):
        gguf_tokenizer_files(metadata)


def test_an_old_qwen_gguf_names_no_pre_tokenizer():
    metadata = gguf_metadata_of(byte_level("qwen2"), "qwen2")
    del metadata["tokenizer.ggml.pre"]
    files = gguf_tokenizer_files(metadata | {"general.architecture": "qwen2"})
    assert json.loads(files["tokenizer.json"])["normalizer"] == {"type": "NFC"}


def test_llama2c_gives_the_ids_of_the_sentencepiece_model():
    original = Tokenizer.from_files({"tokenizer.model": sentencepiece_model()})
    ours = Tokenizer.from_files(llama2c_tokenizer_files(llama2c_file(sentencepiece_model()), 500), 500)
    for text in [*TEXTS, *CORPUS, "<s>hello</s>"]:
        assert ours.encode(text) == original.encode(text)


def test_stories260ks_tokenizer():
    ours = Tokenizer.from_files(llama2c_tokenizer_files(TOK512, 512), vocab_size=512)
    # BOS and the ids that llama2.c prints for this prompt
    assert ours.encode("Once upon a time") == [1, 403, 407, 261, 378]
    assert ours.decode([1, 403, 407, 261, 378]) == "Once upon a time"
    assert ours.encode("你", bos=False)[1:] == [0xE4 + 3, 0xBD + 3, 0xA0 + 3]
    assert (ours.bos_id, ours.eos_ids, ours.add_bos) == (1, (2,), True)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (b"", 512),
        (TOK512[:3], 512),
        (TOK512[:-1], 512),
        (TOK512[:-13], 512),
        (TOK512, 511),
        (TOK512, 32000),
        (TOK512 + b"\0", 512),
        (struct.pack("<ifi", 7, 0.0, -5) + b"abc", 1),
        (struct.pack("<ifi", 7, 0.0, 2**31 - 1) + b"abc", 1),
        (struct.pack("<ifi", 7, 0.0, 3) + b"\xff\xff\xff", 1),
        ((struct.pack("<fi", 0.0, 1) + b"a").join([struct.pack("<i", 1), b"", b"", b"", b""]), 4),
    ],
)
def test_a_tokenizer_bin_that_lies(data, size):
    with pytest.raises(NumbaInferError):
        llama2c_tokenizer_files(data, size)


@needs_real_files
def test_llama2s_whole_vocabulary_through_tokenizer_bin():
    model = real_file("llama2-tokenizer.model").read_bytes()
    original = Tokenizer.from_files({"tokenizer.model": model})
    ours = Tokenizer.from_files(llama2c_tokenizer_files(llama2c_file(model), 32000), 32000)
    for text in TEXTS + CORPUS:
        assert ours.encode(text) == original.encode(text)


@needs_real_files
@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("qwen2.5-coder-0.5b-instruct.gguf", "tokenizers/qwen2_5/tokenizer.json"),
        ("smollm2-135m-instruct.gguf", None),
    ],
)
def test_real_ggufs(name, original):
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(real_file(name)).fields
    metadata = {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}
    rows = len(metadata["tokenizer.ggml.tokens"])
    files = gguf_tokenizer_files(metadata)
    ours = Tokenizer.from_files(files, vocab_size=rows)
    if original is not None:
        library = tokenizers.Tokenizer.from_file(str(real_file(original)))
        for text in TEXTS + CORPUS:
            assert ours.encode(text) == library.encode(text).ids
    end = metadata["tokenizer.ggml.tokens"].index("<|im_end|>")
    assert ours.eos_ids[0] == end
    assert ours.encode("<|im_end|>") == [end]
    assert ours.decode(ours.encode("12 + 30 = 42")) == "12 + 30 = 42"
