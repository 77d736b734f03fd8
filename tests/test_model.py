"""The whole model: against Hugging Face's logits, and against itself in every way of cutting up the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from building import (
    Checkpoints,
    advance,
    all_logits,
    build_engine,
    build_model,
    difference,
    greedy,
    random_tokens,
    source_weights,
)

from numbainfer.checkpoint import Checkpoint, Weights
from numbainfer.converters import convert as convert_module
from numbainfer.converters.convert import convert
from numbainfer.converters.source import open_source
from numbainfer.converters.source_reader import Target
from numbainfer.engine import Engine
from numbainfer.generation import Statistics
from numbainfer.quantization import Matrix, QuantizedMatrix, dequantize
from numbainfer.registry import Operators
from numbainfer.tokenizer import Tokenizer

# Each has something that the others lack: RoPE scaling and MQA, biases, qk-norm and a head_dim of its own.
FLOAT_MODELS = ["llama3_scaled_untied", "qwen2_gqa_tied", "qwen3_tied"]
LONG = 150  # tokens: more than two KV pages


def assert_golden(engine: Engine, name: str) -> None:
    """What Hugging Face transformers says: logits within 1e-4 of the largest, the greedy tokens all the same."""
    golden = tiny_models.golden(name)
    logits = np.concatenate([part.copy() for _, part in engine.logits(golden["prompt"].tolist())])
    assert difference(logits, golden["logits"]) <= 1e-4
    assert greedy(engine, golden["prompt"][:8], 64) == golden["greedy"].tolist()


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_a_source_against_transformers(name: str, ops: Operators, checkpoint_of: Checkpoints) -> None:
    assert_golden(build_engine(ops, source_weights(checkpoint_of(name)), eos_ids=()), name)


@pytest.mark.parametrize(("style", "shards"), [(4, 3), (5, 1)])
@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_a_converted_model_against_transformers(
    name: str,
    style: int,
    shards: int,
    ops: Operators,
    checkpoint_of: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if shards > 1:  # what is sharded is also written in shards
        monkeypatch.setattr(convert_module, "SHARD_BYTES", 60_000)
    with open_source(checkpoint_of(name, style=style, shards=shards)) as source:
        convert(source, tmp_path / "out", Target("float32"))
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shards > 1)
    weights = Checkpoint(tmp_path / "out")
    tokenizer = Tokenizer.from_directory(tmp_path / "out", weights.config.vocab_size)
    assert_golden(Engine(build_model(ops, weights), tokenizer, eos_ids=()), name)


@pytest.mark.parametrize("name", FLOAT_MODELS)
def test_any_chunking_gives_the_same_logits(name: str, ops: Operators, checkpoint_of: Checkpoints) -> None:
    weights = source_weights(checkpoint_of(name))
    model = build_model(ops, weights)
    tokens = random_tokens(model, LONG)
    whole = all_logits(model, tokens, LONG)
    for step in (1, 7, 63, 64, 65):
        assert difference(all_logits(model, tokens, step), whole) <= 1e-5
    for chunk in (1, 16, 64, 65):  # here the engine cuts, and only the last token's logits are computed
        engine = build_engine(ops, weights, chunk=chunk)
        assert engine.model.chunk == chunk
        assert difference(engine.prefill(tokens), whole[-1:]) <= 1e-5


@pytest.mark.parametrize("name", tiny_models.INT8_CONFIGS)
def test_any_chunking_gives_the_same_greedy_tokens_in_int8(
    name: str, ops: Operators, checkpoint_of: Checkpoints
) -> None:
    """As long as activations have two planes: up to 16 tokens on the CPU."""
    weights = source_weights(checkpoint_of(name), "int8")
    replies = []
    for chunk in (1, 3, 7, 16):
        engine = build_engine(ops, weights, eos_ids=(), chunk=chunk)
        replies.append(greedy(engine, random_tokens(engine.model, 100), 48))
    assert replies == [replies[0]] * len(replies)
    assert len(set(replies[0])) > 12  # a reply stuck in a loop would show little


@pytest.mark.parametrize(
    ("name", "dtype"), [(FLOAT_MODELS[0], "float32"), ("qwen3_mixed", "int8"), ("llama_int8", "bfloat16")]
)
def test_eager_and_captured_are_the_same_bit_for_bit(
    name: str, dtype: str, ops: Operators, checkpoint_of: Checkpoints
) -> None:
    weights = source_weights(checkpoint_of(name), dtype)
    captured, eager = build_model(ops, weights), build_model(ops, weights, eager=True)
    for count, step in ((LONG, 64), (5, 1)):
        tokens = random_tokens(captured, count)
        expected = all_logits(eager, tokens, step)
        for _ in range(2):  # the second time every program is there already
            np.testing.assert_array_equal(all_logits(captured, tokens, step), expected)


@pytest.mark.parametrize("name", ["llama_int8", "qwen3_mixed"])
def test_buffers_are_made_before_the_first_step(name: str, ops: Operators, checkpoint_of: Checkpoints) -> None:
    """One made between two operators would part what a device runs as one: the step would round differently."""
    model = build_model(ops, source_weights(checkpoint_of(name), "int8"))
    made = ops.pool.statistics.allocations + ops.pool.statistics.reuses
    sequence = model.cache.add_sequence()
    for count in (5, 1):
        tokens, first = random_tokens(model, count), len(sequence)
        model.cache.append(sequence, tokens)
        model.step(tokens, np.arange(first, first + count), sequence.row)
    assert ops.pool.statistics.allocations + ops.pool.statistics.reuses == made


def test_programs_are_kept_within_bounds(ops: Operators, checkpoint_of: Checkpoints) -> None:
    """More sizes of steps than programs are kept: those that went are captured again, with the same result."""
    model = build_model(ops, source_weights(checkpoint_of("llama_int8"), "int8"))
    tokens = random_tokens(model, 20)
    sizes = range(20, 0, -1)
    first = [all_logits(model, tokens[:size], size) for size in sizes]
    kept = len(model._programs)
    again = [all_logits(model, tokens[:size], size) for size in sizes]
    assert kept == len(model._programs) < 20
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_logits_of_more_tokens_replace_their_buffer(ops: Operators, checkpoint_of: Checkpoints) -> None:
    model = build_model(ops, source_weights(checkpoint_of("llama_int8")), chunk=128)
    all_logits(model, [1], 1)  # the first step makes the other buffers
    before = ops.pool.statistics.in_use - model._logits.nbytes
    for count in (1, 100, 7, 128):
        assert all_logits(model, random_tokens(model, count), count).shape == (count, model.config.vocab_size)
        # a size class is at most a quarter larger than what was asked for
        assert before <= ops.pool.statistics.in_use <= before + 1.25 * model._logits.nbytes


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_sequences_share_a_cache_undisturbed(dtype: str, ops: Operators, checkpoint_of: Checkpoints) -> None:
    weights = source_weights(checkpoint_of("qwen3_mixed"), dtype)
    alone, shared = build_model(ops, weights), build_model(ops, weights, sequences=2)
    texts = [random_tokens(alone, LONG, seed) for seed in (1, 2)]
    expected = [all_logits(alone, text, 10) for text in texts]
    sequences = [shared.cache.add_sequence() for _ in texts]
    for i in range(0, LONG, 10):  # so that their pages alternate
        for text, sequence, logits in zip(texts, sequences, expected, strict=True):
            np.testing.assert_array_equal(advance(shared, sequence, text[i : i + 10]), logits[i : i + 10])


@pytest.mark.parametrize("name", FLOAT_MODELS)
def test_tokens_of_several_sequences_in_one_step(name: str, ops: Operators, checkpoint_of: Checkpoints) -> None:
    weights = source_weights(checkpoint_of(name))
    alone, batch = build_model(ops, weights), build_model(ops, weights, sequences=3)
    lengths = {0: (64, 5), 1: (0, 3), 2: (130, 1)}  # row: tokens that are there, tokens of the step
    texts = {row: random_tokens(alone, sum(length), row) for row, length in lengths.items()}
    sequences = [batch.cache.add_sequence() for _ in lengths]
    step: list[tuple[int, int]] = []  # (row, position) of every token
    for sequence in sequences:
        before, new = lengths[sequence.row]
        if before:
            advance(batch, sequence, texts[sequence.row][:before])
        batch.cache.append(sequence, texts[sequence.row][before:])
        step += [(sequence.row, before + i) for i in range(new)]
    step = step[::2] + step[1::2]  # tokens of a sequence need not stand together, only follow each other
    rows, positions = zip(*step, strict=True)
    logits = batch.step([texts[row][position] for row, position in step], positions, rows, "all")
    assert logits is not None
    for row, text in texts.items():
        mine = [i for i, (r, _) in enumerate(step) if r == row]
        order = sorted(mine, key=lambda i: step[i][1])
        expected = all_logits(alone, text, len(text))[lengths[row][0] :]
        assert difference(logits[order], expected) <= 1e-5


@pytest.mark.parametrize(("name", "dtype"), [(FLOAT_MODELS[0], "float32"), ("qwen3_mixed", "int8")])
def test_logits_of_the_last_tokens_of_a_step(name: str, dtype: str, ops: Operators, checkpoint_of: Checkpoints) -> None:
    """Any number of them, growing and shrinking: those that "all" has at the end."""
    model = build_model(ops, source_weights(checkpoint_of(name), dtype))
    tokens = random_tokens(model, 20)
    expected = all_logits(model, tokens, len(tokens))
    for rows in (1, 5, 2, 20, 0, 19):
        sequence = model.cache.add_sequence()
        model.cache.append(sequence, tokens)
        logits = model.step(tokens, np.arange(len(tokens)), sequence.row, rows)
        model.cache.remove(sequence)
        if rows == 0:
            assert logits is None
        else:
            assert logits is not None
            assert logits.shape == (rows, model.config.vocab_size)
            # the head's input has one plane for many int8 rows and two for few
            assert difference(logits, expected[-rows:]) <= (1e-5 if dtype == "float32" else 0.03)


class Dequantized:
    """The float32 weights that an int8 model's codes stand for."""

    def __init__(self, weights: Weights) -> None:
        self.config, self.name, self.nbytes = weights.config, weights.name, weights.nbytes
        self.vector = weights.vector
        self._matrix = weights.matrix

    def matrix(self, names: Sequence[str]) -> Matrix:
        matrix = self._matrix(names)
        data = dequantize(matrix) if isinstance(matrix, QuantizedMatrix) else matrix.data.astype(np.float32)
        return Matrix(data)


