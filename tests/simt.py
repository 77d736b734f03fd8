"""Runs GPU kernels without a GPU: every thread of a block is a Python generator, every PTX instruction a function.

Slow (a block of 256 threads takes about a second), but it is the kernel's own source that runs, with its barriers,
shuffles and addresses: what a compile alone can't check. The source is rewritten in one way: where a function may have
to wait for other threads, its call becomes a `yield from`. So threads take turns, and that all of them wait is seen at
once. Integers are Python's, cut where a kernel says int32 or int64, as Numba has them: sums of 32 bits are of 64.

Fragments of matrices (fragments.py, products.py) are computed as they are emitted, for a warp at once: with `mma.sync`.

Kernels run block after block, or `together` where blocks wait for each other. With an `order`, a number, warps proceed
and copies arrive at random speeds, the same ones for the same number: what lacks a barrier shows in some order.
"""

from __future__ import annotations

import ast
import builtins
import ctypes
import inspect
import random
import re
import struct
import textwrap
import time
from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from numbainfer.gpu import pipeline, ptx
from numbainfer.gpu.compile import Kernel

TIMEOUT = 300  # seconds of a launch
PATIENCE = 100  # rounds in which all threads asked for something in vain

Steps = Generator[bool, None, Any]  # yields True to be asked again, False to be woken by another thread


def _int32(value: Any) -> int:
    return (int(value) + 0x80000000 & 0xFFFFFFFF) - 0x80000000


def _int64(value: Any) -> int:
    return (int(value) + (1 << 63) & (1 << 64) - 1) - (1 << 63)


def _uint16(value: Any) -> int:
    return int(value) & 0xFFFF


# In place of NumPy's types in a kernel, and what its arrays are then of.
_NUMBERS: dict[Any, Callable] = {np.int32: _int32, np.int64: _int64, np.uint16: _uint16}
_CODES: dict[Any, str] = {_int32: "i", _int64: "q", _uint16: "H"}


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
        self.values[at] = _int32(value) if self.values.dtype == np.int32 else value
        _world.progress += 1

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
        return ctypes.c_uint16.from_address(_world.inside(self.address + 2 * int(i), 2)).value

    def __setitem__(self, i: Any, value: Any) -> None:
        ctypes.c_uint16.from_address(_world.inside(self.address + 2 * int(i), 2)).value = value
        _world.progress += 1


class Words:
    """32-bit integers at an address."""

    def __init__(self, address: int) -> None:
        self.address = address

    def __getitem__(self, i: Any) -> int:
        return ctypes.c_int32.from_address(_world.inside(self.address + 4 * int(i), 4)).value


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
        self.counters: dict[int, _Counter] = {}  # by address


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
            if code.co_filename != __file__:
                lines.append(f"{Path(code.co_filename).name}:{steps.gi_frame.f_lineno} ({code.co_name})")
            steps = steps.gi_yieldfrom
        return " > ".join(lines)


class _World:
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


_world = _World()
_here: Thread  # the one that runs


# --- barriers and shuffles ---------------------------------------------------------------------------------------


class _Meeting:
    """A barrier: who comes waits until as many have as it is for."""

    def __init__(self) -> None:
        self.come: list[Thread] = []
        self.threads = 0

    def join(self, threads: int) -> Steps:
        assert not self.come or self.threads == threads, "a barrier for different numbers of threads"
        self.threads = threads
        if len(self.come) == threads - 1:
            _world.wake(self.come)
        else:
            self.come.append(_here)
            yield False


class _Counter:
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
            _world.wake(self.waiting)

    def passed(self, parity: Any) -> bool:
        return self.phase != int(parity)


def _counter(address: Any) -> _Counter:
    return _here.block.counters[int(address)]


def _barrier_init(address: Any, arrivals: Any) -> None:
    assert int(address) % 8 == 0, "misaligned"
    _here.block.memory[int(address) + 7]  # it is inside
    _here.block.counters[int(address)] = _Counter(int(arrivals))


