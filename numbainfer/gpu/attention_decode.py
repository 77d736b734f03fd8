"""Attention for decoding: few tokens, each with many keys (Dao et al. 2023, "Flash-Decoding").

A block is one token, one key/value head and one part of the keys. It serves up to 8 query heads, which share every
key that is read. `d / 8` lanes hold a key, 16 bytes each, so a warp's load covers whole keys; every such group of lanes
has an online softmax of its own, all of them merge at the block's end, and the last block of a token to finish merges
the parts. How many parts have keys is read on the device: a captured program serves every length.

With one token in the step the kernel also does what rope_and_store does, in front (`fused`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import cuda
from numpy import float32, int32, int64

from numbainfer.gpu.compile import device_function, family, kernel
from numbainfer.gpu.launch import Stream
from numbainfer.gpu.memory import DeviceArray
from numbainfer.gpu.ptx import (
    address,
    advance,
    divide,
    exp2,
    fetch_add,
    halves_to_floats,
    let_next_kernel_start,
    load_i32x4,
    shared_address,
    shared_f32,
    shared_f32x4,
    shared_i32,
    shared_store_f32,
    shared_store_f32x4,
    shared_store_i32,
    wait_for_previous_kernel,
)
from numbainfer.gpu.reduce import warp_max, warp_sum
from numbainfer.gpu.rope import PAGE, HeldRope, as_stored, put_f16

WARPS = 8
THREADS = 32 * WARPS
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Plan:
    """How a block is laid out. lanes: that hold a key; together: keys that a warp's load covers; loads: of keys, and of
    values, in flight; step: keys of a warp at a time; groups of lanes. Then bytes of shared memory: the turned query
    heads and the key stand at its start."""

    head_dim: int
    shared: int

    @property
    def lanes(self) -> int:
        return self.head_dim // 8

    @property
    def together(self) -> int:
        return 32 // self.lanes

    @property
    def loads(self) -> int:
        return 4 if self.shared <= 4 else 2

    @property
    def step(self) -> int:
        return self.loads * self.together

    @property
    def groups(self) -> int:
        return WARPS * self.together

    @property
    def values(self) -> int:
        return 4 * (self.shared + 1) * self.head_dim

    @property
    def tops(self) -> int:
        return self.values + 4 * (self.groups + 1) * self.shared * self.head_dim

    @property
    def totals(self) -> int:
        return self.tops + 4 * max(self.groups + 1, 32) * self.shared

    @property
    def nbytes(self) -> int:
        return self.totals + 4 * (self.groups + 1) * self.shared


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


@family((64, 4, True), (128, 8, True), (64, 7, False), (256, 4, True))
def _decode(head_dim: int, shared: int, fused: bool):
    """shared: query heads of a block."""
    plan = Plan(head_dim, shared)
    lanes, together, loads, step, groups = plan.lanes, plan.together, plan.loads, plan.step, plan.groups
    width = shared * head_dim
    pieces = groups + 1 if fused else groups  # that the block's end merges: the groups of lanes, and the step's own key
    per_lane, words, weights_size = 8 * shared, 4 * loads, shared * loads
    at_values, at_tops, at_totals = plan.values, plan.tops, plan.totals

    @device_function
    def fetch(k, v, k_pages, v_pages, table, kv_heads, g, first, end, column):
        """This lane's 8 elements of `loads` keys and values; a key past the end repeats the last."""
        for u in range(loads):
            key = min(first + u * together, end - 1)
            page = int64(table[key >> 6]) * kv_heads + g
            at = 2 * ((page * PAGE + (key & 63)) * head_dim + column)
            k[4 * u], k[4 * u + 1], k[4 * u + 2], k[4 * u + 3] = load_i32x4(address(k_pages) + at)
            v[4 * u], v[4 * u + 1], v[4 * u + 2], v[4 * u + 3] = load_i32x4(address(v_pages) + at)

    @kernel(
        "f32p i32 i32 i32 f32 i32 f32p f32p i32 f32 i32p i32p f32p f32p i32 u16p u16p i32p i32 i32 f32p f32p i32p f32p",
        threads=THREADS,
        hot=True,
        fast=True,
    )
    def decode(
        qkv, heads, kv_heads, units_per_key, scale, window, q_norm, k_norm, normed, eps, positions, sequences, cos, sin,
        half, k_pages, v_pages, page_table, pages_per_sequence, parts_shift, part_values, part_statistics, counters,
        out,
    ):  # fmt: skip
        memory = shared_address(cuda.shared.array(0, float32, alignment=16))
        thread, warp, lane = cuda.threadIdx.x, cuda.threadIdx.x >> 5, cuda.threadIdx.x & 31
        part, token, unit = cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z  # unit: a block's query heads
        first_head, g = unit * shared, divide(unit, units_per_key)
        if not fused:
            wait_for_previous_kernel()
            let_next_kernel_start()

        # Fused, only the step's own key comes from the kernel before. The others, the positions and the page table are
        # from kernels before that one, which are complete: it let this one start after its own wait.
        position = positions[token]
        table = advance(page_table, sequences[token] * pages_per_sequence)
        begin = max(0, position + 1 - window) >> 6 << 6 if window else 0
        stop = position if fused else position + 1  # of the keys in the cache
        chunks = (stop - begin + WARPS * step - 1) // (WARPS * step)  # what the warps of a block read at a time
        per_part = max(2, (chunks + (1 << parts_shift) - 1) >> parts_shift)  # merging parts takes as long as a chunk
        active = max(1, divide(chunks + per_part - 1, per_part))
        if part >= active:
            return
        start = begin + part * per_part * WARPS * step
        end = min(start + per_part * WARPS * step, stop)
        inside, column = lane // lanes, lane % lanes * 8
        k, v = cuda.local.array(words, int32), cuda.local.array(words, int32)
        start += warp * step
        if start < end:
            fetch(k, v, k_pages, v_pages, table, kv_heads, g, start + inside, end, column)

        row = advance(qkv, token * (heads + 2 * kv_heads) * head_dim)
        own = fused and part == active - 1  # the block that sees the step's own key
        if fused:
            wait_for_previous_kernel()
            let_next_kernel_start()
            angles = position * half
            h = warp
            while h < shared + 1:
                head = advance(row, (first_head + h if h < shared else heads + g) * head_dim)
                weight, target = q_norm if h < shared else k_norm, memory + 4 * h * head_dim
                _turn(
                    head, weight, normed, eps, head_dim, half, advance(cos, angles), advance(sin, angles), target, lane
                )
                h += WARPS
        else:
            i = thread
            while i < width:
                shared_store_f32(memory + 4 * i, row[first_head * head_dim + i])
                i += THREADS
        cuda.syncthreads()

        acc = cuda.local.array(per_lane, float32)
        top, total = cuda.local.array(shared, float32), cuda.local.array(shared, float32)
        scores = cuda.local.array(weights_size, float32)
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
                    at = memory + 4 * (h * head_dim + column)
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

        # What every group of lanes has, to shared memory: sums of values [piece, head, d], maxima and sums of weights
        # [head, piece].
        piece = warp * together + inside
        for h in range(shared):
            at = memory + at_values + 4 * ((piece * shared + h) * head_dim + column)
            shared_store_f32x4(at, acc[8 * h], acc[8 * h + 1], acc[8 * h + 2], acc[8 * h + 3])
            shared_store_f32x4(at + 16, acc[8 * h + 4], acc[8 * h + 5], acc[8 * h + 6], acc[8 * h + 7])
            if column == 0:
                shared_store_f32(memory + at_tops + 4 * (h * pieces + piece), top[h])
                shared_store_f32(memory + at_totals + 4 * (h * pieces + piece), total[h])
        if fused:  # the step's own key, as the cache will have it
            value_row = advance(row, (heads + kv_heads + g) * head_dim)
            h = warp
            while h < shared:
                score = float32(0)
                i = lane
                while i < head_dim:
                    key_value = as_stored(shared_f32(memory + 4 * (width + i)))
                    score += shared_f32(memory + 4 * (h * head_dim + i)) * key_value
                    value = as_stored(value_row[i]) if own else float32(0)
                    shared_store_f32(memory + at_values + 4 * ((groups * shared + h) * head_dim + i), value)
                    i += 32
                score = warp_sum(score) * log2_scale
                if lane == 0:
                    shared_store_f32(memory + at_tops + 4 * (h * pieces + groups), score if own else float32(-1e30))
                    shared_store_f32(memory + at_totals + 4 * (h * pieces + groups), float32(1) if own else float32(0))
                h += WARPS
            if own:
                slot = ((int64(table[position >> 6]) * kv_heads + g) * PAGE + (position & 63)) * head_dim
                i = thread
                while i < head_dim:
                    put_f16(k_pages, slot + i, shared_f32(memory + 4 * (width + i)))
                    put_f16(v_pages, slot + i, value_row[i])
                    i += THREADS
        cuda.syncthreads()
        # Maxima become factors; behind them a head's largest maximum and its sum of weights.
        h = warp
        while h < shared:
            largest = float32(-1e30)
            i = lane
            while i < pieces:
                largest = max(largest, shared_f32(memory + at_tops + 4 * (h * pieces + i)))
                i += 32
            largest, weights = warp_max(largest), float32(0)
            i = lane
            while i < pieces:
                at = 4 * (h * pieces + i)
                decay = exp2(shared_f32(memory + at_tops + at) - largest)
                weights += decay * shared_f32(memory + at_totals + at)
                shared_store_f32(memory + at_tops + at, decay)
                i += 32
            weights = warp_sum(weights)
            if lane == 0:
                shared_store_f32(memory + 8 * h, largest)  # over the queries, which nobody needs any more
                shared_store_f32(memory + 8 * h + 4, weights)
            h += WARPS
        cuda.syncthreads()
        result = advance(out, (token * heads + first_head) * head_dim)
        place = ((token * cuda.gridDim.z + unit) << parts_shift) + part
        i = thread
        while i < width:
            h, value = i // head_dim, float32(0)
            for j in range(pieces):
                factor = shared_f32(memory + at_tops + 4 * (h * pieces + j))
                value += factor * shared_f32(memory + at_values + 4 * (j * width + i))
            if active == 1:
                result[i] = value / shared_f32(memory + 8 * h + 4)
            else:
                part_values[int64(place) * width + i] = value
            i += THREADS
        if active == 1:
            return
        if thread < 2 * shared:
            part_statistics[place * 2 * shared + thread] = shared_f32(memory + 4 * thread)
        cuda.threadfence()
        cuda.syncthreads()
        if thread == 0:
            at = address(counters) + 4 * (token * cuda.gridDim.z + unit)
            shared_store_i32(memory, fetch_add(at, int32(1)))
        cuda.syncthreads()
        if shared_i32(memory) != active - 1:
            return
        # The last block of these heads to finish merges the parts in the same way: a lane is a part.
        cuda.threadfence()
        place -= part
        h = warp
        while h < shared:
            at = 2 * ((place + min(lane, active - 1)) * shared + h)
            largest = warp_max(part_statistics[at])
            decay = exp2(part_statistics[at] - largest) if lane < active else float32(0)
            shared_store_f32(memory + at_tops + 4 * (32 * h + lane), decay)
            weights = warp_sum(decay * part_statistics[at + 1])
            if lane == 0:
                shared_store_f32(memory + at_totals + 4 * h, weights)
            h += WARPS
        cuda.syncthreads()
        i = thread
        while i < width:
            h, value = i // head_dim, float32(0)
            for p in range(active):
                factor = shared_f32(memory + at_tops + 4 * (32 * h + p))
                value += factor * part_values[int64(place + p) * width + i]
            result[i] = value / shared_f32(memory + at_totals + 4 * h)
            i += THREADS
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
    shared = next(n for n in range(min(8, of_key), 0, -1) if of_key % n == 0)
    units, plan = heads // shared, Plan(head_dim, shared)
    blocks = stream.gpu.multiprocessors // (units * tokens)  # for each token's heads, so that all have some
    parts_shift = min(MOST_PARTS.bit_length(), max(1, blocks).bit_length()) - 1
    parts = 1 << parts_shift
    values = stream.scratch("attention parts", tokens * units * parts * shared * head_dim)
    statistics = stream.scratch("attention statistics", tokens * units * parts * shared * 2)
    norms = (None, None, 0, 0.0) if rope is None else (rope.q_norm, rope.k_norm, int(rope.q_norm is not None), rope.eps)
    angles = (None, None, 0) if rope is None else (rope.cos, rope.sin, 0 if rope.cos is None else rope.cos.shape[1])
    stream.launch(
        _decode(head_dim, shared, rope is not None),
        *(
            (parts, tokens, units),
            qkv,
            heads,
            kv_heads,
            of_key // shared,
            scale,
            window,
            *norms,
            positions,
            sequences,
            *angles,
        ),
        *(k_pages, v_pages, page_table, page_table.shape[1], parts_shift, values, statistics),
        *(stream.counters(tokens * units), out),
        shared=plan.nbytes,
    )
