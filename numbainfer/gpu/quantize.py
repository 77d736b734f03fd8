"""Quantization: activations to QuantizedRows, alone or fused behind a norm or SwiGLU, and weights to QuantizedMatrix.

A warp takes one group at a time, up to four values a lane.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np
from numba import cuda
from numpy import float32, int8, int32, int64, uint16

from numbainfer.gpu.arithmetic import float_to_half, half_to_float, round_to_int
from numbainfer.gpu.compile import device_function, family, kernel
from numbainfer.gpu.half_rows import (
    HIDDEN_FACTOR,
    HalfRows,
    floats_of_halves,
    halves_of_codes,
    scratch_halves,
    to_halves,
)
from numbainfer.gpu.launch import Held, Stream
from numbainfer.gpu.memory import DeviceArray
from numbainfer.gpu.ptx import address, advance, fetch_add, wait_for_previous_kernel
from numbainfer.gpu.reduce import block_sum, element, warp_max, warp_sum
from numbainfer.quantization import QuantizedMatrix, QuantizedRows

THREADS = 256
TOP = float32(127 * 256)  # the largest code: of two planes, the only form here
TINY = float32(1e-33)  # groups whose values are all below count as zeros: top / m has to stay finite


@device_function
def high_byte(q):
    """Of a code of two planes, floor((q + 128) / 256)."""
    return (q + int32(128)) >> int32(8)


@device_function
def low_byte(q, high):
    """The rest, not below -127: a dot product may take a byte's absolute value."""
    return max(q - (high << int32(8)), int32(-127))


@device_function
def _plain(x, weight, width, factor, i):
    return x[i]


@device_function
def _normed(x, weight, width, factor, i):
    return x[i] * factor * weight[i]


@device_function
def _gated(x, weight, width, factor, i):
    return x[i] / (float32(1) + math.exp(-x[i])) * x[width + i]


