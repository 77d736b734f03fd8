"""Ids against the libraries used directly, streaming against decoding, and broken files."""

from __future__ import annotations

import json
import pickle
import random

import pytest
import sentencepiece
import tokenizers
from tiny_tokenizers import TEXTS, byte_level, needs_real_files, real_file, sentencepiece_model

from numbainfer.errors import NumbaInferError
from numbainfer.tokenizer import Tokenizer

PRES = ("qwen2", "llama-bpe", "smollm", "gpt-2")


def json_files(pre: str = "qwen2", **config: object) -> dict[str, bytes]:
    files = {"tokenizer.json": byte_level(pre).to_str().encode()}
    return files | {"tokenizer_config.json": json.dumps(config).encode()} if config else files


def spm_files(**config: object) -> dict[str, bytes]:
    files = {"tokenizer.model": sentencepiece_model()}
    return files | {"tokenizer_config.json": json.dumps(config).encode()} if config else files


@pytest.mark.parametrize("pre", PRES)
@pytest.mark.parametrize("text", TEXTS)
def test_json_ids_and_text_are_the_librarys(pre, text):
    library, ours = byte_level(pre), Tokenizer.from_files(json_files(pre))
    if not text.startswith("<|im_start|>"):  # where the library doubles a BOS that is written out
        assert ours.encode(text) == library.encode(text).ids
    ids = library.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, bos=False) == ids
    assert ours.decode(ids) == library.decode(ids)
    assert ours.decode(ids, skip_special=False) == library.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_ids_and_text_are_the_librarys(text):
    library = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    ours = Tokenizer.from_files(spm_files())
    ids = library.encode(text)
    assert ours.encode(text) == [1, *ids]
    assert ours.decode(ids) == library.decode(ids) == text.replace("\u2581", " ")


def test_special_tokens_in_a_sentencepiece_text():
    ours = Tokenizer.from_files(spm_files())
    hello = ours.encode("hello", bos=False)
    assert ours.encode("<s>hello</s>hello<unk>") == [1, *hello, 2, *hello, 0]
    assert ours.decode([1, *hello, 2]) == "hello"
    # Without `legacy` only the start of a text gets sentencepiece's space.
    modern = Tokenizer.from_files(spm_files(legacy=False))
    spaced = modern.encode("<s> hello</s>", bos=False)
    assert spaced == [1, *hello, 2]
    assert modern.encode("<s>hello", bos=False) != [1, *hello]
    assert modern.decode(modern.encode("hello</s>hello")) == "hellohello"


def test_tokens_added_beside_a_sentencepiece_model():
    added = {
        "500": {"content": "<|user|>", "special": True, "rstrip": True},
        "501": {"content": "<tool>", "special": False},
    }
    ours = Tokenizer.from_files(spm_files(added_tokens_decoder=added, eos_token="<|user|>"))
    assert ours.vocab_size == 502
    assert ours.encode("<|user|> \nhello<tool>", bos=False) == [500, *ours.encode("hello", bos=False), 501]
    assert ours.decode([500, 501]) == "<tool>"
    assert ours.eos_ids == (500,)


def test_bos_follows_the_files_and_is_never_doubled():
    ids = byte_level("llama-bpe").encode("hi", add_special_tokens=False).ids
    follows = Tokenizer.from_files(json_files("llama-bpe"))
    assert (follows.add_bos, follows.bos_id) == (True, 1)
    assert follows.special_tokens == {"bos_token": "<|im_start|>"}
    assert follows.encode("hi") == follows.encode("<|im_start|>hi") == [1, *ids]
    assert follows.encode("hi", bos=False) == ids
    assert follows.encode("") == [1]
    told = Tokenizer.from_files(json_files("llama-bpe", add_bos_token=False, bos_token="<|im_start|>"))
    assert told.encode("hi") == ids
    assert told.encode("hi", bos=True) == [1, *ids]
    none = Tokenizer.from_files(json_files("qwen2", bos_token=None) | {"config.json": b'{"bos_token_id": 1}'})
    assert none.bos_id is None
    assert none.encode("hi", bos=True) == none.encode("hi")
    from_config = Tokenizer.from_files(json_files("qwen2") | {"config.json": b'{"bos_token_id": 1}'})
    assert (from_config.bos_id, from_config.add_bos) == (1, False)


