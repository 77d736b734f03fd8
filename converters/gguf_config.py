"""Translates GGUF metadata into Hugging Face's config.json and generation_config.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from numbainfer.errors import NumbaInferError
from numbainfer.rope_scaling import yarn_attention_factor
from numbainfer.safetensors_file import shown

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2moe": "Qwen2MoeForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
}

# Tokens that end a turn or a text. GGUF names a single EOS, and chat models stop at any of these; they
# count where the vocabulary marks them as control tokens.
_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_CONTROL = 3  # tokenizer.ggml.token_type

# The one set of parameters that Llama 3.1, 3.2 and 3.3 share; GGUF keeps only the factors they lead to.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class _Metadata:
    """Typed reads of one architecture's keys; the errors name a key that is missing or makes no sense."""

    def __init__(self, values: Mapping[str, Any], architecture: str) -> None:
        self.values, self.prefix = values, architecture + "."

    def get(self, key: str, default: object = None) -> Any:
        return self.values.get(self.prefix + key, default)

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]  # one number for every layer
        if type(value) is not int or not 0 < value < 2**31:
            raise self.error(key, value, "a positive number, the same for all layers")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if not isinstance(value, (int, float)) or not 0 < value < _FLOAT32_MAX:
            raise self.error(key, value, "a positive number")
        # Stored as float32: 9.999999747378752e-06 was written as 1e-05, and means that.
        return float(str(np.float32(value)))

    def error(self, key: str, value: object, wanted: str) -> NumbaInferError:
        found = "is missing" if value is None else f"is {shown(value)}, not {wanted}"
        return NumbaInferError(f"{self.prefix}{key} {found}")


