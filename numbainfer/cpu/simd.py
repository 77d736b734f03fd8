"""SIMD values as first-class Numba values.

LLVM has vector types, and Numba lets a type's data model be any LLVM type; so `F32x16` is an ordinary value in a
kernel: `acc = fma(load(w, i), load(x, i), acc)` compiles to what a C programmer writes with intrinsics. A 16-lane
value is one AVX-512 register, two AVX2 registers or four NEON registers: LLVM splits it, so the same kernels run
on every machine. Only the int8 dot product (dot.py) and float16 differ by instruction set (isa.py).

Pointers are Numba's `CPointer`: `p[i]` reads an element, `load(p, i)` reads the 16 elements from p[i] on. `F16`
and `BF16` are element types for pointers to half-precision data, which `load` widens and `store` rounds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from numbainfer.cpu.isa import detect

LANES = 16  # float32 and int32 lanes of a vector value

_i8, _i16, _i32, _i64, _f32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_half = ir.HalfType()


def _primitive_type(name: str, llvm_type: ir.Type) -> types.Type:
    """A new Numba type whose values are `llvm_type` values."""
    cls = type(name, (types.Type,), {})
    instance = cls(name=name)
    instance.llvm = llvm_type

    @register_model(cls)
    class Model(models.PrimitiveModel):
        def __init__(self, dmm: Any, fe_type: Any) -> None:
            super().__init__(dmm, fe_type, llvm_type)

    return instance


F32x16 = _primitive_type("F32x16", ir.VectorType(_f32, 16))
I32x16 = _primitive_type("I32x16", ir.VectorType(_i32, 16))
I8x64 = _primitive_type("I8x64", ir.VectorType(_i8, 64))
F16 = _primitive_type("F16", _i16)
BF16 = _primitive_type("BF16", _i16)

_I16x16, _I8x16, _F16x16 = ir.VectorType(_i16, 16), ir.VectorType(_i8, 16), ir.VectorType(_half, 16)


# --- building blocks of the code generators ------------------------------------------------------------------


def _define(result: Any, *args: Any) -> Callable:
    """Decorator: an intrinsic of fixed types; the body gets (builder, *llvm values) and returns an llvm value."""

    def decorate(body: Callable) -> Callable:
        names = [f"a{i}" for i in range(len(args))]

        def codegen(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            out = body(builder, *values)
            return context.get_dummy_value() if out is None else out

        # Numba reads an intrinsic's arity from its Python signature, so it has to be spelled out.
        namespace = {"sig": signature(result, *args), "codegen": codegen}
        exec(f"def {body.__name__}(typingctx, {', '.join(names)}):\n    return sig, codegen", namespace)
        function: Any = namespace[body.__name__]
        function.__doc__ = body.__doc__
        return intrinsic(function)

    return decorate


def _call(builder: Any, name: str, result: ir.Type, *args: Any, fast: tuple = ()) -> Any:
    """Calls the LLVM intrinsic `name`."""
    function_type = ir.FunctionType(result, [a.type for a in args])
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(function, args, fastmath=fast)


def _splat(builder: Any, scalar: Any, vector_type: ir.VectorType) -> Any:
    one = builder.insert_element(ir.Constant(vector_type, ir.Undefined), scalar, ir.Constant(_i32, 0))
    zeros = ir.Constant(ir.VectorType(_i32, vector_type.count), [0] * vector_type.count)
    return builder.shuffle_vector(one, one, zeros)


def _constant(vector_type: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector_type, [value] * vector_type.count)


def _address(builder: Any, pointer: Any, index: Any, vector_type: ir.Type) -> Any:
    return builder.bitcast(builder.gep(pointer, [index]), vector_type.as_pointer())


# --- float32 vectors -------------------------------------------------------------------------------------------


def _widen_half(builder: Any, bits: Any) -> Any:
    """float16 bits [16 x i16] to float32; without F16C by scaling with 2^112, which is exact (subnormals too).

    Scaling makes infinity and NaN, exponent 31 in float16, numbers from 2^16 on: their exponent becomes float32's 255.
    """
    if detect().half_convert:
        return builder.fpext(builder.bitcast(bits, _F16x16), F32x16.llvm)
    wide = builder.zext(bits, I32x16.llvm)
    magnitude = builder.shl(builder.and_(wide, _constant(I32x16.llvm, 0x7FFF)), _constant(I32x16.llvm, 13))
    scaled = builder.fmul(builder.bitcast(magnitude, F32x16.llvm), _constant(F32x16.llvm, 2.0**112))
    special = builder.icmp_unsigned(">=", magnitude, _constant(I32x16.llvm, 0x7C00 << 13))
    exponent = builder.select(special, _constant(I32x16.llvm, 0x7F800000), _constant(I32x16.llvm, 0))
    sign = builder.shl(builder.and_(wide, _constant(I32x16.llvm, 0x8000)), _constant(I32x16.llvm, 16))
    bits = builder.or_(builder.bitcast(scaled, I32x16.llvm), builder.or_(exponent, sign))
    return builder.bitcast(bits, F32x16.llvm)


def _narrow_half(builder: Any, value: Any) -> Any:
    """float32 to float16 bits [16 x i16], to nearest even; beyond the range it saturates at 65504."""
    limit = _constant(F32x16.llvm, 65504.0)
    value = _call(builder, "llvm.minnum.v16f32", F32x16.llvm, value, limit)
    value = _call(builder, "llvm.maxnum.v16f32", F32x16.llvm, value, _constant(F32x16.llvm, -65504.0))
    if detect().half_convert:
        return builder.bitcast(builder.fptrunc(value, _F16x16), _I16x16)
    bits = builder.bitcast(value, I32x16.llvm)
    sign = builder.and_(bits, _constant(I32x16.llvm, -0x80000000))
    magnitude = builder.bitcast(builder.xor(bits, sign), F32x16.llvm)
    # Normal results: rebias the exponent by -112 and round the 13 low bits to nearest even.
    raw = builder.bitcast(magnitude, I32x16.llvm)
    odd = builder.and_(builder.lshr(raw, _constant(I32x16.llvm, 13)), _constant(I32x16.llvm, 1))
    rounded = builder.add(raw, builder.add(odd, _constant(I32x16.llvm, 0xFFF - (112 << 23))))
    normal = builder.lshr(rounded, _constant(I32x16.llvm, 13))
    # Subnormal results: adding 0.5 lets the float adder itself round at 2^-24, the last bit of a float16.
    half = builder.fadd(magnitude, _constant(F32x16.llvm, 0.5))
    subnormal = builder.sub(builder.bitcast(half, I32x16.llvm), _constant(I32x16.llvm, 0x3F000000))
    small = builder.icmp_unsigned("<", raw, _constant(I32x16.llvm, 113 << 23))
    out = builder.or_(builder.select(small, subnormal, normal), builder.lshr(sign, _constant(I32x16.llvm, 16)))
    return builder.trunc(out, _I16x16)


def _load_f32(builder: Any, element: Any, pointer: Any, index: Any) -> Any:
    """The 16 elements (float32, F16 or BF16) from pointer[index] on as float32."""
    if element == types.float32:
        return builder.load(_address(builder, pointer, index, F32x16.llvm), align=1)
    bits = builder.load(_address(builder, pointer, index, _I16x16), align=1)
    if element == F16:
        return _widen_half(builder, bits)
    wide = builder.shl(builder.zext(bits, I32x16.llvm), _constant(I32x16.llvm, 16))
    return builder.bitcast(wide, F32x16.llvm)


@intrinsic
def load(typingctx, pointer, index):
    """The 16 elements from pointer[index] on (float32, F16 or BF16) as float32."""
    if not isinstance(pointer, types.CPointer) or pointer.dtype not in (types.float32, F16, BF16):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _load_f32(builder, pointer.dtype, *args)

    return F32x16(pointer, types.int64), codegen


@intrinsic
def store(typingctx, pointer, index, value):
    """Writes 16 float32 lanes at pointer[index], rounded to nearest even where the elements are F16."""
    if not isinstance(pointer, types.CPointer) or pointer.dtype not in (types.float32, F16):
        return None
    element = pointer.dtype

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = args[2] if element == types.float32 else _narrow_half(builder, args[2])
        builder.store(value, _address(builder, args[0], args[1], value.type), align=1)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, F32x16), codegen


@intrinsic
def get(typingctx, pointer, index):
    """One element (float32, F16 or BF16) as float32."""
    if not isinstance(pointer, types.CPointer) or pointer.dtype not in (types.float32, F16, BF16):
        return None
    element = pointer.dtype

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = builder.load(builder.gep(args[0], [args[1]]))
        if element == types.float32:
            return value
        if element == BF16:
            return builder.bitcast(builder.shl(builder.zext(value, _i32), ir.Constant(_i32, 16)), _f32)
        return builder.extract_element(_widen_half(builder, _splat(builder, value, _I16x16)), ir.Constant(_i32, 0))

    return types.float32(pointer, types.int64), codegen


@intrinsic
def put(typingctx, pointer, index, value):
    """Writes one float32 at pointer[index], rounded where the elements are F16."""
    if not isinstance(pointer, types.CPointer) or pointer.dtype not in (types.float32, F16):
        return None
    element = pointer.dtype

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = args[2]
        if element == F16:
            bits = _narrow_half(builder, _splat(builder, value, F32x16.llvm))
            value = builder.extract_element(bits, ir.Constant(_i32, 0))
        builder.store(value, builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.float32), codegen


@intrinsic
def advance(typingctx, pointer, elements):
    """The pointer moved on by a number of elements."""
    if not isinstance(pointer, types.CPointer):
        return None
    return pointer(pointer, types.int64), lambda context, builder, sig, args: builder.gep(args[0], [args[1]])


@intrinsic
def local_floats(typingctx):
    """16 floats on the stack of the kernel's frame; every call of it in a kernel gives another 16."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array = cgutils.alloca_once(builder, ir.ArrayType(_f32, LANES))
        array.align = 64
        return builder.bitcast(array, _f32.as_pointer())

    return types.CPointer(types.float32)(), codegen


