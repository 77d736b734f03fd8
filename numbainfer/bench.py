"""Measures tokens per second, and how much of the machine's memory bandwidth that is.

Tests are named as llama-bench names them: pp512 is a prompt of 512 tokens, tg128 generates 128, one by one; @d4096
after 4,096 tokens that are not timed; @b8 for 8 sequences together, a token of each in every step. The read bandwidth
is measured in turn with the repetitions, because machines are shared and their speed drifts.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from numbainfer._version import __version__
from numbainfer.checkpoint import Weights
from numbainfer.device import Device, peak_memory_bytes
from numbainfer.errors import NumbaInferError
from numbainfer.layers import Layer
from numbainfer.loading import describe
from numbainfer.model import Model
from numbainfer.progress import Progress, silent
from numbainfer.registry import bind
from numbainfer.specs import parameter_count


@dataclass(frozen=True)
class Test:
    """What is timed. kind: "pp", a prompt of `count` tokens, or "tg", `count` tokens of each of `batch` sequences one
    after the other; after `depth` tokens."""

    __test__ = False  # pytest takes classes of this name for its own

    kind: str
    count: int
    depth: int = 0
    batch: int = 1

    def __str__(self) -> str:
        depth = f"@d{self.depth}" if self.depth else ""
        return f"{self.kind}{self.count}{depth}" + (f"@b{self.batch}" if self.batch > 1 else "")

    @classmethod
    def parse(cls, name: str) -> Test:
        """From what str() gives."""
        match = re.fullmatch(r"(pp|tg)(\d+)(?:@d(\d+))?(?:@b(\d+))?", name)
        if match is None:
            raise NumbaInferError(f"{name!r} is not the name of a test, as pp512 or tg128@d4096@b8 are")
        return cls(match[1], int(match[2]), int(match[3] or 0), int(match[4] or 1))

    @property
    def tokens(self) -> int:
        """Tokens that it processes."""
        return self.count * self.batch


def plan(
    prompts: Sequence[int], generates: Sequence[int], depths: Sequence[int] = (0,), batches: Sequence[int] = (1,)
) -> list[Test]:
    """The tests that the options of `bench` ask for, by depth, which has to be fed only once."""
    return [
        test
        for depth in depths
        for test in (
            *(Test("pp", count, depth) for count in prompts if count),
            *(Test("tg", count, depth, batch) for count in generates if count for batch in batches),
        )
    ]


class Bench:
    """A model on a device, measured test by test. Sized for `tests`; the others that fit can be measured too."""

    def __init__(
        self,
        open_weights: Callable[[], Weights],
        device: Device,
        tests: Sequence[Test],
        *,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.tests, self.progress = tests, progress or silent
        start = time.perf_counter()
        self.ops = bind(device, threads)
        self.weights = open_weights()
        needed = max(test.depth + test.count for test in tests)
        limit = self.weights.config.max_positions
        if needed > limit:
            raise NumbaInferError(f"{needed} tokens exceed this model's context of {limit}")
        self.model = Model(self.ops, self.weights, needed, sequences=max(test.batch for test in tests))
        self.feeder = Feeder(self.model)
        self.load_seconds = time.perf_counter() - start
        describe(self.model, self.weights, self.load_seconds)
        self._probe: Any = None

    def bandwidth(self) -> float:
        """Bytes per second of reading memory, now."""
        if self._probe is None:
            self._probe = self.ops.backend.BandwidthProbe(self.ops.stream)
        return self._probe.measure()

    def run(self, repetitions: int) -> Iterator[dict[str, Any]]:
        """A row per test as it is measured, with the keys that `bench -o json` prints."""
        for done, test in enumerate(self.tests):  # compiles, and captures a program for each size
            self.progress("compiling and warming up", done, len(self.tests))
            self.seconds(test if test.kind == "pp" else Test("tg", 1, test.depth, test.batch))
        peak = peak_memory_bytes()  # before the probe's buffer, which is no part of the model
        for done, test in enumerate(self.tests):
            self.progress(str(test), done, len(self.tests))
            self.feeder.reset(test.depth, test.batch)
            seconds, ceilings = [], []
            for _ in range(repetitions):
                ceilings.append(self.bandwidth())
                seconds.append(self.seconds(test))
            self.progress(str(test), done + 1, len(self.tests))
            yield self._row(test, seconds, statistics.median(ceilings), peak)

    def seconds(self, test: Test) -> float:
        """Seconds that a test's tokens took, greedy sampling included."""
        self.feeder.reset(test.depth, test.batch)
        start = time.perf_counter()
        if test.kind == "pp":
            self.feeder.feed(test.count).argmax(axis=-1)
        else:
            self.feeder.generate(test.count, test.batch)
        return time.perf_counter() - start

    def _row(self, test: Test, seconds: list[float], ceiling: float, peak: int) -> dict[str, Any]:
        weights = self.weights
        rates = [test.tokens / s for s in seconds]
        rate = statistics.median(rates)
        moved = bytes_moved(self.model, test.kind, test.count, test.depth, test.batch) / statistics.median(seconds)
        return {
            "model": weights.name,
            "architecture": weights.config.architecture,
            "params": parameter_count(weights.config),
            "weight_bytes": weights.nbytes,
            "device": str(self.ops.device),
            "device_name": self.ops.backend.device_name(self.ops.device),
            "threads": self.ops.stream.threads,
            "test": str(test),
            "repetitions": len(seconds),
            "tokens_per_second": rate,
            "stddev": statistics.stdev(rates) if len(rates) > 1 else 0.0,
            "ms_per_token": 1000 / rate,
            "bytes_per_second": moved,
            "bandwidth_ceiling": ceiling,
            "percent_of_ceiling": 100 * moved / ceiling,
            "load_seconds": self.load_seconds,
            "compile_seconds": self.ops.stream.compile_seconds,
            "peak_memory_bytes": peak,
            "version": __version__,
        }


