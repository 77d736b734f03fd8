"""Every operator in naive float64 NumPy: what both devices' kernels are held against.

Written to be read and believed, not to be fast: the formula stands in the docstring, the code says it again.
Every function takes plain arrays, computes in float64 and returns new arrays. T is the number of tokens of a
step, which belong to B sequences. tests/test_reference.py proves the reference itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tiny_models
from numpy.typing import ArrayLike, NDArray

Float = NDArray[np.float64]


def _f64(x: ArrayLike) -> Float:
    return np.asarray(x, np.float64)


def embedding(ids: ArrayLike, table: ArrayLike) -> Float:
    """out[t] = table[ids[t]]. ids [T], table [vocab, hidden] -> [T, hidden]."""
    return _f64(table)[np.asarray(ids)]


def rmsnorm(x: ArrayLike, weight: ArrayLike, eps: float) -> Float:
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis. x [..., n], weight [n] -> [..., n].

    Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4; eps inside the root as LLaMA has it.
    """
    x = _f64(x)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * _f64(weight)


def linear(x: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None, residual: ArrayLike | None = None) -> Float:
    """residual + x W^T + bias. x [T, in], weight [out, in], bias [out], residual [T, out] -> [T, out].

    An int8 kernel is held against linear(dequantize(x), dequantize(W)), both from quantize_groups.
    """
    out = _f64(x) @ _f64(weight).T
    if bias is not None:
        out = out + _f64(bias)
    if residual is not None:
        out = out + _f64(residual)
    return out


