"""MemoryPool: aligned arrays that are reused by size class, with statistics.

Buffers of a step, KV pages and workspaces come from a pool, so that the steady state of decoding allocates nothing.
The pool is device-free: an Allocator knows how to get memory on one device and how to show it as an array.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from numbainfer.errors import NumbaInferError

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
_SMALLEST = 256  # bytes of the smallest size class


class Allocator(Protocol):
    """Memory of one device."""

    def allocate(self, nbytes: int) -> Any:
        """A block of at least `nbytes`, aligned to ALIGNMENT; MemoryError if there is none."""

    def view(self, block: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """An array over the start of a block."""

    def free_memory(self) -> int | None:
        """Bytes that could still be allocated; None where nobody knows."""


class HostAllocator:
    """Main memory, through NumPy."""

    def allocate(self, nbytes: int) -> np.ndarray:
        try:
            raw = np.empty(nbytes + ALIGNMENT, np.uint8)
        except ValueError:  # NumPy's answer to more bytes than an address can count
            raise MemoryError from None
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + nbytes]

    def view(self, block: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return block[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)

    def free_memory(self) -> None:
        return None


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array in main memory that starts on a cache line; MemoryError if there is none."""
    host, dtype = HostAllocator(), np.dtype(dtype)
    return host.view(host.allocate(math.prod(shape) * dtype.itemsize), shape, dtype)


@dataclass
class PoolStatistics:
    """Counts over a pool's life; sizes in bytes, of whole blocks."""

    in_use: int = 0
    reserved: int = 0  # in use plus kept for reuse
    peak_in_use: int = 0
    allocations: int = 0  # asked of the system
    reuses: int = 0  # served from a kept block


class MemoryPool:
    """Hands out arrays on one device and takes them back.

    `empty` gives an uninitialised array, `release` returns it; its block then serves the next array of that size
    class. Releasing twice, or an array that is not the pool's (a view of one neither), raises ValueError.
    """

    def __init__(self, allocator: Allocator | None = None) -> None:
        self._allocator: Any = allocator or HostAllocator()
        # By identity, holding the array: an address would also match a view, or a stale array whose block serves
        # another by now.
        self._live: dict[int, tuple[Any, Any, int]] = {}  # id of the array -> (array, block, block size)
        self._free: dict[int, list[Any]] = {}  # block size -> blocks
        self.statistics = PoolStatistics()

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> Any:
        """An uninitialised C-ordered array, its start aligned to 64 bytes."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        dtype = np.dtype(dtype)
        if any(n < 0 for n in shape):
            raise ValueError(f"negative length in shape {shape}")
        size = size_class(math.prod(shape) * dtype.itemsize)
        kept = self._free.get(size)
        if kept:
            block = kept.pop()
            self.statistics.reuses += 1
        else:
            block = self._allocate(size)
            self.statistics.allocations += 1
            self.statistics.reserved += size
        array = self._allocator.view(block, shape, dtype)
        self._live[id(array)] = (array, block, size)
        self.statistics.in_use += size
        self.statistics.peak_in_use = max(self.statistics.peak_in_use, self.statistics.in_use)
        return array

    def zeros(self, shape: int | tuple[int, ...], dtype: Any) -> Any:
        """As `empty`, filled with zeros."""
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    def release(self, array: Any) -> None:
        """Takes an array back. Its memory is reused: views of it must not be used any more."""
        entry = self._live.pop(id(array), None)
        if entry is None:
            raise ValueError("this array is not the pool's, or was released before")
        _, block, size = entry
        self._free.setdefault(size, []).append(block)
        self.statistics.in_use -= size

    def trim(self) -> None:
        """Gives kept blocks back to the system."""
        self.statistics.reserved = self.statistics.in_use
        self._free.clear()

    def _allocate(self, size: int) -> Any:
        try:
            return self._allocator.allocate(size)
        except MemoryError:
            self.trim()
        try:
            return self._allocator.allocate(size)
        except MemoryError:
            free = self._allocator.free_memory()
            said = "" if free is None else f" and {free / 2**20:.0f} MiB free"
            raise NumbaInferError(
                f"out of memory: asked for {size / 2**20:.0f} MiB with {self.statistics.in_use / 2**20:.0f} MiB in "
                f"use{said}; lower --ctx-size or take a smaller model"
            ) from None


def size_class(nbytes: int) -> int:
    """The block size that serves a request: 4 steps to each doubling, so at most 25% is wasted."""
    if nbytes <= _SMALLEST:
        return _SMALLEST
    step = 2 ** ((nbytes - 1).bit_length() - 3)
    return -(-nbytes // step) * step
