"""Reads GGUF files of the architectures that gguf_config.py lists, through the gguf library.

Names, shapes and RoPE layout become Hugging Face's; quantized tensors are dequantized row by row when asked.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader  # the library: this module is numbainfer.converters.gguf
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from numbainfer.converters.experts import split_experts
from numbainfer.converters.gguf_config import ARCHITECTURES, generation_config, model_config
from numbainfer.converters.gguf_header import check_header
from numbainfer.converters.source import Array, Source, SourceTensor, half_split
from numbainfer.converters.vocabulary import gguf_tokenizer_files
from numbainfer.errors import NumbaInferError
from numbainfer.safetensors_file import shown

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_PLAIN = {
    GGMLQuantizationType.F32: ("float32", "<f4"),
    GGMLQuantizationType.F16: ("float16", "<f2"),
    GGMLQuantizationType.BF16: ("bfloat16", "<u2"),
}
_MAX_PARTS = 1000
_INTEGERS = ("I8", "I16", "I32", "I64", "F64")  # sizes that the format knows, but no weights


class _Reader(GGUFReader):
    """GGUFReader over a plain array: slicing the np.memmap that it keeps takes three times as long."""

    @property
    def data(self) -> Array:
        return self._mapped

    @data.setter
    def data(self, mapped: Array) -> None:
        self.mapping: mmap.mmap = mapped._mmap  # type: ignore[attr-defined]
        self._mapped: Array = mapped.view(np.ndarray)


def _read(path: Path) -> tuple[_Reader, dict[str, Any]]:
    """A file and its metadata."""
    check_header(path)
    try:
        reader = _Reader(path)
        return reader, {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:
        # The library reports what it dislikes by exceptions of any kind; to the user they are all one.
        raise NumbaInferError(f"{path} is corrupt: the gguf library says {shown(error)}") from error


def _open_parts(path: Path) -> tuple[list[_Reader], dict[str, Any]]:
    """All files of a GGUF, of which `path` is any one, and the metadata, which is the first one's."""
    first, metadata = _read(path)
    count = metadata.get("split.count", 0)
    if count in (0, 1):
        return [first], metadata
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None or type(count) is not int or int(match[3]) != count or count > _MAX_PARTS:
        raise NumbaInferError(
            f"{path} is one of {shown(count)} parts of a GGUF, which its name must say: NAME-00001-of-0000N.gguf"
        )
    readers, all_metadata = [], []
    for number in range(count):
        part = path.with_name(f"{match[1]}-{number + 1:05}-of-{count:05}.gguf")
        if not part.exists():
            raise NumbaInferError(f"{part} is missing; is the download complete?")
        reader, metadata = _read(part)
        if metadata.get("split.no") != number or metadata.get("split.count") != count:
            raise NumbaInferError(f"{part} is part {metadata.get('split.no')!r} of another GGUF, by what is in it")
        readers.append(reader)
        all_metadata.append(metadata)
    total = sum(len(reader.tensors) for reader in readers)
    if all_metadata[0].get("split.tensors.count", total) != total:
        raise NumbaInferError(f"{path}: its parts have {total} tensors together, not the number that they say")
    return readers, all_metadata[0]


