"""A source, checked against its config, as what a model wants: int8 or floating point, chunk after chunk."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from numbainfer.config import ModelConfig
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
from numbainfer.specs import check_tensors, parameter_groups

_CHUNK_VALUES = 4 << 20  # values of a matrix that are worked on at a time: 16 MiB as float32
_WORKERS = min(8, os.cpu_count() or 1)  # each has a chunk and what NumPy makes of it on the way: about 100 MiB


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
