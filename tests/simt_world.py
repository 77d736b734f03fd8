"""Threads, blocks and memory of kernels that run in Python (simt.py): what they wait for, and what they share."""

from __future__ import annotations

import ctypes
import random
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np

Steps = Generator[bool, None, Any]  # yields True to be asked again, False to be woken by another thread


def to_int32(value: Any) -> int:
    return (int(value) + 0x80000000 & 0xFFFFFFFF) - 0x80000000


def to_int64(value: Any) -> int:
    return (int(value) + (1 << 63) & (1 << 64) - 1) - (1 << 63)


def to_uint16(value: Any) -> int:
    return int(value) & 0xFFFF


# In place of NumPy's types in a kernel, and what its arrays are then of.
NUMBERS: dict[Any, Callable] = {np.int32: to_int32, np.int64: to_int64, np.uint16: to_uint16}
CODES: dict[Any, str] = {to_int32: "i", to_int64: "q", to_uint16: "H"}


class Array(np.ndarray):
    """A NumPy array that knows its pointer, as device arrays do."""

    @property
    def pointer(self) -> int:
        return self.ctypes.data


class Pointer:
    """Into a NumPy array."""

    def __init__(self, values: Any, offset: int = 0) -> None:
        self.values, self.offset = values, offset
        self.floats = values is not None and values.dtype == np.float32

    def __getitem__(self, i: Any) -> Any:
        at = self.offset + int(i)
        assert 0 <= at < self.values.size, "read outside of an array"
        return self.values[at] if self.floats else self.values.item(at)

    def __setitem__(self, i: Any, value: Any) -> None:
        at = self.offset + int(i)
        assert 0 <= at < self.values.size, "written outside of an array"
        self.values[at] = to_int32(value) if self.values.dtype == np.int32 else value
        now.world.progress += 1

    @property
    def address(self) -> int:
        return 0 if self.values is None else self.values.ctypes.data + self.offset * self.values.itemsize

    def advanced(self, count: Any) -> Pointer:
        """`count` elements further."""
        return Pointer(self.values, self.offset + int(count))


class Halves:
    """16-bit values at an address."""

    def __init__(self, address: int) -> None:
        self.address = address

    def __getitem__(self, i: Any) -> int:
        return ctypes.c_uint16.from_address(now.world.inside(self.address + 2 * int(i), 2)).value

    def __setitem__(self, i: Any, value: Any) -> None:
        ctypes.c_uint16.from_address(now.world.inside(self.address + 2 * int(i), 2)).value = value
        now.world.progress += 1


class Words:
    """32-bit integers at an address."""

    def __init__(self, address: int) -> None:
        self.address = address

    def __getitem__(self, i: Any) -> int:
        return ctypes.c_int32.from_address(now.world.inside(self.address + 4 * int(i), 4)).value


class _Dimensions:
    def __init__(self, x: int, y: int = 1, z: int = 1) -> None:
        self.x, self.y, self.z = x, y, z


