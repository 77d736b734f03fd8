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
from numbainfer.rope_scaling import yarn_attention_factor
from numbainfer.specs import active_parameter_count, layer_specs, parameter_count, parameter_groups

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
    assert config.tied_embeddings == raw["tie_word_embeddings"]
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
    config = read(name=name)
    for length in (0, 30, 64):
        frequencies = config.inverse_frequencies(length)
        assert frequencies.dtype == np.float32
        expected, _ = reference.rope_of(tiny_models.CONFIGS[name], length)
        np.testing.assert_allclose(frequencies, expected, rtol=2e-6)


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


def test_how_far_scalings_reach() -> None:
    def reach(positions: int, **scaling: Any) -> int:
        return read({"max_position_embeddings": positions, "rope_scaling": scaling}).max_positions

    assert reach(4096, rope_type="linear", factor=4.0) == 4096
    assert reach(4096, rope_type="dynamic", factor=2.0) == 8192
    assert reach(32768, rope_type="yarn", factor=4.0, original_max_position_embeddings=32768) == 131072
    assert reach(131072, rope_type="yarn", factor=4.0, original_max_position_embeddings=32768) == 131072
    assert reach(131072, **LLAMA3, original_max_position_embeddings=8192) == 131072


def test_yarn_attention_factors() -> None:
    def factor(**more: Any) -> float:
        base = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
        return read({"rope_scaling": base | more}).rope_scaling.attention_factor

    assert factor() == pytest.approx(0.1 * math.log(4) + 1) == factor(mscale=None) == factor(mscale=0.7)
    assert factor(mscale=2.0, mscale_all_dim=0.5) == pytest.approx((0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1))
    assert factor(attention_factor=1.25, mscale=2.0, mscale_all_dim=0.5) == 1.25
    assert factor(factor=1.0) == 1.0
    assert yarn_attention_factor(0.5) == 1.0
    # factor null: what the context grows by; a top-level original context wins, and no original is max_position's
    derived = read({"rope_scaling": {"rope_type": "yarn", "factor": None}, "original_max_position_embeddings": 32})
    assert (derived.rope_scaling.factor, derived.rope_scaling.original_max_positions) == (8.0, 32)
    assert read({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}).rope_scaling.original_max_positions == 256


def test_windows() -> None:
    def windows(name: str, **change: Any) -> tuple[int, ...]:
        return read(change, name).windows

    assert windows("llama_gqa_tied", sliding_window=8) == (0, 0)  # which transformers ignores there, too
    assert windows("mistral_window") == (9, 9)
    assert windows("mistral_window", sliding_window=None) == windows("mistral_window", sliding_window="DROP") == (0, 0)
    assert windows("qwen2_window") == (0, 11, 11)
    assert windows("qwen2_window", use_sliding_window=False) == (0, 0, 0)
    assert windows("qwen2_window", max_window_layers=0) == (11, 11, 11)
    assert windows("qwen2_window", max_window_layers="DROP") == (0, 0, 0)  # 28, says transformers
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows("qwen2_window", layer_types=kinds) == (11, 0, 11)
    assert windows("qwen3_window") == (7, 0)
    assert windows("smollm3_window") == (0, 12, 0)
    assert windows("qwen2_moe", max_window_layers=3) == (10, 0, 10)
    assert windows("qwen2_moe", use_sliding_window=False, sliding_window=0) == (0, 0, 0)  # as transformers 5 writes it
    assert windows("qwen3_moe") == (13, 13, 13, 13)


def test_layers_without_rope() -> None:
    def rotated(**change: Any) -> tuple[bool, ...]:
        return read(change, "smollm3_tied").rotated

    assert rotated() == (True, False, True, False)
    assert rotated(no_rope_layer_interval="DROP") == (True, True, True, False)
    assert rotated(no_rope_layers=[0, 1, 1, 1, 0, 0]) == (False, True, True, True)
    assert read(name="llama_gqa_tied").rotated == (True, True)


def test_experts() -> None:
    experts = read(name="qwen2_moe").experts
    assert experts is not None
    assert (experts.count, experts.per_token, experts.size, experts.shared_size) == (6, 2, 40, 56)
    assert (experts.layers, experts.renormalise) == ({0, 2}, False)
    config = read(name="qwen3_moe")
    assert config.experts is not None
    assert (config.experts.layers, config.experts.renormalise, config.experts.shared_size) == ({1, 3}, True, 0)
    # two layers, of whose 8 experts 3 are active: three matrices of 40 x 48 each
    assert active_parameter_count(config) == parameter_count(config) - 2 * 5 * 3 * 40 * 48
    assert active_parameter_count(read()) == parameter_count(read())
    assert read(name="llama_gqa_tied").experts is None


