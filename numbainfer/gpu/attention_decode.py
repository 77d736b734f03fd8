"""Attention for decoding: few tokens, each with many keys (Dao et al. 2023, "Flash-Decoding").

A block is one token, one key/value head and one part of the keys. It serves up to 8 query heads, which share every
key that is read. Its warps take 16 keys in turn (attention_core.py) and merge at the block's end; the last block of a
token to finish merges the parts. How many parts have keys is read on the device: a captured program serves every
length.

Where no token needs another's key the kernel also does what rope_and_store does, in front (`fused`).
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda
from numpy import float32, int32, int64

from numbainfer.gpu.arithmetic import LOG2_E, divide, exp2, still
from numbainfer.gpu.attention_core import KEYS, MOST_PARTS, Layout, heads_together, make_core
from numbainfer.gpu.compile import device_function, family, kernel
from numbainfer.gpu.half_rows import HalfRows, half_index
from numbainfer.gpu.launch import Stream
from numbainfer.gpu.memory import DeviceArray
from numbainfer.gpu.ptx import (
    address,
    advance,
    fetch_add,
    let_next_kernel_start,
    shared_address,
    shared_f32,
    shared_i32,
    shared_store_f32,
    shared_store_i32,
    wait_for_previous_kernel,
)
from numbainfer.gpu.reduce import warp_max, warp_sum
from numbainfer.gpu.rope import PAGE, PAGE_BITS, HeldRope, put_f16

WARPS = 8
THREADS = 32 * WARPS
FORMS = ((True, False), (True, True), (False, False), (False, True))  # fused, halves


@device_function
def _turn(head, weight, normed, eps, head_dim, half, cos, sin, target, lane):
    """One warp: a head's norm and rotation, into shared memory at the address `target`."""
    factor = float32(1)
    if normed:
        squares = float32(0)
        i = lane
        while i < head_dim:
            squares += head[i] * head[i]
            i += 32
        factor = float32(1) / math.sqrt(warp_sum(squares) / float32(head_dim) + eps)
    i = lane
    while i < head_dim:
        value = head[i] * factor * (weight[i] if normed else float32(1))
        if i < 2 * half:
            other = i + half if i < half else i - half
            partner = head[other] * factor * (weight[other] if normed else float32(1))
            angle = i if i < half else other
            turned = partner * sin[angle]
            value = value * cos[angle] + (-turned if i < half else turned)
        shared_store_f32(target + 4 * i, value)
        i += 32


