"""What kernels share: sums and maxima over a warp or a block, loads of the float dtypes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import cuda
from numpy import float32

from numbainfer.gpu.arithmetic import bfloat_to_float, half_to_float
from numbainfer.gpu.compile import device_function


@device_function
def warp_sum(value):
    """The sum over a warp's 32 lanes, in every lane."""
    for step in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(0xFFFFFFFF, value, step)
    return value


@device_function
def lanes_sum(value, lanes):
    """The sum over each so many neighbouring lanes of a warp, a power of two, in each of them."""
    step = lanes // 2
    while step > 0:
        value += cuda.shfl_xor_sync(0xFFFFFFFF, value, step)
        step //= 2
    return value


@device_function
def warp_max(value):
    """The largest of a warp's 32 lanes, in every lane; NaN counts as smallest."""
    for step in (16, 8, 4, 2, 1):
        value = max(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, step))
    return value


@device_function
def block_sum(value, partial):
    """The sum over all threads of the block, in every thread. partial: shared float32 [32]."""
    value = warp_sum(value)
    if cuda.threadIdx.x % 32 == 0:
        partial[cuda.threadIdx.x // 32] = value
    cuda.syncthreads()
    total = float32(0)
    for warp in range(cuda.blockDim.x // 32):
        total += partial[warp]
    cuda.syncthreads()  # before `partial` serves again
    return total


@device_function
def block_max(value, partial):
    """The largest over all threads of the block, in every thread. partial: shared float32 [32]."""
    value = warp_max(value)
    if cuda.threadIdx.x % 32 == 0:
        partial[cuda.threadIdx.x // 32] = value
    cuda.syncthreads()
    largest = partial[0]
    for warp in range(1, cuda.blockDim.x // 32):
        largest = max(largest, partial[warp])
    cuda.syncthreads()
    return largest


def element(dtype: np.dtype) -> tuple[str, Callable]:
    """Of a stored dtype: (name of the pointer type, function that loads pointer[i] as float32)."""
    if dtype == np.float32:
        return "f32p", _load_f32
    return "u16p", _load_f16 if dtype == np.float16 else _load_bf16


@device_function
def _load_f32(pointer, i):
    return pointer[i]


@device_function
def _load_f16(pointer, i):
    return half_to_float(pointer[i])


@device_function
def _load_bf16(pointer, i):
    return bfloat_to_float(pointer[i])
