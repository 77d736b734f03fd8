"""The keys of a GGUF that say what a model is, from its config: the way back of gguf_config.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from numbainfer.config import ModelConfig
from numbainfer.converters.gguf_config import ARCHITECTURES
from numbainfer.errors import NumbaInferError
from numbainfer.rope_scaling import RopeScaling, inverse_frequencies, yarn_attention_factor

_ARCHITECTURES = {name: ours for ours, name in ARCHITECTURES.items()} | {"MistralForCausalLM": "llama"}


def architecture_of(config: ModelConfig) -> str:
    """llama.cpp's name for an architecture. Raises NumbaInferError where it has none, or is said to lack a feature."""
    if config.architecture not in _ARCHITECTURES:
        raise NumbaInferError(f"llama.cpp's name for {config.architecture} is not known; it can't be written as GGUF")
    architecture = _ARCHITECTURES[config.architecture]
    rotated = tuple(architecture != "smollm3" or (i + 1) % 4 != 0 for i in range(config.layers))
    biased = architecture in ("llama", "smollm3")
    experts = config.experts
    for unsupported, what in (
        (config.rotary_size != config.head_dim, "RoPE over a part of each head"),
        (config.rope_scaling.kind == "dynamic", "dynamic RoPE scaling"),
        (any(config.windows) and config.architecture != "MistralForCausalLM", "a sliding window"),
        (config.rotated != rotated, "RoPE in these layers"),
        (not biased and (config.mlp_bias or (architecture == "qwen3" and config.attention_bias)), "these biases"),
        (experts and experts.layers != frozenset(range(config.layers)), "layers without experts"),
        (experts and experts.renormalise != (architecture == "qwen3moe"), "this norm_topk_prob"),
    ):
        if unsupported:
            raise NumbaInferError(f"llama.cpp's {architecture} does not have {what}; it can't be written as GGUF")
    return architecture


def model_keys(config: ModelConfig, architecture: str) -> dict[str, Any]:
    """What stands under the architecture's name: sizes as int, everything else as float, text or bool."""
    keys: dict[str, Any] = {
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "block_count": config.layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "vocab_size": config.vocab_size,
    }
    scaling = config.rope_scaling
    if scaling.kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(scaling.factor)}
    if scaling.kind == "yarn":
        keys["rope.scaling.original_context_length"] = scaling.original_max_positions
        usual = yarn_attention_factor(scaling.factor)
        if scaling.attention_factor != usual:
            keys["rope.scaling.attn_factor"] = scaling.attention_factor / usual
        keys |= {"rope.scaling.yarn_beta_fast": scaling.beta_fast, "rope.scaling.yarn_beta_slow": scaling.beta_slow}
    if any(config.windows):
        keys["attention.sliding_window"] = max(config.windows)
    if config.experts is not None:
        keys |= {
            "expert_count": config.experts.count,
            "expert_used_count": config.experts.per_token,
            "expert_feed_forward_length": config.experts.size,
        }
        if config.experts.shared_size:
            keys["expert_shared_feed_forward_length"] = config.experts.shared_size
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def rope_factors(config: ModelConfig) -> np.ndarray | None:
    """What llama3 scaling, or factors of any kind, divide the RoPE frequencies by: float32 [head_dim / 2], or None."""
    if config.rope_scaling.kind not in ("llama3", "factors"):
        return None
    plain = inverse_frequencies(config.head_dim, config.rope_theta, RopeScaling())
    scaled = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    if config.rope_scaling.kind == "factors":
        return np.asarray(config.rope_scaling.factors, np.float32)
    return (plain / scaled).astype(np.float32)
