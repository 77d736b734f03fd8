"""Writes a model as GGUF, for llama.cpp: matrices as Q8_0, F16, BF16 or F32, everything else as F32.

q and k of a LLaMA are interleaved, as llama.cpp wants them; experts of a layer become one tensor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from numbainfer.converters.convert import Summary
from numbainfer.converters.gguf import BLOCK_NAMES, NAMES
from numbainfer.converters.gguf_keys import architecture_of, model_keys, rope_factors
from numbainfer.converters.gguf_tokens import tokenizer_keys
from numbainfer.converters.scratch import scratch_directory
from numbainfer.converters.source import Source, SourceTensor, interleaved
from numbainfer.converters.source_reader import SourceReader, Target
from numbainfer.errors import NumbaInferError
from numbainfer.progress import Progress, silent
from numbainfer.specs import Parameter, parameter_groups

BLOCK = 32  # Q8_0: 32 values and a float16 scale
_TYPES = {
    "int8": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
}
_FLOATS = {kind: dtype for dtype, (kind, _) in _TYPES.items() if dtype != "int8"}
_THEIR_NAMES = {ours: theirs for theirs, ours in (NAMES | BLOCK_NAMES).items()}


class _Tensor:
    """A tensor of the file: its parts are the experts of a layer, or one."""

    def __init__(self, name: str, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> None:
        self.name, self.kind, self.shape = name, kind, shape
        self.parts: list[SourceTensor] = []

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // block * size


def write_gguf(
    source: Source, out: Path, dtype: str, *, force: bool = False, progress: Progress | None = None
) -> Summary:
    """Writes a source as the file `out`, which appears when all of it is on the disk."""
    if out.exists() and not (force and out.is_file() and out.open("rb").read(4) in (b"GGUF", b"")):
        hint = "--force replaces only GGUF files" if force else "give another name, or --force to replace it"
        raise NumbaInferError(f"{out} exists; {hint}")
    if out.resolve() == source.path.resolve():
        raise NumbaInferError(f"{out} is the source itself; give another name")
    reader = SourceReader(source, Target(dtype, BLOCK))
    try:
        architecture = architecture_of(reader.config)
        keys = model_keys(reader.config, architecture)
        keys |= tokenizer_keys(source.tokenizer_files, reader.config.vocab_size, source.generation_config)
    except NumbaInferError as error:
        raise NumbaInferError(f"{source.path}: {error}") from error
    tensors = _tensors(reader, architecture, dtype)
    floating = [t.name for t in tensors if dtype == "int8" and len(t.shape) > 1 and t.kind == GGMLQuantizationType.F16]
    summary = Summary(sum(int(np.prod(t.shape)) for t in tensors), sum(t.nbytes for t in tensors), floating)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with scratch_directory(out.parent, f".{out.name}-partial-") as directory:
            path = directory / out.name
            _write(path, reader, architecture, keys, tensors, _TYPES[dtype][1], progress or silent)
            os.replace(path, out)
    except OSError as error:
        raise NumbaInferError(f"cannot write {out}: {error.strerror or error}") from error
    return summary


def _tensors(reader: SourceReader, architecture: str, dtype: str) -> list[_Tensor]:
    tensors: dict[str, _Tensor] = {}
    counts: dict[str, int] = {}
    for parameter in (p for group in parameter_groups(reader.config) for p in group):
        name, is_expert = gguf_name(parameter.name)
        tensor = reader.source.tensors[parameter.name]
        if architecture in ("llama", "smollm3") and name.split(".")[-2] in ("attn_q", "attn_k"):
            read = interleaved(tensor.read, reader.config.head_dim)
            tensor = SourceTensor(tensor.name, tensor.shape, tensor.dtype, read)
        counts[name] = counts.get(name, 0) + 1
        shape = (counts[name], *parameter.shape) if is_expert else parameter.shape
        entry = tensors.setdefault(name, _Tensor(name, _kind(parameter, dtype), shape))
        entry.shape = shape
        entry.parts.append(tensor)
    return list(tensors.values())


def _kind(parameter: Parameter, dtype: str) -> GGMLQuantizationType:
    if not parameter.is_matrix or parameter.exact:
        return GGMLQuantizationType.F32
    if dtype == "int8" and parameter.shape[1] % BLOCK:
        return GGMLQuantizationType.F16
    return _TYPES[dtype][0]


def gguf_name(name: str) -> tuple[str, bool]:
    """A tensor's name in GGUF, and whether it is one expert's part of it."""
    match = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)", name)
    assert match is not None
    layer, part, kind = match.groups()
    general = re.sub(r"\.experts\.\d+\.", ".experts.", part)
    theirs = f"{_THEIR_NAMES[general]}.{kind}"
    return theirs if layer is None else f"blk.{layer}.{theirs}", general != part


def _write(
    path: Path,
    reader: SourceReader,
    architecture: str,
    keys: dict[str, Any],
    tensors: list[_Tensor],
    file_type: LlamaFileType,
    progress: Progress,
) -> None:
    writer = GGUFWriter(path, architecture)
    try:
        writer.add_name(reader.source.path.resolve().name)
        writer.add_file_type(file_type)
        if file_type == LlamaFileType.MOSTLY_Q8_0:
            writer.add_quantization_version(2)
        for key, value in keys.items():
            add_key(writer, key, value)
        factors = rope_factors(reader.config)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for tensor in tensors:
            block, size = GGML_QUANT_SIZES[tensor.kind]
            stored = (*tensor.shape[:-1], tensor.shape[-1] // block * size)  # the library wants bytes of the last axis
            writer.add_tensor_info(tensor.name, stored, np.dtype(np.uint8), tensor.nbytes, raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        _pad(writer, file)
        if factors is not None:
            file.write(factors.tobytes())
            _pad(writer, file)
        done, total = 0, sum(int(np.prod(tensor.shape)) for tensor in tensors)
        for tensor in tensors:
            for part in tensor.parts:
                for values, data in _chunks(reader, part, tensor.kind):
                    file.write(data)
                    done += values
                    progress("converting", done, total)
            _pad(writer, file)
        file.flush()
        os.fsync(file.fileno())
    finally:
        writer.close()


def _pad(writer: GGUFWriter, file: Any) -> None:
    file.write(bytes(-file.tell() % writer.data_alignment))


def _chunks(reader: SourceReader, tensor: SourceTensor, kind: GGMLQuantizationType) -> Iterator[tuple[int, bytes]]:
    """(number of values, their bytes) of chunk after chunk of rows."""
    if kind != GGMLQuantizationType.Q8_0:
        for _, rows in reader.converted(tensor, _FLOATS[kind]):
            yield rows.size, np.ascontiguousarray(rows).tobytes()
        return
    for _, codes, scales in reader.quantized(tensor, BLOCK):
        blocks = np.empty((scales.size, 2 + BLOCK), np.uint8)
        blocks[:, :2] = scales.reshape(-1, 1).view(np.uint8)
        blocks[:, 2:] = codes.reshape(-1, BLOCK).view(np.uint8)
        yield codes.size, blocks.tobytes()


def add_key(writer: GGUFWriter, key: str, value: Any) -> None:
    """A key of `model_keys` or `tokenizer_keys`, under the type that its value has."""
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adders[type(value)](key, value)
