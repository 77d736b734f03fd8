"""Meta's layout, llama2.c's versions and training checkpoints, and KuiperLLama's exports."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import lineage_files as lineage
import numpy as np
import pytest
import source_files as files
from building import DATA
from command import numbainfer, succeed
from test_sources import assert_equal, read_all
from tiny_tokenizers import needs_real_files, real_file, sentencepiece_model
from torch_files import write_legacy_torch, write_torch

from numbainfer import NumbaInferError
from numbainfer.converters import tokenizer_files
from numbainfer.converters.convert import convert
from numbainfer.converters.source import Source, open_source
from numbainfer.converters.source_options import SourceOptions
from numbainfer.converters.source_reader import Target
from numbainfer.converters.vocabulary import gguf_tokenizer_files
from numbainfer.tokenizer import Tokenizer

GROUP = 8  # divides 24 and 40


def opened(path: Path, **options: Any) -> Source:
    return open_source(path, SourceOptions(**options), require_tokenizer=False)


def write_bin(directory: Path, tensors: Any, shards: int = 1, legacy: bool = False) -> Path:
    """A Hugging Face directory with pytorch_model.bin."""
    directory.mkdir()
    tied = "lm_head.weight" not in tensors
    (directory / "config.json").write_text(json.dumps(files.CONFIG | {"tie_word_embeddings": tied}))
    write = write_legacy_torch if legacy else write_torch
    if shards == 1:
        write(directory / "pytorch_model.bin", dict(tensors))
        return directory
    weight_map = {}
    for shard, names in enumerate(np.array_split(list(tensors), shards), 1):
        name = f"pytorch_model-{shard:05}-of-{shards:05}.bin"
        write(directory / name, {str(n): tensors[str(n)] for n in names})
        weight_map |= dict.fromkeys(map(str, names), name)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def even(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With a vocabulary of 10: one of 11 can't be cut in two."""
    return {name: array[:10] if len(array) == files.VOCAB else array for name, array in tensors.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_all_roads_give_the_same_float32_model(tmp_path: Path, tied: bool) -> None:
    """The roads that test_sources.py does not go."""
    expected = files.weights(tied)
    roads = {
        ".bin": (write_bin(tmp_path / "bin", expected), expected),
        ".bin in two files": (write_bin(tmp_path / "bins", expected, shards=2), expected),
        ".bin before 1.6": (write_bin(tmp_path / "old", expected, legacy=True), expected),
        "Meta, one part": (lineage.write_meta(tmp_path / "meta", expected, shards=1), expected),
        "Meta, two parts": (lineage.write_meta(tmp_path / "meta2", even(expected)), even(expected)),
        "Meta, LLaMA 3": (lineage.write_meta(tmp_path / "meta3", even(expected), by_vocabulary=True), even(expected)),
        "llama2.c .pt": (lineage.write_training_checkpoint(tmp_path / "ckpt.pt", expected), expected),
        "llama2.c 1": (lineage.write_version1(tmp_path / "v1.bin", expected), expected),
    }
    for road, (path, tensors) in roads.items():
        with opened(path) as source:
            found = read_all(source)
            if tied and road.startswith(("Meta", "llama2.c .pt")):
                np.testing.assert_array_equal(found.pop("lm_head.weight"), found["model.embed_tokens.weight"])
            assert_equal(found, dict(tensors))
            config = {key: source.config[key] for key in files.CONFIG}
            vocab = len(tensors["model.embed_tokens.weight"])
            wanted = files.CONFIG | {"tie_word_embeddings": tied, "vocab_size": vocab}
            if road.startswith("Meta"):
                wanted |= {"max_position_embeddings": 4096}
            assert config == wanted, road
            tensor = source.tensors["model.layers.0.self_attn.q_proj.weight"]
            for start, stop in ((0, 0), (7, 7), (3, 20), (13, 14)):
                np.testing.assert_array_equal(tensor.rows(start, stop), tensors[tensor.name][start:stop], err_msg=road)


def test_conversions_of_all_roads_are_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineage, "VOCAB", 10)
    tensors = even(files.weights(False))
    config = files.CONFIG | {"vocab_size": 10, "tie_word_embeddings": False}
    roads = [
        files.write_huggingface(tmp_path / "hf", tensors, config),
        write_bin(tmp_path / "bin", tensors),
        lineage.write_meta(tmp_path / "meta", tensors),
        lineage.write_version1(tmp_path / "v1.bin", tensors),
        files.write_gguf(tmp_path / "m.gguf", files.as_gguf(tensors)),
    ]
    (tmp_path / "bin" / "config.json").write_text(json.dumps(config))
    vocabulary = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": [*"abc"]}
    (tmp_path / "tokenizer.json").write_bytes(gguf_tokenizer_files(vocabulary)["tokenizer.json"])
    results = set()
    for number, path in enumerate(roads):
        with opened(path, tokenizer=tmp_path / "tokenizer.json") as source:
            convert(source, tmp_path / f"out{number}", Target("float32"))
        results.add((tmp_path / f"out{number}" / "model.safetensors").read_bytes())
    assert len(results) == 1


