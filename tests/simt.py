"""Runs GPU kernels without a GPU: every thread of a block is a Python thread, every PTX instruction a Python function.

Slow (a block of 256 threads takes about a second), but it is the kernel's own source that runs, with its barriers,
shuffles and addresses: what a compile alone can't check. Kernels run block after block.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from numbainfer.gpu import ptx
from numbainfer.gpu.compile import Kernel

TIMEOUT = 60  # seconds at a barrier: some thread did not come


class Pointer:
    """Into a NumPy array."""

    def __init__(self, array: Any, offset: int = 0) -> None:
        self.array, self.offset = array, offset

    def __getitem__(self, i: Any) -> Any:
        at = self.offset + int(i)
        assert 0 <= at < self.array.size, "read outside of an array"
        return self.array[at]

    def __setitem__(self, i: Any, value: Any) -> None:
        at = self.offset + int(i)
        assert 0 <= at < self.array.size, "written outside of an array"
        self.array[at] = np.int64(value).astype(np.int32) if self.array.dtype == np.int32 else value

    @property
    def address(self) -> int:
        return 0 if self.array is None else self.array.ctypes.data + self.offset * self.array.itemsize


class _Dimensions:
    def __init__(self, x: int, y: int = 1, z: int = 1) -> None:
        self.x, self.y, self.z = x, y, z


class Block:
    """The threads of a block, and what they share."""

    def __init__(self, grid: tuple, index: tuple, threads: int, shared: int) -> None:
        self.grid, self.index, self.threads = _Dimensions(*grid), _Dimensions(*index), threads
        self.memory = np.full(shared // 4 + 4, np.nan, np.float32).view(np.uint8)
        self.arrays: dict[Any, np.ndarray] = {}
        self.lock = threading.Lock()
        self.barrier = threading.Barrier(threads)
        self.warps = [(threading.Barrier(32), ([None] * 32, [None] * 32)) for _ in range(threads // 32)]


_here = threading.local()


def _exchange(value: Any) -> list:
    """The values of a warp's 32 lanes, once all have come."""
    barrier, slots = _here.block.warps[_here.thread // 32]
    _here.turn ^= 1  # the other slots may still be read
    slots[_here.turn][_here.thread % 32] = value
    barrier.wait(TIMEOUT)
    return slots[_here.turn]


class _Shared:
    @staticmethod
    def array(shape: Any, dtype: Any, alignment: int = 0) -> Any:
        if shape == 0:
            return None  # the dynamic part, at address 0
        frame: Any = sys._getframe(1)
        block = _here.block
        with block.lock:
            return block.arrays.setdefault((frame.f_code, frame.f_lineno), np.full(shape, np.nan).astype(dtype))


class _Cuda:
    """What kernels take from numba.cuda."""

    shared = _Shared
    threadIdx = property(lambda self: _Dimensions(_here.thread))  # noqa: N815
    blockIdx = property(lambda self: _here.block.index)  # noqa: N815
    gridDim = property(lambda self: _here.block.grid)  # noqa: N815
    blockDim = property(lambda self: _Dimensions(_here.block.threads))  # noqa: N815

    class local:  # noqa: N801 (numba's name)
        @staticmethod
        def array(shape: Any, dtype: Any) -> np.ndarray:
            return np.zeros(shape, dtype)

    def syncthreads(self) -> None:
        _here.block.barrier.wait(TIMEOUT)

    def syncwarp(self) -> None:
        _here.block.warps[_here.thread // 32][0].wait(TIMEOUT)

    def threadfence(self) -> None:
        pass

    def shfl_xor_sync(self, mask: int, value: Any, step: int) -> Any:
        return _exchange(value)[_here.thread % 32 ^ int(step)]

    def shfl_sync(self, mask: int, value: Any, lane: int) -> Any:
        return _exchange(value)[int(lane) % 32]


def _global(address: int, count: int, dtype: Any) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * (count * np.dtype(dtype).itemsize)).from_address(int(address)), dtype)


def _part(address: Any, count: int, dtype: Any) -> np.ndarray:
    at = int(address)
    assert at % (count * np.dtype(dtype).itemsize) == 0, "misaligned"
    return _here.block.memory[at : at + count * np.dtype(dtype).itemsize].view(dtype)


def _store(dtype: Any) -> Callable:
    def store(address: Any, *values: Any) -> None:
        # as the hardware does, only the low bits of integers
        kept = [int(v) & 0xFFFFFFFF for v in values] if dtype == np.int32 else values
        _part(address, len(values), np.uint32 if dtype == np.int32 else dtype)[:] = kept

    return store


def _fetch_add(address: int, amount: Any) -> Any:
    with _here.block.lock:
        place = _global(address, 1, np.int32)
        before = place[0]
        place[0] += amount
        return before


def _copy_async(count: int) -> Callable:
    def copy(to: Any, source: int) -> None:
        _part(to, count, np.uint8)[:] = _global(source, count, np.uint8)

    return copy


def _dp4a(a: Any, b: Any, c: Any) -> Any:
    a, b = (np.array([x], np.int32).view(np.int8).astype(np.int64) for x in (a, b))
    return np.int64(c + (a * b).sum())


def _halves(*words: Any) -> np.ndarray:
    """The float16 pairs in some words, low halves first, as float64."""
    return np.array([int(word) & 0xFFFFFFFF for word in words], np.uint32).view(np.float16).astype(np.float64)


def _pack(first: Any, second: Any) -> Any:
    return np.array([first, second], np.float32).astype(np.float16).view(np.int32)[0]


