"""One safetensors file: a memory-mapped reader that trusts nothing, and a writer that streams.

The layout: 8 bytes little-endian header length, a JSON header that gives each tensor's dtype, shape and
byte range, then the tensors' bytes without gaps (https://github.com/huggingface/safetensors, "Format").
The safetensors library copies tensors when it hands them to NumPy and has no bfloat16 there; the CPU
kernels want the mapped bytes themselves, so the reader is our own.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import reprlib
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from numbainfer.errors import NumbaInferError

# bfloat16 and the kinds of float8 have no NumPy dtype: their bits travel as uint16 and uint8.
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
    "BOOL": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
}

_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
_MAX_DIMENSIONS = 8  # far above any weight's; numpy itself stops at 32
_MAX_BYTES = 2**63 - 1
_DATA_ALIGNMENT = 64  # a cache line, and the widest SIMD vector: the first tensor starts on it


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the file. `start` and `stop` count bytes from the beginning of the file."""

    dtype: str  # a key of NUMPY_DTYPES
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """A safetensors file mapped read-only; every entry is validated before any can be used.

    `tensors` maps names to entries in the order of their bytes, `metadata` is the header's
    `__metadata__` (empty where absent). A file that breaks the format raises NumbaInferError
    naming the file and, where there is one, the tensor.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._last_rows = (0, 0)  # the byte range that `rows` gave last
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):  # opening a FIFO would wait for ever
                raise NumbaInferError(f"cannot read {self.path}: it is not a regular file")
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 8:
                    raise self._error(f"{size} bytes are too few for a safetensors file; is it truncated?")
                self.mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise NumbaInferError(f"cannot read {self.path}: {error.strerror or error}") from error
        try:
            self.tensors, self.metadata = self._read_header(size)
        except BaseException:
            self.mapping.close()
            raise

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """The tensor as a read-only array of its shape, bfloat16 as uint16 bits.

        A view of the mapping (it stays valid after close), except where the file packs the tensor at an
        offset that its dtype can't be read from in place: then a copy. An unknown name raises KeyError.
        """
        return np.require(self._view(name), requirements="A")

    def rows(self, name: str, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Rows start..stop of the tensor's first axis, as `array` gives them; a copy is of them only.

        For reading a file once from end to end: the pages of the rows asked for before may leave memory. (They are
        read again from the disk where an earlier view is still used.)
        """
        self._forget_last_rows()
        entry, rows = self.tensors[name], self._view(name)[start:stop]
        row_bytes = (entry.stop - entry.start) // max(entry.shape[0], 1)
        self._last_rows = (entry.start + start * row_bytes, rows.nbytes)
        return np.require(rows, requirements="A")

    def _forget_last_rows(self) -> None:
        start, size = self._last_rows
        if size and hasattr(mmap, "MADV_DONTNEED"):  # Unix
            whole = start // mmap.PAGESIZE * mmap.PAGESIZE
            self.mapping.madvise(mmap.MADV_DONTNEED, whole, start + size - whole)

    def close(self) -> None:
        """Release the mapping; while arrays of it are alive they keep it, and it goes with the last."""
        with suppress(BufferError):
            self.mapping.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _view(self, name: str) -> np.ndarray[Any, Any]:
        entry = self.tensors[name]
        dtype = NUMPY_DTYPES[entry.dtype]
        count = (entry.stop - entry.start) // dtype.itemsize
        return np.frombuffer(self.mapping, dtype, count, entry.start if count else 0).reshape(entry.shape)

    def _error(self, problem: str) -> NumbaInferError:
        return NumbaInferError(f"{self.path}: {problem}")

    def _read_header(self, size: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
        length = int.from_bytes(self.mapping[:8], "little")
        if length > _MAX_HEADER_BYTES:
            raise self._error(f"not a safetensors file (its header would be {length} bytes)")
        if length > size - 8:
            raise self._error(f"truncated: the header takes {length} bytes, the file has {size}")
        try:
            header = json.loads(
                self.mapping[8 : 8 + length].decode("utf-8"),
                object_pairs_hook=_object_without_duplicates,
                parse_constant=_refuse_constant,
            )
        except (ValueError, RecursionError) as error:
            raise self._error(f"the safetensors header is not valid JSON ({error})") from error
        if not isinstance(header, dict):
            raise self._error("the safetensors header is not a JSON object")

        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._error("__metadata__ in the header is not a map of strings")
        base = 8 + length
        entries = [(name, self._read_entry(name, item, base, size)) for name, item in header.items()]
        entries.sort(key=lambda pair: (pair[1].start, pair[1].stop))

        position = base
        for name, entry in entries:
            if entry.start != position:
                kind = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
                raise self._error(f"tensor {shown(name)} {kind}: it starts at byte {entry.start - base}")
            position = entry.stop
        if position != size:
            raise self._error(f"{size - position} bytes after the last tensor belong to none")
        return dict(entries), metadata

    def _read_entry(self, name: str, item: object, base: int, size: int) -> TensorEntry:
        def error(problem: str) -> NumbaInferError:
            return self._error(f"tensor {shown(name)}: {problem}")

        if not isinstance(item, dict) or item.keys() != {"dtype", "shape", "data_offsets"}:
            raise error("its header entry is not {dtype, shape, data_offsets}")
        dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
        if not isinstance(dtype, str) or dtype not in NUMPY_DTYPES:
            raise error(f"dtype {shown(dtype)} is not supported (supported: {', '.join(NUMPY_DTYPES)})")
        if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
            raise error(f"shape {shown(shape)} is not a list of at most {_MAX_DIMENSIONS} sizes")
        itemsize = NUMPY_DTYPES[dtype].itemsize
        # Zeros are left out: numpy refuses [2**62, 2**62, 0] too.
        if math.prod(n for n in shape if n) * itemsize > _MAX_BYTES:
            raise error(f"shape {shown(shape)} is larger than any file")
        if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise error(f"data_offsets {shown(offsets)} is not a byte range")
        start, stop = offsets
        if base + stop > size:
            raise error(f"its bytes end at {base + stop}, the file at {size}; is it truncated?")
        if stop - start != math.prod(shape) * itemsize:
            raise error(f"{dtype} {shape} takes {math.prod(shape) * itemsize} bytes, it has {stop - start}")
        return TensorEntry(dtype, tuple(shape), base + start, base + stop)


class SafetensorsWriter:
    """Writes a safetensors file whose tensors are streamed, so that memory holds only one chunk.

    `entries` gives (name, dtype, shape) of every tensor in the file's order, dtype a key of NUMPY_DTYPES.
    The header goes out at once; then `write` takes each tensor's rows in that order. Tensors follow each
    other without padding (the format allows none), so put the wider dtypes first where readers should
    map them in place. Use as a context manager: leaving it checks that every tensor is complete and
    syncs the file to the disk; leaving it by an exception removes the file.

    A path that exists or can't be written raises NumbaInferError; calls out of order, or arrays that
    don't fit the entry, raise ValueError.
    """

    def __init__(
        self,
        path: Path | str,
        entries: Sequence[tuple[str, str, tuple[int, ...]]],
        metadata: dict[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        self._pending: list[tuple[str, str, tuple[int, ...], int]] = []
        position = 0
        for name, dtype, shape in entries:
            if name in header or name == "__metadata__":
                raise ValueError(f"tensor name {name!r} is taken")
            size = math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
            position += size
            self._pending.append((name, dtype, tuple(shape), size))
        self._pending.reverse()  # the next one is popped off the end
        self._written = 0  # bytes of the tensor that is being written
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-(8 + len(text)) % _DATA_ALIGNMENT)
        try:
            self._file = self.path.open("xb")
        except OSError as error:
            raise self._error(error) from error
        try:
            self._put(len(text).to_bytes(8, "little") + text)
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """Append `array` to tensor `name`: all of it, or its next rows (shape [n, *shape[1:]]).

        float32, float16, int8... as the entry's dtype says, uint16 for BF16.
        """
        self._skip_complete(until=name)
        if not self._pending or self._pending[-1][0] != name:
            due = self._pending[-1][0] if self._pending else "nothing more"
            raise ValueError(f"tensor {name!r} is out of order: {due} is due")
        _, dtype, shape, size = self._pending[-1]
        if array.dtype != NUMPY_DTYPES[dtype] or array.shape[1:] != shape[1:] or array.ndim != len(shape):
            raise ValueError(f"{array.dtype} {array.shape} does not fit {name!r}, which is {dtype} {shape}")
        if self._written + array.nbytes > size:
            raise ValueError(f"tensor {name!r} gets more rows than the {shape[0]} of its entry")
        self._put(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._written += array.nbytes

    def close(self) -> None:
        """Check that every tensor got all its bytes, sync, and close; an incomplete file is removed."""
        self._skip_complete()
        if self._pending:
            name, _, _, size = self._pending[-1]
            self.abort()
            raise ValueError(f"tensor {name!r} got {self._written} of its {size} bytes")
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            self.abort()
            raise self._error(error) from error

    def abort(self) -> None:
        """Close and remove the file."""
        with suppress(OSError):
            self._file.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _skip_complete(self, until: str | None = None) -> None:
        """Move on from the tensors that have all their bytes (those of no elements have them at once)."""
        while self._pending and self._pending[-1][0] != until and self._pending[-1][3] == self._written:
            self._pending.pop()
            self._written = 0

    def _put(self, data: bytes | memoryview[int]) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> NumbaInferError:
        return NumbaInferError(f"cannot write {self.path}: {error.strerror or error}")


def shown(value: object) -> str:
    """`value` from a file, for an error message: on one line, printable, and not too long."""
    text = _SHORT_REPR.repr(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


_MAX_SHOWN = 200
_SHORT_REPR = reprlib.Repr()  # bounds depth too: a header may nest as deep as the JSON parser lets it
_SHORT_REPR.maxstring = _SHORT_REPR.maxother = 120
_SHORT_REPR.maxlist = _MAX_DIMENSIONS


def _are_sizes(value: object) -> bool:
    # bool is an int in Python, and true is no size.
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _MAX_BYTES for n in value)


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