@pytest.mark.parametrize("name", tiny_models.INT8_CONFIGS)
def test_int8_stays_close_to_float(name: str, ops: Operators, checkpoint_of: Checkpoints) -> None:
    """Rounding the weights costs 5 to 9% of the largest logit at worst, 3.4 to 4.2% RMS: random weights with sharp
    attention are the worst case (stories15M loses no perplexity to speak of, test_stories.py). All the rest, that is
    quantized activations and the float16 KV cache, costs 0.08 to 0.11% with two planes (16 tokens a step), and with one
    and outliers (a long prompt at once) 1.4 to 3.2% at worst, half of what the weights do. On a GPU, where tensor cores
    take both in float16, 0.26 to 0.30%."""
    checkpoint = checkpoint_of(name)
    exact = build_model(ops, source_weights(checkpoint))
    tokens = random_tokens(exact, LONG)
    expected = all_logits(exact, tokens, LONG)
    rounded = all_logits(build_model(ops, Dequantized(source_weights(checkpoint, "int8"))), tokens, LONG)
    rounding = build_model(ops, source_weights(checkpoint, "int8"))
    assert 0 < difference(all_logits(rounding, tokens, 16), rounded) <= (2.5e-3 if ops.device.kind == "cpu" else 4e-3)
    logits = all_logits(rounding, tokens, LONG)
    assert 0 < difference(logits, rounded) <= 0.05
    assert difference(logits, expected) <= 0.11
    assert np.sqrt(np.mean((logits - expected) ** 2) / np.mean(expected**2)) <= 0.06


