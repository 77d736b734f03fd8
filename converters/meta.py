"""Reads Meta's layout (params.json, consolidated.NN.pth, tokenizer.model) and llama2.c's training checkpoints (.pt).

Both keep a state dict under Meta's names with q and k interleaved for RoPE. Meta's large models are cut into
model-parallel parts, one file each, which are put together again (Shoeybi et al. 2019, "Megatron-LM", section 3):
q, k, v, gate, up and the head by their rows, o and down by their columns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from numbainfer.converters import tokenizer_files
from numbainfer.converters.huggingface import read_json_object
from numbainfer.converters.llama_config import LAYER_NAMES, NAMES, llama_config
from numbainfer.converters.source import Array, Source, SourceTensor, half_split, stacked
from numbainfer.converters.source_options import HALF_SPLIT, SourceOptions
from numbainfer.converters.torch_file import TorchFile, TorchTensor
from numbainfer.errors import NumbaInferError
from numbainfer.safetensors_file import shown

_FLOATS = ("float32", "float16", "bfloat16")
_KNOWN = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps"),
    *("rope_theta", "use_scaled_rope", "rope_scaling_factor", "max_seq_len", "max_batch_size", "dropout"),
}
_BY_COLUMNS = ("wo", "w2")
_REPLICATED = ("attention_norm", "ffn_norm", "norm")

State = Mapping[str, TorchTensor]


def open_meta(directory: Path, options: SourceOptions) -> Source:
    """Open a directory in Meta's layout. Raises NumbaInferError."""
    options.refuse_rope("Meta's params.json does")
    paths = sorted(directory.glob("consolidated.*.pth"))
    if not paths or [path.name for path in paths] != [f"consolidated.{i:02}.pth" for i in range(len(paths))]:
        found = ", ".join(path.name for path in paths[:4]) or "none"
        raise NumbaInferError(f"{directory}: consolidated.00.pth and all that follow are wanted; there: {found}")
    files = [TorchFile(path) for path in paths]
    params = read_json_object(directory / "params.json")
    try:
        tensors = _merge([_state(file.content) for file in files], _size(params, "dim"))
        config = options.apply_config(_config(params, tensors, _context(params)))
        tensors = _renamed(tensors, config)
    except NumbaInferError as error:
        raise NumbaInferError(f"{directory}: {error}") from error
    # LLaMA 1 and 2 were given out with one tokenizer beside the directories of all sizes.
    vocab = config["vocab_size"]
    tokenizer = tokenizer_files.from_directory(directory, vocab) or tokenizer_files.from_directory(
        directory.parent, vocab
    )
    # Made with the tokenizer of LLaMA 3, which has several tokens that end a text.
    generation = json.loads(tokenizer.pop("generation_config.json", b"null"))
    return Source(directory, "meta", config, generation, tokenizer, tensors, [file.mapping for file in files])


def open_training_checkpoint(path: Path, options: SourceOptions) -> Source:
    """Open a checkpoint of llama2.c's trainer, a dict of `model_args` and `model`. Raises NumbaInferError."""
    file = TorchFile(path)
    content = file.content
    if not isinstance(content, dict) or not isinstance(content.get("model_args"), dict):
        raise NumbaInferError(
            f"{path} is a PyTorch file, but no training checkpoint of llama2.c (it has no model_args); "
            "give the directory that has it and its config.json or params.json"
        )
    params = content["model_args"]
    try:
        state = {name.removeprefix("_orig_mod."): t for name, t in _state(content.get("model")).items()}
        tensors = _merge([state], _size(params, "dim"))
        config = options.apply_config(_config(params, tensors, _size(params, "max_seq_len", 2048)))
        tensors = _renamed(tensors, config, half_split_already=options.rope_layout == HALF_SPLIT)
    except NumbaInferError as error:
        raise NumbaInferError(f"{path}: {error}") from error
    # The trainer ends every story with BOS, and llama2.c's generate loop stops at it.
    generation = {"bos_token_id": 1, "eos_token_id": [1, 2]}
    return Source(path, "llama2c", config, generation, {}, tensors, [file.mapping])


def _state(content: object) -> State:
    """A state dict's tensors without its buffers."""
    if not isinstance(content, dict) or not content:
        raise NumbaInferError("there is no state dict in it")
    state = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, TorchTensor):
            raise NumbaInferError(f"its state dict's {shown(name)} is no tensor")
        if not name.endswith(("rope.freqs", "freqs_cos", "freqs_sin")):
            if tensor.dtype not in _FLOATS:
                raise NumbaInferError(f"tensor {shown(name)} is {tensor.dtype}; weights are {', '.join(_FLOATS)}")
            state[name] = tensor
    return state


def _merge(states: Sequence[State], hidden: int) -> dict[str, SourceTensor]:
    """The whole tensors of a model's parts, still under Meta's names."""
    merged = {}
    for name, first in states[0].items():
        parts = [state.get(name) for state in states]
        for number, part in enumerate(parts):
            if part is None:
                raise NumbaInferError(f"tensor {shown(name)} is missing in part {number}")
            if (part.dtype, part.shape) != (first.dtype, first.shape):
                raise NumbaInferError(f"tensor {shown(name)} is {list(part.shape)} {part.dtype} in part {number}")
        merged[name] = _whole(name, [part for part in parts if part is not None], hidden)
    for number, state in enumerate(states[1:], 1):
        if extra := state.keys() - merged.keys():
            raise NumbaInferError(f"tensor {shown(min(extra))} is in part {number}, but not in part 0")
    return merged


