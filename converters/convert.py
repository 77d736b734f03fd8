"""From any source to numbainfer's own weights: written as a directory, or quantized straight into memory."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
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
from numbainfer.converters.source import Source, SourceTensor
from numbainfer.device import Device
from numbainfer.errors import NumbaInferError
from numbainfer.memory import aligned_empty
from numbainfer.progress import Progress, silent
from numbainfer.quantization import (
    STORAGE,
    AnyMatrix,
    Matrix,
    QuantizedMatrix,
    bfloat16_to_float32,
    choose_group,
    float32_to_bfloat16,
)
from numbainfer.registry import Operators, bind
from numbainfer.safetensors_file import SafetensorsWriter
from numbainfer.specs import Parameter, check_tensors, parameter_groups
from numbainfer.tokenizer import Tokenizer

SHARD_BYTES = 5_000_000_000
_CHUNK_VALUES = 4 << 20  # values of a matrix that are worked on at a time: 16 MiB as float32
_WORKERS = min(8, os.cpu_count() or 1)  # each has a chunk and what NumPy makes of it on the way: about 100 MiB
_SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Target:
    """What matrices become: dtype int8 or one of STORAGE's, and for int8 the group size asked for."""

    dtype: str = "int8"
    group_size: int = 64

    def group(self, width: int) -> int | None:
        """The group of an int8 matrix of that width, None where it stays floating point."""
        return choose_group(width, self.group_size) if self.dtype == "int8" else None

    @property
    def float_dtype(self) -> str:
        """The dtype of matrices that are not int8: float16 beside int8 ones."""
        return "float16" if self.dtype == "int8" else self.dtype


class SourceReader:
    """A source whose config and tensors were checked, and the conversion of its tensors."""

    def __init__(self, source: Source, target: Target, ops: Operators | None = None) -> None:
        self.source = source
        self.target = target
        self.config = ModelConfig.from_dict(source.config, str(source.path))
        check_tensors(self.config, {name: t.shape for name, t in source.tensors.items()}, str(source.path))
        self.ops = ops or bind(Device("cpu"))
        self._exact = {p.name for group in parameter_groups(self.config) for p in group if p.exact}

    def storage(self, name: str, width: int) -> tuple[str, int | None]:
        """How a matrix is stored: its floating-point dtype, and its group where it is int8."""
        return ("float32", None) if name in self._exact else (self.target.float_dtype, self.target.group(width))

    def quantized(self, tensor: SourceTensor, group: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(first row, codes, scales) of chunk after chunk of rows."""
        for start, rows in self._chunks(tensor):
            codes = np.empty(rows.shape, np.int8)
            scales = np.empty((rows.shape[0], rows.shape[1] // group), np.float16)
            faults = np.zeros(2, np.int32)
            self.ops.quantize_matrix(rows, QuantizedMatrix(codes, scales, group), faults)
            if faults[0]:
                raise self._not_finite(tensor)
            if faults[1]:
                raise self._too_large(tensor)
            yield start, codes, scales

    def converted(self, tensor: SourceTensor, dtype: str) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows in `dtype`) of chunk after chunk."""
        for start, rows in self._chunks(tensor):
            values = bfloat16_to_float32(rows) if tensor.dtype == "bfloat16" else rows
            if not np.isfinite(values).all():
                raise self._not_finite(tensor)
            if dtype == tensor.dtype:
                yield start, rows
            elif dtype == "bfloat16":
                bits = float32_to_bfloat16(values.astype(np.float32))
                if ((bits & 0x7F80) == 0x7F80).any():  # rounded up to infinity
                    raise self._too_large(tensor)
                yield start, bits
            else:
                with np.errstate(over="ignore"):
                    out = values.astype(STORAGE[dtype])
                if not np.isfinite(out).all():
                    raise self._too_large(tensor)
                yield start, out

    def _chunks(self, tensor: SourceTensor) -> Iterator[tuple[int, np.ndarray]]:
        count, width = tensor.shape[0], tensor.shape[1] if len(tensor.shape) == 2 else 1
        step = max(1, _CHUNK_VALUES // width)
        if tensor.computed:
            yield from self._computed_chunks(tensor, min(step, max(1, -(-count // (2 * _WORKERS)))))
            return
        for start in range(0, count, step):
            yield start, tensor.rows(start, min(count, start + step))
            self.source.forget_pages()

    def _computed_chunks(self, tensor: SourceTensor, step: int) -> Iterator[tuple[int, np.ndarray]]:
        """Some chunks ahead in threads: NumPy, which dequantizes, lets them run at once."""
        ahead: deque[tuple[int, Future[np.ndarray]]] = deque()
        for start in range(0, tensor.shape[0], step):
            ahead.append((start, self._pool.submit(tensor.rows, start, min(tensor.shape[0], start + step))))
            if len(ahead) > _WORKERS:
                first, rows = ahead.popleft()
                yield first, rows.result()
                self.source.forget_pages()
        for first, rows in ahead:
            yield first, rows.result()

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_WORKERS, "dequantize")

    def _not_finite(self, tensor: SourceTensor) -> NumbaInferError:
        return NumbaInferError(f"{self.source.path}: tensor {tensor.name} has NaN or infinite values")

    def _too_large(self, tensor: SourceTensor) -> NumbaInferError:
        return NumbaInferError(
            f"{self.source.path}: tensor {tensor.name} has values beyond {self.target.float_dtype}'s range; "
            "convert with --dtype float32"
        )


class SourceWeights(SourceReader):
    """A source as the weights of a model (checkpoint.Weights), quantized while loading."""

    def __init__(
        self, source: Source, target: Target, progress: Progress | None = None, ops: Operators | None = None
    ) -> None:
        super().__init__(source, target, ops)
        self.name = source.path.name
        self.nbytes = 0
        self._progress = progress or silent
        self._read = 0
        self._total = sum(int(np.prod(p.shape)) for group in parameter_groups(self.config) for p in group)

    def matrix(self, names: Sequence[str]) -> AnyMatrix:
        """See checkpoint.Weights."""
        tensors = [self.source.tensors[name] for name in names]
        rows, width = sum(t.shape[0] for t in tensors), tensors[0].shape[1]
        dtype, group = self.storage(names[0], width)
        offset = 0
        if group is None:
            data = aligned_empty((rows, width), STORAGE[dtype])
            for tensor in tensors:
                for start, part in self.converted(tensor, dtype):
                    data[offset + start : offset + start + len(part)] = part
                    self._advance(part.size)
                offset += tensor.shape[0]
            matrix: AnyMatrix = Matrix(data)
        else:
            codes, scales = aligned_empty((rows, width), np.int8), np.empty((rows, width // group), np.float16)
            for tensor in tensors:
                for start, part, part_scales in self.quantized(tensor, group):
                    codes[offset + start : offset + start + len(part)] = part
                    scales[offset + start : offset + start + len(part)] = part_scales
                    self._advance(part.size)
                offset += tensor.shape[0]
            matrix = QuantizedMatrix(codes, scales, group)
        self.nbytes += matrix.nbytes
        return matrix

    def vector(self, names: Sequence[str]) -> np.ndarray:
        """See checkpoint.Weights."""
        parts = [part for name in names for _, part in self.converted(self.source.tensors[name], "float32")]
        vector = np.concatenate(parts)
        self.nbytes += vector.nbytes
        self._advance(vector.size)
        return vector

    def _advance(self, values: int) -> None:
        self._read += values
        self._progress("loading", self._read, self._total)


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
