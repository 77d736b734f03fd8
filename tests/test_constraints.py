"""Replies that must match a JSON schema, a regular expression or a grammar: held against Python's own parsers."""

from __future__ import annotations

import importlib.util
import json
import re
from typing import Any

import numpy as np
import pytest
from building import build_engine, stories260k
from command import STORIES, numbainfer
from tiny_tokenizers import byte_level

from numbainfer.constraints import constraint_of
from numbainfer.engine import Engine
from numbainfer.errors import NumbaInferError
from numbainfer.registry import Operators
from numbainfer.sampling import Sampler, SamplingParams
from numbainfer.speculation import lookup
from numbainfer.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="an optional dependency")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_files({"tokenizer.json": byte_level("qwen2").to_str().encode()})


def write(tokenizer: Tokenizer, rows: int, seed: int, eos: frozenset[int], **form: Any) -> str:
    """A text whose tokens are drawn from noise, as far as the constraint lets them."""
    params = SamplingParams(temperature=1.0, seed=seed, **form)
    constraint = constraint_of(params, tokenizer, eos, rows)
    sampler = Sampler(params, [], constraint)
    rng, tokens = np.random.default_rng(seed), list[int]()
    while len(tokens) < 300:
        token = sampler(rng.standard_normal(rows).astype(np.float32) * 3)
        if token in eos:
            return tokenizer.decode(tokens)
        tokens.append(token)
        if constraint is not None and constraint.finished:
            return tokenizer.decode(tokens)
    raise AssertionError(f"no end in {tokenizer.decode(tokens)!r}")


@pytest.mark.parametrize("rows", [0, 3, 40])  # more than the tokenizer has, as models are padded
@pytest.mark.parametrize("seed", range(4))
def test_json_schema(seed: int, rows: int, tokenizer: Tokenizer) -> None:
    schema = SCHEMA if seed % 2 else json.dumps(SCHEMA)
    told = json.loads(write(tokenizer, tokenizer.vocab_size + rows, seed, frozenset([0, 2]), json_schema=schema))
    assert set(told) == {"name", "age", "tags"}
    assert isinstance(told["name"], str)
    assert len(told["name"]) <= 12
    assert 0 <= told["age"] <= 120
    assert set(told["tags"]) <= {"red", "green"}


@pytest.mark.parametrize("regex", [r"(yes|no)", r"\d{4}-\d\d-\d\d", r"[a-f]{3,9}!", "Zażółć gęślą", r"(ab)*c"])
@pytest.mark.parametrize("eos", [frozenset([2]), frozenset[int]()])
def test_regex(regex: str, eos: frozenset[int], tokenizer: Tokenizer) -> None:
    for seed in range(5):
        assert re.fullmatch(regex, write(tokenizer, tokenizer.vocab_size, seed, eos, regex=regex))


def test_grammar(tokenizer: Tokenizer) -> None:
    grammar = 'start: "(" sum ")"\nsum: /[0-9]/ ("+" /[0-9]/)+'
    for seed in range(5):
        text = write(tokenizer, tokenizer.vocab_size, seed, frozenset([2]), grammar=grammar)
        assert re.fullmatch(r"\(\d(\+\d)+\)", text)
        assert eval(text) >= 0


def test_marks_are_no_text(tokenizer: Tokenizer) -> None:
    """Their names are made of letters that the form allows; the tokens themselves are not."""
    for seed in range(5):
        text = write(tokenizer, tokenizer.vocab_size, seed, frozenset([2]), regex=r"<\|im_start\|>")
        assert text == "<|im_start|>"


@pytest.mark.parametrize("speculate", [False, True])
def test_a_model_writes_what_it_must(speculate: bool, ops: Operators) -> None:
    """In the engine's loop, with a sentencepiece vocabulary, alone and several at once."""
    engine = build_engine(ops, stories260k(), ctx_size=128, eos_ids=(2,), sequences=3)
    engine.drafter = lookup if speculate else None
    prompt = engine.tokenizer.encode("Once upon a time")
    replies = [
        engine.reply(prompt, SamplingParams(regex=r" (a|b){2,30}c", temperature=1.5, seed=4)),
        engine.reply(prompt, SamplingParams(json_schema={"type": "array", "items": {"type": "boolean"}})),
        engine.reply(prompt, SamplingParams(max_tokens=10)),
    ]
    list(engine.run(replies))
    first, second, third = (reply.generation for reply in replies)
    assert re.fullmatch(r" (a|b){2,30}c", first.text)
    assert first.finish_reason == "stop"
    assert second.finish_reason == "length" or isinstance(json.loads(second.text), list)
    assert len(third.tokens) == 10


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        ({"regex": "("}, "regex: "),
        ({"json_schema": "{"}, "json_schema: "),
        ({"json_schema": {"type": "nope"}}, "json_schema: "),
        ({"json_schema": "[1]"}, "json_schema: "),
        ({"grammar": "nonsense"}, "grammar: "),
        ({"regex": "a", "json_schema": {}}, "give one of them"),
    ],
)
def test_forms_that_make_no_sense(form: dict[str, Any], problem: str, ops: Operators) -> None:
    engine = build_engine(ops, stories260k(), ctx_size=128)
    with pytest.raises(NumbaInferError, match=problem) as raised:
        engine.reply([1], SamplingParams(**form))
    assert "\n" not in str(raised.value)


def test_without_the_library(ops: Operators, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Engine = build_engine(ops, stories260k(), ctx_size=128)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NumbaInferError, match="pip install llguidance"):
        engine.reply([1], SamplingParams(regex="a"))
    assert engine.reply([1], SamplingParams()).limit > 0
    told = numbainfer("run", STORIES, "Once", "--regex", "a")
    assert (told.code, "pip install llguidance" in told.error) == (1, True)
    assert "loading" not in told.err
