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


def build(name: str, dtype: torch.dtype) -> Any:
    """The transformers model with the weights of tiny_models, eager attention, in eval mode."""
    config = transformers.AutoConfig.for_model(**tiny_models.CONFIGS[name])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    state = {tensor: torch.from_numpy(value) for tensor, value in tiny_models.weights(name).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    if missing != tied or unexpected:
        raise RuntimeError(f"{name}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval()


def forward(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()


def continue_greedily(model: Any, prompt: list[int]) -> tuple[list[int], float, float]:
    """64 greedy tokens by a full pass for each, the smallest top-2 gap, and the largest |logit|."""
    ids, margin, largest = list(prompt), np.inf, 0.0
    for _ in range(TOKENS):
        logits = forward(model, ids)[-1]
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


def make(name: str) -> dict[str, np.ndarray]:
    model = build(name, torch.float32)
    exact = build(name, torch.float64)
    vocab = tiny_models.CONFIGS[name]["vocab_size"]
    for seed in range(200):
        rng = np.random.Generator(np.random.PCG64(seed))
        prompt = rng.integers(0, vocab, TOKENS).tolist()
        greedy, margin, largest = continue_greedily(model, prompt[:GREEDY_PROMPT])
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