@family(("plain",), ("norm",), ("swiglu",))
def _quantize_rows(kind: str):
    value = {"plain": _plain, "norm": _normed, "swiglu": _gated}[kind]
    normed = kind == "norm"
    columns = 2 if kind == "swiglu" else 1  # of x, for one of the result

    @kernel("f32p f32p i32 f32 i32 i8p i32 f32p i32p", threads=THREADS)
    def quantize_rows(x, weight, width, eps, group, codes, stride, scales, sums):
        wait_for_previous_kernel()
        row, groups = cuda.blockIdx.x, width // group
        x = advance(x, row * width * columns)
        codes = advance(codes, row * stride)
        warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
        factor = float32(1)
        if normed:
            partial = cuda.shared.array(32, float32)
            squares = float32(0)
            for i in range(cuda.threadIdx.x, width, THREADS):
                squares += x[i] * x[i]
            factor = float32(1) / math.sqrt(block_sum(squares, partial) / float32(width) + eps)
        values = cuda.local.array(4, float32)
        for g in range(cuda.blockIdx.y * (THREADS // 32) + warp, groups, cuda.gridDim.y * (THREADS // 32)):
            largest = float32(0)
            for j in range(4):
                i = lane + 32 * j
                values[j] = value(x, weight, width, factor, g * group + i) if i < group else float32(0)
                largest = max(largest, abs(values[j]))
            largest = warp_max(largest)
            inverse = TOP / largest if largest > TINY else float32(0)
            total = int32(0)
            for j in range(4):
                i = lane + 32 * j
                if i < group:
                    q = round_to_int(values[j] * inverse)
                    high = high_byte(q)
                    low = low_byte(q, high)
                    codes[g * group + i] = int8(high)
                    codes[stride // 2 + g * group + i] = int8(low)
                    total += (high << int32(8)) + low
            total = warp_sum(total)
            if lane == 0:
                scales[row * groups + g] = largest / TOP
                sums[row * groups + g] = total

    return quantize_rows


FEW = 4  # tokens up to which products take int8 activations; of more, they are for the tensor cores, in float16


class HeldActivations(Held):
    """The input of a product, not computed yet: a product of many tokens wants it in float16, others want `out`."""

    out: QuantizedRows
    factor = 1.0  # of the HalfRows, which numbers that have outliers are divided by

    @abstractmethod
    def launch_halves(self, halves: HalfRows) -> None:
        """Computes it in float16."""


class HeldRows(HeldActivations):
    """A quantization, not launched yet: a product may follow and do it by itself, or want another form.

    kind: "plain", "norm" or "swiglu"; x [T, width], with the norm's weight and eps.
    """

    def __init__(
        self, stream: Stream, kind: str, x: DeviceArray, weight: DeviceArray | None, eps: float, out: QuantizedRows
    ) -> None:
        self.stream, self.kind, self.x, self.weight, self.eps, self.out = stream, kind, x, weight, eps, out
        self.factor = HIDDEN_FACTOR if kind == "swiglu" else 1.0

    def launch(self) -> None:
        """Quantizes."""
        _launch(self.stream, self.kind, self.x, self.weight, self.eps, self.out)

    def launch_halves(self, halves: HalfRows) -> None:
        """To float16."""
        to_halves(self.stream, self.kind, self.x, self.weight, self.eps, halves)


def quantize_rows(
    stream: Stream, kind: str, x: DeviceArray, weight: DeviceArray | None, eps: float, out: QuantizedRows
) -> None:
    """Quantizes x ("plain"), its RMSNorm ("norm") or SwiGLU ("swiglu": x is gate_up). A block is a part of a row."""
    check_rows(out, *out.shape)
    out.halves = None
    if out.tokens > FEW or (out.tokens == 1 and kind != "swiglu"):
        stream.hold(HeldRows(stream, kind, x, weight, eps, out))
    else:
        _launch(stream, kind, x, weight, eps, out)


def _launch(
    stream: Stream, kind: str, x: DeviceArray, weight: DeviceArray | None, eps: float, out: QuantizedRows
) -> None:
    tokens, width = out.shape
    parts = 1 if kind == "norm" else max(1, width // out.group // 16)
    arrays = (x, weight, width, eps, out.group, out.codes, out.stride, out.scales, out.sums)
    stream.launch(_quantize_rows(kind), (tokens, parts), *arrays)


def quantize(stream: Stream, x: DeviceArray, out: QuantizedRows) -> None:
    """See registry.quantize."""
    check_rows(out, *x.shape)
    quantize_rows(stream, "plain", x, None, 0.0, out)


def as_halves(stream: Stream, held: Held | None, x: QuantizedRows) -> HalfRows:
    """The input of a product in float16: computed so, if it is what `held` is to compute, or converted."""
    mine = isinstance(held, HeldActivations) and held.out.codes.pointer == x.codes.pointer
    if held is not None and not mine:
        held.launch()
    if mine or x.halves is None:
        factor = held.factor if isinstance(held, HeldActivations) and mine else 1.0
        halves = scratch_halves(stream, f"halves of {x.codes.pointer}", x.tokens, x.width, factor)
        if isinstance(held, HeldActivations) and mine:
            held.launch_halves(halves)
            x.halves = halves  # and the codes are what they were
        else:
            halves_of_codes(stream, x, halves)
            return halves
    return x.halves


def as_codes(stream: Stream, x: QuantizedRows) -> None:
    """Sees to it that the codes of x hold its values."""
    stream.flush()
    if x.halves is not None:
        values = stream.scratch("floats of halves", x.shape)
        floats_of_halves(stream, x.halves, values)
        x.halves = None
        _launch(stream, "plain", values, None, 0.0, x)


def check_rows(rows: QuantizedRows, tokens: int, width: int) -> None:
    """The shapes that kernels rely on."""
    if rows.shape != (tokens, width) or rows.codes.shape[0] < tokens or width % rows.group or rows.group % 32:
        raise ValueError(f"QuantizedRows {rows.shape} of group {rows.group} can't hold [{tokens}, {width}]")
    if rows.planes != 2:
        raise ValueError("QuantizedRows: on the GPU they have two planes")


@family(("float32",), ("float16",), ("uint16",))
def _quantize_matrix(dtype: str):
    pointer, load = element(np.dtype(dtype))

    @kernel(f"{pointer} i32 i32 i8p u16p i32p", threads=THREADS)
    def quantize_matrix(x, groups, group, codes, scales, faults):
        wait_for_previous_kernel()
        lane = cuda.threadIdx.x % 32
        g = cuda.blockIdx.x * (THREADS // 32) + cuda.threadIdx.x // 32
        if g >= groups:
            return
        start = int64(g) * group
        largest, check = float32(0), float32(0)
        for i in range(lane, group, 32):
            v = load(x, start + i)
            largest = max(largest, abs(v))
            check += v * float32(0)  # NaN if any value is NaN or infinite
        largest, check = warp_max(largest), warp_sum(check)
        if check != 0:
            if lane == 0:
                fetch_add(address(faults), int32(1))
            largest = float32(0)
        elif largest > float32(65504 * 127):
            if lane == 0:
                fetch_add(address(faults) + 4, int32(1))
            largest = float32(0)
        bits = float_to_half(largest / float32(127))
        # Scales below 6e-5 are float16 subnormals, rounded to coarse steps: take the next step up where the
        # largest code would not fit in 127.
        if largest > half_to_float(bits) * float32(127.49):
            bits = uint16(bits + 1)
        scale = half_to_float(bits)
        inverse = float32(1) / scale if scale > 0 else float32(0)
        for i in range(lane, group, 32):
            codes[start + i] = int8(round_to_int(load(x, start + i) * inverse))
        if lane == 0:
            scales[g] = bits

    return quantize_matrix


def quantize_matrix(stream: Stream, x: DeviceArray, out: QuantizedMatrix, faults: DeviceArray) -> None:
    """See registry.quantize_matrix."""
    rows, width = x.shape
    if out.shape != x.shape or width % out.group:
        raise ValueError(f"can't quantize {x.shape} into {out.shape} in groups of {out.group}")
    groups = rows * (width // out.group)
    arrays = (x, groups, out.group, out.codes, out.scales, faults)
    stream.launch(_quantize_matrix(str(x.dtype)), -(-groups // (THREADS // 32)), *arrays)
