"""Reads llama2.c's .bin of version 0: seven int32, then float32 matrices in a fixed order.

The format (run.c and export.py, legacy_export, of https://github.com/karpathy/llama2.c) says nothing of norm
epsilon, RoPE or special tokens; llama2.c's own constants stand in for them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from numbainfer.converters.source import Array, Source, SourceTensor, half_split_rows
from numbainfer.errors import NumbaInferError

_HEADER = struct.Struct("<7i")


@dataclass(frozen=True)
class _Header:
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int
    shared_head: bool

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


def _parse(head: bytes) -> _Header | None:
    """The header, or None if no llama2.c model could have it."""
    if len(head) < _HEADER.size:
        return None
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len = _HEADER.unpack(head[: _HEADER.size])
    values = (dim, hidden_dim, n_layers, n_heads, n_kv_heads, abs(vocab_size), seq_len)
    # Far above any model in this format, and low enough to tell other files by their first bytes.
    limits = (2**16, 2**20, 2**10, 2**12, 2**12, 2**24, 2**24)
    if not all(0 < value <= limit for value, limit in zip(values, limits, strict=True)):
        return None
    if dim % n_heads or (dim // n_heads) % 2 or n_heads % n_kv_heads:
        return None
    return _Header(dim, hidden_dim, n_layers, n_heads, n_kv_heads, abs(vocab_size), seq_len, vocab_size > 0)


def is_plausible_header(head: bytes) -> bool:
    """Whether a file's first 28 bytes can be a llama2.c header; its size is open_llama2c's to check."""
    return _parse(head) is not None


def open_llama2c(path: Path) -> Source:
    """Open a version 0 .bin, without a tokenizer (the format has none). Raises NumbaInferError."""
    try:
        data = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        raise NumbaInferError(f"cannot read {path}: {error}") from error
    header = _parse(data[: _HEADER.size].tobytes())
    if header is None:
        raise NumbaInferError(f"{path} is not a llama2.c .bin: its header makes no sense")

    layout = list(_layout(header))
    expected = _HEADER.size + 4 * sum(math.prod(shape) for _, shape in layout)
    if data.size != expected:
        problem = "truncated" if data.size < expected else "not a llama2.c .bin of version 0 (float32)"
        raise NumbaInferError(f"{path} is {problem}: its header asks for {expected} bytes, it has {data.size}")

    floats = data[_HEADER.size :].view("<f4")
    tensors: dict[str, SourceTensor] = {}
    position = 0
    for name, shape in layout:
        array = floats[position : position + math.prod(shape)].reshape(shape)
        position += array.size
        if name is not None:
            interleaved = name.endswith(("q_proj.weight", "k_proj.weight"))
            read = _half_split(array, header.head_dim) if interleaved else _plain(array)
            tensors[name] = SourceTensor(name, shape, "float32", read)
    return Source(
        path=path,
        format="llama2c",
        config=_config(header),
        # The trainer ends every story with BOS, and llama2.c's generate loop stops at it.
        generation_config={"bos_token_id": 1, "eos_token_id": [1, 2]},
        tokenizer_files={},
        tensors=tensors,
    )


def _layout(header: _Header) -> Iterator[tuple[str | None, tuple[int, ...]]]:
    """Every tensor of the file in its order: Hugging Face name (None: to be skipped) and shape."""
    dim, hidden = header.dim, header.hidden_dim
    kv = header.n_kv_heads * header.head_dim
    yield "model.embed_tokens.weight", (header.vocab_size, dim)
    shape: tuple[int, ...]
    for part, shape in (
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (kv, dim)),
        ("self_attn.v_proj", (kv, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (hidden, dim)),
        ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim)),
    ):
        for layer in range(header.n_layers):
            yield f"model.layers.{layer}.{part}.weight", shape
    yield "model.norm.weight", (dim,)
    # Tables of RoPE's cosines and sines, which follow from the config.
    yield None, (header.seq_len, header.head_dim // 2)
    yield None, (header.seq_len, header.head_dim // 2)
    if not header.shared_head:
        yield "lm_head.weight", (header.vocab_size, dim)


def _config(header: _Header) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": header.dim,
        "intermediate_size": header.hidden_dim,
        "num_hidden_layers": header.n_layers,
        "num_attention_heads": header.n_heads,
        "num_key_value_heads": header.n_kv_heads,
        "head_dim": header.head_dim,
        "vocab_size": header.vocab_size,
        "max_position_embeddings": header.seq_len,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": header.shared_head,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def _plain(array: Array) -> Callable[[int, int], Array]:
    return lambda start, stop: array[start:stop]


def _half_split(array: Array, head_dim: int) -> Callable[[int, int], Array]:
    return lambda start, stop: array[half_split_rows(start, stop, head_dim)]
