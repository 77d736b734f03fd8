"""A step of one token as one kernel: tables of a model's weights, the vectors that blocks exchange, the launch."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np

from numbainfer.gpu.attention_core import MOST_PARTS, heads_together
from numbainfer.gpu.launch import Stream
from numbainfer.gpu.memory import DeviceArray
from numbainfer.gpu.token_kernel import _token
from numbainfer.gpu.token_plan import (
    AREAS,
    COLUMNS,
    ENTRIES,
    NORM,
    NUMBERS,
    ROLE,
    WARPS,
    Plan,
    Shape,
    cut,
    make_plan,
    slot_size,
)
from numbainfer.memory import MemoryPool
from numbainfer.quantization import QuantizedMatrix

RESERVED = 1 << 10  # bytes of a block's shared memory that are not the plan's

# How fast a small model is depends, by 2 to 3% each, on which multiprocessor is which block, and on where the vectors
# are that blocks exchange. What is near to what, and which addresses are in one part of the second-level cache, is
# nothing that one can ask. So TRIES arrangements are timed, of TRIED tokens behind a text of BEHIND: each differs from
# the fastest so far in the place of a vector, of PLACES in memory, or in up to SOME blocks. On an H200 that takes
# 0.5 to 0.8 s (0.5B and 1B); with more than SMALL bytes of weights it hardly matters.
TRIES, PLACES, SOME, RETIMED = 160, 16, 40, 16
TRIED, BEHIND = 8, 192
SMALL = 2 << 30
ALIGNED = 64  # numbers; 256 bytes


class TokenStep:
    """One token through all layers, in one launch. `launch` may be captured; the model's arrays have to stay."""

    def __init__(
        self, stream: Stream, pool: MemoryPool, plan: Plan, blocks: int, shapes: list[Shape], model: Any
    ) -> None:
        self.stream, self.pool, self.plan, self.blocks = stream, pool, plan, blocks
        self.config, self.cache, self.embedding = model.config, model.cache, model.embedding
        self.cos, self.sin = model.cos, model.sin
        self.kernel = _token(*plan.numbers)
        config, self.held = model.config, list[DeviceArray]()
        self.units = config.heads // plan.shared
        self.parts_shift = min(MOST_PARTS, max(1, blocks // self.units)).bit_length() - 1
        parts = self.units << self.parts_shift
        table = _table(model)
        self.table = self._new(table.shape, table.dtype)
        self.table[...] = table
        # Of each block what it has; `shapes` has them by multiprocessors.
        self.rows = np.zeros((blocks, NUMBERS), np.int32)
        self.rows[:, :ROLE] = np.hstack([block_shares(shape, blocks, plan.slot_codes) for shape in shapes])
        self.rows[:, ROLE] = np.arange(blocks)
        self.shapes = self._new(self.rows.shape, np.int32)
        self.part_values = self._new(parts * plan.shared * plan.head_dim, np.int64)
        self.part_statistics = self._new(parts * plan.shared * 2, np.int64)
        # How many launches and choices of a token there were, and launches of each row of `shapes`.
        self.state, self.best = self._new(2 + blocks, np.int32), self._new(blocks, np.int64)
        # What blocks exchange: x, qkv, mixed, inner.
        self.sizes = config.hidden_size, shapes[0].pairs, AREAS * (plan.mixed + 2 * config.heads), shapes[3].width
        self.starts = [0, *accumulate(-(-size // ALIGNED) * ALIGNED for size in self.sizes)]
        self.places = self._new((PLACES, self.starts[-1]), np.float32)
        self._arrange(np.arange(blocks), [0] * len(self.sizes))

    def _new(self, shape: int | tuple[int, ...], dtype: Any) -> DeviceArray:
        array = self.pool.empty(shape, dtype)
        self.held.append(array)
        return array

    def _place(self, vector: int, place: int) -> DeviceArray:
        """One of the places for one of the vectors."""
        start = self.starts[vector]
        return self.places[place, start : start + self.sizes[vector]]

    def _arrange(self, order: np.ndarray, places: list[int]) -> None:
        """Which block each multiprocessor is, and where each vector is, as if nothing had been computed yet."""
        self.shapes[...] = self.rows[order]
        self.vectors = [self._place(vector, place) for vector, place in enumerate(places)]
        for vector in self.vectors:  # no number's tag is right before the first is written: the first tag is 0
            vector[...] = np.full(vector.shape, -1, np.int32).view(np.float32)
        self.part_values[...] = self.part_statistics[...] = self.state[...] = 0
        self.best[...] = np.full(self.best.shape, -1, np.int64)

    def find_arrangement(self) -> None:
        """Takes a fast one. Before the first step: what is tried writes to the cache."""
        generator, order, places = np.random.default_rng(0), np.arange(self.blocks), [0] * len(self.sizes)
        fastest = self._seconds(order, places)
        for i in range(TRIES):
            if i % RETIMED == 0:  # the first time is that of a GPU that was idle; a later one may have been luck
                fastest = self._seconds(order, places)
            new_order, new_places = order.copy(), list(places)
            if i % 3 == 0:
                vector = i // 3 % len(places)
                new_places[vector] = int(places[vector] + generator.integers(1, PLACES)) % PLACES
            else:
                some = generator.permutation(self.blocks)[: max(2, SOME * (TRIES - i) // TRIES)]
                new_order[some] = np.roll(new_order[some], 1)
            seconds = self._seconds(new_order, new_places)
            if seconds < fastest:
                fastest, order, places = seconds, new_order, new_places
        self._arrange(order, places)

    def _seconds(self, order: np.ndarray, places: list[int]) -> float:
        """That TRIED tokens take, without the head."""
        self._arrange(order, places)
        nothing, positions = self.pool.zeros(1, np.int32), self.pool.empty(1, np.int32)
        positions[...] = min(BEHIND, self.cos.shape[0] - 1)
        with self.stream.capture() as program:
            for _ in range(TRIED):
                self.launch(nothing, positions, nothing, None, None)
        (seconds,) = self.stream.time([program])
        self.pool.release(nothing)
        self.pool.release(positions)
        return seconds

    def launch(self, tokens: Any, positions: Any, sequences: Any, logits: Any, history: Any) -> None:
        """tokens, positions, sequences [1]; logits [1, vocabulary] or None for none of them. history: see
        registry.greedy, which is then done too; or None."""
        config, embedding, plan = self.config, self.embedding, self.plan
        self.stream.launch(
            self.kernel,
            self.blocks,
            *(self.table, self.shapes, config.layers, int(logits is not None)),
            *(tokens, positions, sequences),
            *(embedding.codes, embedding.scales, config.vocab_size),
            *(config.heads, config.kv_heads, config.heads // config.kv_heads // plan.shared),
            *(config.head_dim**-0.5, config.norm_eps, self.cos.shape[1], self.cos, self.sin),
            *(self.cache.page_table, self.cache.page_table.shape[1], self.parts_shift),
            *(*self.vectors, self.part_values, self.part_statistics, self.state),
            *(logits, self.best, history, 0 if history is None else len(history)),
            shared=plan.nbytes,
            together=True,
        )

    def release(self) -> None:
        """Gives its memory back to the pool."""
        for array in self.held:
            self.pool.release(array)


def block_shares(shape: Shape, blocks: int, slot_codes: int) -> np.ndarray:
    """What each block has of a kind of matrix, int32 [blocks, SHAPE]: its first row, how many, columns, log2 of their
    parts; columns of a part, log2 of a row's pieces, slots of the ring that hold the block's, 65536 / pieces of a slot,
    rounded up; its first piece, how many, columns of a piece, how many a slot has: as many in each."""
    block = np.arange(blocks)
    first = block * shape.pairs // blocks
    count = (block + 1) * shape.pairs // blocks - first
    pieces, most = count * shape.split, slot_codes // shape.piece
    of_slot = (pieces - 1) // -(-pieces // most) + 1
    log_parts, log_split = shape.parts.bit_length() - 1, shape.split.bit_length() - 1
    numbers = [
        *(first, count, shape.width, log_parts),
        *(shape.part, log_split, -(-pieces // of_slot), 65536 // of_slot + 1),
        *(first * shape.split, pieces, shape.piece, of_slot),
    ]
    return np.stack([np.broadcast_to(number, blocks) for number in numbers], axis=1).astype(np.int32)


def _table(model: Any) -> np.ndarray:
    """The pointers of token_plan.py, int64 [layers + 1, COLUMNS]."""

    def run(weight: Any, row: int = 0) -> list[int]:
        """From a row on."""
        codes, scales = weight.codes, weight.scales
        return [codes.pointer + row * codes.shape[1], scales.pointer + 2 * row * scales.shape[1]]

    def pointer(array: Any, first: int = 0) -> int:
        return 0 if array is None else array.pointer + 4 * first

    table = np.zeros((len(model.layers) + 1, COLUMNS), np.int64)
    for row, layer, k_pages, v_pages in zip(
        table, model.layers, model.cache.k_pages, model.cache.v_pages, strict=False
    ):
        up = layer.gate_up.shape[0] // 2
        biases = (layer.qkv_bias, layer.output_bias, layer.gate_up_bias)
        row[:23] = [
            *(*run(layer.qkv), *run(layer.output), *run(layer.gate_up), *run(layer.gate_up, up), *run(layer.down)),
            *(*map(pointer, biases), pointer(layer.gate_up_bias, up), pointer(layer.down_bias)),
            *(pointer(layer.attention_norm), pointer(layer.mlp_norm), k_pages.pointer, v_pages.pointer),
            *(pointer(layer.q_norm), pointer(layer.k_norm), layer.window, int(layer.rotated)),
        ]
    table[-1, :2], table[-1, NORM] = run(model.head), pointer(model.norm)
    return table


def token_step(stream: Stream, pool: MemoryPool, model: Any) -> TokenStep | None:
    """See registry.token_step."""
    config, layers, gpu = model.config, model.layers, stream.gpu
    of_layers = [(layer.qkv, layer.output, layer.gate_up, layer.down) for layer in layers]
    matrices = [matrix for row in of_layers for matrix in row] + [model.embedding, model.head]
    if gpu.capability != (9, 0) or not all(isinstance(matrix, QuantizedMatrix) for matrix in matrices):
        return None
    alike = len({tuple(matrix.shape for matrix in row) for row in of_layers}) == 1
    groups = {matrix.group for matrix in matrices}
    turned = 2 * model.cos.shape[1] == config.head_dim or not any(layer.rotated for layer in layers)
    if not (alike and len(groups) == 1 and turned and config.head_dim in (64, 128)):
        return None
    if model.cache.k_pages[0].dtype != np.float16:
        return None
    group, shared = groups.pop(), heads_together(config.heads, config.kv_heads)
    kinds = list(zip((*of_layers[0], model.head), (1, 1, 2, 1, 1), strict=True))
    # Every block has to have rows of every matrix: see token_kernel.py.
    blocks = min(gpu.multiprocessors, *(matrix.shape[0] // halves for matrix, halves in kinds))
    sizes = [(matrix.shape[0] // halves, matrix.shape[1]) for matrix, halves in kinds]
    slot = slot_size(sizes, blocks)
    cuts = [
        cut(pairs, halves, width, group, blocks, WARPS, slot)
        for (pairs, width), (_, halves) in zip(sizes, kinds, strict=True)
    ]
    shapes = [shape for shape in cuts if shape is not None]
    if len(shapes) < len(cuts):
        return None
    plan = make_plan(
        *(config.head_dim, shared, config.layers, config.hidden_size, group, shapes, blocks, WARPS, slot),
        gpu.shared_memory - RESERVED,
        gpu.memory_rate,
    )
    if plan is None or not _fits(plan, blocks, shapes, layers[0], config.heads // shared):
        return None
    step = TokenStep(stream, pool, plan, blocks, shapes, model)
    if model.head.codes.size + sum(matrix.codes.size for row in of_layers for matrix in row) < SMALL:
        step.find_arrangement()
    return step


def _fits(plan: Plan, blocks: int, shapes: list[Shape], layer: Any, units: int) -> bool:
    """Whether the kernel's simplifications hold: a thread for what a block has of some things, numbers that fit."""
    threads = 32 * plan.warps
    rows = [-(-shape.pairs // blocks) for shape in shapes]
    biases = (layer.qkv_bias, layer.output_bias, layer.gate_up_bias, layer.down_bias)
    biased = [count * shape.parts for count, shape, bias in zip(rows, shapes, biases, strict=False) if bias is not None]
    pieces = [count * shape.split for count, shape in zip(rows, shapes, strict=True)]
    per_slot = [plan.slot_codes // shape.piece for shape in shapes]
    return (
        max(blocks, rows[1], *biased) <= threads
        and units <= blocks
        and max(pieces) + ENTRIES * plan.warps < 1 << 15  # times 65536 / rows of a slot, in 32 bits
        and all(count * some < 1 << 16 for count, some in zip(pieces, per_slot, strict=True))
    )
