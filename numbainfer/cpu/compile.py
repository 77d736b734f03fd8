"""From a Python kernel to machine code at an address, kept on disk between runs.

A kernel is a plain function `kernel(task, worker, *args)`, the CPU's counterpart of a CUDA kernel: `task` says
which part of the work to do (CUDA's block index), `worker` which thread does it. It is compiled by Numba for the
argument types of its first launch, behind an entry point of one fixed C signature, `void(task, worker, int64* args)`,
so that launch.py can call any kernel through its address.

Compiled entries are stored in the user's cache directory, under a hash of all that shapes the machine code: this
package's sources, the versions of Numba and LLVM, the CPU. (Numba's own cache key doesn't see changes in
intrinsics or in other modules, and pickles; an entry here is a JSON line and an object file.)
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np
import platformdirs
from llvmlite import ir
from numba import njit, types
from numba.core.ccallback import CFunc
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from numbainfer.cpu.simd import BF16, F16
from numbainfer.kernel_files import write_atomically

# NumPy dtypes as kernels see them; bfloat16, which NumPy lacks, travels as uint16 bits.
_POINTERS = {
    np.dtype(np.float32): types.CPointer(types.float32),
    np.dtype(np.float16): types.CPointer(F16),
    np.dtype(np.uint16): types.CPointer(BF16),
    np.dtype(np.int8): types.CPointer(types.int8),
    np.dtype(np.int32): types.CPointer(types.int32),
    np.dtype(np.int64): types.CPointer(types.int64),
}
_ENTRY = types.void(types.int64, types.int64, types.CPointer(types.int64))
# "contract" lets a * b + c become one fused instruction; nothing may be reordered or assumed finite.
_OPTIONS = {"fastmath": {"contract"}, "error_model": "numpy", "boundscheck": False, "nopython": True}

compiled_seconds = 0.0
"""Time spent compiling in this process: 0 when everything came from the cache."""

on_first_compile: Callable[[], None] | None = None
"""Called once before the first kernel of this process is compiled (the command line prints a line)."""


def argument_type(value: Any) -> Any:
    """The Numba type under which a launch argument reaches the kernel.

    Arrays become pointers, None a null float32 pointer, ints int64, floats float32.
    """
    if isinstance(value, np.ndarray):
        if value.dtype not in _POINTERS or not value.flags.c_contiguous:
            raise ValueError(f"kernels take no {value.dtype} array with strides {value.strides}, shape {value.shape}")
        return _POINTERS[value.dtype]
    if value is None:
        return _POINTERS[np.dtype(np.float32)]
    return types.float32 if isinstance(value, (float, np.floating)) else types.int64


class Kernel:
    """A kernel function and its compiled entry points, one per tuple of argument types."""

    def __init__(self, function: Callable) -> None:
        self.function = function
        self.__doc__ = function.__doc__
        constants = _closed_over(function)
        suffix = ",".join(f"{name}={value}" for name, value in sorted(constants.items()))
        self.name = f"{function.__module__}.{function.__qualname__}" + (f"[{suffix}]" if suffix else "")
        self._entries: dict[tuple, int] = {}

    def entry(self, argument_types: tuple) -> int:
        """The address of the entry point for these argument types, compiled or loaded on first use."""
        address = self._entries.get(argument_types)
        if address is None:
            symbol, code = self._load(argument_types) or self._compile(argument_types)
            address = self._entries[argument_types] = _link(symbol, code)
        return address

    def _cache_path(self, argument_types: tuple) -> Path:
        key = hashlib.sha256(f"{self.name}{argument_types}".encode()).hexdigest()[:24]
        return cache_directory() / f"{self.function.__name__}-{key}"

    @property
    def _is_kept(self) -> bool:
        """Whether the cache's key would see a change: it has this package's sources, and no one else's."""
        return self.function.__module__.startswith("numbainfer.")

    def _load(self, argument_types: tuple) -> tuple[str, bytes] | None:
        if not self._is_kept:
            return None
        try:
            header, code = self._cache_path(argument_types).read_bytes().split(b"\n", 1)
            facts = json.loads(header)
            intact = facts["sha256"] == _checksum(facts["symbol"], code)
            return (facts["symbol"], code) if intact else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # absent, unreadable or cut short: compile again

    def _compile(self, argument_types: tuple) -> tuple[str, bytes]:
        global compiled_seconds, on_first_compile  # noqa: PLW0603
        if on_first_compile is not None:
            on_first_compile()
            on_first_compile = None
        start = time.perf_counter()
        entry: Any = CFunc(
            _entry_function(self.function, argument_types), (_ENTRY.args, _ENTRY.return_type), {}, _OPTIONS
        )
        entry.compile()
        compiled_seconds += time.perf_counter() - start
        symbol = entry.native_name
        _, _, (code, _) = entry._library.serialize_using_object_code()
        header = json.dumps({"symbol": symbol, "sha256": _checksum(symbol, code)})
        if self._is_kept:
            write_atomically(self._cache_path(argument_types), header.encode() + b"\n" + code)
        return symbol, code