def open_gguf(path: Path) -> Source:
    """Open a GGUF file, or all of a split one by any of its parts. Whatever is wrong with it raises NumbaInferError."""
    readers, metadata = _open_parts(path)
    stored = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    if len(stored) != sum(len(reader.tensors) for reader in readers):
        raise NumbaInferError(f"{path}: a tensor is in two of its parts")

    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise NumbaInferError(
            f"{path}: architecture {shown(architecture)} is not supported ({', '.join(ARCHITECTURES)} are)"
        )
    if "token_embd.weight" not in stored:
        raise NumbaInferError(f"{path}: tensor token_embd.weight is missing")
    factors = stored.pop("rope_freqs.weight", None)
    try:
        config = model_config(
            metadata,
            architecture,
            vocab_size=int(stored["token_embd.weight"].shape[-1]),
            tensor_names=stored.keys(),
            rope_factors=None if factors is None else factors.data,
        )
        generation = generation_config(metadata)
        tokenizer = gguf_tokenizer_files(metadata) if "tokenizer.ggml.model" in metadata else {}
    except NumbaInferError as error:
        raise NumbaInferError(f"{path}: {error}") from error

    # convert_hf_to_gguf interleaves q and k of these architectures alone, and their biases.
    interleaved = ("self_attn.q_proj", "self_attn.k_proj") if architecture in ("llama", "smollm3") else ()
    tensors: dict[str, SourceTensor] = {}
    for name, tensor in stored.items():
        hf_name = huggingface_name(name)
        if hf_name is None:
            raise NumbaInferError(f"{path}: tensor {shown(name)} is none of a {architecture} model's")
        head_dim = config["head_dim"] if hf_name.rsplit(".", 1)[0].endswith(interleaved) else None
        tensors[hf_name] = _tensor(path, hf_name, tensor, head_dim)
    try:
        tensors = split_experts(tensors)
    except NumbaInferError as error:
        raise NumbaInferError(f"{path}: {error}") from error
    mappings = [reader.mapping for reader in readers]
    return Source(path, "gguf", config, generation, tokenizer, tensors, mappings)


def huggingface_name(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor, None if there is none: blk.0.attn_q.weight and its like."""
    match = re.fullmatch(r"(?:blk\.(0|[1-9]\d{0,4})\.)?(\w+)\.(weight|bias)", name, re.ASCII)
    if match is None:
        return None
    block, part, kind = match.groups()
    if block is None:
        return f"{NAMES[part]}.{kind}" if part in NAMES else None
    return f"model.layers.{block}.{BLOCK_NAMES[part]}.{kind}" if part in BLOCK_NAMES else None


def _tensor(path: Path, name: str, tensor: Any, head_dim: int | None) -> SourceTensor:
    """tensor: the library's ReaderTensor. head_dim: of q and k whose rows are interleaved, else None."""
    kind = GGMLQuantizationType(tensor.tensor_type)
    shape = tuple(int(n) for n in reversed(tensor.shape))
    data: Array = tensor.data
    if name.endswith("shared_expert_gate.weight") and len(shape) == 1:  # one row, which lost its axis
        shape, data = (1, *shape), data[None]
    if head_dim is not None and shape[0] % head_dim:
        raise NumbaInferError(f"{path}: tensor {tensor.name} has {shape[0]} rows, not heads of {head_dim}")
    if kind in _PLAIN:
        dtype, stored = _PLAIN[kind]
        return SourceTensor(name, shape, dtype, _rows(data.view(stored), head_dim))
    # A block of a quantized vector would be many of its rows; nobody writes one.
    if len(shape) == 1 or not _can_dequantize(kind):
        raise NumbaInferError(
            f"{path}: tensor {tensor.name} of shape {shape} is {kind.name}, which can't be dequantized"
        )
    stored_rows = _rows(data, head_dim)

    def read(start: int, stop: int) -> Array:
        if start == stop:
            return np.empty((0, *shape[1:]), np.float32)
        with np.errstate(all="ignore"):  # a NaN or infinity in a scale is the caller's to find
            return np.asarray(dequantize(stored_rows(start, stop), kind), np.float32)

    return SourceTensor(name, shape, "float32", read, computed=True)


def _rows(data: Array, head_dim: int | None) -> Callable[[int, int], Array]:
    # A copy only where a GGUF's own alignment puts numbers that can't be read in place.
    def rows(start: int, stop: int) -> Array:
        return np.require(data[start:stop], requirements="A")

    return rows if head_dim is None else half_split(rows, head_dim)


def _can_dequantize(kind: GGMLQuantizationType) -> bool:
    if kind.name in _INTEGERS:
        return False
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
