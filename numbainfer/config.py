"""ModelConfig, read strictly from a Hugging Face config.json.

Every key is known: it is used, or it is listed as one that doesn't change what the model computes, or the model is
refused with the key's name. Nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from numbainfer.config_reader import Reader, shown, shown_key
from numbainfer.errors import NumbaInferError
from numbainfer.families import EVEN, EVERY, FAMILIES, NO_WINDOW, UNROTATED, UPPER, Family
from numbainfer.rope_scaling import RopeScaling, inverse_frequencies, read_rope


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Keys that say nothing about the forward pass: training, generation defaults, bookkeeping.
_IGNORED = _words("""
    architectures attention_dropout auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length
    max_sequence_length max_window_layers min_length mlx_version model_type no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    pretraining_tp problem_type quantization_config remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id sliding_window suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
""")
# `sliding_window` and `max_window_layers` count where the family's row says so; `quantization_config` is
# checkpoint.py's to read.
_NEUTRAL: dict[str, tuple] = {
    "use_sliding_window": (False, None),
    "rope_interleaved": (False, None),
    "hidden_act": ("silu", "swish"),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
    "logit_scale": (1.0, None),
    "is_llama_config": (True, None),
}
_USED = _words("""
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters partial_rotary_factor
    original_max_position_embeddings tie_word_embeddings attention_bias mlp_bias layer_types