def _wait(address: Any, parity: Any) -> Steps:
    counter = _counter(address)
    while not counter.passed(parity):
        counter.waiting.append(_here)
        yield False


def _passed(address: Any, parity: Any) -> Steps:
    if _counter(address).passed(parity):
        return 1
    yield True
    return int(_counter(address).passed(parity))


def _copy_bulk(to: Any, source: int, size: Any, barrier: Any) -> None:
    assert int(to) % 16 == size % 16 == 0, "misaligned"
    assert size > 0
    _world.inside(source, int(size))
    block, counter = _here.block, _counter(barrier)

    def copy() -> Steps:
        while _world.dice is not None and _world.dice.random() < 0.9:
            _world.progress += 1  # it will come
            yield True
        block.memory[int(to) : int(to) + int(size)] = ctypes.string_at(source, int(size))
        counter.count(0, -int(size))

    thread = Thread(block, Warp(-1), -1)
    thread.steps = copy()
    if _world.dice is None:
        for _ in thread.steps:
            pass
    else:
        _world.ready.append(thread)


def _exchange(value: Any) -> Steps:
    """The values of a warp's 32 lanes, once all have come."""
    warp = _here.warp
    values = warp.values
    values[_here.lane] = value
    if len(warp.come) == 31:
        warp.values = [None] * 32
        _world.wake(warp.come)
    else:
        warp.come.append(_here)
        yield False
    return values


class _Shared:
    @staticmethod
    def array(shape: Any, dtype: Any, alignment: int = 0) -> Any:
        if shape == 0:
            return None  # the dynamic part, at address 0
        frame: Any = inspect.currentframe()
        place = frame.f_back.f_code, frame.f_back.f_lasti
        kind = _CODES.get(dtype, dtype)
        return _here.block.arrays.setdefault(place, np.full(shape, np.nan).astype(kind))


def _atomic(choose: Callable) -> Callable:
    """Of a shared array's element; nobody takes what stood there."""

    def change(values: Any, i: Any, value: Any) -> None:
        values[i] = choose(values[i], value)

    return change


class _Cuda:
    """What kernels take from numba.cuda."""

    shared, atomic = _Shared, SimpleNamespace(min=_atomic(min), max=_atomic(max))
    threadIdx = property(lambda self: _here.place)  # noqa: N815
    blockIdx = property(lambda self: _here.block.index)  # noqa: N815
    gridDim = property(lambda self: _here.block.grid)  # noqa: N815
    blockDim = property(lambda self: _here.block.threads)  # noqa: N815

    class local:  # noqa: N801 (numba's name)
        @staticmethod
        def array(shape: Any, dtype: Any) -> Any:
            # one of integers takes none that it can't hold: an error here
            return array(_CODES[dtype], [0] * shape) if dtype in _CODES else np.zeros(shape, dtype)

    def syncthreads(self) -> Steps:
        return (yield from _here.block.barriers[0].join(_here.block.threads.x))

    def syncwarp(self) -> Steps:
        return (yield from _here.warp.barrier.join(32))

    def threadfence(self) -> None:
        pass

    def shfl_xor_sync(self, mask: int, value: Any, step: int) -> Steps:
        lane = _here.lane ^ int(step)
        return (yield from _exchange(value))[lane]

    def shfl_sync(self, mask: int, value: Any, lane: int) -> Steps:
        return (yield from _exchange(value))[int(lane) % 32]


def _synchronize_threads(name: Any, threads: Any) -> Steps:
    return (yield from _here.block.barriers[int(name)].join(int(threads)))


# --- memory ------------------------------------------------------------------------------------------------------


def _check(address: Any, size: int) -> int:
    at = int(address)
    assert at >= 0, "outside of shared memory"
    assert at % size == 0, "misaligned"
    return at


def _shared_store_words(address: Any, *values: Any) -> None:
    at = _check(address, 4 * len(values)) >> 2
    for i, value in enumerate(values):
        _here.block.words[at + i] = _int32(value)


