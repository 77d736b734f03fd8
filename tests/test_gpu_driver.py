"""What opening a GPU says where there is none, or none that will do: a stand-in for the CUDA driver."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("numba_cuda", reason="the gpu extra is not installed")

from numbainfer.errors import NumbaInferError
from numbainfer.gpu import driver as gpu_driver

SUCCESS, NO_DEVICE = SimpleNamespace(name="CUDA_SUCCESS"), SimpleNamespace(name="CUDA_ERROR_NO_DEVICE")
CAPABILITY = {"MAJOR": 7, "MINOR": 5}


class Driver:
    """What open_gpu calls. found: cuInit's status; version: of CUDA; count: of GPUs, of compute capability 7.5."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=SUCCESS, CUDA_ERROR_OUT_OF_MEMORY=None)
    CUdevice_attribute = SimpleNamespace(
        **{f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{name}": value for name, value in CAPABILITY.items()}
    )

    def __init__(self, found: Any, version: int, count: int) -> None:
        self.found, self.version, self.count = found, version, count

    def cuInit(self, flags: int) -> tuple:
        if isinstance(self.found, Exception):
            raise self.found
        return (self.found,)

    def cuDriverGetVersion(self) -> tuple:
        return SUCCESS, self.version

    def cuDeviceGetCount(self) -> tuple:
        return SUCCESS, self.count

    def cuDeviceGet(self, index: int) -> tuple:
        return SUCCESS, index

    def cuDeviceGetName(self, length: int, device: int) -> tuple:
        return SUCCESS, b"Tesla T4\0\0"

    def cuDeviceGetAttribute(self, value: int, device: int) -> tuple:
        return SUCCESS, value


@pytest.mark.parametrize(
    ("found", "version", "count", "message"),
    [
        (RuntimeError("libcuda.so.1: cannot open"), 0, 0, "no NVIDIA driver was found .*libcuda"),
        (NO_DEVICE, 0, 0, "finds no GPU .*use --device cpu"),
        (SUCCESS, 12080, 1, r"supports CUDA 12\.8, numbainfer needs 13\.0: update the driver"),
        (SUCCESS, 13000, 0, r"cuda:0 is not there: this machine has 0 GPUs"),
        (SUCCESS, 13010, 1, r"Tesla T4 has compute capability 7\.5, numbainfer needs 8\.0"),
    ],
)
def test_one_line_says_what_is_missing(
    found: Any, version: int, count: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_driver, "load_driver", lambda: Driver(found, version, count))
    with pytest.raises(NumbaInferError, match=message) as failure:
        gpu_driver.open_gpu.__wrapped__(0)
    assert "\n" not in str(failure.value)
