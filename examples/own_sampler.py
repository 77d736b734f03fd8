"""The engine in a loop of your own, with a sampler of your own: top-n-sigma (Tang et al. 2024).

Logits of tokens that make no sense look like Gaussian noise; those that do stand out of it. So this keeps the tokens
whose logit is within n standard deviations of the largest one, whatever the temperature.

    python examples/own_sampler.py              the demo model
    python examples/own_sampler.py ./qwen "Once upon a time"
"""

import sys

import numpy as np

from numbainfer import LLM

model, prompt = [*sys.argv[1:], None, None][:2]
prompt = prompt or "Once upon a time"


def top_n_sigma(logits: np.ndarray, n: float, temperature: float, random: np.random.Generator) -> int:
    """The next token, from logits [vocabulary]."""
    kept = np.flatnonzero(logits >= logits.max() - n * logits.std())
    weights = np.exp((logits[kept] - logits.max()) / temperature)
    return int(random.choice(kept, p=weights / weights.sum()))


with LLM(model, ctx_size=256, batch_size=1) as llm:
    engine, tokenizer, random = llm.engine, llm.engine.tokenizer, np.random.default_rng(0)
    decoder = tokenizer.stream(at_start=False)  # holds back bytes that are no whole character yet
    print(prompt, end="", flush=True)
    logits = engine.prefill(llm.tokenize(prompt))  # [1, vocabulary]
    for _ in range(60):
        token = top_n_sigma(logits[-1], n=1.0, temperature=1.5, random=random)
        if token in engine.eos_ids:
            break
        print(decoder.push(token), end="", flush=True)
        logits = engine.decode(token)
    print(decoder.flush())
