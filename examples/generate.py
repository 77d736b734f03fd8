"""Continues several prompts at once.

python examples/generate.py                                      the demo model, prompts of its own
python examples/generate.py ./qwen "Once upon a time" "The sea"
"""

import sys

from numbainfer import LLM, SamplingParams

model, *prompts = sys.argv[1:] or [None]
prompts = prompts or ["Once upon a time", "The best way to cook rice is", "In the year 2100", "def fibonacci(n):"]

with LLM(model, ctx_size=256, batch_size=len(prompts)) as llm:
    # A seed each, so that equal prompts give different texts, and the same ones tomorrow.
    params = [SamplingParams(temperature=0.8, top_p=0.95, max_tokens=40, seed=seed) for seed in range(len(prompts))]
    for prompt, generation in zip(prompts, llm.generate(prompts, params), strict=True):
        print(f"--- {prompt}{generation.text}")
        print(f"    ({len(generation.tokens)} tokens, {generation.finish_reason})")
