"""Tiles of matrices in the registers of a warp, and the tensor-core instructions that multiply them.

A *fragment* of a 16 x n matrix of float32 is a tuple of n / 2 numbers per thread, 32 threads in all: with
g = lane // 4 and t = lane % 4, numbers 4j to 4j + 3 are the elements [g, 8j + 2t], [g, 8j + 2t + 1], [g + 8, 8j + 2t]
and [g + 8, 8j + 2t + 1]. That is how `mma.sync` and `wgmma` lay out what they add to (PTX ISA, "matrix fragments for
mma.m16n8k16" and "wgmma .m64nNk16"; there a warpgroup of four warps holds 64 rows, 16 to a warp).

The factories here emit their loops over a fragment when a kernel is compiled: Numba has no loops over tuples. They are
made for one size; kernels get them as constants.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.cuda.extending import intrinsic

from numbainfer.gpu import ptx

i32, i64, f32 = types.int32, types.int64, types.float32
_INT, _LONG, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()


def _over_fragment(result: Any, *arguments: Any) -> Callable:
    """Decorator: body(builder, *values) returns the new value or values; a tuple argument arrives as a list."""

    def decorate(body: Callable) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            unpacked = [
                [builder.extract_value(value, i) for i in range(kind.count)] if isinstance(kind, types.UniTuple) else value
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


def _asm(builder: Any, returned: Any, text: str, constraints: str, values: list, *, effects: bool = True) -> Any:
    function = ir.FunctionType(returned, [value.type for value in values])
    attributes = ("convergent",) if effects else ()
    return builder.call(ir.InlineAsm(function, text, constraints, side_effect=effects), values, attrs=attributes)


def _constant(value: int) -> ir.Constant:
    return ir.Constant(_INT, value)


def _fragment(width: int) -> Any:
    return types.UniTuple(f32, width // 2)


@lru_cache(maxsize=None)
def zeros(width: int) -> Any:
    """zeros() -> a fragment of zeros."""

    @_over_fragment(_fragment(width))
    def fragment_zeros(builder):
        return [ir.Constant(_FLOAT, 0.0)] * (width // 2)

    return fragment_zeros


# --- products ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=None)
def multiply(width: int, steps: int = 4, *, transposed: bool = False) -> Any:
    """multiply(acc, a, address, lane) -> acc + a @ B

    acc: fragment of 16 x width. a: 16 words of float16 pairs: for each 16 columns the four words that mma.m16n8k16
    takes, of which the first `steps` times 16 columns count. B: 64 x 64 float16 at `address` in shared memory, in
    lines of 128 bytes, 16-byte chunk c of line i at place c XOR (i mod 8). Line i is column i of B, so that there are
    `width` lines, or row i (transposed).

    On sm_90 the product of a whole warpgroup, which goes on after this returns: `acc` and `a` must be left alone until
    `wait_for_products` or `finished`. Elsewhere the product of a warp, done at once.
    """

    @_over_fragment(_fragment(width), _fragment(width), types.UniTuple(i32, 16), i32, i32)
    def fragment_multiply(builder, acc, a, address, lane):
        if ptx.target == (9, 0):
            return _emit_wgmma(builder, width, steps, transposed, acc, a, address)
        lines = _transposed_lines if transposed else _lines
        return _emit_mma(builder, width, steps, acc, a, lines(builder, address, lane))

    return fragment_multiply


def _emit_wgmma(builder: Any, width: int, steps: int, transposed: bool, acc: list, a: list, address: Any) -> list:
    count = width // 2
    shape = f"wgmma.mma_async.sync.aligned.m64n{width}k16.f32.f16.f16"
    numbers = ", ".join(f"${i}" for i in range(count))
    first = 2 * count  # operands: results, the same tied to the arguments, a, descriptor
    lines = ["{ .reg .pred p; .reg .b64 d; setp.ne.b32 p, 1, 0; wgmma.fence.sync.aligned;"]
    for step in range(steps):
        words = ", ".join(f"${first + 4 * step + i}" for i in range(4))
        further = (128 if transposed else 2) * step  # 16 lines, or 32 bytes of each, in units of 16 bytes
        lines.append(f"add.s64 d, ${first + 16}, {further};")
        lines.append(f"{shape} {{{numbers}}}, {{{words}}}, d, p, 1, 1, {int(transposed)};")
    lines.append("wgmma.commit_group.sync.aligned; }")
    constraints = ",".join(["=f"] * count + [str(i) for i in range(count)] + ["r"] * 16 + ["l", "~{memory}"])
    # PTX ISA, "matrix descriptor": the address in units of 16 bytes, 1024 bytes from 8 lines to the next, 128B swizzle
    start = builder.and_(builder.lshr(address, _constant(4)), _constant(0x3FFF))
    start = builder.zext(builder.or_(start, _constant(1 << 16)), _LONG)
    descriptor = builder.or_(start, ir.Constant(_LONG, 64 << 32 | 1 << 62))
    struct = ir.LiteralStructType([_FLOAT] * count)
    out = _asm(builder, struct, " ".join(lines), constraints, [*acc, *a, descriptor])
    return [builder.extract_value(out, i) for i in range(count)]


def _emit_mma(builder: Any, width: int, steps: int, acc: list, a: list, load: Callable) -> list:
    out = list(acc)
    for step in range(steps):
        for j in range(0, width // 8, 2):
            b = load(step, j)  # of two tiles of 8 columns
            for n in range(min(2, width // 8 - j)):
                tile = slice(4 * (j + n), 4 * (j + n) + 4)
                out[tile] = _mma(builder, out[tile], a[4 * step : 4 * step + 4], b[2 * n : 2 * n + 2])
    return out


def _lines(builder: Any, address: Any, lane: Any) -> Callable:
    """load(step, j) for _emit_mma. A lane gives the place of a line of one of four 8 x 8 matrices: 0 and 1 are two
    chunks of lines 0 to 7, 2 and 3 of lines 8 to 15."""
    line = builder.and_(lane, _constant(7))
    line16 = builder.add(line, builder.and_(builder.lshr(lane, _constant(1)), _constant(8)))
    second = builder.and_(builder.lshr(lane, _constant(3)), _constant(1))
    base = builder.add(address, builder.shl(line16, _constant(7)))

    def load(step: int, j: int) -> list:
        chunk = builder.xor(builder.or_(second, _constant(2 * step)), line)
        place = builder.add(base, builder.shl(chunk, _constant(4)))
        return _ldmatrix(builder, builder.add(place, _constant(j * 1024)))

    return load


def _transposed_lines(builder: Any, address: Any, lane: Any) -> Callable:
    """The same for B in rows: 0 and 1 are one chunk of lines 0 to 7 and 8 to 15, 2 and 3 the next chunk."""
    line = builder.and_(lane, _constant(7))
    base = builder.add(address, builder.shl(builder.and_(lane, _constant(15)), _constant(7)))
    second = builder.lshr(lane, _constant(4))

    def load(step: int, j: int) -> list:
        chunk = builder.xor(builder.add(second, _constant(j)), line)
        place = builder.add(base, builder.shl(chunk, _constant(4)))
        return _ldmatrix(builder, builder.add(place, _constant(step * 2048)), transposed=True)

    return load


@lru_cache(maxsize=None)
def finished(width: int) -> Any:
    """finished(acc) -> acc, once all products started by this warpgroup are done."""
    count = width // 2
    constraints = ",".join(["=f"] * count + [str(i) for i in range(count)] + ["~{memory}"])

    @_over_fragment(_fragment(width), _fragment(width))
    def fragment_finished(builder, acc):
        if ptx.target != (9, 0):
            return acc
        struct = ir.LiteralStructType([_FLOAT] * count)
        out = _asm(builder, struct, "wgmma.wait_group.sync.aligned 0;", constraints, acc)
        return [builder.extract_value(out, i) for i in range(count)]

    return fragment_finished


@_over_fragment(types.void)
def wait_for_products(builder):
    """Waits until at most one product of this warpgroup is under way."""
    if ptx.target == (9, 0):
        _asm(builder, ir.VoidType(), "wgmma.wait_group.sync.aligned 1;", "~{memory}", [])


def _ldmatrix(builder: Any, address: Any, *, transposed: bool = False) -> list:
    """Four 8 x 8 matrices of float16 out of shared memory, a row per lane's address (PTX: ldmatrix)."""
    kind = "ldmatrix.sync.aligned.m8n8.x4" + (".trans" if transposed else "") + ".shared.b16"
    struct = ir.LiteralStructType([_INT] * 4)
    out = _asm(builder, struct, kind + " {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r,~{memory}", [address])
    return [builder.extract_value(out, i) for i in range(4)]


