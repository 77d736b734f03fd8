"""Weights on their way to the tensor cores: loaded as they are stored, widened to float16 in registers.

A thread takes 16 columns of a row of each block of 64: columns 16t to 16t + 15 for t = lane % 4, of rows g and g + 8 of
a warp's 16, g = lane // 4. They are the left matrix of four products of 16 columns, in the order of columns that
half_rows.py describes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numpy import int32

from numbainfer.gpu.arithmetic import as_float, double_half, multiply_halves, pack_halves, permute, subtract_halves
from numbainfer.gpu.compile import device_function
from numbainfer.gpu.ptx import load_constant_u16, load_weights

BLOCK = 64


@device_function
def _widen_word(word, scale):
    """Four int8 times a float16 scale (twice in a word): two words of two float16 each, rounded once.

    A byte b + 128 under the exponent 0x64 is the float16 1024 + b + 128.
    """
    unsigned = word ^ int32(-2139062144)  # 0x80808080
    low = subtract_halves(permute(unsigned, int32(0x64646464), int32(0x4140)), int32(0x64806480))
    high = subtract_halves(permute(unsigned, int32(0x64646464), int32(0x4342)), int32(0x64806480))
    return multiply_halves(low, scale), multiply_halves(high, scale)


@device_function
def _widen_int8(top, bottom):
    """Per product: rows g, g + 8 of its first 8 columns, then of its last 8. top, bottom: (four words, a scale)."""
    a, b = top[0], bottom[0]
    top_scale, bottom_scale = double_half(top[1]), double_half(bottom[1])
    p0, p2 = _widen_word(a[0], top_scale)
    p1, p3 = _widen_word(b[0], bottom_scale)
    q0, q2 = _widen_word(a[1], top_scale)
    q1, q3 = _widen_word(b[1], bottom_scale)
    r0, r2 = _widen_word(a[2], top_scale)
    r1, r3 = _widen_word(b[2], bottom_scale)
    s0, s2 = _widen_word(a[3], top_scale)
    s1, s3 = _widen_word(b[3], bottom_scale)
    return p0, p1, p2, p3, q0, q1, q2, q3, r0, r1, r2, r3, s0, s1, s2, s3


@device_function
def _interleave(top, bottom):
    """The same for words of two float16: (first four words, last four words)."""
    (a, c), (b, d) = top, bottom
    return a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3], c[0], d[0], c[1], d[1], c[2], d[2], c[3], d[3]


@device_function
def _times_one(words):
    """The same numbers in other registers: wgmma reads them for a while, so they must not be those of loads."""
    one = int32(0x3C003C00)
    first, second = multiply_halves(words[0], one), multiply_halves(words[1], one)
    return first, second, multiply_halves(words[2], one), multiply_halves(words[3], one)


@device_function
def _widen_half(top, bottom):
    """The same for rows of float16."""
    return _interleave((_times_one(top[0]), _times_one(top[1])), (_times_one(bottom[0]), _times_one(bottom[1])))


@device_function
def _from_bfloat(word):
    """Two bfloat16 to two float16: exact from 2^-14 to 65504, where weights are; smaller ones lose digits."""
    return pack_halves(as_float(word << int32(16)), as_float(word & int32(-65536)))


@device_function
def _words_from_bfloat(words):
    return _from_bfloat(words[0]), _from_bfloat(words[1]), _from_bfloat(words[2]), _from_bfloat(words[3])


@device_function
def _widen_bfloat(top, bottom):
    """The same for rows of bfloat16."""
    a, c = _words_from_bfloat(top[0]), _words_from_bfloat(top[1])
    b, d = _words_from_bfloat(bottom[0]), _words_from_bfloat(bottom[1])
    return _interleave((a, c), (b, d))


@cache
def weight_loader(kind: str) -> tuple[Any, Any, int]:
    """Of a kind of weights ("int8", "float16", "uint16" for bfloat16), for kernels:

    load(row, scales, block, t, last_column, shift): a thread's columns of a block, from the addresses of a row and of
    its scales; columns beyond the row's end are any others (the activations are zeros there).
    widen(row g, row g + 8): the left matrix. And the bytes of a weight.
    """
    if kind == "int8":

        @device_function
        def load(row, scales, block, t, last_column, shift):
            column = min(int32(block * BLOCK + 16 * t), last_column)
            return load_weights(row + column), load_constant_u16(scales + 2 * (column >> shift))

        return load, _widen_int8, 1

    @device_function
    def load_halves(row, scales, block, t, last_column, shift):
        column = min(int32(block * BLOCK + 16 * t), last_column)
        return load_weights(row + 2 * column), load_weights(row + 2 * column + 16)

    return load_halves, _widen_half if kind == "float16" else _widen_bfloat, 2
