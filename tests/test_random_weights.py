"""Random weights of real shapes: as many as the real models have, and refused where they can't fit."""

from __future__ import annotations

import numpy as np
import pytest
from building import all_logits, build_model

from numbainfer.config import ModelConfig
from numbainfer.errors import NumbaInferError
from numbainfer.quantization import Matrix, QuantizedMatrix
from numbainfer.random_weights import RANDOM, RandomWeights
from numbainfer.registry import Operators
from numbainfer.specs import active_parameter_count, parameter_count

# What the models' cards and files say.
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
}


def test_parameters_of_real_models() -> None:
    configs = {name: ModelConfig.from_dict(raw, name) for name, raw in RANDOM.items()}
    assert {name: parameter_count(config) for name, config in configs.items()} == PARAMETERS
    # "30B, 3.3B activated" and "14.3B, 2.7B activated" say their cards
    assert round(active_parameter_count(configs["qwen3-30b-a3b"]) / 1e9, 2) == 3.35
    assert round(active_parameter_count(configs["qwen1.5-moe-a2.7b"]) / 1e9, 2) == 2.69


def test_memory_is_required() -> None:
    weights = RandomWeights("qwen3-30b-a3b")
    weights.require_memory(None)
    weights.require_memory(64 << 30)
    with pytest.raises(NumbaInferError, match=r"random qwen3-30b-a3b needs 32 GB .* has 26 GB"):
        weights.require_memory(24 << 30)


def test_a_mixture(ops: Operators, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its router is float32, and a model of it gives finite logits that differ from token to token."""
    small = {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 300, "moe_intermediate_size": 64}
    monkeypatch.setitem(RANDOM, "small", RANDOM["qwen1.5-moe-a2.7b"] | small | {"shared_expert_intermediate_size": 128})
    weights = RandomWeights("small")
    assert isinstance(weights.matrix(["model.layers.0.mlp.gate.weight"]), Matrix)
    assert isinstance(weights.matrix(["model.layers.0.mlp.experts.0.down_proj.weight"]), QuantizedMatrix)
    logits = all_logits(build_model(ops, weights), list(range(20)), 20)
    assert np.isfinite(logits).all()
    assert len(np.unique(logits.argmax(axis=-1))) > 5
