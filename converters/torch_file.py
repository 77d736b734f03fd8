"""PyTorch's files (.bin, .pth, .pt), read without PyTorch: a pickle (pickle_reader.py) beside raw storages.

torch.save writes a zip of uncompressed entries, NAME/data.pkl and NAME/data/KEY; before version 1.6 it wrote five
pickles and then the storages, one after the other. Tensors are views of the mapped file.
"""

from __future__ import annotations

import math
import mmap
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from numbainfer.converters.mapped import MappedFile
from numbainfer.converters.pickle_reader import Global, PickleReader
from numbainfer.converters.source import Array
from numbainfer.errors import NumbaInferError
from numbainfer.safetensors_file import shown

# torch's storage classes: our name, and NumPy's dtype that holds it.
_STORAGES = {
    "FloatStorage": ("float32", "<f4"),
    "HalfStorage": ("float16", "<f2"),
    "BFloat16Storage": ("bfloat16", "<u2"),
    "DoubleStorage": ("float64", "<f8"),
    "LongStorage": ("int64", "<i8"),
    "IntStorage": ("int32", "<i4"),
    "ShortStorage": ("int16", "<i2"),
    "CharStorage": ("int8", "i1"),
    "ByteStorage": ("uint8", "u1"),
    "BoolStorage": ("bool", "u1"),
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_DIMENSIONS = 8
_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, EOFError, OverflowError, struct.error)
_MAX_ENTRIES = 2**17
_CHUNK = 64 << 20


@dataclass
class _Storage:
    """Where a storage's elements lie in the file. Those of the old format are found after its pickles."""

    key: str
    dtype: str
    stored: np.dtype[Any]
    count: int
    start: int = -1
    crc: int | None = None  # of the zip's entry, until it was checked


@dataclass(frozen=True)
class TorchTensor:
    """A tensor of a file: element strides over a storage, as torch has them."""

    file: TorchFile
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.storage.dtype

    def rows(self, start: int, stop: int) -> Array:
        """Rows start..stop of the first axis, a view of the mapped file where the file's alignment allows."""
        flat = self.file.elements(self.storage)[self.offset :]
        size = flat.itemsize
        view = np.lib.stride_tricks.as_strided(
            flat, self.shape, [size * stride for stride in self.strides], writeable=False
        )
        return np.require(view[start:stop], requirements="A")