def test_metas_tokenizer_may_lie_above(tmp_path: Path) -> None:
    directory = lineage.write_meta(tmp_path / "llama-2-7b", files.weights(), shards=1)
    assert not opened(directory).tokenizer_files
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    assert opened(directory).tokenizer_files == {"tokenizer.model": sentencepiece_model()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("write", [lineage.write_version2, lineage.write_kuiper_int8])
def test_int8(tmp_path: Path, tied: bool, write: Any) -> None:
    tensors = files.weights(tied)
    with opened(write(tmp_path / "m.bin", tensors, GROUP)) as source:
        found = read_all(source)
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        if array.ndim == 1 or (write is lineage.write_kuiper_int8 and "embed" in name):
            expected = array
        else:  # a row's groups go with it wherever it moves
            expected = lineage.dequantized(array, GROUP)
        np.testing.assert_array_equal(found[name], expected, err_msg=name)


def test_groups_that_run_across_rows(tmp_path: Path) -> None:
    """KuiperLLama's scales belong to the flattened matrix: groups of 16 end within rows of 24."""
    tensors = files.weights()
    with opened(lineage.write_kuiper_int8(tmp_path / "m.bin", tensors, 16)) as source:
        name = "model.layers.1.mlp.up_proj.weight"
        rows = [source.tensors[name].rows(start, min(start + 3, 40)) for start in range(0, 40, 3)]
    np.testing.assert_array_equal(np.concatenate(rows), lineage.dequantized(tensors[name], 16))


def biased(tied: bool = True) -> dict[str, np.ndarray]:
    tensors = files.weights(tied)
    rng = np.random.default_rng(0)
    for layer in range(files.LAYERS):
        for part in ("q_proj", "k_proj", "v_proj"):
            name = f"model.layers.{layer}.self_attn.{part}"
            tensors[f"{name}.bias"] = rng.standard_normal(len(tensors[f"{name}.weight"]), np.float32)
    return tensors


def test_kuiper(tmp_path: Path) -> None:
    """Its exports from Hugging Face are half-split: for Qwen2.5 by its biases, for LLaMA when the user says so."""
    tensors = files.weights()
    path = lineage.write_kuiper(tmp_path / "llama.bin", tensors, biases=False)
    with opened(path, rope_layout="half-split", rope_theta=5e5) as source:
        assert_equal(read_all(source), tensors)
        assert source.config["rope_theta"] == 5e5
    q = "model.layers.0.self_attn.q_proj.weight"
    assert (opened(path).tensors[q].rows(0, 24) != tensors[q]).any()  # taken for llama2.c's own

    qwen = biased()
    with opened(lineage.write_kuiper(tmp_path / "qwen.bin", qwen, biases=True)) as source:
        assert_equal(read_all(source), qwen)
        assert source.config["architectures"] == ["Qwen2ForCausalLM"]
        assert (source.config["rope_theta"], source.config["rms_norm_eps"]) == (1e6, 1e-6)
        assert source.generation_config is None


def test_a_config_of_the_users(tmp_path: Path) -> None:
    path = lineage.write_version1(tmp_path / "m.bin", files.weights())
    config = tmp_path / "config.json"
    given = {**files.CONFIG, "rope_theta": 5e5, "rms_norm_eps": 1e-6, "eos_token_id": 7}
    config.write_text(json.dumps(given))
    assert opened(path, config=config).config == given
    for options, problem in (
        ({"config": config, "rope_theta": 1.0}, "--rope-theta goes without --config"),
        ({"config": tmp_path / "none"}, "cannot read"),
    ):
        with pytest.raises(NumbaInferError, match=problem):
            opened(path, **options)
    config.write_text(json.dumps({**given, "num_attention_heads": 2}))
    with pytest.raises(NumbaInferError, match="says num_attention_heads 2, the weights 4"):
        opened(path, config=config)


@pytest.mark.parametrize("option", [{"rope_theta": 1.0}, {"rope_layout": "half-split"}, {"config": "config.json"}])
def test_options_where_the_source_knows(tmp_path: Path, option: dict[str, Any]) -> None:
    tensors = files.weights()
    sources = [
        files.write_huggingface(tmp_path / "hf", tensors),
        files.write_gguf(tmp_path / "m.gguf", files.as_gguf(tensors)),
    ]
    if "config" not in option:
        sources.append(lineage.write_meta(tmp_path / "meta", tensors, shards=1))
    for path in sources:
        with pytest.raises(NumbaInferError, match=r"--(rope|config).* is for models that don't say it themselves"):
            opened(path, **option)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, (4096, 10000.0, None)),
        ({"norm_eps": 1e-6}, (2048, 10000.0, None)),
        ({"rope_theta": 500000.0}, (8192, 500000.0, None)),
        ({"rope_theta": 500000.0, "use_scaled_rope": True}, (131072, 500000.0, 32.0)),
        ({"use_scaled_rope": True, "rope_scaling_factor": 8}, (131072, 10000.0, 8.0)),
    ],
)
def test_meta_params(tmp_path: Path, params: dict[str, Any], expected: tuple[Any, ...]) -> None:
    directory = lineage.write_meta(tmp_path / "m", files.weights(), shards=1, params=lineage.PARAMS | params)
    config = opened(directory).config
    scaling = config.get("rope_scaling")
    assert (config["max_position_embeddings"], config["rope_theta"], scaling and scaling["factor"]) == expected


