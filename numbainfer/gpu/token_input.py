"""The input of a step of the whole-token kernel: awaited from all blocks, or a token's embedding; then quantized."""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import cuda
from numpy import float32, int32, int64

from numbainfer.gpu.arithmetic import (
    as_float,
    as_int,
    exp2,
    half_to_float,
    larger,
    permute,
    reciprocal,
    shift_right,
    warp_max_u32,
)
from numbainfer.gpu.compile import device_function
from numbainfer.gpu.pipeline import synchronize_threads
from numbainfer.gpu.ptx import peek_i32x4, shared_store_f32, shared_store_i32
from numbainfer.gpu.quantize import TINY, TOP
from numbainfer.gpu.token_plan import AREAS, ARRIVED, Plan


@device_function
def tagged(value, tag):
    """The bits of a number that blocks exchange: its two lowest say which vector of its place it belongs to."""
    return (as_int(value) & int32(-4)) | (tag & int32(3))


@device_function
def rounded(value):
    """The nearest integer, of at most 22 bits, in the lower bits of a float32: what is above them is not zero. A
    conversion would take a unit that has a quarter of the others' lanes."""
    return as_int(value + float32(3 << 22))


class Input(NamedTuple):
    """Functions for the kernel. `v` is a thread's part of the vector: of every `threads` quads of numbers one."""

    await_numbers: Any
    await_parts: Any
    embed: Any
    quantize: Any