@pytest.mark.parametrize("name", ["qwen3_untied", "llama_int8"])
@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2.5e-3), ("bfloat16", 2.5e-3)])
def test_sixteen_bit_models(
    name: str, dtype: str, bound: float, ops: Operators, checkpoint_of: Checkpoints, tmp_path: Path
) -> None:
    """Held against a float32 model of the same rounded weights: what is left is the float16 KV cache, measured 1.3e-3,
    and on a GPU activations in float16, together 2.9e-3.
    A checkpoint in that dtype and one in float32 that is rounded while loading give the same model."""
    stored, rounded = checkpoint_of(name, dtype=dtype), checkpoint_of(name)
    bound = bound if ops.device.kind == "cpu" else 4e-3
    exact = build_model(ops, source_weights(stored, "float32"))
    tokens = random_tokens(exact, LONG)
    expected = all_logits(exact, tokens, LONG)
    from_stored = all_logits(build_model(ops, source_weights(stored, dtype)), tokens, LONG)
    assert 0 < difference(from_stored, expected) <= bound
    # Norms and biases are rounded in `stored` only, so this difference is larger than that of the matrices.
    from_float32 = all_logits(build_model(ops, source_weights(rounded, dtype)), tokens, LONG)
    assert difference(from_float32, expected) <= 10 * bound
    with open_source(rounded) as source:
        convert(source, tmp_path / "out", Target(dtype))
    mapped = all_logits(build_model(ops, Checkpoint(tmp_path / "out")), tokens, LONG)
    np.testing.assert_array_equal(mapped, from_float32)


