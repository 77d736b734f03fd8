"""Writers for the formats of Meta's lineage: its own parts, llama2.c's files and KuiperLLama's."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from source_files import CONTEXT, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, MLP, PARTS, VOCAB, interleave
from torch_files import write_torch

Tensors = Mapping[str, np.ndarray]

META = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
PARAMS: dict[str, Any] = {
    "dim": HIDDEN,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "n_kv_heads": KV_HEADS,
    "vocab_size": -1,
    "multiple_of": 8,
    "norm_eps": 1e-5,
}
_ORDER = tuple(PARTS)
NORMS = (_ORDER[0], _ORDER[5])
MATRICES = (*_ORDER[1:5], *_ORDER[6:])


def part(tensors: Tensors, layer: int, name: str, interleaved: bool = True) -> np.ndarray:
    """A layer's tensor as these formats have it."""
    array = tensors[f"model.layers.{layer}.{name}.weight"]
    return interleave(array) if interleaved and name.endswith(("q_proj", "k_proj")) else array


def meta_state(tensors: Tensors) -> dict[str, np.ndarray]:
    """The state dict under Meta's names, q and k interleaved."""
    state = {"tok_embeddings.weight": tensors["model.embed_tokens.weight"], "norm.weight": tensors["model.norm.weight"]}
    # Meta always writes a head; a tied one is the embedding once more.
    state["output.weight"] = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    for layer in range(LAYERS):
        for name, theirs in META.items():
            state[f"layers.{layer}.{theirs}.weight"] = part(tensors, layer, name)
    return state


def write_meta(
    directory: Path, tensors: Tensors, shards: int = 2, params: Mapping[str, Any] = PARAMS, by_vocabulary: bool = False
) -> Path:
    """Meta's directory. by_vocabulary: the embedding is cut as LLaMA 3's, not as LLaMA 2's."""
    directory.mkdir(exist_ok=True)
    (directory / "params.json").write_text(json.dumps(dict(params)))
    states: list[dict[str, np.ndarray]] = [{} for _ in range(shards)]
    for name, array in meta_state(tensors).items():
        if array.ndim == 1:
            pieces = [array] * shards
        else:
            columns = ".wo." in name or ".w2." in name or (name.startswith("tok_") and not by_vocabulary)
            pieces = np.split(array, shards, axis=1 if columns else 0)
        for state, piece in zip(states, pieces, strict=True):
            state[name] = np.ascontiguousarray(piece)
    for number, state in enumerate(states):
        state["rope.freqs"] = np.ones(HEAD_DIM // 2, np.float32)
        write_torch(directory / f"consolidated.{number:02}.pth", state)
    return directory


def write_training_checkpoint(path: Path, tensors: Tensors) -> Path:
    """llama2.c's ckpt.pt of a compiled model, with its optimizer."""
    arguments = {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "vocab_size": VOCAB}
    optimizer = {"state": {0: {"step": np.ones((), np.float32)}}, "param_groups": [{"lr": 5e-4, "betas": (0.9, 0.95)}]}
    content = {
        "model": {f"_orig_mod.{name}": array for name, array in meta_state(tensors).items()},
        "optimizer": optimizer,
        "model_args": {**arguments, "multiple_of": 8, "max_seq_len": CONTEXT, "dropout": 0.0},
        "iter_num": 100000,
        "best_val_loss": np.ones((), np.float32),
        "config": {"out_dir": "out", "compile": True, "eval_only": False, "seed": None},
    }
    return write_torch(path, content)


def sizes(tensors: Tensors) -> tuple[int, ...]:
    shared = "lm_head.weight" not in tensors
    return (HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, VOCAB if shared else -VOCAB, CONTEXT)


def write_version1(path: Path, tensors: Tensors) -> Path:
    arrays = [part(tensors, layer, name) for name in NORMS for layer in range(LAYERS)]
    arrays += [tensors["model.norm.weight"], tensors["model.embed_tokens.weight"]]
    arrays += [part(tensors, layer, name) for name in MATRICES for layer in range(LAYERS)]
    arrays += [tensors["lm_head.weight"]] if "lm_head.weight" in tensors else []
    path.write_bytes(_new_header(tensors, 1) + b"".join(array.tobytes() for array in arrays))
    return path


def write_version2(path: Path, tensors: Tensors, group: int) -> Path:
    arrays = [part(tensors, layer, name) for name in NORMS for layer in range(LAYERS)]
    matrices = [tensors["model.embed_tokens.weight"]]
    matrices += [part(tensors, layer, name) for name in MATRICES for layer in range(LAYERS)]
    matrices += [tensors["lm_head.weight"]] if "lm_head.weight" in tensors else []
    body = b"".join(array.tobytes() for array in [*arrays, tensors["model.norm.weight"]])
    path.write_bytes(_new_header(tensors, 2, group) + body + b"".join(int8(matrix, group) for matrix in matrices))
    return path


def write_kuiper_int8(path: Path, tensors: Tensors, group: int) -> Path:
    """KuiperLLama's "version 3"."""
    matrices = [part(tensors, layer, name) for name in MATRICES for layer in range(LAYERS)]
    matrices += [tensors["lm_head.weight"]] if "lm_head.weight" in tensors else []
    arrays = [tensors["model.embed_tokens.weight"]]
    arrays += [part(tensors, layer, name) for name in NORMS for layer in range(LAYERS)] + [tensors["model.norm.weight"]]
    body = b"".join(int8(matrix, group) for matrix in matrices) + b"".join(array.tobytes() for array in arrays)
    path.write_bytes(struct.pack("<8i", *sizes(tensors), group) + body)
    return path


def write_kuiper(path: Path, tensors: Tensors, biases: bool) -> Path:
    """KuiperLLama's float32 export of a Hugging Face model: half-split; for Qwen2.5 with biases."""
    arrays = [tensors["model.embed_tokens.weight"]]
    for name in PARTS:
        for layer in range(LAYERS):
            arrays.append(part(tensors, layer, name, interleaved=False))
            if biases and name.endswith(("q_proj", "k_proj", "v_proj")):
                arrays.append(tensors[f"model.layers.{layer}.{name}.bias"])
    arrays += [tensors["model.norm.weight"], np.ones((2, CONTEXT, HEAD_DIM // 2), np.float32)]
    arrays += [tensors["lm_head.weight"]] if "lm_head.weight" in tensors else []
    path.write_bytes(struct.pack("<7i", *sizes(tensors)) + b"".join(array.tobytes() for array in arrays))
    return path


def _new_header(tensors: Tensors, version: int, group: int | None = None) -> bytes:
    *first, vocab, context = sizes(tensors)
    header = struct.pack("<Ii7iB", 0x616B3432, version, *first, abs(vocab), context, vocab > 0)
    header += b"" if group is None else struct.pack("<i", group)
    return header.ljust(256, b"\0")


def int8(matrix: np.ndarray, group: int) -> bytes:
    """Values, then a float32 scale for each group of the flattened matrix."""
    values, scales = quantize(matrix, group)
    return values.tobytes() + scales.tobytes()


def quantize(matrix: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    grouped = matrix.reshape(-1, group)
    scales = (np.abs(grouped).max(axis=1) / 127).astype(np.float32)
    return np.round(grouped / scales[:, None]).astype(np.int8), scales


def dequantized(matrix: np.ndarray, group: int) -> np.ndarray:
    """What the reader has to find."""
    values, scales = quantize(matrix, group)
    return (values.astype(np.float32) * scales[:, None]).reshape(matrix.shape)
