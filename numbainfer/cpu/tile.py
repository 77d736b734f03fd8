"""Tiles of vector registers: TILE_TOKENS tokens by 32 output rows for the int8 GEMM, 4 by 64 floats for attention.

A tile is a Numba tuple of vectors, two per token; LLVM keeps its elements in registers. The intrinsics here emit the
loop over the tile's tokens at compile time, which Numba's language can't express for values of vector type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from numbainfer.cpu import dot, simd
from numbainfer.cpu.isa import detect
from numbainfer.cpu.simd import F32x16, I32x16

TILE_TOKENS = detect().tile_tokens
TILE_ROWS = 32  # two vectors

_F_TILE = types.UniTuple(F32x16, 2 * TILE_TOKENS)
_I_TILE = types.UniTuple(I32x16, 2 * TILE_TOKENS)
_P8, _P32, _PF = (types.CPointer(t) for t in (types.int8, types.int32, types.float32))


def _index(value: int) -> ir.Constant:
    return ir.Constant(ir.IntType(64), value)


def _tile_intrinsic(result: Any, *arguments: Any) -> Callable:
    """Decorator: body(builder, elements of the tile (a list), *other values) returns the new elements, or None."""

    def decorate(body: Callable) -> Callable:
        def codegen(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            tile: list[Any] = []
            if arguments and isinstance(arguments[0], types.UniTuple):
                tile = [builder.extract_value(values[0], i) for i in range(arguments[0].count)]
                values = values[1:]
            out = body(builder, tile, *values)
            return context.get_dummy_value() if out is None else context.make_tuple(builder, result, out)

        names = ", ".join(f"a{i}" for i in range(len(arguments)))
        namespace = {"sig": result(*arguments), "codegen": codegen}
        exec(f"def {body.__name__}(typingctx, {names}):\n    return sig, codegen", namespace)
        function: Any = namespace[body.__name__]
        function.__doc__ = body.__doc__
        return intrinsic(function)

    return decorate


def _load(builder: Any, pointer: Any, offset: Any, vector: Any) -> Any:
    address = builder.gep(pointer, [offset])
    return builder.load(builder.bitcast(address, vector.llvm.as_pointer()), align=1)


def _scalar(builder: Any, pointer: Any, token: int, stride: Any) -> Any:
    """pointer[token * stride]"""
    return builder.load(builder.gep(pointer, [builder.mul(stride, _index(token))]))


@_tile_intrinsic(_F_TILE)
def tile_zero(builder: Any, tile: list) -> list:
    """A tile of float32 zeros."""
    return [ir.Constant(F32x16.llvm, [0.0] * 16)] * (2 * TILE_TOKENS)


@_tile_intrinsic(_I_TILE, _P32, types.int64)
def tile_start(builder: Any, tile: list, sums: Any, stride: Any) -> list:
    """An int32 tile that starts at -weight_offset * sums[token * stride]: the offset's surplus, taken back for free."""
    return _surplus(builder, sums, stride)


@_tile_intrinsic(_I_TILE)
def tile_zero_i32(builder: Any, tile: list) -> list:
    """A tile of int32 zeros."""
    return [ir.Constant(I32x16.llvm, [0] * 16)] * (2 * TILE_TOKENS)


@_tile_intrinsic(_I_TILE, _I_TILE, _P32, types.int64)
def tile_next_plane(builder: Any, tile: list, sums: Any, stride: Any) -> list:
    """256 * tile - weight_offset * sums[token * stride]: from the high bytes' dot products to the low bytes'."""
    eight = ir.Constant(I32x16.llvm, [8] * 16)
    starts = _surplus(builder, sums, stride)
    return [builder.add(builder.shl(d, eight), start) for d, start in zip(tile, starts, strict=True)]


def _surplus(builder: Any, sums: Any, stride: Any) -> list:
    out = []
    for token in range(TILE_TOKENS):
        total = _scalar(builder, sums, token, stride)
        total = builder.mul(total, ir.Constant(ir.IntType(32), -detect().weight_offset))
        out += [simd._splat(builder, total, I32x16.llvm)] * 2
    return out


@_tile_intrinsic(_I_TILE, _I_TILE, _P8, _P8, types.int64)
def tile_dot(builder: Any, tile: list, panel: Any, x: Any, stride: Any) -> list:
    """Adds 4 columns: 32 rows x 4 bytes of packed weights, against 4 bytes of each token at x[token * stride]."""
    weights = [_load(builder, panel, _index(offset), simd.I8x64) for offset in (0, 64)]
    out = []
    for token in range(TILE_TOKENS):
        address = builder.gep(x, [builder.mul(stride, _index(token))])
        word = builder.load(builder.bitcast(address, ir.IntType(32).as_pointer()), align=1)
        four = builder.bitcast(simd._splat(builder, word, I32x16.llvm), simd.I8x64.llvm)
        out += [dot.emit_dot4_packed(builder, tile[2 * token + half], weights[half], four) for half in (0, 1)]
    return out