def _shared_store_floats(address: Any, *values: Any) -> None:
    at = _check(address, 4 * len(values)) >> 2
    for i, value in enumerate(values):
        _here.block.floats[at + i] = value


def _shared_store_half(address: Any, value: Any) -> None:
    _here.block.halves[_check(address, 2) >> 1] = value


def _shared_store_long(address: Any, value: Any) -> None:
    _here.block.longs[_check(address, 8) >> 3] = _int64(value)


def _shared_floats(address: Any) -> tuple:
    at = _check(address, 16) >> 2
    return tuple(_here.block.floats[at : at + 4])


def _global(kind: Any, count: int = 1) -> Callable:
    """Reads some values at an address."""
    of_float, size = kind is ctypes.c_float, count * ctypes.sizeof(kind)

    def one(address: int) -> Any:
        value = kind.from_address(_world.inside(address, size)).value
        return np.float32(value) if of_float else value

    def several(address: int) -> tuple:
        values = (kind * count).from_address(_world.inside(address, size))[:]
        return tuple(map(np.float32, values)) if of_float else tuple(values)

    return one if count == 1 else several


def _store(kind: Any, count: int = 1) -> Callable:
    """Writes some values at an address."""
    size = count * ctypes.sizeof(kind)

    def store(address: int, *values: Any) -> None:
        (kind * count).from_address(_world.inside(address, size))[:] = values
        _world.progress += 1

    return store


def _peek(kind: Any, count: int = 1) -> Callable:
    """The same by a thread that may have to ask often."""
    read = _global(kind, count)

    def peek(address: int) -> Steps:
        yield True
        return read(address)

    return peek


def _shared_peek(address: Any) -> Steps:
    yield True
    return _here.block.words[_check(address, 4) >> 2]


def _post(kind: Any) -> Callable:
    def post(address: int, value: Any) -> None:
        kind.from_address(_world.inside(address, ctypes.sizeof(kind))).value = int(value)
        _world.progress += 1

    return post


def _fetch_add(address: int, amount: Any) -> int:
    place = ctypes.c_int32.from_address(_world.inside(address, 4))
    before = place.value
    place.value += int(amount)
    _world.progress += 1
    return before


def _copy_async(count: int) -> Callable:
    """Copies so many bytes, or fewer and zeros: with an `order`, some only when they are waited for."""

    def copy(to: Any, source: int, size: Any = count) -> None:
        at, memory = _check(to, count), _here.block.memory
        data = ctypes.string_at(_world.inside(source, count), int(size)).ljust(count, b"\0")
        if _world.dice is None or _world.dice.random() < 0.5:
            memory[at : at + count] = data
        else:
            _here.copies[-1].append((at, data))

    return copy


def _wait_for_copies(groups: int) -> Callable:
    def wait() -> None:
        """Until at most `groups` closed groups of copies are under way."""
        while len(_here.copies) > groups + 1:
            for at, data in _here.copies.pop(0):
                _here.block.memory[at : at + len(data)] = data

    return wait


# --- arithmetic --------------------------------------------------------------------------------------------------

_FLOATS = list(np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32))  # by their bits as float16
_BYTES, _TWO_WORDS, _WORD, _FLOAT = struct.Struct("<8b"), struct.Struct("<2i"), struct.Struct("<i"), struct.Struct("<f")


def _dp4a(a: Any, b: Any, c: Any) -> int:
    p, q, r, s, t, u, v, w = _BYTES.unpack(_TWO_WORDS.pack(a, b))
    return c + p * t + q * u + r * v + s * w


def _halves(*words: Any) -> np.ndarray:
    """The float16 pairs in some words, low halves first, as float64."""
    return np.array([int(word) & 0xFFFFFFFF for word in words], np.uint32).view(np.float16).astype(np.float64)


def _pack(first: Any, second: Any) -> int:
    return np.array([first, second], np.float32).astype(np.float16).view(np.int32).item()


