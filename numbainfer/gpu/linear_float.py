"""out = x @ W.T: the entry for all kinds of weights, and floating-point weights with float32 arithmetic.

A warp takes a row of W at a time, which meets up to four tokens.
"""

from __future__ import annotations

import numpy as np
from numba import cuda
from numpy import float32, int64

from numbainfer.gpu import linear_mma
from numbainfer.gpu.compile import family, kernel
from numbainfer.gpu.half_rows import scratch_halves, to_halves
from numbainfer.gpu.launch import Stream
from numbainfer.gpu.linear_int8 import linear_int8
from numbainfer.gpu.memory import DeviceArray
from numbainfer.gpu.ptx import address, advance, wait_for_previous_kernel
from numbainfer.gpu.quantize import FEW
from numbainfer.gpu.reduce import element, warp_sum
from numbainfer.quantization import Matrix, QuantizedMatrix, QuantizedRows

WARPS = 8
TOKENS = 4


@family(("float32",), ("float16",), ("uint16",))
def _linear(dtype: str):
    pointer, load = element(np.dtype(dtype))

    @kernel(f"{pointer} f32p f32p f32p f32p i32 i32 i32", threads=32 * WARPS)
    def linear(w, x, bias, residual, y, rows, width, tokens):
        wait_for_previous_kernel()
        lane = cuda.threadIdx.x % 32
        row = cuda.blockIdx.x * WARPS + cuda.threadIdx.x // 32
        if row >= rows:
            return
        w = advance(w, int64(row) * width)
        first, last = cuda.blockIdx.y * TOKENS, tokens - 1  # a token past the end repeats the last
        x0 = advance(x, int64(first) * width)
        x1 = advance(x, int64(min(first + 1, last)) * width)
        x2 = advance(x, int64(min(first + 2, last)) * width)
        x3 = advance(x, int64(min(first + 3, last)) * width)
        a0 = a1 = a2 = a3 = float32(0)
        for i in range(lane, width, 32):
            weight = load(w, i)
            a0 += weight * x0[i]
            a1 += weight * x1[i]
            a2 += weight * x2[i]
            a3 += weight * x3[i]
        sums = (warp_sum(a0), warp_sum(a1), warp_sum(a2), warp_sum(a3))
        if lane < min(TOKENS, tokens - first):
            value = sums[lane]
            at = int64(first + lane) * rows + row
            if address(bias) != 0:
                value += bias[row]
            if address(residual) != 0:
                value += residual[at]
            y[at] = value

    return linear


def linear(
    stream: Stream,
    x: DeviceArray | QuantizedRows,
    weight: Matrix | QuantizedMatrix,
    bias: DeviceArray | None,
    residual: DeviceArray | None,
    out: DeviceArray,
) -> None:
    """See registry.linear."""
    if isinstance(weight, QuantizedMatrix):
        if not isinstance(x, QuantizedRows):
            raise ValueError("linear: an int8 matrix takes QuantizedRows")
        return linear_int8(stream, x, weight, bias, residual, out)
    if isinstance(x, QuantizedRows):
        raise ValueError("linear: a floating-point matrix takes a float32 array")
    (rows, width), tokens = weight.shape, x.shape[0]
    if x.shape[1] != width or out.shape != (tokens, rows):
        raise ValueError(f"linear: x {x.shape}, weight {weight.shape}, out {out.shape} do not fit")
    if tokens > FEW and linear_mma.serves(weight):
        halves = scratch_halves(stream, "halves", tokens, width)
        to_halves(stream, "plain", x, None, 0.0, halves)
        return linear_mma.linear_mma(stream, halves, weight, bias, residual, out)
    grid = (-(-rows // WARPS), -(-tokens // TOKENS))
    kernel = _linear(str(weight.data.dtype))
    stream.launch(kernel, grid, weight.data, x, bias, residual, out, rows, width, tokens)
    return None
