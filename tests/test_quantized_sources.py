"""GPTQ, AWQ and FP8 checkpoints: packed here by the formats' definitions, unpacked by the readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import source_files as files
from tiny_models import bfloat16_bits
from torch_files import write_torch

from numbainfer import NumbaInferError
from numbainfer.converters.source import Source, open_source
from numbainfer.safetensors_file import SafetensorsWriter

OUTS, INS, GROUP = 32, 48, 16
NAME = "model.layers.0.mlp.gate_proj"


DTYPES = {"float32": "F32", "float16": "F16", "int32": "I32", "uint8": "F8_E4M3", "uint16": "BF16"}


def opened(directory: Path, tensors: dict[str, np.ndarray], settings: Any) -> Source:
    """uint8 is written as float8, uint16 as bfloat16: NumPy has neither."""
    directory.mkdir(exist_ok=True)
    entries = [(name, DTYPES[str(array.dtype)], array.shape) for name, array in tensors.items()]
    with SafetensorsWriter(directory / "model.safetensors", entries) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
    (directory / "config.json").write_text(json.dumps({**files.CONFIG, "quantization_config": settings}))
    return open_source(directory, require_tokenizer=False)


def check(source: Source, expected: np.ndarray) -> None:
    tensor = source.tensors[f"{NAME}.weight"]
    assert (tensor.shape, tensor.dtype) == (expected.shape, "float32")
    assert source.tensors.keys() >= {f"{NAME}.weight"}
    assert not {name for name in source.tensors if "qweight" in name or "scale" in name or "g_idx" in name}
    assert "quantization_config" not in source.config
    for start, stop in ((0, len(expected)), (3, 21), (8, 9), (5, 5)):
        np.testing.assert_array_equal(tensor.rows(start, stop), expected[start:stop])


def pack(values: np.ndarray, bits: int, order: Any = None) -> np.ndarray:
    """int32 words of consecutive values along the last axis, the first in the lowest bits."""
    words = values.reshape(*values.shape[:-1], -1, 32 // bits).astype(np.uint64)
    if order is not None:
        words = words[..., order]
    shifts = np.arange(0, 32, bits, dtype=np.uint64)
    return (words << shifts).sum(axis=-1, dtype=np.uint64).astype(np.uint32).view(np.int32)


def draw(bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values [out, in], zero points and scales [groups, out]."""
    rng = np.random.default_rng(bits)
    values = rng.integers(0, 2**bits, (OUTS, INS))
    zeros = rng.integers(1, 2**bits, (INS // GROUP, OUTS))
    return values, zeros, rng.uniform(0.01, 0.1, (INS // GROUP, OUTS)).astype(np.float16)


def by_definition(values: np.ndarray, zeros: np.ndarray, scales: np.ndarray, index: np.ndarray) -> np.ndarray:
    return ((values - zeros[index].T).astype(np.float32) * scales[index].T.astype(np.float32)).astype(np.float32)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("order", ["groups", "act-order", "no g_idx"])
def test_gptq(tmp_path: Path, version: str, bits: int, order: str) -> None:
    values, zeros, scales = draw(bits)
    index = np.arange(INS) // GROUP
    if order == "act-order":
        np.random.default_rng(0).shuffle(index)
    stored = (zeros - (version == "gptq")).astype(np.uint64)
    tensors = {
        f"{NAME}.qweight": pack(values.T.T, bits).T,
        f"{NAME}.qzeros": pack(stored, bits),
        f"{NAME}.scales": scales,
        f"{NAME}.g_idx": index.astype(np.int32),
        f"{NAME}.bias": np.zeros(OUTS, np.float16),
        "model.norm.weight": np.ones(files.HIDDEN, np.float16),
    }
    if order == "no g_idx":
        del tensors[f"{NAME}.g_idx"]
    settings = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": version, "sym": False}
    source = opened(tmp_path / "m", tensors, settings)
    check(source, by_definition(values, zeros, scales, index))
    assert source.tensors.keys() == {f"{NAME}.weight", "model.norm.weight"}  # a bias of zeros is none


def test_gptq_zero_that_wrapped_round(tmp_path: Path) -> None:
    """A zero point of 0 was stored as 0 - 1, in four bits 15."""
    values, zeros, scales = draw(4)
    zeros[:] = 0
    tensors = {
        f"{NAME}.qweight": pack(values, 4).T,
        f"{NAME}.qzeros": pack(np.full_like(zeros, 15), 4),
        f"{NAME}.scales": scales,
    }
    source = opened(tmp_path / "m", tensors, {"quant_method": "gptq", "bits": 4, "group_size": GROUP})
    check(source, by_definition(values, zeros, scales, np.arange(INS) // GROUP))


def test_a_gptq_bias_that_is_one_stays(tmp_path: Path) -> None:
    values, zeros, scales = draw(4)
    tensors = {
        f"{NAME}.qweight": pack(values, 4).T,
        f"{NAME}.qzeros": pack(zeros - 1, 4),
        f"{NAME}.scales": scales,
        f"{NAME}.bias": np.ones(OUTS, np.float16),
    }
    source = opened(tmp_path / "m", tensors, {"quant_method": "gptq", "bits": 4, "group_size": GROUP})
    np.testing.assert_array_equal(source.tensors[f"{NAME}.bias"].rows(0, OUTS), np.ones(OUTS))


def test_awq(tmp_path: Path) -> None:
    values, zeros, scales = draw(4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {
        f"{NAME}.qweight": pack(values.T, 4, order),
        f"{NAME}.qzeros": pack(zeros, 4, order),
        f"{NAME}.scales": scales,
    }
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    check(opened(tmp_path / "m", tensors, settings), by_definition(values, zeros, scales, np.arange(INS) // GROUP))


def test_quantized_pytorch_files(tmp_path: Path) -> None:
    """The parts of a quantized matrix in a pytorch_model.bin."""
    directory = tmp_path / "m"
    directory.mkdir()
    matrix = np.full((2, 4), 3, np.int64)
    write_torch(directory / "pytorch_model.bin", {"x.qweight": matrix, "x.qzeros": matrix, "x.scales": matrix})
    (directory / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq", "bits": 4}}))
    with pytest.raises(NumbaInferError, match=r"x\.qweight' is int64"):
        open_source(directory, require_tokenizer=False)


def e4m3(code: int) -> float:
    """By its definition: sign, exponent with bias 7, three bits of mantissa."""
    sign, exponent, mantissa = -1 if code >> 7 else 1, code >> 3 & 15, code & 7
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


@pytest.mark.parametrize(
    ("kind", "scale_shape", "settings"),
    [
        ("weight_scale_inv", (2, 3), {"quant_method": "fp8", "weight_block_size": [20, 17]}),
        ("weight_scale", (), {"quant_method": "fp8"}),
        ("weight_scale", (OUTS, 1), {"quant_method": "compressed-tensors", "format": "float-quantized"}),
        ("weight_scale", (OUTS,), {"quant_method": "fp8"}),
    ],
)
def test_fp8(tmp_path: Path, kind: str, scale_shape: tuple[int, ...], settings: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (OUTS, INS)).astype(np.uint8)
    codes[codes & 0x7F == 0x7F] = 0x7E  # those two are NaN
    scale = np.asarray(rng.uniform(0.5, 2, scale_shape), np.float32)
    if settings["quant_method"] == "compressed-tensors":
        settings = {**settings, "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}}}
    tensors = {f"{NAME}.weight": codes, f"{NAME}.{kind}": scale, f"{NAME}.input_scale": np.ones((), np.float32)}
    source = opened(tmp_path / "m", tensors, settings)
    values = np.array([e4m3(code) for code in range(256)], np.float32)[codes]
    if "weight_block_size" in settings:
        full = np.repeat(np.repeat(scale, 20, axis=0), 17, axis=1)[:OUTS, :INS]
    else:
        full = scale.reshape(-1, 1)
    check(source, values * full)
    assert source.tensors.keys() == {f"{NAME}.weight"}


def test_fp8_with_a_bfloat16_scale_and_nan(tmp_path: Path) -> None:
    tensors = {
        f"{NAME}.weight": np.array([[0x38, 0x7F]], np.uint8),
        f"{NAME}.weight_scale": bfloat16_bits(np.ones(1) / 2),
    }
    rows = opened(tmp_path / "m", tensors, {"quant_method": "fp8"}).tensors[f"{NAME}.weight"].rows(0, 1)
    np.testing.assert_array_equal(rows, [[0.5, np.nan]])


@pytest.mark.parametrize(
    ("settings", "change", "problem"),
    [
        ({"quant_method": "gptq", "bits": 3}, {}, "3 bits are not supported"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, {}, "checkpoint_format 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 4}, {}, "reaches past its 3 groups"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, {}, "group_size 0 makes no sense"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, {}, "AWQ version 'gemv' with 4 bits"),
        ({"quant_method": "awq", "bits": 4}, {"qweight": np.ones((7, 4), np.int32)}, "do not fit"),
        ({"quant_method": "gptq", "bits": 4}, {"qzeros": None}, "has a qweight, but no qzeros"),
        ({"quant_method": "gptq", "bits": 4}, {"scales": np.ones((3, 5), np.float16)}, "do not fit"),
        ({"quant_method": "gptq", "bits": 4}, {"qweight": np.ones((6, 32), np.float32)}, "is float32"),
        ({"quant_method": "gptq", "bits": 4}, {"g_idx": np.full(48, 3, np.int32)}, "reaches past its 3 groups"),
        ({"quant_method": "gptq", "bits": 4}, {"g_idx": np.full(49, 0, np.int32)}, "are none of 2, 4 and 8 bits"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            {},
            "'compressed-tensors'.* not",
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {}, "'bitsandbytes'.* not supported"),
        ([], {}, "quant_method None"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, {}, r"weight_block_size \[0, 1\]"),
    ],
)
def test_what_cannot_be_undone(tmp_path: Path, settings: Any, change: dict[str, Any], problem: str) -> None:
    values, zeros, scales = draw(4)
    parts = {"qweight": pack(values, 4).T, "qzeros": pack(zeros - 1, 4), "scales": scales, **change}
    tensors = {f"{NAME}.{part}": array for part, array in parts.items() if array is not None}
    with pytest.raises(NumbaInferError, match=problem) as caught:
        opened(tmp_path / "m", tensors, settings)
    assert str(tmp_path) in str(caught.value)
