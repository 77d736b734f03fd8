"""Undoes the quantization of Hugging Face checkpoints: GPTQ, AWQ (int4 and int8 in int32 words) and FP8.

Each matrix is put together from its parts when its rows are asked for, as float32; nothing is kept.

    GPTQ   w[o, i] = scales[g_idx[i], o] * (q[i, o] - zeros[g_idx[i], o] - 1)   Frantar et al. 2022, stored by AutoGPTQ
    AWQ    w[o, i] = scales[i // group, o] * (q[i, o] - zeros[i // group, o])   Lin et al. 2023, stored by AutoAWQ
    FP8    w[o, i] = q[o, i] * scale[o // block, i // block]                    DeepSeek-V3's report, section 3.3

GPTQ packs q along the inputs, everything else is packed along the outputs, lowest bits first; AWQ shuffles the outputs
of a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from numbainfer.converters.source import Array, SourceTensor
from numbainfer.errors import NumbaInferError
from numbainfer.quantization import bfloat16_to_float32
from numbainfer.safetensors_file import shown

# Which output of eight lies in a word's nibble 0, 1, ... 7, lowest bits first.
_AWQ_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])

Tensors = dict[str, SourceTensor]


def dequantized(config: dict[str, Any], quantization: object, tensors: Tensors) -> Tensors:
    """The tensors with each quantized matrix in place of its parts. Raises NumbaInferError that names no file.

    quantization: config.json's quantization_config.
    """
    settings = quantization if isinstance(quantization, dict) else {}
    method = settings.get("quant_method")
    if method == "gptq":
        return _drop_zero_biases(_unpack(tensors, _gptq(settings)), tensors, config)
    if method == "awq":
        return _unpack(tensors, _awq(settings))
    if method == "fp8" or (method == "compressed-tensors" and _is_plain_fp8(settings)):
        return _fp8(tensors, settings)
    hint = "GPTQ, AWQ and FP8 are read; give the original checkpoint"
    raise NumbaInferError(f"its quantization (quant_method {shown(method)}) is not supported; {hint}")


Combine = Callable[[str, dict[str, SourceTensor]], SourceTensor]


def _unpack(tensors: Tensors, combine: Combine) -> Tensors:
    """Replaces X.qweight, X.qzeros, X.scales and X.g_idx by X.weight."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        base, _, part = name.rpartition(".")
        if f"{base}.qweight" not in tensors or part not in ("qweight", "qzeros", "scales", "g_idx"):
            out[name] = tensor
        elif part == "qweight":
            names = ("qweight", "qzeros", "scales", "g_idx")
            parts = {p: tensors[f"{base}.{p}"] for p in names if f"{base}.{p}" in tensors}
            if not {"qzeros", "scales"} <= parts.keys():
                raise NumbaInferError(f"{shown(base)} has a qweight, but no qzeros and scales")
            for p, stored in parts.items():
                kinds = ("float16", "bfloat16", "float32") if p == "scales" else ("int32",)
                if stored.dtype not in kinds or len(stored.shape) != (1 if p == "g_idx" else 2):
                    raise NumbaInferError(f"{shown(f'{base}.{p}')} is {stored.dtype} {list(stored.shape)}")
            out[f"{base}.weight"] = combine(base, parts)
    return out


