"""ModelConfig: what it takes from config.json, and that it takes nothing on faith."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import reference
import tiny_models

from numbainfer.config import ModelConfig, RopeScaling
from numbainfer.errors import NumbaInferError
from numbainfer.specs import layer_specs, parameter_count, parameter_groups, spec_for

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read(change: dict[str, Any] | None = None, name: str = "llama_gqa_tied", style: int = 4) -> ModelConfig:
    """A good config with keys changed; None as a value stands for null, "DROP" takes the key out."""
    raw = tiny_models.hf_config(name, style=style) | (change or {})
    raw = {key: value for key, value in raw.items() if value != "DROP"}
    return ModelConfig.from_dict(json.loads(json.dumps(raw)), "here/config.json")


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_every_family(name: str) -> None:
    raw = tiny_models.CONFIGS[name]
    config = read(name=name)
    assert (config.layers, config.hidden_size) == (raw["num_hidden_layers"], raw["hidden_size"])
    assert (config.heads, config.kv_heads) == (raw["num_attention_heads"], raw["num_key_value_heads"])
    assert config.head_dim == tiny_models.head_dim(raw)
    assert (config.norm_eps, config.rope_theta) == (raw["rms_norm_eps"], raw["rope_theta"])
    assert (config.vocab_size, config.intermediate_size) == (raw["vocab_size"], raw["intermediate_size"])
    assert (config.tied_embeddings, config.max_positions) == (raw["tie_word_embeddings"], 256)
    # every tensor of the family, and no other
    shapes = {p.name: p.shape for group in parameter_groups(config) for p in group}
    assert shapes == tiny_models.shapes(name)
    assert parameter_count(config) == sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_transformers_4_and_5_say_the_same(name: str) -> None:
    old, new = read(name=name), read(name=name, style=5)
    assert old == new
    np.testing.assert_array_equal(old.inverse_frequencies(), new.inverse_frequencies())


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_inverse_frequencies(name: str) -> None:
    raw = tiny_models.CONFIGS[name]
    expected = reference.rope_inv_freq(tiny_models.head_dim(raw), raw["rope_theta"])
    if scaling := raw["rope_scaling"]:
        values = {key: value for key, value in scaling.items() if key != "rope_type"}
        values["original_context"] = values.pop("original_max_position_embeddings")
        expected = reference.llama3_inv_freq(expected, **values)
    frequencies = read(name=name).inverse_frequencies()
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, expected, rtol=1e-6)


def test_llama_3_2_frequencies() -> None:
    """The real model's numbers: theta 500,000, factor 32 over 8,192, heads of 64."""
    scaling = LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}
    config = read({"rope_theta": 5e5, "rope_scaling": scaling, "head_dim": 64})
    base = reference.rope_inv_freq(64, 5e5)
    expected = reference.llama3_inv_freq(base, 32.0, 1.0, 4.0, 8192)
    np.testing.assert_allclose(config.inverse_frequencies(), expected, rtol=1e-6)
    ratios = base / expected
    assert ratios.min() == 1
    assert ratios.max() == pytest.approx(32)
    assert ((ratios > 1.01) & (ratios < 31.9)).any()  # interpolated ones between


def test_other_rope_scalings() -> None:
    base = reference.rope_inv_freq(20, 1e5)
    linear = read({"rope_scaling": {"type": "linear", "factor": 4.0}})  # "type" is how it was once called
    np.testing.assert_allclose(linear.inverse_frequencies(), base / 4, rtol=1e-6)
    factors = [1.0 + i for i in range(10)]
    listed = read({"rope_scaling": {"rope_type": "factors", "factors": factors}})
    np.testing.assert_allclose(listed.inverse_frequencies(), base / factors, rtol=1e-6)
    assert read({"rope_scaling": {"rope_type": "default"}}).rope_scaling == RopeScaling()


def test_defaults_are_those_of_transformers() -> None:
    dropped = ["num_key_value_heads", "rope_theta", "rope_scaling", "tie_word_embeddings", "attention_bias", "mlp_bias"]
    config = read(dict.fromkeys(dropped, "DROP"))
    assert (config.kv_heads, config.rope_theta, config.rope_scaling) == (config.heads, 1e4, RopeScaling())
    assert (config.tied_embeddings, config.attention_bias, config.mlp_bias) == (False, False, False)
    assert read({"head_dim": None}).head_dim == 20


def test_specs() -> None:
    def flags(name: str, **change: Any) -> tuple[bool, ...]:
        config = read(change, name)
        layers = layer_specs(config)
        assert len(layers) == config.layers
        return (layers[0].qkv_bias, layers[0].output_bias, layers[0].mlp_bias, layers[0].qk_norm)

    assert flags("llama_gqa_tied") == (False, False, False, False)
    assert flags("llama_gqa_tied", attention_bias=True) == (True, True, False, False)
    assert flags("llama_gqa_tied", mlp_bias=True) == (False, False, True, False)
    assert flags("qwen2_gqa_tied") == (True, False, False, False)
    assert flags("qwen3_tied") == (False, False, False, True)
    assert flags("qwen3_tied", attention_bias=True) == (True, True, False, True)
    with pytest.raises(NumbaInferError, match=r"MambaForCausalLM is not supported \(supported: LlamaForCausalLM, "):
        spec_for(read({"architectures": ["MambaForCausalLM"]}))


