"""The CUDA driver: opening a GPU, and saying in one line what is missing where that fails."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from numbainfer.errors import NumbaInferError

MINIMUM_DRIVER = 13000  # the wheels of the gpu extra compile for CUDA 13.0
MINIMUM_CAPABILITY = (8, 0)  # Ampere: asynchronous copies, bfloat16 and int8 tensor cores
EXTRA = 'pip install "numbainfer[gpu]"'


def load_driver() -> Any:
    """cuda.bindings.driver; NumbaInferError where the packages of the gpu extra are missing."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise NumbaInferError(f"--device cuda needs the GPU packages ({error}): {EXTRA}") from None
    return driver


def check(result: Any) -> Any:
    """The value of a driver call, which returns (status, value ...); raises what the status says."""
    driver = load_driver()
    status, *values = result
    if status == driver.CUresult.CUDA_SUCCESS:
        return values[0] if len(values) == 1 else values or None
    if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise MemoryError
    _, name = driver.cuGetErrorName(status)
    _, text = driver.cuGetErrorString(status)
    raise NumbaInferError(f"CUDA: {_text(text)} ({_text(name)})")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


@dataclass(frozen=True)
class Gpu:
    """An opened GPU: its primary context is retained and current in the thread that opened it."""

    index: int
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int  # bytes that one block may have
    memory: int  # bytes
    memory_rate: float  # bytes that memory has for each multiprocessor in a cycle of its clock, at most
    driver_version: str
    handle: Any
    context: Any

    def make_current(self) -> None:
        """Lets the calling thread use this GPU."""
        check(load_driver().cuCtxSetCurrent(self.context))

    def free_memory(self) -> int:
        """Bytes that nobody holds."""
        return check(load_driver().cuMemGetInfo())[0]


@cache
def open_gpu(index: int) -> Gpu:
    """GPU number `index`; NumbaInferError says what is missing."""
    driver = load_driver()
    try:
        status, *_ = driver.cuInit(0)
    except Exception as error:  # cuda.bindings raises RuntimeError where libcuda is not there
        raise NumbaInferError(
            f"no NVIDIA driver was found ({_first_line(error)}): install it, or use --device cpu"
        ) from None
    if status != driver.CUresult.CUDA_SUCCESS:
        raise NumbaInferError(f"the NVIDIA driver finds no GPU ({status.name}): use --device cpu")
    version = check(driver.cuDriverGetVersion())
    shown = f"{version // 1000}.{version % 1000 // 10}"
    if version < MINIMUM_DRIVER:
        raise NumbaInferError(
            f"the NVIDIA driver supports CUDA {shown}, numbainfer needs 13.0: update the driver (580 or newer), "
            "or use --device cpu"
        )
    count = check(driver.cuDeviceGetCount())
    if index >= count:
        raise NumbaInferError(
            f"cuda:{index} is not there: this machine has {count} GPU{'s' * (count != 1)}, from cuda:0"
        )
    device = check(driver.cuDeviceGet(index))
    kinds = driver.CUdevice_attribute

    def attribute(name: str) -> int:
        return check(driver.cuDeviceGetAttribute(getattr(kinds, f"CU_DEVICE_ATTRIBUTE_{name}"), device))

    name = _text(check(driver.cuDeviceGetName(128, device))).split("\0")[0]
    capability = (attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR"))
    if capability < MINIMUM_CAPABILITY:
        raise NumbaInferError(f"{name} has compute capability {capability[0]}.{capability[1]}, numbainfer needs 8.0")
    multiprocessors = attribute("MULTIPROCESSOR_COUNT")
    memory_speed = 2 * attribute("MEMORY_CLOCK_RATE") * attribute("GLOBAL_MEMORY_BUS_WIDTH") // 8  # kB/s: on both edges
    context = check(driver.cuDevicePrimaryCtxRetain(device))
    check(driver.cuCtxSetCurrent(context))
    return Gpu(
        index=index,
        name=name,
        capability=capability,
        multiprocessors=multiprocessors,
        shared_memory=attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        memory=check(driver.cuDeviceTotalMem(device)),
        memory_rate=memory_speed / max(1, multiprocessors * attribute("CLOCK_RATE")),
        driver_version=shown,
        handle=device,
        context=context,
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
