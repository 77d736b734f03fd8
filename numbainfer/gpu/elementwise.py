"""Operators over rows: embedding, RMSNorm, SwiGLU, add, softmax. A block is a token's row, or a part of it."""

from __future__ import annotations

import math

import numpy as np
from numba import cuda
from numpy import float32

from numbainfer.gpu.arithmetic import half_to_float
from numbainfer.gpu.compile import family, kernel
from numbainfer.gpu.half_rows import BLOCK, SUM_FACTOR, HalfRows, to_halves
from numbainfer.gpu.launch import Stream
from numbainfer.gpu.linear_int8 import HeldLinear
from numbainfer.gpu.linear_mma import HeldProduct, HeldSum
from numbainfer.gpu.memory import DeviceArray
from numbainfer.gpu.ptx import advance, wait_for_previous_kernel
from numbainfer.gpu.quantize import HeldActivations, HeldRows, check_rows, quantize_rows
from numbainfer.gpu.reduce import block_max, block_sum, element
from numbainfer.quantization import Matrix, QuantizedMatrix, QuantizedRows

THREADS = 256

# --- embedding ---------------------------------------------------------------------------------------------------


@family(("float32",), ("float16",), ("uint16",))
def _embedding(dtype: str):
    pointer, load = element(np.dtype(dtype))

    @kernel(f"i32p {pointer} i32 i32 f32p", threads=THREADS)
    def embedding(tokens, table, vocabulary, width, out):
        wait_for_previous_kernel()
        token = tokens[cuda.blockIdx.x]
        row = advance(out, cuda.blockIdx.x * width)
        source = advance(table, token * width if 0 <= token < vocabulary else 0)
        for i in range(cuda.threadIdx.x, width, THREADS):
            row[i] = load(source, i) if 0 <= token < vocabulary else float32(0)

    return embedding


