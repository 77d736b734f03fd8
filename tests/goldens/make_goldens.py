"""Make the goldens: what Hugging Face transformers computes, in float32, for the models of tiny_models.py.

    pip install ".[reference]"
    python tests/goldens/make_goldens.py            # writes tests/goldens/NAME.npz
    python tests/goldens/make_goldens.py --check    # makes them again and compares, writes nothing

Arrays of an .npz file:
    prompt         int64 [64]            random token ids
    logits         float32 [64, vocab]   one forward pass over the prompt
    greedy         int64 [64]            the tokens that follow prompt[:8] greedily
    greedy_margin  float64               smallest gap between the best and the second logit on that way
    greedy_largest float64               largest |logit| on that way
    prompt_seed    int64                 seed of the prompt: the first that leaves no near-tie
    weights_sum    float64               sum of |weight|: tells a changed generator from a wrong engine
    made_with      str                   versions, as JSON
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tiny_models

TOKENS = 64
GREEDY_PROMPT = 8
# Below this share of the largest |logit| a correct engine's rounding could pick the other token.
SMALLEST_MARGIN = 1e-3
# A sequence stuck in a short loop would test little.
FEWEST_DISTINCT = 12
# float32 noise must stay far under the 1e-4 that the tests allow the engine.
LARGEST_NOISE = 1e-5


# Smallest gap between the last expert chosen and the first not chosen, in router logits: below, rounding could swap
# them. Equals are no gap: the lower is chosen.
SMALLEST_ROUTING_GAP = 1e-4


def reference_config(name: str) -> Any:
    """The transformers config. Its LLaMA has no partial rotation; its GLM 4.5 with no layer sparse is LLaMA with it."""
    config = dict(tiny_models.CONFIGS[name])
    if "partial_rotary_factor" in config:
        config.pop("rope_scaling")
        config |= {"model_type": "glm4_moe", "first_k_dense_replace": config["num_hidden_layers"]}
        config |= {"head_dim": tiny_models.head_dim(config), "use_qk_norm": False}
    return transformers.AutoConfig.for_model(**config)


def fused(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors as transformers 5 has them in memory: all experts of a layer in one."""
    out, experts = {}, {}
    for name, value in weights.items():
        if ".experts." not in name:
            out[name] = value
            continue
        prefix, rest = name.split(".experts.")
        number, part, _ = rest.split(".")
        experts.setdefault(prefix, {}).setdefault(int(number), {})[part] = value
    for prefix, parts in experts.items():
        each = [parts[number] for number in sorted(parts)]
        up = [np.concatenate([part["gate_proj"], part["up_proj"]]) for part in each]
        out[f"{prefix}.experts.gate_up_proj"] = np.stack(up)
        out[f"{prefix}.experts.down_proj"] = np.stack([part["down_proj"] for part in each])
    return out