@family(*((*shape, *form) for shape in ((64, 7), (64, 4), (64, 3), (128, 4), (128, 8)) for form in FORMS))
def _decode(head_dim: int, shared: int, fused: bool, halves: bool):
    """shared: query heads of a block. halves: the result as HalfRows, in float16."""
    layout = Layout(head_dim, shared, WARPS)
    core = make_core(head_dim, shared, WARPS)
    fetch, prepare, attend, own_key = core.fetch, core.prepare, core.attend, core.own_key
    weigh, element, dimension = core.weigh, core.element, core.dimension
    width, words = shared * head_dim, head_dim // 4
    shift = head_dim.bit_length() - 1
    chunk = KEYS * WARPS  # keys that the warps of a block read at a time
    least = 128 // head_dim  # chunks of a part: merging parts takes as long as reading 32 KB of keys
    at_key, at_value = 4 * width, 4 * (width + head_dim)
    at_tops, at_totals, at_summary = layout.tops, layout.totals, layout.summary

    @device_function
    def store(out, out_rows, token, columns, column, value):
        """One number of the result; columns: of a token."""
        if halves:
            put_f16(out, half_index(out_rows, token, column), value)
        else:
            out[token * columns + column] = value

    @kernel(
        "f32p i32 i32 i32 f32 i32 f32p f32p i32 f32 i32p i32p f32p f32p i32 u16p u16p i32p i32 i32 f32p f32p i32p "
        + ("u16p i32" if halves else "f32p i32"),
        threads=THREADS,
        hot=True,
        fast=True,
    )
    def decode(
        qkv, heads, kv_heads, units_per_key, scale, window, q_norm, k_norm, normed, eps, positions, sequences, cos, sin,
        half, k_pages, v_pages, page_table, pages_per_sequence, parts_shift, part_values, part_statistics, counters,
        out, out_rows,
    ):  # fmt: skip
        memory = shared_address(cuda.shared.array(0, float32, alignment=16))
        thread = int32(cuda.threadIdx.x)
        warp, lane = int32(thread >> 5), int32(thread & 31)
        part, token, unit = cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z  # unit: a block's query heads
        first_head, g = int32(unit * shared), divide(unit, units_per_key)
        if not fused:
            wait_for_previous_kernel()
            let_next_kernel_start()

        # Fused, only a token's own key comes from the kernel before. The others, the positions and the page table are
        # from before this step, which began with a copy or a graph's launch: both wait for all that was queued.
        position = positions[token]
        table = advance(page_table, sequences[token] * pages_per_sequence)
        lowest = max(int32(0), int32(position + 1 - window)) if window else int32(0)
        begin = int32(lowest & ~(PAGE - 1))
        stop = position if fused else int32(position + 1)  # of the keys in the cache
        chunks = divide(int32(stop - begin + chunk - 1), int32(chunk))
        per_part = max(int32(least), int32((chunks + (1 << parts_shift) - 1) >> parts_shift))
        active = max(int32(1), divide(int32(chunks + per_part - 1), per_part))
        if part >= active:
            return
        start = int32(begin + part * per_part * chunk)
        end = min(int32(start + per_part * chunk), stop)
        k, v = cuda.local.array(words, int32), cuda.local.array(words, int32)
        base = int32(start + KEYS * warp)
        if base < end:
            fetch(k, v, k_pages, v_pages, table, kv_heads, g, base, end, lane)

        row = advance(qkv, token * (heads + 2 * kv_heads) * head_dim)
        own = fused and part == active - 1  # the block that sees the step's own key
        factor = scale * LOG2_E
        if fused:
            wait_for_previous_kernel()
            let_next_kernel_start()
            angles = position * half
            h = warp
            while h < shared + 1:
                h = still(h)
                head = advance(row, (first_head + h if h < shared else heads + g) * head_dim)
                weight, target = q_norm if h < shared else k_norm, memory + 4 * h * head_dim
                _turn(
                    head, weight, normed, eps, head_dim, half, advance(cos, angles), advance(sin, angles), target, lane
                )
                h = int32(h + WARPS)
            if thread < head_dim:
                shared_store_f32(memory + at_value + 4 * thread, row[(heads + kv_heads + g) * head_dim + thread])
        else:
            i = thread
            while i < width:
                i = still(i)
                shared_store_f32(memory + 4 * i, row[first_head * head_dim + i])
                i = int32(i + THREADS)
        cuda.syncthreads()
        prepare(memory, factor, thread, THREADS)
        pieces = max(int32(1), min(int32(WARPS), int32((end - start + KEYS - 1) >> 4)))  # the warps that have keys
        if own:
            pieces = int32(WARPS + 1)
            if warp < shared:
                own_key(memory, factor, warp, lane, True)
            if thread < head_dim:
                page, in_page = int64(table[position >> PAGE_BITS]), position & (PAGE - 1)
                slot = ((page * kv_heads + g) * PAGE + in_page) * head_dim + thread
                put_f16(k_pages, slot, shared_f32(memory + at_key + 4 * thread))
                put_f16(v_pages, slot, shared_f32(memory + at_value + 4 * thread))
        cuda.syncthreads()
        attend(memory, k, v, k_pages, v_pages, table, kv_heads, g, base, end, lowest, warp, lane)
        cuda.syncthreads()
        if warp < shared:
            weigh(memory, pieces, warp, lane)
        cuda.syncthreads()
        place = ((token * cuda.gridDim.z + unit) << parts_shift) + part
        i = thread
        while i < width:
            i = still(i)
            h, at = int32(i >> shift), int32(i & (head_dim - 1))
            value = element(memory, pieces, h, at)
            if active == 1:
                value /= shared_f32(memory + at_summary + 8 * h + 4)
                store(out, out_rows, token, heads * head_dim, (first_head + h) * head_dim + dimension(at), value)
            else:
                part_values[int64(place) * width + i] = value  # by position
            i = int32(i + THREADS)
        if active == 1:
            return
        if thread < 2 * shared:
            part_statistics[place * 2 * shared + thread] = shared_f32(memory + at_summary + 4 * thread)
        cuda.threadfence()
        cuda.syncthreads()
        if thread == 0:
            at = address(counters) + 4 * (token * cuda.gridDim.z + unit)
            shared_store_i32(memory, fetch_add(at, int32(1)))  # over the queries, which nobody needs any more
        cuda.syncthreads()
        if shared_i32(memory) != active - 1:
            return
        # The last block of these heads to finish merges the parts in the same way: a lane is a part.
        cuda.threadfence()
        place -= part
        if warp < shared:
            at = 2 * ((place + min(lane, active - 1)) * shared + warp)
            largest = warp_max(part_statistics[at])
            decay = exp2(part_statistics[at] - largest) if lane < active else float32(0)
            shared_store_f32(memory + at_tops + 4 * (32 * warp + lane), decay)
            weights = warp_sum(decay * part_statistics[at + 1])
            if lane == 0:
                shared_store_f32(memory + at_totals + 4 * warp, weights)
        cuda.syncthreads()
        i = thread
        while i < width:
            i = still(i)
            h, value = int32(i >> shift), float32(0)
            for p in range(active):
                decay = shared_f32(memory + at_tops + 4 * (32 * h + p))
                value += decay * part_values[int64(place + p) * width + i]
            at = (first_head + h) * head_dim + dimension(int32(i & (head_dim - 1)))
            store(out, out_rows, token, heads * head_dim, at, value / shared_f32(memory + at_totals + 4 * h))
            i = int32(i + THREADS)
        if thread == 0:
            counters[token * cuda.gridDim.z + unit] = int32(0)

    return decode


