"""From a Python kernel to a cubin, kept on disk between runs.

A kernel is a plain function under `@kernel("f32p i32 f32p", threads=256)`, which names the types of its parameters:
pointers into device memory, and numbers. numba-cuda compiles it to an intermediate language and nvJitLink that to a
cubin, both without a GPU; the driver only loads the result. Kernels that are specialised by constants (a head size, a
row's width) come from a factory under `@family(...)`, which makes one kernel per tuple of constants.

Cubins are stored in the user's cache directory under a hash of this package's sources and its compilers' versions.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache, wraps
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import platformdirs
from numba import cuda, types
from numba.cuda import dispatcher

from numbainfer.gpu import ptx
from numbainfer.kernel_files import write_atomically

# What kernels take: numbers, and pointers into device memory. float16 and bfloat16 arrays are pointers to their bits.
_NUMBERS = {"i32": types.int32, "i64": types.int64, "f32": types.float32}
_POINTERS = {
    f"{name}p": types.CPointer(kind) for name, kind in {"i8": types.int8, "u16": types.uint16, **_NUMBERS}.items()
}
TYPES = {**_NUMBERS, **_POINTERS}

compiled_seconds = 0.0
"""Time spent compiling in this process: 0 when everything came from the cache."""

on_first_compile: Callable[[], None] | None = None
"""Called once before the first kernel of this process is compiled (the command line prints a line)."""

MODULES = [
    "elementwise",
    "half_rows",
    "mma_kernel",
    "attention_prefill",
    "quantize",
    "select",
    "rope",
    "attention",
    "linear_float",
    "linear_int8",
    "token_kernel",
    "experts",
    "bandwidth",
]
"""Where kernels are, for what goes over all of them (tests)."""


@dataclass(frozen=True)
class Cubin:
    """Machine code for one architecture, and what the assembler says of it."""

    code: bytes
    registers: int  # per thread
    stack: int  # bytes per thread in local memory: arrays that did not fit registers, spills included
    spills: int  # bytes per thread of registers that did not fit
    shared: int  # bytes of static shared memory per block
    waits: bool  # each wgmma for the one before: the compiler could not overlap them
    entry: str  # the kernel's name in it


class Kernel:
    """A kernel function and how it is launched.

    parameters: the names in TYPES of what it takes, "f32p f32p i32". threads: of a block, at most. blocks: per
    multiprocessor, for which the compiler keeps registers few. hot: part of the fast path; tests hold it to no local
    memory. fast: approximate division, square root and exp. only: the one architecture that has what it needs.
    """

    def __init__(
        self,
        function: Callable,
        parameters: str,
        threads: int,
        blocks: int,
        *,
        hot: bool,
        fast: bool,
        only: tuple[int, int] | None,
    ) -> None:
        self.function, self.threads, self.blocks, self.hot, self.fast = function, threads, blocks, hot, fast
        self.only = only
        self.__doc__ = function.__doc__
        self.name = function.__name__.lstrip("_")
        self.constants: tuple = ()
        self.parameters = tuple(parameters.split())
        if len(self.parameters) != function.__code__.co_argcount:
            raise TypeError(
                f"{self.name} takes {function.__code__.co_argcount} arguments, {parameters} says another number"
            )

    @property
    def symbol(self) -> str:
        """A name that tells it from other kernels of its module."""
        suffix = "".join(f"_{constant}" for constant in self.constants)
        return re.sub(r"\W", "", self.name + suffix)

    def cubin(self, capability: tuple[int, int]) -> Cubin:
        """The machine code, from the cache or compiled. Only this package's kernels are kept there: the cache's key has
        its sources, and would not see a change in others'."""
        if not self.function.__module__.startswith("numbainfer."):
            return self.compile(capability)
        key = hashlib.sha256(f"{self.function.__module__}.{self.symbol}".encode()).hexdigest()[:24]
        path = cache_directory() / "sm_{}{}".format(*capability) / f"{self.name}-{key}"
        found = _read(path)
        if found is None:
            found = self.compile(capability)
            facts = {k: v for k, v in found.__dict__.items() if k != "code"}
            header = json.dumps({**facts, "sha256": hashlib.sha256(found.code).hexdigest()})
            write_atomically(path, header.encode() + b"\n" + found.code)
        return found

    def compile(self, capability: tuple[int, int]) -> Cubin:
        """Compiles; needs no GPU."""
        global compiled_seconds, on_first_compile  # noqa: PLW0603
        if on_first_compile is not None:
            on_first_compile()
            on_first_compile = None
        start = time.perf_counter()
        try:
            return _link(self.intermediate(capability), capability, fast=self.fast)
        finally:
            compiled_seconds += time.perf_counter() - start

    def intermediate(self, capability: tuple[int, int], output: str = "ltoir") -> bytes:
        """The kernel in NVIDIA's intermediate language, or with output "ptx" in PTX, to look at."""
        # Blocks of different kernels share a multiprocessor by dependent launch, which sm_80 has not.
        bounds = (self.threads, max(1, self.blocks) if capability >= (9, 0) else 1)
        kinds = tuple(TYPES[p] for p in self.parameters)
        with _compiling_for(capability):
            code, _ = cuda.compile(
                *(self.function, kinds),
                **{
                    "cc": capability,
                    "fastmath": self.fast,
                    "launch_bounds": bounds,
                    "abi": "numba",
                    "device": False,
                    "output": output,
                },
            )
        return code


