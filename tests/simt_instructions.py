"""The instructions of ptx.py, arithmetic.py, pipeline.py and numba.cuda that kernels take, in Python: see simt.py."""

from __future__ import annotations

import ctypes
import inspect
import itertools
import struct
from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from simt_world import (
    CODES,
    Counter,
    Halves,
    Steps,
    Thread,
    Warp,
    Words,
    counter_at,
    exchange,
    now,
    to_int32,
    to_int64,
)

I32, I64, F32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_float


# --- barriers and copies -----------------------------------------------------------------------------------------


def _barrier_init(address: Any, arrivals: Any) -> None:
    assert int(address) % 8 == 0, "misaligned"
    now.thread.block.memory[int(address) + 7]  # it is inside
    now.thread.block.counters[int(address)] = Counter(int(arrivals))


def _wait(address: Any, parity: Any) -> Steps:
    counter = counter_at(address)
    while not counter.passed(parity):
        counter.waiting.append(now.thread)
        yield False


def _passed(address: Any, parity: Any) -> Steps:
    if counter_at(address).passed(parity):
        return 1
    yield True
    return int(counter_at(address).passed(parity))


def _copy_bulk(to: Any, source: int, size: Any, barrier: Any) -> None:
    assert int(to) % 16 == size % 16 == 0, "misaligned"
    assert size > 0
    now.world.inside(source, int(size))
    block, counter = now.thread.block, counter_at(barrier)

    def copy() -> Steps:
        while now.world.dice is not None and now.world.dice.random() < 0.9:
            now.world.progress += 1  # it will come
            yield True
        block.memory[int(to) : int(to) + int(size)] = ctypes.string_at(source, int(size))
        counter.count(0, -int(size))

    thread = Thread(block, Warp(-1), -1)
    thread.steps = copy()
    if now.world.dice is None:
        for _ in thread.steps:
            pass
    else:
        now.world.ready.append(thread)


def _prefetch_bulk(source: int, size: Any) -> None:
    assert int(source) % 16 == size % 16 == 0, "misaligned"
    assert size > 0
    now.world.inside(source, int(size))


# --- numba.cuda --------------------------------------------------------------------------------------------------


class _Shared:
    @staticmethod
    def array(shape: Any, dtype: Any, alignment: int = 0) -> Any:
        if shape == 0:
            return None  # the dynamic part, at address 0
        frame: Any = inspect.currentframe()
        place = frame.f_back.f_code, frame.f_back.f_lasti
        kind = CODES.get(dtype, dtype)
        return now.thread.block.arrays.setdefault(place, np.full(shape, np.nan).astype(kind))


def _atomic(choose: Callable) -> Callable:
    """Of a shared array's element; nobody takes what stood there."""

    def change(values: Any, i: Any, value: Any) -> None:
        values[i] = choose(values[i], value)

    return change


class Cuda:
    """What kernels take from numba.cuda."""

    shared, atomic = _Shared, SimpleNamespace(min=_atomic(min), max=_atomic(max))
    threadIdx = property(lambda self: now.thread.place)  # noqa: N815 - numba's name
    blockIdx = property(lambda self: now.thread.block.index)  # noqa: N815 - numba's name
    gridDim = property(lambda self: now.thread.block.grid)  # noqa: N815 - numba's name
    blockDim = property(lambda self: now.thread.block.threads)  # noqa: N815 - numba's name

    class local:  # noqa: N801 - numba's name
        @staticmethod
        def array(shape: Any, dtype: Any) -> Any:
            # one of integers takes none that it can't hold: an error here
            return array(CODES[dtype], [0] * shape) if dtype in CODES else np.zeros(shape, dtype)

    def syncthreads(self) -> Steps:
        return (yield from now.thread.block.barriers[0].join(now.thread.block.threads.x))

    def syncwarp(self) -> Steps:
        return (yield from now.thread.warp.barrier.join(32))

    def threadfence(self) -> None:
        pass

    def shfl_xor_sync(self, mask: int, value: Any, step: int) -> Steps:
        lane = now.thread.lane ^ int(step)
        return (yield from exchange(value))[lane]

    def all_sync(self, mask: int, value: Any) -> Steps:
        lanes = yield from exchange(value)
        return all(lanes)

    def shfl_sync(self, mask: int, value: Any, lane: int) -> Steps:
        return (yield from exchange(value))[int(lane) % 32]