def model_config(
    metadata: Mapping[str, Any],
    architecture: str,
    *,
    vocab_size: int,
    tensor_names: Collection[str],
    rope_factors: np.ndarray[Any, Any] | None,
) -> dict[str, Any]:
    """config.json of a GGUF model.

    vocab_size: the embedding's rows. tensor_names: the file's, which tell of biases and of a head of its own.
    rope_factors: rope_freqs.weight, float32 [head_dim/2], if the file has it. Raises NumbaInferError,
    naming the key at fault but not the file.
    """
    meta = _Metadata(metadata, architecture)
    hidden_size, heads = meta.size("embedding_length"), meta.size("attention.head_count")
    head_dim = meta.size("attention.key_length", hidden_size // heads)
    if meta.size("attention.value_length", head_dim) != head_dim:
        raise meta.error("attention.value_length", meta.get("attention.value_length"), f"{head_dim}, as the keys'")
    if head_dim % 2 or meta.size("rope.dimension_count", head_dim) != head_dim:
        raise meta.error("rope.dimension_count", meta.get("rope.dimension_count"), f"the whole head's {head_dim}")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > vocab_size:
        raise NumbaInferError(f"{len(tokens)} tokens, but token_embd.weight has {vocab_size} rows")

    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture.replace("moe", "_moe"),
        "hidden_size": hidden_size,
        "intermediate_size": meta.size("feed_forward_length"),
        "num_hidden_layers": meta.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": meta.size("context_length"),
        "hidden_act": "silu",
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": meta.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "torch_dtype": "float32",
    }
    scaling = _rope_scaling(meta, rope_factors, config["rope_theta"], head_dim)
    if scaling is not None:
        config["rope_scaling"] = scaling
    if architecture in ("llama", "smollm3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in tensor_names
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensor_names
    if architecture == "smollm3":  # llama.cpp knows this one number, and the file has no key
        config["no_rope_layer_interval"] = 4
    return config | _window(meta, architecture) | _experts(meta, architecture) | _special_tokens(metadata)


def _window(meta: _Metadata, architecture: str) -> dict[str, Any]:
    """The sliding window of a Mistral, which is a llama otherwise."""
    if not meta.get("attention.sliding_window"):
        return {}
    if architecture != "llama":
        raise NumbaInferError(f"{meta.prefix}attention.sliding_window is not supported")
    family = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    return {**family, "sliding_window": meta.size("attention.sliding_window")}


def _experts(meta: _Metadata, architecture: str) -> dict[str, Any]:
    """The mixture of experts, with llama.cpp's defaults for what files of its first days lack."""
    if not architecture.endswith("moe"):
        if meta.get("expert_count"):
            raise NumbaInferError(f"{meta.prefix}expert_count: experts of {architecture} (Mixtral) are not supported")
        return {}
    for key, usual in (("expert_gating_func", 1), ("expert_weights_scale", 1.0), ("expert_group_count", 1)):
        if meta.get(key, usual) not in (usual, 0):
            raise NumbaInferError(f"{meta.prefix}{key} = {shown(meta.get(key))} is not supported")
    inner, used = meta.size("feed_forward_length"), meta.size("expert_used_count")
    experts: dict[str, Any] = {
        "num_experts": meta.size("expert_count"),
        "num_experts_per_tok": used,
        "moe_intermediate_size": meta.size("expert_feed_forward_length", max(1, inner // used)),
        "norm_topk_prob": bool(meta.get("expert_weights_norm", architecture == "qwen3moe")),
    }
    if architecture == "qwen2moe":
        experts["shared_expert_intermediate_size"] = meta.size("expert_shared_feed_forward_length", inner)
    return experts


def generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: BOS, and every token that ends generation."""
    special = _special_tokens(metadata)
    ends = [special["eos_token_id"]] if "eos_token_id" in special else []
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(types, list) and len(tokens) == len(types):
        for token in _END_TOKENS:
            if token in tokens and types[tokens.index(token)] == _CONTROL:
                ends.append(tokens.index(token))
    return special | ({"eos_token_id": list(dict.fromkeys(ends))} if ends else {})


def _special_tokens(metadata: Mapping[str, Any]) -> dict[str, int]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    limit = len(tokens) if isinstance(tokens, list) else 2**31
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None:
            if type(value) is not int or not 0 <= value < limit:
                raise NumbaInferError(f"tokenizer.ggml.{key}_token_id is {shown(value)}, not a token")
            special[f"{name}_token_id"] = value
    return special


def _rope_scaling(
    meta: _Metadata, factors: np.ndarray[Any, Any] | None, theta: float, head_dim: int
) -> dict[str, Any] | None:
    kind = meta.get("rope.scaling.type") or ("linear" if meta.get("rope.scale_linear") else "none")
    if kind != "none":
        if factors is not None:
            raise NumbaInferError(f"RoPE scaling {shown(kind)} together with rope_freqs.weight is not supported")
        if kind == "linear":
            old_key = meta.number("rope.scale_linear", 1.0)
            return {"rope_type": "linear", "factor": meta.number("rope.scaling.factor", old_key)}
        if kind == "yarn":
            original = meta.size("rope.scaling.original_context_length")
            factor = meta.number("rope.scaling.factor")
            scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
            for key in ("beta_fast", "beta_slow"):
                if meta.get(f"rope.scaling.yarn_{key}") is not None:
                    scaling[key] = meta.number(f"rope.scaling.yarn_{key}")
            for key in ("attn_factor", "yarn_attn_factor"):
                if meta.get(f"rope.scaling.{key}") is not None:  # times what YaRN has anyway
                    scaling["attention_factor"] = meta.number(f"rope.scaling.{key}") * yarn_attention_factor(factor)
            for key in ("yarn_log_multiplier", "yarn_ext_factor"):
                if meta.get(f"rope.scaling.{key}", 1.0) != 1.0:
                    raise NumbaInferError(f"{meta.prefix}rope.scaling.{key} is not supported")
            return scaling
        raise meta.error("rope.scaling.type", kind, "none, linear or yarn")
    if factors is None:
        return None
    if factors.dtype != np.float32 or factors.shape != (head_dim // 2,) or not np.all(factors > 0):
        raise NumbaInferError(f"rope_freqs.weight is not {head_dim // 2} positive float32 factors")
    llama3 = {"rope_type": "llama3", "factor": float(str(factors.max())), **_LLAMA3_ROPE}
    # float32 arithmetic wrote them, hence not to the last bit.
    if np.allclose(_llama3_factors(llama3, theta, head_dim), factors, rtol=1e-5, atol=0):
        return llama3
    return {"rope_type": "factors", "factors": [float(factor) for factor in factors]}


def _llama3_factors(rope: Mapping[str, Any], theta: float, head_dim: int) -> np.ndarray[Any, Any]:
    """What llama3 scaling divides each RoPE frequency by, float64 [head_dim/2].

    Wavelengths longer than the original context / low_freq_factor are stretched by `factor`, those
    shorter than it / high_freq_factor not at all, those between by a blend (Hugging Face's "llama3").
    """
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * np.pi)
    blend = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
    blend = np.clip(blend, 0, 1)
    return np.asarray(1 / ((1 - blend) / rope["factor"] + blend))
