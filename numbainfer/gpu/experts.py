"""Mixtures of experts: routing tokens to experts, the experts' matrices, and adding up what they found.

Which expert a token goes to stands in arrays that kernels read, so a captured program serves every token.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda
from numpy import float32, int32, int64

from numbainfer.gpu.arithmetic import dp4a, half_to_float
from numbainfer.gpu.compile import device_function, family, kernel
from numbainfer.gpu.launch import Stream
from numbainfer.gpu.memory import DeviceArray
from numbainfer.gpu.ptx import address, advance, load_constant_u16, load_i32x4, load_weights, wait_for_previous_kernel
from numbainfer.gpu.quantize import as_codes, check_rows
from numbainfer.gpu.reduce import element, warp_max, warp_sum
from numbainfer.quantization import Matrix, QuantizedMatrix, QuantizedRows

WARPS = 8
MOST_EXPERTS = 1024


@kernel("f32p i32 i32 i32 i32p f32p", threads=32)
def _route(logits, count, k, renormalise, experts, weights):
    # A warp is a token; probabilities stand in shared memory, a chosen one becomes -1.
    wait_for_previous_kernel()
    probabilities = cuda.shared.array(MOST_EXPERTS, float32)
    token, lane = cuda.blockIdx.x, cuda.threadIdx.x
    row = advance(logits, token * count)
    largest = float32(-np.inf)
    for e in range(lane, count, 32):
        largest = max(largest, row[e])
    largest, total = warp_max(largest), float32(0)
    for e in range(lane, count, 32):
        probabilities[e] = math.exp(row[e] - largest)
        total += probabilities[e]
    total = warp_sum(total)
    for e in range(lane, count, 32):
        probabilities[e] /= total
    chosen = float32(0)
    for j in range(k):
        best, index = float32(-2), int32(count)
        for e in range(lane, count, 32):
            if probabilities[e] > best:
                best, index = probabilities[e], int32(e)
        top = warp_max(best)
        index = index if best == top else int32(count)
        for step in (16, 8, 4, 2, 1):
            index = min(index, cuda.shfl_xor_sync(0xFFFFFFFF, index, step))
        if lane == 0:
            experts[token * k + j], weights[token * k + j] = index, top
        if lane == index % 32:
            probabilities[index] = float32(-1)
        chosen += top
        cuda.syncwarp()
    if renormalise:
        for j in range(lane, k, 32):
            weights[token * k + j] /= chosen


def route(stream: Stream, logits: DeviceArray, renormalise: int, experts: DeviceArray, weights: DeviceArray) -> None:
    """See registry.route."""
    (tokens, count), k = logits.shape, experts.shape[1]
    fits = experts.shape == weights.shape == (tokens, k) and 1 <= k <= count <= MOST_EXPERTS
    if not fits:
        raise ValueError(f"route: logits {logits.shape}, experts {experts.shape}, weights {weights.shape}")
    stream.launch(_route, tokens, logits, count, k, int(renormalise), experts, weights)


@kernel("i32p i32 i32 i32 i32p i32p i32p", threads=MOST_EXPERTS)
def _group_by_expert(experts, choices, k, count, starts, tokens, places):
    # A counting sort in one block: a thread is an expert, and goes through all choices to keep their order.
    wait_for_previous_kernel()
    firsts, e = cuda.shared.array(MOST_EXPERTS, int32), cuda.threadIdx.x
    mine = int32(0)
    if e < count:
        for i in range(choices):
            mine += experts[i] == e
        firsts[e] = mine
    cuda.syncthreads()
    place = int32(0)
    if e < count:
        for other in range(e):
            place += firsts[other]
        starts[e] = place
        if e == count - 1:
            starts[count] = place + mine
        for i in range(choices):
            if experts[i] == e:
                places[i], tokens[place] = place, int32(i // k)
                place += int32(1)


def group_by_expert(
    stream: Stream, experts: DeviceArray, starts: DeviceArray, tokens: DeviceArray, places: DeviceArray
) -> None:
    """See registry.group_by_expert."""
    count = starts.shape[0] - 1
    if places.shape != experts.shape or tokens.shape != (experts.size,) or count > MOST_EXPERTS:
        raise ValueError(f"group_by_expert: experts {experts.shape}, tokens {tokens.shape}, places {places.shape}")
    arrays = (experts, experts.size, experts.shape[1], count, starts, tokens, places)
    stream.launch(_group_by_expert, 1, *arrays)


@device_function
def _expert_of(place, starts):
    e = 0
    while starts[e + 1] <= place:
        e += 1
    return e


@family(("float32",), ("float16",), ("uint16",))
def _experts_float(dtype: str):
    pointer, load = element(np.dtype(dtype))

    @kernel(f"{pointer} f32p i32p i32p f32p i32 i32", threads=32 * WARPS)
    def experts_float(w, x, starts, tokens, y, rows, width):
        # A warp is a row of the matrix that the place's expert has.
        wait_for_previous_kernel()
        place, lane = cuda.blockIdx.y, cuda.threadIdx.x % 32
        row = cuda.blockIdx.x * WARPS + cuda.threadIdx.x // 32
        if row >= rows:
            return
        source = tokens[place] if address(tokens) != 0 else place
        w = advance(w, (int64(_expert_of(place, starts)) * rows + row) * width)
        x = advance(x, int64(source) * width)
        total = float32(0)
        for i in range(lane, width, 32):
            total += load(w, i) * x[i]
        total = warp_sum(total)
        if lane == 0:
            y[int64(place) * rows + row] = total

    return experts_float


@kernel("i8p u16p i32p i32 f32p i32 i32p i32p f32p i32 i32", threads=32 * WARPS)
def _experts_int8(w, ws, codes, stride, scales, group, starts, tokens, y, rows, width):
    wait_for_previous_kernel()
    place, lane = cuda.blockIdx.y, cuda.threadIdx.x % 32
    row = cuda.blockIdx.x * WARPS + cuda.threadIdx.x // 32
    if row >= rows:
        return
    source = int64(tokens[place] if address(tokens) != 0 else place)
    at, groups = int64(_expert_of(place, starts)) * rows + row, width // group
    w_row, ws_row = address(w) + at * width, address(ws) + 2 * at * groups
    x, xs = address(codes) + source * stride, advance(scales, source * groups)
    total = float32(0)
    for piece in range(lane, width // 16, 32):
        a, b, c, d = load_weights(w_row + 16 * piece)
        e, f, h, k = load_i32x4(x + 16 * piece)
        dot = dp4a(d, k, dp4a(c, h, dp4a(b, f, dp4a(a, e, int32(0)))))
        e, f, h, k = load_i32x4(x + stride // 2 + 16 * piece)
        dot = dp4a(d, k, dp4a(c, h, dp4a(b, f, dp4a(a, e, dot << int32(8)))))
        g = 16 * piece // group
        total += float32(dot) * (half_to_float(load_constant_u16(ws_row + 2 * g)) * xs[g])
    total = warp_sum(total)
    if lane == 0:
        y[int64(place) * rows + row] = total


def linear_experts(
    stream: Stream,
    x: DeviceArray | QuantizedRows,
    weight: Matrix | QuantizedMatrix,
    starts: DeviceArray,
    tokens: DeviceArray | None,
    out: DeviceArray,
) -> None:
    """See registry.linear_experts."""
    experts, (places, rows), width = starts.shape[0] - 1, out.shape, weight.shape[1]
    fits = weight.shape[0] == experts * rows and x.shape[1] == width
    if not fits or (x.shape[0] if tokens is None else tokens.shape[0]) != places:
        raise ValueError(f"linear_experts: x {x.shape}, {experts} experts of {weight.shape}, out {out.shape}")
    if isinstance(x, QuantizedRows) != isinstance(weight, QuantizedMatrix):
        raise ValueError("linear_experts: an int8 matrix takes QuantizedRows, a floating-point one a float32 array")
    grid = (-(-rows // WARPS), places)
    if isinstance(weight, Matrix):
        kernel = _experts_float(str(weight.data.dtype))
        stream.launch(kernel, grid, weight.data, x, starts, tokens, out, rows, width)
        return
    assert isinstance(x, QuantizedRows)
    as_codes(stream, x)
    check_rows(x, x.tokens, width)
    if x.group != weight.group:
        raise ValueError(f"linear_experts: x {x.shape} of group {x.group}, weight of group {weight.group}")
    arrays = (weight.codes, weight.scales, x.codes, x.stride, x.scales, x.group)
    stream.launch(_experts_int8, grid, *arrays, starts, tokens, out, rows, width)


@kernel("f32p i32p f32p i32 f32p f32p f32p i32 f32p", threads=256)
def _combine(values, places, weights, k, shared, gate, residual, width, out):
    wait_for_previous_kernel()
    token, i = cuda.blockIdx.x, cuda.blockIdx.y * 256 + cuda.threadIdx.x
    if i >= width:
        return
    total = residual[token * width + i]
    for j in range(k):
        total += weights[token * k + j] * values[int64(places[token * k + j]) * width + i]
    if address(gate) != 0:
        total += shared[token * width + i] / (float32(1) + math.exp(-gate[token]))
    out[token * width + i] = total


def combine(
    stream: Stream,
    values: DeviceArray,
    places: DeviceArray,
    weights: DeviceArray,
    shared: DeviceArray | None,
    gate: DeviceArray | None,
    residual: DeviceArray,
    out: DeviceArray,
) -> None:
    """See registry.combine."""
    (tokens, k), width = places.shape, values.shape[1]
    fits = weights.shape == places.shape and values.shape[0] == tokens * k
    fits = fits and residual.shape == out.shape == (tokens, width)
    if shared is not None and gate is not None:
        fits = fits and shared.shape == (tokens, width) and gate.shape == (tokens, 1)
    if not fits or (shared is None) != (gate is None):
        raise ValueError(f"combine: values {values.shape}, places {places.shape}, out {out.shape} do not fit")
    arrays = (values, places, weights, k, shared, gate, residual, width, out)
    stream.launch(_combine, (tokens, -(-width // 256)), *arrays)
