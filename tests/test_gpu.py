"""What only a GPU can show: agreement with the CPU, replay against eager launches, long runs, memory given back."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from building import build_engine, build_model, stories260k
from conftest import operators

from numbainfer.errors import NumbaInferError
from numbainfer.random_weights import RandomWeights
from numbainfer.registry import Operators
from numbainfer.sampling import SamplingParams

pytestmark = pytest.mark.gpu
CTX = 192


@pytest.fixture
def ops() -> Operators:
    return operators("cuda")


def logits_of(ops: Operators, dtype: str, tokens: list[int], *, chunk: int, eager: bool = False) -> np.ndarray:
    """Logits [T, vocabulary] of a text taken in chunks."""
    model = build_model(ops, stories260k(dtype), ctx_size=CTX, chunk=chunk, eager=eager)
    sequence, rows = model.cache.add_sequence(), []
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        model.cache.append(sequence, part)
        got = model.step(part, range(start, start + len(part)), [sequence.row] * len(part), "all")
        assert got is not None
        rows.append(got.copy())
    model.release()
    return np.concatenate(rows)


def text(count: int) -> list[int]:
    return np.random.default_rng(1).integers(3, 500, count).tolist()


@pytest.mark.parametrize("chunk", [1, 4, 100, 150])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 2e-3), ("int8", 5e-3)])
def test_logits_are_the_cpus(dtype: str, bound: float, chunk: int, ops: Operators) -> None:
    tokens = text(150)
    mine = logits_of(ops, dtype, tokens, chunk=chunk)
    # The CPU rounds the activations of more than 16 tokens coarsely, this GPU does not.
    theirs = logits_of(operators("cpu"), dtype, tokens, chunk=min(chunk, 16))
    assert np.abs(mine - theirs).max() <= bound * np.abs(theirs).max()


def test_decoding_of_a_models_shape_is_the_cpus(ops: Operators) -> None:
    """int8, heads of 64, three to a key: the fast path token by token, with keys in one part and in several."""
    last = []
    for device in (ops, operators("cpu")):
        model = build_model(device, RandomWeights("smollm2-135m"), ctx_size=384)
        sequence = model.cache.add_sequence()
        tokens = np.random.default_rng(2).integers(0, 49152, 330).tolist()
        rows = []
        for position, token in enumerate(tokens):
            model.cache.append(sequence, [token])
            wanted = position in (0, 1, 63, 64, 200, 329)
            got = model.step([token], [position], [sequence.row], int(wanted))
            if got is not None:
                rows.append(got[0].copy())
        last.append(np.stack(rows))
        model.release()
    assert np.abs(last[0] - last[1]).max() <= 5e-3 * np.abs(last[1]).max()


def test_decoding_of_a_batch_is_the_cpus(ops: Operators) -> None:
    """int8, heads of 64, a token of each of six sequences in a step, over the end of a page: norms and RoPE are parts
    of other kernels."""
    steps, results = 5, []
    texts = np.random.default_rng(3).integers(0, 49152, (6, 70)).tolist()
    for device in (ops, operators("cpu")):
        model = build_model(device, RandomWeights("smollm2-135m"), ctx_size=128, sequences=6)
        sequences = [model.cache.add_sequence() for _ in texts]
        lengths = [59 + i for i in range(6)]
        for sequence, text_, length in zip(sequences, texts, lengths, strict=True):
            for start in range(0, length, 16):  # more at once the CPU rounds coarsely
                part = text_[start : min(start + 16, length)]
                model.cache.append(sequence, part)
                model.step(part, range(start, start + len(part)), [sequence.row] * len(part), "none")
        for i in range(steps):
            tokens = [t[length + i] for t, length in zip(texts, lengths, strict=True)]
            for sequence, token in zip(sequences, tokens, strict=True):
                model.cache.append(sequence, [token])
            positions = [length + i for length in lengths]
            got = model.step(tokens, positions, [sequence.row for sequence in sequences], "all")
            assert got is not None
            results.append(got.copy())
        model.release()
    mine, theirs = np.stack(results[:steps]), np.stack(results[steps:])
    assert np.abs(mine - theirs).max() <= 5e-3 * np.abs(theirs).max()


@pytest.mark.parametrize("chunk", [1, 3, 70])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_replay_equals_eager_launches(dtype: str, chunk: int, ops: Operators) -> None:
    tokens = text(70)
    expected = logits_of(ops, dtype, tokens, chunk=chunk, eager=True)
    np.testing.assert_array_equal(logits_of(ops, dtype, tokens, chunk=chunk), expected)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_greedy_text_is_the_cpus_up_to_a_near_tie(dtype: str, ops: Operators) -> None:
    engines = [build_engine(o, stories260k(dtype), ctx_size=CTX) for o in (ops, operators("cpu"))]
    texts = []
    for engine in engines:
        generation, pieces = engine.generate([1], SamplingParams(max_tokens=150))
        assert "".join(pieces) == generation.text
        texts.append(generation.tokens)
    mine, theirs = texts
    same = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
    if same is not None:
        logits = engines[1].prefill([1, *theirs[:same]])[0]
        tie = logits[theirs[same]] - logits[mine[same]]
        assert tie <= 5e-3 * np.abs(logits).max(), f"token {same}: {mine[same]} for {theirs[same]}, {tie} apart"


def test_a_thousand_generations_of_changing_lengths(ops: Operators) -> None:
    engine = build_engine(ops, stories260k("int8"), ctx_size=CTX, eos_ids=(2,))
    story = engine.generate([1], SamplingParams(max_tokens=100))
    "".join(story[1])
    tokens = [1, *story[0].tokens]
    random = np.random.default_rng(0)
    for _ in range(1000):
        prompt, count = tokens[: random.integers(1, 60)], int(random.integers(1, 12))
        generation, pieces = engine.generate(prompt, SamplingParams(max_tokens=count))
        "".join(pieces)
        assert len(generation.tokens) == count


def test_nothing_leaks_over_a_thousand_loads(ops: Operators) -> None:
    """Asks the driver what is free, so nothing else may use the GPU meanwhile."""
    free = 0
    for load in range(1000):
        model = build_model(ops, stories260k("int8"), ctx_size=64)
        sequence = model.cache.add_sequence()
        model.cache.append(sequence, [1])
        if load % 50 == 0:
            model.step([1], [0], [sequence.row])
        model.release()
        if load % 100 == 99:
            gc.collect()
            ops.pool.trim()
        if load == 99:
            free = ops.backend.free_memory(ops.device)
    assert ops.pool.statistics.reserved == ops.pool.statistics.in_use
    assert free - ops.backend.free_memory(ops.device) < 16 << 20


def test_out_of_memory_is_one_clear_line(ops: Operators) -> None:
    with pytest.raises(NumbaInferError, match=r"out of memory: asked for \d+ MiB with \d+ MiB in use and \d+ MiB free"):
        ops.pool.empty(1 << 42, np.int8)
