"""What a model is, and what it needs on a machine."""

from __future__ import annotations

from typing import Any

from numbainfer.checkpoint import Weights
from numbainfer.config import ModelConfig
from numbainfer.console import size
from numbainfer.converters.convert import stored_bytes
from numbainfer.converters.source_options import SourceOptions
from numbainfer.converters.source_reader import SourceWeights
from numbainfer.loading import context_size, open_model
from numbainfer.machine import memory_bytes
from numbainfer.quantization import QuantizedMatrix
from numbainfer.specs import Parameter, active_parameter_count, parameter_count, parameter_groups


def model(path: str, ctx_size: int | None, options: SourceOptions) -> dict[str, Any]:
    """All facts, as `info MODEL -o json` prints them. Sizes in bytes."""
    from numbainfer.cpu.isa import detect

    opened = open_model(path, source_options=options, require_tokenizer=False)
    weights, config = opened.weights, opened.weights.config
    positions = context_size(weights, ctx_size)
    parts: dict[str, dict[str, Any]] = {}
    for group in parameter_groups(config):
        kind, nbytes = _stored(weights, group)
        part = parts.setdefault(_part(group[0]), {"parameters": 0, "bytes": 0, "stored": []})
        part["parameters"] += sum(p.size for p in group)
        part["bytes"] += nbytes
        if kind not in part["stored"]:
            part["stored"].append(kind)
    always_float = ("norms and biases", "routers")
    matrices = sorted({kind for name, part in parts.items() if name not in always_float for kind in part["stored"]})
    per_token = 2 * (4 if matrices == ["float32"] else 2) * config.layers * config.kv_heads * config.head_dim
    total = sum(part["bytes"] for part in parts.values())
    cache, workspace = per_token * -(-positions // 64) * 64, workspace_bytes(config, positions)
    return {
        "model": opened.name,
        "architecture": config.architecture,
        "parameters": parameter_count(config),
        "active_parameters": active_parameter_count(config),
        "experts": config.experts.count if config.experts else 0,
        "experts_per_token": config.experts.per_token if config.experts else 0,
        "layers": config.layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "tied_embeddings": config.tied_embeddings,
        "max_positions": config.max_positions,
        "weights": matrices,
        "weight_bytes": total,
        "parts": parts,
        "ctx_size": positions,
        "kv_cache_bytes_per_token": per_token,
        "kv_cache_bytes": cache,
        "workspace_bytes": workspace,
        "memory_bytes": total + cache + workspace,
        "kernels": detect().name,
    }


def as_text(facts: dict[str, Any]) -> dict[str, str]:
    """The same for people: name -> value."""
    tied = ", tied output head" if facts["tied_embeddings"] else ""
    active = f", {facts['active_parameters']:,} active for a token" if facts["experts"] else ""
    lines = {
        "model": facts["model"],
        "architecture": facts["architecture"],
        "parameters": f"{facts['parameters']:,}{active}",
        "layers": f"{facts['layers']}, hidden {facts['hidden_size']}, mlp {facts['intermediate_size']}",
        "attention": f"{facts['heads']} heads, {facts['kv_heads']} key/value heads of {facts['head_dim']}",
        "vocabulary": f"{facts['vocab_size']:,}{tied}",
        "context": f"{facts['max_positions']:,}",
        "kernels": facts["kernels"],
        "weights": f"{size(facts['weight_bytes'])}, {', '.join(facts['weights'])}",
    }
    if facts["experts"]:
        lines["experts"] = f"{facts['experts']}, of which {facts['experts_per_token']} for a token"
    for name, part in facts["parts"].items():
        count = f"{part['parameters']:,}"
        lines[f"  {name}"] = f"{size(part['bytes']):>9}  {count:>15} parameters, {', '.join(part['stored'])}"
    at = f"{facts['ctx_size']:,}"
    lines[f"kv cache at {at}"] = f"{size(facts['kv_cache_bytes'])}, {size(facts['kv_cache_bytes_per_token'])} a token"
    lines["workspace"] = f"about {size(facts['workspace_bytes'])}"
    here, needed = memory_bytes(), facts["memory_bytes"]
    lines["memory"] = f"about {size(needed)}" + (f" of this machine's {size(here)}" if here else "")
    if here and needed > here:
        lines["memory"] += ": more than it has; lower --ctx-size or take a smaller model"
    return lines


def workspace_bytes(config: ModelConfig, ctx_size: int) -> int:
    """About what a step needs besides weights and cache: activations of a chunk, RoPE's tables, logits."""
    tokens = min(512, ctx_size)  # the CPU's chunk
    heads = config.heads * config.head_dim
    qkv, inner, hidden = heads + 2 * config.kv_heads * config.head_dim, config.intermediate_size, config.hidden_size
    floats = hidden + qkv + 2 * inner  # x, qkv, gate and up, in float32; what matrices take in, as two int8 planes
    inputs = 2 * hidden + heads + inner
    if experts := config.experts:
        k, shared = experts.per_token, experts.shared_size
        floats += hidden + k * (hidden + 2 * experts.size) + (hidden + 2 * shared if shared else 0)
        inputs += k * experts.size + shared
    return tokens * (4 * floats + 2 * inputs) + 4 * (ctx_size * config.head_dim + config.vocab_size)


def _part(parameter: Parameter) -> str:
    """The part of the model that a parameter belongs to."""
    name = parameter.name
    if not parameter.is_matrix:
        return "norms and biases"
    if parameter.exact:
        return "routers"
    if name.startswith("lm_head"):
        return "output head"
    if ".mlp.experts." in name:
        return "experts"
    return "attention" if "self_attn" in name else "mlp" if ".mlp." in name else "embedding"


def _stored(weights: Weights, group: list[Parameter]) -> tuple[str, int]:
    """How the parameters of a group are stored, and their bytes."""
    if not group[0].is_matrix:
        return "float32", sum(p.shape[0] for p in group) * 4
    if isinstance(weights, SourceWeights):  # said by the shapes: quantizing it all would take as long as converting
        groups = weights.target.group(group[0].shape[1])
        if group[0].exact:
            return "float32", stored_bytes(group, weights.target)
        kind = weights.target.float_dtype if groups is None else f"int8 (group {groups})"
        return kind, stored_bytes(group, weights.target)
    matrix = weights.matrix([p.name for p in group])
    if isinstance(matrix, QuantizedMatrix):
        return f"int8 (group {matrix.group})", matrix.nbytes
    return str(matrix.data.dtype).replace("uint16", "bfloat16"), matrix.nbytes
