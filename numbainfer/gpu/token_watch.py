"""The warp of the whole-token kernel that watches: for a step's input to come, and what else need not be all warps'.

Who asks whether numbers have come can do nothing else meanwhile. So one warp asks for all, from when its block has
multiplied, while the others post theirs and prepare the next step. Between, it works out what it then hands to them: a
norm's factor, which is not needed before the products are there, and the block's part of attention's keys.
"""

from __future__ import annotations

from typing import Any

from numba import cuda
from numpy import float32, int32, uint32

from numbainfer.gpu.arithmetic import divide, inverse_root, shift_right
from numbainfer.gpu.compile import device_function
from numbainfer.gpu.pipeline import synchronize_threads
from numbainfer.gpu.ptx import peek_i32, shared_f32, shared_i32, shared_store_f32, shared_store_i32x4
from numbainfer.gpu.reduce import warp_sum
from numbainfer.gpu.token_plan import (
    ARRIVED,
    COLUMNS,
    GATE_SHAPE,
    HEAD_SHAPE,
    MULTIPLIED,
    OUTPUT_SHAPE,
    QUANTIZED,
    SHAPE,
    WINDOW,
    Plan,
)
from numbainfer.gpu.token_weights import make_share

SAMPLES = 2  # numbers of a vector that blocks ask for until they have come; more would hold up what they wait for
MOST_SAMPLES = 32  # of attention's output: the last of each part's and each unit's, which come at times of their own


def make_watch(plan: Plan) -> Any:
    """The warp's work, as a device function."""
    warps, threads, hidden, shared = plan.warps, 32 * plan.warps, plan.hidden, plan.shared
    share = make_share(warps, shared)
    at_shapes, at_table, at_before, at_position = plan.shapes, plan.table, plan.before, plan.position
    at_squares, at_factor, at_keys = plan.squares, plan.factor, plan.keys

    @device_function
    def give_factor(memory, eps, lane):
        """Of the norm before a step: the root of the sum of squares, which each warp has left its part of."""
        squares = shared_f32(int32(memory + at_squares + 4 * lane)) if lane < warps else float32(0)
        factor = inverse_root(warp_sum(squares) / float32(hidden) + eps)
        if lane == 0:
            shared_store_f32(int32(memory + at_factor), factor)
        cuda.syncwarp()

    @device_function
    def watch(memory, layers, with_head, lane, block, heads, units_per_key, parts_shift, eps, x, mixed, inner):
        """Steps in the order of token_kernel.py. When samples have come, so has most of their vector: who reads it
        sooner asks again and again, and delays those who still write it."""
        layer, sources, unit = int32(0), int32(1), shift_right(block, parts_shift)
        g, units = divide(unit, units_per_key), int32(uint32(heads) // uint32(shared))
        while layer <= layers:
            turn, matrix = int32(shared_i32(int32(memory + at_before)) + layer), int32(0)
            steps = int32(HEAD_SHAPE) if layer < layers else int32(with_head)
            while matrix < steps:
                if matrix > 0 or layer > 0:  # not an embedding
                    width = shared_i32(int32(memory + at_shapes + 4 * SHAPE * matrix + 8))
                    source, tag = x, int32(turn + turn - (matrix == 0))
                    samples, columns = int32(SAMPLES), width
                    if matrix == OUTPUT_SHAPE:
                        source, tag, columns = mixed, turn, int32(sources * width)
                        samples = min(int32(sources * units), int32(MOST_SAMPLES))
                    elif matrix > GATE_SHAPE:
                        source, tag = inner, turn
                    if lane < samples:
                        sample = int32(int32(uint32(int32(lane + 1) * columns) // uint32(samples)) - 1)
                        while (peek_i32(source + 4 * sample) ^ tag) & 3 != 0:
                            pass
                    cuda.syncwarp()
                    synchronize_threads(ARRIVED, threads + 32)
                synchronize_threads(QUANTIZED, threads + 32)
                if matrix == 0 or matrix == GATE_SHAPE:  # noqa: PLR1714 - `in` would be a loop
                    give_factor(memory, eps, lane)
                if matrix == 0 and layer < layers:
                    window = shared_i32(int32(memory + at_table + 8 * COLUMNS * layer + 8 * WINDOW))
                    position = shared_i32(int32(memory + at_position))
                    start, end, chunks, here, size, sources = share(position, window, block, heads, parts_shift)
                    if lane == 0:
                        shared_store_i32x4(int32(memory + at_keys), start, end, chunks, size)
                        has_part = int32(1) if here else int32(0)
                        shared_store_i32x4(int32(memory + at_keys + 16), has_part, sources, unit, g)
                    cuda.syncwarp()
                synchronize_threads(MULTIPLIED, threads + 32)
                matrix = int32(matrix + 1)
            layer = int32(layer + 1)

    return watch