def _checksum(symbol: str, code: bytes) -> str:
    """Covers the symbol too: the address of a damaged name would be 0, and calling it the end of the process."""
    return hashlib.sha256(f"{symbol}\n".encode() + code).hexdigest()


def _closed_over(function: Callable) -> dict[str, Any]:
    """The constants that tell apart the kernels made by one factory: what the function closes over, and what the
    functions that it closes over do."""
    constants: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        value = cell.cell_contents
        inner = getattr(value, "py_func", value)
        if isinstance(value, (bool, int, float, str)):
            constants[name] = value
        elif callable(inner) and hasattr(inner, "__code__"):
            constants[name] = inner.__qualname__
            for inner_name, constant in _closed_over(inner).items():
                if constants.setdefault(inner_name, constant) != constant:
                    raise ValueError(f"{function.__qualname__} closes over two values of {inner_name}")
        else:
            raise ValueError(f"{function.__qualname__} closes over {name}, which can't tell its kernel from others")
    return constants


def kernel(function: Callable) -> Kernel:
    """Decorator: makes a function `kernel(task, worker, *args)` launchable."""
    return Kernel(function)


def _entry_function(function: Callable, argument_types: tuple) -> Callable:
    """entry(task, worker, args) that unpacks args, one 8-byte slot each, and calls the kernel."""
    body = njit(**{k: v for k, v in _OPTIONS.items() if k != "nopython"})(function)
    unpack = _unpacker(argument_types)

    def entry(task, worker, args):
        body(task, worker, *unpack(args))

    entry.__name__ = entry.__qualname__ = function.__name__
    return entry


def _unpacker(argument_types: tuple) -> Any:
    result = types.Tuple(argument_types)

    @intrinsic
    def unpack(typingctx, args):
        def codegen(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            out = []
            for i, kind in enumerate(argument_types):
                slot = builder.load(builder.gep(values[0], [ir.Constant(ir.IntType(64), i)]))
                if isinstance(kind, types.CPointer):
                    slot = builder.inttoptr(slot, context.get_value_type(kind))
                elif kind == types.float32:
                    slot = builder.bitcast(builder.trunc(slot, ir.IntType(32)), ir.FloatType())
                out.append(slot)
            return context.make_tuple(builder, result, out)

        return result(args), codegen

    return unpack


# --- linking -----------------------------------------------------------------------------------------------------


_engines: list[Any] = []  # keeps every linked entry's code alive as long as the process


@lru_cache(maxsize=1)
def _prepare_linker() -> None:
    cpu_target.target_context.refresh()  # makes Numba's runtime symbols known to the linker
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def _link(symbol: str, code: bytes) -> int:
    """Loads an object file and returns the address of `symbol` in it.

    Every object has a linker of its own (1 ms): Numba numbers the symbols of a process in order of compilation, so
    objects that different processes left in the cache use the same names for different functions.
    """
    _prepare_linker()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return engine.get_function_address(symbol)


# --- the cache directory -----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def cache_directory() -> Path:
    """Where compiled kernels are kept; named by a hash of everything that their machine code depends on."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    context = cpu_target.target_context.codegen()
    facts = (
        sys.version_info[:2],
        platform.machine(),
        numba.__version__,
        llvmlite.__version__,
        context.magic_tuple(),
    )
    digest.update(repr(facts).encode())
    return Path(platformdirs.user_cache_dir("numbainfer")) / "kernels" / digest.hexdigest()[:16]