def _mma(builder: Any, acc: list, a: list, b: list) -> list:
    """acc[16 x 8] + a[16 x 16] @ b[16 x 8]"""
    struct = ir.LiteralStructType([_FLOAT] * 4)
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $13}, "
        "{$0, $1, $2, $3};"
    )
    constraints = "=f,=f,=f,=f,0,1,2,3,r,r,r,r,r,r"
    out = _asm(builder, struct, text, constraints, [*acc, *a, *b], effects=False)
    return [builder.extract_value(out, i) for i in range(4)]


# --- element by element ---------------------------------------------------------------------------------------------


def _per_row(builder: Any, acc: list, operation: Callable, g: Any, g8: Any) -> list:
    """operation(element, what belongs to its row) for the rows g and g + 8 of a thread."""
    return [operation(value, g if i % 4 < 2 else g8) for i, value in enumerate(acc)]


@lru_cache(maxsize=None)
def scale_and_shift(width: int) -> Any:
    """f(acc, factor, g, g8) -> acc * factor + (g in the thread's first row, g8 in its second)."""

    @_over_fragment(_fragment(width), _fragment(width), f32, f32, f32)
    def fragment_scale_and_shift(builder, acc, factor, g, g8):
        scaled = [builder.fmul(value, factor) for value in acc]
        return _per_row(builder, scaled, builder.fadd, g, g8)

    return fragment_scale_and_shift