def lowest_first(probabilities: torch.Tensor, k: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.topk, which leaves open which of equals it takes, with the lower first."""
    values, indices = torch.sort(probabilities, dim=dim, descending=True, stable=True)
    return values[..., :k], indices[..., :k]


def build(name: str, dtype: torch.dtype) -> Any:
    """The transformers model with the weights of tiny_models, eager attention, in eval mode."""
    config = reference_config(name)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    state = {tensor: torch.from_numpy(value) for tensor, value in fused(tiny_models.weights(name)).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    if missing != tied or unexpected:
        raise RuntimeError(f"{name}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval()


def forget_lengths(model: Any) -> None:
    """RoPE that depends on the length stays with the longest that the model has seen; a new text starts afresh."""
    rope = model.model.rotary_emb
    rope.max_seq_len_cached = rope.original_max_seq_len
    rope.inv_freq = rope.original_inv_freq


def forward(model: Any, ids: list[int]) -> np.ndarray:
    forget_lengths(model)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()


def is_dynamic(model: Any) -> bool:
    """Whether RoPE depends on the length: then keys keep the rotation that they were stored with, and only a pass with
    a cache tells what generation gives."""
    return model.config.rope_parameters["rope_type"] == "dynamic"


def continue_greedily(model: Any, prompt: list[int]) -> tuple[list[int], float, float]:
    """64 greedy tokens by a full pass for each, the smallest top-2 gap, and the largest |logit|."""
    ids, margin, largest = list(prompt), np.inf, 0.0
    forget_lengths(model)
    cache = transformers.DynamicCache() if is_dynamic(model) else None
    for _ in range(TOKENS):
        if cache is None:
            logits = forward(model, ids)[-1]
        else:
            with torch.no_grad():
                new = torch.tensor([ids[cache.get_seq_length() :]])
                logits = model(input_ids=new, past_key_values=cache, use_cache=True).logits[0, -1].numpy()
        second, first = np.sort(logits)[-2:]
        margin = min(margin, float(first) - float(second))
        largest = max(largest, float(np.abs(logits).max()))
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :], margin, largest


def attention_entropy(model: Any, ids: list[int]) -> float:
    """Mean entropy of the last 32 positions' attention as a share of uniform attention's: 1 is uniform."""
    with torch.no_grad():
        maps = model(input_ids=torch.tensor([ids]), use_cache=False, output_attentions=True).attentions
    share = []
    for attention in maps:
        p = attention[0].double().numpy()  # [heads, tokens, tokens]
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1)
        share.append((entropy / np.log(np.arange(1, len(ids) + 1) + 1e-9))[:, -32:].mean())
    return float(np.mean(share))


class RoutingGap:
    """Hears what routers choose, and keeps the smallest gap that decided."""

    def __init__(self, model: Any) -> None:
        self.smallest = np.inf
        for module in model.modules():
            if type(module).__name__.endswith("TopKRouter") and not type(module).__name__.startswith("Glm"):
                module.register_forward_hook(self.hear)

    def hear(self, module: Any, arguments: Any, result: Any) -> None:
        ordered = np.sort(result[0].detach().numpy(), axis=-1)[:, ::-1]
        gaps = ordered[:, module.top_k - 1] - ordered[:, module.top_k]
        self.smallest = min(self.smallest, gaps[gaps > 0].min(initial=np.inf))


def make(name: str) -> dict[str, np.ndarray]:
    torch.topk = lowest_first
    model = build(name, torch.float32)
    exact = build(name, torch.float64)
    vocab = tiny_models.CONFIGS[name]["vocab_size"]
    gap = RoutingGap(model)
    for seed in range(200):
        gap.smallest = np.inf
        rng = np.random.Generator(np.random.PCG64(seed))
        prompt = rng.integers(0, vocab, TOKENS).tolist()
        greedy, margin, largest = continue_greedily(model, prompt[:GREEDY_PROMPT])
        forward(model, prompt)
        if gap.smallest < SMALLEST_ROUTING_GAP:
            continue
        if margin >= SMALLEST_MARGIN * largest and len(set(greedy)) >= FEWEST_DISTINCT:
            break
    else:
        raise RuntimeError(f"{name}: every prompt leads to a near-tie or into a short loop")

    logits = forward(model, prompt)
    noise = float(np.abs(logits - forward(exact, prompt)).max() / np.abs(logits).max())
    if noise > LARGEST_NOISE:
        raise RuntimeError(f"{name}: float32 differs from float64 by {noise:.1e} of the largest logit")
    if continue_greedily(exact, prompt[:GREEDY_PROMPT])[0] != greedy:
        raise RuntimeError(f"{name}: float64 continues with other tokens than float32")
    print(
        f"{name:22} seed {seed:3}  noise {noise:.1e}  margin {margin / largest:.1e}  "
        f"distinct {len(set(greedy)):2}  "
        f"logits std {logits.std():.2f} max {np.abs(logits).max():.1f}  "
        f"attention entropy {attention_entropy(model, prompt):.2f} of uniform"
    )
    made_with = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    return {
        "prompt": np.array(prompt, np.int64),
        "logits": logits.astype(np.float32),
        "greedy": np.array(greedy, np.int64),
        "greedy_margin": np.float64(margin),
        "greedy_largest": np.float64(largest),
        "prompt_seed": np.int64(seed),
        "weights_sum": np.float64(sum(np.abs(w.astype(np.float64)).sum() for w in tiny_models.weights(name).values())),
        "made_with": np.array(json.dumps(made_with)),
    }


def check(name: str, made: dict[str, np.ndarray]) -> None:
    """Raise if the stored golden is not what was made now; logits may differ by another CPU's rounding."""
    stored = tiny_models.golden(name)
    if stored.keys() != made.keys():
        raise RuntimeError(f"{name}: the stored arrays are {sorted(stored)}")
    for exact in ("prompt", "greedy", "prompt_seed"):
        if not np.array_equal(stored[exact], made[exact]):
            raise RuntimeError(f"{name}: {exact} differs from the stored one")
    difference = float(np.abs(stored["logits"] - made["logits"]).max() / np.abs(made["logits"]).max())
    if difference > LARGEST_NOISE:
        raise RuntimeError(f"{name}: logits differ from the stored ones by {difference:.1e} of the largest")
    print(f"{name:22} as stored, logits to {difference:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the goldens of the tiny models with torch and transformers.")
    parser.add_argument("names", nargs="*", help="models to make (default: all)")
    parser.add_argument("--check", action="store_true", help="compare with the stored goldens instead of writing them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are too small to share
    for name in arguments.names or tiny_models.CONFIGS:
        made = make(name)
        if arguments.check:
            check(name, made)
        else:
            np.savez_compressed(tiny_models.GOLDENS / f"{name}.npz", **made)


if __name__ == "__main__":
    main()
