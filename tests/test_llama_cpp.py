"""Real GGUFs beside llama.cpp: the same token ids, and a text's perplexity within 1%.

llama-cpp-python is no dependency: where it is not installed, or no real models are there, these are skipped.
"""

from __future__ import annotations

import math
import unicodedata
from typing import Any

import numpy as np
import pytest
from building import DATA
from tiny_tokenizers import TEXTS, needs_real_files, real_file

from numbainfer.loading import load
from numbainfer.perplexity import perplexity

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is built from source, which CI does not do")

CONTEXT = 256
TEXT = (DATA / "story_text.txt").read_text(encoding="utf-8")


def llama_cpp_perplexity(llama: Any, tokens: list[int]) -> float:
    """As its own tool has it: chunks of CONTEXT, each scored on its second half."""
    total, scored = 0.0, 0
    for start in range(0, len(tokens) - CONTEXT + 1, CONTEXT):
        part = tokens[start : start + CONTEXT]
        llama.reset()
        llama.eval(part)
        for i in range(CONTEXT // 2, CONTEXT - 1):
            logits = llama.scores[i].astype(np.float64)
            total += math.log(np.exp(logits - logits.max()).sum()) - (logits[part[i + 1]] - logits.max())
            scored += 1
    return math.exp(total / scored)


@needs_real_files
@pytest.mark.parametrize("name", ["smollm2-135m-instruct.gguf", "qwen2.5-coder-0.5b-instruct.gguf"])
def test_real_models(name: str) -> None:
    path = real_file(name)
    ours = load(path, ctx_size=CONTEXT, chunk=128).engine
    llama = llama_cpp.Llama(str(path), n_ctx=CONTEXT, n_batch=CONTEXT, logits_all=True, verbose=False)
    for text in (TEXT, *TEXTS):
        # llama.cpp takes C strings, and does not compose characters as Qwen's own tokenizer does
        if "\x00" not in text and unicodedata.is_normalized("NFC", text):
            assert ours.tokenizer.encode(text, bos=False) == llama.tokenize(text.encode(), add_bos=False, special=True)
    text = TEXT[:3000]
    tokens = ours.tokenizer.encode(text, bos=False)
    assert not ours.tokenizer.add_bos
    assert perplexity(ours, text, CONTEXT).perplexity == pytest.approx(llama_cpp_perplexity(llama, tokens), rel=0.01)
