"""The products of the whole-token kernel: a warp's rows out of the ring times its part of the input, two at a time.

Where the rows are in the ring is known long before the input is there. So a warp's lanes find out together, one row
each, and leave it in shared memory (`find_pieces`): the loop over rows has an eighth fewer instructions. In the ring a
row longer than a slot is some pieces, of some parts each. To a warp, which has the same part of every row, a piece is
as good as a row: each has one number, rows in order, and stride and width are those of pieces.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import cuda
from numpy import float32, int32, uint16

from numbainfer.gpu.arithmetic import dp4a, half_to_float, shift_right
from numbainfer.gpu.compile import device_function
from numbainfer.gpu.pipeline import barrier_passed, barrier_wait
from numbainfer.gpu.ptx import (
    shared_f32,
    shared_i32,
    shared_i32x4,
    shared_store_f32,
    shared_store_i32,
    shared_store_i32x4,
    shared_u16,
)
from numbainfer.gpu.token_plan import AT_ONCE, ENTRIES, Plan
from numbainfer.gpu.token_weights import make_in_ring


class Products(NamedTuple):
    """Functions for the kernel.

    A part is the columns that a warp takes of each row: `start`, the first; `end`, behind the last. words: a lane's
    share of their activations' codes, for each copy (16 bytes of a lane) four words of high bytes and four of low ones;
    word_scales: of each copy.

    matrix: (stride, width, start, of_slot, inverse, number, gated, lead, up_lead) of the step, in pieces. stride: from
    one of a warp to its next; width: columns; start: of the part in its piece; of_slot: how many a slot has; inverse:
    65536 / of_slot; number: of the slot that the first is in; gated: gate and up, whose slots come in turn; lead,
    up_lead: where the first one's scales are, modulo 16.
    """

    find_pieces: Any
    load_part: Any
    multiply: Any


def make_products(plan: Plan) -> Products:
    """The functions for a plan."""
    warps, slot_bytes, slot_codes, copies, widest = plan.warps, plan.slot, plan.slot_codes, plan.copies, plan.widest
    at_full, at_progress, at_codes, at_scales = plan.full, plan.progress, plan.area, plan.scales
    shift, scale_step = plan.group.bit_length() - 1, 1024 // plan.group  # bytes of scales, for a copy of all lanes
    in_ring, code_words = make_in_ring(plan.slots), 4 * plan.copies
    at_sums, at_entries = plan.sums, plan.entries
    mostly_narrow = plan.mostly_narrow

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
    def find_pieces(memory, piece, matrix, warp, lane):
        """Writes where the warp's parts of `piece`, piece + stride ... are in the ring, if gated of gate's and up's in
        turn: codes, scales, the slot's barrier, and twice the slot's number plus its parity. Those behind the last one
        mean nothing."""
        stride, width, start, of_slot, inverse, number, gated, lead, up_lead = matrix
        turns = int32(1) if gated else int32(0)  # a power of 2
        piece, of_up = int32(piece + stride * shift_right(lane, turns)), int32(lane & turns)
        batch = int32(int32(piece * inverse) >> 16)  # piece // of_slot
        filled = int32(number + int32(batch << turns) + of_up)
        slot, parity = in_ring(filled)
        begin, scale_row = int32(batch * of_slot), int32(int32(width >> shift) << 1)
        at, inside = int32(memory + slot * slot_bytes), int32(piece - begin)
        scales_at = int32(at + slot_codes + inside * scale_row + int32(int32(start >> shift) << 1))
        scales_at = int32(scales_at + (int32((up_lead if of_up else lead) + begin * scale_row) & 15))
        if lane < ENTRIES:
            entry = int32(memory + at_entries + 16 * (ENTRIES * warp + lane))
            codes_at, full = int32(at + inside * width + start), int32(memory + at_full + 8 * slot)
            shared_store_i32x4(entry, codes_at, scales_at, full, int32(int32(filled << 1) | parity))
        cuda.syncwarp()

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
    def multiply(memory, words, word_scales, piece, matrix, size, count, of_block, warp, lane):
        """Products of `size` columns of `piece`, piece + stride ... below `count`, which `find_pieces` found: two of
        them at a time if the second has come, or one of gate with its of up. Sums go to shared memory, for each part
        one, up's behind the others."""
        stride, _, _, _, _, _, gated, _, _ = matrix
        codes, bits = cuda.local.array(code_words, int32), cuda.local.array(copies, uint16)
        other_codes, other_bits = cuda.local.array(code_words, int32), cuda.local.array(copies, uint16)
        wide = size > 512 * AT_ONCE
        between = of_block if gated else int32(warps)
        to = int32(memory + at_sums + 4 * warp + (4 * between if lane & 16 else 0))  # sums are in lanes 0 and 16
        of_lane, of_last = int32(int32(16 * lane >> shift) << 1), int32(int32(int32(size - 1) >> shift) << 1)
        entries = int32(memory + at_entries + 16 * ENTRIES * warp)
        entry = entries
        while piece < count:
            if entry > int32(entries + 16 * (ENTRIES - 3)):  # this turn needs three
                find_pieces(memory, piece, matrix, warp, lane)
                entry = entries
            codes_at, scale, full, tail = shared_i32x4(entry)
            other_at, other_scale, other_full, other_tail = shared_i32x4(int32(entry + 16))
            behind = shared_i32(int32(entry + 44))  # of the third
            barrier_wait(full, int32(tail & 1))
            if gated:
                barrier_wait(other_full, int32(other_tail & 1))
            has_come = barrier_passed(other_full, int32(other_tail & 1))
            codes_at, scale, last = int32(codes_at + 16 * lane), int32(scale + of_lane), int32(scale + of_last)
            load_near(codes, bits, codes_at, scale, last)
            if wide or not mostly_narrow:
                load_far(codes, bits, codes_at, scale, last)
            other = piece if gated else int32(piece + stride)
            two = cuda.all_sync(0xFFFFFFFF, has_come != 0 and other < count)
            piece = int32(other + stride) if two else other
            entry = int32(entry + 32) if two else int32(entry + 16)
            following = int32((behind if two else other_tail) >> 1)
            if two:
                codes_at, scale = int32(other_at + 16 * lane), int32(other_scale + of_lane)
                last = int32(other_scale + of_last)
                load_near(other_codes, other_bits, codes_at, scale, last)
                total = dot_near(codes, bits, words, word_scales)
                if wide or not mostly_narrow:
                    load_far(other_codes, other_bits, codes_at, scale, last)
                cuda.syncwarp()  # all lanes have read
                release(memory, warp, lane, piece < count, following)
                second = dot_near(other_codes, other_bits, words, word_scales)
                if wide:
                    total += dot_far(codes, bits, words, word_scales)
                    second += dot_far(other_codes, other_bits, words, word_scales)
            else:
                release(memory, warp, lane, piece < count, following)
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

    return Products(find_pieces, load_part, multiply)