@_define(types.CPointer(types.int8), types.CPointer(types.float32))
def as_bytes(builder: Any, pointer: Any) -> Any:
    """The same address, as a pointer to bytes."""
    return builder.bitcast(pointer, _i8.as_pointer())


@_define(types.CPointer(types.float32), types.CPointer(types.int8))
def as_floats(builder: Any, pointer: Any) -> Any:
    """The same address, as a pointer to float32."""
    return builder.bitcast(pointer, _f32.as_pointer())


@_define(types.CPointer(types.int32), types.CPointer(types.float32))
def as_ints(builder: Any, pointer: Any) -> Any:
    """The same address, as a pointer to int32."""
    return builder.bitcast(pointer, _i32.as_pointer())


@_define(types.void, types.CPointer(F16), types.int64)
def next_up(builder: Any, pointer: Any, index: Any) -> None:
    """Replaces the positive float16 at pointer[index] by the next larger one: its bits plus one."""
    address = builder.gep(pointer, [index])
    builder.store(builder.add(builder.load(address), ir.Constant(_i16, 1)), address)


@_define(F32x16, types.float32)
def splat(builder: Any, x: Any) -> Any:
    """x in all 16 lanes."""
    return _splat(builder, x, F32x16.llvm)


@_define(F32x16, types.float32, types.float32)
def splat2(builder: Any, low: Any, high: Any) -> Any:
    """`low` in lanes 0 to 7, `high` in lanes 8 to 15."""
    halves = ir.Constant(ir.VectorType(_i32, 16), [0] * 8 + [16] * 8)
    return builder.shuffle_vector(_splat(builder, low, F32x16.llvm), _splat(builder, high, F32x16.llvm), halves)


