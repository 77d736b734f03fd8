"""Arithmetic that `@cuda.jit` Python has no word for: single PTX instructions, made as ptx.py makes them."""

from __future__ import annotations

from numpy import float32

from numbainfer.gpu.ptx import f32, f32x2, f32x4, i32, instruction, u16


@instruction("dp4a.s32.s32 $0, $1, $2, $3;", i32, i32, i32, i32, effects=False)
def dp4a(a, b, c):
    """c + the dot product of the four signed bytes of a and of b."""


@instruction("cvt.f32.f16 $0, $1;", f32, u16, effects=False)
def half_to_float(bits):
    """float16 (its bits) to float32: exact."""


@instruction(
    "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }",
    f32x2,
    i32,
    effects=False,
)
def halves_to_floats(bits):
    """Two float16 (low, high) to float32: exact."""


@instruction("cvt.rn.f16.f32 $0, $1;", u16, f32, effects=False)
def float_to_half(value):
    """float32 to float16's bits, to nearest even; infinite from 65520 on."""


@instruction("mov.b32 $0, {0, $1};", f32, u16, effects=False)
def bfloat_to_float(bits):
    """bfloat16 (its bits) to float32: exact."""


@instruction("cvt.rni.s32.f32 $0, $1;", i32, f32, effects=False)
def round_to_int(value):
    """To the nearest integer, ties to even; saturates."""


@instruction("mov.b32 $0, $1;", f32, i32, effects=False)
def as_float(bits):
    """The float32 that has these bits."""


@instruction("mov.b32 $0, $1;", i32, f32, effects=False)
def as_int(value):
    """The bits of a float32."""


LOG2_E = float32(1.4426950408889634)
"""e^x = 2^(x * LOG2_E)"""


@instruction("max.f32 $0, $1, $2;", f32, f32, f32, effects=False)
def larger(a, b):
    """The larger of two numbers that are none of them NaN, in one instruction."""


@instruction("redux.sync.max.u32 $0, $1, 0xffffffff;", i32, i32)
def warp_max_u32(value):
    """The largest of all lanes' numbers, without sign."""


@instruction("redux.sync.max.s32 $0, $1, 0xffffffff;", i32, i32)
def warp_max_i32(value):
    """The largest of all lanes' numbers."""


@instruction("ex2.approx.ftz.f32 $0, $1;", f32, f32, effects=False)
def exp2(value):
    """2^value, to 2 units in the last place."""


@instruction("rcp.approx.ftz.f32 $0, $1;", f32, f32, effects=False)
def reciprocal(value):
    """1 / value, to 1 unit in the last place."""


@instruction("rsqrt.approx.ftz.f32 $0, $1;", f32, f32, effects=False)
def inverse_root(value):
    """1 / sqrt(value), to 2 units in the last place."""


@instruction("shr.s32 $0, $1, $2;", i32, i32, i32, effects=False)
def shift_right(a, n):
    """a >> n in 32 bits: Numba's own is of 64, and the compiler can narrow it only where n is a constant."""


@instruction("div.u32 $0, $1, $2;", i32, i32, i32, effects=False)
def divide(a, b):
    """a // b of numbers that are not negative, in 32 bits: a tenth of the instructions that 64 take."""


@instruction("prmt.b32 $0, $1, $2, $3;", i32, i32, i32, i32, effects=False)
def permute(a, b, selector):
    """Four bytes chosen out of the eight of a (0 to 3) and b (4 to 7), one per hexadecimal digit of the selector."""


# --- for the compiler --------------------------------------------------------------------------------------------


@instruction(r".pragma \22nounroll\22; mov.b32 $0, $1;", i32, i32)
def still(i):
    """i, of which the compiler then knows nothing. `i = still(i)` first in a loop's body keeps the loop as it is: its
    copies would fill the instruction cache."""


# --- pairs of float16 --------------------------------------------------------------------------------------------


@instruction("mov.b32 $0, {$1, $1};", i32, u16, effects=False)
def double_half(bits):
    """A float16 in both halves of a word."""


@instruction("sub.rn.f16x2 $0, $1, $2;", i32, i32, i32, effects=False)
def subtract_halves(a, b):
    """a - b, for two float16 in a word."""


@instruction("mul.rn.f16x2 $0, $1, $2;", i32, i32, i32, effects=False)
def multiply_halves(a, b):
    """a * b, for two float16 in a word."""


@instruction(
    "{ .reg .f32 a, b; min.f32 a, $1, 0f477FE000; max.f32 a, a, 0fC77FE000; min.f32 b, $2, 0f477FE000; "
    "max.f32 b, b, 0fC77FE000; cvt.rn.f16x2.f32 $0, b, a; }",
    *(i32, f32, f32),
    effects=False,
)
def pack_halves(first, second):
    """Two numbers as float16 in a word, the first in its lower half: to nearest even, saturated at 65504."""


@instruction("cvt.rn.f16x2.f32 $0, $2, $1;", i32, f32, f32, effects=False)
def round_halves(first, second):
    """The same, not saturated."""


# --- tensor cores ------------------------------------------------------------------------------------------------


@instruction(
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
    "{$10, $11, $12, $13};",
    *(f32x4, i32, i32, i32, i32, i32, i32, f32, f32, f32, f32),
    effects=False,
)
def multiply_16x8x16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """c + a @ b of float16 matrices 16 x 16 and 16 x 8, in the registers of a warp: PTX ISA, "matrix fragments for
    mma.m16n8k16"."""