def test_eos_ids_are_the_union_in_order():
    files = json_files(eos_token={"content": "<|im_end|>", "lstrip": False}, pad_token="<|endoftext|>")
    files["generation_config.json"] = b'{"eos_token_id": [1, 2]}'
    files["config.json"] = b'{"eos_token_id": 0}'
    ours = Tokenizer.from_files(files)
    assert ours.eos_ids == (1, 2, 0)
    assert ours.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert set(ours.files) == set(files) - {"config.json"}
    assert Tokenizer.from_files(spm_files()).eos_ids == (2,)


def test_chat_template_sources():
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert Tokenizer.from_files(json_files()).chat_template is None
    assert Tokenizer.from_files(json_files(chat_template="C")).chat_template == "C"
    assert Tokenizer.from_files(json_files(chat_template=named)).chat_template == "D"
    files = json_files(chat_template="C")
    assert Tokenizer.from_files(files | {"chat_template.jinja": "J{{ é }}".encode()}).chat_template == "J{{ é }}"
    assert Tokenizer.from_files(json_files() | {"chat_template.json": b'{"chat_template": "P"}'}).chat_template == "P"


@pytest.mark.parametrize("pre", [*PRES, "sentencepiece"])
def test_streaming_is_decoding_on_random_ids(pre):
    ours = Tokenizer.from_files(spm_files() if pre == "sentencepiece" else json_files(pre))
    rng = random.Random(7)
    for _ in range(300):
        # half of them bytes, which seldom are UTF-8, and a few that the vocabulary lacks
        ids = [rng.choice((rng.randrange(3, 259), rng.randrange(-2, 620))) for _ in range(rng.randrange(20))]
        stream = ours.stream()
        pieces = [stream.push(index) for index in ids]
        assert "".join(pieces) + stream.flush() == ours.decode(ids)
        if pre != "sentencepiece":
            known = [index for index in ids if index >= 0]
            assert ours.decode(ids) == byte_level(pre).decode(known)


def test_random_pieces_decode_as_sentencepiece_does():
    library = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    ours = Tokenizer.from_files(spm_files())
    rng = random.Random(8)
    space_byte = library.piece_to_id("<0x20>")  # the library keeps this one where it drops a leading space
    for _ in range(300):
        ids = [rng.randrange(3, 500) for _ in range(12)]
        if ids[0] != space_byte:
            assert ours.decode(ids) == library.decode(ids)


@pytest.mark.parametrize("files", [json_files(), spm_files()], ids=["byte-level", "sentencepiece"])
def test_a_stream_gives_whole_characters_only(files):
    ours = Tokenizer.from_files(files)
    text = "a 🤖 안 b"  # not in the training text, so bytes
    stream = ours.stream()
    pieces = [stream.push(index) for index in ours.encode(text, bos=False)]
    assert "".join(pieces) == text
    assert stream.flush() == ""
    assert "🤖" in "".join(pieces)
    assert all("\ufffd" not in piece for piece in pieces)
    assert pieces.count("") >= 3
    # Cut inside a character: nothing is said of it until the end.
    cut = ours.stream()
    assert "".join(cut.push(index) for index in ours.encode("🤖", bos=False)[:-1]) == ""
    assert set(cut.flush()) == {"\ufffd"}


def test_a_text_that_goes_on_keeps_its_space():
    ours = Tokenizer.from_files(spm_files())
    ids = ours.encode("the dog", bos=False)
    assert ours.decode(ids) == "the dog"
    assert ours.decode(ids, at_start=False) == " the dog"
    assert ours.stream(at_start=False).push(ids[0]).startswith(" ")


def test_token_lookups():
    ours = Tokenizer.from_files(json_files())
    assert ours.token_to_id("<|im_end|>") == 2
    assert ours.token_to_id("no such token") is None
    assert ours.token_bytes(2) == b"<|im_end|>"
    assert ours.token_bytes(10**6) == b""
    spm = Tokenizer.from_files(spm_files())
    assert (spm.token_to_id("</s>"), spm.token_to_id("no such token")) == (2, None)
    assert spm.token_bytes(3 + 0xE4) == b"\xe4"


