"""The int8 dot product, one form for each instruction set (isa.py)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from numbainfer.cpu import simd
from numbainfer.cpu.isa import detect
from numbainfer.cpu.simd import I8x64, I32x16


@lru_cache
def _vnni_operand(triple: str, bits: int) -> ir.VectorType:
    """LLVM changed vpdpbusd's operands from int32 to bytes: ask the one at hand which it takes."""
    words, count = f"<{bits // 32} x i32>", f"<{bits // 8} x i8>"
    probe = f'declare {words} @llvm.x86.avx512.vpdpbusd.{bits}({words}, {count}, {count})\ntarget triple = "{triple}"\n'
    try:
        llvm.parse_assembly(probe).verify()
    except RuntimeError:
        return ir.VectorType(simd._i32, bits // 32)
    return ir.VectorType(simd._i8, bits // 8)


def _vpdpbusd(builder: Any, acc: Any, unsigned: Any, x: Any) -> Any:
    """acc [n x i32] + the sums of 4 products of unsigned by signed bytes, in vectors of 512 or 256 bits."""
    bits = 32 * acc.type.count
    operand = _vnni_operand(builder.module.triple, bits)
    args = [builder.bitcast(v, operand) for v in (unsigned, x)]
    return simd._call(builder, f"llvm.x86.avx512.vpdpbusd.{bits}", acc.type, acc, *args)


def _dot_avx512_vnni(builder: Any, acc: Any, unsigned: Any, x: Any) -> Any:
    return _vpdpbusd(builder, acc, unsigned, x)


def _dot_avx_vnni(builder: Any, acc: Any, unsigned: Any, x: Any) -> Any:
    halves = zip(*(_split(builder, v, 2) for v in (acc, unsigned, x)), strict=True)
    return _join(builder, [_vpdpbusd(builder, *half) for half in halves])


def _split(builder: Any, value: Any, parts: int) -> list[Any]:
    count = value.type.count // parts
    index = ir.VectorType(simd._i32, count)
    return [
        builder.shuffle_vector(value, value, ir.Constant(index, list(range(p * count, (p + 1) * count))))
        for p in range(parts)
    ]


def _join(builder: Any, parts: list[Any]) -> Any:
    while len(parts) > 1:
        index = ir.VectorType(simd._i32, parts[0].type.count * 2)
        lanes = ir.Constant(index, list(range(index.count)))
        parts = [builder.shuffle_vector(a, b, lanes) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _dot_avx2(builder: Any, acc: Any, w: Any, x: Any) -> Any:
    """vpmaddubsw multiplies unsigned by signed: |w| and x with w's sign; |w| <= 127 keeps its 16 bits in range."""
    byte, short, word = (ir.VectorType(t, n) for t, n in ((simd._i8, 32), (simd._i16, 16), (simd._i32, 8)))
    out = []
    for a, wp, xp in zip(*(_split(builder, v, 2) for v in (acc, w, x)), strict=True):
        magnitude = simd._call(builder, "llvm.x86.avx2.psign.b", byte, wp, wp)
        signed = simd._call(builder, "llvm.x86.avx2.psign.b", byte, xp, wp)
        pairs = simd._call(builder, "llvm.x86.avx2.pmadd.ub.sw", short, magnitude, signed)
        fours = simd._call(builder, "llvm.x86.avx2.pmadd.wd", word, pairs, simd._constant(short, 1))
        out.append(builder.add(a, fours))
    return _join(builder, out)


def _dot_neon(builder: Any, acc: Any, w: Any, x: Any) -> Any:
    word = ir.VectorType(simd._i32, 4)
    parts = zip(*(_split(builder, v, 4) for v in (acc, w, x)), strict=True)
    return _join(builder, [simd._call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", word, *p) for p in parts])


def _dot_generic(builder: Any, acc: Any, w: Any, x: Any) -> Any:
    w, x = (builder.bitcast(v, I32x16.llvm) for v in (w, x))
    for byte in range(4):
        left, right = simd._constant(I32x16.llvm, 24 - 8 * byte), simd._constant(I32x16.llvm, 24)
        wb, xb = (builder.ashr(builder.shl(v, left), right) for v in (w, x))
        acc = builder.add(acc, builder.mul(wb, xb))
    return acc


# Those whose isa.weight_offset is 128 take weights as unsigned bytes w + 128, the others as signed bytes.
_DOTS = {
    "avx512_vnni": _dot_avx512_vnni,
    "avx_vnni": _dot_avx_vnni,
    "avx2": _dot_avx2,
    "neon_dot": _dot_neon,
    "generic": _dot_generic,
}


@simd._define(I32x16, I32x16, I8x64, I8x64)
def dot4(builder: Any, acc: Any, w: Any, x: Any) -> Any:
    """acc + the sums of products of each 4 adjacent bytes: lane j gets bytes 4j to 4j + 3.

    w: weights in -127 to 127, taken as w + isa.weight_offset; x: activations in -127 to 127. The caller takes
    isa.weight_offset * sum(x) back.
    """
    if detect().weight_offset:
        w = builder.xor(w, simd._constant(I8x64.llvm, -128))  # w + 128 as an unsigned byte
    return emit_dot4_packed(builder, acc, w, x)


def emit_dot4_packed(builder: Any, acc: Any, w: Any, x: Any) -> Any:
    """As dot4, for weights that were packed with the offset already added (GEMM panels): for code generators."""
    return _DOTS[detect().name](builder, acc, w, x)


@simd._define(I32x16, I32x16, I8x64, I8x64)
def dot4_packed(builder: Any, acc: Any, w: Any, x: Any) -> Any:
    """As dot4, for weights of a packed panel."""
    return emit_dot4_packed(builder, acc, w, x)
