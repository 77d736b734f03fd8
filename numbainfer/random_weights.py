"""Weights of real models' shapes and random values: to measure with nothing to download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from numbainfer.config import ModelConfig
from numbainfer.errors import NumbaInferError
from numbainfer.quantization import AnyMatrix, QuantizedMatrix, choose_group
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


# Real models' shapes, from their config.json files.
RANDOM = {
    "smollm2-135m": _shape("LlamaForCausalLM", 49152, 576, 1536, 30, 9, 3, rope_theta=1e5),
    "qwen2.5-0.5b": _shape("Qwen2ForCausalLM", 151936, 896, 4864, 24, 14, 2, rope_theta=1e6),
    "qwen3-0.6b": _shape("Qwen3ForCausalLM", 151936, 1024, 3072, 28, 16, 8, head_dim=128, rope_theta=1e6),
    "llama-3.2-1b": _shape(
        "LlamaForCausalLM", 128256, 2048, 8192, 16, 32, 8, head_dim=64, rope_theta=5e5, rope_scaling=_LLAMA3_ROPE
    ),
    "llama-3.1-8b": _shape(
        "LlamaForCausalLM",
        *(128256, 4096, 14336, 32, 32, 8),
        rope_theta=5e5,
        rope_scaling={**_LLAMA3_ROPE, "factor": 8.0},
        tie_word_embeddings=False,
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
        self._rows = {p.name: p.shape for group in parameter_groups(self.config) for p in group}
        # One block of random values, repeated: drawing 8 billion would take minutes and time the same.
        self._values = np.random.default_rng(0).integers(-127, 128, 1 << 24, dtype=np.int8)

    def matrix(self, names: Sequence[str]) -> AnyMatrix:
        """See checkpoint.Weights. Scaled so that a product keeps its input's size."""
        rows, width = sum(self._rows[n][0] for n in names), self._rows[names[0]][1]
        group = choose_group(width, self._group_size)
        assert group is not None
        codes = np.resize(self._values, rows * width).reshape(rows, width)
        scale = 1 / (73 * width**0.5)  # 73: the standard deviation of the codes
        matrix = QuantizedMatrix(codes, np.full((rows, width // group), scale, np.float16), group)
        self.nbytes += matrix.nbytes
        return matrix

    def vector(self, names: Sequence[str]) -> np.ndarray:
        """See checkpoint.Weights."""
        length = sum(self._rows[n][0] for n in names)
        vector = np.full(length, 0.0 if names[0].endswith("bias") else 1.0, np.float32)
        self.nbytes += vector.nbytes
        return vector
