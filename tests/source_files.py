"""A tiny LLaMA-shaped model with random weights, and writers that put it into each format a reader knows.

The weights are held as Hugging Face has them (float32, half-split RoPE); a writer that needs another
layout makes it by its own formula, not by the readers' code.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB, CONTEXT = 24, 40, 2, 4, 2, 6, 11, 16

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}

# Hugging Face part -> GGUF part, shape; in the order of llama2.c's file.
PARTS: dict[str, tuple[str, tuple[int, ...]]] = {
    "input_layernorm": ("attn_norm", (HIDDEN,)),
    "self_attn.q_proj": ("attn_q", (HEADS * HEAD_DIM, HIDDEN)),
    "self_attn.k_proj": ("attn_k", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "self_attn.v_proj": ("attn_v", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "self_attn.o_proj": ("attn_output", (HIDDEN, HEADS * HEAD_DIM)),
    "post_attention_layernorm": ("ffn_norm", (HIDDEN,)),
    "mlp.gate_proj": ("ffn_gate", (MLP, HIDDEN)),
    "mlp.down_proj": ("ffn_down", (HIDDEN, MLP)),
    "mlp.up_proj": ("ffn_up", (MLP, HIDDEN)),
}


def weights(tied: bool = True) -> dict[str, np.ndarray]:
    """The model's tensors by Hugging Face name, float32."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        for part, (_, shape) in PARTS.items():
            shapes[f"model.layers.{layer}.{part}.weight"] = shape
    shapes["model.norm.weight"] = (HIDDEN,)
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def interleave(projection: np.ndarray, head_dim: int = HEAD_DIM) -> np.ndarray:
    """Meta's layout of a half-split q or k, [heads * head_dim, ...]: the halves of each head alternate."""
    halves = projection.reshape(-1, 2, head_dim // 2, *projection.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(projection.shape)


def write_huggingface(directory: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] = CONFIG) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(dict(tensors), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(dict(config)))
    return directory


def write_llama2c(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    shared = "lm_head.weight" not in tensors
    header = (HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, VOCAB if shared else -VOCAB, CONTEXT)
    arrays = [tensors["model.embed_tokens.weight"]]
    for part in PARTS:
        for layer in range(LAYERS):
            array = tensors[f"model.layers.{layer}.{part}.weight"]
            arrays.append(interleave(array) if part.endswith(("q_proj", "k_proj")) else array)
    arrays += [tensors["model.norm.weight"], np.ones((2, CONTEXT, HEAD_DIM // 2), np.float32)]
    if not shared:
        arrays.append(tensors["lm_head.weight"])
    path.write_bytes(struct.pack("<7i", *header) + b"".join(array.tobytes() for array in arrays))
    return path


def gguf_name(name: str) -> str:
    for ours, theirs in (
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
    ):
        if name.startswith(ours):
            return name.replace(ours, theirs)
    _, _, layer, part = name.split(".", 3)
    part, kind = part.rsplit(".", 1)
    extra = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
    return f"blk.{layer}.{extra.get(part) or PARTS[part][0]}.{kind}"


GGUF_TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<|im_end|>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 3,
}
"""Metadata of the smallest tokenizer that a GGUF may have."""


def gguf_metadata(architecture: str = "llama") -> dict[str, int | float | str]:
    """The keys that every model of ours needs; a float is written as float32, an int as uint32."""
    keys: dict[str, int | float] = {
        "block_count": LAYERS,
        "context_length": CONTEXT,
        "embedding_length": HIDDEN,
        "feed_forward_length": MLP,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": HEAD_DIM,
    }
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def write_gguf(
    path: Path,
    tensors: Mapping[str, tuple[np.ndarray, gguf.GGMLQuantizationType] | np.ndarray],
    metadata: Mapping[str, Any] | None = None,
    architecture: str = "llama",
) -> Path:
    """tensors: by GGUF name and as GGUF has them: plain arrays, or the bytes of a type and that type."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (gguf_metadata(architecture) if metadata is None else metadata).items():
        if key == "general.alignment":
            writer.data_alignment = value  # places the tensors by it
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_gguf(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hugging Face tensors of a llama as convert_hf_to_gguf writes them: renamed, q and k interleaved."""
    return {
        gguf_name(name): interleave(array) if ".q_proj." in name or ".k_proj." in name else array
        for name, array in tensors.items()
    }