def kernel(
    parameters: str,
    *,
    threads: int,
    blocks: int = 0,
    hot: bool = False,
    fast: bool = False,
    only: tuple[int, int] | None = None,
) -> Callable[[Callable], Kernel]:
    """Decorator: makes a function launchable. See Kernel."""
    return lambda function: Kernel(function, parameters, threads, blocks, hot=hot, fast=fast, only=only)


_DEVICE_FUNCTIONS: list[Any] = []


def device_function(function: Callable) -> Any:
    """Decorator: makes a function callable from kernels, into which the compiler inlines it."""
    made = cuda.jit(function, device=True)
    _DEVICE_FUNCTIONS.append(made)
    return made


@contextmanager
def _compiling_for(capability: tuple[int, int]) -> Iterator[None]:
    """Within, numba-cuda compiles device functions for this architecture; it would ask the driver for the GPU at hand,
    which need not be there."""
    asked = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
    if ptx.target != capability:
        ptx.target = capability
        for function in _DEVICE_FUNCTIONS:  # compiled for another architecture
            function.overloads.clear()
    try:
        yield
    finally:
        dispatcher.get_current_device = asked


FAMILIES: list[tuple[Callable[..., Kernel], tuple[tuple, ...]]] = []


def family(*samples: tuple) -> Callable[[Callable[..., Kernel]], Callable[..., Kernel]]:
    """Decorator: a factory of kernels, called with constants; each tuple of them gives one kernel.

    samples: constants for which tests compile it.
    """

    def decorate(factory: Callable[..., Kernel]) -> Callable[..., Kernel]:
        @cache
        @wraps(factory)
        def make(*constants: Any) -> Kernel:
            made = factory(*constants)
            made.constants = constants
            return made

        FAMILIES.append((make, samples))
        return make

    return decorate


def all_kernels() -> list[Kernel]:
    """Every kernel of this package, families by their samples."""
    modules = [importlib.import_module(f"numbainfer.gpu.{name}") for name in MODULES]
    plain = [value for module in modules for value in vars(module).values() if isinstance(value, Kernel)]
    return plain + [make(*constants) for make, samples in FAMILIES for constants in samples]


def _link(code: bytes, capability: tuple[int, int], *, fast: bool) -> Cubin:
    """The intermediate language to a cubin by nvJitLink.

    Not from PTX, which nvJitLink compiles to be linked with other code: with `setmaxnreg` ignored and each wgmma waited
    for. sm_90a is sm_90 with what only that architecture has, wgmma above all.
    """
    from cuda.bindings import nvjitlink

    options = ["-arch=sm_{}{}".format(*capability) + ("a" if capability == (9, 0) else ""), "-O3", "-lto", "-verbose"]
    options += ["-ftz=1", "-prec-div=0", "-prec-sqrt=0"] if fast else []
    handle = nvjitlink.create(len(options), options)
    try:
        nvjitlink.add_data(handle, nvjitlink.InputType.LTOIR, code, len(code), "kernel")
        nvjitlink.complete(handle)
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
        cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, cubin)
    except nvjitlink.nvJitLinkError as error:
        log = bytearray(nvjitlink.get_error_log_size(handle))
        nvjitlink.get_error_log(handle, log)
        raise RuntimeError(f"nvJitLink: {error}: {log.decode(errors='replace')}") from error
    finally:
        nvjitlink.destroy(handle)
    said = log.decode(errors="replace")
    entry = re.search(rb"\.text\.(\w+)", cubin)
    assert entry is not None

    def number(pattern: str) -> int:
        return max((int(n) for n in re.findall(pattern, said)), default=0)

    return Cubin(
        bytes(cubin),
        entry=entry[1].decode(),
        registers=number(r"[Uu]sed (\d+) registers"),
        stack=number(r"(\d+) bytes stack frame"),
        spills=number(r"(\d+) bytes spill stores"),
        shared=number(r"(\d+) bytes smem"),
        waits="wgmma.mma_async instructions are serialized" in said,
    )


def _read(path: Path) -> Cubin | None:
    try:
        header, code = path.read_bytes().split(b"\n", 1)
        facts = json.loads(header)
        intact = facts.pop("sha256") == hashlib.sha256(code).hexdigest()
        return Cubin(code, **facts) if intact else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent, unreadable or cut short: compile again


@lru_cache(maxsize=1)
def cache_directory() -> Path:
    """Where cubins are kept; named by a hash of everything that they depend on, architectures below it."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    for package in ("numba", "numba-cuda", "llvmlite", "nvidia-nvvm", "nvidia-nvjitlink"):
        try:
            digest.update(f"{package} {metadata.version(package)}".encode())
        except metadata.PackageNotFoundError:  # a toolkit of the system's
            digest.update(f"{package} -".encode())
    return Path(platformdirs.user_cache_dir("numbainfer")) / "kernels-cuda" / digest.hexdigest()[:16]
