"""Fragments of matrices (fragments.py, products.py) in Python: computed as they are emitted, for a warp at once, in the
form of `mma.sync`. See simt.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from simt_instructions import F32, I32, check, read_global, shared_store_floats, shared_store_half, write_global
from simt_world import Steps, exchange, now

from numbainfer.gpu import ptx


class _Numbers(np.ndarray):
    """Of some lanes, in place of a value of the compiler's."""

    type = ir.IntType(32)  # nobody looks at it


def _value(operand: Any) -> Any:
    """Of an operand of an emitted instruction: a number of each lane, or a constant."""
    return operand.constant if isinstance(operand, ir.Constant) else operand


def _of_values(operation: Callable) -> Callable:
    return lambda self, *operands: operation(*map(_value, operands))


class _Lanes:
    """In place of the compiler's builder: computes what is emitted, for some lanes of a warp."""

    fmul, fadd, fsub = (_of_values(operation) for operation in (np.multiply, np.add, np.subtract))
    mul, add, sub, and_, or_, xor, shl, lshr = (
        _of_values(operation)
        for operation in (
            *(np.multiply, np.add, np.subtract, np.bitwise_and, np.bitwise_or, np.bitwise_xor),
            *(np.left_shift, np.right_shift),
        )
    )

    select = _of_values(lambda condition, a, b: np.where(condition, a, b).view(_Numbers))

    def icmp_signed(self, relation: str, a: Any, b: Any) -> Any:
        return {">=": np.greater_equal, "<=": np.less_equal}[relation](_value(a), _value(b))

    def zext(self, value: Any, kind: Any) -> Any:
        return value

    def extract_value(self, values: Any, i: int) -> Any:
        return values[i]

    def call(self, function: Any, operands: list, attrs: Any) -> Any:
        """An inline assembly; one with an offset to an address has that as its first operand."""
        name = next(name for name in _ASSEMBLY if name in function.asm)
        first, *others = map(_value, operands)
        offset = re.search(r"\[\$\d\+(\d+)\]", function.asm)
        out = _ASSEMBLY[name](first + int(offset[1]) if offset else first, *others)
        return None if out is None else np.asarray(out).view(_Numbers)


def _each_lane(function: Callable) -> Callable:
    """Of each lane, whose function may return several numbers."""

    def of_lanes(*operands: Any) -> Any:
        lanes = [values.tolist() for values in np.broadcast_arrays(*operands)]
        found = [function(*each) for each in zip(*lanes, strict=True)]
        return np.array(found, np.float32).T if found[0] is not None else None

    return of_lanes


def _load_matrices(address: Any) -> list:
    """ldmatrix: lane 8m + i has the address of row i of matrix m, of which a row's word t goes to lane 4i + t."""
    at = np.asarray(address).reshape(4, 8, 1) + 4 * np.arange(4)
    assert not (at[..., 0] % 16).any(), "misaligned"
    return list(np.asarray(now.thread.block.words)[at >> 2].astype(np.int64).reshape(4, 32))


def _load_transposed(address: Any) -> list:
    """The same of each matrix's transpose."""
    halves = np.array(_load_matrices(address), np.int32).view(np.float16).reshape(4, 8, 8)
    return list(halves.transpose(0, 2, 1).copy().view(np.int32).astype(np.int64).reshape(4, 32))


def _multiply_tiles(*operands: Any) -> np.ndarray:
    """PTX ISA, "matrix fragments for mma.m16n8k16"."""
    c = np.array(operands[:4], np.float64).reshape(2, 2, 8, 4)  # [half of the rows, odd column, g, t]
    words = np.array([np.broadcast_to(word, 32) for word in operands[4:]]).astype(np.int32)
    halves = words.view(np.float16).astype(np.float64).reshape(6, 8, 4, 2)  # [register, g, t, odd column]
    a = halves[:4].reshape(2, 2, 8, 4, 2).transpose(1, 2, 0, 3, 4).reshape(16, 16)
    b = halves[4:].transpose(1, 0, 2, 3).reshape(8, 16)
    product = (a @ b.T).reshape(2, 8, 4, 2).transpose(0, 3, 1, 2)
    return (c + product).astype(np.float32).reshape(4, 32)


def _to_half(*values: Any) -> np.ndarray:
    """The bits of a number as float16, or of two, the first in the lower half."""
    halves = [np.clip(value, -65504, 65504).astype(np.float16).view(np.uint16) for value in values]
    return halves[0] if len(halves) == 1 else np.stack(halves, -1).view(np.int32)[..., 0]


_ASSEMBLY: dict[str, Callable] = {
    "ldmatrix.sync.aligned.m8n8.x4.shared": _load_matrices,
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared": _load_transposed,
    "mma.sync.aligned.m16n8k16": _multiply_tiles,
    "ld.shared.v2.f32": _each_lane(lambda at: now.thread.block.floats[(n := check(at, 8) >> 2) : n + 2]),
    "st.shared.f32": _each_lane(shared_store_floats),
    "st.shared.b16": _each_lane(shared_store_half),
    "ld.global.cg.v4.f32": _each_lane(read_global(F32, 4)),
    "st.global.v4.f32": _each_lane(write_global(F32, 4)),
    "st.global.v2.f32": _each_lane(write_global(F32, 2)),
    "st.global.b32": _each_lane(write_global(I32)),
    "max.f32 $0": np.maximum,
    "ex2.approx": np.exp2,
    "rcp.approx": np.reciprocal,
    "cvt.rn.f16.f32": _to_half,
    "cvt.rn.f16x2.f32": _to_half,
}


def _lanes_of(kind: Any, values: tuple) -> Any:
    """A parameter's values in all lanes."""
    if isinstance(kind, types.UniTuple):
        return [_lanes_of(kind.dtype, each) for each in zip(*values, strict=True)]
    return np.array(values, np.float32 if kind is types.float32 else np.int64).view(_Numbers)


def _of_lanes(body: Callable, arguments: tuple, lanes: list) -> list:
    """What a function of fragments returns, in each lane."""
    target, ptx.target = ptx.target, (8, 0)
    try:
        out = body(_Lanes(), *map(_lanes_of, arguments, zip(*lanes, strict=True)))
    finally:
        ptx.target = target
    if not isinstance(out, list):
        return [None] * len(lanes) if out is None else list(out)
    return list(zip(*(np.broadcast_to(_as_number(each), len(lanes)) for each in out), strict=True))


def _as_number(value: Any) -> np.ndarray:
    """Of a lane or several: floats of 32 bits, also constants."""
    values = np.asarray(_value(value))
    return values.astype(np.float32) if values.dtype.kind == "f" else values


def fragment_function(body: Callable, arguments: tuple, result: Any) -> Callable:
    def function(*values: Any) -> Steps:
        lanes = yield from exchange(values)
        if len(lanes) == 32:  # who is first computes it for all
            lanes.append(_of_lanes(body, arguments, list(lanes)))
        return lanes[32][now.thread.lane]

    def store(*values: Any) -> None:
        """A lane by itself: others of its warp may have nothing to store."""
        _of_lanes(body, arguments, [values])

    return store if result == types.void else function