@_tile_intrinsic(_F_TILE, _F_TILE, _I_TILE, _PF, _PF, types.int64)
def tile_add_scaled(builder: Any, tile: list, dots: Any, scales: Any, xs: Any, stride: Any) -> list:
    """tile + dots * (scales[32 rows] x xs[token * stride]): the end of a group."""
    weights = [_load(builder, scales, _index(offset), F32x16) for offset in (0, 16)]
    out = []
    for token in range(TILE_TOKENS):
        factor = simd._splat(builder, _scalar(builder, xs, token, stride), F32x16.llvm)
        for half in (0, 1):
            value = builder.sitofp(builder.extract_value(dots, 2 * token + half), F32x16.llvm)
            factors = builder.fmul(weights[half], factor)
            out.append(simd._call(builder, "llvm.fma.v16f32", F32x16.llvm, value, factors, tile[2 * token + half]))
    return out


@_tile_intrinsic(types.void, _F_TILE, _PF)
def tile_spill(builder: Any, tile: list, out: Any) -> None:
    """Writes the tile as float32 [TILE_TOKENS, 32]."""
    for i, vector in enumerate(tile):
        address = builder.gep(out, [_index(16 * i)])
        builder.store(vector, builder.bitcast(address, F32x16.llvm.as_pointer()), align=1)


@_tile_intrinsic(types.void, _P8, types.int64, _P8)
def tile_transpose(builder: Any, tile: list, rows: Any, stride: Any, panel: Any) -> None:
    """Packs 16 rows of 64 bytes, `stride` apart, into 16 vectors of a panel: vector k has bytes 4k to 4k + 3 of each.

    weight_offset is added on the way.
    """
    vectors = []
    for row in range(16):
        vector = _load(builder, rows, builder.mul(stride, _index(row)), I32x16)
        if detect().weight_offset:
            vector = builder.xor(vector, ir.Constant(I32x16.llvm, [-0x7F7F7F80] * 16))  # bytes 0x80
        vectors.append(vector)
    for k, vector in enumerate(_transpose(builder, vectors)):
        address = builder.gep(panel, [_index(k * 4 * TILE_ROWS)])
        builder.store(vector, builder.bitcast(address, I32x16.llvm.as_pointer()), align=1)


@intrinsic
def transpose16(typingctx, rows, stride, out, out_stride):
    """16 rows of 16 elements (float32, F16 or BF16), `stride` apart, as 16 vectors of float32, `out_stride` apart."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        rows, stride, out, out_stride = args
        vectors = [
            simd._load_f32(builder, sig.args[0].dtype, rows, builder.mul(stride, _index(row))) for row in range(16)
        ]
        for i, vector in enumerate(_transpose(builder, vectors)):
            address = builder.gep(out, [builder.mul(out_stride, _index(i))])
            builder.store(vector, builder.bitcast(address, F32x16.llvm.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(rows, types.int64, _PF, types.int64), codegen


def _transpose(builder: Any, vectors: list) -> list:
    """A 16 x 16 transpose in four rounds: round n exchanges, between vectors 2^n apart, the lanes whose bit n
    differs."""
    lanes = ir.VectorType(ir.IntType(32), 16)
    for step in (1, 2, 4, 8):
        low = [lane if lane & step == 0 else 16 + lane - step for lane in range(16)]
        high = [lane + step if lane & step == 0 else 16 + lane for lane in range(16)]
        for row in range(16):
            if row & step == 0:
                a, b = vectors[row], vectors[row + step]
                vectors[row] = builder.shuffle_vector(a, b, ir.Constant(lanes, low))
                vectors[row + step] = builder.shuffle_vector(a, b, ir.Constant(lanes, high))
    return vectors


# --- float32 tiles of 4 rows by 64 columns ---------------------------------------------------------------------

_OUTER = types.UniTuple(F32x16, 16)


@_tile_intrinsic(_OUTER)
def outer_zero(builder: Any, tile: list) -> list:
    """A tile of zeros."""
    return [ir.Constant(F32x16.llvm, [0.0] * 16)] * 16


@intrinsic
def outer_add(typingctx, tile, column, stride, row):
    """tile + the outer product of column[0], column[stride], ... (4 values) and row[0 : 64] (float32, F16 or BF16)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        tile, column, stride, row = args
        vectors = [simd._load_f32(builder, sig.args[3].dtype, row, _index(16 * v)) for v in range(4)]
        out = []
        for r in range(4):
            factor = simd._splat(builder, _scalar(builder, column, r, stride), F32x16.llvm)
            for v in range(4):
                old = builder.extract_value(tile, 4 * r + v)
                out.append(simd._call(builder, "llvm.fma.v16f32", F32x16.llvm, factor, vectors[v], old))
        return context.make_tuple(builder, _OUTER, out)

    return _OUTER(_OUTER, _PF, types.int64, row), codegen


@_tile_intrinsic(_OUTER, _PF, types.int64)
def outer_load(builder: Any, tile: list, corner: Any, stride: Any) -> list:
    """The tile whose rows are `stride` apart."""
    rows = [builder.gep(corner, [builder.mul(stride, _index(r))]) for r in range(4)]
    return [_load(builder, row, _index(16 * v), F32x16) for row in rows for v in range(4)]


@_tile_intrinsic(types.void, _OUTER, _PF, types.int64)
def outer_store(builder: Any, tile: list, corner: Any, stride: Any) -> None:
    """Writes the tile to rows `stride` apart."""
    for i, vector in enumerate(tile):
        row, column = divmod(i, 4)
        address = builder.gep(corner, [builder.add(builder.mul(stride, _index(row)), _index(16 * column))])
        builder.store(vector, builder.bitcast(address, F32x16.llvm.as_pointer()), align=1)