def _warp_max(value: Any) -> Steps:
    return max((yield from exchange(int(value))))


def _warp_max_u32(value: Any) -> Steps:
    largest = max((yield from exchange(int(value) & 0xFFFFFFFF)))
    return largest - (largest >> 31 << 32)  # the bits of an int32


def _synchronize_threads(name: Any, threads: Any) -> Steps:
    return (yield from now.thread.block.barriers[int(name)].join(int(threads)))


# --- memory ------------------------------------------------------------------------------------------------------


def check(address: Any, size: int) -> int:
    at = int(address)
    assert at >= 0, "outside of shared memory"
    assert at % size == 0, "misaligned"
    return at


def _shared_store_words(address: Any, *values: Any) -> None:
    at = check(address, 4 * len(values)) >> 2
    for i, value in enumerate(values):
        now.thread.block.words[at + i] = to_int32(value)


def shared_store_floats(address: Any, *values: Any) -> None:
    at = check(address, 4 * len(values)) >> 2
    for i, value in enumerate(values):
        now.thread.block.floats[at + i] = value


def shared_store_half(address: Any, value: Any) -> None:
    now.thread.block.halves[check(address, 2) >> 1] = value


def _shared_store_long(address: Any, value: Any) -> None:
    now.thread.block.longs[check(address, 8) >> 3] = to_int64(value)


def _shared_floats(address: Any) -> tuple:
    at = check(address, 16) >> 2
    return tuple(now.thread.block.floats[at : at + 4])


def read_global(kind: Any, count: int = 1) -> Callable:
    """Reads some values at an address."""
    of_float, size = kind is ctypes.c_float, count * ctypes.sizeof(kind)

    def one(address: int) -> Any:
        value = kind.from_address(now.world.inside(address, size)).value
        return np.float32(value) if of_float else value

    def several(address: int) -> tuple:
        values = (kind * count).from_address(now.world.inside(address, size))[:]
        return tuple(map(np.float32, values)) if of_float else tuple(values)

    return one if count == 1 else several


def write_global(kind: Any, count: int = 1) -> Callable:
    """Writes some values at an address."""
    size = count * ctypes.sizeof(kind)

    def store(address: int, *values: Any) -> None:
        (kind * count).from_address(now.world.inside(address, size))[:] = values
        now.world.progress += 1

    return store


def _peek(kind: Any, count: int = 1) -> Callable:
    """The same by a thread that may have to ask often."""
    read = read_global(kind, count)

    def peek(address: int) -> Steps:
        yield True
        return read(address)

    return peek


def _shared_peek(address: Any) -> Steps:
    yield True
    return now.thread.block.words[check(address, 4) >> 2]


def _post(kind: Any) -> Callable:
    def post(address: int, value: Any) -> None:
        kind.from_address(now.world.inside(address, ctypes.sizeof(kind))).value = int(value)
        now.world.progress += 1

    return post


def _fetch_add(address: int, amount: Any) -> int:
    place = ctypes.c_int32.from_address(now.world.inside(address, 4))
    before = place.value
    place.value += int(amount)
    now.world.progress += 1
    return before


def _copy_async(count: int) -> Callable:
    """Copies so many bytes, or fewer and zeros: with an `order`, some only when they are waited for."""

    def copy(to: Any, source: int, size: Any = count) -> None:
        at, memory = check(to, count), now.thread.block.memory
        data = ctypes.string_at(now.world.inside(source, count), int(size)).ljust(count, b"\0")
        if now.world.dice is None or now.world.dice.random() < 0.5:
            memory[at : at + count] = data
        else:
            now.thread.copies[-1].append((at, data))

    return copy


def wait_for_copies(groups: int) -> Callable:
    def wait() -> None:
        """Until at most `groups` closed groups of copies are under way."""
        while len(now.thread.copies) > groups + 1:
            for at, data in now.thread.copies.pop(0):
                now.thread.block.memory[at : at + len(data)] = data

    return wait


# --- arithmetic --------------------------------------------------------------------------------------------------