def _permute(a: Any, b: Any, selector: Any) -> int:
    eight, s = _TWO_WORDS.pack(a, b), int(selector)
    chosen = eight[s & 7], eight[s >> 4 & 7], eight[s >> 8 & 7], eight[s >> 12 & 7]
    return int.from_bytes(bytes(chosen), "little", signed=True)


def _multiply_16x8x16(*operands: Any) -> Steps:
    """Where a lane (4 g + t) has what, is in PTX ISA, "matrix fragments for mma.m16n8k16"."""
    lane = _here.lane
    lanes = yield from _exchange(operands[:6])
    g, t = divmod(lane, 4)
    out = np.array(operands[6:], np.float64).reshape(2, 2)
    # Row g, then row g + 8; columns 0 to 7, then 8 to 15. Columns of b: 2t and 2t + 1.
    a = [_halves(*(lanes[4 * g + i][r + 2 * half] for half in (0, 1) for i in range(4))) for r in (0, 1)]
    b = [_halves(*(lanes[4 * (2 * t + c) + i][4 + half] for half in (0, 1) for i in range(4))) for c in (0, 1)]
    out += np.array(a) @ np.array(b).T
    return tuple(out.astype(np.float32).reshape(4))


def _of_halves(operation: Callable) -> Callable:
    """An operation on two float16 in a word."""

    def both(a: Any, b: Any) -> int:
        words = np.array([a, b], np.int64).astype(np.int32)
        first, second = words.view(np.float16).reshape(2, 2)
        return operation(first, second).view(np.int32).item()

    return both


_i32, _i64, _f32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_float

_INSTRUCTIONS: dict[str, Callable] = {
    "address": lambda pointer: pointer.address,
    "advance": lambda pointer, count: pointer.advanced(count),
    "halves_at": Halves,
    "words_at": Words,
    "shared_address": lambda array: 0,
    "load_i32": _global(_i32),
    "load_f32": _global(_f32),
    "load_weights": _global(_i32, 4),
    "load_constant_u16": _global(ctypes.c_uint16),
    "store_f32": _store(_f32),
    "store_f32x4": _store(_f32, 4),
    "store_i32": _store(_i32),
    "store_i32x4": _store(_i32, 4),
    "load_f32x2": _global(_f32, 2),
    "load_f32x4": _global(_f32, 4),
    "load_i32x4": _global(_i32, 4),
    "load_constant_f32": _global(_f32),
    "peek_i32": _peek(_i32),
    "peek_i32x4": _peek(_i32, 4),
    "peek_i64": _peek(_i64),
    "post_i32": _post(_i32),
    "post_i64": _post(_i64),
    "shared_i32x4": lambda address: tuple(_here.block.words[(at := _check(address, 16) >> 2) : at + 4]),
    "shared_f32x4": _shared_floats,
    "shared_peek_i32": _shared_peek,
    "shared_i32": lambda address: _here.block.words[_check(address, 4) >> 2],
    "shared_f32": lambda address: _here.block.floats[_check(address, 4) >> 2],
    "shared_u16": lambda address: _here.block.halves[_check(address, 2) >> 1],
    "shared_i64": lambda address: _here.block.longs[_check(address, 8) >> 3],
    "shared_store_i32": _shared_store_words,
    "shared_store_f32": _shared_store_floats,
    "shared_store_u16": _shared_store_half,
    "shared_store_i64": _shared_store_long,
    "shared_store_f32x4": _shared_store_floats,
    "shared_store_i32x4": _shared_store_words,
    "copy_async_16": _copy_async(16),
    "copy_async_16_or_zeros": _copy_async(16),
    "copy_async_4": _copy_async(4),
    "copy_async_commit": lambda: _here.copies.append([]),
    "dp4a": _dp4a,
    "multiply_16x8x16": _multiply_16x8x16,
    "permute": _permute,
    "double_half": lambda bits: _int32(bits | bits << 16),
    "multiply_halves": _of_halves(np.multiply),
    "subtract_halves": _of_halves(np.subtract),
    "pack_halves": lambda a, b: _pack(*np.clip(np.array([a, b], np.float32), -65504, 65504)),
    "round_halves": _pack,
    "still": lambda i: i,
    "half_to_float": lambda bits: _FLOATS[bits],
    "halves_to_floats": lambda bits: (_FLOATS[bits & 0xFFFF], _FLOATS[bits >> 16 & 0xFFFF]),
    "float_to_half": lambda value: np.float32(value).astype(np.float16).view(np.uint16).item(),
    "as_float": lambda bits: np.float32(_FLOAT.unpack(_WORD.pack(bits))[0]),
    "as_int": lambda value: _WORD.unpack(_FLOAT.pack(value))[0],
    "round_to_int": lambda value: round(float(value)),
    "exp2": lambda value: np.exp2(np.float32(value)),
    "reciprocal": lambda value: np.float32(1) / np.float32(value),
    "inverse_root": lambda value: np.float32(1) / np.sqrt(np.float32(value)),
    "divide": lambda a, b: int(a) // int(b),
    "fetch_add": _fetch_add,
    "wait_for_previous_kernel": lambda: None,
    "let_next_kernel_start": lambda: None,
    # pipeline.py
    "bulk_copies": lambda: True,
    "barrier_init": _barrier_init,
    "barrier_arrive": lambda barrier: _counter(barrier).count(1, 0),
    "barrier_passed": _passed,
    "_try_wait": _wait,
    "expect_bytes": lambda barrier, size: _counter(barrier).count(1, int(size)),
    "copy_bulk": _copy_bulk,
    "fence_for_copies": lambda: None,
    "synchronize_threads": _synchronize_threads,
}


