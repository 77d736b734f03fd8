"""What families have of their own, in every way of cutting up the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
from building import Checkpoints, all_logits, build_engine, build_model, difference, random_tokens, source_weights

from numbainfer.engine import Statistics
from numbainfer.model import rope_tables
from numbainfer.registry import Operators


@pytest.mark.parametrize("name", ["mistral_window", "smollm3_window", "qwen2_moe", "qwen3_moe_ties", "qwen2_yarn"])
def test_any_step_gives_the_same_logits(name: str, ops: Operators, checkpoint_of: Checkpoints) -> None:
    """Windows reach over the ends of steps and of pages; few and many choices of experts take other kernels."""
    model = build_model(ops, source_weights(checkpoint_of(name)))
    tokens = random_tokens(model, 140)
    whole = all_logits(model, tokens, 140)
    for step in (1, 9, 64):
        assert difference(all_logits(model, tokens, step), whole) <= 1e-5


def test_rope_that_depends_on_the_length(ops: Operators, checkpoint_of: Checkpoints) -> None:
    """A prompt in chunks is rotated for its whole length, as transformers rotates it at once; keys that were stored for
    another length serve no other prompt, but below the original context (24) they do."""
    golden = tiny_models.golden("llama_dynamic")
    prompt = golden["prompt"].tolist()
    weights = source_weights(checkpoint_of("llama_dynamic"))
    engine = build_engine(ops, weights, chunk=16)

    def check(length: int, cached: int) -> None:
        statistics = Statistics()
        logits = engine.prefill(prompt[:length], statistics).copy()
        assert statistics.cached_tokens == cached
        fresh = build_engine(ops, weights, chunk=64)
        assert difference(logits, fresh.prefill(prompt[:length])) <= 1e-5

    check(64, 0)
    assert difference(engine.prefill(prompt).copy(), golden["logits"][-1:]) <= 1e-4
    check(40, 0)
    check(20, 0)  # it stood with 40
    check(22, 20)
    check(24, 22)
    check(25, 0)
    for token in prompt[25:40]:  # one after another, each is rotated for the text up to it
        engine.decode(token)
    model = build_model(ops, weights)
    logits = all_logits(model, prompt[:41], 1)[-1:]
    assert difference(engine.decode(prompt[40]), logits) > 1e-3  # the first 25 of which were a prompt
    assert difference(all_logits(model, prompt, 1), golden["logits"]) > 1e-3


def test_rope_tables_of_a_length(ops: Operators, checkpoint_of: Checkpoints) -> None:
    model = build_model(ops, source_weights(checkpoint_of("llama_dynamic")))
    positions = np.arange(64)
    cos, sin = rope_tables(model.config, positions)
    for position in (0, 20, 23, 24, 50, 63):
        angles = np.float32(position) * model.config.inverse_frequencies(position + 1)
        np.testing.assert_array_equal(cos[position], np.cos(angles))
        np.testing.assert_array_equal(sin[position], np.sin(angles))
    at_once = rope_tables(model.config, positions, 64)[0]
    np.testing.assert_array_equal(at_once[63], cos[63])
    assert (at_once[23] != cos[23]).any()
    np.testing.assert_array_equal(rope_tables(model.config, positions, 10)[0], cos)  # no longer than where they stand


def test_int8_experts_in_any_step(ops: Operators, checkpoint_of: Checkpoints) -> None:
    model = build_model(ops, source_weights(checkpoint_of("qwen2_moe_int8"), "int8"))
    tokens = random_tokens(model, 40)
    whole = all_logits(model, tokens, 1)
    eager = build_model(ops, source_weights(checkpoint_of("qwen2_moe_int8"), "int8"), eager=True)
    for step in (2, 9, 40):
        logits = all_logits(model, tokens, step)
        np.testing.assert_array_equal(all_logits(eager, tokens, step), logits)
        error = np.abs(logits - whole).max(axis=-1) / np.abs(whole).max()
        assert np.quantile(error, 0.8) <= 0.06  # one plane of int8 from 8 tokens a step on; some swap experts


def test_release_gives_a_mixture_back(ops: Operators, checkpoint_of: Checkpoints) -> None:
    before = ops.pool.statistics.in_use
    model = build_model(ops, source_weights(checkpoint_of("qwen2_moe_int8"), "int8"))
    all_logits(model, [1, 2, 3, 4], 2)
    assert ops.pool.statistics.in_use > before
    model.release()
    assert ops.pool.statistics.in_use == before
