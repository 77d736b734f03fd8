"""Several replies in one loop, and speculation: what they say, and what they leave in the cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from building import (
    Checkpoints,
    advance,
    all_logits,
    build_engine,
    build_model,
    random_tokens,
    source_weights,
    stories260k,
)

from numbainfer.engine import DRAFTS, Engine, shared_prefix
from numbainfer.errors import NumbaInferError
from numbainfer.generation import Generation, Reply
from numbainfer.registry import Operators
from numbainfer.sampling import SamplingParams
from numbainfer.speculation import LONGEST, SHORTEST, DraftModel, lookup

CTX = 128
TEXTS = [
    "Once upon a time",
    "Tom had a red ball",
    "The dog",
    "Lily and Ben went to the park. They saw",
    "It",
    "One day",
]


def build(ops: Operators, sequences: int, dtype: str = "float32", **options: Any) -> Engine:
    engine = build_engine(ops, stories260k(dtype), ctx_size=CTX, eos_ids=(2,), sequences=sequences, **options)
    assert len(engine._idle) == sequences
    return engine


def together(engine: Engine, replies: list[Reply]) -> list[Generation]:
    """All to their end; checks that the pieces join to the texts, and that every sequence is given back."""
    texts = {id(reply): "" for reply in replies}
    for reply, piece in engine.run(replies):
        texts[id(reply)] += piece
    assert [texts[id(reply)] for reply in replies] == [reply.generation.text for reply in replies]
    assert len(engine._idle) == len(engine.model.cache.page_table)
    return [reply.generation for reply in replies]


def alone(engine: Engine, prompt: list[int], params: SamplingParams) -> Generation:
    return together(engine, [engine.reply(prompt, params)])[0]


@pytest.mark.parametrize(("sequences", "chunk"), [(1, 512), (3, 512), (6, 512), (4, 7)])
def test_a_batch_says_what_each_says_alone(sequences: int, chunk: int, ops: Operators) -> None:
    """With parameters of its own each, more prompts than sequences, and chunks that split the prompts."""
    batch, single = build(ops, sequences, chunk=chunk), build(ops, 1)
    params = [
        SamplingParams(max_tokens=30),
        SamplingParams(max_tokens=50, temperature=1.0, seed=3, top_k=50),
        SamplingParams(max_tokens=0),
        SamplingParams(max_tokens=500),  # to the context's end
        SamplingParams(max_tokens=40, stop=("the", "a ")),
        SamplingParams(max_tokens=20, temperature=0.8, seed=9, repetition_penalty=1.3, frequency_penalty=0.5),
    ]
    prompts = [batch.tokenizer.encode(text) for text in TEXTS]
    generations = together(batch, [batch.reply(p, s) for p, s in zip(prompts, params, strict=True)])
    for prompt, own, generation in zip(prompts, params, generations, strict=True):
        expected = alone(single, prompt, own)
        assert (generation.tokens, generation.text) == (expected.tokens, expected.text)
        assert generation.finish_reason == expected.finish_reason
        assert generation.context_full == expected.context_full
        assert generation.statistics.tokens == expected.statistics.tokens
    assert {generation.finish_reason for generation in generations} == {"stop", "length"}
    assert generations[3].context_full


def test_the_cache_is_what_its_sequences_say(ops: Operators) -> None:
    """A second round, whose prompts go on from the first one's in another order, finds each where it is."""
    engine = build(ops, 3)
    prompts = [engine.tokenizer.encode(text) for text in TEXTS[:3]]
    params = SamplingParams(max_tokens=20)
    first = together(engine, [engine.reply(prompt, params) for prompt in prompts])
    longer = [generation.prompt + generation.tokens + [405] for generation in first][::-1]
    second = together(engine, [engine.reply(prompt, params) for prompt in longer])
    for prompt, generation in zip(longer, second, strict=True):
        assert generation.statistics.cached_tokens == len(prompt) - 2  # the last token said was never run
        assert generation.tokens == alone(build(ops, 1), prompt, params).tokens
    fresh = alone(engine, [1, 300, 301], params)
    assert fresh.statistics.cached_tokens == 1  # all began with BOS
    used = {sequence.row for sequence in engine._idle}
    assert used == {0, 1, 2}


