"""Finished tiles of a product from registers to global memory.

A warpgroup holds 64 rows of W by `width` tokens; in memory a token's rows are neighbours. The tile goes through shared
memory, up to 64 tokens at a time, so that neighbours are written together.

A norm may follow what is stored. A tile has 64 columns of it, not the whole row whose mean square it wants: so what is
divided by that, and the 64 columns' sum of squares, are written for the product that comes next.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda
from numpy import float32, int32, int64

from numbainfer.gpu.arithmetic import pack_halves, still
from numbainfer.gpu.compile import device_function
from numbainfer.gpu.fragments import halves_to_shared, to_shared
from numbainfer.gpu.half_rows import BLOCK, squares_of
from numbainfer.gpu.pipeline import synchronize_threads
from numbainfer.gpu.ptx import (
    address,
    advance,
    load_f32,
    load_f32x4,
    shared_f32,
    shared_f32x4,
    shared_i32x4,
    shared_store_f32x4,
    store_f32,
    store_f32x4,
    store_i32,
    store_i32x4,
)

NARROW = 64  # tokens of a tile that is one piece of memory, and leaves registers for the norm that follows
TOKEN_BYTES = 68 * 4  # of a token in shared memory: 64 rows, and 4 so that no two lanes meet in a bank


def store_bytes(width: int) -> int:
    """Shared memory that a warpgroup needs for it."""
    return min(width, NARROW) * TOKEN_BYTES


@device_function
def _load(at, wanted):
    """Four numbers to add, if any."""
    if wanted:
        return load_f32x4(at)
    return float32(0), float32(0), float32(0), float32(0)


@device_function
def _store(to, source, r, wanted, keeps):
    """Four rows of a token, from shared memory, with r added; keeps: the sum is left there."""
    if wanted:
        v = shared_f32x4(source)
        a, b, c, d = v[0] + r[0], v[1] + r[1], v[2] + r[2], v[3] + r[3]
        store_f32x4(to, a, b, c, d)
        if keeps:
            shared_store_f32x4(source, a, b, c, d)


@device_function
def _kept(source, wanted):
    """Four rows of a token that `_store` left in shared memory."""
    if wanted:
        return shared_f32x4(source)
    return float32(0), float32(0), float32(0), float32(0)


@device_function
def _store_weighted(to, place, v, w, wanted):
    """Four rows of a token times w, to two chunks of HalfRows, neighbours. Returns the sum of squares of v."""
    first, second = pack_halves(v[0] * w[0], v[1] * w[1]), pack_halves(v[2] * w[2], v[3] * w[3])
    if wanted:
        store_i32(to + 16 * place, first)
        store_i32(to + 16 * (place ^ 1), second)
    return squares_of(v)


@device_function
def _store_unnormed(tile, warp, lane, w, norm, first_row, N, first_token, tokens):
    """Of the rows that `_store` left, times w, to HalfRows, zeros from N on; and each token's sum of their squares."""
    _, halves, half_rows, _, squares = norm
    lane, N = still(lane), still(N)
    four, first = int32(lane & 15), int32(2 * (warp & 3))
    token = int32(first + (lane >> 4))
    source = int32(tile + token * TOKEN_BYTES + 16 * four)
    # half_rows.py's columns 16j + 2c + e: j is four >> 2, and c begins at 2 * (four & 3)
    place = int32((2 * (four & 3)) ^ (token & 7))
    block, inside = int32(first_row >> 6), first_row + 4 * four < N
    to = address(halves) + (int64(block) * half_rows + first_token + token) * (2 * BLOCK) + 4 * (four >> 2)
    sums = advance(squares, int64(first_token) * ((N + 63) >> 6) + block)
    while first < tokens:  # all lanes, as they add up together
        first = still(first)
        here, second, third, fourth = token < tokens, token + 8 < tokens, token + 16 < tokens, token + 24 < tokens
        v0, v1 = _kept(source, inside and here), _kept(source + 8 * TOKEN_BYTES, inside and second)
        v2, v3 = _kept(source + 16 * TOKEN_BYTES, inside and third), _kept(source + 24 * TOKEN_BYTES, inside and fourth)
        s0, s1 = _store_weighted(to, place, v0, w, here), _store_weighted(to + 16 * BLOCK, place, v1, w, second)
        s2 = _store_weighted(to + 32 * BLOCK, place, v2, w, third)
        s3 = _store_weighted(to + 48 * BLOCK, place, v3, w, fourth)
        for step in (8, 4, 2, 1):
            s0 += cuda.shfl_xor_sync(0xFFFFFFFF, s0, step)
            s1 += cuda.shfl_xor_sync(0xFFFFFFFF, s1, step)
            s2 += cuda.shfl_xor_sync(0xFFFFFFFF, s2, step)
            s3 += cuda.shfl_xor_sync(0xFFFFFFFF, s3, step)
        if four < 4 and token + 8 * four < tokens:
            low, high = s0 if four == 0 else s1, s2 if four == 2 else s3
            sums[(token + 8 * four) * ((N + 63) >> 6)] = low if four < 2 else high
        first, token, source = int32(first + 32), int32(token + 32), int32(source + 32 * TOKEN_BYTES)
        to += 64 * BLOCK


