"""What this computer is, which kernels run on it, and what is missing that would make it faster or do more."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

from numbainfer._version import __version__
from numbainfer.console import size
from numbainfer.device import cpu_name, physical_cores, sysctl
from numbainfer.loading import cache_directory

# LLVM's names of the vector extensions that kernels use, or could.
_FEATURES = (
    *("sse4.2", "avx", "avx2", "fma", "f16c", "avxvnni", "avx512f", "avx512bw", "avx512vl", "avx512vnni"),
    *("avx512bf16", "avx512fp16", "amx-int8", "amx-bf16", "neon", "dotprod", "fullfp16", "i8mm", "bf16", "sve", "sve2"),
)
_MINIMUM_DRIVER = 13000  # CUDA 13.0, which the wheels of the gpu extra need
_MINIMUM_CAPABILITY = (8, 0)
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # of CUdevice_attribute

# Module -> the extra that brings it, and what it is for. (test_info.py holds this against setup.cfg.)
OPTIONAL = {
    "matplotlib": ("plot", "bench --plot"),
    "llguidance": ("constrained", "run --json-schema, --regex, --grammar"),
}


def machine() -> dict[str, Any]:
    """All facts, as `info -o json` prints them. Sizes in bytes; None where the system does not say."""
    import llvmlite
    import numba

    from numbainfer.cpu.compile import cache_directory as kernels
    from numbainfer.cpu.isa import detect

    driver, gpus = nvidia()
    return {
        "numbainfer": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "numpy": np.__version__,
        "cpu": {
            "name": cpu_name(),
            "physical_cores": physical_cores(),
            "features": cpu_features(),
            "caches": cpu_caches(),
            "memory_bytes": memory_bytes(),
            "kernels": detect().name,
        },
        "cuda_driver": None if driver is None else f"{driver // 1000}.{driver % 1000 // 10}",
        "gpus": gpus,
        "cache_directory": str(cache_directory()),
        "kernel_directory": str(kernels()),
        "compiled_kernels": len(list(kernels().glob("*"))) if kernels().exists() else 0,
        "missing": missing(driver, gpus),
    }


def as_text(facts: dict[str, Any]) -> dict[str, str]:
    """The same for people: name -> value."""
    cpu = facts["cpu"]
    caches = ", ".join(f"{level} {size(nbytes, 1024)}" for level, nbytes in cpu["caches"].items())
    memory = "" if cpu["memory_bytes"] is None else size(cpu["memory_bytes"])
    lines = {
        "numbainfer": facts["numbainfer"],
        "python": f"{facts['python']} on {facts['platform']}",
        "numba": f"{facts['numba']} (llvmlite {facts['llvmlite']}), numpy {facts['numpy']}",
        "cpu": f"{cpu['name']}, {cpu['physical_cores']} physical cores",
        "  features": " ".join(cpu["features"]),
        "  caches": caches,
        "  memory": memory,
        "  int8 kernels": cpu["kernels"],
    }
    for gpu in facts["gpus"]:
        capability = ".".join(map(str, gpu["compute_capability"]))
        name = f"cuda:{gpu['index']}"
        lines[name] = f"{gpu['name']}, {size(gpu['memory_bytes'])}, compute capability {capability}"
    if not facts["gpus"]:
        lines["gpu"] = "none" + (" (no NVIDIA driver)" if facts["cuda_driver"] is None else "")
    if facts["cuda_driver"] is not None:
        lines["  driver"] = f"CUDA {facts['cuda_driver']}"
    lines["cache"] = facts["cache_directory"]
    lines["  compiled kernels"] = f"{facts['compiled_kernels']} in {facts['kernel_directory']}"
    lines |= {f"missing{'' if not i else f' {i + 1}'}": line for i, line in enumerate(facts["missing"])}
    return {name: value for name, value in lines.items() if value}


def cpu_features() -> list[str]:
    """The CPU's vector extensions that matter here."""
    import llvmlite.binding as llvm

    present = llvm.get_host_cpu_features()
    return [name for name in _FEATURES if present.get(name)]


def cpu_caches() -> dict[str, int]:
    """Bytes of each level of the first core's caches, "L1d" to "L3"; empty where the system does not say."""
    if sys.platform == "darwin":
        names = {"L1d": "hw.l1dcachesize", "L2": "hw.l2cachesize", "L3": "hw.l3cachesize"}
        return {level: value for level, name in names.items() if (value := _sysctl(name))}
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, text = (
                (index / name).read_text(encoding="utf-8").strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        if kind != "Instruction" and text.endswith("K"):
            found[f"L{level}" + ("d" if kind == "Data" else "")] = int(text[:-1]) << 10
    return found


def memory_bytes() -> int | None:
    """Main memory."""
    if sys.platform == "darwin":
        return _sysctl("hw.memsize")
    if sys.platform == "win32":

        class Status(ctypes.Structure):  # MEMORYSTATUSEX
            _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong), ("total", ctypes.c_ulonglong)] + [
                (name, ctypes.c_ulonglong)
                for name in ("free", "pages", "free_pages", "virtual", "free_virtual", "rest")
            ]

        status = Status(length=ctypes.sizeof(Status))
        done = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return status.total if done else None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _sysctl(name: str) -> int | None:
    """A size that macOS knows under this name."""
    value = ctypes.c_uint64(0)
    return value.value if sysctl(name, value) else None


def nvidia() -> tuple[int | None, list[dict[str, Any]]]:
    """The CUDA version of the NVIDIA driver (13000: 13.0; None without one) and its GPUs, asked of the driver itself:
    nothing needs to be installed, and nothing is allocated on a GPU."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        version, count = ctypes.c_int(), ctypes.c_int()
        if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None, []
        if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
            return version.value, []
        return version.value, [_gpu(driver, index) for index in range(count.value)]
    except (OSError, AttributeError):
        return None, []


def _gpu(driver: Any, index: int) -> dict[str, Any]:
    name, memory, capability = ctypes.create_string_buffer(128), ctypes.c_size_t(), []
    device = ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return {
        "index": index,
        "name": name.value.decode(errors="replace"),
        "memory_bytes": memory.value,
        "compute_capability": capability,
    }


def missing(driver: int | None, gpus: list[dict[str, Any]]) -> list[str]:
    """What would do more, and how to get it; one line each."""
    lines = []
    if gpus:
        if driver is not None and driver < _MINIMUM_DRIVER:
            lines.append("the GPU needs a driver for CUDA 13.0: update it (580 or newer)")
        if all(tuple(gpu["compute_capability"]) < _MINIMUM_CAPABILITY for gpu in gpus):
            lines.append("the GPU needs compute capability 8.0 (Ampere or newer)")
        elif not all(_importable(name) for name in ("numba_cuda", "cuda.core", "cuda.bindings")):
            lines.append('--device cuda needs its packages: pip install "numbainfer[gpu]"')
    for module, (extra, use) in OPTIONAL.items():
        if not _importable(module):
            lines.append(f'{use} needs {module}: pip install "numbainfer[{extra}]"')
    directory = cache_directory()
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    if not os.access(directory, os.W_OK):
        lines.append(f"kernels are compiled at every start: {directory} can't be written")
    return lines


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # of a package that is not there
        return False