def _gptq(settings: dict[str, Any]) -> Combine:
    kind = settings.get("checkpoint_format", "gptq")
    if kind not in ("gptq", "gptq_v2"):
        raise NumbaInferError(f"GPTQ's checkpoint_format {shown(kind)} is not supported (gptq and gptq_v2 are)")
    stored_zero = 1 if kind == "gptq" else 0  # version 1 stores zero points less one

    def combine(base: str, parts: dict[str, SourceTensor]) -> SourceTensor:
        groups, outs = parts["scales"].shape
        if "g_idx" in parts:
            ins = parts["g_idx"].shape[0]
        else:
            ins = parts["qweight"].shape[0] * 32 // _bits_of(settings)
        bits = _bits(base, parts["qweight"].shape[0], ins)
        per_word = 32 // bits
        if parts["qweight"].shape[1] != outs or parts["qzeros"].shape != (groups, -(-outs // per_word)):
            raise NumbaInferError(f"{shown(base)}: the shapes of its qweight, qzeros and scales do not fit")
        index = _group_index(base, parts, settings, ins, groups)
        mask = (1 << bits) - 1
        shifts = np.arange(0, 32, bits, dtype=np.uint32)

        def read(start: int, stop: int) -> Array:
            words = parts["qweight"].rows(0, parts["qweight"].shape[0])[:, start:stop].view(np.uint32)
            q = ((words[:, None] >> shifts[:, None]) & mask).reshape(ins, stop - start).astype(np.float32)
            zeros = _columns(parts["qzeros"], shifts, mask, start, stop) + stored_zero
            # Version 1 wrote a zero point of 0 as -1, which came round to the largest number.
            zeros = np.where(zeros > mask, 0, zeros) if stored_zero else zeros
            scales = _float32(parts["scales"], start, stop)
            return np.ascontiguousarray(((q - zeros.astype(np.float32)[index]) * scales[index]).T)

        return SourceTensor(f"{base}.weight", (outs, ins), "float32", read, computed=True)

    return combine


def _awq(settings: dict[str, Any]) -> Combine:
    version = str(settings.get("version", "gemm")).lower()
    if version != "gemm" or _bits_of(settings) != 4:
        raise NumbaInferError(
            f"AWQ version {shown(version)} with {settings.get('bits')} bits is not supported (gemm with 4 bits is)"
        )

    def combine(base: str, parts: dict[str, SourceTensor]) -> SourceTensor:
        groups, outs = parts["scales"].shape
        ins, words = parts["qweight"].shape
        if words * 8 != outs or parts["qzeros"].shape != (groups, words) or ins % groups:
            raise NumbaInferError(f"{shown(base)}: the shapes of its qweight, qzeros and scales do not fit")
        shifts = np.empty(8, np.uint32)
        shifts[_AWQ_ORDER] = np.arange(0, 32, 4)

        def read(start: int, stop: int) -> Array:
            q = _columns(parts["qweight"], shifts, 15, start, stop).astype(np.float32)
            zeros = _columns(parts["qzeros"], shifts, 15, start, stop).astype(np.float32)
            grouped = q.reshape(groups, ins // groups, stop - start) - zeros[:, None]
            grouped *= _float32(parts["scales"], start, stop)[:, None]
            return np.ascontiguousarray(grouped.reshape(ins, stop - start).T)

        return SourceTensor(f"{base}.weight", (outs, ins), "float32", read, computed=True)

    return combine


def _columns(tensor: SourceTensor, shifts: Array, mask: int, start: int, stop: int) -> Array:
    """Columns start..stop of integers that lie len(shifts) to a word along the columns: uint32 [rows, stop - start]."""
    per_word = len(shifts)
    first, last = start // per_word, -(-stop // per_word)
    words = tensor.rows(0, tensor.shape[0])[:, first:last].view(np.uint32)
    values = ((words[:, :, None] >> shifts) & np.uint32(mask)).reshape(len(words), -1)
    return values[:, start - first * per_word : stop - first * per_word]


def _float32(tensor: SourceTensor, start: int, stop: int) -> Array:
    """Columns start..stop."""
    values = tensor.rows(0, tensor.shape[0])[:, start:stop]
    return bfloat16_to_float32(values) if tensor.dtype == "bfloat16" else values.astype(np.float32)


def _bits_of(settings: dict[str, Any]) -> int:
    bits = settings.get("bits", settings.get("w_bit"))
    if type(bits) is not int or bits not in (2, 4, 8):
        raise NumbaInferError(f"quantization_config: {shown(bits)} bits are not supported (2, 4 and 8 are)")
    return bits


def _bits(base: str, words: int, ins: int) -> int:
    """Bits of a value, from how many words hold how many."""
    for bits in (2, 4, 8):
        if words * 32 == ins * bits:
            return bits
    raise NumbaInferError(f"{shown(base)}: {words} words for {ins} inputs are none of 2, 4 and 8 bits")


def _group_index(base: str, parts: dict[str, SourceTensor], settings: dict[str, Any], ins: int, groups: int) -> Array:
    """The group of each input, int64 [ins]."""
    if "g_idx" in parts:
        index = parts["g_idx"].rows(0, ins).astype(np.int64)
    else:
        size = settings.get("group_size", -1)
        if type(size) is not int or size == 0:
            raise NumbaInferError(f"quantization_config: group_size {shown(size)} makes no sense")
        index = np.arange(ins) // (size if size > 0 else ins)
    if index.size and not 0 <= index.min() <= index.max() < groups:
        raise NumbaInferError(f"{shown(base)}: its g_idx reaches past its {groups} groups")
    sizes = np.bincount(index, minlength=groups)
    if len(set(sizes[:-1])) > 1 or not 0 < sizes[-1] <= sizes[0]:  # the last may be smaller
        raise NumbaInferError(f"{shown(base)}: its {ins} inputs do not make {groups} equal groups")
    return index


def _drop_zero_biases(tensors: Tensors, stored: Tensors, config: dict[str, Any]) -> Tensors:
    """Without the biases of zeros that some GPTQ writers put beside every matrix of a model that has none."""
    if config.get("attention_bias") or str(config.get("model_type")).startswith("qwen2"):
        return tensors
    out = dict(tensors)
    for name, tensor in tensors.items():
        is_bias = name.endswith(".bias") and name.removesuffix("bias") + "qweight" in stored
        if is_bias and len(tensor.shape) == 1 and not tensor.rows(0, tensor.shape[0]).any():
            del out[name]
    return out


def _is_plain_fp8(settings: dict[str, Any]) -> bool:
    """compressed-tensors can be many things; of them float-quantized, the same FP8 for all weights, is read."""
    groups = settings.get("config_groups")
    if settings.get("format") != "float-quantized" or not isinstance(groups, dict) or len(groups) != 1:
        return False
    weights = next(iter(groups.values()))
    weights = weights.get("weights") if isinstance(weights, dict) else None
    return isinstance(weights, dict) and (weights.get("num_bits"), weights.get("type")) == (8, "float")


def _fp8(tensors: Tensors, settings: dict[str, Any]) -> Tensors:
    block = settings.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n < 2**20 for n in block)
    ):
        raise NumbaInferError(f"quantization_config: weight_block_size {shown(block)} is not two sizes")
    out: Tensors = {}
    for name, tensor in tensors.items():
        base, _, part = name.rpartition(".")
        quantized = f"{base}.weight" in tensors and tensors[f"{base}.weight"].dtype == "float8_e4m3"
        if not quantized or part not in ("weight", "weight_scale", "weight_scale_inv", "input_scale"):
            out[name] = tensor  # input_scale: of activations, which need none here
        elif part == "weight":
            scale = tensors.get(f"{base}.weight_scale_inv") or tensors.get(f"{base}.weight_scale")
            if scale is None:
                raise NumbaInferError(f"{shown(name)} is FP8 without a weight_scale_inv or weight_scale")
            out[name] = _fp8_matrix(tensor, scale, block)
    return out


def _fp8_matrix(tensor: SourceTensor, scale: SourceTensor, block: list[int] | None) -> SourceTensor:
    """A matrix with a scale for each block of it, for each row ([out] or [out, 1]) or for all of it ([] or [1])."""
    if len(tensor.shape) != 2 or scale.dtype not in ("float32", "float16", "bfloat16"):
        raise NumbaInferError(f"{shown(tensor.name)}: {list(tensor.shape)} with a scale in {scale.dtype}")
    outs, ins = tensor.shape
    size = scale.shape[0] if scale.shape else 1
    count = int(np.prod(scale.shape))
    if block is not None and scale.shape == (-(-outs // block[0]), -(-ins // block[1])):
        high, wide = block
    elif count == 1:
        high, wide = outs, ins
    elif size == count == outs:
        high, wide = 1, ins
    else:
        raise NumbaInferError(
            f"{shown(scale.name)} {list(scale.shape)} does not fit {[outs, ins]} in blocks of {block}"
        )

    def read(start: int, stop: int) -> Array:
        stored = scale.read(0, size)
        factors = bfloat16_to_float32(stored) if scale.dtype == "bfloat16" else np.asarray(stored, np.float32)
        factors = factors.reshape(-(-outs // high), -(-ins // wide))[np.arange(start, stop) // high]
        return _E4M3[tensor.rows(start, stop)] * np.repeat(factors, wide, axis=1)[:, :ins]

    return SourceTensor(tensor.name, tensor.shape, "float32", read, computed=True)


def _e4m3_table() -> Array:
    """The float32 of each float8 code: sign, 4 bits of exponent with bias 7, 3 of mantissa; 0x7f and 0xff are NaN
    (Micikevicius et al. 2022, "FP8 formats for deep learning", table 1)."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[codes & 0x7F == 0x7F] = np.nan
    return np.where(codes < 128, size, -size).astype(np.float32)


_E4M3 = _e4m3_table()
