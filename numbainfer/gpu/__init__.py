"""The operators on NVIDIA GPUs, compiled by numba-cuda. See registry.py for what each one does."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from numbainfer.device import Device
from numbainfer.gpu.attention import attention
from numbainfer.gpu.bandwidth import BandwidthProbe
from numbainfer.gpu.driver import open_gpu
from numbainfer.gpu.elementwise import add, embedding, rmsnorm, softmax, swiglu
from numbainfer.gpu.experts import combine, group_by_expert, linear_experts, route
from numbainfer.gpu.launch import Stream
from numbainfer.gpu.linear_float import linear
from numbainfer.gpu.memory import DeviceAllocator, DeviceArray
from numbainfer.gpu.quantize import quantize, quantize_matrix
from numbainfer.gpu.rope import rope, rope_and_store
from numbainfer.gpu.select import argmax, greedy, top_k
from numbainfer.gpu.token_step import token_step
from numbainfer.memory import Allocator, MemoryPool

CHUNK = 2048  # fewer would leave multiprocessors without work
RUNS_AHEAD = True  # launches are queued: the device can go on while the host reads what it chose

__all__ = [
    "CHUNK",
    "RUNS_AHEAD",
    "BandwidthProbe",
    "activation_planes",
    "add",
    "argmax",
    "attention",
    "combine",
    "device_name",
    "download",
    "embedding",
    "greedy",
    "group_by_expert",
    "linear",
    "linear_experts",
    "mark",
    "open_allocator",
    "open_stream",
    "quantize",
    "quantize_matrix",
    "rmsnorm",
    "rope",
    "rope_and_store",
    "route",
    "shared_array",
    "softmax",
    "swiglu",
    "token_step",
    "top_k",
    "upload",
]


@cache
def _stream(index: int) -> Stream:
    return Stream(open_gpu(index))


def open_stream(device: Device, threads: int | None) -> Stream:
    """The stream of a GPU: one for all, so that arrays of one binding are in order with kernels of another."""
    return _stream(device.index)


def upload(pool: MemoryPool, array: np.ndarray) -> DeviceArray:
    """A copy on the device, read from a mapped file on the way."""
    out = pool.empty(array.shape, array.dtype)
    out[...] = array
    return out


def download(stream: Stream, array: DeviceArray) -> np.ndarray:
    """A copy in page-locked memory."""
    return stream.download(array)


def shared_array(stream: Stream, shape: tuple[int, ...], dtype: Any) -> tuple[DeviceArray, np.ndarray]:
    """Page-locked host memory, which kernels write through its address."""
    return stream.shared_array(shape, dtype)


def mark(stream: Stream) -> Callable[[], None]:
    """Waits on an event."""
    return stream.mark()


def device_name(device: Device) -> str:
    """The GPU's name."""
    return open_gpu(device.index).name


def free_memory(device: Device) -> int:
    """Bytes of the GPU that nobody holds."""
    return open_gpu(device.index).free_memory()


def activation_planes(tokens: int) -> int:
    """Two planes for any number of tokens."""
    return 2


def open_allocator(device: Device) -> Allocator:
    """Memory of a GPU."""
    stream = _stream(device.index)
    return DeviceAllocator(stream.gpu, stream.copier)
