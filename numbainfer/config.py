"""ModelConfig, read strictly from a Hugging Face config.json.

Every key is known: it is used, or it is listed as one that doesn't change what the model computes, or the model is
refused with the key's name. Nothing is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from numbainfer.errors import NumbaInferError

# Keys that say nothing about the forward pass: training, generation defaults, bookkeeping.
_IGNORED = {
    *(
        "architectures",
        "attention_dropout",
        "auto_map",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
    ),
    *(
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
    ),
    *(
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
    ),
    *("finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range"),
    *("is_decoder", "is_encoder_decoder", "label2id", "length_penalty", "max_length", "max_window_layers"),
    *(
        "min_length",
        "model_type",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
    ),
    *(
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
    ),
    *(
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
    ),
    *(
        "rope_interleaved",
        "sep_token_id",
        "sliding_window",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
    ),
    *(
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
    ),
    *("transformers_version", "transformers.js_config", "typical_p", "unsloth_fixed", "unsloth_version"),
    *("use_bfloat16", "use_cache", "mlx_version", "quantization_config"),
}
# `sliding_window` and `rope_interleaved` act only through these, `quantization_config` is checkpoint.py's to read.
_NEUTRAL: dict[str, tuple] = {
    "use_sliding_window": (False, None),
    "rope_interleaved": (False, None),
    "hidden_act": ("silu", "swish"),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
    "partial_rotary_factor": (1.0, None),
    "logit_scale": (1.0, None),
    "is_llama_config": (True, None),
}
_USED = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *(
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
    ),
    *("rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias", "layer_types"),
}
_LIMITS = {  # the largest sizes taken for true: far above any model, far below what overflows
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 4096,
    "num_attention_heads": 4096,
    "max_position_embeddings": 2**31 - 1,
}


@dataclass(frozen=True)
class RopeScaling:
    """How the RoPE frequencies are changed for longer contexts. kind "default": not at all."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    factors: tuple[float, ...] = ()  # kind "factors": one divisor per frequency, as GGUF files carry them


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only model. Sizes are counts of elements; `raw` is config.json as it was."""

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
    tied_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    raw: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Reads config.json's content. `where` names it in errors."""
        if not isinstance(raw, Mapping):
            raise NumbaInferError(f"{where}: not a JSON object")
        reader = _Reader(raw, where)
        architectures = raw.get("architectures")
        if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
            raise NumbaInferError(f'{where}: "architectures" must be a list of one name')
        reader.refuse_unknown()
        heads = reader.size("num_attention_heads")
        kv_heads = reader.size("num_key_value_heads", heads, _LIMITS["num_attention_heads"])
        hidden = reader.size("hidden_size")
        if heads % kv_heads:
            raise NumbaInferError(f"{where}: {heads} attention heads can't share {kv_heads} key/value heads")
        if raw.get("head_dim") is None and hidden % heads:
            raise NumbaInferError(f"{where}: hidden_size {hidden} is not a multiple of {heads} heads")
        head_dim = reader.size("head_dim", hidden // heads, 4096)
        if head_dim % 2:
            raise NumbaInferError(f"{where}: head_dim {head_dim} is odd, which RoPE can't rotate")
        theta, scaling = reader.rope(head_dim)
        return cls(
            architecture=architectures[0],
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=reader.size("intermediate_size"),
            layers=reader.size("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            max_positions=reader.size("max_position_embeddings"),
            norm_eps=reader.number("rms_norm_eps", 0.0, 1.0),
            rope_theta=theta,
            rope_scaling=scaling,
            tied_embeddings=reader.flag("tie_word_embeddings", False),
            attention_bias=reader.flag("attention_bias", False),
            mlp_bias=reader.flag("mlp_bias", False),
            raw=dict(raw),
        )

    def inverse_frequencies(self) -> np.ndarray:
        """RoPE's angle per position for each pair of a head: float32 [head_dim / 2], scaling applied.

        In float32 like HF transformers, whose logits are the reference.
        """
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        base = (1.0 / np.power(np.float32(self.rope_theta), exponents)).astype(np.float32)
        scaling = self.rope_scaling
        if scaling.kind == "linear":
            return base / np.float32(scaling.factor)
        if scaling.kind == "factors":
            return base / np.asarray(scaling.factors, np.float32)
        if scaling.kind == "llama3":  # meta-llama/llama-models, models/llama3/model.py: apply_scaling
            wavelength = 2 * math.pi / base
            long = scaling.original_max_positions / scaling.low_freq_factor
            short = scaling.original_max_positions / scaling.high_freq_factor
            span = scaling.high_freq_factor - scaling.low_freq_factor
            smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / span
            mixed = (1 - smooth) * base / scaling.factor + smooth * base
            scaled = np.where(wavelength > long, base / scaling.factor, mixed)
            return np.where(wavelength < short, base, scaled).astype(np.float32)
        return base


class _Reader:
    """Typed reads from config.json, each naming its key when it fails."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def refuse_unknown(self) -> None:
        for key, value in self.raw.items():
            if key in _NEUTRAL:
                if not any(value == neutral and type(value) is type(neutral) for neutral in _NEUTRAL[key]):
                    raise NumbaInferError(f"{self.where}: {key} = {value!r} is not supported")
            elif key in _USED or key in _IGNORED or key.startswith("_") or value in (None, False, 0, "", [], {}):
                continue
            else:
                raise NumbaInferError(
                    f"{self.where}: {key} = {str(value)[:60]!r} is not known to numbainfer; "
                    "if it does not change what the model computes, remove it from the file"
                )
        layer_types = self.raw.get("layer_types")
        if layer_types is not None and not isinstance(layer_types, list):
            raise NumbaInferError(f"{self.where}: layer_types must be a list, not {str(layer_types)[:60]!r}")
        if layer_types is not None and any(kind != "full_attention" for kind in layer_types):
            raise NumbaInferError(f"{self.where}: layer_types other than full_attention are not supported")

    def size(self, key: str, default: int | None = None, limit: int | None = None) -> int:
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        limit = limit or _LIMITS[key]
        if type(value) is not int or not 0 < value <= limit:
            raise NumbaInferError(f"{self.where}: {key} must be a whole number from 1 to {limit}, not {value!r}")
        return value

    def number(self, key: str, low: float, high: float, values: Mapping[str, Any] | None = None) -> float:
        value: Any = (self.raw if values is None else values).get(key)
        if type(value) not in (int, float) or not low < value <= high:
            raise NumbaInferError(f"{self.where}: {key} must be a number above {low:g}, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key, default)
        if type(value) is not bool:
            raise NumbaInferError(f"{self.where}: {key} must be true or false, not {value!r}")
        return value

    def rope(self, head_dim: int) -> tuple[float, RopeScaling]:
        """theta and scaling, from transformers 4's rope_theta and rope_scaling or 5's rope_parameters."""
        new, old = self.raw.get("rope_parameters"), self.raw.get("rope_scaling")
        values = new if new is not None else old if old is not None else {}
        if not isinstance(values, Mapping):
            raise NumbaInferError(f"{self.where}: RoPE parameters must be an object, not {values!r}")
        top = {"rope_theta": self.raw.get("rope_theta", 10000.0)}  # HF's default
        theta = self.number("rope_theta", 0.0, 1e15, {**top, **values})
        kind = values.get("rope_type", values.get("type", "default"))
        common = {"rope_type", "type", "rope_theta"}
        if kind == "default":
            self._only(values, common)
            return theta, RopeScaling()
        if kind == "linear":
            self._only(values, common | {"factor"})
            return theta, RopeScaling("linear", self.number("factor", 0.0, 1e6, values))
        if kind == "factors":
            self._only(values, common | {"factors"})
            factors = values.get("factors")
            if not isinstance(factors, (list, tuple)) or len(factors) != head_dim // 2:
                raise NumbaInferError(f"{self.where}: RoPE needs {head_dim // 2} factors")
            if not all(isinstance(f, (int, float)) and 0 < f < 1e6 for f in factors):
                raise NumbaInferError(f"{self.where}: RoPE factors must be positive numbers")
            return theta, RopeScaling("factors", factors=tuple(float(f) for f in factors))
        if kind == "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            self._only(values, common | set(names))
            factor, low, high, original = (self.number(name, 0.0, 1e9, values) for name in names)
            if high <= low:
                raise NumbaInferError(f"{self.where}: high_freq_factor must be above low_freq_factor")
            return theta, RopeScaling("llama3", factor, low, high, int(original))
        raise NumbaInferError(f"{self.where}: RoPE scaling {kind!r} is not supported (default, linear, llama3 are)")

    def _only(self, values: Mapping[str, Any], known: set[str]) -> None:
        for key, value in values.items():
            if key not in known and not (key == "partial_rotary_factor" and value == 1.0) and value is not None:
                raise NumbaInferError(f"{self.where}: RoPE parameter {key} = {value!r} is not supported")
