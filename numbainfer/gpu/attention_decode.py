"""Attention for decoding: few tokens, each with many keys (Dao et al. 2023, "Flash-Decoding").

A block is one token, one key/value head and one part of the keys. It serves up to 8 query heads, which share every
key that is read. `d / 8` lanes hold a key, 16 bytes each, so a warp's load covers whole keys; every such group of lanes
has an online softmax of its own, all of them merge at the block's end, and the last block of a token to finish merges
the parts. How many parts have keys is read on the device: a captured program serves every length.

With one token in the step the kernel also does what rope_and_store does, in front (`fused`).
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda
from numpy import float32, int32, int64

from numbainfer.gpu.compile import device_function, family, kernel
from numbainfer.gpu.launch import Stream
from numbainfer.gpu.memory import DeviceArray
from numbainfer.gpu.ptx import (
    address,
    advance,
    exp2,
    fetch_add,
    halves_to_floats,
    let_next_kernel_start,
    load_i32x4,
    shared_address,
    shared_f32x4,
    wait_for_previous_kernel,
)
from numbainfer.gpu.reduce import warp_sum
from numbainfer.gpu.rope import PAGE, HeldRope, as_stored, put_f16, rotated

WARPS = 8
THREADS = 32 * WARPS
_LOG2_E = math.log2(math.e)


@device_function
def _rope_head(head, weight, normed, eps, head_dim, half, cos, sin, turned, scratch, lane):
    """One warp: a head's norm and rotation into shared memory, turned[head_dim]."""
    factor = float32(1)
    if normed:
        squares = float32(0)
        for i in range(lane, head_dim, 32):
            squares += head[i] * head[i]
        factor = float32(1) / math.sqrt(warp_sum(squares) / float32(head_dim) + eps)
    for i in range(lane, head_dim, 32):
        scratch[i] = head[i] * factor * (weight[i] if normed else float32(1))
    cuda.syncwarp()
    for i in range(lane, head_dim, 32):
        turned[i] = rotated(scratch, i, half, cos, sin)