class Block:
    """The threads of a block, and what they share."""

    def __init__(self, grid: tuple, index: tuple, threads: int, shared: int) -> None:
        self.grid, self.index, self.threads = _Dimensions(*grid), _Dimensions(*index), _Dimensions(threads)
        memory = np.full(-(-shared // 16) * 4, np.nan, np.float32)
        self.floats, raw = memory, memory.view(np.uint8).data
        self.memory, self.halves = raw, raw.cast("H")
        self.words, self.longs = raw.cast("i"), raw.cast("q")
        self.arrays: dict[Any, np.ndarray] = {}
        self.barriers: dict[int, _Meeting] = defaultdict(_Meeting)
        self.counters: dict[int, Counter] = {}  # by address


class Warp:
    """Of 32 threads: the values that they exchange, and their barrier."""

    def __init__(self, number: int) -> None:
        self.number, self.values, self.come = number, [None] * 32, list[Thread]()
        self.barrier, self.pace = _Meeting(), 1.0


class Thread:
    """Of a block; its steps are what is left of it to run."""

    def __init__(self, block: Block, warp: Warp, index: int) -> None:
        self.block, self.warp, self.index, self.lane = block, warp, index, index % 32
        self.place = _Dimensions(index)
        self.copies: list[list[tuple[int, bytes]]] = [[]]  # by groups, the last one open: what has not come yet
        self.steps: Steps

    def where(self) -> str:
        """The lines of the kernel at which it stands."""
        steps: Any = self.steps
        lines = []
        while steps is not None and getattr(steps, "gi_frame", None) is not None:
            code = steps.gi_frame.f_code
            if not Path(code.co_filename).name.startswith("simt"):
                lines.append(f"{Path(code.co_filename).name}:{steps.gi_frame.f_lineno} ({code.co_name})")
            steps = steps.gi_yieldfrom
        return " > ".join(lines)


class World:
    """All that runs now."""

    def __init__(self) -> None:
        self.ready: list[Thread] = []  # for the next round
        self.progress = 0  # grows with whatever somebody may wait for
        self.dice: random.Random | None = None
        self.starts, self.ends = list[int](), list[int]()  # of the arrays in memory, in order

    def holds(self, arrays: list[np.ndarray]) -> None:
        """All that kernels reach by addresses. What allocators round up to counts as an array's."""
        places = sorted({(a.ctypes.data, -(-(a.ctypes.data + a.nbytes) // 16) * 16) for a in arrays})
        self.starts, self.ends = [start for start, _ in places], [end for _, end in places]

    def inside(self, address: int, size: int) -> int:
        """The address, if these bytes of global memory are an array's."""
        i = bisect_right(self.starts, address) - 1
        assert i >= 0, "outside of all arrays"
        assert address + size <= self.ends[i], "outside of all arrays"
        assert address % min(size, 16) == 0, "misaligned"
        return address

    def wake(self, threads: list[Thread]) -> None:
        """Threads that waited go on."""
        self.ready += threads
        threads.clear()
        self.progress += 1


class _Now:
    """What runs."""

    world = World()
    thread: Thread


now = _Now()


# --- barriers and shuffles ---------------------------------------------------------------------------------------


class _Meeting:
    """A barrier: who comes waits until as many have as it is for, or only says that it came."""

    def __init__(self) -> None:
        self.waiting: list[Thread] = []
        self.come = self.threads = 0

    def arrive(self, threads: int) -> bool:
        """Whether all have come now."""
        assert not self.come or self.threads == threads, "a barrier for different numbers of threads"
        self.threads, self.come = threads, self.come + 1
        if self.come < threads:
            return False
        self.come = 0
        now.world.wake(self.waiting)
        return True

    def join(self, threads: int) -> Steps:
        if not self.arrive(threads):
            self.waiting.append(now.thread)
            yield False


class Counter:
    """A barrier in shared memory (PTX: mbarrier)."""

    def __init__(self, arrivals: int) -> None:
        self.arrivals = self.pending = arrivals
        self.bytes = self.phase = 0
        self.waiting: list[Thread] = []

    def count(self, arrivals: int, size: int) -> None:
        """Arrivals, and bytes: more that are expected, or less."""
        self.pending, self.bytes = self.pending - arrivals, self.bytes + size
        assert self.pending >= 0, "more arrivals than a barrier is for"
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase ^ 1, self.arrivals
            now.world.wake(self.waiting)

    def passed(self, parity: Any) -> bool:
        return self.phase != int(parity)


def counter_at(address: Any) -> Counter:
    return now.thread.block.counters[int(address)]


def exchange(value: Any) -> Steps:
    """The values of a warp's 32 lanes, once all have come."""
    warp = now.thread.warp
    values = warp.values
    values[now.thread.lane] = value
    if len(warp.come) == 31:
        warp.values = [None] * 32
        now.world.wake(warp.come)
    else:
        warp.come.append(now.thread)
        yield False
    return values
