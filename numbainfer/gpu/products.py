"""Products of tiles on the tensor cores: wgmma where it is (sm_90), mma.sync elsewhere.

Both take the left matrix and leave the result in the same registers, as fragments.py describes them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types

from numbainfer.gpu import ptx
from numbainfer.gpu.fragments import FLOAT, INT, LONG, asm, constant, fragment, over_fragment


@cache
def multiply(width: int, steps: int = 4, *, transposed: bool = False) -> Any:
    """multiply(acc, a, address, lane) -> acc + a @ B

    acc: fragment of 16 x width. a: 16 words of float16 pairs: for each 16 columns the four words that mma.m16n8k16
    takes, of which the first `steps` times 16 columns count. B: 64 x 64 float16 at `address` in shared memory, in
    lines of 128 bytes, 16-byte chunk c of line i at place c XOR (i mod 8). Line i is column i of B, so that there are
    `width` lines, or row i (transposed).

    On sm_90 the product of a whole warpgroup, which goes on after this returns: `acc` and `a` must be left alone until
    `wait_for_products` or `finished`. Elsewhere the product of a warp, done at once.
    """

    @over_fragment(fragment(width), fragment(width), types.UniTuple(types.int32, 16), types.int32, types.int32)
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
    start = builder.and_(builder.lshr(address, constant(4)), constant(0x3FFF))
    start = builder.zext(builder.or_(start, constant(1 << 16)), LONG)
    descriptor = builder.or_(start, ir.Constant(LONG, 64 << 32 | 1 << 62))
    struct = ir.LiteralStructType([FLOAT] * count)
    out = asm(builder, struct, " ".join(lines), constraints, [*acc, *a, descriptor])
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
    line = builder.and_(lane, constant(7))
    line16 = builder.add(line, builder.and_(builder.lshr(lane, constant(1)), constant(8)))
    second = builder.and_(builder.lshr(lane, constant(3)), constant(1))
    base = builder.add(address, builder.shl(line16, constant(7)))

    def load(step: int, j: int) -> list:
        chunk = builder.xor(builder.or_(second, constant(2 * step)), line)
        place = builder.add(base, builder.shl(chunk, constant(4)))
        return _ldmatrix(builder, builder.add(place, constant(j * 1024)))

    return load


def _transposed_lines(builder: Any, address: Any, lane: Any) -> Callable:
    """The same for B in rows: 0 and 1 are one chunk of lines 0 to 7 and 8 to 15, 2 and 3 the next chunk."""
    line = builder.and_(lane, constant(7))
    base = builder.add(address, builder.shl(builder.and_(lane, constant(15)), constant(7)))
    second = builder.lshr(lane, constant(4))

    def load(step: int, j: int) -> list:
        chunk = builder.xor(builder.add(second, constant(j)), line)
        place = builder.add(base, builder.shl(chunk, constant(4)))
        return _ldmatrix(builder, builder.add(place, constant(step * 2048)), transposed=True)

    return load


@cache
def finished(width: int) -> Any:
    """finished(acc) -> acc, once all products started by this warpgroup are done."""
    count = width // 2
    constraints = ",".join(["=f"] * count + [str(i) for i in range(count)] + ["~{memory}"])

    @over_fragment(fragment(width), fragment(width))
    def fragment_finished(builder, acc):
        if ptx.target != (9, 0):
            return acc
        struct = ir.LiteralStructType([FLOAT] * count)
        out = asm(builder, struct, "wgmma.wait_group.sync.aligned 0;", constraints, acc)
        return [builder.extract_value(out, i) for i in range(count)]

    return fragment_finished


@over_fragment(types.void)
def wait_for_products(builder):
    """Waits until at most one product of this warpgroup is under way."""
    if ptx.target == (9, 0):
        asm(builder, ir.VoidType(), "wgmma.wait_group.sync.aligned 1;", "~{memory}", [])


def _ldmatrix(builder: Any, address: Any, *, transposed: bool = False) -> list:
    """Four 8 x 8 matrices of float16 out of shared memory, a row per lane's address (PTX: ldmatrix)."""
    kind = "ldmatrix.sync.aligned.m8n8.x4" + (".trans" if transposed else "") + ".shared.b16"
    struct = ir.LiteralStructType([INT] * 4)
    out = asm(builder, struct, kind + " {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r,~{memory}", [address])
    return [builder.extract_value(out, i) for i in range(4)]


def _mma(builder: Any, acc: list, a: list, b: list) -> list:
    """acc[16 x 8] + a[16 x 16] @ b[16 x 8]"""
    struct = ir.LiteralStructType([FLOAT] * 4)
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $13}, "
        "{$0, $1, $2, $3};"
    )
    constraints = "=f,=f,=f,=f,0,1,2,3,r,r,r,r,r,r"
    out = asm(builder, struct, text, constraints, [*acc, *a, *b], effects=False)
    return [builder.extract_value(out, i) for i in range(4)]
