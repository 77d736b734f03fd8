"""Finished tiles of a product from registers to global memory.

A warpgroup holds 64 rows of W by `width` tokens; in memory a token's rows are neighbours. The tile goes through shared
memory, up to 64 tokens at a time, so that neighbours are written together.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numpy import float32, int32, int64

from numbainfer.gpu.compile import device_function
from numbainfer.gpu.fragments import halves_to_shared, to_shared
from numbainfer.gpu.half_rows import BLOCK
from numbainfer.gpu.pipeline import synchronize_threads
from numbainfer.gpu.ptx import (
    address,
    load_f32,
    load_f32x4,
    shared_f32,
    shared_f32x4,
    shared_i32x4,
    store_f32,
    store_f32x4,
    store_i32x4,
)

TOKEN_BYTES = 68 * 4  # of a token in shared memory: 64 rows, and 4 so that no two lanes meet in a bank


def store_bytes(width: int) -> int:
    """Shared memory that a warpgroup needs for it."""
    return min(width, 64) * TOKEN_BYTES


@device_function
def _load(at, wanted):
    """Four numbers to add, if any."""
    if wanted:
        return load_f32x4(at)
    return float32(0), float32(0), float32(0), float32(0)


@device_function
def _store(to, source, r, wanted):
    """Four rows of a token, from shared memory, with r added."""
    if wanted:
        v = shared_f32x4(source)
        store_f32x4(to, v[0] + r[0], v[1] + r[1], v[2] + r[2], v[3] + r[3])


@cache
def make_store(width: int) -> Any:
    """store(acc, tile, warp, lane, residual, out, first_row, N, first_token, T): rows first_row to + 63 of out [T, N],
    with those of `residual`, if there is one, added. tile: address of the warpgroup's shared memory."""
    piece = min(width, 64)
    put = to_shared(piece, TOKEN_BYTES)

    @device_function
    def store_piece(acc, tile, warp, lane, residual, out, first_row, N, first_token, T):
        barrier = int32(1 + (warp >> 2))
        put(acc, int32(tile + (lane & 3) * 2 * TOKEN_BYTES + (16 * (warp & 3) + (lane >> 2)) * 4))
        synchronize_threads(barrier, 128)
        # a thread takes four rows of every eighth token
        row, token = int32(first_row + 4 * (lane & 15)), int32(2 * (warp & 3) + (lane >> 4))
        tokens = int32(min(piece, T - first_token))
        source = int32(tile + token * TOKEN_BYTES + 16 * (lane & 15))
        here = (int64(first_token + token) * N + row) * 4
        to, add, adds = address(out) + here, address(residual) + here, address(residual) != 0
        step = int64(N) * 32
        if N & 3 == 0:
            while row < N and token < tokens:  # four loads at once: what takes time is the memory's answer
                second, third, fourth = token + 8 < tokens, token + 16 < tokens, token + 24 < tokens
                r0, r1 = _load(add, adds), _load(add + step, adds and second)
                r2, r3 = _load(add + 2 * step, adds and third), _load(add + 3 * step, adds and fourth)
                _store(to, source, r0, True)
                _store(to + step, int32(source + 8 * TOKEN_BYTES), r1, second)
                _store(to + 2 * step, int32(source + 16 * TOKEN_BYTES), r2, third)
                _store(to + 3 * step, int32(source + 24 * TOKEN_BYTES), r3, fourth)
                token, source = int32(token + 32), int32(source + 32 * TOKEN_BYTES)
                to, add = to + 4 * step, add + 4 * step
        else:  # four rows do not stand at multiples of 16 bytes
            while token < tokens:
                for i in range(min(4, N - row)):
                    value = shared_f32(source + 4 * i)
                    store_f32(to + 4 * i, value + load_f32(add + 4 * i) if adds else value)
                token, source = int32(token + 8), int32(source + 8 * TOKEN_BYTES)
                to, add = to + step, add + step
        synchronize_threads(barrier, 128)

    if width <= 64:
        return store_piece

    @device_function
    def store(acc, tile, warp, lane, residual, out, first_row, N, first_token, T):
        store_piece(acc[:32], tile, warp, lane, residual, out, first_row, N, first_token, T)
        store_piece(acc[32:64], tile, warp, lane, residual, out, first_row, N, int32(first_token + 64), T)
        if width == 256:
            store_piece(acc[64:96], tile, warp, lane, residual, out, first_row, N, int32(first_token + 128), T)
            store_piece(acc[96:], tile, warp, lane, residual, out, first_row, N, int32(first_token + 192), T)

    return store


@cache
def make_store_halves(width: int) -> Any:
    """store(row, tile, warp, lane, out, out_rows, block, first_token): gated rows, 32 of each warpgroup, to 64 columns,
    `block`, of HalfRows of `out_rows` rows; a negative block is none. tile: shared memory of both warpgroups."""
    put = halves_to_shared(width)

    @device_function
    def store(row, tile, warp, lane, out, out_rows, block, first_token):
        place, g, group = int32(warp & 3), int32(lane >> 2), int32(warp >> 2)
        # column 32 * group + 8 * place + g, as half_rows.py has it: 16j + 2c + e
        at = int32(tile + 8 * group + 4 * (place >> 1) + 2 * (g & 1))
        put(row, at, int32(4 * (place & 1) + (g >> 1)), int32(lane & 3))
        synchronize_threads(3, 256)
        if block >= 0:
            to = address(out) + (int64(block) * out_rows + first_token) * (2 * BLOCK)
            offset = int32(16 * (32 * warp + lane))
            while offset < width * 2 * BLOCK:
                words = shared_i32x4(tile + offset)
                store_i32x4(to + offset, words[0], words[1], words[2], words[3])
                offset = int32(offset + 16 * 256)
        synchronize_threads(3, 256)

    return store
