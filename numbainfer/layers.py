"""The weights of a decoder layer, as operators take them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from numbainfer.checkpoint import Weights
from numbainfer.mixture import Mixture, read_mixture
from numbainfer.quantization import AnyMatrix
from numbainfer.specs import layer_specs


@dataclass
class Layer:
    """The weights of one decoder layer; biases and head norms None where the spec has none, and the MLP's where a
    mixture of experts stands in its place. window: how many positions a token sees, 0 for all."""

    attention_norm: Any  # [D]
    qkv: AnyMatrix  # [(H + 2 K) d, D]: q, k, v stacked
    qkv_bias: Any  # [(H + 2 K) d]
    q_norm: Any  # [d]
    k_norm: Any  # [d]
    output: AnyMatrix  # [D, H d]
    output_bias: Any  # [D]
    mlp_norm: Any  # [D]
    rotated: bool
    window: int
    mixture: Mixture | None
    gate_up: Any  # [2 F, D]: gate, up stacked
    gate_up_bias: Any  # [2 F]
    down: Any  # [D, F]
    down_bias: Any  # [D]


def read_layers(weights: Weights) -> Iterator[Layer]:
    """The layers of a model, first to last."""
    experts = weights.config.experts
    for i, spec in enumerate(layer_specs(weights.config)):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"

        def matrix(prefix: str, *names: str) -> AnyMatrix:
            return weights.matrix([f"{prefix}.{name}.weight" for name in names])

        def bias(present: bool, prefix: str, *names: str) -> Any:
            return weights.vector([f"{prefix}.{name}.bias" for name in names]) if present else None

        yield Layer(
            attention_norm=weights.vector([f"model.layers.{i}.input_layernorm.weight"]),
            qkv=matrix(attention, "q_proj", "k_proj", "v_proj"),
            qkv_bias=bias(spec.qkv_bias, attention, "q_proj", "k_proj", "v_proj"),
            q_norm=weights.vector([f"{attention}.q_norm.weight"]) if spec.qk_norm else None,
            k_norm=weights.vector([f"{attention}.k_norm.weight"]) if spec.qk_norm else None,
            output=matrix(attention, "o_proj"),
            output_bias=bias(spec.output_bias, attention, "o_proj"),
            mlp_norm=weights.vector([f"model.layers.{i}.post_attention_layernorm.weight"]),
            rotated=spec.rotated,
            window=spec.window,
            mixture=read_mixture(weights, experts, mlp) if spec.experts and experts else None,
            gate_up=None if spec.experts else matrix(mlp, "gate_proj", "up_proj"),
            gate_up_bias=bias(spec.mlp_bias and not spec.experts, mlp, "gate_proj", "up_proj"),
            down=None if spec.experts else matrix(mlp, "down_proj"),
            down_bias=bias(spec.mlp_bias and not spec.experts, mlp, "down_proj"),
        )
