"""Choosing from logits: argmax and top-k.

Values are compared as keys: 64-bit integers whose order is that of (value, lower index first), NaN smallest.
"""

from __future__ import annotations

import numpy as np
from numba import cuda
from numpy import int32, int64

from numbainfer.gpu.arithmetic import as_float, as_int
from numbainfer.gpu.compile import device_function, kernel
from numbainfer.gpu.launch import Stream
from numbainfer.gpu.memory import DeviceArray
from numbainfer.gpu.ptx import address, advance, fetch_add, let_next_kernel_start, wait_for_previous_kernel

THREADS = 512
SMALLEST = int64(-(2**63))
_INFINITY_BITS = int32(0x7F800000)


@device_function
def make_key(value, index):
    """A key that orders as the value does, the lower index first among equals, NaN with minus infinity."""
    bits = as_int(value)
    if (bits & int32(0x7FFFFFFF)) > _INFINITY_BITS:
        bits = int32(-0x00800000)  # minus infinity
    if bits == int32(-0x80000000):
        bits = int32(0)  # -0 equals 0
    if bits < 0:
        bits ^= int32(0x7FFFFFFF)
    return (int64(bits) << 32) | (int64(0x7FFFFFFF) - int64(index))


@device_function
def key_value(key):
    """The value that a key was made of (0 for -0)."""
    bits = int32(key >> 32)
    return as_float(bits ^ int32(0x7FFFFFFF) if bits < 0 else bits)


@device_function
def key_index(key):
    """The index that a key was made of."""
    return int32(int64(0x7FFFFFFF) - (key & int64(0xFFFFFFFF)))


@device_function
def block_largest(key, partial):
    """The largest key of the block, in every thread. partial: shared int64 [32]."""
    for step in (16, 8, 4, 2, 1):
        key = max(key, cuda.shfl_xor_sync(0xFFFFFFFF, key, step))
    if cuda.threadIdx.x % 32 == 0:
        partial[cuda.threadIdx.x // 32] = key
    cuda.syncthreads()
    for warp in range(cuda.blockDim.x // 32):
        key = max(key, partial[warp])
    return key


@kernel("f32p i32 i64p i32p i32p i32p i32p i32", threads=THREADS)
def _argmax(x, width, keys, counters, out, positions, history, slots):
    # Blocks of a row leave their largest key; the last to finish compares these.
    wait_for_previous_kernel()
    let_next_kernel_start()
    partial, last = cuda.shared.array(32, int64), cuda.shared.array(1, int32)
    token, part, parts = cuda.blockIdx.x, cuda.blockIdx.y, cuda.gridDim.y
    row, keys = advance(x, token * width), advance(keys, token * parts)
    best = SMALLEST
    for i in range(part * THREADS + cuda.threadIdx.x, width, parts * THREADS):
        best = max(best, make_key(row[i], i))
    best = block_largest(best, partial)
    if cuda.threadIdx.x == 0:
        keys[part] = best
        last[0] = fetch_add(address(counters) + 4 * token, int32(1)) == parts - 1
    cuda.syncthreads()
    if last[0]:
        best = keys[cuda.threadIdx.x] if cuda.threadIdx.x < parts else SMALLEST
        best = block_largest(best, partial)
        if cuda.threadIdx.x == 0:
            counters[token] = int32(0)
            out[token] = key_index(best)
            if address(positions) != 0:
                position = positions[token] + int32(1)
                positions[token] = position
                history[position % slots * cuda.gridDim.x + token] = key_index(best)


def argmax(stream: Stream, x: DeviceArray, out: DeviceArray) -> None:
    """See registry.argmax."""
    _choose(stream, x, out, None, None)


def greedy(
    stream: Stream, logits: DeviceArray, tokens: DeviceArray, positions: DeviceArray, history: DeviceArray
) -> None:
    """See registry.greedy."""
    if history.shape[1:] != tokens.shape or positions.shape != tokens.shape:
        raise ValueError(f"greedy: tokens {tokens.shape}, positions {positions.shape}, history {history.shape}")
    _choose(stream, logits, tokens, positions, history)


def _choose(
    stream: Stream, x: DeviceArray, out: DeviceArray, positions: DeviceArray | None, history: DeviceArray | None
) -> None:
    tokens, width = x.shape
    if out.shape != (tokens,) or width == 0:
        raise ValueError(f"argmax: x {x.shape}, out {out.shape}")
    parts = min(64, -(-width // (4 * THREADS)))  # of a row, each for a block
    keys = stream.scratch("argmax", (tokens, parts), np.int64)
    arrays = (x, width, keys, stream.counters(tokens), out, positions, history, 0 if history is None else len(history))
    stream.launch(_argmax, (tokens, parts), *arrays)


@kernel("f32p i32 i32 i64p i32p", threads=1024)
def _largest_keys(x, width, k, keys, found):
    # Radix selection, a digit of 8 bits at a time: which digit does the k-th largest key have, given those before?
    wait_for_previous_kernel()
    counts, state = cuda.shared.array(256, int32), cuda.shared.array(2, int32)
    token, thread = cuda.blockIdx.x, cuda.threadIdx.x
    row, keys = advance(x, token * width), advance(keys, token * k)
    chosen, wanted, shift = int64(0), int32(k), 56  # digits so far; how many keys with these digits are wanted
    while shift >= 0:
        if thread < 256:
            counts[thread] = 0
        cuda.syncthreads()
        for i in range(thread, width, 1024):
            key = make_key(row[i], i) ^ SMALLEST  # orders as unsigned
            if shift == 56 or (key ^ chosen) >> (shift + 8) == 0:
                cuda.atomic.add(counts, (key >> shift) & 255, int32(1))
        cuda.syncthreads()
        if thread == 0:
            digit, left = 255, wanted
            while counts[digit] < left:
                left -= counts[digit]
                digit -= 1
            state[0], state[1] = digit, left
        cuda.syncthreads()
        chosen |= int64(state[0]) << shift
        wanted = state[1]
        all_wanted = counts[state[0]] == wanted
        cuda.syncthreads()
        if all_wanted:  # no further digit decides anything
            break
        shift -= 8
    least = chosen ^ SMALLEST
    for i in range(thread, width, 1024):
        key = make_key(row[i], i)
        if key >= least:
            keys[fetch_add(address(found) + 4 * token, int32(1))] = key


@kernel("i64p i32 f32p i32p i32p", threads=THREADS)
def _sort_keys(keys, k, values, indices, found):
    # A key's place is the number of larger ones.
    wait_for_previous_kernel()
    token, i = cuda.blockIdx.x, cuda.blockIdx.y * THREADS + cuda.threadIdx.x
    keys = advance(keys, token * k)
    if i == 0:
        found[token] = int32(0)
    if i < k:
        key, place = keys[i], 0
        for j in range(k):
            place += keys[j] > key
        values[token * k + place] = key_value(key)
        indices[token * k + place] = key_index(key)


def top_k(stream: Stream, x: DeviceArray, values: DeviceArray, indices: DeviceArray) -> None:
    """See registry.top_k."""
    (tokens, width), k = x.shape, values.shape[1]
    if values.shape != indices.shape or values.shape[0] != tokens or not 1 <= k <= width:
        raise ValueError(f"top_k: x {x.shape}, values {values.shape}, indices {indices.shape}")
    keys, found = stream.scratch("top_k", (tokens, k), np.int64), stream.counters(tokens)
    stream.launch(_largest_keys, tokens, x, width, k, keys, found)
    stream.launch(_sort_keys, (tokens, -(-k // THREADS)), keys, k, values, indices, found)
