"""The one decoder-only model: it walks the layer specs and calls bound operators. It knows no device.

A step takes T tokens, each with its position and its sequence: a prompt chunk, one token of one sequence, or one token
of each of several. The walk is captured once per T as a program, and replayed for every later step of that size.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from numbainfer.checkpoint import Weights
from numbainfer.config import ModelConfig
from numbainfer.kv_cache import KVCache
from numbainfer.kv_cache import Sequence as KVSequence
from numbainfer.layers import read_layers
from numbainfer.mixture import MixtureWorkspace, mix
from numbainfer.progress import Progress, silent
from numbainfer.quantization import AnyMatrix, Matrix, QuantizedMatrix, QuantizedRows
from numbainfer.registry import Operators

AHEAD = 4  # steps that greedy decoding may be ahead of who reads its tokens
GREEDY = -1  # in place of a number of rows: a step that also chooses its tokens and goes on to the next position
_KEPT_PROGRAMS = 16


class UploadedWeights:
    """Weights put on a device as they are asked for (checkpoint.Weights)."""

    def __init__(self, ops: Operators, weights: Weights, progress: Progress | None) -> None:
        self.config, self.name = weights.config, weights.name
        self._ops, self._weights, self._held = ops, weights, list[Any]()
        self._progress, self._copied = progress or silent, 0  # bytes

    def matrix(self, names: Sequence[str]) -> AnyMatrix:
        """See checkpoint.Weights."""
        host = self._weights.matrix(names)
        matrix = self._ops.upload(host)
        if isinstance(matrix, QuantizedMatrix) and isinstance(host, QuantizedMatrix):
            self._hold(matrix.codes, host.codes)
            self._hold(matrix.scales, host.scales)
        elif isinstance(host, Matrix):
            self._hold(matrix.data, host.data)
        return matrix

    def vector(self, names: Sequence[str]) -> Any:
        """See checkpoint.Weights."""
        return self.array(self._weights.vector(names))

    def array(self, host: np.ndarray) -> Any:
        """An array on the device."""
        return self._hold(self._ops.upload(host), host)

    def _hold(self, array: Any, host: np.ndarray) -> Any:
        if array is not host:  # a copy, from the pool
            self._held.append(array)
            self._copied += host.nbytes
            self._progress(f"copying to {self._ops.device}", self._copied, max(self._copied, self.nbytes))
        return array

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self._weights.nbytes

    def release(self) -> None:
        """Gives the copies back to the pool."""
        for array in self._held:
            self._ops.pool.release(array)
        self._held = []


@dataclass
class _GreedyRun:
    """Greedy decoding under way: tokens, those of the step to yield next; lengths, of the sequences at its start."""

    tokens: list[int]
    lengths: list[int]
    launched: int = 0  # steps
    yielded: int = 0
    marks: deque[Callable[[], None]] = field(default_factory=deque)  # of steps under way
    results: deque[list[int]] = field(default_factory=deque)  # of steps that are done and not yielded


class Model:
    """Weights, KV cache and workspace on one device; `step` runs tokens through them.

    eager: run every operator at once instead of capturing (for debugging; the numbers are the same).
    """

    def __init__(
        self,
        ops: Operators,
        weights: Weights,
        ctx_size: int,
        *,
        sequences: int = 1,
        chunk: int | None = None,
        eager: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.ops = ops
        self.config = config = weights.config
        self.chunk = min(chunk or ops.backend.CHUNK, max(ctx_size, sequences))  # a token of each sequence fits too
        self.eager = eager
        self.runs_ahead: bool = ops.backend.RUNS_AHEAD  # `greedy` is faster than steps one by one
        weights = self._weights = UploadedWeights(ops, weights, progress)
        self.layers = list(read_layers(weights))
        self.embedding = weights.matrix(["model.embed_tokens.weight"])
        self.norm = weights.vector(["model.norm.weight"])
        self.head = self.embedding if config.tied_embeddings else weights.matrix(["lm_head.weight"])
        # float32 models are there for fidelity, so their cache is float32 too
        exact = isinstance(self.embedding, Matrix) and self.embedding.data.dtype == np.float32
        dtype = np.float32 if exact else np.float16
        self.cache = KVCache(ops.pool, config, ctx_size, dtype=dtype, sequences=sequences)
        tables = rope_tables(config, np.arange(ctx_size))  # [positions, r / 2] float32
        self.cos, self.sin = (weights.array(table) for table in tables)
        self._programs: OrderedDict[tuple[int, int, bool], Any] = OrderedDict()  # by what `program` takes
        self._running: _GreedyRun | None = None  # that the device is going on with
        self._chosen: dict[int, np.ndarray] = {}  # by B: the latest tokens of greedy decoding, by position
        self._allocate()
        self.token_step = ops.backend.token_step(ops.stream, ops.pool, self)

    def _allocate(self) -> None:
        """The workspace of a step of up to `chunk` tokens."""
        pool, config, T = self.ops.pool, self.config, self.chunk
        self._tokens, self._positions, self._sequences = (pool.zeros(T, np.int32) for _ in range(3))
        self._x = pool.empty((T, config.hidden_size), np.float32)
        self._qkv = pool.empty((T, self.layers[0].qkv.shape[0]), np.float32)
        self._gate_up = pool.empty((T, 2 * config.intermediate_size), np.float32)
        mixtures = any(layer.mixture for layer in self.layers)
        self._mixture_space = MixtureWorkspace(pool, config, T) if mixtures else None
        # Made before any launch: a buffer made between two operators would part those that a device runs as one.
        self._inputs: dict[tuple, Any] = {}
        for layer in self.layers:
            self._input(layer.qkv, "attention_in", T)
            self._input(layer.output, "attention_out", T)
            if layer.mixture is None:
                self._input(layer.gate_up, "mlp_in", T)
                self._input(layer.down, "mlp_hidden", T)
        self._input(self.head, "head_in", T)
        self._logits = pool.empty((len(self.cache.page_table), config.vocab_size), np.float32)  # a row per sequence

    def _input(self, matrix: AnyMatrix, role: str, tokens: int, most: int = 0) -> Any:
        """The buffer that holds a matrix's input: float32, or int8 in the matrix's groups. most: the rows that it ever
        holds, if not one for each token of a chunk."""
        key = (role, matrix.shape[1], getattr(matrix, "group", None))
        if key not in self._inputs:
            self._inputs[key] = matrix.input_buffer(self.ops.pool, most or self.chunk)
        buffer = self._inputs[key]
        if isinstance(buffer, QuantizedRows):
            return buffer.first(tokens, self.ops.backend.activation_planes(tokens))
        return buffer[:tokens]

    def step(
        self,
        tokens: Sequence[int],
        positions: Any,
        sequences: Any,
        logits: str | int = "last",
        length: int = 0,
    ) -> np.ndarray | None:
        """Runs T tokens (T <= chunk) through the model, storing their keys and values in the cache.

        positions, sequences: per token, its position and its sequence's row in the page table; a sequence's tokens
        follow each other, with others between them or not. logits: of how many tokens at the step's end to compute
        them, "none" for 0, "last" for 1, "all" for T. length: of the longest prompt that tokens are part of, for RoPE
        that depends on it ("dynamic"); 0 for tokens that come one after another. The array returned is float32
        [tokens, vocabulary] and lives until the next step; None for 0.
        """
        self._settle()
        T = len(tokens)
        rows = {"none": 0, "last": 1, "all": T}[logits] if isinstance(logits, str) else logits
        self._tokens[:T] = tokens
        self._positions[:T] = positions
        self._sequences[:T] = sequences
        if self.config.rope_scaling.kind == "dynamic":
            self._set_rope_rows(np.asarray(positions), length)
        if len(self._logits) < rows:
            self.ops.pool.release(self._logits)
            self._logits = self.ops.pool.empty((rows, self.config.vocab_size), np.float32)
            self._programs.clear()
        apart = T == 1 or len(np.unique(sequences)) == T
        if self.eager:
            self._launch(T, rows, apart, None)
        else:
            self.program(T, rows, apart).run()
        return self.ops.download(self._logits[:rows]) if rows else None

    def greedy(
        self, tokens: Sequence[int], sequences: Sequence[KVSequence], count: int
    ) -> Generator[list[int], None, None]:
        """Greedy decoding of several sequences at once: appends a token to each and yields the ones that follow, then
        appends these, `count` times in all.

        The device goes on by itself: it is up to AHEAD steps further than what was yielded. Closing the iterator
        cuts the sequences back to what was yielded and appended. Other steps may be run in between.
        """
        run = _GreedyRun(list(tokens), [len(sequence) for sequence in sequences])
        try:
            for done in range(count):
                while run.launched < min(count, done + AHEAD):
                    self._launch_greedy(run, sequences)
                if not run.results:
                    self._collect(run)
                for sequence, length, token in zip(sequences, run.lengths, run.tokens, strict=True):
                    sequence.tokens[length + done] = token
                run.tokens = run.results.popleft()
                run.yielded = done + 1
                yield list(run.tokens)
        finally:
            self._settle()
            for sequence, length in zip(sequences, run.lengths, strict=True):
                self.cache.truncate(sequence, length + run.yielded)

    def _launch_greedy(self, run: _GreedyRun, sequences: Sequence[KVSequence]) -> None:
        """Queues the next step of a run."""
        B = len(sequences)
        positions = [length + run.launched for length in run.lengths]
        if self._running is not run:  # the first step, or another's came in between
            self._settle()
            self._tokens[:B] = run.results[-1] if run.results else run.tokens
            self._positions[:B] = positions
            self._sequences[:B] = [sequence.row for sequence in sequences]
            self._running = run
        if self.config.rope_scaling.kind == "dynamic":
            self._set_rope_rows(np.asarray(positions), 0)
        for sequence in sequences:
            self.cache.append(sequence, [0])  # which one it is becomes known later
        self.program(B, GREEDY, True).run()
        run.marks.append(self.ops.backend.mark(self.ops.stream))
        run.launched += 1

    def _collect(self, run: _GreedyRun) -> None:
        """Waits for a run's oldest step under way, and takes its tokens."""
        run.marks.popleft()()
        step = run.yielded + len(run.results) + 1
        history = self._chosen[len(run.lengths)]
        rows = [(length + step) % len(history) for length in run.lengths]
        run.results.append([int(history[row, i]) for i, row in enumerate(rows)])

    def _settle(self) -> None:
        """Ends the running ahead of greedy decoding: others want to use the device."""
        run, self._running = self._running, None
        while run is not None and run.marks:
            self._collect(run)

    def _set_rope_rows(self, positions: np.ndarray, length: int) -> None:
        """Rewrites the tables at these positions, for RoPE that depends on the length."""
        for run in np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1):  # that follow each other
            at = slice(int(run[0]), int(run[-1]) + 1)
            self.cos[at], self.sin[at] = rope_tables(self.config, run, length)

    def can_share(self, sequence: KVSequence, length: int) -> bool:
        """Whether what the cache holds of a sequence can serve a text of that length that begins alike. Not where RoPE
        depends on the length ("dynamic") and one of them is beyond the original context."""
        scaling = self.config.rope_scaling
        return scaling.kind != "dynamic" or max(len(sequence), length) <= scaling.original_max_positions

    def release(self) -> None:
        """Gives the cache and the workspace back to the pool; the model can't run any more."""
        self._programs.clear()
        if self.token_step is not None:
            self.token_step.release()
        self.cache.release()
        for buffer in self._inputs.values():
            buffer.release(self.ops.pool) if isinstance(buffer, QuantizedRows) else self.ops.pool.release(buffer)
        if self._mixture_space is not None:
            self._mixture_space.release(self.ops.pool)
        for array in (self._tokens, self._positions, self._sequences, self._x, self._qkv, self._gate_up, self._logits):
            self.ops.pool.release(array)
        self._weights.release()

    def program(self, T: int, rows: int, apart: bool) -> Any:
        """The captured step of T tokens, with so many rows of logits, or GREEDY. apart: each of another sequence."""
        key = T, rows, apart
        program = self._programs.get(key)
        if program is None:
            with self.ops.stream.capture() as program:
                history = None
                if rows == GREEDY:
                    history, self._chosen[T] = self.ops.backend.shared_array(self.ops.stream, (2 * AHEAD, T), np.int32)
                self._launch(T, T if rows == GREEDY else rows, apart, history)
            self._programs[key] = program
            if len(self._programs) > _KEPT_PROGRAMS:
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        return program

    def _launch(self, T: int, rows: int, apart: bool, history: Any) -> None:
        """Everything of a step; with `history`, registry.greedy too."""
        inputs = self._tokens[:T], self._positions[:T], self._sequences[:T]
        if T == 1 and self.token_step is not None:
            self.token_step.launch(*inputs, self._logits[:1] if rows else None, history)
            return
        self._walk(T, rows, apart)
        if history is not None:
            self.ops.greedy(self._logits[:T], *inputs[:2], history)

    def _walk(self, T: int, rows: int, apart: bool) -> None:
        """The forward pass, with logits of the last `rows` tokens. apart: no two are of one sequence.

        Shapes: x [T, D], qkv [T, (H + 2 K) d], gate_up [T, 2 F].
        """
        ops, config, cache = self.ops, self.config, self.cache
        heads, eps = config.heads, config.norm_eps
        positions, sequences = self._positions[:T], self._sequences[:T]
        x, qkv, gate_up = self._x[:T], self._qkv[:T], self._gate_up[:T]
        scale = config.head_dim**-0.5

        ops.embedding(self._tokens[:T], self.embedding, x)
        for i, layer in enumerate(self.layers):
            k_pages, v_pages, page_table = cache.k_pages[i], cache.v_pages[i], cache.page_table
            cos, sin = (self.cos, self.sin) if layer.rotated else (None, None)
            normed = self._input(layer.qkv, "attention_in", T)
            ops.rmsnorm(x, layer.attention_norm, eps, normed)
            ops.linear(normed, layer.qkv, layer.qkv_bias, None, qkv)
            ops.rope_and_store(
                *(qkv, heads, layer.q_norm, layer.k_norm, eps, positions, sequences, cos, sin),
                *(k_pages, v_pages, page_table, apart),
            )
            mixed = self._input(layer.output, "attention_out", T)
            ops.attention(*(qkv, heads, scale, layer.window, positions, sequences, k_pages, v_pages, page_table, mixed))
            ops.linear(mixed, layer.output, layer.output_bias, x, x)

            if layer.mixture is not None and self._mixture_space is not None:
                mix(ops, config, layer.mixture, layer.mlp_norm, x, self._mixture_space, self._input)
                continue
            normed = self._input(layer.gate_up, "mlp_in", T)
            ops.rmsnorm(x, layer.mlp_norm, eps, normed)
            ops.linear(normed, layer.gate_up, layer.gate_up_bias, None, gate_up)
            hidden = self._input(layer.down, "mlp_hidden", T)
            ops.swiglu(gate_up, hidden)
            ops.linear(hidden, layer.down, layer.down_bias, x, x)

        if rows == 0:
            return
        normed = self._input(self.head, "head_in", rows)
        ops.rmsnorm(x[T - rows :], self.norm, eps, normed)
        ops.linear(normed, self.head, None, None, self._logits[:rows])


def rope_tables(config: ModelConfig, positions: np.ndarray, length: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of RoPE's angles, float32 [positions, r / 2].

    Where the scaling depends on the length, it is that of a sequence that ends at the position, as when tokens come one
    after another, or `length` where that is more: as transformers does it, for the longest of a batch.
    """
    frequencies = config.inverse_frequencies()
    if config.rope_scaling.kind == "dynamic":
        lengths, where = np.unique(np.maximum(positions + 1, length), return_inverse=True)
        frequencies = np.stack([config.inverse_frequencies(int(length)) for length in lengths])[where]
    angles = positions.astype(np.float32)[:, None] * frequencies
    factor = np.float32(config.rope_scaling.attention_factor)
    return np.cos(angles) * factor, np.sin(angles) * factor