class Feeder:
    """Feeds a model random tokens, and keeps the depth that is already in its cache."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._sequences = [model.cache.add_sequence() for _ in range(len(model.cache.page_table))]
        self._random = np.random.default_rng(0)

    def reset(self, depth: int, batch: int = 1) -> None:
        """Leaves `depth` tokens in the cache, in each of the first `batch` sequences."""
        for i, sequence in enumerate(self._sequences[:batch]):
            self._model.cache.truncate(sequence, depth)
            if len(sequence) < depth:
                self.feed(depth - len(sequence), i)

    def feed(self, count: int, index: int = 0) -> np.ndarray:
        """Appends `count` >= 1 random tokens to one sequence in chunks; the last one's logits [1, vocabulary]."""
        model, sequence = self._model, self._sequences[index]
        tokens = self._tokens(count)
        logits = None
        for start in range(0, count, model.chunk):
            part = tokens[start : start + model.chunk]
            first = len(sequence)
            model.cache.append(sequence, part)
            positions = np.arange(first, first + len(part), dtype=np.int32)
            logits = model.step(part, positions, sequence.row, "last" if start + len(part) == count else "none")
        assert logits is not None
        return logits

    def step(self, batch: int = 1) -> np.ndarray:
        """Appends a random token to each of the first `batch` sequences; their logits [batch, vocabulary]."""
        sequences, tokens = self._sequences[:batch], self._tokens(batch)
        positions = [len(sequence) for sequence in sequences]
        for sequence, token in zip(sequences, tokens, strict=True):
            self._model.cache.append(sequence, [token])
        logits = self._model.step(tokens, positions, [s.row for s in sequences], "all" if batch > 1 else "last")
        assert logits is not None
        return logits

    def generate(self, count: int, batch: int = 1) -> None:
        """Appends `count` tokens to each of the first `batch` sequences: a random one, and what greedily follows."""
        for _ in self._model.greedy(self._tokens(batch), self._sequences[:batch], count):
            pass

    def _tokens(self, count: int) -> list[int]:
        return self._random.integers(0, self._model.config.vocab_size, count).tolist()


def bytes_moved(model: Model, kind: str, count: int, depth: int, batch: int = 1) -> float:
    """Bytes of weights and of KV cache that a test has to read."""
    if kind == "tg":
        steps = [(batch, depth + end) for end in range(1, count + 1)]  # tokens of each, and where they end
    else:
        ends = [*range(model.chunk, count, model.chunk), count]
        steps = [(end - start, depth + end) for start, end in pairwise([0, *ends])]
    position = 2 * model.cache.k_pages[0].itemsize * model.config.kv_heads * model.config.head_dim
    total = model.head.nbytes * (1 if kind == "pp" else count)
    for layer in model.layers:
        for tokens, end in steps:
            seen = min(end, layer.window + tokens // batch - 1) if layer.window else end
            total += layer_bytes(model, layer, tokens) + batch * position * seen
    return total


def layer_bytes(model: Model, layer: Layer, tokens: int) -> float:
    """Bytes of the matrices that a step of so many tokens reads; of a mixture's experts, so many as it can choose."""
    dense = (layer.qkv, layer.output, layer.gate_up, layer.down)
    mixture, experts = layer.mixture, model.config.experts
    if mixture is None or experts is None:
        return sum(matrix.nbytes for matrix in dense)
    shared = (mixture.router, mixture.shared_gate_up, mixture.shared_down, mixture.shared_gate)
    chosen = min(1.0, tokens * experts.per_token / experts.count)
    own = sum(matrix.nbytes for matrix in (*dense, *shared) if matrix is not None)
    return own + chosen * (mixture.gate_up.nbytes + mixture.down.nbytes)