def make_input(plan: Plan) -> Input:
    """The functions for a plan."""
    threads, quads, norm_quads, widest = 32 * plan.warps, plan.quads, plan.norm_quads, plan.widest
    at_codes, at_scales = plan.area, plan.scales
    group_lanes, shift = plan.group // 4, plan.group.bit_length() - 1
    mixed_quads, head_shift = plan.mixed_quads, plan.head_dim.bit_length() - 1
    two_areas, four_areas = 2 * AREAS, 4 * AREAS

    @device_function
    def largest_of_group(value, thread):
        """Of a group's lanes; no number is negative, so they are ordered as their bits are."""
        if group_lanes >= 16:
            upper, bits = thread & int32(group_lanes & 16), as_int(value)  # two halves of a warp, or one whole
            below, above = warp_max_u32(int32(0) if upper else bits), warp_max_u32(bits if upper else int32(0))
            value = as_float(above if upper else below)
        else:
            for step in (8, 4, 2, 1):
                if step < group_lanes:
                    value = larger(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, step))
        return value

    @device_function
    def await_numbers(source, tag, width, v, thread):
        """This thread's quads of a vector in global memory, as soon as all have come."""
        last = int32(int32(width >> 2) - 1)
        synchronize_threads(ARRIVED, threads + 32)
        late = int32(3)
        while late & 3:
            late = int32(0)
            for j in range(quads):
                quad = int32(thread + int32(threads * j))
                if int32(quad & int32(-32)) <= last:  # of a warp any
                    a, b, c, d = peek_i32x4(source + 16 * min(quad, last))
                    late |= (a ^ tag) | (b ^ tag) | (c ^ tag) | (d ^ tag)
                    v[4 * j], v[4 * j + 1] = as_float(a), as_float(b)
                    v[4 * j + 2], v[4 * j + 3] = as_float(c), as_float(d)

    @device_function
    def await_parts(source, tag, width, parts, v, thread):
        """The same of what attention gives in 2 to AREAS parts: sums of each, and for each head of a part its largest
        score and the sum of weights relative to it; merged as FlashAttention's are (Dao et al. 2022)."""
        last = int32(int32(width >> 2) - 1)
        statistics = source + 4 * int64(AREAS * width)
        synchronize_threads(ARRIVED, threads + 32)
        raw = cuda.local.array(four_areas, float32)
        tops, totals = cuda.local.array(AREAS, float32), cuda.local.array(AREAS, float32)
        of_parts = cuda.local.array(two_areas, int32)
        for j in range(mixed_quads):
            quad = int32(thread + int32(threads * j))
            if int32(quad & int32(-32)) <= last:  # of a warp any
                quad = min(quad, last)
                head, late = shift_right(quad, int32(head_shift - 2)), int32(3)
                while late & 3:
                    late = int32(0)
                    for p in range(0, AREAS, 2):
                        if p < parts:
                            a, b, c, d = peek_i32x4(statistics + 8 * int32(AREAS * head + p))
                            of_parts[2 * p], of_parts[2 * p + 1] = a, b
                            of_parts[2 * p + 2], of_parts[2 * p + 3] = c, d
                    for p in range(AREAS):
                        if p < parts:
                            a, b, c, d = peek_i32x4(source + 4 * int32(p * width) + 16 * quad)
                            top, total = of_parts[2 * p], of_parts[2 * p + 1]
                            late |= (a ^ tag) | (b ^ tag) | (c ^ tag) | (d ^ tag) | (top ^ tag) | (total ^ tag)
                            raw[4 * p], raw[4 * p + 1] = as_float(a), as_float(b)
                            raw[4 * p + 2], raw[4 * p + 3] = as_float(c), as_float(d)
                            tops[p], totals[p] = as_float(int32(top & int32(-4))), as_float(total)
                largest = tops[0]
                for p in range(1, AREAS):
                    if p < parts:
                        largest = larger(largest, tops[p])
                weights = float32(0)
                for b in range(4):
                    v[4 * j + b] = float32(0)
                for p in range(AREAS):
                    if p < parts:
                        decay = exp2(tops[p] - largest)
                        weights += decay * totals[p]
                        for b in range(4):
                            v[4 * j + b] += decay * raw[4 * p + b]
                inverse = reciprocal(weights)
                for b in range(4):
                    v[4 * j + b] *= inverse

    @device_function
    def embed(codes, scales, start, known, width, v, thread):
        """This thread's quads of a token's embedding, which begins at `start`."""
        for j in range(norm_quads):
            quad = min(int32(thread + int32(threads * j)), int32(int32(width >> 2) - 1))
            scale = half_to_float(scales[(start + 4 * quad) >> shift]) if known else float32(0)
            for b in range(4):
                v[4 * j + b] = float32(codes[start + 4 * quad + b]) * scale if known else float32(0)

    def make_quantize(count: int, *, normed: bool) -> Any:
        @device_function
        def quantize(memory, v, squares, width, thread):
            """A thread's first `count` quads to shared memory, as quantization.QuantizedRows has them, but for low
            bytes of -128. Of all together first what takes long. Returns the warp's sum of `squares`."""
            of_width, tops = int32(width >> 2), cuda.local.array(count, float32)
            if int32(thread & int32(-32)) < of_width:  # of a warp any
                for j in range(count):
                    largest = larger(abs(v[4 * j]), abs(v[4 * j + 1]))
                    tops[j] = largest_of_group(larger(largest, larger(abs(v[4 * j + 2]), abs(v[4 * j + 3]))), thread)
                if normed:
                    for step in (16, 8, 4, 2, 1):
                        squares += cuda.shfl_xor_sync(0xFFFFFFFF, squares, step)
                for j in range(count):
                    inverse = TOP * reciprocal(tops[j]) if tops[j] > TINY else float32(0)
                    a, b = rounded(v[4 * j] * inverse), rounded(v[4 * j + 1] * inverse)
                    c, d = rounded(v[4 * j + 2] * inverse), rounded(v[4 * j + 3] * inverse)
                    low = permute(permute(a, b, int32(0x0040)), permute(c, d, int32(0x0040)), int32(0x5410))
                    half = int32(128)
                    ab = permute(int32(a + half), int32(b + half), int32(0x0051))
                    high = permute(ab, permute(int32(c + half), int32(d + half), int32(0x0051)), int32(0x5410))
                    quad = int32(thread + int32(threads * j))
                    if quad < of_width:
                        at = int32(memory + at_codes + 4 * quad)
                        shared_store_i32(at, high)
                        shared_store_i32(int32(at + widest), low)
                        if quad & int32(group_lanes - 1) == 0:
                            shared_store_f32(int32(memory + at_scales + 4 * (quad >> (shift - 2))), tops[j] / TOP)
            return squares

        return quantize

    few = max(norm_quads, mixed_quads)
    quantize_few, quantize_many = make_quantize(few, normed=True), make_quantize(quads, normed=False)

    @device_function
    def quantize(memory, v, squares, width, thread):
        """The input to shared memory. squares: a thread's, where a norm is before it. Returns its warp's."""
        if width <= 4 * threads * few:
            return quantize_few(memory, v, squares, width, thread)
        return quantize_many(memory, v, squares, width, thread)

    return Input(await_numbers, await_parts, embed, quantize)
