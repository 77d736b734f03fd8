"""Which device to run on, and what the machine is."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numbainfer.errors import NumbaInferError


@dataclass(frozen=True)
class Device:
    """A place to run: kind "cpu" or "cuda", and the index of the GPU."""

    kind: str
    index: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"

    @classmethod
    def parse(cls, text: str) -> Device:
        """From "auto", "cpu", "cuda" or "cuda:1"."""
        if text == "cpu" or (text == "auto" and not cuda_works()):
            return cls("cpu")
        if text == "auto":
            return cls("cuda")
        match = re.fullmatch(r"cuda(?::(\d+))?", text)
        if match is None:
            raise NumbaInferError(f"unknown device {text!r}: say auto, cpu, cuda or cuda:N")
        return cls("cuda", int(match[1] or 0))


def cuda_works() -> bool:
    """Whether `--device cuda` would run: the gpu extra's packages, a driver for CUDA 13.0, a GPU from Ampere on.

    Asks the driver's library itself, so that a machine without one pays nothing. gpu/driver.py says what is missing.
    """
    if any(importlib.util.find_spec(package) is None for package in ("numba_cuda", "cuda")):
        return False
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        number, device = ctypes.c_int(), ctypes.c_int()
        if driver.cuInit(0) or driver.cuDriverGetVersion(ctypes.byref(number)) or number.value < 13000:
            return False
        if driver.cuDeviceGet(ctypes.byref(device), 0):
            return False
        major = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        return driver.cuDeviceGetAttribute(ctypes.byref(number), major, device) == 0 and number.value >= 8
    except (OSError, AttributeError):
        return False


def cpu_name() -> str:
    """The CPU's own name for itself."""
    if sys.platform == "darwin":
        name = ctypes.create_string_buffer(256)
        if sysctl("machdep.cpu.brand_string", name):
            return name.value.decode(errors="replace")
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def physical_cores() -> int:
    """The number of physical cores this process may run on: hyper-threads share one vector unit. On Apple's chips, of
    performance cores: a step waits for its slowest thread."""
    if sys.platform == "darwin":
        count = ctypes.c_int(0)
        found = sysctl("hw.perflevel0.physicalcpu", count) or sysctl("hw.physicalcpu", count)
        return max(1, count.value if found else os.cpu_count() or 1)
    if sys.platform == "win32":
        return _windows_cores() or os.cpu_count() or 1
    siblings = set()
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(path.read_text(encoding="utf-8"))
        except OSError:
            siblings.add(str(cpu))
    return max(1, len(siblings))


def sysctl(name: str, value: Any) -> bool:
    """Fills `value`, a ctypes object, with what macOS knows under a name; whether it knows it."""
    length = ctypes.c_size_t(ctypes.sizeof(value))
    try:
        return ctypes.CDLL(None).sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(length), None, 0) == 0
    except (OSError, AttributeError):
        return False


def _windows_cores() -> int:
    """Physical cores as Windows counts them; 0 where it does not say."""
    ask = ctypes.windll.kernel32.GetLogicalProcessorInformation  # type: ignore[attr-defined, unused-ignore]
    length = ctypes.c_ulong(0)
    ask(None, ctypes.byref(length))
    entries = ctypes.create_string_buffer(length.value)
    return count_cores(entries.raw) if ask(entries, ctypes.byref(length)) else 0


def count_cores(entries: bytes) -> int:
    """Cores among SYSTEM_LOGICAL_PROCESSOR_INFORMATION structures: a mask, a kind (0: a core), 16 bytes of details."""
    layout = struct.Struct("@Pi4x16x" if struct.calcsize("P") == 8 else "@Pi16x")
    return sum(kind == 0 for _, kind in layout.iter_unpack(entries))


def peak_memory_bytes() -> int:
    """The largest resident set that this process has had, in bytes (0 where the system does not say)."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
