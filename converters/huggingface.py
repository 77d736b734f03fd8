"""Reads Hugging Face checkpoint directories: safetensors, one file or sharded, with config.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from numbainfer.checkpoint import read_json
from numbainfer.converters import tokenizer_files
from numbainfer.converters.source import Array, Source, SourceTensor
from numbainfer.errors import NumbaInferError
from numbainfer.safetensors_file import SafetensorsFile, shown

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def open_huggingface(directory: Path) -> Source:
    """Open a checkpoint directory; its config is passed through as it is. Raises NumbaInferError."""
    config = read_json_object(directory / "config.json")
    if "quantization_config" in config:
        quantization = config["quantization_config"]
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise NumbaInferError(
            f"{directory}: already quantized (quant_method {shown(method)}); give the original checkpoint"
        )
    generation = directory / "generation_config.json"
    tensors: dict[str, SourceTensor] = {}
    for file, names in _open_shards(directory):
        for name in names:
            # Old checkpoints saved this buffer; it follows from the config.
            if not name.endswith("rotary_emb.inv_freq"):
                tensors[name] = _tensor(file, name)
    return Source(
        path=directory,
        format="huggingface",
        config=config,
        generation_config=read_json_object(generation) if generation.is_file() else None,
        tokenizer_files=tokenizer_files.from_directory(directory),
        tensors=tensors,
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; NumbaInferError if it can't be read or is anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise NumbaInferError(f"{path} is not a JSON object")
    return value


def _open_shards(directory: Path) -> list[tuple[SafetensorsFile, list[str]]]:
    """Every safetensors file of the checkpoint, with the names of its tensors."""
    # Where both are there, the single file wins, as in transformers.
    if (directory / _SINGLE).exists():
        file = SafetensorsFile(directory / _SINGLE)
        return [(file, list(file.tensors))]
    if (directory / _INDEX).exists():
        return _open_index(directory)
    if any(directory.glob("pytorch_model*.bin")) or any(directory.glob("*.pth")):
        raise NumbaInferError(
            f"{directory} has PyTorch weights only, which are not supported yet; save them as safetensors"
        )
    if any(directory.glob("*.safetensors")):
        raise NumbaInferError(f"{directory} has safetensors files, but neither {_SINGLE} nor {_INDEX}")
    raise NumbaInferError(f"{directory} has no weights: {_SINGLE} is missing")


def _open_index(directory: Path) -> list[tuple[SafetensorsFile, list[str]]]:
    index = directory / _INDEX
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

    shards = []
    for shard, names in sorted(names_by_shard.items()):
        if not (directory / shard).exists():
            raise NumbaInferError(f"{directory / shard} is missing ({_INDEX} names it); is the download complete?")
        file = SafetensorsFile(directory / shard)
        for name in names:
            if name not in file.tensors:
                raise NumbaInferError(f"{file.path}: tensor {shown(name)} is missing ({_INDEX} says it is there)")
        for name in file.tensors.keys() - set(names):
            raise NumbaInferError(f"{file.path}: tensor {shown(name)} is not in {_INDEX}")
        shards.append((file, names))
    return shards


def _tensor(file: SafetensorsFile, name: str) -> SourceTensor:
    entry = file.tensors[name]
    if entry.dtype not in _DTYPES:
        raise NumbaInferError(
            f"{file.path}: tensor {shown(name)} is {entry.dtype}; weights must be {', '.join(_DTYPES)}"
        )
    if not entry.shape:
        raise NumbaInferError(f"{file.path}: tensor {shown(name)} is a single number, which no model here has")
    return SourceTensor(name, entry.shape, _DTYPES[entry.dtype], _reader(file, name))


def _reader(file: SafetensorsFile, name: str) -> Callable[[int, int], Array]:
    return lambda start, stop: file.rows(name, start, stop)
