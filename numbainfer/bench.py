"""Measures tokens per second, and how much of the machine's memory bandwidth that is.

Tests are named as llama-bench names them: pp512 is a prompt of 512 tokens, tg128 generates 128, one by one; @d4096
after 4,096 tokens that are not timed. The read bandwidth is measured in turn with the repetitions, because machines
are shared and their speed drifts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from numbainfer._version import __version__
from numbainfer.checkpoint import Weights
from numbainfer.config import ModelConfig
from numbainfer.device import Device, cpu_name, peak_memory_bytes
from numbainfer.errors import NumbaInferError
from numbainfer.model import Model
from numbainfer.progress import Progress, silent
from numbainfer.quantization import AnyMatrix, QuantizedMatrix, choose_group
from numbainfer.registry import backend, bind
from numbainfer.specs import parameter_count, parameter_groups

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _shape(
    architecture: str, vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict:
    return {
        "architectures": [architecture],
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        **more,
    }


# Real models' shapes, from their config.json files.
RANDOM = {
    "smollm2-135m": _shape("LlamaForCausalLM", 49152, 576, 1536, 30, 9, 3, rope_theta=1e5),
    "qwen2.5-0.5b": _shape("Qwen2ForCausalLM", 151936, 896, 4864, 24, 14, 2, rope_theta=1e6),
    "qwen3-0.6b": _shape("Qwen3ForCausalLM", 151936, 1024, 3072, 28, 16, 8, head_dim=128, rope_theta=1e6),
    "llama-3.2-1b": _shape(
        "LlamaForCausalLM", 128256, 2048, 8192, 16, 32, 8, head_dim=64, rope_theta=5e5, rope_scaling=_LLAMA3_ROPE
    ),
    "llama-3.1-8b": _shape(
        "LlamaForCausalLM",
        *(128256, 4096, 14336, 32, 32, 8),
        rope_theta=5e5,
        rope_scaling={**_LLAMA3_ROPE, "factor": 8.0},
        tie_word_embeddings=False,
    ),
}


class RandomWeights:
    """Int8 weights of a real shape and random values, made in memory (checkpoint.Weights)."""

    def __init__(self, architecture: str, group_size: int = 64) -> None:
        if architecture not in RANDOM:
            raise NumbaInferError(f"--random {architecture}: known are {', '.join(RANDOM)}")
        self.name = f"random {architecture}"
        self.config = ModelConfig.from_dict(RANDOM[architecture], architecture)
        self.nbytes = 0
        self._group_size = group_size
        self._rows = {p.name: p.shape for group in parameter_groups(self.config) for p in group}
        # One block of random values, repeated: drawing 8 billion would take minutes and time the same.
        self._values = np.random.default_rng(0).integers(-127, 128, 1 << 24, dtype=np.int8)

    def matrix(self, names: Sequence[str]) -> AnyMatrix:
        """See checkpoint.Weights. Scaled so that a product keeps its input's size."""
        rows, width = sum(self._rows[n][0] for n in names), self._rows[names[0]][1]
        group = choose_group(width, self._group_size)
        assert group is not None
        codes = np.resize(self._values, rows * width).reshape(rows, width)
        scale = 1 / (73 * width**0.5)  # 73: the standard deviation of the codes
        matrix = QuantizedMatrix(codes, np.full((rows, width // group), scale, np.float16), group)
        self.nbytes += matrix.nbytes
        return matrix

    def vector(self, names: Sequence[str]) -> np.ndarray:
        """See checkpoint.Weights."""
        length = sum(self._rows[n][0] for n in names)
        vector = np.full(length, 0.0 if names[0].endswith("bias") else 1.0, np.float32)
        self.nbytes += vector.nbytes
        return vector


def bench(
    open_weights: Callable[[], Weights],
    device: Device,
    *,
    prompts: Sequence[int],
    generates: Sequence[int],
    depths: Sequence[int] = (0,),
    repetitions: int = 5,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """A row per test, with the keys that `bench -o json` prints."""
    report = progress or silent
    start = time.perf_counter()
    ops = bind(device, threads)
    weights = open_weights()
    needed = max(depths) + max([*prompts, *generates])
    if needed > weights.config.max_positions:
        raise NumbaInferError(f"{needed} tokens exceed this model's context of {weights.config.max_positions}")
    model = Model(ops, weights, needed)
    load_seconds = time.perf_counter() - start
    # By depth, which has to be fed only once.
    kinds = (("pp", prompts), ("tg", generates))
    tests = [(kind, n, depth) for depth in depths for kind, counts in kinds for n in counts if n]
    feeder = Feeder(model)
    report("compiling and warming up", 0, None)
    for kind, count, depth in tests:  # also captures a program for each size
        _timed(feeder, kind, count if kind == "pp" else 1, depth)
    peak = peak_memory_bytes()  # before the probe's buffer, which is no part of the model
    probe = backend(device.kind).BandwidthProbe(ops.stream)

    rows = []
    for done, (kind, count, depth) in enumerate(tests):
        name = f"{kind}{count}" + (f"@d{depth}" if depth else "")
        report(name, done, len(tests))
        feeder.reset(depth)
        seconds, ceilings = [], []
        for _ in range(repetitions):
            ceilings.append(probe.measure())
            seconds.append(_timed(feeder, kind, count, depth))
        rates = [count / s for s in seconds]
        rate, ceiling = statistics.median(rates), statistics.median(ceilings)
        moved = bytes_moved(model, kind, count, depth) / statistics.median(seconds)
        rows.append(
            {
                "model": weights.name,
                "architecture": weights.config.architecture,
                "params": parameter_count(weights.config),
                "weight_bytes": weights.nbytes,
                "device": str(device),
                "device_name": cpu_name(),
                "threads": ops.stream.threads,
                "test": name,
                "repetitions": repetitions,
                "tokens_per_second": rate,
                "stddev": statistics.stdev(rates) if repetitions > 1 else 0.0,
                "ms_per_token": 1000 / rate,
                "bytes_per_second": moved,
                "bandwidth_ceiling": ceiling,
                "percent_of_ceiling": 100 * moved / ceiling,
                "load_seconds": load_seconds,
                "compile_seconds": ops.stream.compile_seconds,
                "peak_memory_bytes": peak,
                "version": __version__,
            }
        )
        report(name, done + 1, len(tests))
    return rows


class Feeder:
    """Feeds a model random tokens, and keeps the depth that is already in its cache."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._sequence = model.cache.add_sequence()
        self._random = np.random.default_rng(0)

    def reset(self, depth: int) -> None:
        """Leaves `depth` tokens in the cache."""
        self._model.cache.truncate(self._sequence, depth)
        if len(self._sequence) < depth:
            self.feed(depth - len(self._sequence))

    def feed(self, count: int) -> np.ndarray | None:
        """Appends `count` random tokens in chunks; the last one's logits."""
        model, sequence = self._model, self._sequence
        tokens = self._random.integers(0, model.config.vocab_size, count).tolist()
        logits = None
        for start in range(0, count, model.chunk):
            part = tokens[start : start + model.chunk]
            first = len(sequence)
            model.cache.append(sequence, part)
            positions = np.arange(first, first + len(part), dtype=np.int32)
            logits = model.step(part, positions, sequence.row, "last" if start + len(part) == count else "none")
        return logits


def _timed(feeder: Feeder, kind: str, count: int, depth: int) -> float:
    """Seconds that a test's tokens took, greedy sampling included."""
    feeder.reset(depth)
    steps = [count] if kind == "pp" else [1] * count
    start = time.perf_counter()
    for tokens in steps:
        logits = feeder.feed(tokens)
        if logits is not None:
            np.argmax(logits)
    return time.perf_counter() - start


def bytes_moved(model: Model, kind: str, count: int, depth: int) -> float:
    """Bytes of weights and of KV cache that a test has to read."""
    matrices = sum(m.nbytes for layer in model.layers for m in (layer.qkv, layer.output, layer.gate_up, layer.down))
    ends = range(1, count + 1) if kind == "tg" else [*range(model.chunk, count, model.chunk), count]  # of its steps
    kv = 2 * model.cache.k_pages[0].itemsize * model.config.kv_heads * model.config.head_dim * model.config.layers
    heads = 1 if kind == "pp" else count
    return matrices * len(ends) + model.head.nbytes * heads + kv * sum(depth + end for end in ends)