@pytest.mark.parametrize(
    "change",
    [
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2},
        {"hidden_act": "swish"},
        {"layer_types": ["full_attention"] * 2},
        {"partial_rotary_factor": 1.0},
        {"some_new_feature": False, "another": None, "a_third": [], "a_fourth": 0},  # switched off
        {"_name_or_path": "x/y", "torch_dtype": "bfloat16", "pretraining_tp": 1, "transformers_version": "9"},
        {"rope_scaling": {"rope_type": "linear", "factor": 1, "partial_rotary_factor": 1.0}},
    ],
    ids=str,
)
def test_what_changes_nothing_is_taken(change: dict[str, Any]) -> None:
    assert read(change).layers == 2


def lies(key: str, *values: Any) -> list[tuple[dict[str, Any], str]]:
    return [({key: value}, key) for value in values]


SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"]
BAD: list[tuple[dict[str, Any], str]] = [
    # not known, or known to change what is computed
    *lies("attention_sink", 1, "x", True, [1]),
    *lies("use_sliding_window", True),
    *lies("hidden_act", "gelu", None, 3),
    *lies("partial_rotary_factor", 0.5),
    *lies("rope_interleaved", True),
    *lies("layer_types", ["full_attention", "sliding_attention"], ["full_attention", 3], 7, True, "sliding"),
    *lies("architectures", "DROP", None, [], ["A", "B"], "LlamaForCausalLM", [5], [None], {}),
    # sizes
    *[bad for key in SIZES for bad in lies(key, 0, -1, 2.0, True, "8", 2**31, 10**30, [], "DROP", None)],
    *lies("num_attention_heads", 0, -4, 4097, 4.0, "DROP"),
    ({"num_attention_heads": 3, "num_key_value_heads": 3}, "hidden_size 80 is not a multiple of 3 heads"),
    ({"num_key_value_heads": 3}, "4 attention heads can't share 3 key/value heads"),
    *lies("num_key_value_heads", 0, -2, 2.0, False, 2**40),
    *lies("head_dim", 0, -2, 1.5, 5000, 15, "20"),
    # numbers
    *lies("rms_norm_eps", 0, -1e-5, math.nan, math.inf, "1e-5", "DROP", None, 2),
    *lies("rope_theta", 0, -1.0, math.nan, math.inf, "1e4", None, True),
    # flags
    *lies("tie_word_embeddings", 1, "yes", None),
    *lies("attention_bias", 1, "no"),
    *lies("mlp_bias", [True]),
]
BAD_ROPE: list[tuple[Any, str]] = [
    (7, "must be an object"),
    ([], "must be an object"),
    ({"rope_type": "yarn", "factor": 4.0}, "'yarn' is not supported"),
    ({"rope_type": None}, "None is not supported"),
    ({"rope_type": ["linear"]}, "is not supported"),
    ({"rope_type": "default", "factor": 2.0}, "factor = 2.0 is not supported"),
    ({"rope_type": "linear"}, "factor must be"),
    ({"rope_type": "linear", "factor": 0}, "factor must be"),
    ({"rope_type": "linear", "factor": math.nan}, "factor must be"),
    ({"rope_type": "linear", "factor": 2.0, "beta": 1}, "beta = 1 is not supported"),
    ({"rope_type": "linear", "factor": 2.0, "rope_theta": -5}, "rope_theta must be"),
    ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"rope_type": "factors", "factors": [1.0] * 9}, "needs 10 factors"),
    ({"rope_type": "factors", "factors": 3}, "needs 10 factors"),
    ({"rope_type": "factors", "factors": [1.0] * 9 + [0]}, "must be positive numbers"),
    ({"rope_type": "factors", "factors": [1.0] * 9 + ["1"]}, "must be positive numbers"),
    (LLAMA3, "original_max_position_embeddings must be"),
    (LLAMA3 | {"original_max_position_embeddings": 32, "high_freq_factor": 1.0}, "must be above low_freq_factor"),
    (LLAMA3 | {"original_max_position_embeddings": -32}, "original_max_position_embeddings must be"),
]


@pytest.mark.parametrize(
    ("change", "problem"), BAD + [({"rope_scaling": rope}, problem) for rope, problem in BAD_ROPE], ids=str
)
def test_what_cannot_be_is_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(NumbaInferError) as caught:
        read(change)
    message = str(caught.value)
    assert message.startswith("here/config.json: ")
    assert problem in message
    assert "\n" not in message
    assert len(message) < 300


@pytest.mark.parametrize(("rope", "problem"), BAD_ROPE, ids=str)
def test_rope_parameters_as_transformers_5_writes_them(rope: Any, problem: str) -> None:
    with pytest.raises(NumbaInferError) as caught:
        read({"rope_parameters": rope}, style=5)
    assert problem in str(caught.value)


def test_an_unknown_value_is_not_quoted_at_length() -> None:
    with pytest.raises(NumbaInferError) as caught:
        read({"blob": "x\n" * 100_000})
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, 5, "x", [], [{}]])
def test_what_is_no_object(content: Any) -> None:
    with pytest.raises(NumbaInferError, match=r"here: not a JSON object"):
        ModelConfig.from_dict(content, "here")
