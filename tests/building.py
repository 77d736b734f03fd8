"""From a checkpoint to something that runs, in the few words that a test has for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numbainfer.checkpoint import Weights
from numbainfer.converters.source import open_source
from numbainfer.converters.source_options import SourceOptions
from numbainfer.converters.source_reader import SourceWeights, Target
from numbainfer.engine import Engine
from numbainfer.model import Model
from numbainfer.registry import Operators
from numbainfer.sampling import SamplingParams
from numbainfer.tokenizer import Tokenizer

Checkpoints = Callable[..., Path]  # the fixture checkpoint_of

DATA = Path(__file__).parent / "data"

Logits = NDArray[np.float32]


def source_weights(
    path: Path, dtype: str = "float32", group_size: int = 64, require_tokenizer: bool = True, **options: Any
) -> SourceWeights:
    """A source quantized while loading; `options` are SourceOptions'."""
    source = open_source(path, SourceOptions(**options), require_tokenizer=require_tokenizer)
    return SourceWeights(source, Target(dtype, group_size))


def build_model(ops: Operators, weights: Weights, ctx_size: int = 192, **options: Any) -> Model:
    """A model with a context of three pages, unless told otherwise."""
    return Model(ops, weights, ctx_size, **options)


def build_engine(
    ops: Operators, weights: SourceWeights, *, eos_ids: tuple[int, ...] | None = None, **options: Any
) -> Engine:
    """An engine of a source that has a tokenizer; `options` are build_model's."""
    tokenizer = Tokenizer.from_files(weights.source.tokenizer_files, weights.config.vocab_size)
    return Engine(build_model(ops, weights, **options), tokenizer, eos_ids)


def stories260k(dtype: str = "float32") -> SourceWeights:
    """The weights of the one real model that is small enough to be kept here."""
    return source_weights(DATA / "stories260K.bin", dtype, tokenizer=DATA / "tok512.bin")


def greedy(engine: Engine, prompt: Iterable[int], count: int) -> list[int]:
    """The tokens that follow greedily, through the whole loop of Engine.generate."""
    generation, pieces = engine.generate([int(t) for t in prompt], SamplingParams(max_tokens=count))
    assert "".join(pieces) == generation.text
    return generation.tokens


def all_logits(model: Model, tokens: Sequence[int], step: int) -> Logits:
    """Logits [T, vocabulary] of a sequence of its own that goes through the model `step` tokens at a time."""
    sequence = model.cache.add_sequence()
    parts = [advance(model, sequence, tokens[i : i + step]) for i in range(0, len(tokens), step)]
    model.cache.remove(sequence)
    return np.concatenate(parts)


def advance(model: Model, sequence: Any, tokens: Sequence[int]) -> Logits:
    """Appends tokens to a sequence in one step; a copy of their logits [T, vocabulary]."""
    start = len(sequence)
    model.cache.append(sequence, [int(t) for t in tokens])
    logits = model.step(tokens, np.arange(start, len(sequence)), sequence.row, "all")
    assert logits is not None
    return logits.copy()


def random_tokens(model: Model, count: int, seed: int = 0) -> list[int]:
    """Token ids to run."""
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, count).tolist()


def difference(actual: Logits, expected: Logits) -> float:
    """The largest difference as a share of the largest expected magnitude; NaN counts as infinite."""
    assert actual.shape == expected.shape
    share = np.abs(actual.astype(np.float64) - expected).max() / np.abs(expected).max()
    return float(share) if np.isfinite(share) else np.inf