class TorchFile:
    """An opened file; `content` is what was saved, its tensors being TorchTensors. Raises NumbaInferError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._storages: dict[str, _Storage] = {}
        self._entries: dict[str, tuple[int, int, int]] | None = None  # data/KEY -> start, bytes, CRC
        self.mapping = MappedFile(path).mapping
        try:
            self.content = self._read_zip() if self.mapping[:2] == b"PK" else self._read_legacy()
        except NumbaInferError as error:
            raise self._error(str(error)) from error

    def elements(self, storage: _Storage) -> Array:
        """All of a storage, after its checksum was checked once."""
        nbytes = storage.count * storage.stored.itemsize
        if storage.crc is not None:
            if self._checksum(storage.start, nbytes) != storage.crc:
                raise self._error(f"damaged: the checksum of data/{storage.key} does not match")
            storage.crc = None
        if storage.count == 0:
            return np.empty(0, storage.stored)
        return np.frombuffer(self.mapping, storage.stored, storage.count, storage.start)

    def _checksum(self, start: int, nbytes: int) -> int:
        """CRC-32 of a part of the file, whose pages leave memory again."""
        crc = 0
        with memoryview(self.mapping) as whole:
            for position in range(start, start + nbytes, _CHUNK):
                with whole[position : min(position + _CHUNK, start + nbytes)] as part:
                    crc = zlib.crc32(part, crc)
                if hasattr(mmap, "MADV_DONTNEED"):
                    self.mapping.madvise(mmap.MADV_DONTNEED)
        return crc

    def _error(self, problem: str) -> NumbaInferError:
        return NumbaInferError(problem if str(self.path) in problem else f"{self.path}: {problem}")

    def _read_zip(self) -> Any:
        try:
            with zipfile.ZipFile(self.path) as archive:
                entries = archive.infolist()
        except _ZIP_ERRORS as error:
            raise NumbaInferError(f"truncated or damaged: {error}") from error
        pickles = [e for e in entries if e.filename.count("/") == 1 and e.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or len(entries) > _MAX_ENTRIES:
            raise NumbaInferError("a zip, but not one that torch.save wrote: it has no data.pkl")
        prefix = pickles[0].filename.removesuffix("data.pkl")
        found = {entry.filename.removeprefix(prefix): self._locate(entry) for entry in entries}
        if len(found) != len(entries):
            raise NumbaInferError("damaged: the zip has an entry twice")
        self._refuse_overlaps(found)
        if "byteorder" in found and self._bytes(found["byteorder"]) != b"little":
            raise NumbaInferError("saved on a big-endian machine, which is not supported")
        self._entries = found
        pickle = self._bytes(found["data.pkl"])
        if zlib.crc32(pickle) != found["data.pkl"][2]:
            raise NumbaInferError("damaged: the checksum of data.pkl does not match")
        return PickleReader(_names(self), self._load_from_zip).read(pickle)[0]

    def _bytes(self, entry: tuple[int, int, int]) -> bytes:
        return self.mapping[entry[0] : entry[0] + entry[1]]

    def _locate(self, entry: zipfile.ZipInfo) -> tuple[int, int, int]:
        """Where an entry's bytes lie, by its local header, which has lengths of its own."""
        name = shown(entry.filename)
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise NumbaInferError(f"its entry {name} is compressed or encrypted, which torch.save never does")
        header = self.mapping[entry.header_offset : entry.header_offset + 30] if entry.header_offset >= 0 else b""
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise NumbaInferError(f"damaged: no entry {name} where the zip's directory says")
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + entry.file_size > len(self.mapping):
            raise NumbaInferError(f"truncated: its entry {name} ends at byte {start + entry.file_size}")
        return start, entry.file_size, entry.CRC

    def _refuse_overlaps(self, entries: dict[str, tuple[int, int, int]]) -> None:
        end = 0
        for start, nbytes, _ in sorted(entries.values()):
            if start < end:
                raise NumbaInferError("damaged: entries of its zip overlap")
            end = start + nbytes

    def _storage(self, key: object, kind: object, count: object) -> _Storage:
        """The storage of a persistent id, the same object each time."""
        name = kind.name if isinstance(kind, Global) else None
        if name not in _STORAGES or type(key) is not str or type(count) is not int or not 0 <= count < 2**48:
            raise NumbaInferError(f"damaged: a storage {shown((name, key, count))}")
        dtype, stored = _STORAGES[name]
        storage = self._storages.setdefault(key, _Storage(key, dtype, np.dtype(stored), count))
        if (storage.dtype, storage.count) != (dtype, count):
            raise NumbaInferError(f"damaged: storage {shown(key)} comes as two kinds")
        return storage

    def _load_from_zip(self, pid: Any) -> _Storage:
        """pid: ("storage", class, key, device, number of elements)."""
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise NumbaInferError(f"its pickle refers to {shown(pid)}, which is no storage")
        storage = self._storage(pid[2], pid[1], pid[4])
        assert self._entries is not None
        entry = self._entries.get(f"data/{storage.key}")
        if entry is None:
            raise NumbaInferError(f"truncated: storage {shown(storage.key)} is missing")
        if entry[1] != storage.count * storage.stored.itemsize:
            raise NumbaInferError(
                f"damaged: storage {shown(storage.key)} has {entry[1]} bytes for {storage.count} {storage.dtype}"
            )
        if storage.start < 0:
            storage.start, _, storage.crc = entry
        return storage

    def _load_from_legacy(self, pid: Any) -> _Storage:
        """pid: ("storage", class, key, device, number of elements, None or a view (key, offset, elements))."""
        if not isinstance(pid, tuple) or len(pid) != 6 or pid[0] != "storage" or pid[5] is not None:
            raise NumbaInferError(f"its pickle refers to {shown(pid)}, which is not supported")
        return self._storage(pid[2], pid[1], pid[4])

    def _read_legacy(self) -> Any:
        reader = PickleReader(_names(self), self._load_from_legacy)
        data = self.mapping[: 32 << 20]  # far more than its pickles take
        try:
            magic, position = reader.read(data)
        except NumbaInferError:
            magic = None
        if magic != _LEGACY_MAGIC:
            raise NumbaInferError("not a file that torch.save wrote")
        version, position = reader.read(data, position)
        system, position = reader.read(data, position)
        if version != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
            raise NumbaInferError("saved by an unknown version of PyTorch, or on a big-endian machine")
        content, position = reader.read(data, position)
        keys, position = reader.read(data, position)
        if not isinstance(keys, list) or not all(type(key) is str for key in keys):
            raise NumbaInferError("damaged: its list of storages is none")
        if set(keys) != self._storages.keys() or len(keys) != len(set(keys)):
            raise NumbaInferError("damaged: its list of storages does not match its tensors")
        for key in keys:
            storage = self._storages[key]
            head = self.mapping[position : position + 8]
            storage.start = position + 8
            position = storage.start + storage.count * storage.stored.itemsize
            if len(head) < 8 or position > len(self.mapping):
                raise NumbaInferError(f"truncated: storage {shown(key)} ends at byte {position}")
            if int.from_bytes(head, "little", signed=True) != storage.count:
                raise NumbaInferError(f"damaged: storage {shown(key)} does not have {storage.count} elements")
        if position != len(self.mapping):
            raise NumbaInferError(f"damaged: {len(self.mapping) - position} bytes after the last storage")
        return content

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> TorchTensor:
        """What torch._utils._rebuild_tensor_v2 makes; the rest are gradients and hooks."""
        sizes = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
            raise ValueError("not a tensor")
        if not all(type(n) is int and 0 <= n < 2**48 for n in sizes):
            raise ValueError("not sizes")
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if math.prod(n for n in shape if n) >= 2**48:
            raise ValueError("too large")
        # One that has more elements than its storage repeats them: no weight does, and it could be of any size.
        if 0 not in shape and (last >= storage.count or math.prod(shape) > storage.count):
            raise NumbaInferError(f"damaged: a tensor {shown(list(shape))} reaches past its storage")
        span = 1
        for stride, size in sorted((stride, n) for n, stride in zip(shape, strides, strict=True) if n > 1):
            if stride < span:
                raise NumbaInferError(f"damaged: a tensor {shown(list(shape))} overlaps itself")
            span = stride * size
        return TorchTensor(self, storage, offset, tuple(shape), tuple(strides))


def _names(file: TorchFile) -> dict[str, Global]:
    """All that a state dict and a training checkpoint's settings consist of."""
    names = {f"torch {name}": Global(name, None) for name in _STORAGES}
    names |= {f"torch {name}": Global(name, None) for name in ("float32", "float16", "bfloat16", "int64", "bool")}
    names["collections OrderedDict"] = Global("OrderedDict", lambda: {})
    names["torch device"] = Global("device", lambda *where: "device")
    names["torch Size"] = Global("Size", tuple)
    names["torch._utils _rebuild_tensor"] = Global("tensor", file.tensor)
    names["torch._utils _rebuild_tensor_v2"] = Global("tensor", file.tensor)
    names["torch._utils _rebuild_parameter"] = Global("parameter", lambda tensor, *rest: tensor)
    return names