@_define(F32x16, F32x16, F32x16, F32x16)
def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    return _call(builder, "llvm.fma.v16f32", F32x16.llvm, a, b, c)


@_define(F32x16, F32x16, F32x16)
def maximum(builder: Any, a: Any, b: Any) -> Any:
    """The larger of each pair of lanes; a NaN in `a` stays."""
    return builder.select(builder.fcmp_unordered(">", a, b), a, b)


@_define(F32x16, F32x16)
def absolute(builder: Any, a: Any) -> Any:
    """|a|"""
    return _call(builder, "llvm.fabs.v16f32", F32x16.llvm, a)


@_define(types.float32, F32x16)
def hsum(builder: Any, a: Any) -> Any:
    """The sum of the lanes, as a tree: the same for every call."""
    zero = ir.Constant(_f32, 0.0)
    return _call(builder, "llvm.vector.reduce.fadd.v16f32", _f32, zero, a, fast=("reassoc",))


@_define(types.float32, F32x16)
def first_lane(builder: Any, a: Any) -> Any:
    """Lane 0."""
    return builder.extract_element(a, ir.Constant(_i32, 0))


@_define(types.float32, F32x16)
def hmax(builder: Any, a: Any) -> Any:
    """The largest lane."""
    return _call(builder, "llvm.vector.reduce.fmax.v16f32", _f32, a, fast=("nnan",))


