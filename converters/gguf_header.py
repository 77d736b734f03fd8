"""Checks a GGUF file's header against the file's size, before the gguf library may act on it.

The library believes every count and length: a header that lies makes it loop for hours, fill the memory, or
return tensors of the wrong bytes. This walks the same bytes (https://github.com/ggml-org/ggml,
docs/gguf.md) without building anything, in about a tenth of a second for a vocabulary of 150,000.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from numbainfer.errors import NumbaInferError
from numbainfer.safetensors_file import shown

_MAX_ENTRIES = 2**16  # metadata keys, and tensors: real files have tens and, at most, thousands
# All arrays together. The library spends microseconds and hundreds of bytes on each element; the largest
# vocabularies known, with scores, types and merges, come to 1.3 million.
_MAX_ELEMENTS = 2**21
_MAX_KEY_BYTES = 2**16 - 1  # the specification's
_MAX_DIMENSIONS = 4

_SCALAR_BYTES = {
    GGUFValueType.UINT8: 1,
    GGUFValueType.INT8: 1,
    GGUFValueType.BOOL: 1,
    GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2,
    GGUFValueType.UINT32: 4,
    GGUFValueType.INT32: 4,
    GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8,
    GGUFValueType.INT64: 8,
    GGUFValueType.FLOAT64: 8,
}


def check_header(path: Path) -> None:
    """Raise NumbaInferError unless the header is whole and every tensor's bytes lie where they should."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise NumbaInferError(f"{path} is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _Walk(path, data, size).file()
    except OSError as error:
        raise NumbaInferError(f"cannot read {path}: {error.strerror or error}") from error


class _Walk:
    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size = path, data, size
        self.position = 0
        self.elements = 0  # of the arrays so far
        self.alignment = 32  # the format's default

    def file(self) -> None:
        if self.take(4) != b"GGUF":
            raise self.error("not a GGUF file")
        version = self.number("I")
        if version not in (2, 3):
            swapped = version & 0xFFFF == 0 and version != 0
            kind = "big-endian" if swapped else f"version {version}"
            raise self.error(f"{kind} GGUF is not supported (little-endian version 2 or 3 is)")
        tensors, keys = self.number("Q"), self.number("Q")
        for what, count in (("tensors", tensors), ("metadata keys", keys)):
            if count > _MAX_ENTRIES:
                raise self.error(f"corrupt: the header says {count} {what}")

        seen: set[str] = set()
        for _ in range(keys):
            key = self.name(seen)
            kind = self.value_type(key)
            if key == "general.alignment":
                self.read_alignment(kind)
            else:
                self.value(key, kind)
        seen.clear()
        infos = [self.tensor_info(seen) for _ in range(tensors)]
        self.check_tensors(infos)

    def read_alignment(self, kind: GGUFValueType) -> None:
        self.alignment = self.number("I")
        if kind != GGUFValueType.UINT32 or self.alignment.bit_count() != 1:
            raise self.error("corrupt: general.alignment is not a power of two in 32 bits")

    def value(self, key: str, kind: GGUFValueType) -> None:
        if kind in _SCALAR_BYTES:
            self.take(_SCALAR_BYTES[kind])
        elif kind == GGUFValueType.STRING:
            self.skip(self.number("Q"))
        else:
            item, count = self.value_type(key), self.number("Q")
            self.elements += count
            if self.elements > _MAX_ELEMENTS:
                raise self.error(f"corrupt: {shown(key)} is an array of {count}")
            if item in _SCALAR_BYTES:
                self.skip(count * _SCALAR_BYTES[item])
            elif item == GGUFValueType.STRING:
                for _ in range(count):
                    self.skip(self.number("Q"))
            else:
                raise self.error(f"{shown(key)} is an array of arrays, which is not supported")

    def tensor_info(self, seen: set[str]) -> tuple[str, int, int]:
        """Name, offset in the data, size in bytes."""
        name = self.name(seen)
        dimensions = self.number("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self.error(f"corrupt: tensor {shown(name)} has {dimensions} dimensions")
        shape = [self.number("Q") for _ in range(dimensions)]  # the fastest axis first
        raw_type, offset = self.number("I"), self.number("Q")
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(raw_type)]
        except (ValueError, KeyError):
            raise self.error(f"tensor {shown(name)} is of type {raw_type}, which is not known") from None
        if 0 in shape or shape[0] % block:
            raise self.error(f"corrupt: tensor {shown(name)} of shape {shape} in blocks of {block}")
        return name, offset, math.prod(shape) // block * block_bytes

    def check_tensors(self, infos: list[tuple[str, int, int]]) -> None:
        """Each tensor starts where the one before it ends, rounded up to the alignment, as in llama.cpp."""
        base = self.aligned(self.position)
        expected = 0
        for name, offset, size in infos:
            if offset != expected:
                raise self.error(f"corrupt: tensor {shown(name)} is at {offset}, not at {expected}")
            end = base + offset + size
            if end > self.size:
                raise self.error(f"truncated: tensor {shown(name)} ends at byte {end}, the file at {self.size}")
            expected = self.aligned(offset + size)
        # Writers pad the last tensor, or leave that out; more than this means that sizes above are wrong.
        if infos and self.size > base + expected:
            raise self.error(f"corrupt: {self.size - base - expected} bytes after the last tensor belong to none")

    def aligned(self, position: int) -> int:
        return position + -position % self.alignment

    def name(self, seen: set[str]) -> str:
        length = self.number("Q")
        if length > _MAX_KEY_BYTES:
            raise self.error(f"corrupt: a name of {length} bytes at byte {self.position}")
        try:
            name = self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"corrupt: a name before byte {self.position} is not UTF-8") from None
        if name in seen:
            raise self.error(f"corrupt: {shown(name)} appears twice")
        seen.add(name)
        return name

    def value_type(self, key: str) -> GGUFValueType:
        raw = self.number("I")
        try:
            return GGUFValueType(raw)
        except ValueError:
            raise self.error(f"corrupt: {shown(key)} has a value of type {raw}") from None

    def number(self, code: str) -> int:
        start = self.position
        self.skip(8 if code == "Q" else 4)
        value: int = struct.unpack_from("<" + code, self.data, start)[0]
        return value

    def take(self, count: int) -> bytes:
        self.skip(count)
        return self.data[self.position - count : self.position]

    def skip(self, count: int) -> None:
        self.position += count
        if self.position > self.size:
            raise self.error(f"truncated: the header goes on past the file's {self.size} bytes")

    def error(self, problem: str) -> NumbaInferError:
        return NumbaInferError(f"{self.path}: {problem}")
