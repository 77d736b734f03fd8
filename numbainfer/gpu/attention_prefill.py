"""Causal attention for many tokens of a sequence, on tensor cores: FlashAttention-2 (Dao 2023) over the paged cache.

A block takes ROWS queries of one key/value head: all its query heads of token 0, then of token 1, and so on, 64 to a
warpgroup. It walks the pages that its tokens see. A page's keys and values come to shared memory with asynchronous
copies while the page before is worked on; scores, weights and values stay in registers, in fragments (fragments.py):
weights in float16, all sums in float32.

Tokens of several sequences may meet in a block: then it walks the pages of each run of tokens of one sequence in turn,
and masks the others' scores.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda
from numpy import float32, int32, int64

from numbainfer.gpu.arithmetic import LOG2_E, exp2, pack_halves
from numbainfer.gpu.compile import Kernel, device_function, family, kernel
from numbainfer.gpu.fragments import (
    as_left_matrix,
    largest,
    mask,
    power,
    scale_rows,
    store_row,
    store_row_halves,
    total,
    zeros,
)
from numbainfer.gpu.half_rows import HalfRows
from numbainfer.gpu.launch import Stream
from numbainfer.gpu.memory import DeviceArray
from numbainfer.gpu.pipeline import fence_for_copies
from numbainfer.gpu.products import finished, multiply
from numbainfer.gpu.ptx import (
    address,
    copy_async_16_or_zeros,
    copy_async_commit,
    copy_async_wait,
    let_next_kernel_start,
    load_f32x2,
    shared_address,
    shared_i32x4,
    shared_store_i32,
    shared_store_i32x4,
    wait_for_previous_kernel,
)
from numbainfer.gpu.rope import PAGE, PAGE_BITS

ROWS = 128  # queries of a block
THREADS = 256
STAGES = 2  # pages in shared memory
NEVER = 1 << 30
_copied = copy_async_wait(STAGES - 2)


@device_function
def _quad_max(value):
    """The largest of the four lanes that share a row."""
    value = max(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, 1))
    return max(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, 2))


@device_function
def _quad_sum(value):
    value += cuda.shfl_xor_sync(0xFFFFFFFF, value, 1)
    return value + cuda.shfl_xor_sync(0xFFFFFFFF, value, 2)


@family((64, True), (128, True), (72, False), (256, False))
def _attention(head_dim: int, halves: bool) -> Kernel:
    """halves: the result goes to HalfRows."""
    blocks = -(-head_dim // 64)  # of 64 columns of a head; the last may be narrower
    last = head_dim - 64 * (blocks - 1)
    tile_bytes = PAGE * 128  # of 64 columns of a page
    stage_bytes = 2 * blocks * PAGE * 128
    block_of_queries = 64 * THREADS  # bytes: 64 columns of the block's queries
    chunks = head_dim // 8  # of a key

    score, last_score = multiply(PAGE), multiply(PAGE, -(-last // 16))
    weigh, weigh_last = multiply(64, transposed=True), multiply(last, transposed=True)
    no_scores, nothing, nothing_last = zeros(PAGE), zeros(64), zeros(last)
    scored, done, done_last = finished(PAGE), finished(64), finished(last)
    keep, top, powers, sums = mask(PAGE), largest(PAGE), power(PAGE), total(PAGE)
    scale_64, scale_last = scale_rows(64), scale_rows(last)
    far = 64 * (blocks - 1)

    def row_store(second: int) -> Any:
        """store(o0, o1, o2, o_last, inside, out, out_halves, out_rows, line, token, column) of a thread's row g, or
        g + 8: a head's columns from `column` of a line, if it is `inside`."""
        put, put_last = store_row(64, second), store_row(last, second)
        put_halves, put_last_halves = store_row_halves(64, second), store_row_halves(last, second)

        @device_function
        def store(o0, o1, o2, o_last, inside, out, out_halves, out_rows, line, token, column):
            if not inside:
                return
            if halves:
                data = address(out_halves)
                if blocks > 1:
                    put_halves(o0, data, out_rows, token, column)
                if blocks > 2:
                    put_halves(o1, data, out_rows, token, column + 64)
                if blocks > 3:
                    put_halves(o2, data, out_rows, token, column + 128)
                put_last_halves(o_last, data, out_rows, token, column + far)
            else:
                to = address(out) + (int64(token) * line + column) * 4
                if blocks > 1:
                    put(o0, to)
                if blocks > 2:
                    put(o1, to + 256)
                if blocks > 3:
                    put(o2, to + 512)
                put_last(o_last, to + 4 * far)

        return store

    store, store8 = row_store(0), row_store(1)

    @device_function
    def pair(at, column, scale):
        """Columns column and column + 1 of a query, scaled, as float16."""
        if column < head_dim:
            a, b = load_f32x2(at + 4 * column)
            return pack_halves(a * scale, b * scale)
        return 0

    @device_function
    def queries(at, at8, column, scale):
        """64 columns of a thread's two queries, as the left matrix of a product."""
        a0, a1 = pair(at, column, scale), pair(at8, column, scale)
        a2, a3 = pair(at, column + 8, scale), pair(at8, column + 8, scale)
        b0, b1 = pair(at, column + 16, scale), pair(at8, column + 16, scale)
        b2, b3 = pair(at, column + 24, scale), pair(at8, column + 24, scale)
        c0, c1 = pair(at, column + 32, scale), pair(at8, column + 32, scale)
        c2, c3 = pair(at, column + 40, scale), pair(at8, column + 40, scale)
        d0, d1 = pair(at, column + 48, scale), pair(at8, column + 48, scale)
        d2, d3 = pair(at, column + 56, scale), pair(at8, column + 56, scale)
        return a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3

    @device_function
    def keep_words(at, words):
        """A thread's 16 words to shared memory. Not in registers: ptxas 13.0 loses what wgmma reads in a loop."""
        shared_store_i32x4(at, words[0], words[1], words[2], words[3])
        shared_store_i32x4(at + 16 * THREADS, words[4], words[5], words[6], words[7])
        shared_store_i32x4(at + 32 * THREADS, words[8], words[9], words[10], words[11])
        shared_store_i32x4(at + 48 * THREADS, words[12], words[13], words[14], words[15])

    @device_function
    def kept_words(at):
        """What keep_words stored."""
        return (
            shared_i32x4(at)
            + shared_i32x4(at + 16 * THREADS)
            + shared_i32x4(at + 32 * THREADS)
            + shared_i32x4(at + 48 * THREADS)
        )

    @device_function
    def ask(k_pages, v_pages, page_id, kv_heads, g, stage, length):
        """Starts the copies of a page's keys and values; zeros for those at `length` and beyond."""
        start = (int64(page_id) * kv_heads + g) * (PAGE * head_dim * 2)
        k, v = address(k_pages) + start, address(v_pages) + start
        piece = int32(cuda.threadIdx.x)
        while piece < PAGE * chunks:
            key = int32(piece // chunks)
            chunk = int32(piece - key * chunks)
            place = int32(stage + (chunk >> 3) * tile_bytes + key * 128 + ((chunk ^ key) & 7) * 16)
            size = int32(16 if key < length else 0)
            copy_async_16_or_zeros(place, k + int64(piece) * 16, size)
            copy_async_16_or_zeros(place + blocks * tile_bytes, v + int64(piece) * 16, size)
            piece = int32(piece + THREADS)

    @kernel(
        "f32p i32 i32 f32 i32 i32p i32p u16p u16p i32p i32 f32p u16p i32 i32",
        threads=THREADS, blocks=2 if head_dim in (32, 64) else 1, hot=True, fast=True,
    )  # fmt: skip
    def attention_prefill(
        qkv, heads, kv_heads, scale, window, positions, sequences, k_pages, v_pages, page_table, pages_per_sequence,
        out, out_halves, out_rows, tokens,
    ):  # fmt: skip
        facts = cuda.shared.array(4, int32)  # of a run: where the next begins, least and largest position
        dynamic = cuda.shared.array(0, int32)
        let_next_kernel_start()
        stages_at = int32((shared_address(dynamic) + 1023) & -1024)
        queries_at = int32(stages_at + STAGES * stage_bytes)
        thread = int32(cuda.threadIdx.x)
        warp, lane = int32(thread >> 5), int32(thread & 31)
        row_in_quad, t2 = int32(lane >> 2), int32((lane & 3) << 1)
        shared = int32(heads // kv_heads)
        g = int32(cuda.blockIdx.y)
        # the last tokens see most: they begin first
        first_row = int32((cuda.gridDim.x - 1 - cuda.blockIdx.x) * ROWS)
        rows = int32(min(tokens * shared - first_row, ROWS))
        row = int32(min(16 * warp + row_in_quad, rows - 1))
        row8 = int32(min(16 * warp + row_in_quad + 8, rows - 1))
        token, token8 = int32((first_row + row) // shared), int32((first_row + row8) // shared)
        head = int32(g * shared + first_row + row - token * shared)
        head8 = int32(g * shared + first_row + row8 - token8 * shared)
        if head_dim % 16:  # columns up to the next 16 take part in products
            piece = thread
            while piece < STAGES * (stage_bytes >> 2):
                shared_store_i32(stages_at + piece * 4, 0)
                piece = int32(piece + THREADS)
            cuda.syncthreads()
        wait_for_previous_kernel()
        at = address(qkv) + (int64(token) * (heads + 2 * kv_heads) + head) * (4 * head_dim)
        at8 = address(qkv) + (int64(token8) * (heads + 2 * kv_heads) + head8) * (4 * head_dim)
        factor = scale * LOG2_E  # powers of 2 from here on
        mine_at = int32(queries_at + thread * 16)
        for block in range(blocks):
            words = queries(at, at8, t2 + 64 * block, factor)
            keep_words(mine_at + block * block_of_queries, words)
        o0, o1, o2, o_last = nothing(), nothing(), nothing(), nothing_last()
        position, position8 = positions[token], positions[token8]
        sequence, sequence8 = sequences[token], sequences[token8]
        highest, highest8 = float32(-1e30), float32(-1e30)
        sum_g, sum_g8 = float32(0), float32(0)

        start = int32(first_row // shared)
        run, end = start, int32((first_row + rows - 1) // shared + 1)
        while run < end:
            here = sequences[run]
            if thread == 0:
                facts[0], facts[1], facts[2] = end, NEVER, -1
            cuda.syncthreads()
            mine, mine8 = sequence == here and token >= run, sequence8 == here and token8 >= run
            if lane & 3 == 0:
                if not mine and token >= run:
                    cuda.atomic.min(facts, 0, token)
                if not mine8 and token8 >= run:
                    cuda.atomic.min(facts, 0, token8)
            cuda.syncthreads()
            next_run = facts[0]
            mine, mine8 = mine and token < next_run, mine8 and token8 < next_run
            if lane & 3 == 0:
                if mine:
                    cuda.atomic.min(facts, 1, position)
                    cuda.atomic.max(facts, 2, position)
                if mine8:
                    cuda.atomic.min(facts, 1, position8)
                    cuda.atomic.max(facts, 2, position8)
            cuda.syncthreads()
            least, most = facts[1], facts[2]
            alone = run == start and next_run == end
            low = int32(position - window + 1 if window > 0 else 0)
            low8 = int32(position8 - window + 1 if window > 0 else 0)
            first_page = int32(max(0, least - window + 1) >> PAGE_BITS if window > 0 else 0)
            last_page = int32(most >> PAGE_BITS)
            table = int64(here) * pages_per_sequence
            ask(k_pages, v_pages, page_table[table + first_page], kv_heads, g, stages_at, most + 1 - first_page * PAGE)
            copy_async_commit()
            stage = int32(0)
            page = first_page
            while page <= last_page:
                _copied()
                fence_for_copies()
                cuda.syncthreads()
                memory = int32(stages_at + stage * stage_bytes)
                stage = int32(1 - stage)
                if page < last_page:
                    following = int32(page + 1)
                    ask(
                        k_pages, v_pages, page_table[table + following], kv_heads, g, stages_at + stage * stage_bytes,
                        most + 1 - following * PAGE,
                    )  # fmt: skip
                copy_async_commit()

                s = no_scores()
                if blocks > 1:
                    s = scored(score(s, kept_words(mine_at), memory, lane))
                if blocks > 2:
                    s = scored(score(s, kept_words(mine_at + block_of_queries), memory + tile_bytes, lane))
                if blocks > 3:
                    third = kept_words(mine_at + 2 * block_of_queries)
                    s = scored(score(s, third, memory + 2 * tile_bytes, lane))
                words = kept_words(mine_at + (blocks - 1) * block_of_queries)
                s = scored(last_score(s, words, memory + (blocks - 1) * tile_bytes, lane))
                first_key = int32(page * PAGE)
                if not alone or first_key + PAGE - 1 > least or (window > 0 and first_key < most - window + 1):
                    high = int32(position - first_key if mine else -1)
                    high8 = int32(position8 - first_key if mine8 else -1)
                    s = keep(s, t2, low - first_key, high, low8 - first_key, high8)

                page_top, page_top8 = top(s)
                new, new8 = max(highest, _quad_max(page_top)), max(highest8, _quad_max(page_top8))
                decay, decay8 = exp2(highest - new), exp2(highest8 - new8)
                highest, highest8 = new, new8
                p = powers(s, new, new8)
                page_sum, page_sum8 = sums(p)
                sum_g, sum_g8 = sum_g * decay + page_sum, sum_g8 * decay8 + page_sum8
                weights = as_left_matrix(p)
                values = memory + blocks * tile_bytes
                if blocks > 1:
                    o0 = weigh(scale_64(o0, decay, decay8), weights, values, lane)
                if blocks > 2:
                    o1 = weigh(scale_64(o1, decay, decay8), weights, values + tile_bytes, lane)
                if blocks > 3:
                    o2 = weigh(scale_64(o2, decay, decay8), weights, values + 2 * tile_bytes, lane)
                o_last = weigh_last(
                    scale_last(o_last, decay, decay8), weights, values + (blocks - 1) * tile_bytes, lane
                )
                if blocks > 1:
                    o0 = done(o0)
                if blocks > 2:
                    o1 = done(o1)
                if blocks > 3:
                    o2 = done(o2)
                o_last = done_last(o_last)
                page = int32(page + 1)
            cuda.syncthreads()
            run = next_run

        inverse, inverse8 = float32(1) / _quad_sum(sum_g), float32(1) / _quad_sum(sum_g8)
        o_last = scale_last(o_last, inverse, inverse8)
        inside = 16 * warp + row_in_quad < rows
        inside8 = 16 * warp + row_in_quad + 8 < rows
        if blocks > 1:
            o0 = scale_64(o0, inverse, inverse8)
        if blocks > 2:
            o1 = scale_64(o1, inverse, inverse8)
        if blocks > 3:
            o2 = scale_64(o2, inverse, inverse8)
        line = heads * head_dim
        column, column8 = int32(head * head_dim + t2), int32(head8 * head_dim + t2)
        store(o0, o1, o2, o_last, inside, out, out_halves, out_rows, line, token, column)
        store8(o0, o1, o2, o_last, inside8, out, out_halves, out_rows, line, token8, column8)

    return attention_prefill


def attention_prefill(
    stream: Stream,
    qkv: DeviceArray,
    heads: int,
    scale: float,
    window: int,
    positions: DeviceArray,
    sequences: DeviceArray,
    k_pages: DeviceArray,
    v_pages: DeviceArray,
    page_table: DeviceArray,
    out: DeviceArray | HalfRows,
) -> None:
    """See registry.attention; float16 pages, and a head size for which `serves` says yes."""
    (_, kv_heads, _, head_dim), tokens = k_pages.shape, qkv.shape[0]
    target: tuple[Any, ...]
    if isinstance(out, HalfRows):
        halves, target = True, (None, out.data, out.rows)
    else:
        halves, target = False, (out, None, 0)
    stream.launch(
        _attention(head_dim, halves),
        *((-(-tokens * (heads // kv_heads) // ROWS), kv_heads), qkv, heads, kv_heads, scale, window),
        *(positions, sequences, k_pages, v_pages, page_table, page_table.shape[1]),
        *target,
        tokens,
        shared=-(-head_dim // 64) * (STAGES * 2 * PAGE * 128 + 64 * THREADS) + 1024,
    )


def serves(head_dim: int, dtype: np.dtype) -> bool:
    """Whether there is a kernel for this head size and these pages."""
    return dtype == np.float16 and head_dim % 8 == 0 and 32 <= head_dim <= 256
