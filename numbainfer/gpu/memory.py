"""Device memory: arrays, their allocator, and copies between host and device.

Copies are queued on the device's stream and so keep their order among kernels. Host memory that copies pass through
is pinned (page-locked), which the GPU reads and writes by itself.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from numbainfer.gpu.driver import Gpu, check, load_driver

_STAGE = 16 << 20  # bytes of one staging buffer; two take turns


class Block:
    """A piece of device memory, freed when nothing refers to it any more."""

    def __init__(self, nbytes: int) -> None:
        driver = load_driver()
        # In whole 256 bytes: bulk copies read in units of 16, up to 15 bytes past what they are to bring.
        self.pointer = int(check(driver.cuMemAlloc(-(-nbytes // 256) * 256)))
        self.nbytes = nbytes
        self._free = weakref.finalize(self, _free, self.pointer)

    def free(self) -> None:
        """Frees it now."""
        self._free()


def _free(pointer: int) -> None:
    load_driver().cuMemFree(pointer)  # at exit the context may be gone: no error of ours


class DeviceArray:
    """A C-ordered array on the device, or a part of one along its first axis. Holds on to its memory.

    array[a:b], array[i], reshape: views. array[...] = host values: a copy to the device, in the stream's order.
    """

    def __init__(self, block: Any, pointer: int, shape: tuple[int, ...], dtype: np.dtype, copier: Copier) -> None:
        self.block, self.pointer, self.shape, self.dtype, self._copier = block, pointer, shape, dtype, copier

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeviceArray({self.shape}, {self.dtype})"

    def reshape(self, *shape: Any) -> DeviceArray:
        """The same values in another shape; one length may be -1."""
        wanted: tuple[int, ...] = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple) else shape
        if -1 in wanted:
            known = -math.prod(wanted)
            wanted = tuple(self.size // known if n == -1 else n for n in wanted)
        if math.prod(wanted) != self.size:
            raise ValueError(f"can't reshape {self.shape} to {wanted}")
        return DeviceArray(self.block, self.pointer, wanted, self.dtype, self._copier)

    def __getitem__(self, key: Any) -> DeviceArray:
        start, count, inner = self._part(key)
        shape = inner if count is None else (count, *inner)
        offset = start * math.prod(inner) * self.itemsize
        return DeviceArray(self.block, self.pointer + offset, shape, self.dtype, self._copier)

    def _part(self, key: Any) -> tuple[int, int | None, tuple[int, ...]]:
        """(first element in units of what is inside, how many of it or None for one, the shape inside)."""
        if key is Ellipsis:
            return 0, self.shape[0] if self.shape else None, self.shape[1:]
        keys = key if isinstance(key, tuple) else (key,)
        start = 0
        for axis, k in enumerate(keys):
            length, last = self.shape[axis], axis == len(keys) - 1
            if isinstance(k, slice) and last:
                first, stop, step = k.indices(length)
                if step != 1:
                    raise IndexError("device arrays have no strided views")
                return start * length + first, max(0, stop - first), self.shape[axis + 1 :]
            if isinstance(k, slice) or not -length <= int(k) < length:
                raise IndexError(f"index {key} of a device array {self.shape}")
            start = start * length + int(k) % length
        return start, None, self.shape[len(keys) :]

    def __setitem__(self, key: Any, value: Any) -> None:
        part = self[key]
        if np.isscalar(value) and value == 0:
            self._copier.clear(part)
            return
        self._copier.to_device(part, np.broadcast_to(np.asarray(value, self.dtype), part.shape))

    def copy_to_device(self, host: np.ndarray) -> None:
        """Copies the host's values here."""
        self[...] = host

    def copy_to_host(self) -> np.ndarray:
        """A copy of the values, after all that was queued before."""
        return self._copier.to_host(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.copy_to_host().astype(dtype or self.dtype, copy=False)


class PinnedArray:
    """Page-locked host memory as a NumPy array, `values`."""

    def __init__(self, shape: int | tuple[int, ...], dtype: Any) -> None:
        driver = load_driver()
        dtype = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, int) else shape
        nbytes = max(1, math.prod(shape) * dtype.itemsize)
        # PORTABLE: pinned for every context
        self.pointer = int(check(driver.cuMemHostAlloc(nbytes, driver.CU_MEMHOSTALLOC_PORTABLE)))
        self._free = weakref.finalize(self, _free_pinned, self.pointer)
        raw = (ctypes.c_uint8 * nbytes).from_address(self.pointer)
        self.values = np.frombuffer(raw, np.uint8)[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def _free_pinned(pointer: int) -> None:
    load_driver().cuMemFreeHost(pointer)


class Copier:
    """Copies between host and device on one stream. before: called ahead of every copy."""

    def __init__(self, gpu: Gpu, stream: Any, before: Callable[[], None]) -> None:
        self._gpu, self._stream, self._before, self._driver = gpu, stream, before, load_driver()
        self._stages: list[tuple[PinnedArray, Any]] = []  # staging buffers, each with an event: the last copy from it
        self._turn = 0
        self._side: Any = None  # another stream

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within, copies are done at once on a stream of their own: the usual one is being captured."""
        if self._side is None:
            self._side = check(self._driver.cuStreamCreate(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        usual, before = self._stream, self._before
        self._stream, self._before = self._side, lambda: None
        try:
            yield
        finally:
            check(self._driver.cuStreamSynchronize(self._side))
            self._stream, self._before = usual, before

    def to_device(self, target: DeviceArray, host: np.ndarray) -> None:
        """Queues a copy; the host's memory may be changed as soon as this returns."""
        if host.size == 0:
            return
        self._before()
        if not host.flags.c_contiguous:
            host = np.ascontiguousarray(host)
        if host.nbytes <= 1 << 16:  # the driver takes its own copy of so little
            check(self._driver.cuMemcpyHtoDAsync(target.pointer, host.ctypes.data, host.nbytes, self._stream))
            return
        for _ in self.upload(target, host):
            pass

    def upload(self, target: DeviceArray, host: np.ndarray) -> Any:
        """As to_device, piece by piece: yields the bytes copied so far. What a mapped file holds is read on the way
        into one staging buffer while the other one is copied from."""
        driver = self._driver
        self._before()
        if not self._stages:
            flags = driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
            self._stages = [(PinnedArray(_STAGE, np.uint8), check(driver.cuEventCreate(flags))) for _ in range(2)]
        flat = host.reshape(-1).view(np.uint8)
        for start in range(0, flat.size, _STAGE):
            stage, event = self._stages[self._turn]
            self._turn = 1 - self._turn
            part = flat[start : start + _STAGE]
            check(driver.cuEventSynchronize(event))
            stage.values[: part.size] = part
            check(driver.cuMemcpyHtoDAsync(target.pointer + start, stage.pointer, part.size, self._stream))
            check(driver.cuEventRecord(event, self._stream))
            yield start + part.size

    def clear(self, target: DeviceArray) -> None:
        """Queues filling with zeros."""
        self._before()
        if target.nbytes:
            check(self._driver.cuMemsetD8Async(target.pointer, 0, target.nbytes, self._stream))

    def to_host(self, source: DeviceArray) -> np.ndarray:
        """A copy of a device array, after all that was queued before it."""
        self._before()
        out = np.empty(source.shape, source.dtype)
        if out.size:
            check(self._driver.cuMemcpyDtoHAsync(out.ctypes.data, source.pointer, out.nbytes, self._stream))
        check(self._driver.cuStreamSynchronize(self._stream))
        return out

    def to_pinned(self, source: DeviceArray, target: PinnedArray) -> None:
        """Queues a copy; the values are there once what was queued is done."""
        self._before()
        check(self._driver.cuMemcpyDtoHAsync(target.pointer, source.pointer, source.nbytes, self._stream))

    def release(self) -> None:
        """Frees the staging buffers (they come back when needed)."""
        check(self._driver.cuStreamSynchronize(self._stream))
        for _, event in self._stages:
            check(self._driver.cuEventDestroy(event))
        self._stages = []


class DeviceAllocator:
    """memory.Allocator of one GPU."""

    def __init__(self, gpu: Gpu, copier: Copier) -> None:
        self._gpu, self._copier = gpu, copier

    def allocate(self, nbytes: int) -> Block:
        """Device memory, aligned to 256 bytes; MemoryError if there is none."""
        return Block(nbytes)

    def view(self, block: Block, shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
        """An array over the start of a block."""
        return DeviceArray(block, block.pointer, shape, dtype, self._copier)

    def free_memory(self) -> int:
        """Bytes of the GPU that nobody holds."""
        return self._gpu.free_memory()