@pytest.mark.parametrize("error", [NumbaInferError, KeyboardInterrupt])
def test_a_broken_batch_leaves_a_sound_engine(
    error: type[BaseException], ops: Operators, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(ops, 3)
    prompts = [engine.tokenizer.encode(text) for text in TEXTS[:5]]
    params = SamplingParams(max_tokens=20)
    expected = [alone(build(ops, 1), prompt, params).tokens for prompt in prompts]
    engine.model.runs_ahead = False  # every step is a call of `step`
    step, calls = engine.model.step, 0

    def broken(tokens: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 9:
            step([3] * len(tokens), *arguments)
            raise error
        return step(tokens, *arguments)

    monkeypatch.setattr(engine.model, "step", broken)
    replies = [engine.reply(prompt, params) for prompt in prompts]
    with pytest.raises(error):
        list(engine.run(replies))
    assert len(engine._idle) == 3
    reasons = {reply.generation.finish_reason for reply in replies}
    assert reasons == ({"cancelled"} if error is KeyboardInterrupt else {""})
    monkeypatch.undo()
    again = together(engine, [engine.reply(prompt, params) for prompt in prompts])
    assert [generation.tokens for generation in again] == expected


def test_open_streams_keep_their_sequences(ops: Operators) -> None:
    engine = build(ops, 2)
    params = SamplingParams(max_tokens=20)
    prompts = [engine.tokenizer.encode(text) for text in TEXTS[:2]]
    expected = [alone(build(ops, 1), prompt, params).text for prompt in prompts]
    streams = [engine.generate(prompt, params) for prompt in prompts]
    for _ in range(5):
        for _, pieces in streams:
            next(pieces)
    _, third = engine.generate(prompts[0], params)
    with pytest.raises(NumbaInferError, match="all sequences of the KV cache are in use"):
        next(third)
    for _, pieces in streams:
        list(pieces)
    assert [generation.text for generation, _ in streams] == expected
    assert len(list(engine.generate(prompts[0], params)[1])) > 0


def test_loops_of_ones_own_beside_open_streams(ops: Operators) -> None:
    """logits, prefill and decode use what no stream is using; decode knows when it can't go on."""
    engine = build(ops, 2)
    params = SamplingParams(max_tokens=20)
    prompt = engine.tokenizer.encode(TEXTS[0])
    expected = alone(engine, prompt, params)
    (_, reference), *_ = build(ops, 1).logits(prompt)
    generation, pieces = engine.generate(prompt, params)
    next(pieces)
    for own in (prompt, engine.tokenizer.encode(TEXTS[1]), prompt):
        np.testing.assert_array_equal(next(engine.logits(prompt))[1], reference)
        first = engine.prefill(own).copy()
        assert engine.decode(int(first.argmax())).shape == first.shape
        next(pieces)
    list(pieces)
    assert generation.text == expected.text
    engine.prefill(prompt)
    both = [engine.generate(prompt, params) for _ in range(2)]
    for _, stream in both:
        next(stream)
    with pytest.raises(NumbaInferError, match="something else was generated in between"):
        engine.decode(5)
    for use in (lambda: engine.prefill(prompt), lambda: next(engine.logits(prompt))):
        with pytest.raises(NumbaInferError, match="all sequences of the KV cache are in use"):
            use()
    for other, stream in both:
        list(stream)
        assert other.text == expected.text
    with pytest.raises(NumbaInferError, match="goes on from prefill"):
        build(ops, 1).decode(5)


def test_the_longest_shared_prefix() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        one, other = (rng.integers(0, 2, rng.integers(0, 20)).tolist() for _ in range(2))
        same = [a == b for a, b in zip(one, other, strict=False)] + [False]
        assert shared_prefix(one, other) == same.index(False)


# --- speculation ----------------------------------------------------------------------------------------------------


def lookup_definition(tokens: list[int], count: int) -> list[int]:
    """For the longest end of the text, up to LONGEST, that was there before: what followed it the last time."""
    for length in range(LONGEST, SHORTEST - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[len(tokens) - length :]:
                return tokens[end : end + count]
    return []


def test_lookup_is_its_definition() -> None:
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(2000):
        tokens = rng.integers(0, rng.integers(1, 6), rng.integers(0, 25)).tolist()
        count = int(rng.integers(0, 5))
        guess = lookup(tokens, count)
        assert guess == (lookup_definition(tokens, count) if count else [])
        found += bool(guess)
    assert 500 < found < 1900


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama_int8", "int8"), ("qwen3_mixed", "int8"), ("qwen2_int8", "float32")]
)
def test_few_tokens_in_a_step_are_as_one_by_one_bit_for_bit(
    name: str, dtype: str, ops: Operators, checkpoint_of: Checkpoints
) -> None:
    """What makes speculation exact."""
    if ops.device.kind != "cpu":
        pytest.skip("the CPU's kernels promise this; a GPU's tiles add up in another order")
    model = build_model(ops, source_weights(checkpoint_of(name), dtype))
    tokens = random_tokens(model, 120)
    expected = all_logits(model, tokens, 1)
    for size in range(2, DRAFTS + 2):
        np.testing.assert_array_equal(all_logits(model, tokens, size), expected)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_p": 0.9, "seed": 5},
        {"temperature": 1.0, "seed": 2, "frequency_penalty": 0.3, "repetition_penalty": 1.1, "logprobs": 2},
        {"stop": ("ball.",)},
    ],
    ids=str,
)
def test_speculation_changes_nothing_but_the_number_of_steps(
    options: dict[str, Any], dtype: str, ops: Operators, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ops.device.kind == "cuda" and "logprobs" in options:
        pytest.skip("the GPU sums one token's products in another order than those of several")
    plain, guessing = build(ops, 1, dtype), build(ops, 1, dtype)
    guessing.drafter = lookup
    steps = 0
    step = guessing.model.step

    def counted(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(*arguments)

    monkeypatch.setattr(guessing.model, "step", counted)
    text = "Lily had a red ball. Lily had a red ball. Lily had a"
    for max_tokens in (60, 1, 2, 3, 1000):
        if max_tokens == 1000 and ops.device.kind == "cuda" and dtype == "int8":
            continue  # rounded otherwise, so that sooner or later another token is drawn
        prompt = plain.tokenizer.encode(text)
        params = SamplingParams(**options, max_tokens=max_tokens)
        steps = 0
        expected, generation = alone(plain, prompt, params), alone(guessing, prompt, params)
        assert generation.tokens == expected.tokens
        assert generation.text == expected.text
        assert generation.logprobs == expected.logprobs
        assert generation.finish_reason == expected.finish_reason
        s = generation.statistics
        assert s.accepted_tokens <= s.drafted_tokens
        assert steps == s.tokens - s.accepted_tokens
        if max_tokens == 60 and not options:
            assert s.accepted_tokens > 10
    assert guessing._idle[0].tokens == plain._idle[0].tokens or options  # after the drafts that were wrong


def test_a_draft_model(ops: Operators, checkpoint_of: Checkpoints) -> None:
    """The float32 model with its int8 form as the draft; and with itself, which guesses everything."""
    plain, target = build(ops, 1), build(ops, 1)
    prompt = plain.tokenizer.encode("Once upon a time")
    for dtype in ("int8", "float32"):
        draft = build(ops, 1, dtype)
        target.drafter = DraftModel(draft, target)
        for params in (
            SamplingParams(max_tokens=90),
            SamplingParams(max_tokens=40, temperature=0.6, seed=2),
            SamplingParams(max_tokens=500),  # to the end of both contexts
        ):
            expected, generation = alone(plain, prompt, params), alone(target, prompt, params)
            assert generation.tokens == expected.tokens
            assert generation.finish_reason == expected.finish_reason
        s = alone(target, prompt, SamplingParams(max_tokens=81)).statistics
        assert s.accepted_tokens > 0.7 * s.drafted_tokens > 30
        if dtype == "float32":
            assert (s.drafted_tokens, s.accepted_tokens) == (60, 60)  # 1 + 20 steps of 4
    short = build_engine(ops, stories260k(), ctx_size=32)
    target.drafter = DraftModel(short, target)
    assert (
        alone(target, prompt, SamplingParams(max_tokens=90)).tokens
        == alone(plain, prompt, SamplingParams(max_tokens=90)).tokens
    )
    other = build_engine(ops, source_weights(checkpoint_of("llama_int8")))
    with pytest.raises(NumbaInferError, match="another vocabulary"):
        DraftModel(other, target)


def test_tokens_of_a_batch_in_any_number(ops: Operators) -> None:
    """A batch that shrinks from 6 to 1, in int8: every size of step gives what it should, within its rounding."""
    model = build_model(ops, stories260k("int8"), sequences=6)
    texts = [random_tokens(model, 30, seed) for seed in range(6)]
    expected = [all_logits(build_model(ops, stories260k("int8")), text, 30) for text in texts]
    sequences = [model.cache.add_sequence() for _ in texts]
    for text, sequence in zip(texts, sequences, strict=True):
        advance(model, sequence, text[:20])
    for count in range(6, 0, -1):
        tokens = [text[26 - count] for text in texts[:count]]
        positions = [len(sequence) for sequence in sequences[:count]]
        for sequence, token in zip(sequences, tokens, strict=False):
            model.cache.append(sequence, [token])
        logits = model.step(tokens, positions, [sequence.row for sequence in sequences[:count]], "all")
        assert logits is not None
        for row, whole in zip(logits, expected, strict=False):
            # a prompt of more than 16 tokens rounds its activations more coarsely than a step of decoding
            assert np.abs(row - whole[26 - count]).max() <= 2e-2 * np.abs(whole).max()
