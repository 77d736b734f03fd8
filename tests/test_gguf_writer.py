"""GGUF written and read again: the same model for our reader, the gguf library and, where it is there, llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tiny_tokenizers
from building import DATA, Checkpoints
from command import numbainfer, succeed, write_model
from gguf import GGUFReader
from gguf.quants import dequantize
from tiny_tokenizers import needs_real_files, real_file

from numbainfer import NumbaInferError
from numbainfer.converters.convert import convert
from numbainfer.converters.gguf_tokens import tokenizer_keys
from numbainfer.converters.gguf_writer import write_gguf
from numbainfer.converters.source import open_source
from numbainfer.converters.source_options import SourceOptions
from numbainfer.converters.source_reader import Target
from numbainfer.converters.vocabulary import gguf_tokenizer_files
from numbainfer.tokenizer import Tokenizer

MODELS = ["llama_gqa_tied", "llama3_scaled_untied", "llama_biases", "llama_head_dim", "qwen2_mqa_untied", "qwen3_tied"]
# What a GGUF does not keep: how a config spells it, and what means nothing to the model.
KEPT = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with open_source(path, require_tokenizer=False) as source:
        arrays = {name: tensor.rows(0, tensor.shape[0]) for name, tensor in source.tensors.items()}
        return source.config, arrays


@pytest.mark.parametrize("name", MODELS)
def test_float32_comes_back_bit_for_bit(name: str, checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    with open_source(checkpoint_of(name)) as source:
        write_gguf(source, tmp_path / "m.gguf", "float32")
    config, arrays = read(tmp_path / "m.gguf")
    expected = tiny_models.weights(name)
    assert arrays.keys() == expected.keys()
    for tensor, values in expected.items():
        np.testing.assert_array_equal(arrays[tensor], values, err_msg=tensor)
    theirs = tiny_models.hf_config(name)
    for key in KEPT:
        assert config[key] == theirs.get(key, tiny_models.head_dim(theirs)), key
    assert bool(config.get("rope_scaling")) == bool(theirs["rope_scaling"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float_types(dtype: str, checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    name = "llama_gqa_tied"
    with open_source(checkpoint_of(name)) as source:
        write_gguf(source, tmp_path / "m.gguf", dtype)
    for tensor, found in read(tmp_path / "m.gguf")[1].items():
        expected = tiny_models.weights(name)[tensor]
        if expected.ndim == 2:
            expected = expected.astype(np.float16) if dtype == "float16" else tiny_models.bfloat16_bits(expected)
        np.testing.assert_array_equal(found, expected, err_msg=tensor)


def test_q8_0(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    """int8 in groups of 32 is Q8_0: the gguf library finds the very numbers of the converted model."""
    with open_source(checkpoint_of("llama_int8")) as source:
        convert(source, tmp_path / "model", Target("int8", 32))
    with open_source(tmp_path / "model") as source:
        expected = {name: tensor.rows(0, tensor.shape[0]) for name, tensor in source.tensors.items()}
        write_gguf(source, tmp_path / "m.gguf", "int8")
    stored = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    values = dequantize(stored["blk.1.ffn_down.weight"].data, stored["blk.1.ffn_down.weight"].tensor_type)
    np.testing.assert_array_equal(values, expected["model.layers.1.mlp.down_proj.weight"])
    for name, found in read(tmp_path / "m.gguf")[1].items():
        np.testing.assert_array_equal(found, expected[name], err_msg=name)


@pytest.mark.parametrize("name", ["qwen2_moe_plain", "qwen3_moe_plain"])
def test_experts(name: str, checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    with open_source(checkpoint_of(name)) as source:
        write_gguf(source, tmp_path / "m.gguf", "float32")
    config, arrays = read(tmp_path / "m.gguf")
    for tensor, values in tiny_models.weights(name).items():
        np.testing.assert_array_equal(arrays[tensor], values, err_msg=tensor)
    theirs = tiny_models.hf_config(name)
    for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
        assert config[key] == theirs.get(key, False)


TEXTS = tiny_tokenizers.TEXTS


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "smollm", "gpt-2"])
def test_byte_level_vocabularies_come_back(pre: str) -> None:
    files = {"tokenizer.json": tiny_tokenizers.byte_level(pre).to_str().encode()}
    before = Tokenizer.from_files(files, 620)
    keys = tokenizer_keys(files, 620, None)
    assert keys["tokenizer.ggml.pre"] == pre
    assert len(keys["tokenizer.ggml.tokens"]) == 620
    after = Tokenizer.from_files(gguf_tokenizer_files(keys), 620)
    for text in TEXTS:
        assert after.encode(text) == before.encode(text), text
    assert after.add_bos == before.add_bos


def test_sentencepiece_vocabularies_come_back() -> None:
    files = {"tokenizer.model": tiny_tokenizers.sentencepiece_model()}
    before = Tokenizer.from_files(files)
    after = Tokenizer.from_files(gguf_tokenizer_files(tokenizer_keys(files, 504, None)))
    for text in TEXTS:
        assert after.encode(text) == before.encode(text), text


def test_the_chat_template_and_every_end_come_along(tmp_path: Path) -> None:
    config = {
        "chat_template": "{{ messages }}",
        "eos_token": "<|im_end|>",
        "bos_token": None,
        "pad_token": "<|endoftext|>",
    }
    files = {
        "tokenizer.json": tiny_tokenizers.byte_level("qwen2").to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    tokenizer = Tokenizer.from_files(files)
    keys = tokenizer_keys(files, 605, {"eos_token_id": [0, 2]})
    assert keys["tokenizer.chat_template"] == "{{ messages }}"
    assert keys["tokenizer.ggml.eos_token_id"] == tokenizer.token_to_id("<|im_end|>")
    assert keys["tokenizer.ggml.padding_token_id"] == tokenizer.token_to_id("<|endoftext|>")
    assert "tokenizer.ggml.bos_token_id" not in keys
    assert keys["tokenizer.ggml.add_bos_token"] is False


@needs_real_files
@pytest.mark.parametrize(("folder", "pre"), [("llama3_2", "llama-bpe"), ("qwen2_5", "qwen2"), ("qwen3", "qwen2")])
def test_real_byte_level_vocabularies(folder: str, pre: str) -> None:
    files = {"tokenizer.json": real_file(f"tokenizers/{folder}/tokenizer.json").read_bytes()}
    assert tokenizer_keys(files, 152000, None)["tokenizer.ggml.pre"] == pre


@needs_real_files
def test_llama2s_tokenizer_json_becomes_a_sentencepiece_vocabulary() -> None:
    files = {"tokenizer.json": real_file("tokenizers/llama2/tokenizer.json").read_bytes()}
    before, keys = Tokenizer.from_files(files), tokenizer_keys(files, 32000, None)
    assert keys["tokenizer.ggml.model"] == "llama"
    after = Tokenizer.from_files(gguf_tokenizer_files(keys), 32000)
    for text in (text for text in TEXTS if "<" not in text):
        assert after.encode(text) == before.encode(text), text


def test_what_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "hf", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with open_source(directory) as source, pytest.raises(NumbaInferError, match="not have dynamic RoPE scaling"):
        write_gguf(source, tmp_path / "m.gguf", "int8")
    assert not (tmp_path / "m.gguf").exists()


def test_the_command(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    source, out = checkpoint_of("llama_int8"), tmp_path / "m.gguf"
    assert "as int8" in succeed("convert", source, out, "--to", "gguf").err
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    options = ("abc", "-n", 4, "--temperature", 0, "--json")
    assert len(succeed("run", out, *options).json["tokens"]) == 4
    assert "exists; give another name, or --force" in numbainfer("convert", source, out, "--to", "gguf").error
    succeed("convert", source, out, "--to", "gguf", "--force", "--dtype", "float16")
    (tmp_path / "text").write_text("precious")
    error = numbainfer("convert", source, tmp_path / "text", "--to", "gguf", "--force").error
    assert "--force replaces only GGUF files" in error
    assert "is the source itself" in numbainfer("convert", out, out, "--to", "gguf", "--force").error
    assert "say --to gguf" in numbainfer("convert", source, tmp_path / "other.gguf").err
    assert "groups of 32" in numbainfer("convert", source, tmp_path / "o", "--to", "gguf", "--group-size", 64).err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "text"]


def test_llama_cpp_runs_it(tmp_path: Path) -> None:
    """Token ids, and 32 greedy tokens of stories260K in float32, are llama.cpp's."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is built from source, which CI does not do")
    path = tmp_path / "m.gguf"
    options = SourceOptions(tokenizer=DATA / "tok512.bin")
    with open_source(DATA / "stories260K.bin", options) as source:
        write_gguf(source, path, "float32")
    llama = llama_cpp.Llama(str(path), n_ctx=128, verbose=False)
    ids = llama.tokenize(b"Once upon a time", add_bos=True)
    found: list[int] = []
    for token in llama.generate(ids, temp=0.0, repeat_penalty=1.0):
        found.append(token)
        if len(found) == 32:
            break
    for model in (path, DATA / "stories260K.bin"):
        result = succeed("run", model, "Once upon a time", "-n", 32, "--temperature", 0, "--raw", "--json").json
        assert result["prompt_tokens"] == ids
        assert result["tokens"][:8] == found[:8]  # int8 while loading may part from float32 later on