# --- fragments ---------------------------------------------------------------------------------------------------


class _Numbers(np.ndarray):
    """Of some lanes, in place of a value of the compiler's."""

    type = ir.IntType(32)  # nobody looks at it


def _value(operand: Any) -> Any:
    """Of an operand of an emitted instruction: a number of each lane, or a constant."""
    return operand.constant if isinstance(operand, ir.Constant) else operand


def _of_values(operation: Callable) -> Callable:
    return lambda self, *operands: operation(*map(_value, operands))


class _Lanes:
    """In place of the compiler's builder: computes what is emitted, for some lanes of a warp."""

    fmul, fadd, fsub = (_of_values(operation) for operation in (np.multiply, np.add, np.subtract))
    mul, add, sub, and_, or_, xor, shl, lshr = (
        _of_values(operation)
        for operation in (
            *(np.multiply, np.add, np.subtract, np.bitwise_and, np.bitwise_or, np.bitwise_xor),
            *(np.left_shift, np.right_shift),
        )
    )

    select = _of_values(lambda condition, a, b: np.where(condition, a, b).view(_Numbers))

    def icmp_signed(self, relation: str, a: Any, b: Any) -> Any:
        return {">=": np.greater_equal, "<=": np.less_equal}[relation](_value(a), _value(b))

    def zext(self, value: Any, kind: Any) -> Any:
        return value

    def extract_value(self, values: Any, i: int) -> Any:
        return values[i]

    def call(self, function: Any, operands: list, attrs: Any) -> Any:
        """An inline assembly; one with an offset to an address has that as its first operand."""
        name = next(name for name in _ASSEMBLY if name in function.asm)
        first, *others = map(_value, operands)
        offset = re.search(r"\[\$\d\+(\d+)\]", function.asm)
        out = _ASSEMBLY[name](first + int(offset[1]) if offset else first, *others)
        return None if out is None else np.asarray(out).view(_Numbers)


def _each_lane(function: Callable) -> Callable:
    """Of each lane, whose function may return several numbers."""

    def of_lanes(*operands: Any) -> Any:
        lanes = [values.tolist() for values in np.broadcast_arrays(*operands)]
        found = [function(*each) for each in zip(*lanes, strict=True)]
        return np.array(found, np.float32).T if found[0] is not None else None

    return of_lanes