@pytest.mark.parametrize("files", [json_files(), spm_files(legacy=False)], ids=["json", "model"])
def test_a_tokenizer_survives_pickling(files):
    ours = Tokenizer.from_files(files)
    assert pickle.loads(pickle.dumps(ours)).encode(TEXTS[4]) == ours.encode(TEXTS[4])


def test_from_directory_reads_only_a_tokenizers_files(tmp_path):
    for name, data in {**json_files(eos_token="<|im_end|>"), "model.safetensors": b"not read"}.items():
        (tmp_path / name).write_bytes(data)
    assert Tokenizer.from_directory(tmp_path).eos_ids == (2,)
    with pytest.raises(NumbaInferError, match="no tokenizer"):
        Tokenizer.from_directory(tmp_path / "nowhere")


NO_DECODER = json.dumps({**json.loads(json_files()["tokenizer.json"]), "decoder": None}).encode()
BROKEN = [
    ({}, "neither"),
    ({"tokenizer.json": b"{}"}, "tokenizer.json"),
    ({"tokenizer.json": b"[" * 100_000}, "tokenizer.json"),
    ({"tokenizer.json": json_files()["tokenizer.json"][:-40]}, "tokenizer.json"),
    ({"tokenizer.json": NO_DECODER}, "decoder"),
    ({"tokenizer.model": b""}, "tokenizer.model"),
    ({"tokenizer.model": sentencepiece_model()[:2000]}, "tokenizer.model"),
    ({"tokenizer.model": b"IQ== 0\nIg== 1\n"}, "tiktoken"),
    (json_files() | {"tokenizer_config.json": b'{"eos_token": '}, "tokenizer_config.json"),
    (json_files() | {"tokenizer_config.json": b"\xff\xfe\x00"}, "tokenizer_config.json"),
    (json_files() | {"generation_config.json": b"[1]"}, "generation_config.json"),
    (json_files() | {"generation_config.json": b'{"eos_token_id": "two"}'}, "eos_token_id"),
    (json_files() | {"chat_template.jinja": b"\xff"}, "chat_template.jinja"),
    (json_files(chat_template=3), "chat_template"),
    (json_files(bos_token="<nobody>"), "<nobody>"),
    (spm_files(added_tokens_decoder={"x": {}}), "added token"),
]


@pytest.mark.parametrize(("files", "named"), BROKEN)
def test_broken_files_give_one_line(files, named):
    with pytest.raises(NumbaInferError, match=named) as raised:
        Tokenizer.from_files(files)
    assert "\n" not in str(raised.value)


def test_ids_past_the_model_are_refused():
    size = byte_level("qwen2").get_vocab_size()
    assert Tokenizer.from_files(json_files(), vocab_size=size).vocab_size == size
    with pytest.raises(NumbaInferError, match=f"ids up to {size - 1}"):
        Tokenizer.from_files(json_files(), vocab_size=size - 1)
    with pytest.raises(NumbaInferError, match="499"):
        Tokenizer.from_files(spm_files(), vocab_size=499)


def test_text_that_is_not_unicode_is_refused():
    for files in (json_files(), spm_files()):
        with pytest.raises(NumbaInferError, match="Unicode"):
            Tokenizer.from_files(files).encode("\udc80")


@needs_real_files
@pytest.mark.parametrize("name", ["llama2", "llama3", "llama3_1", "llama3_2", "qwen2_5", "qwen3"])
def test_real_tokenizers(name):
    folder = real_file(f"tokenizers/{name}")
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = Tokenizer.from_directory(folder)
    rng = random.Random(name)
    for text in TEXTS:
        assert ours.encode(text) == library.encode(text).ids
        ids = library.encode(text).ids
        assert ours.decode(ids) == library.decode(ids)
    for _ in range(300):
        ids = [rng.randrange(ours.vocab_size) for _ in range(12)]
        assert ours.decode(ids) == library.decode(ids)


@needs_real_files
def test_llama2s_sentencepiece_model_gives_the_ids_of_its_json():
    model = Tokenizer.from_files({"tokenizer.model": real_file("llama2-tokenizer.model").read_bytes()})
    converted = Tokenizer.from_directory(real_file("tokenizers/llama2"))
    for text in [*TEXTS, "<s>[INST] hi [/INST] yes</s><s>[INST]no"]:
        if text != " " * len(text):  # a text of spaces only: the JSON form has no token of two spaces there
            assert model.encode(text) == converted.encode(text)