@cache
def make_store(width: int) -> Any:
    """store(acc, tile, warp, lane, residual, out, norm, first_row, N, first_token, T): rows first_row to + 63 of
    out [T, N], with those of `residual`, if there is one, added. tile: address of the warpgroup's shared memory.
    norm: of a norm that follows, if one does, its weights [N], HalfRows before their division, their rows, 1 / their
    factor, and their squares [T, N / 64]; only for narrow tiles and N a multiple of 4."""
    piece, narrow = min(width, NARROW), width <= NARROW
    put = to_shared(piece, TOKEN_BYTES)

    @device_function
    def store_piece(acc, tile, warp, lane, residual, out, norm, first_row, N, first_token, T):
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
        keeps = narrow and address(norm[0]) != 0
        w = _load(address(norm[0]) + 4 * row, keeps and row < N)
        if N & 3 == 0:
            while row < N and token < tokens:  # four loads at once: what takes time is the memory's answer
                second, third, fourth = token + 8 < tokens, token + 16 < tokens, token + 24 < tokens
                r0, r1 = _load(add, adds), _load(add + step, adds and second)
                r2, r3 = _load(add + 2 * step, adds and third), _load(add + 3 * step, adds and fourth)
                _store(to, source, r0, True, keeps)
                _store(to + step, int32(source + 8 * TOKEN_BYTES), r1, second, keeps)
                _store(to + 2 * step, int32(source + 16 * TOKEN_BYTES), r2, third, keeps)
                _store(to + 3 * step, int32(source + 24 * TOKEN_BYTES), r3, fourth, keeps)
                token, source = int32(token + 32), int32(source + 32 * TOKEN_BYTES)
                to, add = to + 4 * step, add + 4 * step
            if keeps and first_row < N:
                w = w[0] * norm[3], w[1] * norm[3], w[2] * norm[3], w[3] * norm[3]
                _store_unnormed(tile, warp, lane, w, norm, first_row, N, first_token, tokens)
        else:  # four rows do not stand at multiples of 16 bytes
            while token < tokens:
                for i in range(min(4, N - row)):
                    value = shared_f32(source + 4 * i)
                    store_f32(to + 4 * i, value + load_f32(add + 4 * i) if adds else value)
                token, source = int32(token + 8), int32(source + 8 * TOKEN_BYTES)
                to, add = to + step, add + step
        synchronize_threads(barrier, 128)

    if narrow:
        return store_piece

    @device_function
    def store(acc, tile, warp, lane, residual, out, norm, first_row, N, first_token, T):
        store_piece(acc[:32], tile, warp, lane, residual, out, norm, first_row, N, first_token, T)
        store_piece(acc[32:64], tile, warp, lane, residual, out, norm, first_row, N, int32(first_token + 64), T)
        if width == 256:
            store_piece(acc[64:96], tile, warp, lane, residual, out, norm, first_row, N, int32(first_token + 128), T)
            store_piece(acc[96:], tile, warp, lane, residual, out, norm, first_row, N, int32(first_token + 192), T)

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
