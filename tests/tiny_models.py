"""Tiny random LLaMA and Qwen models that a few lines can regenerate: what the goldens are made of.

A golden (goldens/NAME.npz) holds what Hugging Face transformers computes for a model. The weights themselves
are not stored but drawn again from a seed that depends on nothing but the model's and the tensor's names.
NumPy only, so the tests that use them need no torch.

Each model covers a corner: odd vocabularies and widths, MHA, GQA and MQA, tied and untied heads, biases,
qk-norm, a head_dim that is not hidden / heads, every RoPE scaling run past its original context, layers without RoPE,
sliding windows shorter than the prompt, mixtures of experts, with ties among the experts too.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

GOLDENS = Path(__file__).parent / "goldens"

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "use_sliding_window": False,
}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
SMOLLM3 = {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "attention_bias": False}
QWEN2_MOE = {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"}
QWEN3_MOE = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False}
COMMON = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "max_position_embeddings": 256,
    "rope_scaling": None,
}


def _config(
    family: dict[str, Any],
    shape: tuple[int, int, int, int, int, int],
    *,
    tied: bool,
    eps: float,
    theta: float,
    **rest: Any,
) -> dict[str, Any]:
    layers, hidden, heads, kv_heads, intermediate, vocab = shape
    return {
        **family,
        **COMMON,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "rms_norm_eps": eps,
        "rope_theta": theta,
        **rest,
    }


def _llama3_scaling(factor: float, high_freq_factor: float, original_context: int) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high_freq_factor,
        "original_max_position_embeddings": original_context,
    }


def _window(size: int) -> dict[str, Any]:
    return {"use_sliding_window": True, "sliding_window": size}


def _experts(count: int, per_token: int, size: int) -> dict[str, Any]:
    return {"num_experts": count, "num_experts_per_tok": per_token, "moe_intermediate_size": size}


LLAMA_BIASED = {**LLAMA, "attention_bias": True, "mlp_bias": True}
# 64 positions are two and four times the original context. head_dim 20 and theta 5e5 give wavelengths of 6.3
# (below 32 / 4: left alone), 23.3 (interpolated), 86.6 and more (above 32 / 1: divided by 8). head_dim 24 and
# theta 1e3 give 6.3, 11.2, 19.9, ... against bounds of 8 and 16. So all three branches count in both.
SCALING_32 = _llama3_scaling(factor=8.0, high_freq_factor=4.0, original_context=32)
SCALING_16 = _llama3_scaling(factor=32.0, high_freq_factor=2.0, original_context=16)

# Shapes are layers, hidden, heads, kv_heads, intermediate, vocabulary. As transformers 4 writes config.json;
# hf_config() makes of them what 5 writes. An eps of 1e-2 is large enough to show when it is ignored.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama2_mha_untied": _config(LLAMA, (3, 48, 6, 6, 172, 151), tied=False, eps=1e-5, theta=1e4),
    "llama_gqa_tied": _config(LLAMA, (2, 80, 4, 2, 100, 257), tied=True, eps=1e-6, theta=1e5),
    "llama3_scaled_tied": _config(
        LLAMA, (2, 80, 4, 2, 172, 151), tied=True, eps=1e-5, theta=5e5, head_dim=20, rope_scaling=SCALING_32
    ),
    "llama3_scaled_untied": _config(
        LLAMA, (3, 72, 3, 1, 100, 97), tied=False, eps=1e-6, theta=1e3, head_dim=24, rope_scaling=SCALING_16
    ),
    # head_dim is not hidden / heads: 48 / 4 would be 12
    "llama_head_dim": _config(LLAMA, (2, 48, 4, 2, 100, 257), tied=False, eps=1e-2, theta=1e4, head_dim=16),
    "llama_biases": _config(LLAMA_BIASED, (2, 72, 3, 3, 172, 97), tied=False, eps=1e-5, theta=1e4),
    "qwen2_gqa_tied": _config(QWEN2, (2, 72, 9, 3, 100, 257), tied=True, eps=1e-6, theta=1e6),
    "qwen2_mqa_untied": _config(QWEN2, (3, 48, 3, 1, 172, 97), tied=False, eps=1e-2, theta=1e4),
    # the heads are wider together than the hidden state (4 x 20 against 48), and narrower (6 x 8 against 72)
    "qwen3_tied": _config(QWEN3, (2, 48, 4, 2, 172, 151), tied=True, eps=1e-6, theta=1e6, head_dim=20),
    "qwen3_untied": _config(QWEN3, (3, 72, 6, 2, 100, 97), tied=False, eps=1e-2, theta=1e5, head_dim=8),
    # Sliding windows: in every layer, from a layer on, where layer_types says so. Prompts have 64 tokens.
    "mistral_window": _config(
        MISTRAL, (2, 48, 4, 2, 100, 97), tied=False, eps=1e-5, theta=1e4, head_dim=16, sliding_window=9
    ),
    "qwen2_window": _config(
        QWEN2, (3, 48, 4, 2, 100, 97), tied=False, eps=1e-6, theta=1e4, **_window(11), max_window_layers=1
    ),
    "qwen3_window": _config(
        QWEN3,
        (2, 48, 4, 2, 100, 97),
        tied=True,
        eps=1e-6,
        theta=1e4,
        head_dim=16,
        **_window(7),
        layer_types=["sliding_attention", "full_attention"],
    ),
    # Layers without RoPE: every second one, or as listed, these with a window and everything with biases.
    "smollm3_tied": _config(SMOLLM3, (4, 48, 4, 2, 100, 97), tied=True, eps=1e-6, theta=2e6, no_rope_layer_interval=2),
    "smollm3_window": _config(
        SMOLLM3 | {"attention_bias": True, "mlp_bias": True},
        (3, 48, 3, 1, 100, 97),
        tied=False,
        eps=1e-6,
        theta=1e4,
        **_window(12),
        no_rope_layers=[1, 0, 1],
    ),
    # Mixtures: with a shared expert, an MLP in layer 1 and a window in layer 0; in every second layer, with a window;
    # with pairs of experts that are always equally probable, of which the lower is to be chosen first.
    "qwen2_moe": _config(
        QWEN2_MOE,
        (3, 48, 4, 2, 100, 97),
        tied=False,
        eps=1e-6,
        theta=1e4,
        **_window(10),
        max_window_layers=1,
        **_experts(6, 2, 40),
        norm_topk_prob=False,
        shared_expert_intermediate_size=56,
        mlp_only_layers=[1],
    ),
    "qwen3_moe": _config(
        QWEN3_MOE,
        (4, 48, 4, 2, 100, 97),
        tied=False,
        eps=1e-6,
        theta=1e4,
        head_dim=16,
        **_window(13),
        **_experts(8, 3, 40),
        norm_topk_prob=True,
        decoder_sparse_step=2,
    ),
    "qwen3_moe_ties": _config(
        QWEN3_MOE,
        (2, 48, 4, 2, 100, 97),
        tied=False,
        eps=1e-6,
        theta=1e4,
        head_dim=16,
        **_experts(8, 3, 40),
        norm_topk_prob=False,
    ),
    # The other RoPE scalings. Heads of 24 have wavelengths of 6.3 to 2,915 at theta 1e4 (6.3 to 11.6 of 12 values).
    "llama_linear": _config(
        LLAMA,
        (2, 48, 2, 2, 100, 97),
        tied=False,
        eps=1e-5,
        theta=1e4,
        rope_scaling={"rope_type": "linear", "factor": 4.0},
    ),
    "llama_dynamic": _config(
        LLAMA,
        (2, 48, 2, 2, 100, 97),
        tied=False,
        eps=1e-5,
        theta=1e4,
        max_position_embeddings=24,
        rope_scaling={"rope_type": "dynamic", "factor": 4.0},
    ),
    "qwen2_yarn": _config(
        QWEN2,
        (2, 48, 2, 2, 100, 97),
        tied=False,
        eps=1e-6,
        theta=1e4,
        max_position_embeddings=64,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ),
    "llama_yarn_options": _config(
        LLAMA,
        (2, 48, 2, 2, 100, 97),
        tied=False,
        eps=1e-5,
        theta=1e4,
        rope_scaling={
            **{"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "attention_factor": 1.4},
            **{"beta_fast": 4.0, "beta_slow": 1.5, "truncate": False},
        },
    ),
    "qwen3_yarn_mscale": _config(
        QWEN3,
        (2, 48, 2, 1, 100, 97),
        tied=False,
        eps=1e-6,
        theta=1e4,
        head_dim=24,
        rope_scaling={
            **{"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16},
            **{"mscale": 1.5, "mscale_all_dim": 0.5},
        },
    ),
    "llama_partial_rotary": _config(
        LLAMA, (2, 48, 2, 2, 100, 97), tied=False, eps=1e-5, theta=1e4, partial_rotary_factor=0.5
    ),
}

# Without goldens: their widths take int8 groups. One model all in groups of 64, one whose MLP needs 32, and one
# of 32, 64 and none (172), which has to stay floating point beside int8.
INT8_CONFIGS: dict[str, dict[str, Any]] = {
    "llama_int8": _config(LLAMA, (2, 128, 4, 2, 192, 257), tied=True, eps=1e-5, theta=1e4),
    "qwen2_int8": _config(QWEN2, (2, 64, 4, 2, 160, 151), tied=False, eps=1e-6, theta=1e6),
    "qwen3_mixed": _config(QWEN3, (2, 96, 4, 2, 172, 97), tied=False, eps=1e-6, theta=1e6, head_dim=16),
}
# A mixture in groups of 64 and 32. Apart from the others: rounding sends some tokens to other experts.
INT8_MIXTURES: dict[str, dict[str, Any]] = {
    "qwen2_moe_int8": _config(
        QWEN2_MOE,
        (2, 96, 4, 2, 160, 97),
        tied=False,
        eps=1e-6,
        theta=1e4,
        **_experts(6, 2, 64),
        norm_topk_prob=False,
        shared_expert_intermediate_size=96,
        mlp_only_layers=[1],
    ),
}

# Without goldens, too: of the head sizes that a step of one token as one GPU kernel takes (test_gpu_token.py).
TOKEN_CONFIGS: dict[str, dict[str, Any]] = {
    "token_llama": _config(LLAMA, (2, 128, 4, 2, 192, 1100), tied=True, eps=1e-5, theta=1e4, head_dim=64),
    "token_wide": _config(LLAMA, (1, 128, 2, 1, 2240, 97), tied=True, eps=1e-5, theta=1e4, head_dim=64),
    "token_long": _config(LLAMA, (1, 768, 2, 1, 128, 97), tied=True, eps=1e-5, theta=1e4, head_dim=64),
    "token_qwen2": _config(QWEN2, (1, 128, 3, 1, 256, 97), tied=True, eps=1e-6, theta=1e6, head_dim=64),
    "token_qwen3": _config(QWEN3, (2, 128, 2, 1, 192, 99), tied=False, eps=1e-6, theta=1e6, head_dim=128),
    "token_biases": _config(LLAMA_BIASED, (1, 192, 2, 2, 256, 101), tied=False, eps=1e-5, theta=1e4, head_dim=64),
    "token_window": _config(
        MISTRAL, (1, 128, 8, 1, 160, 97), tied=False, eps=1e-5, theta=1e4, head_dim=64, sliding_window=40
    ),
    "token_units": _config(LLAMA, (1, 128, 10, 1, 96, 97), tied=True, eps=1e-5, theta=1e4, head_dim=64),
    "token_layers": _config(
        QWEN3,
        (3, 128, 2, 1, 96, 97),
        tied=True,
        eps=1e-6,
        theta=1e6,
        head_dim=64,
        **_window(100),
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}

# Without goldens, too: what a GGUF can say.
GGUF_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_moe_plain": _config(
        QWEN2_MOE,
        (2, 64, 4, 2, 96, 97),
        tied=False,
        eps=1e-6,
        theta=1e4,
        **_experts(6, 2, 32),
        norm_topk_prob=False,
        shared_expert_intermediate_size=64,
    ),
    "qwen3_moe_plain": _config(
        QWEN3_MOE, (2, 64, 4, 2, 96, 97), tied=False, eps=1e-6, theta=1e4, **_experts(8, 3, 32), norm_topk_prob=True
    ),
    "smollm3_every_4th": _config(SMOLLM3, (5, 64, 4, 2, 96, 97), tied=True, eps=1e-6, theta=2e6),
}
_ALL_CONFIGS = {**CONFIGS, **INT8_CONFIGS, **INT8_MIXTURES, **TOKEN_CONFIGS, **GGUF_CONFIGS}


def hf_config(name: str, *, dtype: str = "float32", style: int = 4) -> dict[str, Any]:
    """The model's config.json as transformers of that major version writes it.

    4 says `rope_theta`, `rope_scaling` and `torch_dtype`; 5 says `rope_parameters` and `dtype`.
    """
    config = dict(_ALL_CONFIGS[name])
    if style == 4:
        return {**config, "torch_dtype": dtype, "transformers_version": "4.51.0"}
    if style != 5:
        raise ValueError(f"style must be 4 or 5, not {style}")
    scaling = config.pop("rope_scaling") or {"rope_type": "default"}
    config["rope_parameters"] = {**scaling, "rope_theta": config.pop("rope_theta")}
    if "partial_rotary_factor" in config:
        config["rope_parameters"]["partial_rotary_factor"] = config.pop("partial_rotary_factor")
    if config["model_type"] == "qwen3_moe":
        config["num_local_experts"] = config.pop("num_experts")
    return {**config, "dtype": dtype, "transformers_version": "5.0.0"}


def head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, under its Hugging Face name; a tied head has none of its own."""
    config = _ALL_CONFIGS[name]
    family = config["model_type"].removesuffix("_moe")
    hidden, intermediate, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q_width = config["num_attention_heads"] * head_dim(config)
    kv_width = config["num_key_value_heads"] * head_dim(config)
    o_bias = config.get("attention_bias", False)
    qkv_bias = family == "qwen2" or o_bias
    mlp_bias = config.get("mlp_bias", False)

    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}

    def linear(prefix: str, rows: int, columns: int, bias: bool) -> None:
        out[f"{prefix}.weight"] = (rows, columns)
        if bias:
            out[f"{prefix}.bias"] = (rows,)

    def mlp(prefix: str, inner: int, bias: bool) -> None:
        linear(f"{prefix}.gate_proj", inner, hidden, bias)
        linear(f"{prefix}.up_proj", inner, hidden, bias)
        linear(f"{prefix}.down_proj", hidden, inner, bias)

    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        out[f"{at}.input_layernorm.weight"] = (hidden,)
        linear(f"{at}.self_attn.q_proj", q_width, hidden, qkv_bias)
        linear(f"{at}.self_attn.k_proj", kv_width, hidden, qkv_bias)
        linear(f"{at}.self_attn.v_proj", kv_width, hidden, qkv_bias)
        linear(f"{at}.self_attn.o_proj", hidden, q_width, o_bias)
        if family == "qwen3":
            out[f"{at}.self_attn.q_norm.weight"] = (head_dim(config),)
            out[f"{at}.self_attn.k_norm.weight"] = (head_dim(config),)
        out[f"{at}.post_attention_layernorm.weight"] = (hidden,)
        if not is_sparse(config, layer):
            mlp(f"{at}.mlp", intermediate, mlp_bias)
            continue
        linear(f"{at}.mlp.gate", config["num_experts"], hidden, False)
        for expert in range(config["num_experts"]):
            mlp(f"{at}.mlp.experts.{expert}", config["moe_intermediate_size"], False)
        if shared := config.get("shared_expert_intermediate_size"):
            mlp(f"{at}.mlp.shared_expert", shared, False)
            linear(f"{at}.mlp.shared_expert_gate", 1, hidden, False)
    out["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = (vocab, hidden)
    return out


def windows(config: dict[str, Any]) -> list[int]:
    """Each layer's sliding window, 0 for none, by each family's own rule."""
    size, layers, first = (
        config.get("sliding_window", 0),
        config["num_hidden_layers"],
        config.get("max_window_layers", 0),
    )
    family, has_rope = config["model_type"], rotated(config)
    slides = [
        kind == "sliding_attention"
        if kind
        else family in ("mistral", "qwen3_moe")
        or (family == "qwen2" and i >= first)
        or (family == "qwen2_moe" and i % 2 == 0 and i < first)
        or (family == "smollm3" and not has_rope[i])
        for i, kind in enumerate(config.get("layer_types", [None] * layers))
    ]
    return [size if size and slide else 0 for slide in slides]


def rotated(config: dict[str, Any]) -> list[bool]:
    """Which layers have RoPE."""
    layers, interval = config["num_hidden_layers"], config.get("no_rope_layer_interval")
    listed = config.get("no_rope_layers", [(i + 1) % interval if interval else 1 for i in range(layers)])
    return [bool(entry) for entry in listed]


def is_sparse(config: dict[str, Any], layer: int) -> bool:
    """Whether a mixture of experts stands in for a layer's MLP."""
    every = config.get("decoder_sparse_step", 1)
    return "num_experts" in config and (layer + 1) % every == 0 and layer not in config.get("mlp_only_layers", [])


def _draw(model: str, tensor: str, shape: tuple[int, ...]) -> np.ndarray:
    # crc32, because hash() of a string differs from process to process
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(f"{model}/{tensor}".encode())))
    normal = rng.standard_normal(shape)
    if tensor.endswith(("q_norm.weight", "k_norm.weight")):
        # as with the projections below: the scores of unit vectors are too much alike
        value = 1.5 * (1.0 + 0.1 * normal)
    elif tensor.endswith("norm.weight"):
        value = 1.0 + 0.1 * normal
    elif tensor.endswith(".bias"):
        value = 0.1 * normal
    elif "q_proj" in tensor or "k_proj" in tensor:
        # Scores with a standard deviation of about 1.5^2: attention that prefers some tokens, so that a wrong
        # position, mask or head shows. At a usual init's 0.02 it is uniform and hides all of these.
        value = 1.5 / np.sqrt(shape[1]) * normal
    elif tensor in ("model.embed_tokens.weight", "lm_head.weight"):
        # a head meets a normalised state of shape[1] values near 1, so the logits' deviation is about 2.5
        value = 2.5 / np.sqrt(shape[1]) * normal
    elif "o_proj" in tensor or "down_proj" in tensor:
        # What the layers add outweighs the token's own embedding, or a tied head would repeat its token.
        value = 2.0 / np.sqrt(shape[1]) * normal
    elif tensor.endswith("mlp.gate.weight"):
        value = 2.0 / np.sqrt(shape[1]) * normal  # routers that prefer some experts
        if model.endswith("ties"):
            value[1::2] = value[::2]
    else:
        value = 1.0 / np.sqrt(shape[1]) * normal
    return value.astype(np.float32)


