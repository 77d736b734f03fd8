"""How a block of the whole-token kernel brings its weights: one warp copies, all others multiply (token_kernel.py).

The ring is some slots of shared memory, each for as many rows of a matrix as fit, with their scales. A slot has a
barrier that its copies complete (`full`). None says that it is empty: each warp says how far it is (`progress`), and a
slot is free when all are past it. Most rows are none of a warp's, and it does not wait for them: token_plan.longest_way
says how far it may go.
"""

from __future__ import annotations

from typing import Any

from numba import cuda
from numpy import int32, int64

from numbainfer.gpu.compile import device_function
from numbainfer.gpu.pipeline import barrier_wait, copy_bulk, expect_bytes
from numbainfer.gpu.ptx import shared_i32, shared_i32x4, shared_i64, shared_peek_i32
from numbainfer.gpu.token_plan import COLUMNS, HEAD_SHAPE, RUNS, SHAPE, Plan


@device_function
def uniform(value):
    """The value, which all lanes have: the compiler sees it now, and that branches on it do not divide a warp."""
    return int32(cuda.shfl_sync(0xFFFFFFFF, int32(value), 0))


def make_copy(plan: Plan) -> Any:
    """What the copying warp does, as a device function."""
    warps, slots, in_flight = plan.warps, plan.slots, plan.in_flight
    slot_bytes, slot_codes = plan.slot, plan.slot_codes
    at_full, at_progress, at_table, at_shapes = plan.full, plan.progress, plan.table, plan.shapes
    shift = plan.group.bit_length() - 1

    @device_function
    def copy_weights(memory, layers, with_head, lane):
        """The copying warp: brings the block's rows of all matrices to the slots of the ring, some at a time."""
        layer, run, number, slot, parity = int32(0), int32(0), int32(0), int32(0), int32(0)
        while layer < layers or (layer == layers and with_head != 0 and run == 0):
            shape = int32(HEAD_SHAPE) if layer == layers else int32(run - (run > 2))  # up's is gate's
            at = int32(memory + at_shapes + 4 * SHAPE * shape)
            first, left, width, _ = shared_i32x4(at)
            left, rows = uniform(left), shared_i32(int32(at + 20))
            pointers = int32(memory + at_table + 8 * COLUMNS * layer + 16 * run)
            codes = shared_i64(pointers) + int64(first) * width
            scale_row = int32(width >> shift << 1)
            scales = shared_i64(int32(pointers + 8)) + int64(first) * scale_row
            while left > 0:
                some = min(rows, left)
                if number >= slots and lane < warps:  # all warps have to be done with what is in the slot
                    while shared_peek_i32(int32(memory + at_progress + 4 * lane)) <= int32(number - slots):
                        pass
                cuda.syncwarp()
                # No more under way than memory needs: what blocks exchange would have to queue behind it. The first
                # times through, the phase before a new barrier's first one counts as complete.
                before, of_before = int32(slot - in_flight), parity
                if before < 0:
                    before, of_before = int32(before + slots), int32(parity ^ 1)
                barrier_wait(int32(memory + at_full + 8 * before), of_before)
                size, scale_bytes = int32(some * width), int32(some * scale_row)
                if lane == 0:
                    full, to = int32(memory + at_full + 8 * slot), int32(memory + slot * slot_bytes)
                    lead = int32(scales) & int32(15)  # copies begin and end at multiples of 16
                    rounded = int32(lead + scale_bytes + 15) & int32(-16)
                    expect_bytes(full, int32(size + rounded))
                    copy_bulk(to, codes, size, full)
                    copy_bulk(int32(to + slot_codes), scales - lead, rounded, full)
                codes, scales, left = codes + size, scales + scale_bytes, int32(left - some)
                slot, number = int32(slot + 1), int32(number + 1)
                if slot == slots:
                    slot, parity = int32(0), int32(parity ^ 1)
            run = int32(run + 1)
            if run == RUNS:
                layer, run = int32(layer + 1), int32(0)

    return copy_weights
