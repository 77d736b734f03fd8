"""The kernel of products on tensor cores: out = x @ W.T for many tokens (linear_mma.py launches it).

Weights are widened to float16 in registers, int8 ones times their group's scale, and meet float16 activations
(half_rows.py) in products that add up in float32. That costs 2^-12 of each value on both sides, a tenth and less of
what int8 weights cost, where 8-bit activations would cost as much again.

The weights are the left matrix: 16 of their rows to a warp, `width` tokens. They go from global memory straight into
the registers where the tensor cores want them, 16 columns of a row to a thread, while the tokens' tile comes through
shared memory, brought by a warp that does nothing else. On sm_90 the products are `wgmma` (64 rows, a warpgroup,
running while the next weights are widened), elsewhere `mma.sync`; the numbers lie in the same registers either way.

A block has two warpgroups, of 64 rows each, and takes tiles of the result in turn. For prompts of int8 models on sm_90
two blocks form a cluster: neighbouring tiles of rows by the same 128 or 256 tokens, of which each block brings half to
both. What limits these products is how much comes from the second-level cache, and how long widening takes: so tiles
are as wide as registers allow, and one product runs while the weights of the next are widened. Where there are fewer
tiles than multiprocessors, the columns are split among `splits` blocks; the last to finish adds up what all left in
memory, in order, so that results do not change from run to run.

An RMSNorm between two products of few tokens (up to NARROW) is a part of both: the first one writes the numbers times
the norm's weights and, for each 64, the sum of squares; the second one divides its result, as all columns of a token
are divided by the same.
"""

from __future__ import annotations

import math

from numba import cuda
from numpy import float32, int32, int64, uint32

from numbainfer.gpu.arithmetic import still
from numbainfer.gpu.compile import Kernel, device_function, family, kernel
from numbainfer.gpu.fragments import add_spilled, scale_and_shift, scale_columns, spill, zeros
from numbainfer.gpu.fragments import gated as gated_rows
from numbainfer.gpu.half_rows import BLOCK
from numbainfer.gpu.mma_plan import blocks_together
from numbainfer.gpu.mma_plan import stages as stages_of
from numbainfer.gpu.mma_weights import weight_loader
from numbainfer.gpu.pipeline import (
    barrier_arrive,
    barrier_arrive_at,
    barrier_init,
    barrier_wait,
    fence_for_cluster,
    fence_for_copies,
    fetch,
    fetch_arrivals,
    fetch_half,
    fewer_registers,
    more_registers,
    rank_in_cluster,
    synchronize_cluster,
    synchronize_threads,
)
from numbainfer.gpu.products import finished, multiply, wait_for_products
from numbainfer.gpu.ptx import (
    address,
    advance,
    fetch_add,
    let_next_kernel_start,
    shared_address,
    shared_i32,
    shared_store_f32,
    shared_store_i32,
    wait_for_previous_kernel,
)
from numbainfer.gpu.reduce import lanes_sum
from numbainfer.gpu.tile_store import NARROW, make_store, make_store_halves, store_bytes

CONSUMERS = 256  # threads: two warpgroups; beside them, a warp that copies


@device_function
def _last(value, limit):
    """value, or limit - 1 where it is beyond."""
    return value if value < limit else limit - 1