@pytest.mark.parametrize(("name", "dtype"), [(FLOAT_MODELS[1], "float32"), ("qwen2_int8", "int8")])
def test_what_two_prompts_share_is_computed_once(
    name: str, dtype: str, ops: Operators, checkpoint_of: Checkpoints
) -> None:
    weights = source_weights(checkpoint_of(name), dtype)
    # One token a step in both engines: int8 rounds alike only where the same sums are added up in the same order.
    engine, fresh = (build_engine(ops, weights, chunk=1) for _ in range(2))
    first = random_tokens(engine.model, LONG)
    other = random_tokens(engine.model, 40, seed=1)
    prompts = [
        (first, 0),
        (first[:100] + other, 100),  # parts from it inside a page
        (first[:64] + other, 64),  # at a page's end
        (first[:65], 64),  # a prefix of it: the last token is run again, for its logits
        (first[:65], 64),
        (first, 65),
        (other, 0 if other[0] != first[0] else 1),
    ]
    for prompt, shared in prompts:
        statistics = Statistics()
        logits = engine.prefill(prompt, statistics).copy()
        assert statistics.cached_tokens == shared
        fresh.model.cache.truncate(fresh._sequence, 0)
        np.testing.assert_array_equal(logits, fresh.prefill(prompt))


def test_an_unsupported_number_of_tokens(ops: Operators, checkpoint_of: Checkpoints) -> None:
    """A step never writes past its buffers."""
    model = build_model(ops, source_weights(checkpoint_of("llama_int8")), chunk=8)
    with pytest.raises(ValueError, match="9"):
        model.step(range(9), range(9), 0)


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_release_gives_everything_back(dtype: str, ops: Operators, checkpoint_of: Checkpoints) -> None:
    before = ops.pool.statistics.in_use
    model = build_model(ops, source_weights(checkpoint_of("qwen2_gqa_tied"), dtype))
    all_logits(model, [1, 2, 3, 4], 2)
    assert ops.pool.statistics.in_use > before
    model.release()
    assert ops.pool.statistics.in_use == before


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_decoding_is_steps_and_their_largest_logits(
    batch: int, ops: Operators, checkpoint_of: Checkpoints
) -> None:
    """With pages that begin on the way, and closed before its end."""
    weights = source_weights(checkpoint_of("qwen2_gqa_tied"))
    one, other = (build_model(ops, weights, sequences=batch) for _ in range(2))
    texts = [random_tokens(one, 60 + i, i) for i in range(batch)]
    mine, theirs = ([model.cache.add_sequence() for _ in texts] for model in (one, other))
    for text, a, b in zip(texts, mine, theirs, strict=True):
        advance(one, a, text[:-1])
        advance(other, b, text[:-1])
    steps = one.greedy([text[-1] for text in texts], mine, 20)
    tokens = [text[-1] for text in texts]
    for _ in range(9):
        for sequence, token in zip(theirs, tokens, strict=True):
            other.cache.append(sequence, [token])
        positions = [len(sequence) - 1 for sequence in theirs]
        logits = other.step(tokens, positions, [sequence.row for sequence in theirs], "all")
        assert logits is not None
        tokens = logits.argmax(axis=-1).tolist()
        assert next(steps) == tokens
    steps.close()
    assert [sequence.tokens for sequence in mine] == [sequence.tokens for sequence in theirs]
