"""Hundreds of damaged files of every format: each ends in one line that says why, or changes nothing.

No traceback, no crash, within ten seconds and a gigabyte. A damaged file that opens must give the numbers of the whole
one: nothing in it was needed. (Weights in formats without checksums are left alone here: any bits are numbers.)

    pytest tests/test_fuzz.py --fuzz 20000      a larger corpus
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import lineage_files as lineage
import numpy as np
import pytest
import source_files as files
from command import numbainfer
from fuzzing import attempt, guarded, mutations
from gguf.quants import quantize
from safetensors.numpy import save_file
from test_gguf_source import write_split
from test_lineage_sources import biased, even, ranks_file, write_bin
from test_quantized_sources import pack
from torch_files import TorchPickle, write_torch

from numbainfer.converters.convert import convert
from numbainfer.converters.source import open_source
from numbainfer.converters.source_reader import Target
from numbainfer.registry import Operators


class Format:
    """How a format's file is made, which of its files is damaged, and how far its structure goes."""

    def __init__(self, write: Callable[[Path], Path], file: str | None, end: Callable[[bytes], int]) -> None:
        self.write, self.file, self.end = write, file, end


def whole(data: bytes) -> int:
    """Of files whose weights have checksums, and of text."""
    return len(data)


def safetensors_header(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def gguf_header(data: bytes) -> int:
    return data.index(b"blk.1.ffn_up.weight") + 19 + 4 + 16 + 4 + 8


def first(count: int) -> Callable[[bytes], int]:
    return lambda data: count


def legacy_pickles(data: bytes) -> int:
    return len(data) - sum(8 + array.nbytes for array in files.weights().values())


def hf(path: Path) -> Path:
    return files.write_huggingface(path, files.weights())


def hf_sharded(path: Path) -> Path:
    tensors = files.weights()
    files.write_huggingface(path, {name: tensors[name] for name in list(tensors)[:9]})
    (path / "model.safetensors").rename(path / "a.safetensors")
    save_file({name: tensors[name] for name in list(tensors)[9:]}, path / "b.safetensors")
    weight_map = {name: "ab"[i >= 9] + ".safetensors" for i, name in enumerate(tensors)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def gguf_file(path: Path, kind: gguf.GGMLQuantizationType | None = None) -> Path:
    """kind: of the matrices whose rows are whole blocks of 32."""
    tensors: dict[str, Any] = files.as_gguf(files.weights())
    if kind is not None:
        tensors = {name: array for name, array in tensors.items() if "ffn" not in name}
        rng = np.random.default_rng(0)
        for layer in range(files.LAYERS):
            tensors[f"blk.{layer}.ffn_norm.weight"] = np.ones(files.HIDDEN, np.float32)
            for part, shape in (("ffn_gate", (32, 24)), ("ffn_down", (24, 32)), ("ffn_up", (32, 24))):
                values = rng.standard_normal(shape).astype(np.float32)
                whole_blocks = shape[1] % 32 == 0
                tensors[f"blk.{layer}.{part}.weight"] = (quantize(values, kind), kind) if whole_blocks else values
        return files.write_gguf(
            path, tensors, files.gguf_metadata() | {"llama.feed_forward_length": 32} | files.GGUF_TOKENIZER
        )
    return files.write_gguf(path, tensors, files.gguf_metadata() | files.GGUF_TOKENIZER)


def quantized(path: Path, method: str) -> Path:
    tensors = files.weights()
    stored: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(0)
    for name, array in tensors.items():
        if ".mlp." not in name:
            stored[name] = array
            continue
        base, (outs, ins) = name.removesuffix(".weight"), array.shape
        values, zeros = rng.integers(0, 16, (outs, ins)), rng.integers(1, 16, (ins // 8, outs))
        order = [0, 2, 4, 6, 1, 3, 5, 7] if method == "awq" else None
        stored[f"{base}.qweight"] = pack(values.T, 4, order) if method == "awq" else pack(values, 4).T.copy()
        stored[f"{base}.qzeros"] = pack(zeros, 4, order)
        stored[f"{base}.scales"] = rng.uniform(0.01, 0.1, (ins // 8, outs)).astype(np.float16)
        if method == "gptq":
            stored[f"{base}.g_idx"] = (np.arange(ins) // 8).astype(np.int32)
    settings = {"quant_method": method, "bits": 4, "group_size": 8, "version": "gemm", "checkpoint_format": "gptq"}
    return files.write_huggingface(path, stored, files.CONFIG | {"quantization_config": settings})


def converted(path: Path) -> Path:
    """From a GGUF, which has a tokenizer."""
    with open_source(gguf_file(path.with_name("source"))) as source:
        convert(source, path, Target("float32"))
    return path


def with_ranks(path: Path) -> Path:
    """LLaMA 3's tokenizer beside Meta's weights: 256 bytes, 3 words and 256 special tokens."""
    tensors = files.weights()
    rows = np.random.default_rng(0).standard_normal((256 + 3 + 256, files.HIDDEN)).astype(np.float32)
    lineage.write_meta(path, tensors | {"model.embed_tokens.weight": rows}, shards=1)
    ranks_file(path / "tokenizer.model", [b"he", b"ll", b"hell"])
    return path


FORMATS = {
    "safetensors": Format(hf, "model.safetensors", safetensors_header),
    "config.json": Format(hf, "config.json", whole),
    "safetensors index": Format(hf_sharded, "model.safetensors.index.json", whole),
    ".bin": Format(lambda path: write_bin(path, files.weights()), "pytorch_model.bin", whole),
    ".bin before 1.6": Format(
        lambda path: write_bin(path, files.weights(), legacy=True), "pytorch_model.bin", legacy_pickles
    ),
    ".bin index": Format(lambda path: write_bin(path, files.weights(), 2), "pytorch_model.bin.index.json", whole),
    "Meta's .pth": Format(lambda path: lineage.write_meta(path, even(files.weights())), "consolidated.01.pth", whole),
    "params.json": Format(lambda path: lineage.write_meta(path, even(files.weights())), "params.json", whole),
    "tiktoken": Format(with_ranks, "tokenizer.model", whole),
    "llama2c .pt": Format(lambda path: lineage.write_training_checkpoint(path, files.weights()), None, whole),
    "llama2c 0": Format(lambda path: files.write_llama2c(path, files.weights()), None, first(28)),
    "llama2c 1": Format(lambda path: lineage.write_version1(path, files.weights()), None, first(256)),
    "llama2c 2": Format(lambda path: lineage.write_version2(path, files.weights(), 8), None, first(256)),
    "Kuiper Qwen": Format(lambda path: lineage.write_kuiper(path, biased(tied=False), biases=True), None, first(28)),
    "Kuiper int8": Format(lambda path: lineage.write_kuiper_int8(path, files.weights(), 8), None, first(32)),
    "GGUF": Format(gguf_file, None, gguf_header),
    "GGUF Q8_0": Format(lambda path: gguf_file(path, gguf.GGMLQuantizationType.Q8_0), None, gguf_header),
    "split GGUF": Format(lambda path: write_split(path)[0].parent, "m-00003-of-00003.gguf", gguf_header),
    "GPTQ": Format(lambda path: quantized(path, "gptq"), "model.safetensors", safetensors_header),
    "AWQ": Format(lambda path: quantized(path, "awq"), "model.safetensors", safetensors_header),
    "GPTQ config": Format(lambda path: quantized(path, "gptq"), "config.json", whole),
    "converted": Format(converted, "model.safetensors", safetensors_header),
}


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files(name: str, tmp_path: Path, ops: Operators, request: pytest.FixtureRequest) -> None:
    count, form = request.config.getoption("--fuzz"), FORMATS[name]
    path = form.write(tmp_path / "model")
    file = path if form.file is None else path / form.file
    data = file.read_bytes()
    with guarded():
        expected = attempt(path, ops)
        assert isinstance(expected, dict), expected
        refused = 0
        for number, (what, damaged) in enumerate(mutations(data, form.end(data), count, zlib.crc32(name.encode()))):
            file.unlink()  # a new file: some file systems flush one that is cut to nothing and written again
            file.write_bytes(damaged)
            found = attempt(path, ops)
            if isinstance(found, dict):
                assert found.keys() == expected.keys(), f"{number}: {what}"
                for tensor, values in found.items():
                    assert np.array_equal(values, expected[tensor]), f"{number}: {what}: {tensor}"
                continue
            refused += 1
            assert found.isprintable(), f"{number}: {what}: {found!r}"
            assert len(found) < 1000, f"{number}: {what}: {found!r}"
            assert str(tmp_path) in found or "tokenizer" in found, f"{number}: {what}: {found!r}"
            if refused % (count // 10) == 1:  # the same through the command line
                assert numbainfer("info", path).code in (0, 1), f"{number}: {what}"
    assert refused > count / 4


def nested_arrays(path: Path, depth: int) -> Path:
    """A GGUF with an array of an array of an array ..., each of as many as a count can say."""
    key = b"general.cycle"
    level = struct.pack("<IQ", 9, 2**20)
    value = struct.pack("<I", 9) + level * depth + struct.pack("<IQ", 4, 1) + bytes(4)
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + value)
    return path


def overlapping_zip(path: Path) -> Path:
    """A zip whose entries are all the same bytes: small in the file, large when it is unpacked."""
    write_torch(path, {f"t{i}": np.zeros(1000, np.float32) for i in range(50)})
    data = bytearray(path.read_bytes())
    first_entry = data.index(b"PK\3\4")
    at = data.index(b"PK\1\2")
    while at >= 0:
        data[at + 42 : at + 46] = struct.pack("<I", first_entry)
        at = data.find(b"PK\1\2", at + 4)
    path.write_bytes(data)
    return path


def zip_bomb(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", TorchPickle().dump({"a": np.zeros(1, np.float32)}))
        with archive.open("archive/data/0", "w", force_zip64=True) as entry:
            for _ in range(300):
                entry.write(bytes(1 << 20))
    return path


def index_of(path: Path, shard: str, suffix: str) -> Path:
    write_bin(path, files.weights(), 2) if suffix == ".bin" else hf_sharded(path)
    (index,) = path.glob("*.index.json")
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": shard}}))
    return path


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (lambda path: nested_arrays(path, 1), "array of arrays"),
        (lambda path: nested_arrays(path, 10**5), "array of arrays|array of 1048576"),
        (overlapping_zip, "overlap|twice|damaged"),
        (zip_bomb, "compressed"),
        *(
            (lambda path, s=shard, e=end: index_of(path, s, e), "no file name")
            for end in (".bin", ".safetensors")
            for shard in ("../x", "/etc/passwd", "a/b", "..", "")
        ),
    ],
)
def test_traps(write: Callable[[Path], Path], problem: str, tmp_path: Path, ops: Operators) -> None:
    path = write(tmp_path / "model")
    with guarded():
        found = attempt(path, ops)
    assert isinstance(found, str)
    assert re.search(problem, found), found
