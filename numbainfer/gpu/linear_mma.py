"""out = x @ W.T on tensor cores: for prompts, and for the tokens of several sequences at once.

A product may wait for what follows, to be one kernel with it: SwiGLU, or the norm of the residual stream.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from numbainfer.gpu.half_rows import HalfRows
from numbainfer.gpu.launch import Held, Stream
from numbainfer.gpu.memory import DeviceArray
from numbainfer.gpu.mma_kernel import CONSUMERS, product_kernel
from numbainfer.gpu.mma_plan import Plan, blocks_together, choose
from numbainfer.gpu.tile_store import NARROW
from numbainfer.quantization import AnyMatrix, QuantizedMatrix


def linear_mma(
    stream: Stream,
    x: HalfRows,
    weight: AnyMatrix,
    bias: DeviceArray | None,
    residual: DeviceArray | None,
    out: DeviceArray | HalfRows,
    plan: Plan | None = None,
    norm: tuple[DeviceArray, HalfRows] | None = None,
) -> None:
    """See registry.linear. `out` HalfRows: SwiGLU of the product, whose first half is the gate. norm: the weights of
    one that follows, and where what it divides goes, with its squares; of up to NARROW tokens."""
    (rows, columns), tokens = weight.shape, x.tokens
    gated = isinstance(out, HalfRows)
    target: tuple[Any, ...]
    if isinstance(out, HalfRows):
        rows, target = rows // 2, (None, out.data, out.rows, 1 / out.factor)
    elif norm is not None:
        target = (out, norm[1].data, norm[1].rows, 1 / norm[1].factor)
    else:
        target = (out, None, 0, 1.0)
    multiprocessors = stream.gpu.multiprocessors
    if isinstance(weight, QuantizedMatrix):
        kind, codes, scales, shift = "int8", weight.codes, weight.scales, weight.group.bit_length() - 1
    else:
        kind, codes, scales, shift = str(weight.data.dtype), weight.data, None, 0
    paired = stream.gpu.capability == (9, 0) and kind == "int8"
    plan = plan or choose(rows, columns, tokens, gated, multiprocessors, paired)
    needed = -(-tokens // plan.width) * plan.width  # rows: tiles are brought, and gated ones written, as a whole
    if min(x.rows, out.rows if isinstance(out, HalfRows) else x.rows) < needed:
        raise ValueError(f"linear: tiles of {plan.width} need room for {needed} tokens")
    if plan.width > NARROW and not (norm is None and x.squares is None):
        raise ValueError(f"linear: no norm is part of a product of {plan.width} tokens a tile")
    partial = counters = None
    if plan.splits > 1:
        partial = stream.scratch("partial", plan.tiles * plan.splits * CONSUMERS * plan.width // 2)
        counters = stream.counters(plan.tiles)
    cluster = 2 if plan.paired else 1
    items = plan.tiles // cluster * plan.splits
    clusters = blocks_together(plan.width) * multiprocessors // cluster
    stream.launch(
        product_kernel(kind, plan.width, plan.paired, gated),
        *(cluster * min(clusters, items), codes, scales, shift),
        *(x.data, x.rows, x.factor, bias, residual, *target),
        *(rows, columns, tokens, plan.splits, items, partial, counters),
        *(x.squares, x.eps, *((norm[0], norm[1].squares) if norm is not None else (None, None))),
        shared=plan.shared,
        cluster=cluster,
    )


def serves(weight: AnyMatrix) -> bool:
    """Whether `linear_mma` takes this matrix: rows have to begin at multiples of 16 bytes, and end with 16 columns."""
    return isinstance(weight, QuantizedMatrix) or (weight.data.dtype != np.float32 and weight.shape[1] % 16 == 0)


class HeldProduct(Held):
    """A product of many tokens, not launched yet: SwiGLU may follow and become part of it."""

    def __init__(self, stream: Stream, x: HalfRows, weight: QuantizedMatrix, bias: Any, out: DeviceArray) -> None:
        self.stream, self.x, self.weight, self.bias, self.out = stream, x, weight, bias, out

    def launch(self) -> None:
        """The product alone."""
        linear_mma(self.stream, self.x, self.weight, self.bias, None, self.out)

    def launch_gated(self, hidden: HalfRows) -> None:
        """SwiGLU of the product; the product itself is not written."""
        linear_mma(self.stream, self.x, self.weight, self.bias, None, hidden)


class HeldSum(Held):
    """A product added to the residual stream, of so few tokens that the norm which may follow can be a part of it."""

    def __init__(
        self, stream: Stream, x: HalfRows, weight: QuantizedMatrix, bias: Any, residual: DeviceArray, out: DeviceArray
    ) -> None:
        self.stream, self.x, self.weight, self.bias, self.residual, self.out = stream, x, weight, bias, residual, out

    def launch(self) -> None:
        """The product alone."""
        linear_mma(self.stream, self.x, self.weight, self.bias, self.residual, self.out)

    def launch_normed(self, weight: DeviceArray, normed: HalfRows) -> None:
        """The product, and what a norm of these weights divides, with the squares that it divides by."""
        linear_mma(self.stream, self.x, self.weight, self.bias, self.residual, self.out, norm=(weight, normed))