""")
# The largest sizes taken for true: far above any model, far below what overflows.
_MOST_TOKENS, _WIDEST, _WIDEST_MLP, _MOST_LAYERS, _MOST_HEADS = 2**24, 2**20, 2**22, 4096, 4096
_WIDEST_HEAD, _MOST_EXPERTS, _MOST_POSITIONS = 4096, 4096, 2**31 - 1


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: `per_token` of `count` MLPs of `size` are chosen for each token.

    renormalise: the weights of the chosen are divided by their sum. shared_size: of the expert that all tokens have
    besides, 0 without one. layers: the numbers of those that have one; the others have an MLP.
    """

    count: int
    per_token: int
    size: int
    renormalise: bool
    shared_size: int
    layers: frozenset[int]


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only model. Sizes are counts of elements; `raw` is config.json as it was.

    max_positions: the context that it is made for, scaling applied. rotary_size: how much of each head RoPE rotates.
    windows: of each layer, 0 where it sees all positions. rotated: whether a layer has RoPE.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    rotary_size: int
    windows: tuple[int, ...]
    rotated: tuple[bool, ...]
    tied_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    experts: Experts | None
    raw: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Reads config.json's content. `where` names it in errors."""
        if not isinstance(raw, Mapping):
            raise NumbaInferError(f"{where}: not a JSON object")
        family = _family(raw, where)
        reader = Reader({**family.defaults, **raw}, where)
        _refuse_unknown(reader, family)
        heads = reader.size("num_attention_heads", _MOST_HEADS)
        kv_heads = reader.size("num_key_value_heads", _MOST_HEADS, heads)
        hidden = reader.size("hidden_size", _WIDEST)
        if heads % kv_heads:
            raise reader.error(f"{heads} attention heads can't share {kv_heads} key/value heads")
        if reader.raw.get("head_dim") is None and hidden % heads:
            raise reader.error(f"hidden_size {hidden} is not a multiple of {heads} heads")
        head_dim = reader.size("head_dim", _WIDEST_HEAD, hidden // heads)
        if head_dim % 2:
            raise reader.error(f"head_dim {head_dim} is odd, which RoPE can't rotate")
        layers = reader.size("num_hidden_layers", _MOST_LAYERS)
        positions = reader.size("max_position_embeddings", _MOST_POSITIONS)
        rope = read_rope(reader, head_dim, positions)
        rotated = _rotated_layers(reader, family, layers)
        return cls(
            architecture=raw["architectures"][0],
            vocab_size=reader.size("vocab_size", _MOST_TOKENS),
            hidden_size=hidden,
            intermediate_size=reader.size("intermediate_size", _WIDEST_MLP),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            max_positions=max(positions, rope.scaling.reach),
            norm_eps=reader.number("rms_norm_eps", 0.0, 1.0),
            rope_theta=rope.theta,
            rope_scaling=rope.scaling,
            rotary_size=rope.size,
            windows=_windows(reader, family, rotated),
            rotated=rotated,
            tied_embeddings=reader.flag("tie_word_embeddings", False),
            attention_bias=reader.flag(family.bias_key, False),
            mlp_bias=reader.flag("mlp_bias", False),
            experts=_experts(reader, family, layers) if family.experts else None,
            raw=dict(raw),
        )

    def inverse_frequencies(self, length: int = 0) -> np.ndarray:
        """RoPE's angle per position for each pair of a head: float32 [rotary_size / 2], scaling applied. length: of the
        sequence, where the scaling depends on it."""
        return inverse_frequencies(self.rotary_size, self.rope_theta, self.rope_scaling, length)


def _family(raw: Mapping[str, Any], where: str) -> Family:
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        raise NumbaInferError(f'{where}: "architectures" must be a list of one name')
    if architectures[0] not in FAMILIES:
        known = ", ".join(FAMILIES)
        name = architectures[0][:60]
        raise NumbaInferError(f"{where}: architecture {shown_key(name)} is not supported (supported: {known})")
    return FAMILIES[architectures[0]]


def _refuse_unknown(reader: Reader, family: Family) -> None:
    keys = family.keys
    for key, value in reader.raw.items():
        if key in keys:
            continue
        if key in _NEUTRAL:
            if not any(value == neutral and type(value) is type(neutral) for neutral in _NEUTRAL[key]):
                raise reader.error(f"{key} = {shown(value)} is not supported")
        elif key in _USED or key in _IGNORED or key.startswith("_") or value in (None, False, 0, "", [], {}):
            continue
        else:
            raise reader.error(
                f"{shown_key(key)} = {shown(value)} is not known to numbainfer; "
                "if it does not change what the model computes, remove it from the file"
            )


def _rotated_layers(reader: Reader, family: Family, layers: int) -> tuple[bool, ...]:
    """Which layers have RoPE. no_rope_layers is 1 for those that have it, whatever its name says."""
    if not family.unrotated_layers:
        return (True,) * layers
    listed = reader.whole_numbers("no_rope_layers", 0, 1)
    if listed is None:
        interval = reader.size("no_rope_layer_interval", _MOST_LAYERS, 4)
        return tuple((i + 1) % interval != 0 for i in range(layers))
    if len(listed) < layers:
        raise reader.error(f"no_rope_layers has {len(listed)} entries for {layers} layers")
    return tuple(bool(n) for n in listed[:layers])


def _windows(reader: Reader, family: Family, rotated: tuple[bool, ...]) -> tuple[int, ...]:
    """The sliding window of each layer, 0 for none."""
    layers = len(rotated)
    on = family.window != NO_WINDOW and reader.raw.get("sliding_window") is not None
    if on and family.window_switch:
        on = reader.flag("use_sliding_window", False)
    window = reader.size("sliding_window", _MOST_POSITIONS) if on else 0
    limit = reader.size("max_window_layers", _MOST_LAYERS, 28, least=0) if on else 0
    slides = {
        EVERY: [True] * layers,
        UPPER: [i >= limit for i in range(layers)],
        EVEN: [i % 2 == 0 and i < limit for i in range(layers)],
        UNROTATED: [not has_rope for has_rope in rotated],
    }.get(family.window, [False] * layers)
    return tuple(window if slide else 0 for slide in _layer_types(reader, family, slides, on))


def _layer_types(reader: Reader, family: Family, slides: list[bool], on: bool) -> list[bool]:
    """Which layers slide: as layer_types says where it is given, else `slides`."""
    kinds = reader.raw.get("layer_types")
    if kinds is None:
        return slides
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
        raise reader.error(f"layer_types must be a list of {' and '.join(known)}, not {shown(kinds)}")
    if len(kinds) != len(slides):
        raise reader.error(f"layer_types has {len(kinds)} entries for {len(slides)} layers")
    listed = [kind == "sliding_attention" for kind in kinds]
    if any(listed) and not on:
        raise reader.error("layer_types has sliding_attention, but no sliding window is switched on")
    if family.window == EVERY and listed != [on] * len(slides):
        raise reader.error(f"layer_types other than one for all layers are not supported for {family.name}")
    return listed


def _experts(reader: Reader, family: Family, layers: int) -> Experts:
    local = reader.raw.get("num_local_experts") is not None  # transformers 5's name
    count = reader.size("num_local_experts" if local else "num_experts", _MOST_EXPERTS)
    per_token = reader.size("num_experts_per_tok", _MOST_EXPERTS)
    if per_token > count:
        raise reader.error(f"num_experts_per_tok {per_token} exceeds the {count} experts")
    step = reader.size("decoder_sparse_step", _MOST_LAYERS, 1)
    dense = reader.whole_numbers("mlp_only_layers", 0, _MOST_LAYERS) or []
    return Experts(
        count=count,
        per_token=per_token,
        size=reader.size("moe_intermediate_size", _WIDEST_MLP),
        renormalise=reader.flag("norm_topk_prob", False),
        shared_size=reader.size("shared_expert_intermediate_size", _WIDEST_MLP) if family.shared_expert else 0,
        layers=frozenset(i for i in range(layers) if (i + 1) % step == 0 and i not in dense),
    )