@family(
    (64, 4, True),
    (64, 7, True),
    (128, 4, True),
    (128, 2, False),
    (64, 8, False),
    (128, 8, True),
    (32, 1, False),
    (256, 4, True),
)
def _decode(head_dim: int, shared: int, fused: bool):
    """shared: query heads of a block."""
    lanes = head_dim // 8  # that hold a key
    together = 32 // lanes  # keys that a warp's load covers
    loads = 4 if shared <= 4 else 2  # of keys, and of values, in flight
    step = loads * together  # keys of a warp at a time
    width = shared * head_dim
    pieces = WARPS + 1 if fused else WARPS  # that the block's end merges
    partial = pieces * width
    turned_size = (shared + 1) * 2 * head_dim
    statistics = 2 * pieces * shared
    alone = 2 * WARPS * step  # keys up to which one block does it all: merging parts costs 2 us
    per_lane, words, weights_size = 8 * shared, 4 * loads, shared * loads

    @device_function
    def fetch(k, v, k_pages, v_pages, table, kv_heads, g, first, end, column):
        """This lane's 8 elements of `loads` keys and values; a key past the end repeats the last."""
        for u in range(loads):
            key = min(first + u * together, end - 1)
            page = int64(table[key // PAGE]) * kv_heads + g
            at = 2 * ((page * PAGE + key % PAGE) * head_dim + column)
            k[4 * u], k[4 * u + 1], k[4 * u + 2], k[4 * u + 3] = load_i32x4(address(k_pages) + at)
            v[4 * u], v[4 * u + 1], v[4 * u + 2], v[4 * u + 3] = load_i32x4(address(v_pages) + at)

    @kernel(
        "f32p i32 i32 f32 i32 f32p f32p i32 f32 i32p i32p f32p f32p i32 u16p u16p i32p i32 i32 f32p f32p i32p f32p",
        threads=THREADS,
        blocks=2 if shared <= 4 else 1,
        hot=True,
        fast=True,
    )
    def decode(
        qkv, heads, kv_heads, scale, window, q_norm, k_norm, normed, eps, positions, sequences, cos, sin, half,
        k_pages, v_pages, page_table, pages_per_sequence, parts, part_values, part_statistics, counters, out,
    ):  # fmt: skip
        # turned: the rotated query heads, then the key, and scratch
        turned = cuda.shared.array(turned_size, float32, alignment=16)
        values = cuda.shared.array(partial, float32)  # per warp, and for the step's own key: unnormalised sums
        tops = cuda.shared.array(statistics, float32)  # per warp and head: maximum, sum of weights
        last = cuda.shared.array(1, int32)
        thread, warp, lane = cuda.threadIdx.x, cuda.threadIdx.x >> 5, cuda.threadIdx.x & 31
        part, token, unit = cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z  # unit: a block's query heads
        first_head = unit * shared
        g = first_head // (heads // kv_heads)
        let_next_kernel_start()
        if not fused:
            wait_for_previous_kernel()

        # Fused, the step's own key comes from the kernel before; the others, the positions and the page table are
        # there: the step's first kernel lets no other start before it ends. So they are read ahead of the wait.
        position = positions[token]
        table = advance(page_table, sequences[token] * pages_per_sequence)
        begin = max(0, position + 1 - window) // PAGE * PAGE if window else 0
        stop = position if fused else position + 1  # of the keys in the cache
        active = max(1, min(parts, -(-(stop - begin) // alone)))
        share = max(1, -(-(stop - begin) // (active * WARPS * step))) * (WARPS * step)
        active = max(1, -(-(stop - begin) // share))
        if part >= active:
            return
        first_key = begin + part * share
        end = min(first_key + share, stop)
        inside, column = lane // lanes, lane % lanes * 8
        k, v = cuda.local.array(words, int32), cuda.local.array(words, int32)
        start = first_key + warp * step
        if start < end:
            fetch(k, v, k_pages, v_pages, table, kv_heads, g, start + inside, end, column)

        row = advance(qkv, token * (heads + 2 * kv_heads) * head_dim)
        own = fused and part == active - 1  # the block that sees the step's own key
        if fused:
            wait_for_previous_kernel()
            angles = position * half
            for h in range(warp, shared + 1, WARPS):
                mine = h < shared
                if mine or own:
                    _rope_head(
                        advance(row, (first_head + h if mine else heads + g) * head_dim),
                        q_norm if mine else k_norm,
                        normed,
                        eps,
                        head_dim,
                        half,
                        advance(cos, angles),
                        advance(sin, angles),
                        turned[h * head_dim :],
                        turned[(shared + 1 + h) * head_dim :],
                        lane,
                    )
        else:
            for i in range(thread, width, THREADS):
                turned[i] = row[first_head * head_dim + i]
        cuda.syncthreads()
        if own:
            slot = ((int64(table[position // PAGE]) * kv_heads + g) * PAGE + position % PAGE) * head_dim
            for i in range(thread, head_dim, THREADS):
                put_f16(k_pages, slot + i, turned[width + i])
                put_f16(v_pages, slot + i, row[(heads + kv_heads + g) * head_dim + i])

        acc = cuda.local.array(per_lane, float32)
        top, total = cuda.local.array(shared, float32), cuda.local.array(shared, float32)
        scores = cuda.local.array(weights_size, float32)
        queries = shared_address(turned) + 4 * column
        log2_scale = scale * float32(_LOG2_E)
        for h in range(shared):
            top[h], total[h] = float32(-1e30), float32(0)
            for i in range(8):
                acc[8 * h + i] = float32(0)
        while start < end:
            for u in range(loads):
                key = start + u * together + inside
                seen = key < end and (window == 0 or key > position - window)
                for h in range(shared):
                    at = queries + 4 * h * head_dim
                    a, b = shared_f32x4(at), shared_f32x4(at + 16)
                    c, d = halves_to_floats(k[4 * u]), halves_to_floats(k[4 * u + 1])
                    e, f = halves_to_floats(k[4 * u + 2]), halves_to_floats(k[4 * u + 3])
                    score = a[0] * c[0] + a[1] * c[1] + a[2] * d[0] + a[3] * d[1]
                    score += b[0] * e[0] + b[1] * e[1] + b[2] * f[0] + b[3] * f[1]
                    distance = lanes // 2
                    while distance:
                        score += cuda.shfl_xor_sync(0xFFFFFFFF, score, distance)
                        distance //= 2
                    scores[h * loads + u] = score * log2_scale if seen else float32(-1e30)
            for h in range(shared):
                larger = top[h]
                for u in range(loads):
                    larger = max(larger, scores[h * loads + u])
                decay = exp2(top[h] - larger)
                top[h] = larger
                total[h] *= decay
                for i in range(8):
                    acc[8 * h + i] *= decay
                for u in range(loads):
                    score = scores[h * loads + u]
                    weight = exp2(score - larger) if score > float32(-1e29) else float32(0)
                    scores[h * loads + u] = weight
                    total[h] += weight
            for u in range(loads):
                for i in range(4):
                    low, high = halves_to_floats(v[4 * u + i])
                    for h in range(shared):
                        acc[8 * h + 2 * i] += scores[h * loads + u] * low
                        acc[8 * h + 2 * i + 1] += scores[h * loads + u] * high
            start += WARPS * step
            if start < end:
                fetch(k, v, k_pages, v_pages, table, kv_heads, g, start + inside, end, column)

        if fused:  # the step's own key, as the cache will have it: a part of its own beside the warps'
            for h in range(warp, shared, WARPS):
                score = float32(0)
                for i in range(lane, head_dim, 32):
                    score += turned[h * head_dim + i] * as_stored(turned[width + i])
                    value = as_stored(row[(heads + kv_heads + g) * head_dim + i]) if own else float32(0)
                    values[(WARPS * shared + h) * head_dim + i] = value
                score = warp_sum(score) * log2_scale
                if lane == 0:
                    tops[2 * (WARPS * shared + h)] = score if own else float32(-1e30)
                    tops[2 * (WARPS * shared + h) + 1] = float32(1) if own else float32(0)

        # The groups of lanes of a warp, then the warps.
        for h in range(shared):
            largest = top[h]
            distance = lanes
            while distance < 32:
                largest = max(largest, cuda.shfl_xor_sync(0xFFFFFFFF, largest, distance))
                distance *= 2
            decay = exp2(top[h] - largest)
            total[h] *= decay
            distance = lanes
            while distance < 32:
                total[h] += cuda.shfl_xor_sync(0xFFFFFFFF, total[h], distance)
                distance *= 2
            for i in range(8):
                value = acc[8 * h + i] * decay
                distance = lanes
                while distance < 32:
                    value += cuda.shfl_xor_sync(0xFFFFFFFF, value, distance)
                    distance *= 2
                if inside == 0:
                    values[(warp * shared + h) * head_dim + column + i] = value
            if lane == 0:
                tops[2 * (warp * shared + h)], tops[2 * (warp * shared + h) + 1] = largest, total[h]
        cuda.syncthreads()
        result = advance(out, (token * heads + first_head) * head_dim)
        place = (token * cuda.gridDim.z + unit) * parts + part
        for i in range(thread, width, THREADS):
            h = i // head_dim
            largest, weights, value = float32(-1e30), float32(0), float32(0)
            for w in range(pieces):
                largest = max(largest, tops[2 * (w * shared + h)])
            for w in range(pieces):
                decay = exp2(tops[2 * (w * shared + h)] - largest)
                weights += tops[2 * (w * shared + h) + 1] * decay
                value += values[w * width + i] * decay
            if active == 1:
                result[i] = value / weights
            else:
                part_values[int64(place) * width + i] = value
                if i % head_dim == 0:
                    part_statistics[2 * (place * shared + h)] = largest
                    part_statistics[2 * (place * shared + h) + 1] = weights
        if active == 1:
            return
        cuda.threadfence()
        cuda.syncthreads()
        if thread == 0:
            at = address(counters) + 4 * (token * cuda.gridDim.z + unit)
            last[0] = fetch_add(at, int32(1)) == active - 1
        cuda.syncthreads()
        if last[0]:
            cuda.threadfence()
            place -= part
            for i in range(thread, width, THREADS):
                h = i // head_dim
                largest, weights, value = float32(-1e30), float32(0), float32(0)
                for p in range(active):
                    largest = max(largest, part_statistics[2 * ((place + p) * shared + h)])
                for p in range(active):
                    at = 2 * ((place + p) * shared + h)
                    decay = exp2(part_statistics[at] - largest)
                    weights += part_statistics[at + 1] * decay
                    value += part_values[int64(place + p) * width + i] * decay
                result[i] = value / weights
            if thread == 0:
                counters[token * cuda.gridDim.z + unit] = int32(0)

    return decode


MOST_TOKENS = 64  # of a step; more are taken for a prompt, whose tokens share their keys
MOST_PARTS = 32


def fits(tokens: int, head_dim: int, dtype: np.dtype) -> bool:
    """Whether `decode` takes such a step: few tokens, heads whose lanes divide a warp, float16 pages."""
    return tokens <= MOST_TOKENS and head_dim in (32, 64, 128, 256) and dtype == np.float16


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
    out: DeviceArray,
) -> None:
    """Attention as registry.attention has it; with `rope`, what it does too."""
    kv_heads, head_dim, tokens = k_pages.shape[1], k_pages.shape[3], qkv.shape[0]
    of_key = heads // kv_heads
    most = min(8, 1024 // head_dim, of_key)  # what registers and 48 KB of shared memory hold
    shared = next(n for n in range(most, 0, -1) if of_key % n == 0)
    units = heads // shared
    parts = max(1, min(MOST_PARTS, stream.gpu.multiprocessors // (units * tokens)))
    values = stream.scratch("attention parts", tokens * units * parts * shared * head_dim)
    statistics = stream.scratch("attention statistics", tokens * units * parts * shared * 2)
    norms = (None, None, 0, 0.0) if rope is None else (rope.q_norm, rope.k_norm, int(rope.q_norm is not None), rope.eps)
    angles = (None, None, 0) if rope is None else (rope.cos, rope.sin, 0 if rope.cos is None else rope.cos.shape[1])
    stream.launch(
        _decode(head_dim, shared, rope is not None),
        *((parts, tokens, units), qkv, heads, kv_heads, scale, window, *norms, positions, sequences, *angles),
        *(k_pages, v_pages, page_table, page_table.shape[1], parts, values, statistics),
        *(stream.counters(tokens * units), out),
    )
