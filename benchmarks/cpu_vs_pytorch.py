"""numbainfer beside PyTorch and transformers on the same cores: same shape, random weights, int8 here, bfloat16 there.

pip install ".[reference]"
python benchmarks/cpu_vs_pytorch.py --model llama-3.2-1b
"""

from __future__ import annotations

from typing import Any

import torch
from compare import arguments, compare
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Qwen2Config, Qwen3Config

from numbainfer.random_weights import RANDOM

_CONFIGS: dict[str, Any] = {
    "LlamaForCausalLM": LlamaConfig,
    "Qwen2ForCausalLM": Qwen2Config,
    "Qwen3ForCausalLM": Qwen3Config,
}


class PyTorch:
    """A transformers model in bfloat16."""

    def __init__(self, architecture: str, threads: int) -> None:
        torch.set_num_threads(threads)
        shape = dict(RANDOM[architecture])
        config = _CONFIGS[shape.pop("architectures")[0]](**shape)
        self._model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        self._cache = DynamicCache()

    def reset(self, depth: int) -> None:
        """Leaves `depth` tokens in the cache."""
        self._cache.crop(depth)
        if depth == 0:
            self._cache = DynamicCache()
        missing = depth - self._cache.get_seq_length()
        if missing > 0:
            self.prefill(missing)

    @torch.inference_mode()
    def prefill(self, count: int) -> None:
        """Appends `count` tokens at once."""
        tokens = torch.randint(0, self._model.config.vocab_size, (1, count))
        self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def decode(self, count: int) -> None:
        """Appends `count` tokens one by one."""
        for _ in range(count):
            self.prefill(1)


def main() -> None:
    options = arguments(__doc__ or "")
    compare("PyTorch bf16", PyTorch(options.model, options.threads), options)


if __name__ == "__main__":
    main()
