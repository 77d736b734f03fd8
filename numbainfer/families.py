"""The model families: each a row of flags, which one straight-line layer function in model.py consumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Where a bias stands: never, always, or where config.json says so.
NEVER, ALWAYS, CONFIG = "never", "always", "config"

# Which layers have a sliding window, where config.json switches it on and has no layer_types.
NO_WINDOW = "none"
EVERY = "every layer"
UPPER = "layers from max_window_layers on"
EVEN = "layers 0, 2, 4, ... below max_window_layers"
UNROTATED = "layers without RoPE"


@dataclass(frozen=True)
class Family:
    """What distinguishes one architecture from the next.

    qkv_bias, output_bias: biases of q/k/v and of the attention output; mlp_bias: of the MLP's three matrices.
    bias_key: the key in config.json of the first two. qk_norm: RMSNorm over each query and key head, before RoPE.
    window: see above; window_switch: whether use_sliding_window has to be true, too. unrotated_layers: layers without
    RoPE. experts: a mixture of experts stands in for the MLP of some layers; shared_expert: beside one for all tokens.
    defaults: what transformers takes for a key that is missing, where it differs from LLaMA's.
    """

    name: str
    qkv_bias: str = NEVER
    output_bias: str = NEVER
    mlp_bias: str = NEVER
    bias_key: str = "attention_bias"
    qk_norm: bool = False
    window: str = NO_WINDOW
    window_switch: bool = True
    unrotated_layers: bool = False
    experts: bool = False
    shared_expert: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> set[str]:
        """The keys of config.json that count for this family, beyond those of all families."""
        keys = {self.bias_key} if CONFIG in (self.qkv_bias, self.output_bias) else set()
        if self.window != NO_WINDOW:
            keys |= {"sliding_window", "use_sliding_window", "max_window_layers"}
        if self.unrotated_layers:
            keys |= {"no_rope_layers", "no_rope_layer_interval"}
        if self.experts:
            keys |= {"num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"}
            keys |= {"norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"}
            # of training
            keys |= {"router_aux_loss_coef", "output_router_logits"}
        if self.shared_expert:
            keys |= {"shared_expert_intermediate_size"}
        return keys


# Keyed by the name in config.json's "architectures".
FAMILIES = {
    # LLaMA 1, 2, 3, 3.1, 3.2, 3.3; TinyLlama, SmolLM, SmolLM2, Yi, DeepSeek-R1-Distill-Llama
    "LlamaForCausalLM": Family("llama", qkv_bias=CONFIG, output_bias=CONFIG, mlp_bias=CONFIG),
    "MistralForCausalLM": Family("mistral", window=EVERY, window_switch=False),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        qkv_bias=CONFIG,
        output_bias=CONFIG,
        mlp_bias=CONFIG,
        window=UNROTATED,
        unrotated_layers=True,
        defaults={"tie_word_embeddings": True, "rope_theta": 2e6},
    ),
    # Qwen1.5, Qwen2, Qwen2.5 (Coder, Math), QwQ, DeepSeek-R1-Distill-Qwen
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=ALWAYS, window=UPPER),
    "Qwen3ForCausalLM": Family(
        "qwen3", qkv_bias=CONFIG, output_bias=CONFIG, qk_norm=True, window=UPPER, defaults={"head_dim": 128}
    ),
    # Qwen1.5-MoE, Qwen2-57B-A14B
    "Qwen2MoeForCausalLM": Family(
        "qwen2_moe",
        qkv_bias=CONFIG,
        bias_key="qkv_bias",
        window=EVEN,
        experts=True,
        shared_expert=True,
        defaults={"qkv_bias": True},
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe", qkv_bias=CONFIG, output_bias=CONFIG, qk_norm=True, window=EVERY, experts=True
    ),
}
