"""config.json for the formats of Meta's lineage, which say their sizes and little else."""

from __future__ import annotations

from typing import Any

# Names of Meta's state dicts, which llama2.c's trainer shares, as Hugging Face has them.
NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def llama_config(
    *,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    context: int,
    tied: bool,
    eps: float = 1e-5,
    theta: float = 10000.0,
    qkv_bias: bool = False,
    dtype: str = "float32",
) -> dict[str, Any]:
    """A LLaMA's config.json, or with biases in q, k and v a Qwen2's."""
    family = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False}
    if qkv_bias:
        family = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    return {
        **family,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "hidden_act": "silu",
        "rms_norm_eps": eps,
        "rope_theta": theta,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
    }
