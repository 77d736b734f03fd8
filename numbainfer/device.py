"""Which device to run on, and what the machine is."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

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
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def physical_cores() -> int:
    """The number of physical cores this process may run on: hyper-threads share one vector unit."""
    try:
        allowed = os.sched_getaffinity(0)  # type: ignore[attr-defined, unused-ignore]
    except AttributeError:
        return os.cpu_count() or 1  # macOS, Windows
    siblings = set()
    for cpu in allowed:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(path.read_text())
        except OSError:
            siblings.add(str(cpu))
    return max(1, len(siblings))


def peak_memory_bytes() -> int:
    """The largest resident set that this process has had, in bytes (0 where the system does not say)."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
