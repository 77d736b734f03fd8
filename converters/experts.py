"""Mixtures of experts whose tensors hold all experts of a layer, as tensors of one expert each."""

from __future__ import annotations

import re
from collections.abc import Mapping

from numbainfer.converters.source import Array, SourceTensor
from numbainfer.errors import NumbaInferError
from numbainfer.safetensors_file import shown

_MOST = 4096  # experts of a layer, as in config.py


def split_experts(tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """The tensors with those of all experts, [E, out, in], taken apart and named as checkpoints name them.

    ...mlp.experts.gate_up_proj [E, 2 F, D], as transformers 5 has it in memory, becomes ...experts.0.gate_proj.weight
    [F, D], ...experts.0.up_proj.weight and so on; ...experts.gate_proj, up_proj or down_proj, with ".weight" or
    without, becomes one for each expert. NumbaInferError where such a name has another shape.
    """
    out: dict[str, SourceTensor] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.+\.mlp\.experts)\.(gate_up|gate|up|down)_proj(\.weight)?", name)
        if match is None:
            out[name] = tensor
            continue
        prefix, part = match[1], match[2]
        fits = len(tensor.shape) == 3 and tensor.shape[0] <= _MOST and tensor.shape[1] % 2 in (0, part != "gate_up")
        if not fits:
            raise NumbaInferError(f"tensor {shown(name)} is {list(tensor.shape)}, not [experts, out, in]")
        names = ["gate", "up"] if part == "gate_up" else [part]
        rows = tensor.shape[1] // len(names)
        for expert in range(tensor.shape[0]):
            for i, kind in enumerate(names):
                single = f"{prefix}.{expert}.{kind}_proj.weight"
                out[single] = _expert(tensor, single, expert, i * rows, rows)
    return out


def _expert(tensor: SourceTensor, name: str, expert: int, first: int, rows: int) -> SourceTensor:
    """Rows first to first + rows of one expert."""

    def read(start: int, stop: int) -> Array:
        return tensor.rows(expert, expert + 1)[0][first + start : first + stop]

    return SourceTensor(name, (rows, tensor.shape[2]), tensor.dtype, read)
