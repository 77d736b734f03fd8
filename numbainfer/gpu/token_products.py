"""The products of the whole-token kernel: a warp's rows out of the ring times its part of the input, two at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import cuda
from numpy import float32, int32, uint16

from numbainfer.gpu.compile import device_function
from numbainfer.gpu.pipeline import barrier_passed, barrier_wait
from numbainfer.gpu.ptx import (
    dp4a,
    half_to_float,
    shared_f32,
    shared_i32x4,
    shared_store_f32,
    shared_store_i32,
    shared_u16,
)
from numbainfer.gpu.token_plan import Plan
from numbainfer.gpu.token_weights import make_in_ring

AT_ONCE = 2  # copies of a part whose codes are in registers first: with all of them, two rows would not fit


class Products(NamedTuple):
    """Functions for the kernel.

    A part is the columns that a warp takes of each row: `start`, the first; `end`, behind the last. words: a lane's
    share of their activations' codes, for each copy (16 bytes of a lane) four words of high bytes and four of low ones;
    word_scales: of each copy.
    """

    load_part: Any
    multiply: Any


def make_products(plan: Plan) -> Products:
    """The functions for a plan."""
    warps, slot_bytes, slot_codes, copies, widest = plan.warps, plan.slot, plan.slot_codes, plan.copies, plan.widest
    at_full, at_progress, at_codes, at_scales = plan.full, plan.progress, plan.area, plan.scales
    shift, scale_step = plan.group.bit_length() - 1, 1024 // plan.group  # bytes of scales, for a copy of all lanes
    in_ring, code_words = make_in_ring(plan.slots), 4 * plan.copies
    at_sums = plan.sums

    def make_load(first: int, end: int) -> Any:
        @device_function
        def load(codes, bits, codes_at, scales_at, last_scale):
            """Some copies of a row, and their scales; those beyond the part take its last one."""
            for i in range(first, end):
                a, b, c, d = shared_i32x4(int32(codes_at + 512 * i))
                codes[4 * i], codes[4 * i + 1], codes[4 * i + 2], codes[4 * i + 3] = a, b, c, d
                bits[i] = shared_u16(min(int32(scales_at + scale_step * i), last_scale))

        return load

    def make_dot(first: int, end: int) -> Any:
        @device_function
        def dot(codes, bits, words, word_scales):
            """A lane's share of the product of some copies of a row with the input."""
            total = float32(0)
            for i in range(first, end):
                high, low = int32(0), int32(0)
                for b in range(4):
                    high = dp4a(codes[4 * i + b], words[8 * i + b], high)
                    low = dp4a(codes[4 * i + b], words[8 * i + 4 + b], low)
                total += float32(int32((high << 8) + low)) * (half_to_float(bits[i]) * word_scales[i])
            return total

        return dot

    load_near, load_far = make_load(0, min(copies, AT_ONCE)), make_load(AT_ONCE, copies)
    dot_near, dot_far = make_dot(0, min(copies, AT_ONCE)), make_dot(AT_ONCE, copies)

    @device_function
    def release(memory, warp, lane, more, number):
        """The warp is past all slots before `number`. If it wants no more of the matrix, it says so at the end."""
        if lane == 0 and more:
            shared_store_i32(int32(memory + at_progress + 4 * warp), number)

    @device_function
    def part_at(memory, slot, begin, row, width, start, end, lead, lane):
        """Of a row in a slot that begins with row `begin`: where the lane's codes, its first scale and the part's last
        one are. lead: see `multiply`."""
        at, inside, scale_row = int32(memory + slot * slot_bytes), int32(row - begin), int32(int32(width >> shift) << 1)
        column, last = int32(start + 16 * lane), int32(end - 1)
        scales_at = int32(at + slot_codes + inside * scale_row + ((lead + begin * scale_row) & 15))
        first_scale, last_scale = int32(2 * int32(column >> shift)), int32(2 * int32(last >> shift))
        return int32(at + inside * width + column), int32(scales_at + first_scale), int32(scales_at + last_scale)

    @device_function
    def load_part(memory, words, word_scales, start, end, lane):
        """The part's activations."""
        for i in range(copies):
            for b in range(8):
                words[8 * i + b] = int32(0)
            word_scales[i] = float32(0)
            column = int32(start + 16 * lane + 512 * i)
            if column < end:
                at = int32(memory + at_codes + column)
                a, b, c, d = shared_i32x4(at)
                words[8 * i], words[8 * i + 1], words[8 * i + 2], words[8 * i + 3] = a, b, c, d
                a, b, c, d = shared_i32x4(int32(at + widest))
                words[8 * i + 4], words[8 * i + 5], words[8 * i + 6], words[8 * i + 7] = a, b, c, d
                word_scales[i] = shared_f32(int32(memory + at_scales + 4 * int32(column >> shift)))

    @device_function
    def multiply(
        memory, words, word_scales, start, end, width, row, stride, count, of_block, rows, inverse, number, gated,
        lead, up_lead, warp, lane,
    ):  # fmt: skip
        """Products of rows `row`, row + stride ... below `count`: two of them at a time if the second has come, or one
        of gate with its of up (gated), whose slots come in turn.

        rows: of a slot; inverse: 65536 / rows. number: of the slot that row 0 is in. lead, up_lead: where the scales of
        row 0 are, modulo 16. Sums go to shared memory, for each part one, up's behind the others.
        """
        codes, bits = cuda.local.array(code_words, int32), cuda.local.array(copies, uint16)
        other_codes, other_bits = cuda.local.array(code_words, int32), cuda.local.array(copies, uint16)
        wide = int32(end - start) > 512 * AT_ONCE
        turns = int32(1) if gated else int32(0)  # a power of 2
        between = of_block if gated else int32(warps)
        to = int32(memory + at_sums + 4 * warp + (4 * between if lane & 16 else 0))  # sums are in lanes 0 and 16
        batch = int32(int32(row * inverse) >> 16)  # row // rows: which slot
        while row < count:
            slot, parity = in_ring(int32(number + int32(batch << turns)))
            barrier_wait(int32(memory + at_full + 8 * slot), parity)
            codes_at, scale, last = part_at(memory, slot, int32(batch * rows), row, width, start, end, lead, lane)
            other = row if gated else int32(row + stride)
            following = int32(int32(other * inverse) >> 16)
            slot, parity = in_ring(int32(number + int32(following << turns) + turns))
            if gated:
                barrier_wait(int32(memory + at_full + 8 * slot), parity)
            has_come = barrier_passed(int32(memory + at_full + 8 * slot), parity)
            load_near(codes, bits, codes_at, scale, last)
            load_far(codes, bits, codes_at, scale, last)
            two = cuda.all_sync(0xFFFFFFFF, has_come != 0 and other < count)
            other_lead = up_lead if gated else lead
            row = int32(other + stride) if two else other
            batch = int32(int32(row * inverse) >> 16)
            if two:
                begin = int32(following * rows)
                codes_at, scale, last = part_at(memory, slot, begin, other, width, start, end, other_lead, lane)
                load_near(other_codes, other_bits, codes_at, scale, last)
                total = dot_near(codes, bits, words, word_scales)
                load_far(other_codes, other_bits, codes_at, scale, last)
                cuda.syncwarp()  # all lanes have read
                release(memory, warp, lane, row < count, int32(number + int32(batch << turns)))
                second = dot_near(other_codes, other_bits, words, word_scales)
                if wide:
                    total += dot_far(codes, bits, words, word_scales)
                    second += dot_far(other_codes, other_bits, words, word_scales)
            else:
                release(memory, warp, lane, row < count, int32(number + int32(batch << turns)))
                total, second = dot_near(codes, bits, words, word_scales), float32(0)
                if wide:
                    total += dot_far(codes, bits, words, word_scales)
            mine, others = (second, total) if lane & 16 else (total, second)
            mine += cuda.shfl_xor_sync(0xFFFFFFFF, others, 16)
            for step in (8, 4, 2, 1):
                mine += cuda.shfl_xor_sync(0xFFFFFFFF, mine, step)
            if lane == 0 or (lane == 16 and two):
                shared_store_f32(to, mine)
            to = int32(to + (8 * warps if two and not gated else 4 * warps))

    return Products(load_part, multiply)
