"""The operators on the CPU, compiled by Numba. See registry.py for what each one does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from numbainfer.cpu.attention import attention
from numbainfer.cpu.bandwidth import BandwidthProbe
from numbainfer.cpu.elementwise import add, embedding, rmsnorm, softmax, swiglu
from numbainfer.cpu.experts import combine, group_by_expert, linear_experts, route
from numbainfer.cpu.launch import Stream
from numbainfer.cpu.linear_float import linear
from numbainfer.cpu.quantize import quantize, quantize_matrix
from numbainfer.cpu.rope import rope, rope_and_store
from numbainfer.cpu.select import argmax, greedy, top_k
from numbainfer.device import Device, cpu_name, physical_cores
from numbainfer.errors import NumbaInferError
from numbainfer.memory import Allocator, HostAllocator, MemoryPool

# Up to here a step waits for the weights as much as for the arithmetic, and several sequences, or the tokens of a
# speculation, give what they would give one by one.
TWO_PLANES_TOKENS = 16

CHUNK = 512
RUNS_AHEAD = False  # launches are done when they return

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


def open_stream(device: Device, threads: int | None) -> Stream:
    """A stream over that many threads; None: one per physical core."""
    import numba

    limit = numba.config.NUMBA_NUM_THREADS
    if threads is not None and not 1 <= threads <= limit:
        raise NumbaInferError(f"--threads {threads}: this machine offers 1 to {limit}")
    return Stream(threads or min(physical_cores(), limit))


def upload(pool: MemoryPool, array: np.ndarray) -> np.ndarray:
    """Host memory is the device's: the array itself, mapped from a file or not."""
    return array


def download(stream: Stream, array: np.ndarray) -> np.ndarray:
    """The array itself."""
    return array


def shared_array(stream: Stream, shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """One array, twice."""
    array = np.zeros(shape, dtype)
    return array, array


def mark(stream: Stream) -> Callable[[], None]:
    """Launches are done when they return: nothing to wait for."""
    return lambda: None


def device_name(device: Device) -> str:
    """The CPU's name."""
    return cpu_name()


def activation_planes(tokens: int) -> int:
    """Two planes for few tokens, which wait for the weights; one for many, which wait for the arithmetic."""
    return 2 if tokens <= TWO_PLANES_TOKENS else 1


def token_step(stream: Stream, pool: MemoryPool, model: Any) -> None:
    """None: operators one by one are as fast."""


def open_allocator(device: Device) -> Allocator:
    """Main memory."""
    return HostAllocator()
