"""Reads Hugging Face checkpoint directories: config.json beside safetensors or pytorch_model.bin, whole or sharded."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numbainfer.checkpoint import read_json
from numbainfer.converters import tokenizer_files
from numbainfer.converters.experts import split_experts
from numbainfer.converters.quantized import dequantized
from numbainfer.converters.source import Source, SourceTensor
from numbainfer.converters.torch_file import TorchFile, TorchTensor
from numbainfer.errors import NumbaInferError
from numbainfer.safetensors_file import SafetensorsFile, shown

_DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "F8_E4M3": "float8_e4m3",
}
_FLOATS = ("float32", "float16", "bfloat16")
# The weights in the order of preference, which is transformers': one file or, by its index, several.
_FILES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def open_huggingface(directory: Path) -> Source:
    """Open a checkpoint directory; its config is passed through as it is, but for the quantization that is undone.

    Raises NumbaInferError.
    """
    config = read_json_object(directory / "config.json")
    generation = directory / "generation_config.json"
    tensors: dict[str, SourceTensor] = {}
    mappings: list[mmap.mmap] = []
    for file, names in _open_weights(directory):
        mappings.append(file.mapping)
        for name in names:
            # Old checkpoints saved buffers, which follow from the config.
            if not name.endswith(("rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")):
                tensors[name] = file.tensor(name)
    try:
        if "quantization_config" in config:
            tensors = dequantized(config, config.pop("quantization_config"), tensors)
        tensors = split_experts(tensors)
    except NumbaInferError as error:
        raise NumbaInferError(f"{directory}: {error}") from error
    for tensor in tensors.values():
        if tensor.dtype not in _FLOATS:
            raise NumbaInferError(
                f"{directory}: tensor {shown(tensor.name)} is {tensor.dtype}; weights must be {', '.join(_FLOATS)}"
            )
        if not tensor.shape:
            raise NumbaInferError(
                f"{directory}: tensor {shown(tensor.name)} is a single number, which no model here has"
            )
    return Source(
        path=directory,
        format="huggingface",
        config=config,
        generation_config=read_json_object(generation) if generation.is_file() else None,
        tokenizer_files=tokenizer_files.from_directory(directory, config.get("vocab_size")),
        tensors=tensors,
        mappings=mappings,
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; NumbaInferError if it can't be read or is anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise NumbaInferError(f"{path} is not a JSON object")
    return value


class _Safetensors:
    """A safetensors file's tensors as SourceTensors."""

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, SafetensorsFile(path)
        self.names, self.mapping = self._file.tensors.keys(), self._file.mapping

    def tensor(self, name: str) -> SourceTensor:
        entry, file = self._file.tensors[name], self._file
        dtype = _DTYPES.get(entry.dtype, entry.dtype)
        if not entry.shape:
            return SourceTensor(name, (), dtype, lambda start, stop: file.array(name).reshape(1)[start:stop])
        return SourceTensor(name, entry.shape, dtype, lambda start, stop: file.rows(name, start, stop))


class _Torch:
    """A pytorch_model.bin's tensors as SourceTensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        file = TorchFile(path)
        self.mapping = file.mapping
        content = file.content
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
        if not isinstance(content, dict) or not content:
            raise NumbaInferError(f"{path} does not hold a state dict")
        for name, tensor in content.items():
            if not isinstance(name, str) or not isinstance(tensor, TorchTensor):
                raise NumbaInferError(f"{path} does not hold a state dict: {shown(name)} is no tensor")
        self._tensors: dict[str, TorchTensor] = content
        self.names = content.keys()

    def tensor(self, name: str) -> SourceTensor:
        stored = self._tensors[name]
        return SourceTensor(name, stored.shape, stored.dtype, stored.rows)


def _open_weights(directory: Path) -> Iterator[tuple[_Safetensors | _Torch, list[str]]]:
    """Every file of weights, with the names of its tensors."""
    for single, index in _FILES:
        kind = _Torch if single.endswith(".bin") else _Safetensors
        # Where both are there, the single file wins, as in transformers.
        if (directory / single).exists():
            file = kind(directory / single)
            yield file, list(file.names)
            return
        if (directory / index).exists():
            yield from _open_index(directory / index, kind)
            return
    for suffix, (single, index) in zip((".safetensors", ".bin"), _FILES, strict=True):
        if any(directory.glob("*" + suffix)):
            raise NumbaInferError(f"{directory} has {suffix} files, but neither {single} nor {index}")
    raise NumbaInferError(f"{directory} has no weights: {_FILES[0][0]} is missing")


def _open_index(
    index: Path, kind: type[_Safetensors] | type[_Torch]
) -> Iterator[tuple[_Safetensors | _Torch, list[str]]]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise NumbaInferError(f"{index} has no weight_map")
    names_by_shard: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        # A bare file name of this directory: an index must not reach other files. The file itself may be
        # a symbolic link, as in the hub's own cache.
        is_name = isinstance(shard, str) and shard.isprintable() and not set(shard) & set("/\\:")
        if not is_name or shard in ("", ".", ".."):
            raise NumbaInferError(f"{index}: {shown(name)} is in {shown(shard)}, which is no file name")
        names_by_shard.setdefault(shard, []).append(name)

    for shard, names in sorted(names_by_shard.items()):
        if not (index.parent / shard).exists():
            raise NumbaInferError(
                f"{index.parent / shard} is missing ({index.name} names it); is the download complete?"
            )
        file = kind(index.parent / shard)
        for name in names:
            if name not in file.names:
                raise NumbaInferError(f"{file.path}: tensor {shown(name)} is missing ({index.name} says it is there)")
        for name in file.names - set(names):
            raise NumbaInferError(f"{file.path}: tensor {shown(name)} is not in {index.name}")
        yield file, names
