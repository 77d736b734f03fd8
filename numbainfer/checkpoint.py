"""The on-disk format of a converted model: a directory that the ecosystem's tools can open.

    config.json               HF's own schema, and quantization_config where the weights are int8
    model.safetensors         or model-00001-of-0000N.safetensors and model.safetensors.index.json above 5 GB
    tokenizer.json, ...       the tokenizer's files as they were; generation_config.json

A matrix X is "X" [out, in], int8 with "X_scale" [out, in / group] float16 beside it, or a floating-point dtype.
Norms and biases are float32. Matrices that are used stacked (q, k, v; gate, up) lie next to each other, so that a
stack is one view of the mapping: nothing is copied on loading.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from numbainfer.config import ModelConfig
from numbainfer.errors import NumbaInferError
from numbainfer.quantization import GROUPS, AnyMatrix, Matrix, QuantizedMatrix
from numbainfer.safetensors_file import SafetensorsFile
from numbainfer.specs import check_tensors, parameter_groups

QUANTIZATION_METHOD = "numbainfer"
FORMAT_VERSION = 1
SCALE_SUFFIX = "_scale"
INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"

_MAX_FILE_BYTES = 1 << 28  # the largest tokenizer.json of 2026 has 35 MB, an index less
_FLOAT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Weights(Protocol):
    """Where a model gets its tensors: a converted directory, or a source quantized into memory."""

    config: ModelConfig
    name: str

    def matrix(self, names: Sequence[str]) -> AnyMatrix:
        """The matrices of these names, stacked along their rows."""

    def vector(self, names: Sequence[str]) -> np.ndarray:
        """The vectors of these names end to end, float32."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""


def read_file(path: Path) -> bytes:
    """The content of one of the small files beside the weights."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise NumbaInferError(f"{path} is too large for what its name says")
        return path.read_bytes()
    except OSError as error:
        raise NumbaInferError(f"cannot read {path}: {error.strerror or error}") from error


def read_json(path: Path) -> Any:
    """A JSON file's content; one error line for whatever is wrong with it."""
    try:
        return json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise NumbaInferError(f"{path} is not valid JSON: {error}") from error


def is_checkpoint(path: Path) -> bool:
    """Whether a directory holds a model that `numbainfer convert` wrote."""
    if not (path / "config.json").is_file():
        return False
    config = read_json(path / "config.json")
    return isinstance(config, dict) and "numbainfer_format" in config


class Checkpoint:
    """A converted directory, memory-mapped."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.name = self.path.resolve().name
        raw = read_json(self.path / "config.json")
        where = str(self.path / "config.json")
        if not isinstance(raw, dict):
            raise NumbaInferError(f"{where}: not a JSON object")
        version = raw.pop("numbainfer_format", None)
        if version != FORMAT_VERSION:
            raise NumbaInferError(
                f"{where}: format version {version!r}, this numbainfer reads {FORMAT_VERSION}; convert the model again"
            )
        self.config = ModelConfig.from_dict(raw, where)
        self.files = [SafetensorsFile(file) for file in self._weight_files()]
        self._where = {name: file for file in self.files for name in file.tensors}
        if len(self._where) != sum(len(file.tensors) for file in self.files):
            raise NumbaInferError(f"{self.path}: a tensor is in two files")
        self._check()

    def _weight_files(self) -> list[Path]:
        index = self.path / INDEX_NAME
        if not index.exists():
            return [self.path / WEIGHTS_NAME]
        content = read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict):
            raise NumbaInferError(f"{index}: no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        if any(Path(name).name != name or not name.isprintable() for name in names):
            raise NumbaInferError(f"{index}: names a file outside its directory")
        return [self.path / name for name in names]

    def _check(self) -> None:
        """Every tensor that the spec wants, and no other; scales that fit their codes."""
        shapes = {}
        for name, file in self._where.items():
            entry = file.tensors[name]
            if name.endswith(SCALE_SUFFIX):
                continue
            shapes[name] = entry.shape
            if entry.dtype == "I8":
                self._group(name)
            elif entry.dtype not in _FLOAT_DTYPES:
                raise NumbaInferError(f"{self.path}: tensor {name} has dtype {entry.dtype}")
        check_tensors(self.config, shapes, str(self.path))
        for name in self._where:
            if name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) not in shapes:
                raise NumbaInferError(f"{self.path}: tensor {name} belongs to no matrix")
        for names in matrix_names(self.config):
            if len({self._storage(name) for name in names}) > 1:
                raise NumbaInferError(
                    f"{self.path}: {names[0]} and {names[-1]}, which are used together, differ in dtype or group; "
                    "convert the model again"
                )

    def _storage(self, name: str) -> tuple[str, int | None]:
        """A matrix's dtype, and its group where it is int8."""
        dtype = self._where[name].tensors[name].dtype
        return dtype, self._group(name) if dtype == "I8" else None

    def _group(self, name: str) -> int:
        """The group size of an int8 matrix."""
        scale_name = name + SCALE_SUFFIX
        if scale_name not in self._where:
            raise NumbaInferError(f"{self.path}: tensor {scale_name} is missing")
        scale = self._where[scale_name].tensors[scale_name]
        shape = self._where[name].tensors[name].shape
        for group in GROUPS:
            if scale.dtype == "F16" and len(shape) == 2 and scale.shape == (shape[0], shape[1] / group):
                return group
        raise NumbaInferError(f"{self.path}: {scale_name} {scale.dtype} {list(scale.shape)} does not fit {list(shape)}")

    def _array(self, name: str) -> np.ndarray:
        return self._where[name].array(name)

    def matrix(self, names: Sequence[str]) -> AnyMatrix:
        """See Weights."""
        arrays = [self._array(name) for name in names]
        if arrays[0].dtype != np.int8:
            return Matrix(stack(arrays))
        scales = [self._array(name + SCALE_SUFFIX) for name in names]
        return QuantizedMatrix(stack(arrays), stack(scales), self._group(names[0]))

    def vector(self, names: Sequence[str]) -> np.ndarray:
        """See Weights."""
        arrays = [self._array(name) for name in names]
        if any(array.dtype != np.float32 for array in arrays):
            raise NumbaInferError(f"{self.path}: tensor {names[0]} must be float32")
        return np.concatenate(arrays)

    @property
    def nbytes(self) -> int:
        return sum(e.stop - e.start for file in self.files for e in file.tensors.values())


def stack(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Matrices of one width stacked along their rows: a view where they follow each other in memory, else a copy."""
    first = arrays[0]
    if len(arrays) == 1:
        return first
    if any(a.dtype != first.dtype or a.shape[1:] != first.shape[1:] for a in arrays):
        raise NumbaInferError("matrices that are used together differ in dtype or width; convert the model again")
    end = first.ctypes.data + first.nbytes
    for array in arrays[1:]:
        if array.ctypes.data != end:
            return np.concatenate(arrays)
        end += array.nbytes
    rows = sum(a.shape[0] for a in arrays)
    return np.lib.stride_tricks.as_strided(first, (rows, *first.shape[1:]), first.strides, writeable=False)


def matrix_names(config: ModelConfig) -> list[list[str]]:
    """The names of the matrices, in the groups in which they are stacked."""
    return [[p.name for p in group] for group in parameter_groups(config) if group[0].is_matrix]