@family(
    ("int8", 256, True, False),
    ("int8", 256, True, True),
    ("int8", 128, True, False),
    ("int8", 128, True, True),
    ("int8", 128, False, False),
    ("int8", 64, False, True),
    ("int8", 32, False, False),
    ("int8", 32, False, True),
    ("int8", 16, False, True),
    ("float16", 128, False, False),
    ("uint16", 32, False, False),
)
def product_kernel(kind: str, width: int, paired: bool, gated: bool) -> Kernel:
    """kind: of weights. width: tokens of a tile. paired: blocks come in clusters of two. gated: W's rows are gate and
    up, and the result silu(gate) * up as HalfRows."""
    deep = not paired and width < 128  # weights of two blocks of 64 columns on their way: there are registers for it
    # Paired, consumers have more registers than an even share, which is 168 of 384 threads.
    give_registers, take_registers = fewer_registers(24), more_registers(240)
    stages = stages_of(width)
    zero, product, done = zeros(width), multiply(width), finished(width)
    spill_tile, add_tile = spill(width), add_spilled(width)
    store_tile, store_halves = make_store(width), make_store_halves(width)
    affine, gate, by_token = scale_and_shift(width), gated_rows(width), scale_columns(width)
    narrow, sharers = width <= NARROW, CONSUMERS // width  # threads to a token
    # Rows of W, 16 to a warp; or of the result, 8: row g of a fragment is the gate, row g + 8 is up.
    warp_rows = 8 if gated else 16
    group_rows = 4 * warp_rows
    block_rows = 2 * group_rows
    partial_bytes = CONSUMERS * width * 2
    stage_bytes, tile_bytes = width * 2 * BLOCK, store_bytes(width)

    @device_function
    def locate(item, token_tiles, splits):
        """Of a work item: its first token, which part of the columns, and which tile of rows."""
        above = uint32(item) // uint32(token_tiles)
        token = uint32(item) - above * uint32(token_tiles)
        row_tile = above // uint32(splits)
        return int32(token * uint32(width)), int32(above - row_tile * uint32(splits)), int32(row_tile)

    @device_function
    def this_group():
        """The number of the block, or of its cluster."""
        return int32(cuda.blockIdx.x >> 1) if paired else int32(cuda.blockIdx.x)

    @device_function
    def groups_of_blocks():
        """How many there are."""
        return int32(cuda.gridDim.x >> 1) if paired else int32(cuda.gridDim.x)

    @device_function
    def release(empty, lane):
        """A warp is done with a stage."""
        if paired:
            if lane < 2:
                barrier_arrive_at(empty, lane)
        elif lane == 0:
            barrier_arrive(empty)

    @device_function
    def part(blocks, split, splits):
        """Where a part of the columns begins."""
        return int32(uint32(blocks) * uint32(split) // uint32(splits))

    load, widen, weight_bytes = weight_loader(kind)

    @device_function
    def load_rows(w, s, other_w, other_s, block, t, last_column, shift):
        """A thread's weights of 64 columns of two rows."""
        first = load(w, s, block, t, last_column, shift)
        return first, load(other_w, other_s, block, t, last_column, shift)

    @device_function
    def following(stage, phase):
        """The stage after one, and its phase."""
        if stage == stages - 1:
            return int32(0), int32(phase ^ 1)
        return int32(stage + 1), phase

    @device_function
    def multiply_stage(acc, wide, stages_at, full, stage, phase, lane):
        """acc + the products of a stage, which is then left to the copying warp; its barriers begin at `full`."""
        barrier_wait(full + 8 * stage, phase)
        acc = done(product(acc, wide, int32(stages_at + stage * stage_bytes), lane))
        release(int32(full + 8 * (stages + stage)), lane)
        return acc

    @device_function
    def copy_tiles(x, x_rows, stages_at, full, empty, items, token_tiles, splits, blocks, lane):
        """The copying warp: brings the tokens' tiles, stage after stage."""
        stage, phase = int32(0), int32(1)
        item = this_group()
        while item < items:
            token, split, _ = locate(item, token_tiles, splits)
            item = int32(item + groups_of_blocks())
            first, end = part(blocks, split, splits), part(blocks, int32(split + 1), splits)
            source = x + int64(first * x_rows + token) * (2 * BLOCK)
            for _ in range(first, end):
                barrier_wait(empty + 8 * stage, phase)
                if paired:
                    at = int32(stages_at + stage * stage_bytes)
                    fetch_half(at, source, stage_bytes, int32(full + 8 * stage), rank_in_cluster(), lane)
                else:
                    fetch(stages_at + stage * stage_bytes, source, stage_bytes, full + 8 * stage, lane)
                source += int64(x_rows) * (2 * BLOCK)
                stage = int32(stage + 1)
                if stage == stages:
                    stage, phase = int32(0), int32(phase ^ 1)

    @device_function
    def put_factors(squares, eps, D, blocks, first_token, T, thread, factors):
        """By all consumers, to shared memory: 1 / the root mean square of each of the tile's tokens."""
        # Nothing of this is to be computed before the loop over tiles, and kept in registers.
        thread, D, T, blocks = still(thread), still(D), still(T), still(blocks)
        token, share = int32(uint32(thread) // uint32(sharers)), int32(thread & (sharers - 1))
        line = advance(squares, int64(min(first_token + token, T - 1)) * blocks)
        total, block, last = float32(0), share, int32(blocks - 1)
        while block < blocks:  # four loads at once
            block = still(block)
            b, c, d = int32(block + sharers), int32(block + 2 * sharers), int32(block + 3 * sharers)
            v0, v1, v2, v3 = line[block], line[min(b, last)], line[min(c, last)], line[min(d, last)]
            total += v0 + (v1 if b < blocks else float32(0))
            total += (v2 if c < blocks else float32(0)) + (v3 if d < blocks else float32(0))
            block = int32(d + sharers)
        total = lanes_sum(total, sharers)
        if share == 0:
            shared_store_f32(factors + 4 * token, float32(1) / math.sqrt(total / float32(D) + eps))

    @kernel(
        "i8p u16p i32 u16p i32 f32 f32p f32p f32p u16p i32 f32 i32 i32 i32 i32 i32 f32p i32p f32p f32 f32p f32p",
        threads=CONSUMERS + (128 if paired else 32),
        blocks=blocks_together(width),
        hot=True,
        fast=True,
        only=(9, 0) if paired else None,
    )
    def linear_mma(
        codes,
        scales,
        shift,
        x,
        x_rows,
        factor,
        bias,
        residual,
        out,
        out_halves,
        out_rows,
        out_inverse,
        N,
        D,
        T,
        splits,
        items,
        partial,
        counters,
        squares,
        eps,
        norm_weight,
        norm_squares,
    ):
        shared = cuda.shared.array(0, int32)
        stages_at = int32((shared_address(shared) + 1023) & -1024)
        tiles_at = int32(stages_at + stages * stage_bytes)
        full = int32(tiles_at + 2 * tile_bytes)
        empty = int32(full + 8 * stages)
        arrived = int32(empty + 8 * stages)
        factors = int32(arrived + 16)
        thread = int32(cuda.threadIdx.x)
        warp, lane = int32(thread >> 5), int32(thread & 31)
        blocks = int32((D + BLOCK - 1) >> 6)
        token_tiles = int32((T + width - 1) // width)
        if thread == 0:
            for stage in range(stages):
                barrier_init(full + 8 * stage, fetch_arrivals())
                barrier_init(empty + 8 * stage, CONSUMERS // 16 if paired else CONSUMERS // 32)
            if paired:
                fence_for_cluster()
            fence_for_copies()
        if paired:
            synchronize_cluster()
        else:
            cuda.syncthreads()
        let_next_kernel_start()
        if warp >= CONSUMERS // 32:
            if paired:  # registers are dealt by warpgroup, so there are three idle warps beside the one that copies
                give_registers()
            wait_for_previous_kernel()
            if warp == CONSUMERS // 32:
                copy_tiles(address(x), x_rows, stages_at, full, empty, items, token_tiles, splits, blocks, lane)
            return

        if paired:
            take_registers()
        group, g, t = int32(warp >> 2), int32(lane >> 2), int32(lane & 3)
        tile = int32(tiles_at + group * tile_bytes)
        rows = int32(2 * N if gated else N)
        groups = int32(D >> shift)
        last_column = int32(D - 16)  # beyond D: any weights will do, the activations are zeros there
        stage, phase, emptied = int32(0), int32(0), empty
        item = this_group()
        while item < items:
            first_token, split, row_tile = locate(item, token_tiles, splits)
            item = int32(item + groups_of_blocks())
            if paired:
                row_tile = int32(2 * row_tile + rank_in_cluster())
            first, end = part(blocks, split, splits), part(blocks, int32(split + 1), splits)
            first_row = int32(row_tile * block_rows + group * group_rows)
            row = int32(first_row + warp_rows * (warp & 3) + g)
            r0, r1 = int32(_last(row, rows)), int32(_last(row + (N if gated else 8), rows))
            w0, w1 = address(codes) + int64(r0) * D * weight_bytes, address(codes) + int64(r1) * D * weight_bytes
            s0, s1 = address(scales) + int64(r0) * groups * 2, address(scales) + int64(r1) * groups * 2

            # Weights are loaded again into the registers that were just widened: any copy from register to register
            # would wait for what is under way.
            ahead = load_rows(w0, s0, w1, s1, first, t, last_column, shift)
            if deep or paired:
                behind = load_rows(w0, s0, w1, s1, int32(first + 1), t, last_column, shift)
            wait_for_previous_kernel()  # weights could be asked for before
            # What tokens are divided by: once, if all tiles are of the same tokens.
            if narrow and address(squares) != 0 and (token_tiles > 1 or item < 2 * cuda.gridDim.x):
                if token_tiles > 1:  # others may still divide by those of the tile before
                    synchronize_threads(3, CONSUMERS)
                put_factors(squares, eps, D, blocks, first_token, T, thread, factors)
                synchronize_threads(3, CONSUMERS)
            acc = zero()
            block = first
            if paired:
                while block < end - 1:
                    # One product runs while the weights of the next are widened.
                    wide = widen(ahead[0], ahead[1])
                    ahead = load_rows(w0, s0, w1, s1, int32(block + 2), t, last_column, shift)
                    barrier_wait(full + 8 * stage, phase)
                    acc = product(acc, wide, int32(stages_at + stage * stage_bytes), lane)
                    wait_for_products()
                    if block > first:  # now the product of the stage before is done
                        release(emptied, lane)
                    emptied = int32(empty + 8 * stage)
                    stage, phase = following(stage, phase)
                    wide = widen(behind[0], behind[1])
                    behind = load_rows(w0, s0, w1, s1, int32(block + 3), t, last_column, shift)
                    barrier_wait(full + 8 * stage, phase)
                    acc = product(acc, wide, int32(stages_at + stage * stage_bytes), lane)
                    wait_for_products()
                    release(emptied, lane)
                    emptied = int32(empty + 8 * stage)
                    stage, phase = following(stage, phase)
                    block = int32(block + 2)
                acc = done(acc)
                if block > first:
                    release(emptied, lane)
            while block < end:
                wide = widen(ahead[0], ahead[1])
                ahead = load_rows(w0, s0, w1, s1, int32(block + (2 if deep else 1)), t, last_column, shift)
                acc = multiply_stage(acc, wide, stages_at, full, stage, phase, lane)
                stage, phase = following(stage, phase)
                block = int32(block + 1)
                if deep:  # noqa: SIM102 - a constant by itself: without it Numba drops this, and there is no `behind`
                    if block < end:
                        wide = widen(behind[0], behind[1])
                        behind = load_rows(w0, s0, w1, s1, int32(block + 2), t, last_column, shift)
                        acc = multiply_stage(acc, wide, stages_at, full, stage, phase, lane)
                        stage, phase = following(stage, phase)
                        block = int32(block + 1)

            complete = True
            if splits > 1:
                result = int32(row_tile * token_tiles + uint32(first_token) // uint32(width))
                place = address(partial) + int64(result * splits) * partial_bytes + thread * 16
                mine = place + int64(split) * partial_bytes
                spill_tile(acc, mine, CONSUMERS * 16)
                synchronize_threads(3, CONSUMERS)
                if thread == 0:
                    shared_store_i32(arrived, fetch_add(address(counters) + 4 * result, 1))
                synchronize_threads(3, CONSUMERS)
                complete = shared_i32(arrived) == splits - 1
                if complete:
                    acc = zero()
                    for _ in range(splits):
                        acc = add_tile(acc, place, CONSUMERS * 16)
                        place += partial_bytes
                    counters[result] = 0

            if complete:
                if narrow:  # once more: registers are for the weights meanwhile
                    row = int32(still(first_row) + warp_rows * (warp & 3) + g)
                    r0, r1 = int32(_last(row, rows)), int32(_last(row + (N if gated else 8), rows))
                e0 = e1 = float32(0)
                if address(bias) != 0:
                    e0, e1 = bias[r0], bias[r1]
                if narrow and address(squares) != 0:
                    acc = by_token(acc, int32(factors + 8 * still(t)))
                acc = affine(acc, factor, e0, e1)
                if gated:
                    hidden = gate(acc, out_inverse if row < N else float32(0))
                    block = int32(row_tile if row_tile * block_rows < N else -1)  # of 64 columns: the tile's rows
                    store_halves(hidden, tiles_at, warp, lane, out_halves, out_rows, block, first_token)
                else:
                    norm = norm_weight, out_halves, out_rows, out_inverse, norm_squares
                    store_tile(acc, tile, warp, lane, residual, out, norm, first_row, N, first_token, T)
        if paired:  # the other block may still arrive at this one's barriers
            synchronize_cluster()

    return linear_mma