@lru_cache(maxsize=None)
def scale_rows(width: int) -> Any:
    """f(acc, g, g8) -> acc * (g in the thread's first row, g8 in its second)."""

    @_over_fragment(_fragment(width), _fragment(width), f32, f32)
    def fragment_scale_rows(builder, acc, g, g8):
        return _per_row(builder, acc, builder.fmul, g, g8)

    return fragment_scale_rows


def _exp2(builder: Any, value: Any) -> Any:
    return _asm(builder, _FLOAT, "ex2.approx.ftz.f32 $0, $1;", "=f,f", [value], effects=False)


@lru_cache(maxsize=None)
def silu_times(width: int) -> Any:
    """f(gate, up) -> gate / (1 + e^-gate) * up"""

    @_over_fragment(_fragment(width), _fragment(width), _fragment(width))
    def fragment_silu_times(builder, gate, up):
        out = []
        for g, u in zip(gate, up, strict=True):
            power = _exp2(builder, builder.fmul(g, ir.Constant(_FLOAT, -1.4426950216293335)))
            one_more = builder.fadd(power, ir.Constant(_FLOAT, 1.0))
            inverse = _asm(builder, _FLOAT, "rcp.approx.ftz.f32 $0, $1;", "=f,f", [one_more], effects=False)
            out.append(builder.fmul(builder.fmul(g, inverse), u))
        return out

    return fragment_silu_times


# --- softmax --------------------------------------------------------------------------------------------------------


MASKED = -3e38
"""A score that weighs nothing whatever the others are; finite, as the compiler is told that all numbers are."""