_FLOATS = list(np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32))  # by their bits as float16
_BYTES, _TWO_WORDS, _WORD, _FLOAT = struct.Struct("<8b"), struct.Struct("<2i"), struct.Struct("<i"), struct.Struct("<f")


_CYCLES = itertools.count(0, 100)


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
    lane = now.thread.lane
    lanes = yield from exchange(operands[:6])
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


INSTRUCTIONS: dict[str, Callable] = {
    "address": lambda pointer: pointer.address,
    "advance": lambda pointer, count: pointer.advanced(count),
    "halves_at": Halves,
    "words_at": Words,
    "shared_address": lambda array: 0,
    "load_i32": read_global(I32),
    "load_f32": read_global(F32),
    "load_weights": read_global(I32, 4),
    "load_constant_u16": read_global(ctypes.c_uint16),
    "store_f32": write_global(F32),
    "store_f32x4": write_global(F32, 4),
    "store_i32": write_global(I32),
    "store_i32x4": write_global(I32, 4),
    "load_f32x2": read_global(F32, 2),
    "load_f32x4": read_global(F32, 4),
    "load_i32x4": read_global(I32, 4),
    "load_constant_f32": read_global(F32),
    "peek_i32": _peek(I32),
    "peek_i32x4": _peek(I32, 4),
    "peek_i64": _peek(I64),
    "post_i32": _post(I32),
    "post_i64": _post(I64),
    "shared_i32x4": lambda address: tuple(now.thread.block.words[(at := check(address, 16) >> 2) : at + 4]),
    "shared_f32x4": _shared_floats,
    "shared_peek_i32": _shared_peek,
    "shared_i32": lambda address: now.thread.block.words[check(address, 4) >> 2],
    "shared_f32": lambda address: now.thread.block.floats[check(address, 4) >> 2],
    "shared_u16": lambda address: now.thread.block.halves[check(address, 2) >> 1],
    "shared_i64": lambda address: now.thread.block.longs[check(address, 8) >> 3],
    "shared_store_i32": _shared_store_words,
    "shared_store_f32": shared_store_floats,
    "shared_store_u16": shared_store_half,
    "shared_store_i64": _shared_store_long,
    "shared_store_f32x4": shared_store_floats,
    "shared_store_i32x4": _shared_store_words,
    "copy_async_16": _copy_async(16),
    "copy_async_16_or_zeros": _copy_async(16),
    "copy_async_4": _copy_async(4),
    "copy_async_commit": lambda: now.thread.copies.append([]),
    "dp4a": _dp4a,
    "multiply_16x8x16": _multiply_16x8x16,
    "permute": _permute,
    "double_half": lambda bits: to_int32(bits | bits << 16),
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
    "larger": max,
    "warp_max_i32": _warp_max,
    "warp_max_u32": _warp_max_u32,
    "exp2": lambda value: np.exp2(np.float32(value)),
    "reciprocal": lambda value: np.float32(1) / np.float32(value),
    "inverse_root": lambda value: np.float32(1) / np.sqrt(np.float32(value)),
    "clock": lambda: next(_CYCLES),
    "divide": lambda a, b: int(a) // int(b),
    "shift_right": lambda a, n: int(a) >> int(n),
    "fetch_add": _fetch_add,
    "add_at": _fetch_add,
    "multiprocessor": lambda: 5 * now.thread.block.index.x // 2,  # modulo 3, 8 or 16 blocks, some are the same
    "wait_for_previous_kernel": lambda: None,
    "let_next_kernel_start": lambda: None,
    # pipeline.py
    "bulk_copies": lambda: True,
    "barrier_init": _barrier_init,
    "barrier_arrive": lambda barrier: counter_at(barrier).count(1, 0),
    "barrier_passed": _passed,
    "_try_wait": _wait,
    "expect_bytes": lambda barrier, size: counter_at(barrier).count(1, int(size)),
    "copy_bulk": _copy_bulk,
    "prefetch_bulk": _prefetch_bulk,
    "fence_for_copies": lambda: None,
    "arrive_threads": lambda name, threads: now.thread.block.barriers[int(name)].arrive(int(threads)),
    "synchronize_threads": _synchronize_threads,
}
