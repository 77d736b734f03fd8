"""The generate loop, with a real model of 260 thousand parameters: when it stops, what it streams, what it leaves."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from building import build_engine, stories260k

from numbainfer.engine import Engine
from numbainfer.errors import NumbaInferError
from numbainfer.generation import Generation, StopGate
from numbainfer.registry import Operators
from numbainfer.sampling import SamplingParams

CTX = 128
STORY = "Once upon a time, there was a little girl named Lily. She loved to play"  # how the model begins greedily


@pytest.fixture(params=[False, True], ids=["step_by_step", "running_ahead"])
def engine(ops: Operators, request: pytest.FixtureRequest) -> Engine:
    # float32: int8 rounds differently where a prompt is prefilled in other pieces (test_model.py)
    engine = build_engine(ops, stories260k(), ctx_size=CTX, eos_ids=(2,))
    engine.model.runs_ahead = request.param
    return engine


def tell(engine: Engine, prompt: list[int] | None = None, **parameters: Any) -> Generation:
    """A generation to its end; checks that the stream is the text and the text is what the tokens decode to."""
    generation, pieces = engine.generate(prompt or [1], SamplingParams(**{"max_tokens": 60, **parameters}))
    assert "".join(pieces) == generation.text
    if not parameters.get("stop"):
        assert generation.text == engine.tokenizer.decode(generation.tokens, at_start=False)
    return generation


def test_greedy_text(engine: Engine) -> None:
    generation = tell(engine)
    assert generation.text.lstrip().startswith(STORY)
    assert len(generation.tokens) == 60
    assert (generation.finish_reason, generation.context_full) == ("length", False)
    # a reply that does not carry the prompt on begins without sentencepiece's space
    assert generation.text.startswith(" ")
    _, pieces = engine.generate([1], SamplingParams(max_tokens=60), continues=False)
    assert "".join(pieces) == generation.text[1:]


@pytest.mark.parametrize("count", [0, 1, 2, 30])
def test_max_tokens(engine: Engine, count: int) -> None:
    generation = tell(engine, max_tokens=count)
    assert generation.tokens == tell(engine).tokens[:count]
    assert (generation.finish_reason, generation.context_full) == ("length", False)
    # the last token is not run: nothing asks for what follows it
    assert len(tell(engine, max_tokens=count).tokens) == count


@pytest.mark.parametrize("at", [0, 5, 59])
def test_eos_ends_the_reply_and_is_not_part_of_it(engine: Engine, at: int) -> None:
    tokens = tell(engine).tokens
    engine.eos_ids = {tokens[at], 999}
    generation = tell(engine)
    assert generation.tokens == tokens[: tokens.index(tokens[at])]
    assert generation.finish_reason == "stop"


@pytest.mark.parametrize("stop", ["named Lily", "little girl named", ". She", "time, there"])
def test_stop_texts_across_tokens(engine: Engine, stop: str) -> None:
    """Tokens of this model are 1 to 3 letters, so every one of these is spread over several."""
    full = tell(engine)
    assert all(stop not in engine.tokenizer.decode([token]) for token in full.tokens)
    generation = tell(engine, stop=("never said", stop))
    assert generation.text == full.text[: full.text.index(stop)]
    assert generation.finish_reason == "stop"
    assert len(generation.tokens) < 60


def test_a_stop_text_that_only_begins_is_shown_after_all(engine: Engine) -> None:
    full = tell(engine)
    generation = tell(engine, stop=(full.text[-4:] + "#", "there was no"))
    assert (generation.text, generation.finish_reason) == (full.text, "length")


def test_a_stop_text_that_the_last_token_completes(engine: Engine) -> None:
    full = tell(engine)
    generation = tell(engine, stop=(full.text[-2:],))
    assert generation.finish_reason == "stop"
    assert full.text.startswith(generation.text)


def test_the_stop_gate_is_a_search_in_the_whole_text() -> None:
    """Random texts of two letters in random pieces: nothing of a stop text, and all before it, is let through."""
    rng = np.random.default_rng(0)
    stopped = 0
    for _ in range(500):
        text = "".join(rng.choice(["a", "b"], 30))
        stops = tuple("".join(rng.choice(["a", "b"], rng.integers(1, 8))) for _ in range(rng.integers(0, 4)))
        cuts = [0, *sorted(rng.integers(0, 31, 8)), 30]
        gate, shown, ends = StopGate(stops), "", []
        for start, stop in itertools.pairwise(cuts):
            shown += gate.push(text[start:stop])
            ends = [text[:stop].find(s) for s in stops if s in text[:stop]]
            assert gate.stopped == bool(ends)
            if ends:
                break
            # held back is only what may still become a stop text
            held = text[len(shown) : stop]
            assert not held or any(s.startswith(held) for s in stops)
        shown += gate.flush()
        assert shown == (text[: min(ends)] if ends else text)
        stopped += bool(ends)
    assert 100 < stopped < 450


def test_prompts_that_cannot_be_run(engine: Engine) -> None:
    params = SamplingParams()
    for prompt, problem in (
        ([], "the prompt is empty"),
        ([1] * CTX, f"the prompt has {CTX} tokens and the context holds {CTX}: shorten it or raise --ctx-size"),
        ([1] * 500, "the prompt has 500 tokens"),
        ([1, 512], "token 512, which"),
        ([1, -1], "token -1, which"),
    ):
        with pytest.raises(NumbaInferError, match=problem):
            engine.generate(prompt, params)
    assert tell(engine).text.lstrip().startswith(STORY)


@pytest.mark.parametrize("prompt_tokens", [CTX - 1, CTX - 5, 3])
def test_the_context_ends_the_reply(engine: Engine, prompt_tokens: int) -> None:
    prompt = [1, *tell(engine, max_tokens=CTX - 1).tokens][:prompt_tokens]
    room = CTX - prompt_tokens
    generation = tell(engine, prompt, max_tokens=1000)
    assert len(generation.tokens) == room
    assert (generation.finish_reason, generation.context_full) == ("length", True)
    exactly = tell(engine, prompt, max_tokens=room)
    assert (exactly.tokens, exactly.context_full) == (generation.tokens, False)


def test_closing_the_stream_cancels(engine: Engine) -> None:
    expected = tell(engine)
    generation, pieces = engine.generate([1], SamplingParams(max_tokens=60))
    shown = "".join(next(pieces) for _ in range(5))
    pieces.close()  # type: ignore[attr-defined]
    assert (generation.finish_reason, generation.text) == ("cancelled", shown)
    assert generation.tokens == expected.tokens[: len(generation.tokens)]
    assert tell(engine).tokens == expected.tokens


@pytest.mark.parametrize("at_step", [0, 1, 7])
@pytest.mark.parametrize("error", [KeyboardInterrupt, NumbaInferError])
def test_an_interrupted_step_is_as_if_it_never_was(
    engine: Engine, at_step: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 0 is the prompt's. The broken step leaves other keys and values behind, which must not be found later."""
    prompt = [1, *tell(engine).tokens[:20]]
    expected = tell(engine, prompt)
    engine.model.cache.truncate(engine._sequence, 0)
    step, calls = engine.model.step, 0

    def broken(tokens: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > at_step:
            step([3] * len(tokens), *arguments)
            raise error
        return step(tokens, *arguments)

    engine.model.runs_ahead = False
    monkeypatch.setattr(engine.model, "step", broken)
    generation, pieces = engine.generate(prompt, SamplingParams(max_tokens=60))
    with pytest.raises(error):
        list(pieces)
    assert generation.finish_reason == ("cancelled" if error is KeyboardInterrupt else "")
    assert generation.tokens == expected.tokens[:at_step]
    monkeypatch.undo()
    assert tell(engine, prompt).tokens == expected.tokens


def test_statistics(engine: Engine) -> None:
    generation, pieces = engine.generate([1, 403, 407], SamplingParams(max_tokens=40, seed=5, temperature=1.0))
    assert len(list(pieces)) > 5
    s = generation.statistics
    assert (s.prompt_tokens, s.cached_tokens, s.tokens, s.seed) == (3, 0, len(generation.tokens), 5)
    assert 0 < s.prompt_seconds <= s.time_to_first_token < 60
    assert 0 < s.decode_seconds < 60
    assert s.prompt_tokens_per_second == pytest.approx(3 / s.prompt_seconds)
    assert s.decode_tokens_per_second == pytest.approx((s.tokens - 1) / s.decode_seconds)
    values = s.as_dict()
    assert values.keys() >= {field.name for field in dataclasses.fields(s)}
    assert values["decode_tokens_per_second"] == pytest.approx(s.decode_tokens_per_second, abs=1e-6)
    # The same prompt again: all but its last token are in the cache. One token takes no time to decode.
    again = tell(engine, [1, 403, 407], max_tokens=1).statistics
    assert (again.cached_tokens, again.tokens, again.decode_tokens_per_second) == (2, 1, 0)
    assert again.prompt_tokens_per_second == pytest.approx(1 / again.prompt_seconds)
    nothing = tell(engine, max_tokens=0).statistics
    assert (nothing.tokens, nothing.time_to_first_token, nothing.decode_tokens_per_second) == (0, 0, 0)


def test_seeds_reproduce_texts(engine: Engine) -> None:
    """Whatever was in the cache before; and hot texts, full of broken UTF-8, stream as they decode."""
    texts = {seed: tell(engine, temperature=20.0, seed=seed).text for seed in range(4)}
    assert len(set(texts.values())) == 4
    assert any("\ufffd" in text for text in texts.values())
    for seed in reversed(range(4)):
        assert tell(engine, temperature=20.0, seed=seed).text == texts[seed]
    drawn = tell(engine, temperature=20.0)
    assert tell(engine, temperature=20.0, seed=drawn.statistics.seed).text == drawn.text


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_decoding_allocates_nothing(dtype: str, ops: Operators) -> None:
    """From the tenth token on, and over the border of a page too."""
    engine = build_engine(ops, stories260k(dtype), ctx_size=CTX, eos_ids=())
    generation, pieces = engine.generate([1], SamplingParams(max_tokens=CTX))
    before = None
    for _ in pieces:
        if len(generation.tokens) >= 10 and before is None:
            before = dataclasses.replace(ops.pool.statistics)
    assert len(generation.tokens) > 100
    assert before == ops.pool.statistics


def test_logits_of_a_text_longer_than_a_chunk(ops: Operators) -> None:
    tokens = np.random.default_rng(0).integers(3, 512, 100).tolist()
    whole = build_engine(ops, stories260k(), ctx_size=CTX)
    parts = build_engine(ops, stories260k(), ctx_size=CTX, chunk=16)
    parts.prefill(tokens[:50])  # which logits() forgets
    (first, expected), *rest = whole.logits(tokens)
    assert (first, rest) == (0, [])
    for start, logits in parts.logits(tokens):
        assert np.abs(logits - expected[start : start + 16]).max() <= 1e-5 * np.abs(expected).max()
    assert start == 96
    with pytest.raises(NumbaInferError, match="do not fit the context"):
        list(parts.logits([1] * (CTX + 1)))
