"""Launch, capture and replay: the CPU's stream.

A launch is (kernel, number of tasks, arguments). A stream either runs it at once, or, while capturing, appends it to
a Program, which `replay` then runs as often as wanted with one call from Python: what a CUDA graph is to a GPU.

One `@njit(parallel=True)` region runs a whole program. Every worker walks the list of instructions; for each it claims
tasks from a shared counter until none are left, then waits until all of them are done, and goes on. No worker
has to arrive for the others to go on, so a thread that the machine is slow to schedule costs its share of the work
and never a deadlock, and 150 kernels a token cost 150 atomic counters, not 150 parallel regions (1 to 2 us
each on an idle machine, and over a millisecond when another program holds a core).
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from numbainfer.cpu import compile
from numbainfer.cpu.compile import Kernel, argument_type, kernel
from numbainfer.memory import aligned_empty

ARGUMENTS = 22  # the most arguments that a kernel may take
WORDS = ARGUMENTS + 2  # int64 words per instruction: entry address, tasks, arguments
COUNTERS = 32  # int64 words of state per instruction: claimed at 0, done at 16, on cache lines of their own
SPINS = 200  # about 3 us of polling before a waiting worker offers its core to others

_i32, _i64 = ir.IntType(32), ir.IntType(64)
_P64 = types.CPointer(types.int64)


@intrinsic
def _call_entry(typingctx, address, task, worker, arguments):
    """Calls the kernel entry at `address`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        function_type = ir.FunctionType(ir.VoidType(), [_i64, _i64, _i64.as_pointer()])
        builder.call(builder.inttoptr(args[0], function_type.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, _P64), codegen


@intrinsic
def _offset(typingctx, pointer, words):
    """pointer + words"""
    return _P64(_P64, types.int64), lambda context, builder, sig, args: builder.gep(args[0], [args[1]])


@intrinsic
def _fetch_add(typingctx, pointer, index, amount):
    """Atomically adds to pointer[index] and returns what stood there; orders all memory accesses around it."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.gep(args[0], [args[1]]), args[2], "seq_cst")

    return types.int64(_P64, types.int64, types.int64), codegen


@intrinsic
def _load_acquire(typingctx, pointer, index):
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(builder.gep(args[0], [args[1]]), "acquire", 8)

    return types.int64(_P64, types.int64), codegen


@intrinsic
def _pause(typingctx):
    """Tells the core that this is a spin loop (x86's pause; nothing elsewhere)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if builder.module.triple.startswith("x86"):
            function_type = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, function_type, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


# The scheduler's "let someone else run": its C name differs.
_yield = types.ExternalFunction("SwitchToThread" if os.name == "nt" else "sched_yield", types.int32())


@njit
def _walk(program, instructions, counters, worker):
    for i in range(instructions):
        entry, tasks = program[i * WORDS], program[i * WORDS + 1]
        arguments = _offset(program, i * WORDS + 2)
        while True:
            task = _fetch_add(counters, i * COUNTERS, 1)
            if task >= tasks:
                break
            _call_entry(entry, task, worker, arguments)
            _fetch_add(counters, i * COUNTERS + 16, 1)
        spins = 0
        while _load_acquire(counters, i * COUNTERS + 16) < tasks:
            spins += 1
            if spins < SPINS:
                _pause()
            else:
                _yield()


@njit(parallel=True)
def _run(program, instructions, counters, workers):
    for i in range(instructions):
        counters[i * COUNTERS] = 0
        counters[i * COUNTERS + 16] = 0
    for worker in prange(workers):
        _walk(program, instructions, counters, worker)


@kernel
def _replay(instructions, workers, program, counters):
    """Runs a program; compiled as a kernel so that it is cached as one: (task, worker) are its two numbers."""
    _run(program, instructions, counters, workers)


_REPLAY_TYPES = (_P64, _P64)
_ENTRY_POINT = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)


class Program:
    """A captured sequence of launches, run by one call. Holds on to every array that its launches name."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._words: list[int] = []
        self._arrays: list[Any] = []
        self._code: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._words) // WORDS

    def add(self, kernel: Kernel, tasks: int, arguments: tuple) -> None:
        """Appends a launch: kernel(task, worker, *arguments) for task in range(tasks), in any order, on any worker."""
        words = [kernel.entry(tuple(argument_type(a) for a in arguments)), tasks]
        for value in arguments:
            if isinstance(value, np.ndarray):
                self._arrays.append(value)
                words.append(value.ctypes.data)
            elif isinstance(value, (float, np.floating)):
                words.append(struct.unpack("<i", struct.pack("<f", value))[0])
            else:
                words.append(0 if value is None else int(value))
        if len(words) > WORDS:
            raise ValueError(f"{kernel.name} takes more than {ARGUMENTS} arguments")
        self._words += words + [0] * (WORDS - len(words))
        self._code = None

    def run(self) -> None:
        """Runs all launches in order; returns when the last is done. Not reentrant. Releases the GIL."""
        if self._code is None:
            code = np.array(self._words, np.int64)
            self._counters = np.zeros(len(self) * COUNTERS, np.int64)
            self._pointers = (ctypes.c_int64 * 2)(code.ctypes.data, self._counters.ctypes.data)
            self._entry = _ENTRY_POINT(_replay.entry(_REPLAY_TYPES))
            self._code = code  # last: Ctrl-C while _replay is compiled must not leave half of it
        numba.set_num_threads(self.threads)  # Numba keeps it per Python thread
        self._entry(len(self), self.threads, self._pointers)


class Stream:
    """Where operators launch their kernels: at once, or into the program being captured."""

    def __init__(self, threads: int) -> None:
        # Loads Numba's thread pool: compiled code from the cache refers to its symbols.
        numba.np.ufunc.parallel._launch_threads()
        self.threads = threads
        self._capturing: Program | None = None
        self._scratch = np.empty(0, np.float32)
        self._buffer = np.empty(0, np.float32)

    @property
    def compile_seconds(self) -> float:
        """What compiling kernels took in this process so far; 0 when all came from the cache."""
        return compile.compiled_seconds

    def launch(self, kernel: Kernel, tasks: int, *arguments: Any) -> None:
        """Runs (or captures) kernel(task, worker, *arguments) for every task in range(tasks)."""
        if self._capturing is not None:
            self._capturing.add(kernel, tasks, arguments)
            return
        program = Program(self.threads)
        program.add(kernel, tasks, arguments)
        program.run()

    @contextmanager
    def capture(self) -> Iterator[Program]:
        """Inside the with block launches are recorded, not run; then the program can be run."""
        program = self._capturing = Program(self.threads)
        try:
            yield program
        finally:
            self._capturing = None

    def time(self, programs: Sequence[Program]) -> list[float]:
        """Seconds that each of the programs takes, run once in this order."""
        clock = [time.perf_counter()]
        for program in programs:
            program.run()
            clock.append(time.perf_counter())
        return [end - start for start, end in pairwise(clock)]

    def scratch(self, floats: int) -> np.ndarray:
        """float32 scratch [threads, >= floats] for the launch at hand; launches share it one after another."""
        floats = -(-floats // 16) * 16
        if self._scratch.size < floats * self.threads:
            # aligned: vectors across two cache lines cost a GEMM a sixth of its speed
            self._scratch = aligned_empty((floats * self.threads,), np.float32)
        return self._scratch.reshape(self.threads, -1)

    def buffer(self, floats: int) -> np.ndarray:
        """float32 [floats] between two launches of one operator; the next operator's may overwrite it."""
        if self._buffer.size < floats:
            self._buffer = aligned_empty((floats,), np.float32)
        return self._buffer[:floats]