def _binary(op: Callable, vector: Any, emit: str) -> None:
    """Makes `a op b` work on two vector values."""

    @infer_global(op)
    class Typing(ConcreteTemplate):
        cases: ClassVar = [signature(vector, vector, vector)]

    @lower_builtin(op, vector, vector)
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, emit)(*args)


for _op, _emit in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _binary(_op, F32x16, _emit)
_binary(operator.add, I32x16, "add")


# --- integer vectors -------------------------------------------------------------------------------------------


@_define(I32x16, types.int32)
def splat_i32(builder: Any, x: Any) -> Any:
    """x in all 16 lanes."""
    return _splat(builder, x, I32x16.llvm)


@_define(I32x16, types.int32)
def lane0(builder: Any, x: Any) -> Any:
    """x in lane 0, zeros elsewhere."""
    return builder.insert_element(_constant(I32x16.llvm, 0), x, ir.Constant(_i32, 0))


@_define(types.int32, I32x16)
def hsum_i32(builder: Any, a: Any) -> Any:
    """The sum of the lanes."""
    return _call(builder, "llvm.vector.reduce.add.v16i32", _i32, a)


@_define(F32x16, I32x16)
def to_f32(builder: Any, a: Any) -> Any:
    """Each lane as float32."""
    return builder.sitofp(a, F32x16.llvm)


@_define(I32x16, F32x16)
def round_i32(builder: Any, a: Any) -> Any:
    """Each lane rounded to the nearest integer, ties to even."""
    return builder.fptosi(_call(builder, "llvm.rint.v16f32", F32x16.llvm, a), I32x16.llvm)


@_define(I32x16, I32x16)
def high_byte(builder: Any, q: Any) -> Any:
    """q / 256 rounded to nearest: -127 to 127 for q in -32512 to 32512."""
    half, eight = _constant(I32x16.llvm, 128), _constant(I32x16.llvm, 8)
    return builder.ashr(builder.add(q, half), eight)


@_define(I32x16, I32x16, I32x16)
def low_byte(builder: Any, q: Any, high: Any) -> Any:
    """q - 256 * high, -127 to 127 (-128, which some dot products can't negate, becomes -127)."""
    low = builder.sub(q, builder.shl(high, _constant(I32x16.llvm, 8)))
    least = _constant(I32x16.llvm, -127)
    return builder.select(builder.icmp_signed("<", low, least), least, low)


@_define(I32x16, I32x16)
def times256(builder: Any, a: Any) -> Any:
    """256 * a"""
    return builder.shl(a, _constant(I32x16.llvm, 8))


@_define(F32x16, I32x16)
def power_of_two(builder: Any, n: Any) -> Any:
    """2^n for n from -126 to 127, made by writing the exponent field."""
    biased = builder.add(n, _constant(I32x16.llvm, 127))
    return builder.bitcast(builder.shl(biased, _constant(I32x16.llvm, 23)), F32x16.llvm)


_P8 = types.CPointer(types.int8)
_P32 = types.CPointer(types.int32)


@_define(I32x16, _P32, types.int64)
def load_i32(builder: Any, pointer: Any, index: Any) -> Any:
    """The 16 int32 from pointer[index] on."""
    return builder.load(_address(builder, pointer, index, I32x16.llvm), align=1)


@_define(F32x16, F32x16, types.int64)
def first_lanes(builder: Any, a: Any, count: Any) -> Any:
    """The first `count` lanes, zeros in the others."""
    lanes = ir.Constant(I32x16.llvm, list(range(LANES)))
    inside = builder.icmp_signed("<", lanes, _splat(builder, builder.trunc(count, _i32), I32x16.llvm))
    return builder.select(inside, a, _constant(F32x16.llvm, 0.0))


@_define(I8x64, _P8, types.int64)
def load_i8(builder: Any, pointer: Any, index: Any) -> Any:
    """64 bytes from pointer[index] on."""
    return builder.load(_address(builder, pointer, index, I8x64.llvm), align=1)


@_define(I8x64, _P8, types.int64)
def load_i8_half(builder: Any, pointer: Any, index: Any) -> Any:
    """32 bytes from pointer[index] on, then 32 zeros: the last half block of a row."""
    half = ir.VectorType(_i8, 32)
    low = builder.load(_address(builder, pointer, index, half), align=1)
    lanes = ir.Constant(ir.VectorType(_i32, 64), list(range(64)))
    return builder.shuffle_vector(low, ir.Constant(half, [0] * 32), lanes)


