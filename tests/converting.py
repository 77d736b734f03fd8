"""Sources that tests convert, and what becomes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tiny_tokenizers import letters

from numbainfer.converters.convert import Summary, convert
from numbainfer.converters.source import open_source
from numbainfer.converters.source_reader import Target
from numbainfer.errors import NumbaInferError

NAME = "qwen3_mixed"  # matrices in groups of 32 and 64, and some that stay floating point
QKV = [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"]
GATE_UP = [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up")]
NORM = "model.norm.weight"

Tensors = dict[str, NDArray[Any]]


def write_source(
    directory: Path, tensors: Tensors | None = None, config: dict[str, Any] | None = None, name: str = NAME
) -> Path:
    """An HF directory of a tiny model, which a test may spoil."""
    directory.mkdir()
    save_file(tiny_models.weights(name) if tensors is None else tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config or tiny_models.hf_config(name)))
    (directory / "tokenizer.json").write_bytes(letters())
    return directory


def convert_to(source: Path, out: Path, target: Target = Target(), **options: Any) -> Summary:  # noqa: B008 (frozen)
    with open_source(source) as opened:
        return convert(opened, out, target, **options)


def refusal(action: Callable[[], Any]) -> str:
    """The one line that an action is refused with."""
    with pytest.raises(NumbaInferError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)