def _whole(name: str, parts: list[TorchTensor], hidden: int) -> SourceTensor:
    first, count = parts[0], len(parts)
    kind = name.split(".")[-2] if "." in name else name
    if len(first.shape) not in (1, 2):
        raise NumbaInferError(f"tensor {shown(name)} has {len(first.shape)} dimensions")
    if count == 1 or kind in _REPLICATED:
        return SourceTensor(name, first.shape, first.dtype, first.rows)
    if len(first.shape) != 2:
        raise NumbaInferError(f"tensor {shown(name)}: it is not known how {count} parts of it belong together")
    rows, width = first.shape
    # LLaMA 1 and 2 cut the embedding by its columns, LLaMA 3 by the vocabulary.
    if kind in _BY_COLUMNS or (kind == "tok_embeddings" and width * count == hidden):

        def read(start: int, stop: int) -> Array:
            return np.concatenate([part.rows(start, stop) for part in parts], axis=1)

        return SourceTensor(name, (rows, width * count), first.dtype, read)
    return SourceTensor(name, (rows * count, width), first.dtype, stacked([(rows, part.rows) for part in parts]))


def _config(params: Mapping[str, Any], tensors: Mapping[str, SourceTensor], context: int) -> dict[str, Any]:
    for key, value in params.items():
        if key not in _KNOWN and value not in (None, False):
            raise NumbaInferError(f"parameter {shown(key)} = {shown(value)} is not supported")
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if name not in tensors or len(tensors[name].shape) != 2:
            raise NumbaInferError(f"tensor {name} is missing")
    embedding, head = tensors["tok_embeddings.weight"], tensors.get("output.weight")
    hidden, heads = _size(params, "dim"), _size(params, "n_heads")
    if hidden % heads:
        raise NumbaInferError(f"{hidden} values can't be shared by {heads} heads")
    config = llama_config(
        hidden=hidden,
        inner=tensors["layers.0.feed_forward.w1.weight"].shape[0],
        layers=_size(params, "n_layers"),
        heads=heads,
        kv_heads=_size(params, "n_kv_heads", heads),
        vocab=embedding.shape[0],
        context=context,
        tied=head is None or _equal(embedding, head),
        eps=_number(params, "norm_eps", 1e-5),
        theta=_number(params, "rope_theta", 10000.0),
        dtype=embedding.dtype,
    )
    if params.get("use_scaled_rope"):
        # params.json does not say the factor. Meta released 3.2's small models with 32, the others with 8.
        factor = _number(params, "rope_scaling_factor", 32.0 if hidden < 4096 else 8.0)
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return config


def _context(params: Mapping[str, Any]) -> int:
    """The context that a model was trained for. params.json does not say; what it says tells the generations apart."""
    if params.get("use_scaled_rope"):
        return 131072  # LLaMA 3.1 and later
    theta = _number(params, "rope_theta", 10000.0)
    known = {500000.0: 8192, 1000000.0: 16384}  # LLaMA 3, Code Llama
    return known.get(theta, 2048 if params.get("norm_eps") == 1e-6 else 4096)  # LLaMA 1, LLaMA 2


def _renamed(
    tensors: Mapping[str, SourceTensor], config: Mapping[str, Any], half_split_already: bool = False
) -> dict[str, SourceTensor]:
    """The tensors under Hugging Face's names, q and k in its order."""
    out = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(?:layers\.(0|[1-9]\d{0,4})\.)?([\w.]{1,40})\.weight", name, re.ASCII)
        layer, part = match.groups() if match else (None, "")
        known = NAMES if layer is None else LAYER_NAMES
        if part not in known:
            raise NumbaInferError(f"tensor {shown(name)} is none of a LLaMA model's")
        new = f"{known[part]}.weight" if layer is None else f"model.layers.{layer}.{known[part]}.weight"
        read = tensor.read
        if part in ("attention.wq", "attention.wk") and not half_split_already:
            head_dim = config["hidden_size"] // config["num_attention_heads"]
            if head_dim % 2 or tensor.shape[0] % head_dim:
                raise NumbaInferError(f"tensor {name} has {tensor.shape[0]} rows, not heads of {head_dim}")
            read = half_split(read, head_dim)
        out[new] = SourceTensor(new, tensor.shape, tensor.dtype, read)
    return out


def _equal(first: SourceTensor, second: SourceTensor) -> bool:
    """Whether a head is the embedding once more."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    step = max(1, (1 << 22) // max(first.shape[1], 1))
    return all(
        np.array_equal(first.rows(i, min(i + step, first.shape[0])), second.rows(i, min(i + step, first.shape[0])))
        for i in range(0, first.shape[0], step)
    )


def _size(params: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = params.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 2**31:
        raise NumbaInferError(f"parameter {key} is {shown(value)}, not a positive number")
    return value


def _number(params: Mapping[str, Any], key: str, default: float) -> float:
    value = params.get(key, default)
    if type(value) not in (int, float) or not 0 < value < 1e15:
        raise NumbaInferError(f"parameter {key} is {shown(value)}, not a positive number")
    return float(value)