def test_defaults_of_families() -> None:
    assert read({"tie_word_embeddings": "DROP", "rope_theta": "DROP"}, "smollm3_tied").rope_theta == 2e6
    assert read({"tie_word_embeddings": "DROP"}, "smollm3_window").tied_embeddings
    assert read({"head_dim": "DROP"}, "qwen3_tied").head_dim == 128
    assert layer_specs(read(name="qwen2_moe"))[0].qkv_bias
    assert not layer_specs(read({"qkv_bias": False}, "qwen2_moe"))[0].qkv_bias


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
    assert [(layer.rotated, layer.window) for layer in layer_specs(read(name="smollm3_window"))] == [
        *((True, 0), (False, 12), (True, 0))
    ]
    assert [(layer.experts, layer.shared_expert) for layer in layer_specs(read(name="qwen2_moe"))] == [
        *((True, True), (False, False), (True, True))
    ]
    with pytest.raises(NumbaInferError, match=r"MambaForCausalLM is not supported \(supported: LlamaForCausalLM, "):
        read({"architectures": ["MambaForCausalLM"]})


@pytest.mark.parametrize(
    "change",
    [
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2},
        {"hidden_act": "swish"},
        {"layer_types": ["full_attention"] * 2},
        {"partial_rotary_factor": 1.0},
        {"original_max_position_embeddings": 8192},  # which only scalings read
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
    *lies("partial_rotary_factor", 0, 1.5, "x", 0.05, 0.25),  # of heads of 20: 1 and 5 values are no pairs
    *lies("num_experts", 8),
    *lies("no_rope_layers", [1, 0]),
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
    ({"rope_type": "longrope", "factor": 4.0}, "'longrope' is not supported"),
    ({"rope_type": None}, "None is not supported"),
    ({"rope_type": ["linear"]}, "is not supported"),
    ({"rope_type": "default", "factor": 2.0}, "factor = 2.0 is not supported"),
    ({"rope_type": "linear"}, "factor must be"),
    ({"rope_type": "linear", "factor": 0}, "factor must be"),
    ({"rope_type": "linear", "factor": math.nan}, "factor must be"),
    ({"rope_type": "linear", "factor": 2.0, "beta": 1}, "beta = 1 is not supported"),
    ({"rope_type": "linear", "factor": 2.0, "rope_theta": -5}, "rope_theta must be"),
    ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.05}, "partial_rotary_factor 0.05"),
    ({"rope_type": "dynamic"}, "factor must be"),
    ({"rope_type": "dynamic", "factor": 0.5}, "factor must be 1 or more"),
    (
        {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64},
        "goes by max_position_embeddings",
    ),
    ({"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.1}, "more than one pair"),
    ({"rope_type": "yarn", "factor": 0}, "factor must be"),
    ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}, "rope_theta above 1"),
    ({"rope_type": "yarn", "factor": 2.0, "beta_fast": "32"}, "beta_fast must be"),
    ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "truncate must be"),
    ({"rope_type": "yarn", "factor": 2.0, "mscale": -1}, "mscale must be"),
    ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0.5}, "original context"),
    ({"rope_type": "factors", "factors": [1.0] * 9}, "needs 10 factors"),
    ({"rope_type": "factors", "factors": 3}, "needs 10 factors"),
    ({"rope_type": "factors", "factors": [1.0] * 9 + [0]}, "must be positive numbers"),
    ({"rope_type": "factors", "factors": [1.0] * 9 + ["1"]}, "must be positive numbers"),
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


BAD_FAMILIES: list[tuple[str, dict[str, Any], str]] = [
    ("mistral_window", {"sliding_window": 0}, "sliding_window"),
    ("mistral_window", {"sliding_window": "9"}, "sliding_window"),
    ("mistral_window", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("mistral_window", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ("qwen2_window", {"sliding_window": None, "layer_types": ["sliding_attention"] * 3}, "no sliding window"),
    ("qwen2_window", {"use_sliding_window": 1}, "use_sliding_window"),
    ("qwen2_window", {"max_window_layers": -1}, "max_window_layers"),
    ("qwen2_window", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 3 layers"),
    ("qwen2_window", {"layer_types": ["chunked_attention"] * 3}, "layer_types must be a list of"),
    ("smollm3_tied", {"no_rope_layers": [1, 0, 1]}, "no_rope_layers has 3 entries for 4 layers"),
    ("smollm3_tied", {"no_rope_layers": [1, 0, 1, 2]}, "no_rope_layers"),
    ("smollm3_tied", {"no_rope_layers": [True] * 4}, "no_rope_layers"),
    ("smollm3_tied", {"no_rope_layers": 3}, "no_rope_layers"),
    ("smollm3_tied", {"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
    ("smollm3_tied", {"num_experts": 8}, "num_experts"),
    ("qwen3_moe", {"num_experts": "DROP"}, "num_experts"),
    ("qwen3_moe", {"num_experts": 0}, "num_experts"),
    ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds the 8 experts"),
    ("qwen3_moe", {"moe_intermediate_size": -4}, "moe_intermediate_size"),
    ("qwen3_moe", {"norm_topk_prob": "yes"}, "norm_topk_prob"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
    ("qwen3_moe", {"mlp_only_layers": [-1]}, "mlp_only_layers"),
    ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
    ("qwen3_moe", {"n_group": 4}, "n_group"),
    ("qwen2_moe", {"shared_expert_intermediate_size": None}, "shared_expert_intermediate_size"),
    ("qwen2_moe", {"qkv_bias": "x"}, "qkv_bias"),
]


@pytest.mark.parametrize(("name", "change", "problem"), BAD_FAMILIES, ids=str)
def test_what_a_family_cannot_be_is_refused(name: str, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(NumbaInferError, match=problem):
        read(change, name)


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