def _permute(a: Any, b: Any, selector: Any) -> Any:
    eight = np.array([int(a) & 0xFFFFFFFF, int(b) & 0xFFFFFFFF], np.uint32).view(np.uint8)
    return eight[[int(selector) >> 4 * i & 7 for i in range(4)]].view(np.int32)[0]


def _multiply_16x8x16(*operands: Any) -> tuple:
    """Where a lane (4 g + t) has what, is in PTX ISA, "matrix fragments for mma.m16n8k16"."""
    lanes = _exchange(operands[:6])
    g, t = divmod(_here.thread % 32, 4)
    out = np.array(operands[6:], np.float64).reshape(2, 2)
    # Row g, then row g + 8; columns 0 to 7, then 8 to 15. Columns of b: 2t and 2t + 1.
    a = [_halves(*(lanes[4 * g + i][r + 2 * half] for half in (0, 1) for i in range(4))) for r in (0, 1)]
    b = [_halves(*(lanes[4 * (2 * t + c) + i][4 + half] for half in (0, 1) for i in range(4))) for c in (0, 1)]
    out += np.array(a) @ np.array(b).T
    return tuple(out.astype(np.float32).reshape(4))


_INSTRUCTIONS: dict[str, Callable] = {
    "address": lambda pointer: pointer.address,
    "advance": lambda pointer, count: Pointer(pointer.array, pointer.offset + int(count)),
    "shared_address": lambda array: 0,
    "load_f32x4": lambda address: tuple(_global(address, 4, np.float32)),
    "load_i32x4": lambda address: tuple(_global(address, 4, np.int32)),
    "shared_i32x4": lambda address: tuple(_part(address, 4, np.int32)),
    "shared_f32x4": lambda address: tuple(_part(address, 4, np.float32)),
    "shared_i32": lambda address: _part(address, 1, np.int32)[0],
    "shared_f32": lambda address: _part(address, 1, np.float32)[0],
    "shared_u16": lambda address: _part(address, 1, np.uint16)[0],
    "shared_store_i32": _store(np.int32),
    "shared_store_f32": _store(np.float32),
    "shared_store_f32x4": _store(np.float32),
    "shared_store_i32x4": _store(np.int32),
    "copy_async_16": _copy_async(16),
    "copy_async_4": _copy_async(4),
    "copy_async_commit": lambda: None,
    "dp4a": _dp4a,
    "multiply_16x8x16": _multiply_16x8x16,
    "permute": _permute,
    "pack_halves": lambda a, b: _pack(*np.clip(np.array([a, b], np.float32), -65504, 65504)),
    "round_halves": _pack,
    "still": lambda i: i,
    "half_to_float": lambda bits: np.array([bits], np.uint16).view(np.float16).astype(np.float32)[0],
    "halves_to_floats": lambda bits: tuple(np.array([bits], np.int32).view(np.float16).astype(np.float32)),
    "float_to_half": lambda value: np.float32(value).astype(np.float16).view(np.uint16),
    "round_to_int": lambda value: np.int64(np.rint(value)),
    "exp2": lambda value: np.exp2(np.float32(value)),
    "divide": lambda a, b: int(a) // int(b),
    "fetch_add": _fetch_add,
    "wait_for_previous_kernel": lambda: None,
    "let_next_kernel_start": lambda: None,
}


def _emulated(value: Any, made: dict[int, Any]) -> Any:
    """A kernel's global or closure value, for Python: device functions and instructions as functions."""
    if id(value) in made:
        return made[id(value)]
    name = getattr(value, "__name__", "")
    if getattr(ptx, name, None) is value and name in _INSTRUCTIONS:
        return _INSTRUCTIONS[name]
    if name == "wait" and "groups of copies" in (value.__doc__ or ""):
        return lambda: None
    function = getattr(value, "py_func", None)
    return value if function is None else python_function(function, made)


def python_function(function: Any, made: dict[int, Any]) -> Any:
    """The function with everything that it names emulated."""
    names = set(function.__code__.co_names)
    known = {name: value for name, value in function.__globals__.items() if name in names}
    known = {name: _Cuda() if name == "cuda" else _emulated(value, made) for name, value in known.items()}
    cells = tuple(types.CellType(_emulated(cell.cell_contents, made)) for cell in function.__closure__ or ())
    return types.FunctionType(
        function.__code__, {**known, "__builtins__": __builtins__}, function.__name__, None, cells
    )


def launch(kernel: Kernel, grid: tuple, *arguments: Any, shared: int = 0) -> None:
    """Runs kernel(*arguments) on `grid` blocks; arrays are written in place, None is a null pointer."""
    body = python_function(kernel.function, {})
    pointers = []
    for value, kind in zip(arguments, kernel.parameters, strict=True):
        if kind.endswith("p"):
            pointers.append(Pointer(None if value is None else value.reshape(-1)))
        else:
            pointers.append(np.float32(value) if kind == "f32" else int(value))
    failures: list[BaseException] = []

    def thread(block: Block, index: int) -> None:
        _here.block, _here.thread, _here.turn = block, index, 0
        try:
            with np.errstate(all="ignore"):
                body(*pointers)
        except BaseException as failure:
            failures.append(failure)
            block.barrier.abort()
            for barrier, _ in block.warps:
                barrier.abort()

    x, y, z = (*grid, 1, 1)[:3]
    for index in np.ndindex(z, y, x):
        block = Block((x, y, z), index[::-1], kernel.threads, shared)
        threads = [threading.Thread(target=thread, args=(block, i)) for i in range(kernel.threads)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        if failures:
            raise next((f for f in failures if not isinstance(f, threading.BrokenBarrierError)), failures[0])