MOST_TOKENS = 64  # of a step; more are taken for a prompt, whose tokens share their keys


def fits(tokens: int, head_dim: int, dtype: np.dtype) -> bool:
    """Whether `decode` takes such a step: few tokens, heads of models, float16 pages."""
    return tokens <= MOST_TOKENS and head_dim in (64, 128) and dtype == np.float16


def decode(
    stream: Stream,
    qkv: DeviceArray,
    heads: int,
    scale: float,
    window: int,
    rope: HeldRope | None,
    positions: DeviceArray,
    sequences: DeviceArray,
    k_pages: DeviceArray,
    v_pages: DeviceArray,
    page_table: DeviceArray,
    out: DeviceArray | HalfRows,
) -> None:
    """Attention as registry.attention has it; with `rope`, of tokens apart, what it does too."""
    kv_heads, head_dim, tokens = k_pages.shape[1], k_pages.shape[3], qkv.shape[0]
    shared = heads_together(heads, kv_heads)
    units = heads // shared
    blocks = stream.gpu.multiprocessors // (units * tokens)  # for each token's heads, so that all have some
    parts_shift = min(MOST_PARTS.bit_length(), max(1, blocks).bit_length()) - 1
    parts = 1 << parts_shift
    values = stream.scratch("attention parts", tokens * units * parts * shared * head_dim)
    statistics = stream.scratch("attention statistics", tokens * units * parts * shared * 2)
    norms = (None, None, 0, 0.0) if rope is None else (rope.q_norm, rope.k_norm, int(rope.q_norm is not None), rope.eps)
    angles = (None, None, 0) if rope is None else (rope.cos, rope.sin, 0 if rope.cos is None else rope.cos.shape[1])
    target = (out.data, out.rows) if isinstance(out, HalfRows) else (out, 0)
    stream.launch(
        _decode(head_dim, shared, rope is not None, isinstance(out, HalfRows)),
        *((parts, tokens, units), qkv, heads, kv_heads, heads // kv_heads // shared, scale, window, *norms),
        *(positions, sequences, *angles, k_pages, v_pages, page_table, page_table.shape[1]),
        *(parts_shift, values, statistics, stream.counters(tokens * units), *target),
        shared=Layout(head_dim, shared, WARPS).nbytes,
    )
