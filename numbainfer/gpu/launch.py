"""Launch, capture and replay: the GPU's stream.

A launch either goes to the GPU at once or, while capturing, becomes a node of a CUDA graph, which `Program.run`
then replays with one call. All work of a device is queued on one stream, in order: kernels, copies, replays.

Kernels are launched as dependents (`programmatic stream serialization`): the next one's blocks may start while the
last one's finish, up to their `wait_for_previous_kernel()`. Every kernel calls that before it touches what other
kernels write or read, but for those that are launched `together`, which start when the ones before are complete,
and for what was written before the program began (attention_decode.py reads keys that early).
"""

from __future__ import annotations

import ctypes
import struct
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np

from numbainfer.gpu import compile
from numbainfer.gpu.compile import Kernel
from numbainfer.gpu.driver import Gpu, check, load_driver
from numbainfer.gpu.memory import Block, Copier, DeviceArray, PinnedArray

PROGRAMS_PER_GATE = 64  # that `time` queues before the GPU may begin
_DYNAMIC_SHARED = 48 << 10  # more dynamic shared memory than this must be asked for


class Program:
    """A captured sequence of launches. Holds on to the arrays that they name."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._executable: Any = None
        self.held: list[Any] = []
        self.launches = 0

    def __len__(self) -> int:
        return self.launches

    def run(self) -> None:
        """Queues all launches, in order; returns at once."""
        self._stream.flush()
        self._stream.enter()
        check(self._stream.driver.cuGraphLaunch(self._executable, self._stream.handle))

    def finish(self, graph: Any) -> None:
        """Makes the captured graph ready to run."""
        driver = self._stream.driver
        self._executable = check(driver.cuGraphInstantiate(graph, 0))
        check(driver.cuGraphDestroy(graph))
        self._finalizer = weakref.finalize(self, driver.cuGraphExecDestroy, self._executable)


class Held(ABC):
    """A launch that waits for the next operator, which may make one kernel of both. Any other sends it off first."""

    @abstractmethod
    def launch(self) -> None:
        """Launches it as it is."""


class Stream:
    """Where operators launch their kernels: at once, or into the program being captured."""

    threads = 1  # of the host: kept beside the CPU's stream, for `bench`

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.driver = load_driver()
        self._thread = threading.get_ident()
        self.handle = check(self.driver.cuStreamCreate(self.driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self.copier = Copier(gpu, self.handle, self.flush)
        self._functions: dict[Kernel, Any] = {}
        self._modules: list[Any] = []
        self._shared: dict[Kernel, int] = {}
        self._capturing: Program | None = None
        self._held: Held | None = None
        self._landings: weakref.WeakKeyDictionary[Any, PinnedArray] = weakref.WeakKeyDictionary()
        self._events: list[Any] = []  # that nobody waits for
        self._scratch: dict[str, DeviceArray] = {}

    @property
    def compile_seconds(self) -> float:
        """What compiling kernels took in this process so far; 0 when all came from the cache."""
        return compile.compiled_seconds

    def enter(self) -> None:
        """Makes the GPU current in the calling thread."""
        if self._thread != threading.get_ident():
            self._thread = threading.get_ident()
            self.gpu.make_current()

    def hold(self, held: Held) -> None:
        """Keeps a launch until the next operator."""
        self.flush()
        self._held = held

    def take_held(self) -> Held | None:
        """The launch that waits, for who makes a part of another of it (or launches it)."""
        held, self._held = self._held, None
        return held

    def flush(self) -> None:
        """Sends off the launch that waits, if there is one."""
        held = self.take_held()
        if held is not None:
            held.launch()

    def synchronize(self) -> None:
        """Waits until all that was queued is done."""
        self.flush()
        self.enter()
        check(self.driver.cuStreamSynchronize(self.handle))

    def launch(
        self,
        kernel: Kernel,
        grid: Any,
        *arguments: Any,
        shared: int = 0,
        threads: int | None = None,
        together: bool = False,
        cluster: int = 1,
    ) -> None:
        """Queues (or captures) kernel(*arguments) on `grid` blocks: a number, or up to three.

        shared: bytes of dynamic shared memory. threads: of a block, where fewer than the kernel's will do. together:
        blocks wait for each other, so all have to run at once: an error if they can't (a cooperative launch). cluster:
        so many neighbouring blocks run beside each other and reach each other's shared memory (sm_90).
        """
        self.flush()
        self.enter()
        function = self._load(kernel, shared)
        x, y, z = (*(grid if isinstance(grid, tuple) else (grid,)), 1, 1)[:3]
        if min(x, y, z) < 1:
            return
        driver, config = self.driver, self.driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = x, y, z
        config.blockDimX, config.blockDimY, config.blockDimZ = threads or kernel.threads, 1, 1
        config.sharedMemBytes, config.hStream = shared, self.handle
        if together:
            cooperative = driver.CUlaunchAttribute()
            cooperative.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
            cooperative.value.cooperative = 1
            config.attrs, config.numAttrs = [cooperative], 1
        elif self.gpu.capability >= (9, 0):
            dependent = driver.CUlaunchAttribute()
            dependent.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            dependent.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [dependent], 1
            if cluster > 1:
                neighbours = driver.CUlaunchAttribute()
                neighbours.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
                size = neighbours.value.clusterDim
                size.x, size.y, size.z = cluster, 1, 1
                config.attrs, config.numAttrs = [dependent, neighbours], 2
        slots = _slots(kernel, arguments)
        pointers = (ctypes.c_void_p * len(slots))(*(ctypes.addressof(slots) + 8 * i for i in range(len(slots))))
        check(driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0))
        if self._capturing is not None:
            self._capturing.launches += 1
            self._capturing.held += [a for a in arguments if isinstance(a, DeviceArray)]

    def _load(self, kernel: Kernel, shared: int) -> Any:
        function = self._functions.get(kernel)
        if function is None:
            cubin = kernel.cubin(self.gpu.capability)
            module = check(self.driver.cuModuleLoadData(cubin.code))
            function = check(self.driver.cuModuleGetFunction(module, cubin.entry.encode()))
            self._functions[kernel] = function
            self._modules.append(module)
        if shared > self._shared.get(kernel, _DYNAMIC_SHARED):
            attribute = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(self.driver.cuFuncSetAttribute(function, attribute, shared))
            self._shared[kernel] = shared
        return function

    @contextmanager
    def capture(self) -> Iterator[Program]:
        """Inside the with block launches are recorded, not run; then the program can be run."""
        self.flush()
        self.enter()
        mode = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED  # scratch may be allocated meanwhile
        program = self._capturing = Program(self)
        check(self.driver.cuStreamBeginCapture(self.handle, mode))
        try:
            with self.copier.aside():
                yield program
            self.flush()
        except BaseException:
            self._held = None
            self.driver.cuStreamEndCapture(self.handle)
            raise
        finally:
            self._capturing = None
        program.finish(check(self.driver.cuStreamEndCapture(self.handle)))

    def download(self, array: DeviceArray) -> np.ndarray:
        """A device's array in page-locked memory, after all that was queued; it lives until the next download from
        the same memory."""
        landing = self._landings.get(array.block)
        if landing is None or landing.values.nbytes < array.nbytes:
            landing = self._landings[array.block] = PinnedArray(array.nbytes, np.uint8)
        self.copier.to_pinned(array, landing)
        self.synchronize()
        return landing.values[: array.nbytes].view(array.dtype).reshape(array.shape)

    def shared_array(self, shape: tuple[int, ...], dtype: Any) -> tuple[DeviceArray, np.ndarray]:
        """Page-locked host memory as kernels see it, and as the host does."""
        pinned = PinnedArray(shape, dtype)
        pinned.values[...] = 0
        return DeviceArray(pinned, pinned.pointer, shape, np.dtype(dtype), self.copier), pinned.values

    def mark(self) -> Callable[[], None]:
        """A function that waits until all that was queued so far is done."""
        self.flush()
        if not self._events:
            flags = self.driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
            self._events.append(check(self.driver.cuEventCreate(flags)))
        event = self._events.pop()
        check(self.driver.cuEventRecord(event, self.handle))

        def wait() -> None:
            check(self.driver.cuEventSynchronize(event))
            self._events.append(event)

        return wait

    def time(self, programs: Sequence[Program]) -> list[float]:
        """Seconds that each of the programs takes on the GPU, run once in this order.

        They are queued behind a gate, a word of host memory that the GPU waits for, so that between the events that
        time them stands their own work and not the host's launching. The queue is finite: some at a time.
        """
        driver, seconds = self.driver, list[float]()
        gate, opened = self.shared_array((1,), np.int32)
        for first in range(0, len(programs), PROGRAMS_PER_GATE):
            some = programs[first : first + PROGRAMS_PER_GATE]
            events = [check(driver.cuEventCreate(0)) for _ in range(len(some) + 1)]
            opened[0] = 0
            self.synchronize()
            at_least = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
            check(driver.cuStreamWaitValue32(self.handle, gate.pointer, 1, at_least.value))
            try:
                check(driver.cuEventRecord(events[0], self.handle))
                for program, event in zip(some, events[1:], strict=True):
                    program.run()
                    check(driver.cuEventRecord(event, self.handle))
            finally:
                opened[0] = 1
                self.synchronize()
            seconds += [check(driver.cuEventElapsedTime(a, b)) / 1000 for a, b in pairwise(events)]
            for event in events:
                check(driver.cuEventDestroy(event))
        return seconds

    def scratch(self, name: str, shape: int | tuple[int, ...], dtype: Any = np.float32) -> DeviceArray:
        """Uninitialised memory between the launches of one operator, kept under `name`; the next call of that name may
        return the same. Programs hold on to what they were captured with."""
        shape = (shape,) if isinstance(shape, int) else shape
        dtype = np.dtype(dtype)
        wanted = int(np.prod(shape)) * dtype.itemsize
        have = self._scratch.get(name)
        if have is None or have.nbytes < wanted:
            block = Block(max(wanted, 256))
            have = self._scratch[name] = DeviceArray(
                block, block.pointer, (block.nbytes,), np.dtype(np.uint8), self.copier
            )
        return DeviceArray(have.block, have.pointer, shape, dtype, self.copier)

    def counters(self, count: int) -> DeviceArray:
        """int32 zeros [count] that kernels leave as zeros."""
        have = self._scratch.get("counters")
        if have is None or have.size < count:
            block = Block(4 * max(count, 4096))
            have = DeviceArray(block, block.pointer, (block.nbytes // 4,), np.dtype(np.int32), self.copier)
            check(self.driver.cuMemsetD8(block.pointer, 0, block.nbytes))
            self._scratch["counters"] = have
        return have


def _slots(kernel: Kernel, arguments: tuple) -> Any:
    """The arguments in slots of 8 bytes, as the kernel's types say."""
    if len(arguments) != len(kernel.parameters):
        raise TypeError(f"{kernel.name} takes {len(kernel.parameters)} arguments, not {len(arguments)}")
    words = []
    for value, kind in zip(arguments, kernel.parameters, strict=True):
        if value is None:
            words.append(0)
        elif isinstance(value, DeviceArray):
            words.append(value.pointer)
        elif kind == "f32":
            words.append(struct.unpack("<i", struct.pack("<f", value))[0])
        elif kind == "i32" and not -(2**31) <= value < 2**31:
            raise ValueError(f"{kernel.name}: {value} does not fit int32")
        else:
            words.append(int(value))
    return (ctypes.c_int64 * len(words))(*words)