@kernel("i32p i8p u16p i32 i32 i32 f32p", threads=THREADS)
def _embedding_int8(tokens, codes, scales, vocabulary, width, group, out):
    wait_for_previous_kernel()
    token = tokens[cuda.blockIdx.x]
    known = 0 <= token < vocabulary
    start = token * width if known else 0
    row = advance(out, cuda.blockIdx.x * width)
    for i in range(cuda.threadIdx.x, width, THREADS):
        scale = half_to_float(scales[(start + i) // group])
        row[i] = float32(codes[start + i]) * scale if known else float32(0)


def embedding(stream: Stream, tokens: DeviceArray, table: Matrix | QuantizedMatrix, out: DeviceArray) -> None:
    """See registry.embedding."""
    vocabulary, width = table.shape
    if out.shape != (tokens.shape[0], width):
        raise ValueError(f"embedding: {tokens.shape[0]} tokens of a table {table.shape} do not give {out.shape}")
    if isinstance(table, QuantizedMatrix):
        arrays = (tokens, table.codes, table.scales, vocabulary, width, table.group, out)
        stream.launch(_embedding_int8, tokens.shape[0], *arrays)
    else:
        stream.launch(_embedding(str(table.data.dtype)), tokens.shape[0], tokens, table.data, vocabulary, width, out)


# --- norm, activation, sum ---------------------------------------------------------------------------------------


@kernel("f32p f32p i32 f32 f32p", threads=THREADS)
def _rmsnorm(x, weight, width, eps, out):
    wait_for_previous_kernel()
    partial = cuda.shared.array(32, float32)
    x, out = advance(x, cuda.blockIdx.x * width), advance(out, cuda.blockIdx.x * width)
    squares = float32(0)
    for i in range(cuda.threadIdx.x, width, THREADS):
        squares += x[i] * x[i]
    factor = float32(1) / math.sqrt(block_sum(squares, partial) / float32(width) + eps)
    for i in range(cuda.threadIdx.x, width, THREADS):
        out[i] = x[i] * factor * weight[i]


class HeldNorm(HeldActivations):
    """The norm of a sum of few tokens, neither launched yet."""

    factor = SUM_FACTOR

    def __init__(self, stream: Stream, product: HeldSum, weight: DeviceArray, eps: float, out: QuantizedRows) -> None:
        self.stream, self.product, self.weight, self.eps, self.out = stream, product, weight, eps, out
        out.halves = None

    def launch(self) -> None:
        """The sum, then its norm, quantized."""
        self.product.launch()
        HeldRows(self.stream, "norm", self.product.out, self.weight, self.eps, self.out).launch()

    def launch_halves(self, halves: HalfRows) -> None:
        """Both at once, but for the division: it is for the products that take `halves`."""
        if halves.data.pointer == self.product.x.data.pointer:  # which other blocks of the product still read
            self.product.launch()
            to_halves(self.stream, "norm", self.product.out, self.weight, self.eps, halves)
            return
        shape = (self.out.tokens, -(-halves.width // BLOCK))
        halves.squares, halves.eps = self.stream.scratch(f"squares of {self.out.codes.pointer}", shape), self.eps
        self.product.launch_normed(self.weight, halves)


def rmsnorm(stream: Stream, x: DeviceArray, weight: DeviceArray, eps: float, out: DeviceArray | QuantizedRows) -> None:
    """See registry.rmsnorm."""
    tokens, width = x.shape
    if weight.shape != (width,) or out.shape != x.shape:
        raise ValueError(f"rmsnorm: x {x.shape}, weight {weight.shape}, out {out.shape} do not fit")
    if isinstance(out, QuantizedRows):
        check_rows(out, tokens, width)
        held, same = stream.take_held(), (x.pointer, x.shape)
        if isinstance(held, HeldSum) and (held.out.pointer, held.out.shape) == same and width % 4 == 0:
            stream.hold(HeldNorm(stream, held, weight, eps, out))
            return
        if held is not None:
            held.launch()
        quantize_rows(stream, "norm", x, weight, eps, out)
    else:
        stream.launch(_rmsnorm, tokens, x, weight, width, eps, out)


@kernel("f32p i32 f32p", threads=THREADS)
def _swiglu(gate_up, width, out):
    wait_for_previous_kernel()
    gate = advance(gate_up, cuda.blockIdx.x * 2 * width)
    up, row = advance(gate, width), advance(out, cuda.blockIdx.x * width)
    for i in range(cuda.blockIdx.y * THREADS + cuda.threadIdx.x, width, THREADS * cuda.gridDim.y):
        row[i] = gate[i] / (float32(1) + math.exp(-gate[i])) * up[i]


class HeldGated(HeldRows):
    """SwiGLU of a product of many tokens, neither launched yet."""

    def __init__(self, stream: Stream, product: HeldProduct, gate_up: DeviceArray, out: QuantizedRows) -> None:
        super().__init__(stream, "swiglu", gate_up, None, 0.0, out)
        self.product = product
        out.halves = None

    def launch(self) -> None:
        """The product, then its SwiGLU, quantized."""
        self.product.launch()
        super().launch()

    def launch_halves(self, halves: HalfRows) -> None:
        """Both at once."""
        self.product.launch_gated(halves)


def swiglu(stream: Stream, gate_up: DeviceArray, out: DeviceArray | QuantizedRows) -> None:
    """See registry.swiglu."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    if out.shape != (tokens, width):
        raise ValueError(f"swiglu: gate_up {gate_up.shape}, out {out.shape} do not fit")
    if isinstance(out, QuantizedRows):
        held = stream.take_held()
        if isinstance(held, HeldProduct) and held.out.pointer == gate_up.pointer:
            stream.hold(HeldGated(stream, held, gate_up, out))
            return
        if isinstance(held, HeldLinear) and held.out.pointer == gate_up.pointer and tokens == 1:
            hidden = stream.scratch("hidden", (1, width))
            held.launch_gated(hidden)
            quantize_rows(stream, "plain", hidden, None, 0.0, out)
            return
        if held is not None:
            held.launch()
        quantize_rows(stream, "swiglu", gate_up, None, 0.0, out)
    else:
        stream.launch(_swiglu, (tokens, -(-width // THREADS)), gate_up, width, out)


@kernel("f32p f32p i32 f32p", threads=THREADS)
def _add(x, y, width, out):
    wait_for_previous_kernel()
    start = cuda.blockIdx.x * width
    for i in range(cuda.blockIdx.y * THREADS + cuda.threadIdx.x, width, THREADS * cuda.gridDim.y):
        out[start + i] = x[start + i] + y[start + i]


def add(stream: Stream, x: DeviceArray, y: DeviceArray, out: DeviceArray) -> None:
    """See registry.add."""
    if x.shape != y.shape or x.shape != out.shape:
        raise ValueError(f"add: x {x.shape}, y {y.shape}, out {out.shape} differ")
    stream.launch(_add, (x.shape[0], -(-x.shape[1] // THREADS)), x, y, x.shape[1], out)


@kernel("f32p i32 f32p", threads=THREADS)
def _softmax(x, width, out):
    wait_for_previous_kernel()
    partial = cuda.shared.array(32, float32)
    x, out = advance(x, cuda.blockIdx.x * width), advance(out, cuda.blockIdx.x * width)
    largest = float32(-np.inf)
    for i in range(cuda.threadIdx.x, width, THREADS):
        largest = max(largest, x[i])
    largest = block_max(largest, partial)
    total = float32(0)
    for i in range(cuda.threadIdx.x, width, THREADS):
        e = math.exp(x[i] - largest)
        out[i] = e
        total += e
    inverse = float32(1) / block_sum(total, partial)
    for i in range(cuda.threadIdx.x, width, THREADS):
        out[i] *= inverse


def softmax(stream: Stream, x: DeviceArray, out: DeviceArray) -> None:
    """See registry.softmax."""
    if x.shape != out.shape or x.shape[1] == 0:
        raise ValueError(f"softmax: x {x.shape}, out {out.shape}")
    stream.launch(_softmax, x.shape[0], x, x.shape[1], out)
