"""From any source to a directory of numbainfer's own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from numbainfer.checkpoint import (
    FORMAT_VERSION,
    INDEX_NAME,
    QUANTIZATION_METHOD,
    SCALE_SUFFIX,
    WEIGHTS_NAME,
    is_checkpoint,
)
from numbainfer.config import ModelConfig
from numbainfer.converters.scratch import scratch_directory
from numbainfer.converters.source import Source
from numbainfer.converters.source_reader import SourceReader, Target
from numbainfer.errors import NumbaInferError
from numbainfer.progress import Progress, silent
from numbainfer.safetensors_file import SafetensorsWriter
from numbainfer.specs import Parameter, parameter_groups
from numbainfer.tokenizer import Tokenizer

SHARD_BYTES = 5_000_000_000
_SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass
class Summary:
    """What a conversion did. `floating`: matrices that stayed float16 because no group divides their width."""

    parameters: int
    nbytes: int
    floating: list[str]


def convert(
    source: Source, out: Path, target: Target, *, force: bool = False, progress: Progress | None = None
) -> Summary:
    """Writes a source as a numbainfer directory: into a hidden directory beside `out`, which takes its name when all
    is on the disk. An interrupted conversion leaves nothing under `out`."""
    if out.exists() and not force:
        raise _exists(out)
    if out.exists() and not _replaceable(out):
        raise NumbaInferError(f"{out} exists and is not a converted model: --force replaces only those")
    if out.resolve() in source.path.resolve().parents:
        raise NumbaInferError(f"{out} holds {source.path}, which would go with it; give another name")
    reader = SourceReader(source, target)
    Tokenizer.from_files(source.tokenizer_files, reader.config.vocab_size)  # a bad one is refused before the work
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _staging(out, force=force) as directory:
            summary = _write(reader, directory, progress or silent)
            _write_json(directory / "config.json", _config(source.config, target))
            if source.generation_config is not None:
                _write_json(directory / "generation_config.json", source.generation_config)
            for name, content in source.tokenizer_files.items():
                if name not in ("config.json", "generation_config.json"):
                    (directory / name).write_bytes(content)
    except OSError as error:
        raise NumbaInferError(f"cannot write {out}: {error.strerror or error}") from error
    return summary


def _replaceable(out: Path) -> bool:
    return out.is_dir() and (is_checkpoint(out) or not any(out.iterdir()))


def _exists(out: Path) -> NumbaInferError:
    return NumbaInferError(f"{out} exists; give another name, or --force to replace it")


@contextmanager
def _staging(out: Path, *, force: bool) -> Iterator[Path]:
    """A temporary directory beside `out` that becomes `out` at the end, or is removed."""
    with scratch_directory(out.parent, f".{out.name}-partial-") as directory:
        os.chmod(directory, 0o755)
        yield directory
        if not out.exists():
            os.rename(directory, out)
        elif not force:  # another process made it meanwhile
            raise _exists(out)
        else:
            with scratch_directory(out.parent, f".{out.name}-old-") as old:
                os.replace(out, old / out.name)
                try:
                    os.rename(directory, out)
                except OSError:
                    os.replace(old / out.name, out)
                    raise


def _config(config: dict[str, Any], target: Target) -> dict[str, Any]:
    out = {k: v for k, v in config.items() if k not in ("quantization_config", "dtype", "torch_dtype")}
    out["numbainfer_format"] = FORMAT_VERSION
    out["torch_dtype"] = target.float_dtype
    if target.dtype == "int8":
        out["quantization_config"] = {
            "quant_method": QUANTIZATION_METHOD,
            "bits": 8,
            "group_size": target.group_size,
            "symmetric": True,
            "scale_dtype": "float16",
        }
    return out


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


# --- the weight files ----------------------------------------------------------------------------------------------


def _entries(parameters: Sequence[Parameter], target: Target) -> list[tuple[str, str, tuple[int, ...]]]:
    """A shard's tensors as (name, dtype, shape), in the file's order: codes, floating matrices, scales, vectors.

    Codes come first, so that they start on a cache line and every later dtype stays aligned; scales come after, so
    that they can be gathered while the codes stream out.
    """
    codes, floating, scales, vectors = [], [], [], []
    for p in parameters:
        group = target.group(p.shape[1]) if p.is_matrix and not p.exact else None
        if group is not None:
            codes.append((p.name, "I8", p.shape))
            scales.append((p.name + SCALE_SUFFIX, "F16", (p.shape[0], p.shape[1] // group)))
        elif p.is_matrix and not p.exact:
            floating.append((p.name, _SAFETENSORS_NAMES[target.float_dtype], p.shape))
        else:  # norms, biases, routers
            vectors.append((p.name, "F32", p.shape))
    return codes + floating + scales + vectors


def stored_bytes(parameters: Sequence[Parameter], target: Target) -> int:
    """The bytes that parameters take as `target` has them."""
    widths = {"I8": 1, "F16": 2, "BF16": 2, "F32": 4}
    return sum(int(np.prod(shape)) * widths[dtype] for _, dtype, shape in _entries(parameters, target))


def _shards(config: ModelConfig, target: Target) -> list[list[Parameter]]:
    """The parameters of each file; a stack is never torn apart."""
    shards: list[list[Parameter]] = [[]]
    held = 0
    for group in parameter_groups(config):
        nbytes = stored_bytes(group, target)
        if shards[-1] and held + nbytes > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1] += group
        held += nbytes
    return shards


def _write(reader: SourceReader, directory: Path, progress: Progress) -> Summary:
    shards = _shards(reader.config, reader.target)
    names = [WEIGHTS_NAME]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    total = sum(int(np.prod(p.shape)) for shard in shards for p in shard)
    summary = Summary(total, sum(stored_bytes(shard, reader.target) for shard in shards), [])
    done = 0

    def advance(values: int) -> None:
        nonlocal done
        done += values
        progress("converting", done, total)

    for name, shard in zip(names, shards, strict=True):
        _write_shard(reader, directory / name, shard, summary, advance)
    if len(shards) > 1:
        entries = {
            e[0]: name for name, shard in zip(names, shards, strict=True) for e in _entries(shard, reader.target)
        }
        _write_json(directory / INDEX_NAME, {"metadata": {"total_size": summary.nbytes}, "weight_map": entries})
    return summary


def _write_shard(
    reader: SourceReader,
    path: Path,
    shard: Sequence[Parameter],
    summary: Summary,
    advance: Callable[[int], None],
) -> None:
    target, tensors = reader.target, reader.source.tensors
    groups = {p.name: target.group(p.shape[1]) for p in shard if p.is_matrix and not p.exact}
    scales: dict[str, list[np.ndarray]] = {}
    with SafetensorsWriter(path, _entries(shard, target), {"format": "pt"}) as writer:
        for name, dtype, _ in _entries(shard, target):
            if dtype == "I8":
                group = groups[name]
                assert group is not None
                for _, codes, part in reader.quantized(tensors[name], group):
                    writer.write(name, codes)
                    scales.setdefault(name + SCALE_SUFFIX, []).append(part)
                    advance(codes.size)
            elif name in scales:
                for part in scales[name]:
                    writer.write(name, part)
            else:
                if name in groups and target.dtype == "int8":
                    summary.floating.append(name)
                kind = target.float_dtype if name in groups else "float32"
                for _, values in reader.converted(tensors[name], kind):
                    writer.write(name, values)
                    advance(values.size)
