"""Small tokenizers, trained on the spot by the libraries themselves, and texts that are hard to cut."""

# ruff: noqa: RUF001 (these texts are meant to have all kinds of punctuation)

from __future__ import annotations

import io
import json
import os
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "Once upon a time, there was a little girl named Lily. She didn't like the rain.",
    "Zażółć gęślą jaźń. Příliš žluťoučký kůň. Où est le café naïve?",
    "你好，世界。今天天气很好，我们去公园玩。",
    "こんにちは世界。ありがとうございます。",
    "Привет, мир! Как дела сегодня?",
    "for i in range(100):\n    print(i, 3.14159, 'x' * 42)\n",
]

TEXTS = [
    "",
    " ",
    "Hello world",
    "  two  spaces \n\n and\ttabs\r\n ",
    "naïve café Zażółć 1234567 ٣٤ ½",
    "I'LL don't we'Ve THEY'RE",
    "你好，世界！これはテスト。안녕하세요",
    "🤖👩‍👩‍👧 🏳️‍🌈 e\u0301 cafe\u0301 \u212b",
    "العربية עברית हिन्दी ไทย",
    "\x00\x01\x7f \ufffd \u2581x ▁",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "x<think>y</think>z <tool_call>",
    "a" * 70,
]

QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_WORDS = QWEN_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

needs_real_files = pytest.mark.skipif(
    "NUMBAINFER_TEST_MODELS" not in os.environ, reason="NUMBAINFER_TEST_MODELS names a folder of real models"
)


def real_file(name: str) -> Path:
    """A file of the folder that the environment names; skips the test where it lacks that one."""
    path = Path(os.environ["NUMBAINFER_TEST_MODELS"]) / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


@lru_cache
def byte_level(pre: str) -> Tokenizer:
    """A byte-level BPE of 600 tokens built as the models named by a GGUF's `pre` have it."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    byte_pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("smollm", "gpt-2"))
    splitters: dict[str, list[Any]] = {
        "qwen2": [pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")],
        "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "gpt-2": [],
    }
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splitters[pre], byte_pieces])
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>")])
    if pre == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["<|im_start|>", "$A"], special_tokens=[("<|im_start|>", 1)]
        )
    return tokenizer


@lru_cache
def letters() -> bytes:
    """A tokenizer.json whose tokens are the 94 visible ASCII characters, for models with a vocabulary of 97 or more."""
    tokenizer = Tokenizer(models.BPE({chr(33 + index): index for index in range(94)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str().encode()


@lru_cache
def sentencepiece_model() -> bytes:
    """A sentencepiece BPE of 500 tokens with byte fallback, as LLaMA 2's is: <unk> 0, <s> 1, </s> 2."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3),
        model_writer=out,
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return out.getvalue()


def llama2c_file(model: bytes) -> bytes:
    """The tokenizer.bin that llama2.c exports from a sentencepiece model."""
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    texts = [library.id_to_piece(index).replace("\u2581", " ") for index in range(library.vocab_size())]
    texts[1:3] = ["\n<s>\n", "\n</s>\n"]
    pieces = [text.encode() for text in texts]
    tokens = (struct.pack("<fi", library.get_score(index), len(piece)) + piece for index, piece in enumerate(pieces))
    return struct.pack("<i", max(map(len, pieces))) + b"".join(tokens)


def gguf_metadata_of(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """What llama.cpp's converter writes for such a vocabulary, with three rows of padding."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    added = tokenizer.get_added_tokens_decoder()
    types = [(3 if added[index].special else 4) if index in added else 1 for _, index in vocabulary]
    merges = _merges(tokenizer)
    size = len(vocabulary)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [token for token, _ in vocabulary] + [f"[PAD{size + n}]" for n in range(3)],
        "tokenizer.ggml.token_type": [*types, 5, 5, 5],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }


def _merges(tokenizer: Tokenizer) -> list[str]:
    pairs = json.loads(tokenizer.to_str())["model"]["merges"]
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