def weights(name: str) -> dict[str, np.ndarray]:
    """The model's float32 tensors under their Hugging Face names, the same on every call and machine."""
    return {tensor: _draw(name, tensor, shape) for tensor, shape in shapes(name).items()}


def golden(name: str) -> dict[str, np.ndarray]:
    """What goldens/make_goldens.py stored for the model; its docstring lists the arrays."""
    with np.load(GOLDENS / f"{name}.npz") as file:
        return dict(file)


def bfloat16_bits(value: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16, ties to even, as the uint16 that stores it (finite values only)."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def rounded(value: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 value that a checkpoint written in `dtype` holds for `value`."""
    if dtype == "bfloat16":
        return (bfloat16_bits(value).astype(np.uint32) << 16).view(np.float32)
    return value.astype(dtype).astype(np.float32)


def _serialize(tensors: dict[str, np.ndarray], dtype: str) -> bytes:
    from safetensors.numpy import save

    metadata = {"format": "pt"}  # as transformers writes it; not all its versions read a file without
    if dtype != "bfloat16":
        return save({name: t.astype(dtype) for name, t in tensors.items()}, metadata)
    # NumPy has no bfloat16: saved as the uint16 of the same bits, and the header then told what they are.
    data = save({name: bfloat16_bits(t) for name, t in tensors.items()}, metadata)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    for name in tensors:
        header[name]["dtype"] = "BF16"
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned, as the library writes them
    return len(text).to_bytes(8, "little") + text + data[start:]


def write_hf_checkpoint(
    name: str, directory: str | Path, *, dtype: str = "float32", shards: int = 1, style: int = 4
) -> Path:
    """Write the model as Hugging Face does: config.json, and model.safetensors or shards with their index.

    dtype is float32, float16 or bfloat16; style is the major version of transformers whose config.json it is.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = weights(name)
    (directory / "config.json").write_text(json.dumps(hf_config(name, dtype=dtype, style=style), indent=2) + "\n")
    if shards == 1:
        (directory / "model.safetensors").write_bytes(_serialize(tensors, dtype))
        return directory

    weight_map: dict[str, str] = {}
    for shard, names in enumerate(np.array_split(list(tensors), shards), start=1):
        file = f"model-{shard:05d}-of-{shards:05d}.safetensors"
        (directory / file).write_bytes(_serialize({str(n): tensors[str(n)] for n in names}, dtype))
        weight_map.update((str(n), file) for n in names)
    item_size = 4 if dtype == "float32" else 2
    total = sum(t.size for t in tensors.values()) * item_size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return directory
