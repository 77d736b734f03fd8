"""The architectures: each a row of flags, which one straight-line layer function in model.py consumes."""

from __future__ import annotations

from dataclasses import dataclass

from numbainfer.config import ModelConfig
from numbainfer.errors import NumbaInferError

# Where a bias stands: never, always, or where config.json's attention_bias / mlp_bias says so.
NEVER, ALWAYS, CONFIG = "never", "always", "config"


@dataclass(frozen=True)
class ModelSpec:
    """What distinguishes one architecture from the next.

    qkv_bias, output_bias: biases of q/k/v and of the attention output; mlp_bias: of the MLP's three matrices.
    qk_norm: RMSNorm over each query and key head, before RoPE.
    """

    name: str
    qkv_bias: str = NEVER
    output_bias: str = NEVER
    mlp_bias: str = NEVER
    qk_norm: bool = False


# Keyed by the name in config.json's "architectures".
SPECS = {
    "LlamaForCausalLM": ModelSpec("llama", qkv_bias=CONFIG, output_bias=CONFIG, mlp_bias=CONFIG),
    "Qwen2ForCausalLM": ModelSpec("qwen2", qkv_bias=ALWAYS),
    "Qwen3ForCausalLM": ModelSpec("qwen3", qkv_bias=CONFIG, output_bias=CONFIG, qk_norm=True),
}


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer, resolved against a config."""

    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool


def spec_for(config: ModelConfig) -> ModelSpec:
    """The row of a config's architecture."""
    try:
        return SPECS[config.architecture]
    except KeyError:
        known = ", ".join(SPECS)
        raise NumbaInferError(f"architecture {config.architecture} is not supported (supported: {known})") from None


def layer_specs(config: ModelConfig) -> list[LayerSpec]:
    """The layers of a model, first to last."""
    spec = spec_for(config)

    def resolve(where: str, flag: bool) -> bool:
        return where == ALWAYS or (where == CONFIG and flag)

    layer = LayerSpec(
        qkv_bias=resolve(spec.qkv_bias, config.attention_bias),
        output_bias=resolve(spec.output_bias, config.attention_bias),
        mlp_bias=resolve(spec.mlp_bias, config.mlp_bias),
        qk_norm=spec.qk_norm,
    )
    return [layer] * config.layers


@dataclass(frozen=True)
class Parameter:
    """A tensor under its Hugging Face name. Matrices are quantized, vectors (norms, biases) stay float32."""

    name: str
    shape: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2


def parameter_groups(config: ModelConfig) -> list[list[Parameter]]:
    """Every tensor of the model, in the order of the file. A group's matrices are used stacked, as one matrix.

    [q, k, v] and [gate, up] are one product each: written next to each other, they are one mapped matrix.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    groups = [[Parameter("model.embed_tokens.weight", (config.vocab_size, hidden))]]

    def matrices(prefix: str, shapes: dict[str, tuple[int, int]], bias: bool) -> None:
        groups.append([Parameter(f"{prefix}.{name}.weight", shape) for name, shape in shapes.items()])
        if bias:
            groups.append([Parameter(f"{prefix}.{name}.bias", shape[:1]) for name, shape in shapes.items()])

    for i, layer in enumerate(layer_specs(config)):
        at = f"model.layers.{i}"
        groups.append([Parameter(f"{at}.input_layernorm.weight", (hidden,))])
        qkv = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
        matrices(f"{at}.self_attn", qkv, layer.qkv_bias)
        if layer.qk_norm:
            groups.append([Parameter(f"{at}.self_attn.q_norm.weight", (config.head_dim,))])
            groups.append([Parameter(f"{at}.self_attn.k_norm.weight", (config.head_dim,))])
        matrices(f"{at}.self_attn", {"o_proj": (hidden, q)}, layer.output_bias)
        groups.append([Parameter(f"{at}.post_attention_layernorm.weight", (hidden,))])
        matrices(f"{at}.mlp", {"gate_proj": (inner, hidden), "up_proj": (inner, hidden)}, layer.mlp_bias)
        matrices(f"{at}.mlp", {"down_proj": (hidden, inner)}, layer.mlp_bias)
    groups.append([Parameter("model.norm.weight", (hidden,))])
    if not config.tied_embeddings:
        groups.append([Parameter("lm_head.weight", (config.vocab_size, hidden))])
    return groups


def parameter_count(config: ModelConfig) -> int:
    """The number of trained values."""
    sizes = (p.shape[0] * (p.shape[1] if p.is_matrix else 1) for group in parameter_groups(config) for p in group)
    return sum(sizes)


def check_tensors(config: ModelConfig, shapes: dict[str, tuple[int, ...]], where: str) -> None:
    """Holds a file's tensors against the spec, both ways: a missing, an extra or a misshapen one is named."""
    try:
        expected = {p.name: p.shape for group in parameter_groups(config) for p in group}
    except NumbaInferError as error:  # an unknown architecture
        raise NumbaInferError(f"{where}: {error}") from error
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
