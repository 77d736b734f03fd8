"""The input of a step of the whole-token kernel: awaited from all blocks, or a token's embedding; then quantized."""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import cuda
from numpy import float32, int32, int64, uint32

from numbainfer.gpu.compile import device_function
from numbainfer.gpu.pipeline import synchronize_threads
from numbainfer.gpu.ptx import (
    as_float,
    as_int,
    exp2,
    half_to_float,
    larger,
    peek_i32,
    peek_i32x2,
    peek_i32x4,
    permute,
    reciprocal,
    round_to_int,
    shared_store_f32,
    shared_store_i32,
    shift_right,
)
from numbainfer.gpu.quantize import TINY, TOP
from numbainfer.gpu.token_plan import AREAS, Plan

SAMPLES = 2  # numbers of a vector that blocks ask for until they have come; more would hold up what they wait for


@device_function
def tagged(value, tag):
    """The bits of a number that blocks exchange: its two lowest say which vector of its place it belongs to."""
    return (as_int(value) & int32(-4)) | (tag & int32(3))


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
    mixed_quads, head_shift, four_areas = plan.mixed_quads, plan.head_dim.bit_length() - 1, 4 * AREAS

    @device_function
    def await_numbers(source, tag, width, v, thread):
        """This thread's quads of a vector in global memory, as soon as all have come."""
        last = int32(int32(width >> 2) - 1)
        if thread < SAMPLES:  # some at first, so as not to keep the memory busy; when they have come, so have most
            sample = source + 4 * int32(int32(uint32((thread + 1) * width) // uint32(SAMPLES)) - 1)
            while (peek_i32(sample) ^ tag) & 3 != 0:
                pass
        synchronize_threads(1, threads)
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
        last, heads = int32(int32(width >> 2) - 1), int32(width >> head_shift)
        statistics = source + 4 * int64(AREAS * width)
        if thread < parts:
            sample = source + 4 * int32(int32(thread + 1) * width - 1)
            while (peek_i32(sample) ^ tag) & 3 != 0:
                pass
        synchronize_threads(1, threads)
        raw = cuda.local.array(four_areas, float32)
        tops, totals = cuda.local.array(AREAS, float32), cuda.local.array(AREAS, float32)
        for j in range(mixed_quads):
            quad = int32(thread + int32(threads * j))
            if int32(quad & int32(-32)) <= last:  # of a warp any
                quad = min(quad, last)
                head, late = shift_right(quad, int32(head_shift - 2)), int32(3)
                while late & 3:
                    late = int32(0)
                    for p in range(AREAS):
                        if p < parts:
                            a, b, c, d = peek_i32x4(source + 4 * int32(p * width) + 16 * quad)
                            top, total = peek_i32x2(statistics + 8 * int32(p * heads + head))
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

    @device_function
    def quantize(memory, v, squares, width, thread):
        """A thread's quads to shared memory, as quantization.QuantizedRows has them, but for low bytes of -128.

        Returns the warp's sum of `squares`: its shuffles hide behind those for the largest."""
        for j in range(quads):
            quad = int32(thread + int32(threads * j))
            if int32(quad & int32(-32)) < int32(width >> 2):  # of a warp any
                inside = quad < int32(width >> 2)
                largest = larger(abs(v[4 * j]), abs(v[4 * j + 1]))
                largest = larger(largest, larger(abs(v[4 * j + 2]), abs(v[4 * j + 3])))
                largest = largest if inside else float32(0)
                for step in (16, 8, 4, 2, 1):
                    if j == 0:
                        squares += cuda.shfl_xor_sync(0xFFFFFFFF, squares, step)
                    if step < group_lanes:
                        largest = larger(largest, cuda.shfl_xor_sync(0xFFFFFFFF, largest, step))
                inverse = TOP * reciprocal(largest) if largest > TINY else float32(0)
                a, b = round_to_int(v[4 * j] * inverse), round_to_int(v[4 * j + 1] * inverse)
                c, d = round_to_int(v[4 * j + 2] * inverse), round_to_int(v[4 * j + 3] * inverse)
                low = permute(permute(a, b, int32(0x0040)), permute(c, d, int32(0x0040)), int32(0x5410))
                half = int32(128)
                ab = permute(int32(a + half), int32(b + half), int32(0x0051))
                high = permute(ab, permute(int32(c + half), int32(d + half), int32(0x0051)), int32(0x5410))
                if inside:
                    at = int32(memory + at_codes + 4 * quad)
                    shared_store_i32(at, high)
                    shared_store_i32(int32(at + widest), low)
                    if quad & int32(group_lanes - 1) == 0:
                        shared_store_f32(int32(memory + at_scales + 4 * (quad >> (shift - 2))), largest / TOP)
        return squares

    return Input(await_numbers, await_parts, embed, quantize)
