"""Converted models that are read back: damaged ones are refused in one line."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from building import Checkpoints, build_model
from converting import GATE_UP, NAME, NORM, QKV, Tensors, convert_to
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from numbainfer.checkpoint import Checkpoint
from numbainfer.converters.source_reader import Target
from numbainfer.errors import NumbaInferError
from numbainfer.registry import Operators


@pytest.fixture
def converted(checkpoint_of: Checkpoints, tmp_path: Path) -> Path:
    """A converted model, which a test may damage."""
    convert_to(checkpoint_of(NAME), tmp_path / "model")
    return tmp_path / "model"


def edit_config(directory: Path, **change: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | change))


def edit_tensors(directory: Path, edit: Callable[[Tensors], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def cast(name: str, dtype: Any) -> Callable[[Path], None]:
    return lambda d: edit_tensors(d, lambda t: t.update({name: t[name].astype(dtype)}))


def drop(*names: str) -> Callable[[Path], None]:
    return lambda d: edit_tensors(d, lambda t: [t.pop(name) for name in names])


def put(name: str, array: NDArray[Any]) -> Callable[[Path], None]:
    return lambda d: edit_tensors(d, lambda t: t.update({name: array}))


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def mixed_stack(keep_scales: bool) -> Callable[[Path], None]:
    """k_proj in floating point between q_proj and v_proj in int8."""

    def edit(tensors: Tensors) -> None:
        tensors[QKV[1]] = np.zeros((32, 96), np.float16)
        if not keep_scales:
            tensors.pop(QKV[1] + "_scale")

    return lambda directory: edit_tensors(directory, edit)


def index(content: Any) -> Callable[[Path], None]:
    return lambda d: (d / "model.safetensors.index.json").write_text(json.dumps(content)) and None


def twice(directory: Path) -> None:
    """The same tensors in two files."""
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(directory / "model.safetensors", directory / name)
    index({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})(directory)


DAMAGE: list[tuple[str, Callable[[Path], Any], str]] = [
    ("truncated", truncate, "truncated"),
    ("no weights", lambda d: (d / "model.safetensors").unlink(), "cannot read .*model.safetensors: No such file"),
    ("no config", lambda d: (d / "config.json").unlink(), "cannot read .*config.json: No such file"),
    ("config no JSON", lambda d: (d / "config.json").write_text("{'a': 1}"), "config.json is not valid JSON"),
    ("config a list", lambda d: (d / "config.json").write_text("[]"), "config.json: not a JSON object"),
    ("newer format", lambda d: edit_config(d, numbainfer_format=2), "format version 2, this numbainfer reads 1"),
    ("no format", lambda d: edit_config(d, numbainfer_format=None), "format version None"),
    ("unknown key", lambda d: edit_config(d, cross_layers=2), "cross_layers = 2 is not known"),
    ("other shape", lambda d: edit_config(d, intermediate_size=173), "the config says .173, 96."),
    ("other model", lambda d: edit_config(d, architectures=["LlamaForCausalLM"]), "q_norm.* is not part of Llama"),
    ("no scale", drop(QKV[1] + "_scale"), f"tensor {QKV[1]}_scale is missing"),
    ("no codes", drop(QKV[1]), f"tensor {QKV[1]} .* is missing"),
    ("neither", drop(QKV[1], QKV[1] + "_scale"), f"tensor {QKV[1]} .* is missing"),
    ("scale of another group", put(QKV[0] + "_scale", np.ones((64, 5), np.float16)), r"_scale F16 \[64, 5\] does not"),
    ("scale float32", cast(QKV[0] + "_scale", np.float32), "_scale F32 .* does not fit"),
    ("stray scale", put("x_scale", np.ones((1, 1), np.float16)), "tensor x_scale belongs to no matrix"),
    ("codes int32", cast(QKV[0], np.int32), f"tensor {QKV[0]} has dtype I32"),
    ("norm float16", cast(NORM, np.float16), f"tensor {NORM} must be float32"),
    ("norm int8", cast(NORM, np.int8), f"{NORM}_scale is missing"),
    (
        "mixed stack, float first",
        lambda d: (drop(QKV[0] + "_scale")(d), cast(QKV[0], np.float32)(d)),
        "differ in dtype",
    ),
    ("mixed stack", mixed_stack(keep_scales=False), "differ in dtype or group"),
    ("mixed stack with scales", mixed_stack(keep_scales=True), "differ in dtype or group"),
    ("groups that differ", put(GATE_UP[0] + "_scale", np.ones((172, 1), np.float16)), "does not fit"),
    ("index a list", index([1]), "index.json: no weight_map"),
    ("index without map", index({"metadata": {}}), "index.json: no weight_map"),
    ("index of nothing", index({"weight_map": {}}), "is missing"),
    ("index of a missing file", index({"weight_map": {NORM: "b.safetensors"}}), "cannot read .*b.safetensors"),
    ("index leads away", index({"weight_map": {NORM: "../b.safetensors"}}), "outside its directory"),
    ("index leads up", index({"weight_map": {NORM: ".."}}), "outside its directory|not a regular file"),
    ("index with a NUL", index({"weight_map": {NORM: "a\0b"}}), "outside its directory"),
    ("index of a number", index({"weight_map": {NORM: 5}}), "cannot read"),
    ("twice", twice, "a tensor is in two files"),
]


@pytest.mark.parametrize(("damage", "problem"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_damaged_converted_models(damage: Callable[[Path], Any], problem: str, converted: Path, ops: Operators) -> None:
    damage(converted)
    with pytest.raises(NumbaInferError, match=problem) as caught:
        build_model(ops, Checkpoint(converted))
    assert "\n" not in str(caught.value)
    assert str(converted) in str(caught.value)


def test_a_safetensors_header_with_flipped_bits(converted: Path, ops: Operators) -> None:
    """Either the model still opens (a name's letter in metadata) or one error says why not; nothing else happens."""
    file = converted / "model.safetensors"
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    rng = random.Random(0)
    refused = 0
    for _ in range(150):
        position = rng.randrange(header)
        file.write_bytes(data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :])
        try:
            build_model(ops, Checkpoint(converted))
        except NumbaInferError:
            refused += 1
    assert refused > 75


@pytest.mark.parametrize("dtype", ["int8", "float16", "bfloat16", "float32"])
def test_a_converted_model_can_be_converted_again(dtype: str, checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    convert_to(checkpoint_of(NAME), tmp_path / "once", Target(dtype))
    convert_to(tmp_path / "once", tmp_path / "twice", Target(dtype))
    once, twice = (tmp_path / name / "model.safetensors" for name in ("once", "twice"))
    assert once.read_bytes() == twice.read_bytes()  # a group's largest value is 127 scales again
    assert (tmp_path / "once" / "config.json").read_text() == (tmp_path / "twice" / "config.json").read_text()
