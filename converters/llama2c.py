"""Reads the .bin files of llama2.c's lineage: its versions 0, 1 (float32) and 2 (int8), and KuiperLLama's exports.

A header of sizes, then matrices in a fixed order; which of the layouts a file has follows from its magic number or,
where there is none, from its size (run.c and export.py of https://github.com/karpathy/llama2.c, tools/ of
https://github.com/zjhellofss/KuiperLLama). None of them says norm epsilon, RoPE or special tokens; llama2.c's constants
stand in for them, or what the user says (SourceOptions).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from numbainfer.converters.llama_config import llama_config
from numbainfer.converters.mapped import MappedFile
from numbainfer.converters.source import Array, Rows, Source, SourceTensor, half_split
from numbainfer.converters.source_options import HALF_SPLIT, INTERLEAVED, SourceOptions
from numbainfer.errors import NumbaInferError

_MAGIC = 0x616B3432  # "ak42"
_HEADER_BYTES = 256  # of versions 1 and 2
_LLAMA2_VOCABULARY = 32000  # larger ones are not llama2.c's or LLaMA 2's, and have other special tokens

# Far above any model in these formats, and low enough to tell other files by their first bytes.
_LIMITS = (2**16, 2**20, 2**10, 2**12, 2**12, 2**24, 2**24)

_NORMS = ("input_layernorm", "post_attention_layernorm")
_MATRICES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.up_proj",
)
# (Hugging Face name, or None for what is skipped; shape; group of int8 values, or None for float32)
_Item = tuple[str | None, tuple[int, ...], int | None]


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
    group: int = 0
    version: int = 0
    nbytes: int = 28

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


def is_plausible_header(head: bytes) -> bool:
    """Whether a file's first 256 bytes can be a header of these; its size is open_llama2c's to check."""
    return head[:4] == struct.pack("<I", _MAGIC) or _sizes(head[:28]) is not None


def open_llama2c(path: Path, options: SourceOptions) -> Source:
    """Open a .bin, without a tokenizer (the formats have none). Raises NumbaInferError."""
    file = MappedFile(path)
    header, layout = _find_layout(path, file)
    biased = any(name is not None and name.endswith(".bias") for name, _, _ in layout)
    # KuiperLLama's build for Qwen2.5 has these three as constants; it writes Hugging Face's layout.
    eps, theta, pairs = (1e-6, 1e6, HALF_SPLIT) if biased else (1e-5, 10000.0, INTERLEAVED)
    config = llama_config(
        hidden=header.dim,
        inner=header.hidden_dim,
        layers=header.n_layers,
        heads=header.n_heads,
        kv_heads=header.n_kv_heads,
        vocab=header.vocab_size,
        context=header.seq_len,
        tied=header.shared_head,
        eps=eps,
        theta=theta,
        qkv_bias=biased,
    )
    generation = None
    if header.vocab_size <= _LLAMA2_VOCABULARY and not biased and options.config is None:
        config |= {"bos_token_id": 1, "eos_token_id": 2}
        # The trainer ends every story with BOS, and llama2.c's generate loop stops at it.
        generation = {"bos_token_id": 1, "eos_token_id": [1, 2]}
    interleaved = (options.rope_layout or pairs) == INTERLEAVED
    return Source(
        path=path,
        format="llama2c",
        config=options.apply_config(config),
        generation_config=generation,
        tokenizer_files={},
        tensors=_tensors(file, header, layout, interleaved),
        mappings=[file.mapping],
    )


def _sizes(head: bytes) -> _Header | None:
    """The seven sizes, or None if no model could have them."""
    if len(head) < 28:
        return None
    values = struct.unpack("<7i", head)
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len = values
    if not all(0 < abs(value) <= limit for value, limit in zip(values, _LIMITS, strict=True)):
        return None
    if min(values[:5]) < 0 or seq_len < 0 or dim % n_heads or (dim // n_heads) % 2 or n_heads % n_kv_heads:
        return None
    return _Header(dim, hidden_dim, n_layers, n_heads, n_kv_heads, abs(vocab_size), seq_len, vocab_size > 0)


def _find_layout(path: Path, file: MappedFile) -> tuple[_Header, list[_Item]]:
    """The header and what follows it, such that it takes all of the file."""
    head = file.mapping[:_HEADER_BYTES]
    candidates: list[tuple[_Header, list[_Item]]] = []
    if head[:4] == struct.pack("<I", _MAGIC):
        header = _new_header(path, head)
        layout = list(_version1(header) if header.version == 1 else _version2(header))
        candidates.append((header, layout))
    else:
        old = _sizes(head[:28])
        if old is None:
            raise NumbaInferError(f"{path} is not a llama2.c .bin: its header makes no sense")
        candidates += [(old, list(_version0(old))), (old, list(_version0(old, biases=True)))]
        group = int.from_bytes(head[28:32], "little", signed=True)
        if 0 < group <= 2**16:
            quantized = replace(old, group=group, nbytes=32)
            candidates.append((quantized, list(_kuiper_int8(quantized))))
    for header, layout in candidates:
        if header.nbytes + sum(_item_bytes(item) for item in layout) == file.size:
            return header, layout
    header, layout = candidates[0]
    expected = header.nbytes + sum(_item_bytes(item) for item in layout)
    problem = "truncated" if file.size < expected else "not a .bin of a known version"
    raise NumbaInferError(f"{path} is {problem}: its header asks for {expected} bytes, it has {file.size}")


def _new_header(path: Path, head: bytes) -> _Header:
    """Of version 1 or 2."""
    version = int.from_bytes(head[4:8], "little", signed=True)
    sizes = _sizes(head[8:36])
    if version not in (1, 2):
        raise NumbaInferError(f"{path} is a llama2.c export of version {version}, which is not known")
    if len(head) < _HEADER_BYTES or sizes is None or not sizes.shared_head or head[36] > 1:
        raise NumbaInferError(f"{path} is truncated or damaged: its header makes no sense")
    group = int.from_bytes(head[37:41], "little", signed=True)
    if any(head[37 if version == 1 else 41 :]) or (version == 2 and not 0 < group <= 2**16):
        raise NumbaInferError(f"{path} is damaged: its header makes no sense")
    return replace(sizes, shared_head=head[36] == 1, group=group, version=version, nbytes=_HEADER_BYTES)


def _shape(header: _Header, part: str) -> tuple[int, int]:
    dim, hidden, kv = header.dim, header.hidden_dim, header.n_kv_heads * header.head_dim
    if part in ("self_attn.k_proj", "self_attn.v_proj"):
        return kv, dim
    if part in ("mlp.gate_proj", "mlp.up_proj"):
        return hidden, dim
    return (dim, hidden) if part == "mlp.down_proj" else (dim, dim)


def _layers(header: _Header, part: str, group: int | None = None, bias: bool = False) -> Iterator[_Item]:
    """A norm or a matrix of all layers."""
    shape = (header.dim,) if part in _NORMS else _shape(header, part)
    for layer in range(header.n_layers):
        yield f"model.layers.{layer}.{part}.weight", shape, group
        if bias:
            yield f"model.layers.{layer}.{part}.bias", shape[:1], None


def _version0(header: _Header, biases: bool = False) -> Iterator[_Item]:
    """biases: KuiperLLama's for Qwen2.5, where those of q, k and v follow each weight."""
    yield "model.embed_tokens.weight", (header.vocab_size, header.dim), None
    yield from _layers(header, _NORMS[0])
    for part in _MATRICES[:4]:
        yield from _layers(header, part, bias=biases and part != "self_attn.o_proj")
    yield from _layers(header, _NORMS[1])
    for part in _MATRICES[4:]:
        yield from _layers(header, part)
    yield "model.norm.weight", (header.dim,), None
    # Tables of RoPE's cosines and sines, which follow from the config.
    yield None, (2, header.seq_len, header.head_dim // 2), None
    yield from _head(header)


def _version1(header: _Header) -> Iterator[_Item]:
    for part in _NORMS:
        yield from _layers(header, part)
    yield "model.norm.weight", (header.dim,), None
    yield "model.embed_tokens.weight", (header.vocab_size, header.dim), None
    for part in _MATRICES:
        yield from _layers(header, part)
    yield from _head(header)


def _version2(header: _Header) -> Iterator[_Item]:
    for part in _NORMS:
        yield from _layers(header, part)
    yield "model.norm.weight", (header.dim,), None
    yield "model.embed_tokens.weight", (header.vocab_size, header.dim), header.group
    for part in _MATRICES:
        yield from _layers(header, part, header.group)
    yield from _head(header, header.group)


def _kuiper_int8(header: _Header) -> Iterator[_Item]:
    for part in _MATRICES:
        yield from _layers(header, part, header.group)
    yield from _head(header, header.group)
    yield "model.embed_tokens.weight", (header.vocab_size, header.dim), None
    for part in _NORMS:
        yield from _layers(header, part)
    yield "model.norm.weight", (header.dim,), None


def _head(header: _Header, group: int | None = None) -> Iterator[_Item]:
    if not header.shared_head:
        yield "lm_head.weight", (header.vocab_size, header.dim), group


def _item_bytes(item: _Item) -> int:
    """int8 values are followed by a float32 scale for each group of the flattened matrix."""
    _, shape, group = item
    count = math.prod(shape)
    return 4 * count if group is None else count + 4 * -(-count // group)


def _tensors(file: MappedFile, header: _Header, layout: list[_Item], interleaved: bool) -> dict[str, SourceTensor]:
    tensors = {}
    position = header.nbytes
    for item in layout:
        name, shape, group = item
        count = math.prod(shape)
        if name is not None:
            read: Rows
            if group is None:
                read = _plain(file.array("<f4", count, position).reshape(shape))
            else:
                scales = file.array("<f4", -(-count // group), position + count)
                read = _int8(file.array("i1", count, position).reshape(shape), scales, group)
            if interleaved and name.endswith(("q_proj.weight", "k_proj.weight")):
                read = half_split(read, header.head_dim)
            tensors[name] = SourceTensor(name, shape, "float32", read)
        position += _item_bytes(item)
    return tensors


def _plain(array: Array) -> Rows:
    return lambda start, stop: np.require(array[start:stop], requirements="A")


def _int8(values: Array, scales: Array, group: int) -> Rows:
    """Groups run through the flattened matrix: one may end in the row after."""
    width = values.shape[1]

    def read(start: int, stop: int) -> Array:
        first, last = start * width, stop * width
        low, high = first // group, -(-last // group)
        factors = np.repeat(scales[low:high], group)[first - low * group : last - low * group]
        with np.errstate(all="ignore"):  # a NaN or infinity in a scale is the caller's to find
            return values[start:stop].astype(np.float32) * factors.reshape(stop - start, width)

    return read
