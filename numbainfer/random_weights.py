"""Weights of real models' shapes and random values: to measure with nothing to download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from numbainfer.config import ModelConfig
from numbainfer.errors import NumbaInferError
from numbainfer.memory import aligned_empty
from numbainfer.quantization import AnyMatrix, Matrix, QuantizedMatrix, choose_group
from numbainfer.specs import parameter_groups

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _shape(
    architecture: str, vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict:
    return {
        "architectures": [architecture],
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        **more,
    }


def _llama(*shape: int, **more: Any) -> dict:
    return _shape("LlamaForCausalLM", *shape, **more)


def _llama3(*shape: int, factor: float = 32.0, **more: Any) -> dict:
    return _llama(*shape, rope_theta=5e5, rope_scaling={**_LLAMA3_ROPE, "factor": factor}, **more)


def _qwen2(*shape: int, architecture: str = "Qwen2ForCausalLM", **more: Any) -> dict:
    return _shape(architecture, *shape, rope_theta=1e6, **more)


def _qwen3(*shape: int, architecture: str = "Qwen3ForCausalLM", **more: Any) -> dict:
    return _shape(architecture, *shape, head_dim=128, rope_theta=1e6, **more)


def _experts(count: int, per_token: int, size: int, renormalise: bool) -> dict[str, Any]:
    sizes = {"num_experts": count, "num_experts_per_tok": per_token, "moe_intermediate_size": size}
    return {**sizes, "norm_topk_prob": renormalise}


_UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
# Real models' shapes, from their config.json files: vocabulary, hidden, inner, layers, heads, key/value heads.
RANDOM = {
    "smollm2-135m": _llama(49152, 576, 1536, 30, 9, 3, rope_theta=1e5),
    "smollm2-360m": _llama(49152, 960, 2560, 32, 15, 5, rope_theta=1e5),
    "smollm2-1.7b": _llama(49152, 2048, 8192, 24, 32, 32, rope_theta=1.3e5),
    "smollm3-3b": _shape("SmolLM3ForCausalLM", 128256, 2048, 11008, 36, 16, 4, rope_theta=5e6),
    "tinyllama-1.1b": _llama(32000, 2048, 5632, 22, 32, 4, rope_theta=1e4, **_UNTIED),
    "llama-3.2-1b": _llama3(128256, 2048, 8192, 16, 32, 8, head_dim=64),
    "llama-3.2-3b": _llama3(128256, 3072, 8192, 28, 24, 8, head_dim=128),
    "llama-3.1-8b": _llama3(128256, 4096, 14336, 32, 32, 8, factor=8.0, **_UNTIED),
    "mistral-7b": _shape(
        "MistralForCausalLM", 32000, 4096, 14336, 32, 32, 8, rope_theta=1e4, sliding_window=4096, **_UNTIED
    ),
    "qwen2.5-0.5b": _qwen2(151936, 896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": _qwen2(151936, 1536, 8960, 28, 12, 2),
    "qwen2.5-3b": _qwen2(151936, 2048, 11008, 36, 16, 2),
    "qwen2.5-7b": _qwen2(152064, 3584, 18944, 28, 28, 4, **_UNTIED),
    "qwen3-0.6b": _qwen3(151936, 1024, 3072, 28, 16, 8),
    "qwen3-1.7b": _qwen3(151936, 2048, 6144, 28, 16, 8),
    "qwen3-4b": _qwen3(151936, 2560, 9728, 36, 32, 8),
    "qwen3-8b": _qwen3(151936, 4096, 12288, 36, 32, 8, **_UNTIED),
    "qwen3-30b-a3b": _qwen3(
        *(151936, 2048, 6144, 48, 32, 4),
        architecture="Qwen3MoeForCausalLM",
        **_experts(128, 8, 768, renormalise=True),
        **_UNTIED,
    ),
    "qwen1.5-moe-a2.7b": _qwen2(
        *(151936, 2048, 5632, 24, 16, 16),
        architecture="Qwen2MoeForCausalLM",
        **_experts(60, 4, 1408, renormalise=False),
        shared_expert_intermediate_size=5632,
        **_UNTIED,
    ),
}


class RandomWeights:
    """Int8 weights of a real shape and random values, made in memory (checkpoint.Weights)."""

    def __init__(self, architecture: str, group_size: int = 64) -> None:
        if architecture not in RANDOM:
            raise NumbaInferError(f"--random {architecture}: known are {', '.join(RANDOM)}")
        self.name = f"random {architecture}"
        self.config = ModelConfig.from_dict(RANDOM[architecture], architecture)
        self.nbytes = 0
        self._group_size = group_size
        self._parameters = {p.name: p for group in parameter_groups(self.config) for p in group}
        # One block of random values, repeated: drawing 8 billion would take minutes and time the same.
        self._values = np.random.default_rng(0).integers(-127, 128, 1 << 24, dtype=np.int8)

    def matrix(self, names: Sequence[str]) -> AnyMatrix:
        """See checkpoint.Weights. Scaled so that a product keeps its input's size."""
        rows, width = sum(self._parameters[n].shape[0] for n in names), self._parameters[names[0]].shape[1]
        if self._parameters[names[0]].exact:
            draw = np.random.default_rng(self.nbytes).standard_normal((rows, width), np.float32)
            self.nbytes += draw.nbytes
            return Matrix(draw / np.float32(width**0.5))
        group = choose_group(width, self._group_size)
        assert group is not None
        codes = aligned_empty((rows, width), np.int8)  # as in a file
        flat, block = codes.reshape(-1), len(self._values)
        for start in range(0, len(flat), block):
            flat[start : start + block] = self._values[: len(flat) - start]
        scale = 1 / (73 * width**0.5)  # 73: the standard deviation of the codes
        matrix = QuantizedMatrix(codes, np.full((rows, width // group), scale, np.float16), group)
        self.nbytes += matrix.nbytes
        return matrix

    def vector(self, names: Sequence[str]) -> np.ndarray:
        """See checkpoint.Weights."""
        length = sum(self._parameters[n].shape[0] for n in names)
        vector = np.full(length, 0.0 if names[0].endswith("bias") else 1.0, np.float32)
        self.nbytes += vector.nbytes
        return vector

    def require_memory(self, available: int | None) -> None:
        """Refuses a model that so many bytes of memory cannot hold; None: not known."""
        per_value = 1 + 2 / self._group_size
        needed = sum(p.size * (4 if p.exact or not p.is_matrix else per_value) for p in self._parameters.values())
        if available is not None and needed > available:
            raise NumbaInferError(
                f"{self.name} needs {needed / 1e9:.0f} GB for its weights alone, and this machine has "
                f"{available / 1e9:.0f} GB; take a smaller one"
            )
