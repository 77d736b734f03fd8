"""What a config means layer by layer: each layer's flags, and every tensor of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from numbainfer.config import Experts, ModelConfig
from numbainfer.errors import NumbaInferError
from numbainfer.families import ALWAYS, CONFIG, FAMILIES


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer, resolved against a config. window: 0 where it sees all positions. experts: a mixture of
    experts stands in for the MLP; shared_expert: one of them is for all tokens."""

    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rotated: bool
    window: int
    experts: bool
    shared_expert: bool


def layer_specs(config: ModelConfig) -> list[LayerSpec]:
    """The layers of a model, first to last."""
    family = FAMILIES[config.architecture]

    def resolve(where: str, flag: bool) -> bool:
        return where == ALWAYS or (where == CONFIG and flag)

    def has_experts(layer: int) -> bool:
        return config.experts is not None and layer in config.experts.layers

    return [
        LayerSpec(
            qkv_bias=resolve(family.qkv_bias, config.attention_bias),
            output_bias=resolve(family.output_bias, config.attention_bias),
            mlp_bias=resolve(family.mlp_bias, config.mlp_bias),
            qk_norm=family.qk_norm,
            rotated=config.rotated[i],
            window=config.windows[i],
            experts=has_experts(i),
            shared_expert=has_experts(i) and family.shared_expert,
        )
        for i in range(config.layers)
    ]


@dataclass(frozen=True)
class Parameter:
    """A tensor under its Hugging Face name. Matrices are quantized, vectors (norms, biases) stay float32, and so do
    `exact` matrices: routers, where rounding would send tokens to other experts."""

    name: str
    shape: tuple[int, ...]
    exact: bool = False

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2

    @property
    def size(self) -> int:
        """The number of its values."""
        return math.prod(self.shape)


def parameter_groups(config: ModelConfig) -> list[list[Parameter]]:
    """Every tensor of the model, in the order of the file. A group's matrices are used stacked, as one matrix.

    [q, k, v] and [gate, up] are one product each: written next to each other, they are one mapped matrix. So are the
    matrices of all experts of a layer: [gate 0, up 0, gate 1, up 1, ...] and [down 0, down 1, ...].
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    groups = [[Parameter("model.embed_tokens.weight", (config.vocab_size, hidden))]]

    def matrices(prefix: str, shapes: dict[str, tuple[int, int]], bias: bool) -> None:
        groups.append([Parameter(f"{prefix}.{name}.weight", shape) for name, shape in shapes.items()])
        if bias:
            groups.append([Parameter(f"{prefix}.{name}.bias", shape[:1]) for name, shape in shapes.items()])

    def mlp(prefix: str, inner: int, bias: bool) -> None:
        matrices(prefix, {"gate_proj": (inner, hidden), "up_proj": (inner, hidden)}, bias)
        matrices(prefix, {"down_proj": (hidden, inner)}, bias)

    def mixture(prefix: str, experts: Experts) -> None:
        groups.append([Parameter(f"{prefix}.gate.weight", (experts.count, hidden), exact=True)])
        one = range(experts.count)
        up = {f"experts.{e}.{name}": (experts.size, hidden) for e in one for name in ("gate_proj", "up_proj")}
        matrices(prefix, up, False)
        matrices(prefix, {f"experts.{e}.down_proj": (hidden, experts.size) for e in one}, False)
        if experts.shared_size:
            mlp(f"{prefix}.shared_expert", experts.shared_size, False)
            groups.append([Parameter(f"{prefix}.shared_expert_gate.weight", (1, hidden), exact=True)])

    for i, layer in enumerate(layer_specs(config)):
        at = f"model.layers.{i}"
        groups.append([Parameter(f"{at}.input_layernorm.weight", (hidden,))])
        matrices(
            f"{at}.self_attn", {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}, layer.qkv_bias
        )
        if layer.qk_norm:
            groups.append([Parameter(f"{at}.self_attn.q_norm.weight", (config.head_dim,))])
            groups.append([Parameter(f"{at}.self_attn.k_norm.weight", (config.head_dim,))])
        matrices(f"{at}.self_attn", {"o_proj": (hidden, q)}, layer.output_bias)
        groups.append([Parameter(f"{at}.post_attention_layernorm.weight", (hidden,))])
        if layer.experts and config.experts is not None:
            mixture(f"{at}.mlp", config.experts)
        else:
            mlp(f"{at}.mlp", inner, layer.mlp_bias)
    groups.append([Parameter("model.norm.weight", (hidden,))])
    if not config.tied_embeddings:
        groups.append([Parameter("lm_head.weight", (config.vocab_size, hidden))])
    return groups


def parameter_count(config: ModelConfig) -> int:
    """The number of trained values."""
    return sum(p.size for group in parameter_groups(config) for p in group)


def active_parameter_count(config: ModelConfig) -> int:
    """The number of trained values that one token meets: of experts only the chosen."""
    if config.experts is None:
        return parameter_count(config)
    idle = config.experts.count - config.experts.per_token
    per_expert = 3 * config.experts.size * config.hidden_size
    return parameter_count(config) - idle * per_expert * len(config.experts.layers)


def check_tensors(config: ModelConfig, shapes: dict[str, tuple[int, ...]], where: str) -> None:
    """Holds a file's tensors against the spec, both ways: a missing, an extra or a misshapen one is named."""
    expected = {p.name: p.shape for group in parameter_groups(config) for p in group}
    for name, shape in expected.items():
        if name not in shapes:
            raise NumbaInferError(f"{where}: tensor {name} {list(shape)} is missing")
        if tuple(shapes[name]) != shape:
            raise NumbaInferError(f"{where}: tensor {name} is {list(shapes[name])}, the config says {list(shape)}")
    extra = [name for name in shapes if name not in expected]
    # A tied model may still carry its head, which is then the embedding once more.
    extra = [name for name in extra if not (name == "lm_head.weight" and config.tied_embeddings)]
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise NumbaInferError(f"{where}: tensor {extra[0]}{more} is not part of {config.architecture}")
