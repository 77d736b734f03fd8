"""How a block of the whole-token kernel brings its weights: one warp copies, another fetches ahead, 16 multiply
(token_kernel.py).

The ring is some slots of shared memory, each for as many rows of a matrix as fit, with their scales. A slot has a
barrier that its copies complete (`full`). None says that it is empty: each warp says how far it is (`progress`), and a
slot is free when all are past it. Most rows are none of a warp's, and it does not wait for them: token_plan.longest_way
says how far it may go.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from numba import cuda
from numpy import int32, int64, uint32

from numbainfer.gpu.compile import device_function
from numbainfer.gpu.pipeline import barrier_wait, copy_bulk, expect_bytes, prefetch_bulk
from numbainfer.gpu.ptx import clock, shared_i32, shared_i32x4, shared_i64, shared_peek_i32, shared_store_i32
from numbainfer.gpu.token_plan import COLUMNS, FETCHED, HEAD_SHAPE, RUNS, SHAPE, Plan


@cache
def make_in_ring(slots: int) -> Any:
    """in_ring(number) -> of all slots that are filled, where this one is in the ring, and the parity of its turn."""

    @device_function
    def in_ring(number):
        turns = uint32(number) // uint32(slots)
        return int32(number - turns * slots), int32(turns & 1)

    return in_ring


class Movers(NamedTuple):
    """What the warps that don't multiply do, as device functions."""

    copy_weights: Any
    fetch_ahead: Any


def make_movers(plan: Plan) -> Movers:
    """The functions for a plan."""
    warps, slots, in_flight = plan.warps, plan.slots, plan.in_flight
    slot_bytes, slot_codes, in_ring = plan.slot, plan.slot_codes, make_in_ring(plan.slots)
    at_full, at_progress, at_table, at_shapes = plan.full, plan.progress, plan.table, plan.shapes
    at_copied = plan.copied
    shift, pause = plan.group.bit_length() - 1, plan.pause

    @device_function
    def begin(memory, layers, layer, run):
        """The first of a matrix's slots: layer and run; where codes and scales are that it is filled with; how many of
        the block's rows are left, how many a slot takes, and bytes of a row's codes and scales."""
        shape = int32(HEAD_SHAPE) if layer == layers else int32(run - (run > 2))  # up's is gate's
        at = int32(memory + at_shapes + 4 * SHAPE * shape)
        first, left, width, _ = shared_i32x4(at)
        pointers = int32(memory + at_table + 8 * COLUMNS * layer + 16 * run)
        codes = shared_i64(pointers) + int64(first) * width
        scale_row = int32(int32(width >> shift) << 1)
        scales = shared_i64(int32(pointers + 8)) + int64(first) * scale_row
        return layer, run, codes, scales, left, shared_i32(int32(at + 20)), width, scale_row

    @device_function
    def following(memory, layers, filling):
        """What the next slot is filled with."""
        layer, run, codes, scales, left, rows, width, scale_row = filling
        if left > rows:
            return (
                layer,
                run,
                codes + rows * width,
                scales + rows * scale_row,
                int32(left - rows),
                rows,
                width,
                scale_row,
            )
        if run == RUNS - 1:
            return begin(memory, layers, int32(layer + 1), int32(0))
        return begin(memory, layers, layer, int32(run + 1))

    @device_function
    def exists(layers, with_head, filling):
        """Whether it is one of the model's."""
        layer, run, _, _, _, _, _, _ = filling
        return layer < layers or (layer == layers and run < with_head)

    @device_function
    def pieces(filling):
        """Where its codes and its scales are, and bytes of both; copies begin and end at multiples of 16."""
        _, _, codes, scales, left, rows, width, scale_row = filling
        some, lead = min(rows, left), int32(scales) & int32(15)
        return codes, int32(some * width), scales - lead, int32(int32(lead + some * scale_row + 15) & int32(-16))

    @device_function
    def copy_weights(memory, layers, with_head, lane):
        """The copying warp: brings the block's rows of all matrices to the slots of the ring, some at a time."""
        filling, number = begin(memory, layers, int32(0), int32(0)), int32(0)
        while exists(layers, with_head, filling):
            if number >= slots and lane < warps:  # all warps have to be done with what is in the slot
                while shared_peek_i32(int32(memory + at_progress + 4 * lane)) <= int32(number - slots):
                    pass
            cuda.syncwarp()
            # No more under way than memory needs: what blocks exchange would have to queue behind it. The first
            # times through, the phase before a new barrier's first one counts as complete.
            slot, _ = in_ring(number)
            before, parity = in_ring(int32(number + slots - in_flight))
            barrier_wait(int32(memory + at_full + 8 * before), int32(parity ^ 1))
            codes, size, scales, scale_bytes = pieces(filling)
            if lane == 0:
                full, to = int32(memory + at_full + 8 * slot), int32(memory + slot * slot_bytes)
                expect_bytes(full, int32(size + scale_bytes))
                copy_bulk(to, codes, size, full)
                copy_bulk(int32(to + slot_codes), scales, scale_bytes, full)
                shared_store_i32(int32(memory + at_copied), int32(number + 1))
            filling, number = following(memory, layers, filling), int32(number + 1)

    @device_function
    def fetch_ahead(memory, layers, with_head, lane):
        """Another warp: brings what the slots will be filled with to the second-level cache, some slots ahead of the
        copying warp, so that memory goes on where the ring is full, and copies have a short way."""
        filling, number = begin(memory, layers, int32(0), int32(0)), int32(0)
        while exists(layers, with_head, filling):
            copied = shared_peek_i32(int32(memory + at_copied))
            while number >= int32(copied + FETCHED):
                copied = shared_peek_i32(int32(memory + at_copied))
            if number >= copied:
                start = clock()
                codes, size, scales, scale_bytes = pieces(filling)
                if lane == 0:
                    prefetch_bulk(codes, size)
                    prefetch_bulk(scales, scale_bytes)
                while int32(clock() - start) < pause:
                    pass
            filling, number = following(memory, layers, filling), int32(number + 1)

    return Movers(copy_weights, fetch_ahead)
