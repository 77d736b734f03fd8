"""What a model is and needs, and what the machine is."""

from __future__ import annotations

import platform

import numpy as np

from numbainfer._version import __version__
from numbainfer.checkpoint import Weights
from numbainfer.console import size
from numbainfer.converters.convert import SourceWeights, stored_bytes
from numbainfer.device import cpu_name, physical_cores
from numbainfer.loading import cache_directory, context_size, open_model
from numbainfer.quantization import QuantizedMatrix
from numbainfer.specs import Parameter, parameter_count, parameter_groups


def machine() -> dict[str, str]:
    """The CPU and which kernels run on it, versions, the cache directory."""
    import llvmlite
    import numba

    from numbainfer.cpu.compile import cache_directory as kernels
    from numbainfer.cpu.isa import detect

    compiled = list(kernels().glob("*")) if kernels().exists() else []
    return {
        "numbainfer": __version__,
        "python": platform.python_version(),
        "numba": f"{numba.__version__} (llvmlite {llvmlite.__version__}), numpy {np.__version__}",
        "cpu": f"{cpu_name()}, {physical_cores()} physical cores",
        "int8 kernels": detect().name,
        "gpu": "not supported by this version",
        "cache": str(cache_directory()),
        "compiled kernels": f"{len(compiled)} in {kernels()}",
    }


def model(path: str, ctx_size: int | None, tokenizer: str | None) -> dict[str, str]:
    """Architecture, parameters and bytes by part, memory at a context."""
    opened = open_model(path, tokenizer=tokenizer, require_tokenizer=False)
    weights, config = opened.weights, opened.weights.config
    positions = context_size(weights, ctx_size)
    parts = {"embedding": 0, "attention": 0, "mlp": 0, "norms and biases": 0, "output head": 0}
    kinds: set[str] = set()
    for group in parameter_groups(config):
        name = group[0].name
        if not group[0].is_matrix:
            parts["norms and biases"] += sum(p.shape[0] for p in group) * 4
            continue
        kind, nbytes = _stored(weights, group)
        kinds.add(kind)
        part = "attention" if "self_attn" in name else "mlp" if ".mlp." in name else "embedding"
        parts["output head" if name.startswith("lm_head") else part] += nbytes
    kv_item = 4 if kinds == {"float32"} else 2
    cache = 2 * kv_item * config.layers * config.kv_heads * config.head_dim * positions
    total = sum(parts.values())
    facts = {
        "model": opened.name,
        "architecture": config.architecture,
        "parameters": f"{parameter_count(config):,}",
        "layers": f"{config.layers}, hidden {config.hidden_size}, mlp {config.intermediate_size}",
        "attention": f"{config.heads} heads, {config.kv_heads} key/value heads of {config.head_dim}",
        "vocabulary": f"{config.vocab_size:,}{', tied output head' if config.tied_embeddings else ''}",
        "context": f"{config.max_positions:,}",
        "weights": f"{size(total)}, {', '.join(sorted(kinds))}",
    }
    facts |= {f"  {name}": size(nbytes) for name, nbytes in parts.items() if nbytes}
    facts[f"kv cache at {positions:,}"] = size(cache)
    facts["memory"] = f"about {size(total + cache)}"
    return facts


def _stored(weights: Weights, group: list[Parameter]) -> tuple[str, int]:
    """How the matrices of a group are stored, and their bytes."""
    if isinstance(weights, SourceWeights):  # said by the shapes: quantizing it all would take as long as converting
        groups = weights.target.group(group[0].shape[1])
        kind = weights.target.float_dtype if groups is None else f"int8 (group {groups})"
        return kind, stored_bytes(group, weights.target)
    matrix = weights.matrix([p.name for p in group])
    if isinstance(matrix, QuantizedMatrix):
        return f"int8 (group {matrix.group})", matrix.nbytes
    return str(matrix.data.dtype).replace("uint16", "bfloat16"), matrix.nbytes
