"""The reference itself, against numbers worked out by hand and against Hugging Face transformers' goldens."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import tiny_models
from numpy.testing import assert_allclose, assert_array_equal

RNG = np.random.default_rng(0)


def test_embedding_picks_rows():
    assert_array_equal(reference.embedding([2, 0, 2], [[1, 2], [3, 4], [5, 6]]), [[5, 6], [1, 2], [5, 6]])


def test_rmsnorm_of_3_4():
    # mean of 9 and 16 is 12.5; with eps 3.5 the root is 4
    assert_allclose(reference.rmsnorm([[3.0, 4.0]], [2.0, 10.0], eps=3.5), [[1.5, 10.0]])
    assert_allclose(reference.rmsnorm([[3.0, 4.0]], [1.0, 1.0], eps=0.0), np.array([[3.0, 4.0]]) / np.sqrt(12.5))


def test_linear_rows_are_outputs():
    x, weight = [[1.0, 10.0]], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    assert_array_equal(reference.linear(x, weight), [[21.0, 43.0, 65.0]])
    assert_array_equal(reference.linear(x, weight, bias=[1.0, 2.0, 3.0]), [[22.0, 45.0, 68.0]])
    assert_array_equal(reference.linear(x, weight, residual=[[-21.0, 0.0, 1.0]]), [[0.0, 43.0, 66.0]])


def test_quantize_rounds_half_to_even_and_keeps_zero_groups():
    # the largest of the first group is 127, so its scale is 1 and the values are their own quotients
    x = [[127.0, 0.5, 1.5, -2.5, 0.0, 0.0, 0.0, 0.0], [0.0, -254.0, 3.0, 1.0, 1.0, 1.0, -1.0, 0.0]]
    q, scales = reference.quantize_groups(x, group=4)
    assert_array_equal(scales, [[1.0, 0.0], [2.0, 1.0 / 127.0]])
    assert_array_equal(q, [[127, 0, 2, -2, 0, 0, 0, 0], [0, -127, 2, 0, 127, 127, -127, 0]])
    assert q.dtype == np.int8
    assert_allclose(
        reference.dequantize(q, scales),
        [[127, 0, 2, -2, 0, 0, 0, 0], [0, -254, 4, 0, 1, 1, -1, 0]],
        atol=1e-12,
    )


def test_quantize_is_within_half_a_step():
    x = RNG.standard_normal((5, 96))
    q, scales = reference.quantize_groups(x, group=32)
    assert np.abs(reference.dequantize(q, scales) - x).max() <= scales.max() / 2 * (1 + 1e-12)


def test_rope_frequencies():
    assert_allclose(reference.rope_inv_freq(6, 1000.0), [1.0, 0.1, 0.01])


def test_llama3_scaling_has_three_branches():
    # original context 32, low 1, high 4: wavelength 4 is kept, 64 divided by 8, and 16 makes 2 turns, a third
    # of the way from 1 to 4: 2/3 * 1/8 + 1/3 = 5/12
    wavelengths = np.array([4.0, 16.0, 64.0])
    frequencies = 2 * np.pi / wavelengths
    scaled = reference.llama3_inv_freq(frequencies, 8.0, 1.0, 4.0, 32)
    assert_allclose(scaled / frequencies, [1.0, 5 / 12, 1 / 8])


def test_rope_turns_half_split_pairs():
    # d = 4 pairs 0 with 2 and 1 with 3; a quarter turn takes (1, 0) to (0, 1) and (0, 1) to (-1, 0)
    x = np.array([[[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]])
    quarter = np.array([np.pi / 2, np.pi / 2])
    assert_allclose(reference.rope(x, [0], quarter), x)
    turned = reference.rope(x, [1], quarter)
    assert_allclose(turned, [[[0.0, 0.0, 1.0, 0.0], [0.0, -1.0, 0.0, 0.0]]], atol=1e-15)
    # each pair by its own frequency: the first stands still
    assert_allclose(reference.rope(x, [2], [0.0, np.pi / 2]), [[[1.0, 0, 0, 0], [0, 0, 0, -1.0]]], atol=1e-15)


def test_rope_scores_depend_on_distance_alone():
    q, k = RNG.standard_normal((2, 1, 1, 8))
    inv_freq = reference.rope_inv_freq(8, 100.0)

    def score(m: int, n: int) -> float:
        return float((reference.rope(q, [m], inv_freq) * reference.rope(k, [n], inv_freq)).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-12)
    assert score(9, 4) != pytest.approx(score(4, 9), rel=1e-3)


def test_softmax():
    assert_allclose(reference.softmax([[0.0, np.log(3.0)]]), [[0.25, 0.75]])
    assert_allclose(reference.softmax([[1e4, 1e4 + np.log(3.0), -np.inf]]), [[0.25, 0.75, 0.0]], rtol=1e-11)


def test_attention_is_causal_and_by_position():
    # equal keys make the weights equal: a token gets the mean of the values up to its position
    keys, values = np.zeros((4, 1, 1)), np.array([[[1.0]], [[3.0]], [[8.0]], [[100.0]]])
    q = np.ones((3, 1, 1))
    assert_allclose(reference.attention(q, [keys], [values], [0, 0, 0], [2, 0, 1])[:, 0, 0], [4.0, 1.0, 2.0])
    # and with a window to the mean of its own value and the one before
    windowed = reference.attention(q, [keys], [values], [0, 0, 0], [2, 0, 1], window=2)
    assert_allclose(windowed[:, 0, 0], [5.5, 1.0, 2.0])


def test_attention_scale():
    # d = 4: q k / sqrt(4) is 0 and log 3, so the weights are 1/4 and 3/4
    keys = np.array([[[0.0, 0, 0, 0]], [[2 * np.log(3.0), 0, 0, 0]]])
    values = np.array([[[0.0, 0, 0, 4.0]], [[8.0, 0, 0, 0]]])
    q = np.array([[[1.0, 5.0, 0, 0]]])
    assert_allclose(reference.attention(q, [keys], [values], [0], [1]), [[[6.0, 0, 0, 1.0]]])
    assert_allclose(reference.attention(q, [keys], [values], [0], [1], scale=0.0), [[[4.0, 0, 0, 2.0]]])


def test_attention_groups_neighbouring_heads():
    # one position, so the output is the value: heads 0, 1, 2 read kv head 0 and heads 3, 4, 5 kv head 1
    kv = np.array([[[7.0], [9.0]]])
    out = reference.attention(np.ones((1, 6, 1)), [kv], [kv], [0], [0])
    assert_array_equal(out[0, :, 0], [7, 7, 7, 9, 9, 9])


def test_attention_keeps_sequences_apart():
    keys = [RNG.standard_normal((n, 2, 4)) for n in (3, 5)]
    values = [RNG.standard_normal((n, 2, 4)) for n in (3, 5)]
    q = RNG.standard_normal((4, 4, 4))
    together = reference.attention(q, keys, values, [0, 1, 1, 0], [2, 4, 0, 1])
    first = reference.attention(q[[0, 3]], keys[:1], values[:1], [0, 0], [2, 1])
    second = reference.attention(q[[1, 2]], keys[1:], values[1:], [0, 0], [4, 0])
    assert_array_equal(together, np.stack([first[0], second[0], second[1], first[1]]))


def test_swiglu():
    # silu(log 3) = log 3 * 3/4, silu(-log 3) = -log 3 * 1/4; no overflow far out
    gate, up = np.array([[0.0, np.log(3.0), -np.log(3.0), 1e4, -1e4]]), np.array([[9.0, 4.0, 4.0, 2.0, 2.0]])
    assert_allclose(reference.swiglu(gate, up), [[0.0, 3 * np.log(3.0), -np.log(3.0), 2e4, 0.0]])


def test_add():
    assert_array_equal(reference.add([[1.0, 2.0]], [[0.5, -2.0]]), [[1.5, 0.0]])


def test_argmax_and_top_k_prefer_the_lower_index():
    x = [[1.0, 5.0, 5.0, -2.0], [0.0, 0.0, -1.0, 0.5]]
    assert_array_equal(reference.argmax(x), [1, 3])
    values, indices = reference.top_k(x, 3)
    assert_array_equal(values, [[5, 5, 1], [0.5, 0, 0]])
    assert_array_equal(indices, [[1, 2, 0], [3, 0, 1]])


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_weights_are_those_of_the_goldens(name: str):
    total = sum(np.abs(w.astype(np.float64)).sum() for w in tiny_models.weights(name).values())
    assert total == pytest.approx(tiny_models.golden(name)["weights_sum"], rel=1e-9)


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_whole_decoder_gives_transformers_logits(name: str):
    golden = tiny_models.golden(name)
    logits = reference.decoder(tiny_models.CONFIGS[name], tiny_models.weights(name), golden["prompt"])
    # float32 rounding inside transformers is all that may differ (make_goldens.py measures it below 1e-5)
    assert np.abs(logits - golden["logits"]).max() <= 1e-5 * np.abs(golden["logits"]).max()