def quantize_groups(x: ArrayLike, group: int) -> tuple[NDArray[np.int8], Float]:
    """Symmetric int8, a scale for each `group` neighbours in a row: s = max|x| / 127, q = round(x / s).

    x [rows, in] -> q int8 [rows, in], s [rows, in / group]. Ties round to even; a group of zeros has s = 0
    and q = 0.
    """
    x = _f64(x)
    rows, width = x.shape
    groups = x.reshape(rows, width // group, group)
    scales = np.abs(groups).max(axis=-1) / 127.0
    divisor = np.where(scales == 0.0, 1.0, scales)
    q = np.rint(groups / divisor[..., None])
    return q.reshape(rows, width).astype(np.int8), scales


def activation_scales(x: ArrayLike, group: int, planes: int) -> Float:
    """The scale of each group of activations: see registry.quantize. Squares are float32: some overflow."""
    x = np.asarray(x, np.float64)
    largest = np.abs(x.reshape(len(x), -1, group)).max(axis=-1)
    if planes == 2:
        return largest / 32512
    with np.errstate(over="ignore"):
        squares = np.square(x.astype(np.float32)).astype(np.float64)
    limit = 4 * np.sqrt(squares.mean(axis=-1, keepdims=True))
    return np.maximum(np.minimum(largest, limit) / 127, largest / 32512)


def dequantize(q: ArrayLike, scales: ArrayLike) -> Float:
    """q * s, each scale over its group. q int8 [rows, in], scales [rows, in / group] -> [rows, in]."""
    q, scales = _f64(q), _f64(scales)
    return q * np.repeat(scales, q.shape[1] // scales.shape[1], axis=1)


def rope_inv_freq(head_dim: int, theta: float) -> Float:
    """theta^(-2i / d) for i = 0 .. d/2 - 1, in radians a position. -> [d / 2].

    Su et al. 2021, "RoFormer", section 3.2.2, where theta is 10000.
    """
    return theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def llama3_inv_freq(
    inv_freq: ArrayLike, factor: float, low_freq_factor: float, high_freq_factor: float, original_context: int
) -> Float:
    """LLaMA 3.1's RoPE scaling ("llama3"): long wavelengths are stretched by `factor`, short ones kept.

    With wavelength w = 2 pi / f and original context L: f if w < L / high; f / factor if w > L / low; between
    them the mix (1 - a) f / factor + a f with a = (L / w - low) / (high - low). [d / 2] -> [d / 2].
    No paper gives the formula; it is that of LLaMA 3.1's released code.
    """
    out = []
    for f in _f64(inv_freq):
        turns = original_context * f / (2 * np.pi)  # over the original context
        if turns > high_freq_factor:
            out.append(f)
        elif turns < low_freq_factor:
            out.append(f / factor)
        else:
            keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
            out.append((1 - keep) * f / factor + keep * f)
    return _f64(out)


def yarn_inv_freq(
    head_dim: int,
    theta: float,
    factor: float,
    original_context: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
) -> Float:
    """YaRN: frequencies that turn often over the original context are kept, those that turn seldom are divided by
    `factor`, between them a ramp that is linear in the pair's number. -> [d / 2].

    Peng et al. 2023, "YaRN", section 3.2; the ramp's ends are where a pair turns beta_fast and beta_slow times, as in
    its authors' code rounded outwards where `truncate` says so.
    """
    base = rope_inv_freq(head_dim, theta)

    def pair(turns: float) -> float:  # solves original_context * theta^(-2 i / d) = 2 pi turns for i
        return head_dim / 2 * np.log(original_context / (2 * np.pi * turns)) / np.log(theta)

    start, end = pair(beta_fast), pair(beta_slow)
    if truncate:
        start, end = np.floor(start), np.ceil(end)
    start, end = max(start, 0), min(end, head_dim - 1)
    divided = np.clip((np.arange(head_dim // 2) - start) / (end - start), 0, 1)
    return base * (1 - divided) + base / factor * divided


def dynamic_inv_freq(head_dim: int, theta: float, factor: float, original_context: int, length: int) -> Float:
    """ "Dynamic NTK": theta grows so that the longest wavelength is stretched by factor L / L0 - (factor - 1) for a
    length L above the original L0, and the shortest is kept. -> [d / 2]. bloc97 and emozilla 2023, no paper."""
    stretch = factor * max(length, original_context) / original_context - (factor - 1)
    return rope_inv_freq(head_dim, theta * stretch ** (head_dim / (head_dim - 2)))


def rope_of(config: Mapping[str, Any], length: int) -> tuple[Float, float]:
    """What tiny_models' config says of RoPE for a text of that length: frequencies, and the factor of cos and sin."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    head_dim = int(head_dim * config.get("partial_rotary_factor", 1))
    theta, scaling = config["rope_theta"], config.get("rope_scaling") or {"rope_type": "default"}
    base, kind = rope_inv_freq(head_dim, theta), scaling["rope_type"]
    if kind == "linear":
        return base / scaling["factor"], 1.0
    if kind == "dynamic":
        return dynamic_inv_freq(head_dim, theta, scaling["factor"], config["max_position_embeddings"], length), 1.0
    if kind == "llama3":
        values = {key: value for key, value in scaling.items() if key != "rope_type"}
        return llama3_inv_freq(base, original_context=values.pop("original_max_position_embeddings"), **values), 1.0
    if kind == "yarn":
        ends = scaling.get("beta_fast", 32.0), scaling.get("beta_slow", 1.0), scaling.get("truncate", True)
        factor = scaling["factor"]
        frequencies = yarn_inv_freq(head_dim, theta, factor, scaling["original_max_position_embeddings"], *ends)
        # eq. 22; DeepSeek's two weights of the logarithm make it a quotient
        terms = [0.1 * scaling.get(key, n) * np.log(factor) + 1 for key, n in (("mscale", 1), ("mscale_all_dim", 0))]
        return frequencies, scaling.get("attention_factor", terms[0] / terms[1])
    return base, 1.0


def rope(x: ArrayLike, positions: ArrayLike, inv_freq: ArrayLike) -> Float:
    """Rotate each pair (x[i], x[i + d/2]) of each head by the angle position * inv_freq[i].

    x [T, heads, d], positions [T], inv_freq [d / 2] -> [T, heads, d]. Su et al. 2021, section 3.4.2, eq. 34,
    with the pairs as Hugging Face lays them out (half-split), where the paper pairs neighbours (interleaved).
    """
    x = _f64(x)
    angle = np.einsum("t,i->ti", _f64(positions), _f64(inv_freq))[:, None, :]  # the same for every head
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(x: ArrayLike) -> Float:
    """exp(x - max) / sum(exp(x - max)) over the last axis; -inf gives 0. [..., n] -> [..., n]."""
    x = _f64(x)
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention(
    q: ArrayLike,
    keys: Sequence[ArrayLike],
    values: Sequence[ArrayLike],
    sequences: ArrayLike,
    positions: ArrayLike,
    *,
    scale: float | None = None,
    window: int = 0,
) -> Float:
    """Causal attention of T tokens, each over its own sequence: softmax(scale * q K^T) V.

    q [T, heads, d]; keys[b] and values[b] [length of sequence b, kv_heads, d], row p belonging to position p,
    the step's own tokens included; sequences [T] says which b a token belongs to, positions [T] where it
    stands: it sees positions 0 .. its own, of these the last `window` if that is not 0. scale is 1 / sqrt(d)
    unless given. -> [T, heads, d].
    Vaswani et al. 2017, "Attention Is All You Need", eq. 1. Head h reads kv head h // (heads / kv_heads):
    Ainslie et al. 2023, "GQA"; kv_heads = heads is MHA, kv_heads = 1 MQA (Shazeer 2019).
    """
    q = _f64(q)
    tokens, heads, d = q.shape
    scale = 1.0 / np.sqrt(d) if scale is None else scale
    out = np.empty_like(q)
    for t in range(tokens):
        sequence, seen = np.asarray(sequences)[t], np.asarray(positions)[t] + 1
        first = max(0, seen - window) if window else 0
        k, v = _f64(keys[sequence])[first:seen], _f64(values[sequence])[first:seen]
        for h in range(heads):
            kv_head = h // (heads // k.shape[1])
            scores = scale * (k[:, kv_head] @ q[t, h])
            out[t, h] = softmax(scores) @ v[:, kv_head]
    return out


def swiglu(gate: ArrayLike, up: ArrayLike) -> Float:
    """silu(gate) * up with silu(x) = x / (1 + exp(-x)). Both [T, n] -> [T, n].

    Shazeer 2020, "GLU Variants Improve Transformer", eq. 6: what stands between its matrices.
    """
    gate = _f64(gate)
    # exp(-|x|) never overflows; both branches are the logistic function
    e = np.exp(-np.abs(gate))
    return gate * np.where(gate >= 0, 1.0, e) / (1.0 + e) * _f64(up)


def add(x: ArrayLike, y: ArrayLike) -> Float:
    """x + y, same shapes: the residual connection of He et al. 2016, "Deep Residual Learning", eq. 1."""
    return _f64(x) + _f64(y)


def argmax(x: ArrayLike) -> NDArray[np.int64]:
    """Index of the largest value of each row, the lowest index on a tie. [T, n] -> [T]."""
    return np.argmax(_f64(x), axis=-1)


def top_k(x: ArrayLike, k: int) -> tuple[Float, NDArray[np.int64]]:
    """Each row's k largest values, falling, and their indices, of equals the lower first. Both [T, k]."""
    x = _f64(x)
    order = np.argsort(-x, axis=-1, kind="stable")[:, :k]
    return np.take_along_axis(x, order, axis=-1), order


def route(logits: ArrayLike, k: int, renormalise: bool) -> tuple[NDArray[np.int64], Float]:
    """Each token's k most probable experts, of equals the lower first, and their probabilities, with `renormalise`
    divided by their sum. logits [T, E] -> [T, k], [T, k].

    Shazeer et al. 2017, "Outrageously Large Neural Networks", section 2.1, without the noise.
    """
    weights, experts = top_k(softmax(logits), k)
    return experts, weights / weights.sum(axis=-1, keepdims=True) if renormalise else weights


def mixture(x: ArrayLike, experts: NDArray[np.int64], weights: ArrayLike, gate_up: ArrayLike, down: ArrayLike) -> Float:
    """sum over j of weights[t, j] * E(x[t]), E the SwiGLU MLP of expert experts[t, j].

    x [T, D]; experts, weights [T, k]; gate_up [E, 2 F, D], gate first; down [E, D, F] -> [T, D].
    """
    x, weights, gate_up, down = _f64(x), _f64(weights), _f64(gate_up), _f64(down)
    out = np.zeros_like(x)
    for t, chosen in enumerate(experts):
        for e, weight in zip(chosen, weights[t], strict=True):
            gate, up = np.split(gate_up[e] @ x[t], 2)
            out[t] += weight * (down[e] @ swiglu(gate, up))
    return out


def sigmoid(x: ArrayLike) -> Float:
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + np.exp(-_f64(x)))


def stacked_experts(weights: Mapping[str, ArrayLike], prefix: str, count: int) -> tuple[Float, Float]:
    """gate_up [E, 2 F, D] and down [E, D, F] of all experts."""

    def stack(name: str) -> Float:
        return np.stack([_f64(weights[f"{prefix}.{e}.{name}.weight"]) for e in range(count)])

    return np.concatenate([stack("gate_proj"), stack("up_proj")], axis=1), stack("down_proj")


def decoder(config: Mapping[str, Any], weights: Mapping[str, ArrayLike], ids: ArrayLike) -> Float:
    """Logits of a whole model over one sequence, from tiny_models' config and tensors.

    ids [T] -> [T, vocab]. Biases, qk-norms, experts and shared experts apply where their tensors exist.
    """
    ids = np.asarray(ids)
    positions, one_sequence = np.arange(len(ids)), np.zeros(len(ids), np.int64)
    heads, kv_heads, eps = (
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["rms_norm_eps"],
    )
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    inv_freq, factor = rope_of(config, len(ids))
    rotary = 2 * len(inv_freq)
    windows, rotated = tiny_models.windows(config), tiny_models.rotated(config)

    def rotate(x: Float) -> Float:
        return np.concatenate([factor * rope(x[..., :rotary], positions, inv_freq), x[..., rotary:]], axis=-1)

    def apply(prefix: str, x: Float, residual: Float | None = None) -> Float:
        return linear(x, weights[f"{prefix}.weight"], weights.get(f"{prefix}.bias"), residual)

    def mlp(prefix: str, x: Float) -> Float:
        return apply(f"{prefix}.down_proj", swiglu(apply(f"{prefix}.gate_proj", x), apply(f"{prefix}.up_proj", x)))

    x = embedding(ids, weights["model.embed_tokens.weight"])
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        normed = rmsnorm(x, weights[f"{at}.input_layernorm.weight"], eps)
        q = apply(f"{at}.self_attn.q_proj", normed).reshape(-1, heads, head_dim)
        k = apply(f"{at}.self_attn.k_proj", normed).reshape(-1, kv_heads, head_dim)
        v = apply(f"{at}.self_attn.v_proj", normed).reshape(-1, kv_heads, head_dim)
        if f"{at}.self_attn.q_norm.weight" in weights:
            q = rmsnorm(q, weights[f"{at}.self_attn.q_norm.weight"], eps)
            k = rmsnorm(k, weights[f"{at}.self_attn.k_norm.weight"], eps)
        if rotated[layer]:
            q, k = rotate(q), rotate(k)
        mixed = attention(q, [k], [v], one_sequence, positions, window=windows[layer])
        x = apply(f"{at}.self_attn.o_proj", mixed.reshape(len(ids), heads * head_dim), x)
        normed = rmsnorm(x, weights[f"{at}.post_attention_layernorm.weight"], eps)
        if f"{at}.mlp.gate.weight" not in weights:
            x = x + mlp(f"{at}.mlp", normed)
            continue
        logits = apply(f"{at}.mlp.gate", normed)
        chosen, shares = route(logits, config["num_experts_per_tok"], config["norm_topk_prob"])
        x = x + mixture(normed, chosen, shares, *stacked_experts(weights, f"{at}.mlp.experts", config["num_experts"]))
        if f"{at}.mlp.shared_expert_gate.weight" in weights:
            x = x + sigmoid(apply(f"{at}.mlp.shared_expert_gate", normed)) * mlp(f"{at}.mlp.shared_expert", normed)
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return linear(rmsnorm(x, weights["model.norm.weight"], eps), weights[head])