def _load_matrices(address: Any) -> list:
    """ldmatrix: lane 8m + i has the address of row i of matrix m, of which a row's word t goes to lane 4i + t."""
    at = np.asarray(address).reshape(4, 8, 1) + 4 * np.arange(4)
    assert not (at[..., 0] % 16).any(), "misaligned"
    return list(np.asarray(_here.block.words)[at >> 2].astype(np.int64).reshape(4, 32))


def _load_transposed(address: Any) -> list:
    """The same of each matrix's transpose."""
    halves = np.array(_load_matrices(address), np.int32).view(np.float16).reshape(4, 8, 8)
    return list(halves.transpose(0, 2, 1).copy().view(np.int32).astype(np.int64).reshape(4, 32))


def _multiply_tiles(*operands: Any) -> np.ndarray:
    """PTX ISA, "matrix fragments for mma.m16n8k16"."""
    c = np.array(operands[:4], np.float64).reshape(2, 2, 8, 4)  # [half of the rows, odd column, g, t]
    words = np.array([np.broadcast_to(word, 32) for word in operands[4:]]).astype(np.int32)
    halves = words.view(np.float16).astype(np.float64).reshape(6, 8, 4, 2)  # [register, g, t, odd column]
    a = halves[:4].reshape(2, 2, 8, 4, 2).transpose(1, 2, 0, 3, 4).reshape(16, 16)
    b = halves[4:].transpose(1, 0, 2, 3).reshape(8, 16)
    product = (a @ b.T).reshape(2, 8, 4, 2).transpose(0, 3, 1, 2)
    return (c + product).astype(np.float32).reshape(4, 32)


def _to_half(*values: Any) -> np.ndarray:
    """The bits of a number as float16, or of two, the first in the lower half."""
    halves = [np.clip(value, -65504, 65504).astype(np.float16).view(np.uint16) for value in values]
    return halves[0] if len(halves) == 1 else np.stack(halves, -1).view(np.int32)[..., 0]


_ASSEMBLY: dict[str, Callable] = {
    "ldmatrix.sync.aligned.m8n8.x4.shared": _load_matrices,
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared": _load_transposed,
    "mma.sync.aligned.m16n8k16": _multiply_tiles,
    "ld.shared.v2.f32": _each_lane(lambda at: _here.block.floats[(n := _check(at, 8) >> 2) : n + 2]),
    "st.shared.f32": _each_lane(_shared_store_floats),
    "st.shared.b16": _each_lane(_shared_store_half),
    "ld.global.cg.v4.f32": _each_lane(_global(_f32, 4)),
    "st.global.v4.f32": _each_lane(_store(_f32, 4)),
    "st.global.v2.f32": _each_lane(_store(_f32, 2)),
    "st.global.b32": _each_lane(_store(_i32)),
    "max.f32 $0": np.maximum,
    "ex2.approx": np.exp2,
    "rcp.approx": np.reciprocal,
    "cvt.rn.f16.f32": _to_half,
    "cvt.rn.f16x2.f32": _to_half,
}


def _lanes_of(kind: Any, values: tuple) -> Any:
    """A parameter's values in all lanes."""
    if isinstance(kind, types.UniTuple):
        return [_lanes_of(kind.dtype, each) for each in zip(*values, strict=True)]
    return np.array(values, np.float32 if kind is types.float32 else np.int64).view(_Numbers)


def _of_lanes(body: Callable, arguments: tuple, lanes: list) -> list:
    """What a function of fragments returns, in each lane."""
    target, ptx.target = ptx.target, (8, 0)
    try:
        out = body(_Lanes(), *map(_lanes_of, arguments, zip(*lanes, strict=True)))
    finally:
        ptx.target = target
    if not isinstance(out, list):
        return [None] * len(lanes) if out is None else list(out)
    return list(zip(*(np.broadcast_to(_as_number(each), len(lanes)) for each in out), strict=True))


def _as_number(value: Any) -> np.ndarray:
    """Of a lane or several: floats of 32 bits, also constants."""
    values = np.asarray(_value(value))
    return values.astype(np.float32) if values.dtype.kind == "f" else values


