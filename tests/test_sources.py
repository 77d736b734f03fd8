"""open_source: the format is told by content, and every format gives the same model."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import source_files as files
from safetensors.numpy import save_file

from numbainfer import NumbaInferError
from numbainfer.converters.source import Source, open_source
from numbainfer.converters.source_options import SourceOptions
from numbainfer.safetensors_file import SafetensorsWriter


def read_all(source: Source, chunk: int = 5) -> dict[str, np.ndarray]:
    """Every tensor, put together from chunks of rows as a converter reads them."""
    arrays = {}
    for name, tensor in source.tensors.items():
        starts = range(0, tensor.shape[0], chunk)
        rows = [tensor.rows(start, min(start + chunk, tensor.shape[0])) for start in starts]
        arrays[name] = np.concatenate(rows)
        assert arrays[name].shape == tensor.shape
        assert arrays[name].dtype == ("uint16" if tensor.dtype == "bfloat16" else tensor.dtype)
    return arrays


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_all_roads_give_the_same_float32_model(tmp_path: Path, tied: bool) -> None:
    expected = files.weights(tied)
    roads = {
        "huggingface": files.write_huggingface(tmp_path / "hf", expected, files.CONFIG | {"tie_word_embeddings": tied}),
        # Named against their content: only that may count.
        "gguf": files.write_gguf(tmp_path / "model.bin", files.as_gguf(expected)),
        "llama2c": files.write_llama2c(tmp_path / "model.gguf", expected),
    }
    for road, path in roads.items():
        with open_source(path, require_tokenizer=False) as source:
            assert source.format == road
            assert_equal(read_all(source), expected)
            shared = {key: source.config[key] for key in files.CONFIG}
            assert shared == files.CONFIG | {"tie_word_embeddings": tied}
            tensor = source.tensors["model.layers.0.self_attn.q_proj.weight"]
            for start, stop in ((0, 0), (7, 7), (3, 20)):  # rows of heads cut anywhere
                np.testing.assert_array_equal(tensor.rows(start, stop), expected[tensor.name][start:stop])
            with pytest.raises(IndexError):
                tensor.rows(0, tensor.shape[0] + 1)


def test_arrays_outlive_their_source(tmp_path: Path) -> None:
    expected = files.weights()
    for path in (
        files.write_huggingface(tmp_path / "hf", expected),
        files.write_gguf(tmp_path / "m.gguf", files.as_gguf(expected)),
        files.write_llama2c(tmp_path / "m.bin", expected),
    ):
        source = open_source(path, require_tokenizer=False)
        rows = source.tensors["model.embed_tokens.weight"].rows(2, 5)
        assert not rows.flags.owndata  # used in place, not copied
        source.close()
        np.testing.assert_array_equal(rows, expected["model.embed_tokens.weight"][2:5])


def test_huggingface_dtypes_and_passing_through(tmp_path: Path) -> None:
    bits = np.arange(12, dtype=np.uint16).reshape(3, 4)
    config = {"model_type": "qwen3", "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    directory = files.write_huggingface(tmp_path / "hf", {}, config)
    (directory / "model.safetensors").unlink()
    # The safetensors library has no bfloat16 for NumPy.
    entries = [("bf", "BF16", (3, 4)), ("model.rotary_emb.inv_freq", "F32", (4,)), ("half", "F16", (2,))]
    with SafetensorsWriter(directory / "model.safetensors", entries) as writer:
        writer.write("bf", bits)
        writer.write("model.rotary_emb.inv_freq", np.ones(4, np.float32))
        writer.write("half", np.ones(2, np.float16))
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).write_text(f"{{{name}}}")
    (directory / "README.md").write_text("no tokenizer file")

    source = open_source(directory)
    assert source.config == config
    assert source.generation_config == {"eos_token_id": [1, 2]}
    assert source.tokenizer_files["tokenizer.json"] == b"{tokenizer.json}"
    assert source.tokenizer_files.keys() == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert source.tensors.keys() == {"bf", "half"}  # the rotary_emb.inv_freq of old checkpoints is left out
    assert [source.tensors[name].dtype for name in ("bf", "half")] == ["bfloat16", "float16"]
    np.testing.assert_array_equal(read_all(source)["bf"], bits)


def write_shards(directory: Path) -> dict[str, np.ndarray]:
    tensors = files.weights()
    names = list(tensors)
    weight_map = {}
    for shard, part in (("a.safetensors", names[:7]), ("b.safetensors", names[7:])):
        save_file({name: tensors[name] for name in part}, directory / shard)
        weight_map |= dict.fromkeys(part, shard)
    (directory / "config.json").write_text(json.dumps(files.CONFIG))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def test_sharded(tmp_path: Path) -> None:
    expected = write_shards(tmp_path)
    with open_source(tmp_path, require_tokenizer=False) as source:
        assert_equal(read_all(source), expected)


@pytest.mark.parametrize("shard", ["../b.safetensors", "/etc/passwd", "sub/b", "..", "", 7, "a\nb", "\ud800"])
def test_an_index_stays_in_its_directory(tmp_path: Path, shard: object) -> None:
    write_shards(tmp_path)
    index = {"weight_map": {"model.norm.weight": shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(NumbaInferError, match="is no file name"):
        open_source(tmp_path, require_tokenizer=False)


def test_an_index_that_disagrees_with_its_shards(tmp_path: Path) -> None:
    write_shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    weight_map = json.loads(text)["weight_map"]
    for changed, problem in (
        (weight_map | {"extra.weight": "b.safetensors"}, "extra.weight.*is missing"),
        ({k: v for k, v in weight_map.items() if k != "model.norm.weight"}, "model.norm.weight' is not in"),
        (weight_map | {"extra.weight": "c.safetensors"}, "c.safetensors is missing"),
        ({}, "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(NumbaInferError, match=problem):
            open_source(tmp_path, require_tokenizer=False)


def test_tokenizers_from_elsewhere(tmp_path: Path) -> None:
    model = files.write_llama2c(tmp_path / "m.bin", files.weights())
    with pytest.raises(NumbaInferError, match=r"no tokenizer; put tokenizer.json or .*beside it"):
        open_source(model)
    sentencepiece = b"\n\x0e\n\x05<unk>"
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece)
    assert open_source(model).tokenizer_files == {"tokenizer.model": sentencepiece}
    assert open_source(model).generation_config == {"bos_token_id": 1, "eos_token_id": [1, 2]}

    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(NumbaInferError, match=r"none of tokenizer\.json"):
        open_source(model, SourceOptions(tokenizer=other))
    (other / "tokenizer.json").write_bytes(b" {}")
    for path in (other, other / "tokenizer.json"):
        assert open_source(model, SourceOptions(tokenizer=path)).tokenizer_files == {"tokenizer.json": b" {}"}
    with pytest.raises(NumbaInferError, match=r"missing\.bin"):
        open_source(model, SourceOptions(tokenizer=tmp_path / "missing.bin"))


@pytest.mark.skipif("NUMBAINFER_TEST_MODELS" not in os.environ, reason="names a folder of real models")
def test_real_llama2c_models() -> None:
    folder = Path(os.environ["NUMBAINFER_TEST_MODELS"])
    for name, count in (("stories260K.bin", 260_032), ("stories15M.bin", 15_191_712)):
        with open_source(folder / name, require_tokenizer=False) as source:
            assert sum(array.size for array in read_all(source, 4096).values()) == count
    assert open_source(folder / "stories260K.bin").tokenizer_files  # tok512.bin lies beside it