def test_meta_parts_that_do_not_fit(tmp_path: Path) -> None:
    tensors = even(files.weights())
    directory = lineage.write_meta(tmp_path / "m", tensors)
    second = directory / "consolidated.01.pth"
    for state, problem in (
        (lineage.meta_state(tensors), r"tok_embeddings.weight' is \[10, 24\] float32 in part 1"),
        ({"norm.weight": tensors["model.norm.weight"]}, "tok_embeddings.weight' is missing in part 1"),
    ):
        write_torch(second, state)
        with pytest.raises(NumbaInferError, match=problem):
            opened(directory)
    second.rename(directory / "consolidated.02.pth")
    with pytest.raises(NumbaInferError, match=r"consolidated\.00\.pth and all that follow are wanted"):
        opened(directory)
    lineage.write_meta(tmp_path / "moe", tensors, shards=1, params=lineage.PARAMS | {"moe": {"num_experts": 8}})
    with pytest.raises(NumbaInferError, match=r"parameter 'moe' = .* is not supported"):
        opened(tmp_path / "moe")


def test_a_lone_part(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "pytorch_model.bin", files.weights())
    with pytest.raises(NumbaInferError, match=r"give the directory that has it and its config\.json or params\.json"):
        opened(path)


def ranks_file(path: Path, words: list[bytes]) -> None:
    tokens = [bytes([byte]) for byte in range(256)] + words
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))


