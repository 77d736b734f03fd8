"""What a config means layer by layer: each layer's flags, and every tensor of the model."""

from __future__ import annotations

import math
from collections.abc import Iterator
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


def parameter_groups(config: ModelConfig) -> Iterator[list[Parameter]]:
    """Every tensor of the model, in the order of the file. A group's matrices are used stacked, as one matrix.

    [q, k, v] and [gate, up] are one product each: written next to each other, they are one mapped matrix. So are the
    matrices of all experts of a layer: [gate 0, up 0, gate 1, up 1, ...] and [down 0, down 1, ...].
    """
    hidden, size = config.hidden_size, config.head_dim
    q, kv = config.heads * size, config.kv_heads * size
    yield [Parameter("model.embed_tokens.weight", (config.vocab_size, hidden))]
    for i, layer in enumerate(layer_specs(config)):
        at, attention = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        yield [Parameter(f"{at}.input_layernorm.weight", (hidden,))]
        projections = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
        yield from _matrices(attention, projections, layer.qkv_bias)
        if layer.qk_norm:
            yield [Parameter(f"{attention}.q_norm.weight", (size,))]
            yield [Parameter(f"{attention}.k_norm.weight", (size,))]
        yield from _matrices(attention, {"o_proj": (hidden, q)}, layer.output_bias)
        yield [Parameter(f"{at}.post_attention_layernorm.weight", (hidden,))]
        if layer.experts and config.experts is not None:
            yield from _mixture(f"{at}.mlp", config.experts, hidden)
        else:
            yield from _mlp(f"{at}.mlp", config.intermediate_size, hidden, layer.mlp_bias)
    yield [Parameter("model.norm.weight", (hidden,))]
    if not config.tied_embeddings:
        yield [Parameter("lm_head.weight", (config.vocab_size, hidden))]


def _matrices(prefix: str, shapes: dict[str, tuple[int, int]], bias: bool = False) -> Iterator[list[Parameter]]:
    yield [Parameter(f"{prefix}.{name}.weight", shape) for name, shape in shapes.items()]
    if bias:
        yield [Parameter(f"{prefix}.{name}.bias", shape[:1]) for name, shape in shapes.items()]


def _mlp(prefix: str, inner: int, hidden: int, bias: bool = False) -> Iterator[list[Parameter]]:
    yield from _matrices(prefix, {"gate_proj": (inner, hidden), "up_proj": (inner, hidden)}, bias)
    yield from _matrices(prefix, {"down_proj": (hidden, inner)}, bias)


def _mixture(prefix: str, experts: Experts, hidden: int) -> Iterator[list[Parameter]]:
    numbers, inner = range(experts.count), experts.size
    yield [Parameter(f"{prefix}.gate.weight", (experts.count, hidden), exact=True)]
    up = {f"experts.{e}.{name}": (inner, hidden) for e in numbers for name in ("gate_proj", "up_proj")}
    yield from _matrices(prefix, up)
    yield from _matrices(prefix, {f"experts.{e}.down_proj": (hidden, inner) for e in numbers})
    if experts.shared_size:
        yield from _mlp(f"{prefix}.shared_expert", experts.shared_size, hidden)
        yield [Parameter(f"{prefix}.shared_expert_gate.weight", (1, hidden), exact=True)]


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
    expected = set()
    for p in (p for group in parameter_groups(config) for p in group):  # no further than what the file has
        if p.name not in shapes:
            raise NumbaInferError(f"{where}: tensor {p.name} {list(p.shape)} is missing")
        if tuple(shapes[p.name]) != p.shape:
            raise NumbaInferError(
                f"{where}: tensor {p.name} is {list(shapes[p.name])}, the config says {list(p.shape)}"
            )
        expected.add(p.name)
    extra = [name for name in shapes if name not in expected]
    # A tied model may still carry its head, which is then the embedding once more.
    extra = [name for name in extra if not (name == "lm_head.weight" and config.tied_embeddings)]
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise NumbaInferError(f"{where}: tensor {extra[0]}{more} is not part of {config.architecture}")
