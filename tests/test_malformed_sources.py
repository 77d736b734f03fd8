"""Broken and lying files: each ends in one NumbaInferError, quickly, and in nothing else."""

import os
import random
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import source_files as files

from numbainfer import NumbaInferError
from numbainfer.converters.source import open_source


def message(path: Path) -> str | None:
    """What open_source, and reading all that it opens, has against `path`; None if nothing."""
    try:
        with open_source(path, require_tokenizer=False) as source:
            for tensor in source.tensors.values():
                tensor.rows(0, tensor.shape[0])
    except NumbaInferError as error:
        text = str(error)
    else:
        return None
    assert "\n" not in text
    assert str(path) in text
    return text


def assert_refused(path: Path, contents: Iterable[bytes]) -> None:
    for number, content in enumerate(contents):
        path.write_bytes(content)
        assert message(path) is not None, f"case {number}"


def flips(data: bytes, bits: Iterable[int]) -> Iterable[bytes]:
    for bit in bits:
        yield data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def small_gguf(path: Path) -> tuple[bytes, int]:
    """A GGUF with a vocabulary, and where its tensors' bytes begin."""
    tensors = {
        "token_embd.weight": np.ones((files.VOCAB, files.HIDDEN), np.float32),
        "blk.0.attn_q.weight": np.ones((24, 24), np.float16),
    }
    files.write_gguf(path, tensors, files.gguf_metadata() | files.GGUF_TOKENIZER)
    data = path.read_bytes()
    return data, data.index(b"blk.0.attn_q.weight") + 64


def test_paths(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README").touch()
    for path, problem in (
        (tmp_path / "missing.gguf", "no such file or directory"),
        (tmp_path / ("x" * 300), "cannot read .*name too long"),
        (tmp_path / "empty", "it is empty"),
        (tmp_path / "other", "has no config.json"),
        (Path("/dev/null"), "neither a file nor a directory"),
    ):
        with pytest.raises(NumbaInferError, match=problem):
            open_source(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "it is empty"),
        (b"Once upon a time, there was a text.", "give a Hugging Face or Meta directory"),
        (b"PK\x03\x04" + bytes(60), "truncated or damaged: File is not a zip file"),
        ((50).to_bytes(8, "little") + b'{"a":1}' + bytes(60), "looks like safetensors; give the directory"),
        (struct.pack("<Iiiiiiiii", 0x616B3432, 1, 64, 172, 5, 8, 4, 512, 512), "truncated or damaged"),
        (bytes(100), "give a Hugging Face or Meta directory"),
    ],
)
def test_files_of_other_kinds(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(NumbaInferError, match=problem):
        open_source(tmp_path / "file")


def test_llama2c(tmp_path: Path) -> None:
    path = files.write_llama2c(tmp_path / "m.bin", files.weights())
    data = path.read_bytes()
    assert_refused(path, (data[:size] for size in [*range(40), *range(40, len(data), 997), len(data) - 1]))
    assert_refused(path, [data + b"\0"])
    # The sign of the vocabulary's size says whether the head is shared: even that changes the file's size.
    assert_refused(path, flips(data, range(28 * 8)))
    limits = [struct.pack("<7i", *[2**31 - 1] * 7), struct.pack("<7i", *[-(2**31)] * 7)]
    assert_refused(path, [limit + data[28:] for limit in limits])
    path.write_bytes(data[:-4])
    assert "truncated" in (message(path) or "")


@pytest.mark.parametrize("version", [2, 3])
def test_gguf_truncations(tmp_path: Path, version: int) -> None:
    path = tmp_path / "m.gguf"
    data, header = small_gguf(path)
    data = data[:4] + struct.pack("<I", version) + data[8:]
    path.write_bytes(data)
    assert message(path) is None
    ends = [*range(header), *range(header, len(data) - 64, 101)]
    assert_refused(path, (data[:size] for size in ends))


def test_gguf_flipped_bits(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    data, header = small_gguf(path)
    # One bit of each byte, by a seed; the highest bit of each too, which makes lengths enormous.
    rng = random.Random(0)
    bits = [8 * byte + bit for byte in range(header) for bit in (rng.randrange(7), 7)]
    refused = 0
    for content in flips(data, bits):
        path.write_bytes(content)
        refused += message(path) is not None
    assert refused > len(bits) / 3  # the others change a name or a number to another that makes sense


@pytest.mark.parametrize("value", [2**16 + 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1])
def test_gguf_counts_that_lie(tmp_path: Path, value: int) -> None:
    path = tmp_path / "m.gguf"
    data, _ = small_gguf(path)
    lie = struct.pack("<Q", value)
    tokens = data.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8  # key type, item type
    first = data.index(b"token_embd.weight")
    places = [
        8,  # tensor count
        16,  # key count
        24,  # the first key's length
        tokens,  # an array's count
        tokens + 8,  # a string's length
        first - 8,  # a tensor name's length
        first + 17 + 4,  # its first dimension
        first + 17 + 4 + 16 + 4,  # its offset
    ]
    assert_refused(path, [data[:place] + lie + data[place + 8 :] for place in places])


def test_gguf_versions(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    data, _ = small_gguf(path)
    for version, problem in (
        (b"\1\0\0\0", "version 1"),
        (b"\0\0\0\3", "big-endian"),
        (b"\4\0\0\0", "version 4"),
    ):
        path.write_bytes(data[:4] + version + data[8:])
        assert f"{problem} GGUF is not supported" in (message(path) or "")


def config_json(content: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / "config.json").write_bytes(content) and None


def only(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / "model.safetensors").rename(directory / name) and None


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (config_json(b"not JSON"), "config.json is not valid JSON"),
        (config_json(b'{"a": '), "config.json is not valid JSON"),
        (config_json(b"\xff\xfe"), "config.json is not valid JSON"),
        (config_json(b"[" * 200_000), "config.json is not valid JSON"),
        (config_json(b"[1]"), "config.json is not a JSON object"),
        (config_json(b'{"quantization_config": {"quant_method": "hqq"}}'), "'hqq'.* not supported; GPTQ, AWQ"),
        (only("pytorch_model.bin"), "pytorch_model.bin: not a file that torch.save wrote"),
        (only("model-00001-of-00002.safetensors"), "neither model.safetensors nor"),
        (only("weights"), "model.safetensors is missing"),
    ],
)
def test_huggingface(tmp_path: Path, spoil: Callable[[Path], None], problem: str) -> None:
    directory = files.write_huggingface(tmp_path / "hf", files.weights())
    spoil(directory)
    with pytest.raises(NumbaInferError, match=problem):
        open_source(directory, require_tokenizer=False)


def test_huggingface_tensors(tmp_path: Path) -> None:
    for array, problem in (
        (np.ones((2, 2), np.int8), "'a' is I8; weights must be float32, float16, bfloat16"),
        (np.ones((), np.float32), "'a' is a single number"),
        (np.ones((2, 2)), "'a' is F64; weights must be"),
    ):
        directory = files.write_huggingface(tmp_path / "hf", {"a": array})
        assert problem in (message(directory) or "")
    weights = files.write_huggingface(tmp_path / "hf", files.weights()) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "truncated" in (message(directory) or "")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs file permissions that bind")
def test_unreadable(tmp_path: Path) -> None:
    path = files.write_llama2c(tmp_path / "m.bin", files.weights())
    path.chmod(0)
    assert "Permission denied" in (message(path) or "")
