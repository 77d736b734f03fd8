"""out = x @ W.T with int8 weights, for few tokens: what a decoding step spends its time on.

One block of 16 warps per multiprocessor takes an equal share of the rows. A warp takes rows, or parts of them, in
turn; their bytes stream through a ring in shared memory that every lane fills for itself with asynchronous copies, so
that about 64 KB per multiprocessor are under way at any time without costing registers, and so that the first
ones are asked for before the kernel before has finished (dependent launch). Activations stand in shared memory.

What comes before, a norm or no norm and the quantization of one token's activations, is done by every block for itself
(`source`), and SwiGLU, where it comes after, by the block that has both of its rows (`gated`): a decoder layer then is
five kernels. Codes, scales and sums are still written for others to read, by the first block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from numba import cuda
from numpy import float32, int32, int64

from numbainfer.errors import NumbaInferError
from numbainfer.gpu.arithmetic import divide, dp4a, half_to_float, round_to_int
from numbainfer.gpu.compile import Kernel, device_function, family, kernel
from numbainfer.gpu.launch import Held, Stream
from numbainfer.gpu.linear_mma import HeldProduct, HeldSum, linear_mma
from numbainfer.gpu.memory import DeviceArray
from numbainfer.gpu.ptx import (
    address,
    copy_async_4,
    copy_async_16,
    copy_async_commit,
    copy_async_wait,
    let_next_kernel_start,
    load_f32x4,
    load_i32x4,
    shared_address,
    shared_f32,
    shared_i32,
    shared_i32x4,
    shared_store_f32,
    shared_store_i32,
    shared_store_i32x4,
    shared_u16,
    wait_for_previous_kernel,
)
from numbainfer.gpu.quantize import FEW, TINY, TOP, HeldRows, as_codes, as_halves, check_rows, high_byte, low_byte
from numbainfer.gpu.reduce import block_sum, warp_sum
from numbainfer.gpu.tile_store import NARROW
from numbainfer.quantization import QuantizedMatrix, QuantizedRows

WARPS = 16
THREADS = 32 * WARPS
MOST_TOKENS = 4  # that meet a row at once
PIECE = 16  # bytes of a row that a lane takes at a time: of one group


@dataclass(frozen=True)
class Plan:
    """How rows of a width are cut: a row into `split` parts of `part` pieces for a warp each, a part into `units` of
    `copies` pieces per lane; `stages` units are under way at once. Bytes of shared memory, and where what starts."""

    width: int
    group: int
    tokens: int
    split: int
    ring: int  # KB of shared memory for bytes under way: what decides how deep it is

    @property
    def part(self) -> int:
        return -(-self.width // PIECE // self.split)

    @property
    def copies(self) -> int:
        return min(4, -(-self.part // 32))

    @property
    def units(self) -> int:
        return -(-self.part // (32 * self.copies))

    @property
    def stages(self) -> int:
        return max(1, (self.ring << 10) // (THREADS * self.copies * (PIECE + 4)))

    @property
    def ring_scales(self) -> int:
        return THREADS * self.stages * self.copies * PIECE

    @property
    def codes(self) -> int:
        return self.ring_scales + THREADS * self.stages * self.copies * 4

    @property
    def scales(self) -> int:
        return self.codes + self.tokens * 2 * self.width

    @property
    def sums(self) -> int:
        return self.scales + self.tokens * (self.width // self.group) * 4

    def shared(self, items: int) -> int:
        """Bytes in all, where a block has so many items (parts of rows)."""
        return self.sums + 4 * items * self.tokens


def choose_plan(width: int, group: int, tokens: int, split: int, items: int, most: int) -> Plan:
    """Four tokens at a time, or as many as there are, and the deepest ring that fits `most` bytes beside them."""
    for together in range(min(tokens, MOST_TOKENS), 0, -1):
        for ring in (120, 80, 40):
            plan = Plan(width, group, together, split, ring)
            if plan.shared(items) <= most:
                return plan
    raise NumbaInferError(f"a matrix of {width} columns is too wide for this GPU's shared memory; use --device cpu")


def choose_split(rows: int, width: int, blocks: int) -> int:
    """Warps to a row, so that no warp of a block is without work where rows are few and long."""
    split = 1
    while rows * split < blocks * WARPS and width // (2 * split) >= 512:
        split *= 2
    return split


@family(
    (2048, 64, 1, 1, 120, "norm", True),
    (14336, 64, 1, 1, 120, "plain", False),
    (4864, 32, 1, 4, 120, "plain", False),
    (896, 128, 4, 1, 120, "rows", False),
)
def _gemv(width: int, group: int, tokens: int, split: int, ring: int, source: str, gated: bool):
    plan = Plan(width, group, tokens, split, ring)
    pieces, part, copies, units, stages = width // PIECE, plan.part, plan.copies, plan.units, plan.stages
    groups, halves = width // group, 2 if gated else 1
    at_scales, at_codes, at_xs, at_sums = plan.ring_scales, plan.codes, plan.scales, plan.sums
    quads = -(-width // 4 // THREADS)  # of one token's activations, for a thread
    per_thread = 4 * quads
    lanes = group // 4  # threads that quantize a group
    normed, quantizes = source == "norm", source != "rows"
    wait_for_unit = copy_async_wait(stages - 1)

    @device_function
    def ask(w, ws, memory, item, unit, stage, first, count, pairs):
        """Starts the copies of one unit, if there is such an item."""
        lane = cuda.threadIdx.x & 31
        if item < count * split * halves:
            r, p = item // split, item % split
            row = first + r if r < count else pairs + first + r - count
            start = w + int64(row) * width
            for i in range(copies):
                piece = lane + 32 * (i + copies * unit)
                if piece < part and p * part + piece < pieces:
                    piece += p * part
                    slot = (stage * copies + i) * THREADS + cuda.threadIdx.x
                    copy_async_16(memory + slot * PIECE, start + piece * PIECE)
                    at = ws + 2 * (int64(row) * groups + piece * PIECE // group)
                    copy_async_4(memory + at_scales + slot * 4, at & int64(-4))
        copy_async_commit()

    @device_function
    def quantize(x, norm, values, eps, memory):
        """One token's activations to shared memory. values: the norm's weights for this thread's columns, or room."""
        v = cuda.local.array(per_thread, float32)
        partial = cuda.shared.array(32, float32)
        squares = float32(0)
        for j in range(quads):
            quad = cuda.threadIdx.x + THREADS * j
            four = load_f32x4(address(x) + 16 * min(quad, width // 4 - 1))
            for b in range(4):
                v[4 * j + b] = four[b] if quad < width // 4 else float32(0)
                squares += v[4 * j + b] * v[4 * j + b]
        if normed:
            factor = float32(1) / math.sqrt(block_sum(squares, partial) / float32(width) + eps)
            for j in range(per_thread):
                v[j] *= factor * values[j]
        for j in range(quads):
            quad = cuda.threadIdx.x + THREADS * j
            largest = float32(0)
            for b in range(4):
                largest = max(largest, abs(v[4 * j + b]))
            step = lanes // 2
            while step:
                largest = max(largest, cuda.shfl_xor_sync(0xFFFFFFFF, largest, step))
                step //= 2
            inverse = TOP / largest if largest > TINY else float32(0)
            high_word, low_word = int32(0), int32(0)
            for b in range(4):
                q = round_to_int(v[4 * j + b] * inverse)
                high = high_byte(q)
                low = low_byte(q, high)
                high_word |= (high & int32(255)) << int32(8 * b)
                low_word |= (low & int32(255)) << int32(8 * b)
            if quad < width // 4:
                shared_store_i32(memory + at_codes + 4 * quad, high_word)
                shared_store_i32(memory + at_codes + width + 4 * quad, low_word)
                if quad % lanes == 0:
                    shared_store_f32(memory + at_xs + 4 * (quad // lanes), largest / TOP)

    @device_function
    def publish(memory, codes, scales, sums, stride):
        """What stands in shared memory to global memory, for who else reads these activations."""
        quad = cuda.threadIdx.x
        while quad < width // 4:
            for plane in range(2):
                codes[plane * (stride // 8) + quad] = shared_i32(memory + at_codes + plane * width + 4 * quad)
            quad += THREADS
        g = cuda.threadIdx.x
        while g < groups:
            total = int32(0)
            for plane in range(2):
                total <<= int32(8)
                for i in range(lanes):
                    at = memory + at_codes + plane * width + g * group + 4 * i
                    total = dp4a(shared_i32(at), int32(0x01010101), total)
            scales[g], sums[g] = shared_f32(memory + at_xs + 4 * g), total
            g += THREADS

    @device_function
    def fetch(memory, codes, scales, stride, first, last):
        """Quantized activations of several tokens to shared memory; a token past the last repeats it."""
        for t in range(tokens):
            token = int64(min(first + t, last))
            for plane in range(2):
                i = cuda.threadIdx.x
                while i < pieces:
                    a, b, c, d = load_i32x4(address(codes) + token * stride + plane * (stride // 2) + PIECE * i)
                    shared_store_i32x4(memory + at_codes + (2 * t + plane) * width + PIECE * i, a, b, c, d)
                    i += THREADS
            g = cuda.threadIdx.x
            while g < groups:
                shared_store_f32(memory + at_xs + 4 * (t * groups + g), scales[token * groups + g])
                g += THREADS

    @kernel(
        "i8p u16p f32p f32p f32 i32p f32p i32p i32 f32p f32p f32p f32p i32 i32",
        threads=THREADS,
        hot=True,
    )
    def gemv(w, ws, x, norm, eps, codes, scales, sums, stride, bias, residual, y, hidden, rows, all_tokens):
        memory = shared_address(cuda.shared.array(0, int32, alignment=16))
        warp, lane = cuda.threadIdx.x >> 5, cuda.threadIdx.x & 31
        pairs = rows // halves  # gated: row p of the gate and row p of up belong together
        first = divide(cuda.blockIdx.x * pairs, cuda.gridDim.x)
        count = divide((cuda.blockIdx.x + 1) * pairs, cuda.gridDim.x) - first
        w_start, ws_start = address(w), address(ws)
        asked_item, asked_unit = warp, 0
        for stage in range(stages):
            ask(w_start, ws_start, memory, asked_item, asked_unit, stage, first, count, pairs)
            asked_unit += 1
            if asked_unit == units:
                asked_item, asked_unit = asked_item + WARPS, 0

        values = cuda.local.array(per_thread, float32)
        if normed:
            for j in range(quads):
                four = load_f32x4(address(norm) + 16 * min(cuda.threadIdx.x + THREADS * j, width // 4 - 1))
                for b in range(4):
                    values[4 * j + b] = four[b]

        wait_for_previous_kernel()
        let_next_kernel_start()  # not before: a third kernel's blocks would take the places that the second's need
        first_token = cuda.blockIdx.y * tokens
        mine = cuda.threadIdx.x < count and tokens == 1  # the residual that this thread adds, asked for early
        early = residual[first + cuda.threadIdx.x] if mine and address(residual) != 0 else float32(0)
        if quantizes:
            quantize(x, norm, values, eps, memory)
        else:
            fetch(memory, codes, scales, stride, first_token, all_tokens - 1)
        cuda.syncthreads()

        acc = cuda.local.array(tokens, float32)
        stage = 0
        item = warp
        while item < count * split * halves:
            r, p = item // split, item % split
            row = first + r if r < count else pairs + first + r - count
            for t in range(tokens):
                acc[t] = float32(0)
            for unit in range(units):
                wait_for_unit()
                for i in range(copies):
                    piece = lane + 32 * (i + copies * unit)
                    if piece < part and p * part + piece < pieces:
                        piece += p * part
                        slot = (stage * copies + i) * THREADS + cuda.threadIdx.x
                        a, b, c, d = shared_i32x4(memory + slot * PIECE)
                        g = piece * PIECE // group
                        odd = (row * groups + g) & 1  # two scales were copied
                        scale = half_to_float(shared_u16(memory + at_scales + slot * 4 + 2 * odd))
                        for t in range(tokens):
                            at = memory + at_codes + 2 * t * width + piece * PIECE
                            e, f, h, k = shared_i32x4(at)
                            dot = dp4a(d, k, dp4a(c, h, dp4a(b, f, dp4a(a, e, int32(0)))))
                            e, f, h, k = shared_i32x4(at + width)
                            dot = dp4a(d, k, dp4a(c, h, dp4a(b, f, dp4a(a, e, dot << int32(8)))))
                            acc[t] += float32(dot) * (scale * shared_f32(memory + at_xs + 4 * (t * groups + g)))
                ask(w_start, ws_start, memory, asked_item, asked_unit, stage, first, count, pairs)
                asked_unit += 1
                if asked_unit == units:
                    asked_item, asked_unit = asked_item + WARPS, 0
                stage = stage + 1 if stage + 1 < stages else 0
            for t in range(tokens):
                total = warp_sum(acc[t])
                if lane == 0:
                    shared_store_f32(memory + at_sums + 4 * (item * tokens + t), total)
            item += WARPS
        cuda.syncthreads()

        i = cuda.threadIdx.x
        while i < count * tokens:
            t = 0 if tokens == 1 else divide(i, count)
            r = i - t * count
            value, up, at = float32(0), float32(0), first + r
            for p in range(split):
                value += shared_f32(memory + at_sums + 4 * ((r * split + p) * tokens + t))
                if gated:
                    up += shared_f32(memory + at_sums + 4 * (((count + r) * split + p) * tokens + t))
            if address(bias) != 0:
                value += bias[at]
                if gated:
                    up += bias[pairs + at]
            if first_token + t < all_tokens:
                target = int64(first_token + t) * rows + at
                if tokens == 1 and i < THREADS:
                    value += early
                elif address(residual) != 0:
                    value += residual[target]
                y[target] = value
                if gated:
                    y[target + pairs] = up
                    hidden[at] = value / (float32(1) + math.exp(-value)) * up
            i += THREADS
        if quantizes and cuda.blockIdx.x == 0:
            publish(memory, codes, scales, sums, stride)

    return gemv


class HeldLinear(Held):
    """A product of one token, not launched yet: SwiGLU may follow and become part of it."""

    def __init__(self, stream: Stream, rows: HeldRows, weight: QuantizedMatrix, bias: Any, out: DeviceArray) -> None:
        self.stream, self.rows, self.weight, self.bias, self.out = stream, rows, weight, bias, out

    def launch(self) -> None:
        """The product alone."""
        launch(self.stream, self.rows.out, self.weight, self.bias, None, self.out, self.rows, None)

    def launch_gated(self, hidden: DeviceArray) -> None:
        """hidden [F] = SwiGLU of the product, which is written too."""
        launch(self.stream, self.rows.out, self.weight, self.bias, None, self.out, self.rows, hidden)


def linear_int8(
    stream: Stream,
    x: QuantizedRows,
    weight: QuantizedMatrix,
    bias: DeviceArray | None,
    residual: DeviceArray | None,
    out: DeviceArray,
) -> None:
    """See registry.linear."""
    (rows, width), tokens = weight.shape, x.tokens
    check_rows(x, tokens, width)
    if x.group != weight.group or out.shape != (tokens, rows):
        raise ValueError(f"linear: x {x.shape}, weight {weight.shape}, out {out.shape} do not fit")
    held = stream.take_held()
    if tokens > FEW:
        halves = as_halves(stream, held, x)
        if residual is None:
            stream.hold(HeldProduct(stream, halves, weight, bias, out))
        elif tokens <= NARROW:
            stream.hold(HeldSum(stream, halves, weight, bias, residual, out))
        else:
            linear_mma(stream, halves, weight, bias, residual, out)
        return
    if isinstance(held, HeldRows) and held.out.codes.pointer == x.codes.pointer:
        if residual is None:
            stream.hold(HeldLinear(stream, held, weight, bias, out))
        else:
            launch(stream, x, weight, bias, residual, out, held, None)
        return
    if held is not None:
        held.launch()
    as_codes(stream, x)
    launch(stream, x, weight, bias, residual, out, None, None)


def launch(
    stream: Stream,
    x: QuantizedRows,
    weight: QuantizedMatrix,
    bias: DeviceArray | None,
    residual: DeviceArray | None,
    out: DeviceArray,
    source: HeldRows | None,
    hidden: DeviceArray | None,
) -> None:
    """Launches the product; source: what x still is to be computed from; hidden: where SwiGLU of the product goes."""
    (rows, width), tokens = weight.shape, x.tokens
    gated = hidden is not None
    pairs = rows // 2 if gated else rows
    blocks = min(stream.gpu.multiprocessors, pairs)
    split = choose_split(rows, width, blocks)
    items = -(-pairs // blocks) * split * (2 if gated else 1)
    plan = choose_plan(width, weight.group, tokens, split, items, stream.gpu.shared_memory)
    kernel: Kernel = _gemv(*plan.__dict__.values(), "rows" if source is None else source.kind, gated)
    values = (None, None, 0.0) if source is None else (source.x, source.weight, source.eps)
    stream.launch(
        kernel,
        *(
            (blocks, -(-tokens // plan.tokens)),
            weight.codes,
            weight.scales,
            *values,
            x.codes,
            x.scales,
            x.sums,
            x.stride,
        ),
        *(bias, residual, out, hidden, rows, tokens),
        shared=plan.shared(items),
    )
