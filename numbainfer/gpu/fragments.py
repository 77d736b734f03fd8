"""Tiles of matrices in the registers of a warp, and the tensor-core instructions that multiply them.

A *fragment* of a 16 x n matrix of float32 is a tuple of n / 2 numbers per thread, 32 threads in all: with
g = lane // 4 and t = lane % 4, numbers 4j to 4j + 3 are the elements [g, 8j + 2t], [g, 8j + 2t + 1], [g + 8, 8j + 2t]
and [g + 8, 8j + 2t + 1]. That is how `mma.sync` and `wgmma` lay out what they add to (PTX ISA, "matrix fragments for
mma.m16n8k16" and "wgmma .m64nNk16"; there a warpgroup of four warps holds 64 rows, 16 to a warp).

The factories here and in products.py emit their loops over a fragment when a kernel is compiled: Numba has no loops
over tuples. They are made for one size; kernels get them as constants.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.cuda.extending import intrinsic

from numbainfer.gpu.arithmetic import LOG2_E

i32, i64, f32 = types.int32, types.int64, types.float32
INT, LONG, FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()


def over_fragment(result: Any, *arguments: Any) -> Callable:
    """Decorator: body(builder, *values) returns the new value or values; a tuple argument arrives as a list."""

    def decorate(body: Callable) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            unpacked = [
                [builder.extract_value(value, i) for i in range(kind.count)]
                if isinstance(kind, types.UniTuple)
                else value
                for value, kind in zip(values, arguments, strict=True)
            ]
            out = body(builder, *unpacked)
            if out is None:
                return context.get_dummy_value()
            return context.make_tuple(builder, result, out) if isinstance(result, types.UniTuple) else out

        names = ", ".join(body.__code__.co_varnames[1 : body.__code__.co_argcount])
        namespace = {"sig": result(*arguments), "codegen": codegen}
        exec(f"def {body.__name__}(typingctx{', ' if names else ''}{names}):\n    return sig, codegen", namespace)
        function: Any = namespace[body.__name__]
        function.__doc__ = body.__doc__
        return intrinsic(function)

    return decorate


def asm(builder: Any, returned: Any, text: str, constraints: str, values: list, *, effects: bool = True) -> Any:
    function = ir.FunctionType(returned, [value.type for value in values])
    attributes = ("convergent",) if effects else ()
    return builder.call(ir.InlineAsm(function, text, constraints, side_effect=effects), values, attrs=attributes)


def constant(value: int) -> ir.Constant:
    return ir.Constant(INT, value)


def fragment(width: int) -> Any:
    return types.UniTuple(f32, width // 2)


@cache
def zeros(width: int) -> Any:
    """zeros() -> a fragment of zeros."""

    @over_fragment(fragment(width))
    def fragment_zeros(builder):
        return [ir.Constant(FLOAT, 0.0)] * (width // 2)

    return fragment_zeros


# --- element by element ---------------------------------------------------------------------------------------------


def _per_row(builder: Any, acc: list, operation: Callable, g: Any, g8: Any) -> list:
    """operation(element, what belongs to its row) for the rows g and g + 8 of a thread."""
    return [operation(value, g if i % 4 < 2 else g8) for i, value in enumerate(acc)]


@cache
def scale_and_shift(width: int) -> Any:
    """f(acc, factor, g, g8) -> acc * factor + (g in the thread's first row, g8 in its second)."""

    @over_fragment(fragment(width), fragment(width), f32, f32, f32)
    def fragment_scale_and_shift(builder, acc, factor, g, g8):
        scaled = [builder.fmul(value, factor) for value in acc]
        return _per_row(builder, scaled, builder.fadd, g, g8)

    return fragment_scale_and_shift


@cache
def scale_rows(width: int) -> Any:
    """f(acc, g, g8) -> acc * (g in the thread's first row, g8 in its second)."""

    @over_fragment(fragment(width), fragment(width), f32, f32)
    def fragment_scale_rows(builder, acc, g, g8):
        return _per_row(builder, acc, builder.fmul, g, g8)

    return fragment_scale_rows


@cache
def scale_columns(width: int) -> Any:
    """f(acc, address) -> acc * a float32 for each column, in shared memory: that of the thread's [g, 2t] at address."""

    @over_fragment(fragment(width), fragment(width), i32)
    def fragment_scale_columns(builder, acc, address):
        struct, out = ir.LiteralStructType([FLOAT] * 2), []
        for j in range(width // 8):
            text = f"ld.shared.v2.f32 {{$0, $1}}, [$2+{32 * j}];"
            two = asm(builder, struct, text, "=f,=f,r,~{memory}", [address])
            out += [builder.fmul(acc[4 * j + i], builder.extract_value(two, i % 2)) for i in range(4)]
        return out

    return fragment_scale_columns


def _exp2(builder: Any, value: Any) -> Any:
    return asm(builder, FLOAT, "ex2.approx.ftz.f32 $0, $1;", "=f,f", [value], effects=False)


@cache
def gated(width: int) -> Any:
    """f(acc, factor) -> silu(row g) * row g + 8 * factor, with silu(z) = z / (1 + e^-z): width / 4 numbers."""

    @over_fragment(types.UniTuple(f32, width // 4), fragment(width), f32)
    def fragment_gated(builder, acc, factor):
        out = []
        for i in (i for i in range(len(acc)) if i % 4 < 2):
            gate, up = acc[i], acc[i + 2]
            power = _exp2(builder, builder.fmul(gate, ir.Constant(FLOAT, -float(LOG2_E))))
            one_more = builder.fadd(power, ir.Constant(FLOAT, 1.0))
            inverse = asm(builder, FLOAT, "rcp.approx.ftz.f32 $0, $1;", "=f,f", [one_more], effects=False)
            out.append(builder.fmul(builder.fmul(builder.fmul(gate, inverse), up), factor))
        return out

    return fragment_gated


# --- softmax --------------------------------------------------------------------------------------------------------


MASKED = -3e38
"""A score that weighs nothing whatever the others are; finite, as the compiler is told that all numbers are."""


@cache
def mask(width: int) -> Any:
    """f(acc, t2, low, high, low8, high8): MASKED in all columns but low to high of row g, low8 to high8 of g + 8.
    t2 = 2 * (lane % 4)."""

    @over_fragment(fragment(width), fragment(width), i32, i32, i32, i32, i32)
    def fragment_mask(builder, acc, t2, low, high, low8, high8):
        lowest, highest = ([builder.sub(bound, t2) for bound in pair] for pair in ((low, low8), (high, high8)))
        out = []
        for i, value in enumerate(acc):
            second = i % 4 // 2
            column = constant(8 * (i // 4) + i % 2)
            inside = builder.and_(
                builder.icmp_signed(">=", column, lowest[second]), builder.icmp_signed("<=", column, highest[second])
            )
            out.append(builder.select(inside, value, ir.Constant(FLOAT, MASKED)))
        return out

    return fragment_mask


def _reduce(builder: Any, values: list, operation: Callable) -> Any:
    while len(values) > 1:  # as a tree, so that few wait for few
        paired = [operation(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
        values = paired + ([values[-1]] if len(values) % 2 else [])
    return values[0]


def _rows(acc: list) -> tuple[list, list]:
    """The elements of row g and of row g + 8."""
    return [v for i, v in enumerate(acc) if i % 4 < 2], [v for i, v in enumerate(acc) if i % 4 >= 2]


@cache
def largest(width: int) -> Any:
    """f(acc) -> (the largest of a thread's elements in row g, in row g + 8)"""

    @over_fragment(types.UniTuple(f32, 2), fragment(width))
    def fragment_largest(builder, acc):
        def maximum(a, b):
            return asm(builder, FLOAT, "max.f32 $0, $1, $2;", "=f,f,f", [a, b], effects=False)

        return [_reduce(builder, row, maximum) for row in _rows(acc)]

    return fragment_largest


@cache
def total(width: int) -> Any:
    """f(acc) -> (the sum of a thread's elements in row g, in row g + 8)"""

    @over_fragment(types.UniTuple(f32, 2), fragment(width))
    def fragment_total(builder, acc):
        return [_reduce(builder, row, builder.fadd) for row in _rows(acc)]

    return fragment_total


@cache
def power(width: int) -> Any:
    """f(acc, g, g8) -> 2^(acc - g in row g, acc - g8 in row g + 8)"""

    @over_fragment(fragment(width), fragment(width), f32, f32)
    def fragment_power(builder, acc, g, g8):
        return [_exp2(builder, value) for value in _per_row(builder, acc, builder.fsub, g, g8)]

    return fragment_power


@over_fragment(types.UniTuple(i32, 16), fragment(64))
def as_left_matrix(builder, acc):
    """A fragment of 16 x 64 as the `a` of multiply, in float16."""
    words = []
    for step in range(4):
        tiles = acc[8 * step : 8 * step + 8]  # of columns 16 * step to + 7, and the next 8
        words += [_halves(builder, tiles[i], tiles[i + 1]) for i in (0, 2, 4, 6)]
    return words


def _halves(builder: Any, first: Any, second: Any) -> Any:
    """Two float16 in a word, saturated."""
    text = (
        "{ .reg .f32 a, b; min.f32 a, $1, 0f477FE000; max.f32 a, a, 0fC77FE000; min.f32 b, $2, 0f477FE000; "
        "max.f32 b, b, 0fC77FE000; cvt.rn.f16x2.f32 $0, b, a; }"
    )
    return asm(builder, INT, text, "=r,f,f", [first, second], effects=False)


# --- to and from memory ---------------------------------------------------------------------------------------------


@cache
def spill(width: int) -> Any:
    """f(acc, address, step): number 4j + i of each thread to global memory, at address + j * step + 4i bytes."""

    @over_fragment(types.void, fragment(width), i64, i64)
    def fragment_spill(builder, acc, address, step):
        for j in range(width // 8):
            values = [address, *acc[4 * j : 4 * j + 4]]
            asm(builder, ir.VoidType(), "st.global.v4.f32 [$0], {$1, $2, $3, $4};", "l,f,f,f,f,~{memory}", values)
            address = builder.add(address, step)

    return fragment_spill


@cache
def add_spilled(width: int) -> Any:
    """f(acc, address, step) -> acc + what `spill` wrote there, read past L1."""

    @over_fragment(fragment(width), fragment(width), i64, i64)
    def fragment_add_spilled(builder, acc, address, step):
        struct, out = ir.LiteralStructType([FLOAT] * 4), []
        for j in range(width // 8):
            text = "ld.global.cg.v4.f32 {$0, $1, $2, $3}, [$4];"
            four = asm(builder, struct, text, "=f,=f,=f,=f,l,~{memory}", [address])
            out += [builder.fadd(acc[4 * j + i], builder.extract_value(four, i)) for i in range(4)]
            address = builder.add(address, step)
        return out

    return fragment_add_spilled


@cache
def to_shared(width: int, column_bytes: int) -> Any:
    """f(acc, address): the transpose, to shared memory.

    Element [r, c] goes to address + c * column_bytes + 4r, `address` being that of the thread's [g, 2t]. With
    column_bytes / 4 = 4 modulo 32 no two lanes meet in a bank.
    """

    @over_fragment(types.void, fragment(width), i32)
    def fragment_to_shared(builder, acc, address):
        for i, value in enumerate(acc):
            offset = (8 * (i // 4) + i % 2) * column_bytes + (32 if i % 4 >= 2 else 0)
            text = f"st.shared.f32 [$0+{offset}], $1;"
            asm(builder, ir.VoidType(), text, "r,f,~{memory}", [address, value])

    return fragment_to_shared


def _to_half(builder: Any, value: Any) -> Any:
    """The bits of the nearest float16, 16 of them; saturated."""
    text = "{ .reg .f32 v; min.f32 v, $1, 0f477FE000; max.f32 v, v, 0fC77FE000; cvt.rn.f16.f32 $0, v; }"
    return asm(builder, ir.IntType(16), text, "=h,f", [value], effects=False)


@cache
def halves_to_shared(width: int) -> Any:
    """f(row, address, chunk, t): `gated` rows as float16 to shared memory, lines of 128 bytes, swizzled.

    Column c goes to 16-byte chunk `chunk` of line c, at the place in the chunk that `address` points to in line 0.
    """

    @over_fragment(types.void, types.UniTuple(f32, width // 4), i32, i32, i32)
    def fragment_halves_to_shared(builder, row, address, chunk, t):
        for odd in (0, 1):
            column = builder.or_(builder.shl(t, constant(1)), constant(odd))  # modulo 8
            line = builder.add(address, builder.shl(column, constant(7)))
            at = builder.add(line, builder.shl(builder.xor(chunk, column), constant(4)))
            for j in range(width // 8):
                bits = _to_half(builder, row[2 * j + odd])
                asm(builder, ir.VoidType(), f"st.shared.b16 [$0+{1024 * j}], $1;", "r,h,~{memory}", [at, bits])

    return fragment_halves_to_shared


@cache
def store_row(width: int, second: int) -> Any:
    """f(acc, address): row g (second = 1: g + 8) to global memory, the thread's [g, 2t] at address."""

    @over_fragment(types.void, fragment(width), i64)
    def fragment_store_row(builder, acc, address):
        for j in range(width // 8):
            pair = acc[4 * j + 2 * second : 4 * j + 2 * second + 2]
            text = f"st.global.v2.f32 [$0+{32 * j}], {{$1, $2}};"
            asm(builder, ir.VoidType(), text, "l,f,f,~{memory}", [address, *pair])

    return fragment_store_row


@cache
def store_row_halves(width: int, second: int) -> Any:
    """f(acc, data, rows, token, column): row g (second = 1: g + 8) as token `token` of HalfRows (half_rows.py), the
    thread's [g, 2t] at that column. data: their address."""

    @over_fragment(types.void, fragment(width), i64, i32, i32, i32)
    def fragment_store_row_halves(builder, acc, data, rows, token, column):
        for j in range(width // 8):
            at = builder.add(column, constant(8 * j))
            block = builder.lshr(at, constant(6))
            chunk = builder.and_(builder.lshr(at, constant(1)), constant(7))
            place = builder.xor(chunk, builder.and_(token, constant(7)))
            pair = builder.and_(builder.lshr(at, constant(4)), constant(3))
            within = builder.add(builder.shl(place, constant(4)), builder.shl(pair, constant(2)))
            line = builder.add(builder.mul(block, rows), token)
            offset = builder.add(
                builder.shl(builder.zext(line, LONG), ir.Constant(LONG, 7)), builder.zext(within, LONG)
            )
            word = _halves(builder, acc[4 * j + 2 * second], acc[4 * j + 2 * second + 1])
            asm(builder, ir.VoidType(), "st.global.b32 [$0], $1;", "l,r,~{memory}", [builder.add(data, offset), word])

    return fragment_store_row_halves