@_define(I8x64, _P8, types.int64)
def splat_word(builder: Any, pointer: Any, index: Any) -> Any:
    """The 4 bytes from pointer[index] on, 16 times."""
    word = builder.load(_address(builder, pointer, index, _i32), align=1)
    return builder.bitcast(_splat(builder, word, I32x16.llvm), I8x64.llvm)


@_define(I32x16, _P8, types.int64)
def load_i8x16(builder: Any, pointer: Any, index: Any) -> Any:
    """16 bytes from pointer[index] on, each as int32."""
    return builder.sext(builder.load(_address(builder, pointer, index, _I8x16), align=1), I32x16.llvm)


@_define(I32x16, I8x64)
def as_words(builder: Any, value: Any) -> Any:
    """The same 64 bytes, as 16 int32."""
    return builder.bitcast(value, I32x16.llvm)


@_define(types.void, _P8, types.int64, I32x16)
def store_i8x16(builder: Any, pointer: Any, index: Any, value: Any) -> None:
    """Writes 16 lanes as 16 bytes; lanes must lie in -128 to 127."""
    builder.store(builder.trunc(value, _I8x16), _address(builder, pointer, index, _I8x16), align=1)


@_define(types.void, _P8, types.int64, types.int32)
def store_word(builder: Any, pointer: Any, index: Any, value: Any) -> None:
    """Writes an int32 over the 4 bytes from pointer[index] on."""
    builder.store(value, _address(builder, pointer, index, _i32), align=1)


@_define(types.int32, _P8, types.int64)
def load_word(builder: Any, pointer: Any, index: Any) -> Any:
    """The 4 bytes from pointer[index] on as an int32."""
    return builder.load(_address(builder, pointer, index, _i32), align=1)


@_define(types.void, _P32, types.int64)
def count_up(builder: Any, pointer: Any, index: Any) -> None:
    """Adds 1 to pointer[index], where other workers may do the same."""
    builder.atomic_rmw("add", builder.gep(pointer, [index]), ir.Constant(_i32, 1), "monotonic")


@intrinsic
def prefetch(typingctx, pointer, index):
    """Asks for the cache line of pointer[index] in the second-level cache; an address past the end is harmless."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = builder.bitcast(builder.gep(args[0], [args[1]]), _i8.as_pointer())
        read, locality, data = (ir.Constant(_i32, v) for v in (0, 2, 1))
        _call_void(builder, "llvm.prefetch.p0", address, read, locality, data)
        return context.get_dummy_value()

    return types.void(pointer, types.int64), codegen


def _call_void(builder: Any, name: str, *args: Any) -> None:
    _call(builder, name, ir.VoidType(), *args)


# --- functions of vectors --------------------------------------------------------------------------------------


@_define(F32x16, F32x16, F32x16)
def minimum(builder: Any, a: Any, b: Any) -> Any:
    """The smaller of each pair of lanes; a NaN in `a` stays."""
    return builder.select(builder.fcmp_unordered("<", a, b), a, b)


@_define(F32x16, F32x16, F32x16, F32x16)
def keep_if_above(builder: Any, a: Any, b: Any, value: Any) -> Any:
    """`value` where a > b (or either is NaN), else 0."""
    return builder.select(builder.fcmp_unordered(">", a, b), value, _constant(F32x16.llvm, 0.0))


@njit
def exp(x):
    """e^x per lane to about 1e-7 relative (Cephes' expf: Moshier 1989), 0 below -87, clamped above 88."""
    inside = maximum(minimum(x, splat(88.0)), splat(-87.0))
    n = round_i32(inside * splat(1.44269504))
    m = to_f32(n)
    r = fma(m, splat(-0.693359375), inside)
    r = fma(m, splat(2.12194440e-4), r)
    p = splat(1.9875691500e-4)
    p = fma(p, r, splat(1.3981999507e-3))
    p = fma(p, r, splat(8.3334519073e-3))
    p = fma(p, r, splat(4.1665795894e-2))
    p = fma(p, r, splat(1.6666665459e-1))
    p = fma(p, r, splat(5.0000001201e-1))
    p = fma(p, r * r, r + splat(1.0))
    return keep_if_above(x, splat(-87.0), p * power_of_two(n))