def _fragments(body: Callable, arguments: tuple, result: Any) -> Callable:
    def function(*values: Any) -> Steps:
        lanes = yield from _exchange(values)
        if len(lanes) == 32:  # who is first computes it for all
            lanes.append(_of_lanes(body, arguments, list(lanes)))
        return lanes[32][_here.lane]

    def store(*values: Any) -> None:
        """A lane by itself: others of its warp may have nothing to store."""
        _of_lanes(body, arguments, [values])

    return store if result == types.void else function


# --- from a kernel to generators ---------------------------------------------------------------------------------


def _emulated(value: Any, made: dict[int, Any]) -> Any:
    """A kernel's global or closure value, for Python: device functions and instructions as functions."""
    if id(value) in made:
        return made[id(value)]
    if isinstance(value, type):
        return _NUMBERS.get(value, value)
    name = getattr(value, "__name__", "")
    if name in _INSTRUCTIONS and value in (getattr(ptx, name, None), getattr(pipeline, name, None)):
        return _INSTRUCTIONS[name]
    codegen = value._defn.__globals__.get("codegen") if hasattr(value, "_defn") else None
    emitted = inspect.getclosurevars(codegen).nonlocals if codegen else {}
    if name == "wait" and "text" in emitted:
        return _wait_for_copies(int(re.search(r"wait_group (\d+)", emitted["text"])[1]))
    if name == "dealt" and "text" in emitted:
        return lambda: None  # registers
    if "body" in emitted:  # over_fragment made it
        return _fragments(emitted["body"], emitted["arguments"], emitted["result"])
    function = getattr(value, "py_func", None)
    if function is None:
        return value
    made[id(value)] = python_function(function, made)
    return made[id(value)]


class _Waits(ast.NodeTransformer):
    """Calls of what may wait become `yield from`."""

    def __init__(self, known: dict[str, Any]) -> None:
        self.known = known

    def visit_Call(self, node: ast.Call) -> Any:
        self.generic_visit(node)
        function: Any = None
        if isinstance(node.func, ast.Name):
            function = self.known.get(node.func.id)
        elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            function = getattr(self.known.get(node.func.value.id), node.func.attr, None)
        return ast.copy_location(ast.YieldFrom(node), node) if inspect.isgeneratorfunction(function) else node


def python_function(function: Any, made: dict[int, Any]) -> Any:
    """The function with everything that it names emulated; a generator function if it may wait."""
    code, names = function.__code__, {*function.__code__.co_names}
    found = {name: value for name, value in function.__globals__.items() if name in names}
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    found.update((name, cell.cell_contents) for name, cell in cells)
    known = {name: _Cuda() if name == "cuda" else _emulated(value, made) for name, value in found.items()}

    tree: Any = ast.parse(textwrap.dedent(inspect.getsource(function)))
    tree.body[0].decorator_list = []
    ast.increment_lineno(_Waits(known).visit(tree), code.co_firstlineno - 1)
    space = {**known, "__builtins__": builtins}
    exec(compile(ast.fix_missing_locations(tree), code.co_filename, "exec", dont_inherit=True), space)
    result = space.pop(function.__name__)
    if function.__name__ in known:
        space[function.__name__] = known[function.__name__]
    return result


@cache
def _body(kernel: Kernel) -> Callable:
    return python_function(kernel.function, {})


def _steps(body: Callable, arguments: list) -> Steps:
    if inspect.isgeneratorfunction(body):
        yield from body(*arguments)
    else:
        body(*arguments)
    _world.progress += 1


# --- launching ---------------------------------------------------------------------------------------------------


class DeadlockError(Exception):
    """All threads wait for each other, or a launch takes too long."""


def _report(why: str, threads: list[Thread]) -> DeadlockError:
    groups: dict[tuple, list[int]] = defaultdict(list)
    for thread in threads:
        if thread.steps.gi_frame is not None:
            index = thread.block.index
            groups[index.z, index.y, index.x, thread.where()].append(thread.index)
    lines = [f"block {key[2::-1]}, threads {_ranges(indices)}: {key[3]}" for key, indices in groups.items()]
    return DeadlockError("\n".join([why, *lines]))