@lru_cache(maxsize=None)
def mask(width: int) -> Any:
    """f(acc, t2, low, high, low8, high8): MASKED in all columns but low to high of row g, low8 to high8 of g + 8.
    t2 = 2 * (lane % 4)."""

    @_over_fragment(_fragment(width), _fragment(width), i32, i32, i32, i32, i32)
    def fragment_mask(builder, acc, t2, low, high, low8, high8):
        lowest, highest = ([builder.sub(bound, t2) for bound in pair] for pair in ((low, low8), (high, high8)))
        out = []
        for i, value in enumerate(acc):
            second = i % 4 // 2
            column = _constant(8 * (i // 4) + i % 2)
            inside = builder.and_(
                builder.icmp_signed(">=", column, lowest[second]), builder.icmp_signed("<=", column, highest[second])
            )
            out.append(builder.select(inside, value, ir.Constant(_FLOAT, MASKED)))
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


@lru_cache(maxsize=None)
def largest(width: int) -> Any:
    """f(acc) -> (the largest of a thread's elements in row g, in row g + 8)"""

    @_over_fragment(types.UniTuple(f32, 2), _fragment(width))
    def fragment_largest(builder, acc):
        def maximum(a, b):
            return _asm(builder, _FLOAT, "max.f32 $0, $1, $2;", "=f,f,f", [a, b], effects=False)

        return [_reduce(builder, row, maximum) for row in _rows(acc)]

    return fragment_largest


@lru_cache(maxsize=None)
def total(width: int) -> Any:
    """f(acc) -> (the sum of a thread's elements in row g, in row g + 8)"""

    @_over_fragment(types.UniTuple(f32, 2), _fragment(width))
    def fragment_total(builder, acc):
        return [_reduce(builder, row, builder.fadd) for row in _rows(acc)]

    return fragment_total


@lru_cache(maxsize=None)
def power(width: int) -> Any:
    """f(acc, g, g8) -> 2^(acc - g in row g, acc - g8 in row g + 8)"""

    @_over_fragment(_fragment(width), _fragment(width), f32, f32)
    def fragment_power(builder, acc, g, g8):
        return [_exp2(builder, value) for value in _per_row(builder, acc, builder.fsub, g, g8)]

    return fragment_power


@_over_fragment(types.UniTuple(i32, 16), _fragment(64))
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
    return _asm(builder, _INT, text, "=r,f,f", [first, second], effects=False)


# --- to and from memory ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=None)
def spill(width: int) -> Any:
    """f(acc, address, step): number 4j + i of each thread to global memory, at address + j * step + 4i bytes."""

    @_over_fragment(types.void, _fragment(width), i64, i64)
    def fragment_spill(builder, acc, address, step):
        for j in range(width // 8):
            values = [address, *acc[4 * j : 4 * j + 4]]
            _asm(builder, ir.VoidType(), "st.global.v4.f32 [$0], {$1, $2, $3, $4};", "l,f,f,f,f,~{memory}", values)
            address = builder.add(address, step)

    return fragment_spill


@lru_cache(maxsize=None)
def add_spilled(width: int) -> Any:
    """f(acc, address, step) -> acc + what `spill` wrote there, read past L1."""

    @_over_fragment(_fragment(width), _fragment(width), i64, i64)
    def fragment_add_spilled(builder, acc, address, step):
        struct, out = ir.LiteralStructType([_FLOAT] * 4), []
        for j in range(width // 8):
            text = "ld.global.cg.v4.f32 {$0, $1, $2, $3}, [$4];"
            four = _asm(builder, struct, text, "=f,=f,=f,=f,l,~{memory}", [address])
            out += [builder.fadd(acc[4 * j + i], builder.extract_value(four, i)) for i in range(4)]
            address = builder.add(address, step)
        return out

    return fragment_add_spilled


@lru_cache(maxsize=None)
def to_shared(width: int, column_bytes: int) -> Any:
    """f(acc, address): the transpose, to shared memory.

    Element [r, c] goes to address + c * column_bytes + 4r, `address` being that of the thread's [g, 2t]. With
    column_bytes / 4 = 4 modulo 32 no two lanes meet in a bank.
    """

    @_over_fragment(types.void, _fragment(width), i32)
    def fragment_to_shared(builder, acc, address):
        for i, value in enumerate(acc):
            offset = (8 * (i // 4) + i % 2) * column_bytes + (32 if i % 4 >= 2 else 0)
            text = f"st.shared.f32 [$0+{offset}], $1;"
            _asm(builder, ir.VoidType(), text, "r,f,~{memory}", [address, value])

    return fragment_to_shared


def _to_half(builder: Any, value: Any) -> Any:
    """The bits of the nearest float16, 16 of them; saturated."""
    text = "{ .reg .f32 v; min.f32 v, $1, 0f477FE000; max.f32 v, v, 0fC77FE000; cvt.rn.f16.f32 $0, v; }"
    return _asm(builder, ir.IntType(16), text, "=h,f", [value], effects=False)


@lru_cache(maxsize=None)
def halves_to_shared(width: int) -> Any:
    """f(acc, address, chunk, t): the transpose as float16, to shared memory, rows of 128 bytes, swizzled.

    Column c is row c there. The thread's two elements of a column go to 16-byte chunks `chunk` and chunk + 4 of it,
    at the place in the chunk that `address` points to in column 0, unswizzled.
    """

    @_over_fragment(types.void, _fragment(width), i32, i32, i32)
    def fragment_halves_to_shared(builder, acc, address, chunk, t):
        for odd in (0, 1):
            column = builder.or_(builder.shl(t, _constant(1)), _constant(odd))  # modulo 8
            line = builder.add(address, builder.shl(column, _constant(7)))
            for second in (0, 1):
                place = builder.xor(builder.add(chunk, _constant(4 * second)), column)
                at = builder.add(line, builder.shl(place, _constant(4)))
                for j in range(width // 8):
                    bits = _to_half(builder, acc[4 * j + 2 * second + odd])
                    text = f"st.shared.b16 [$0+{1024 * j}], $1;"
                    _asm(builder, ir.VoidType(), text, "r,h,~{memory}", [at, bits])

    return fragment_halves_to_shared


@lru_cache(maxsize=None)
def store_row(width: int, second: int) -> Any:
    """f(acc, address): row g (second = 1: g + 8) to global memory, the thread's [g, 2t] at address."""

    @_over_fragment(types.void, _fragment(width), i64)
    def fragment_store_row(builder, acc, address):
        for j in range(width // 8):
            pair = acc[4 * j + 2 * second : 4 * j + 2 * second + 2]
            text = f"st.global.v2.f32 [$0+{32 * j}], {{$1, $2}};"
            _asm(builder, ir.VoidType(), text, "l,f,f,~{memory}", [address, *pair])

    return fragment_store_row


@lru_cache(maxsize=None)
def store_row_halves(width: int, second: int) -> Any:
    """f(acc, data, rows, token, column): row g (second = 1: g + 8) as token `token` of HalfRows (half_rows.py), the
    thread's [g, 2t] at that column. data: their address."""

    @_over_fragment(types.void, _fragment(width), i64, i32, i32, i32)
    def fragment_store_row_halves(builder, acc, data, rows, token, column):
        for j in range(width // 8):
            at = builder.add(column, _constant(8 * j))
            block = builder.lshr(at, _constant(6))
            chunk = builder.and_(builder.lshr(at, _constant(1)), _constant(7))
            place = builder.xor(chunk, builder.and_(token, _constant(7)))
            pair = builder.and_(builder.lshr(at, _constant(4)), _constant(3))
            within = builder.add(builder.shl(place, _constant(4)), builder.shl(pair, _constant(2)))
            line = builder.add(builder.mul(block, rows), token)
            offset = builder.add(builder.shl(builder.zext(line, _LONG), ir.Constant(_LONG, 7)), builder.zext(within, _LONG))
            word = _halves(builder, acc[4 * j + 2 * second], acc[4 * j + 2 * second + 1])
            _asm(builder, ir.VoidType(), "st.global.b32 [$0], $1;", "l,r,~{memory}", [builder.add(data, offset), word])

    return fragment_store_row_halves