def test_tiktoken_ranks(tmp_path: Path) -> None:
    """Of two neighbours whose union is a token, those of the lowest rank merge first."""
    words = [b"he", b"ll", b"llo", b"hello", b" w", b"or", b" wor", b"ld", b" world"]
    ranks_file(tmp_path / "tokenizer.model", words)
    size = 256 + len(words) + 256
    tokenizer = Tokenizer.from_files(tokenizer_files.from_directory(tmp_path, size), size)
    assert tokenizer.encode("hello world", bos=False) == [259, 264]
    assert tokenizer.encode("hell", bos=False) == [256, 257]
    bos = 256 + len(words)
    assert tokenizer.encode("<|eot_id|>") == [bos, bos + 9]
    assert set(tokenizer.eos_ids) == {bos + 1, bos + 8, bos + 9}
    with pytest.raises(NumbaInferError, match=r"265 ranks, which with 256 special tokens are not the model's 300"):
        tokenizer_files.read(tmp_path / "tokenizer.model", 300)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIQ== 1\n")
    with pytest.raises(NumbaInferError, match="damaged at its line 2"):
        tokenizer_files.read(tmp_path / "tokenizer.model", size)


@needs_real_files
def test_llama3_ranks_are_its_tokenizer_json() -> None:
    theirs = json.loads(real_file("tokenizers/llama3_2/tokenizer.json").read_bytes())
    made = json.loads(tokenizer_files.from_directory(real_file("tokenizers/llama3_tiktoken"), 128256)["tokenizer.json"])
    special = {token["content"]: token["id"] for token in theirs["added_tokens"]}
    assert made["model"]["vocab"] == theirs["model"]["vocab"] | special
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in theirs["model"]["merges"]]
    assert sorted(map(tuple, made["model"]["merges"])) == sorted(pairs)
    assert {token["content"]: token["id"] for token in made["added_tokens"]} == special


def test_the_options_reach_every_command(tmp_path: Path) -> None:
    """stories260K as KuiperLLama exports it: with --rope-layout half-split it tells the same story."""
    with open_source(DATA / "stories260K.bin", require_tokenizer=False) as source:
        layers = source.config["num_hidden_layers"]
        names = [f"model.layers.{layer}.{part}.weight" for part in files.PARTS for layer in range(layers)]
        names = ["model.embed_tokens.weight", *names, "model.norm.weight"]
        arrays = [source.tensors[name].rows(0, source.tensors[name].shape[0]) for name in names]
        tables = np.zeros(source.config["max_position_embeddings"] * source.config["head_dim"], np.float32)
    header = (DATA / "stories260K.bin").read_bytes()[:28]
    model = tmp_path / "kuiper.bin"
    model.write_bytes(header + b"".join(array.tobytes() for array in [*arrays, tables]))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**source.config, "rope_theta": 2.0}))

    prompt = ("Once upon a time", "-n", 12, "--temperature", 0, "--json")
    options = ("--tokenizer", DATA / "tok512.bin", "--rope-layout", "half-split")
    expected = succeed("run", DATA / "stories260K.bin", *prompt).json["tokens"]
    assert succeed("run", model, *prompt, *options).json["tokens"] == expected
    assert succeed("run", model, *prompt, *options[:2]).json["tokens"] != expected
    assert succeed("run", model, *prompt, *options, "--rope-theta", 2).json["tokens"] != expected
    assert succeed("run", model, *prompt, *options, "--config", config).json["tokens"] != expected
    succeed("convert", model, tmp_path / "out", *options, "--rope-theta", 20000)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_theta"] == 20000
    succeed("info", model, *options)
    succeed("bench", model, *options, "-p", 4, "-n", 0, "-r", 1)
    error = numbainfer("run", tmp_path / "out", "x", "--rope-theta", 2).error
    assert "--rope-theta is for models that don't say it themselves; a converted model has its own" in error