def _ranges(numbers: list[int]) -> str:
    edges = np.flatnonzero(np.diff(numbers) != 1) + 1
    return ", ".join(f"{run[0]}-{run[-1]}" for run in np.split(np.array(numbers), edges))


def _run(threads: list[Thread]) -> None:
    """In rounds: in each, whoever can goes on until it has to wait."""
    global _here  # noqa: PLW0603
    _world.ready = list(threads)
    deadline, vain, dice = time.monotonic() + TIMEOUT, 0, _world.dice
    while _world.ready:
        turn, _world.ready = _world.ready, []
        progress = _world.progress
        if dice is not None:
            turn = list(_postpone(turn, dice))
        for thread in turn:
            _here = thread
            try:
                again = next(thread.steps)
            except StopIteration:
                continue
            if again:
                _world.ready.append(thread)
        vain = 0 if _world.progress != progress else vain + 1
        if vain == (PATIENCE if dice is None else 50 * PATIENCE):
            raise _report("deadlock: all threads wait", threads)
        if time.monotonic() > deadline:
            raise _report(f"not done after {TIMEOUT} seconds", threads)
    if any(thread.steps.gi_frame is not None for thread in threads):
        raise _report("deadlock: all threads wait", threads)


def _postpone(turn: list[Thread], dice: random.Random) -> Iterator[Thread]:
    """Those whose turn it is after all: each warp has a pace, for a while."""
    warps = {id(thread.warp): thread.warp for thread in turn}
    for warp in warps.values():
        if warp.number >= 0 and dice.random() < 0.02:
            warp.pace = dice.choice((0.02, 0.3, 1.0, 1.0))
    chosen = [key for key, warp in warps.items() if dice.random() < warp.pace]
    dice.shuffle(chosen)
    by_warp: dict[int, list[Thread]] = defaultdict(list)
    for thread in turn:
        by_warp[id(thread.warp)].append(thread)
    late = set(warps) - set(chosen)
    _world.ready += [thread for thread in turn if id(thread.warp) in late]
    for key in chosen:
        yield from by_warp[key]


def launch(
    kernel: Kernel,
    grid: Any,
    *arguments: Any,
    shared: int = 0,
    together: bool = False,
    cluster: int = 1,
    order: int | None = None,
    others: list[np.ndarray] | None = None,
) -> None:
    """Runs kernel(*arguments) on `grid` blocks; arrays are written in place, None is a null pointer.

    others: arrays that are no arguments, but pointed at by what is in one. Blocks are in no clusters.
    """
    assert cluster == 1
    global _world  # noqa: PLW0603
    body = _body(kernel)
    taken: list[Any] = []
    held = list(others or ())
    for value, kind in zip(arguments, kernel.parameters, strict=True):
        if kind.endswith("p"):
            held += [] if value is None else [value]
            flat = None if value is None else np.asarray(value).reshape(-1)
            taken.append(Pointer(flat.view(np.uint16) if flat is not None and flat.dtype == np.float16 else flat))
        else:
            taken.append(np.float32(value) if kind == "f32" else int(value))

    x, y, z = (*(grid if isinstance(grid, tuple) else (grid,)), 1, 1)[:3]
    blocks = [Block((x, y, z), index[::-1], kernel.threads, shared) for index in np.ndindex(z, y, x)]
    for group in [blocks] if together else [[block] for block in blocks]:
        _world = _World()
        _world.holds(held)
        _world.dice = None if order is None else random.Random(order)
        threads = []
        for block in group:
            warps = [Warp(number) for number in range(-(-kernel.threads // 32))]
            for i in range(kernel.threads):
                threads.append(Thread(block, warps[i // 32], i))
                threads[-1].steps = _steps(body, taken)
        with np.errstate(all="ignore"):
            _run(threads)
