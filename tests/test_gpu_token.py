"""A step of one token as one kernel, run in Python (simt.py), against the CPU's operators."""

from __future__ import annotations

import sys

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the gpu extra is not installed")

import simt
from building import Checkpoints, build_model, difference, source_weights
from conftest import operators
from emulated_token import Emulated, filled, stored
from numba import cuda
from numpy import int32, int64
from tiny_models import TOKEN_CONFIGS

from numbainfer.gpu import token_kernel, token_plan, token_weights
from numbainfer.gpu.compile import kernel
from numbainfer.gpu.pipeline import barrier_init, barrier_wait
from numbainfer.gpu.ptx import address, peek_i32, post_i32, shared_address
from numbainfer.gpu.token_plan import (
    IN_FLIGHT,
    ROLE,
    SLOT,
    WARPS,
    Plan,
    Shape,
)
from numbainfer.gpu.token_step import TokenStep
from numbainfer.kv_cache import PAGE, Sequence
from numbainfer.model import Model

SLOTS = 3  # of the history


def narrow(pairs: int, halves: int, width: int, group: int, blocks: int, warps: int, slot: int) -> Shape:
    """In place of token_plan.cut: rows in up to 4 parts, and a thread for each of a block's. Where parts are alike, the
    ring has them as pieces of their own."""
    most = 32 * warps // -(-pairs // blocks)
    parts = next(parts for parts in (4, 2, 1) if parts <= most)
    part = -(-(width // group) // parts) * group
    numbered = -(-pairs // blocks) * parts * (slot // part) < 1 << 16  # see _fits
    return Shape(pairs, halves, width, parts, part, parts if parts * part == width and numbered else 1)


@pytest.mark.parametrize(
    ("name", "group", "blocks", "past", "steps", "order"),
    [
        ("token_llama", 64, 2, 0, "gl-g", None),
        ("token_wide", 64, 3, 3, "g", None),
        ("token_qwen2", 32, 2, 560, "gg", 1),  # two parts of the keys, to be merged
        ("token_qwen3", 64, 2, 560, "g", 8),  # more halves of chunks than lanes find together, three of them a slot
        ("token_qwen2", 32, 2, 1137, "g", 6),  # two or three chunks for a warp; the last is not full
        ("token_qwen2", 32, 8, 2100, "g", 7),  # eight parts, merged by six blocks
        ("token_qwen2", 32, 16, 3400, "g", None),  # 16 columns a block, the fewest
        ("token_llama", 32, 16, 2200, "g", None),  # the same of two units
        ("token_qwen2", 32, 4, 127, "ggg", 5),  # two that whoever needs them adds up; a third key makes three pages
        ("token_qwen3", 64, 2, 63, "gg", 2),
        ("token_biases", 64, 3, 5, "lg", 3),
        ("token_window", 32, 2, 150, "lg", 4),
    ],
)
def test_token(
    name: str,
    group: int,
    blocks: int,
    past: int,
    steps: str,
    order: int | None,
    checkpoint_of: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps after a text of `past` tokens. g: greedy, the next one takes what it chose; l: with logits; -: without.
    Those in an order of chance have narrow parts."""
    if order is not None:
        monkeypatch.setattr(sys.modules[TokenStep.__module__], "cut", narrow)
        monkeypatch.setattr(token_plan, "SMALL_SLOT", SLOT)  # with heads of 128, a chunk and a half
    weights = source_weights(checkpoint_of(name), "int8", group)
    vocabulary = weights.config.vocab_size
    expected, actual = (build_model(operators("cpu"), weights, past + PAGE) for _ in range(2))
    actual.cache._free_pages.reverse()  # pages in another order
    draw = np.random.default_rng(past)
    text = draw.integers(0, vocabulary, past).tolist()
    theirs, mine = filled(expected, text), filled(actual, text)
    step = Emulated(actual, blocks, order).step

    tokens, positions, rows = np.zeros(1, np.int32), np.array([past], np.int32), np.array([mine.row], np.int32)
    logits, history = np.zeros((1, vocabulary), np.float32), np.full((SLOTS, 1), -1, np.int32)
    greedy = False
    for position, kind in enumerate(steps, past):
        if not greedy:
            tokens[0], positions[0] = draw.integers(vocabulary), position
        token, greedy = int(tokens[0]), kind == "g"
        expected.cache.append(theirs, [token])
        actual.cache.append(mine, [token])
        wanted = expected.step([token], [position], theirs.row)
        assert wanted is not None
        logits[...] = np.nan
        step.launch(tokens, positions, rows, None if kind == "-" else logits, history if greedy else None)
        assert np.isnan(logits).all() if kind == "-" else difference(logits, wanted) < 1e-3
        assert positions[0] == position + greedy
        if greedy:
            assert tokens[0] == history[(position + 1) % SLOTS, 0] == logits.argmax()
        keys_and_values = stored(actual.cache, mine, position)
        np.testing.assert_allclose(keys_and_values, stored(expected.cache, theirs, position), atol=5e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("name", "blocks", "shared_memory", "lengths", "order"),
    [
        ("token_layers", 4, 90 << 10, [129, 513, 63, 127], 12),
        ("token_units", 2, 227 << 10, [65, 300, 0, 513], 13),  # a unit for each block: no parts
    ],
)
def test_sequences_in_turn(
    name: str,
    blocks: int,
    shared_memory: int,
    lengths: list[int],
    order: int,
    checkpoint_of: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps of sequences of other lengths, in other numbers of parts, one after the other. What is in no use is NaN,
    and most pages' numbers are read from the table."""
    monkeypatch.setattr("emulated_token.SHARED_MEMORY", shared_memory)
    for module in (token_plan, token_weights, token_kernel):
        monkeypatch.setattr(module, "PAGES", 4)
    monkeypatch.setattr(Plan, "mostly_narrow", property(lambda plan: False))  # as of larger models
    monkeypatch.setattr(Plan, "asks_first", property(lambda plan: True))
    weights = source_weights(checkpoint_of(name), "int8", 32)
    vocabulary = weights.config.vocab_size
    expected, actual = (
        build_model(operators("cpu"), weights, max(lengths) + PAGE, sequences=len(lengths)) for _ in range(2)
    )
    draw = np.random.default_rng(order)
    draw.shuffle(actual.cache._free_pages)
    texts = [draw.integers(0, vocabulary, length).tolist() for length in lengths]
    pairs = [(filled(expected, text), filled(actual, text)) for text in texts]
    used = {
        page: length - PAGE * i
        for (_, mine), length in zip(pairs, lengths, strict=True)
        for i, page in enumerate(mine.pages)
    }
    for pages in (*actual.cache.k_pages, *actual.cache.v_pages):
        for page in range(len(pages)):
            pages[page, :, used.get(page, 0) :] = np.nan
    step = Emulated(actual, blocks, order).step
    for (theirs, mine), length in zip(pairs, lengths, strict=True):
        tokens, positions, rows = np.array([7], np.int32), np.array([length], np.int32), np.array([mine.row], np.int32)
        logits = np.full((1, vocabulary), np.nan, np.float32)
        expected.cache.append(theirs, [7])
        actual.cache.append(mine, [7])
        wanted = expected.step([7], [length], theirs.row)
        assert wanted is not None
        step.launch(tokens, positions, rows, logits, None)
        assert difference(logits, wanted) < 1e-3
        keys_and_values = stored(actual.cache, mine, length)
        np.testing.assert_allclose(keys_and_values, stored(expected.cache, theirs, length), atol=5e-3, rtol=2e-3)


def test_what_was_computed_to_find_an_arrangement_is_forgotten(
    checkpoint_of: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model with one layer, all places have numbers then whose tags would be right for the first step."""
    for name, value in (("TRIES", 2), ("TRIED", 1), ("PLACES", 2), ("BEHIND", 0)):
        monkeypatch.setattr(sys.modules[TokenStep.__module__], name, value)
    weights = source_weights(checkpoint_of("token_long"), "int8", 64)
    expected, actual = (build_model(operators("cpu"), weights, PAGE) for _ in range(2))
    theirs, mine = (model.cache.add_sequence() for model in (expected, actual))
    step = Emulated(actual, 3, 1).step
    step.find_arrangement()
    assert not step.state.any()
    blocks = step.shapes[:, ROLE].tolist()
    assert blocks != [0, 1, 2]
    assert sorted(blocks) == [0, 1, 2]
    assert all((vector.view(np.int32) == -1).all() for vector in step.vectors)
    tokens, positions, rows = np.array([5], np.int32), np.array([0], np.int32), np.array([mine.row], np.int32)
    logits = np.full((1, weights.config.vocab_size), np.nan, np.float32)
    expected.cache.append(theirs, [5])
    actual.cache.append(mine, [5])
    wanted = expected.step([5], [0], theirs.row)
    assert wanted is not None
    step.launch(tokens, positions, rows, logits, None)
    assert difference(logits, wanted) < 1e-3


def test_the_fastest_arrangement_is_taken(checkpoint_of: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times as they may come; the best so far has the same time when it is taken again."""
    model = build_model(operators("cpu"), source_weights(checkpoint_of("token_llama"), "int8", 64), PAGE)
    step, dice = Emulated(model, 3, None).step, np.random.default_rng(1)
    times: dict[tuple, float] = {}

    def seconds(order: np.ndarray, places: list[int]) -> float:
        return times.setdefault((*order.tolist(), *places), dice.random())

    monkeypatch.setattr(step, "_seconds", seconds)
    step.find_arrangement()
    *order, x, qkv, mixed, inner = min(times, key=lambda tried: times[tried])
    assert len(times) > 40
    assert step.shapes[:, ROLE].tolist() == order
    for vector, place in enumerate((x, qkv, mixed, inner)):
        assert step.vectors[vector].pointer == step._place(vector, place).pointer


@pytest.mark.parametrize("past", [0, 150])
def test_a_ring_of_few_slots(past: int, checkpoint_of: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warp goes past many slots that hold none of its rows, or of its keys. Copies come out of order, and threads run
    in any: every bit is the same."""
    monkeypatch.setattr("emulated_token.SHARED_MEMORY", 72 << 10)
    weights = source_weights(checkpoint_of("token_long"), "int8", 32)
    expected, actual = (build_model(operators("cpu"), weights, past + PAGE) for _ in range(2))
    text = np.random.default_rng(past).integers(0, weights.config.vocab_size, past).tolist()
    theirs, mine = filled(expected, text), filled(actual, text)
    expected.cache.append(theirs, [5])
    actual.cache.append(mine, [5])
    wanted = expected.step([5], [past], theirs.row)
    assert wanted is not None
    tokens, positions, rows = np.array([5], np.int32), np.array([past], np.int32), np.array([mine.row], np.int32)
    results = []
    for order in (None, 1, 2, 3, 5):
        step = Emulated(actual, 3, order).step
        assert step.plan.in_flight < IN_FLIGHT // step.plan.slot_codes
        assert step.plan.attending < WARPS
        logits = np.full((1, weights.config.vocab_size), np.nan, np.float32)
        step.launch(tokens, positions, rows, logits, None)
        results.append(logits)
    assert difference(results[0], wanted) < (1e-3 if past else 2e-4)
    for logits in results[1:]:
        np.testing.assert_array_equal(logits, results[0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", TOKEN_CONFIGS)
def test_tokens_on_a_gpu(name: str, checkpoint_of: Checkpoints) -> None:
    """A text token by token, until the keys are in two parts, beside the CPU; then greedily, beside its own logits."""
    weights, length = source_weights(checkpoint_of(name), "int8", 32), 530
    models = [build_model(operators(kind), weights, length + PAGE) for kind in ("cpu", "cuda")]
    actual = models[1]
    assert isinstance(actual.token_step, TokenStep)
    text = np.random.default_rng(1).integers(0, weights.config.vocab_size, length).tolist()
    sequences = [model.cache.add_sequence() for model in models]
    for position, token in enumerate(text):
        rows = []
        for model, sequence in zip(models, sequences, strict=True):
            model.cache.append(sequence, [token])
            wanted = "last" if position in (0, 1, 15, 16, 63, 64, 255, 256, 511, 512, 529) else "none"
            rows.append(model.step([token], [position], sequence.row, wanted))
        theirs, mine = rows
        if theirs is not None and mine is not None:
            assert difference(mine, theirs) < 2e-3
    _check_greedy(actual, sequences[1], 12)
    for model in models:
        model.release()


def _check_greedy(model: Model, sequence: Sequence, count: int) -> None:
    """Greedy decoding against the logits of steps one by one."""
    length = len(sequence)
    chosen = [tokens[0] for tokens in model.greedy([1], [sequence], count)]
    model.cache.truncate(sequence, length)
    for position, token in enumerate([1, *chosen[:-1]], length):
        model.cache.append(sequence, [token])
        logits = model.step([token], [position], sequence.row)
        assert logits is not None
        assert logits.argmax() == chosen[position - length]
    model.cache.truncate(sequence, length)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["token_llama", "token_qwen2", "token_qwen3"])
def test_long_texts_on_a_gpu(name: str, checkpoint_of: Checkpoints) -> None:
    """Keys in some parts and in as many as blocks, merged by few blocks and by many, beside the step as a kernel for
    each of its operators, which reads the same keys."""
    lengths = (600, 1500, 5003, 9001)
    model = build_model(operators("cuda"), source_weights(checkpoint_of(name), "int8", 32), lengths[-1] + PAGE)
    step = model.token_step
    assert isinstance(step, TokenStep)
    sequence = filled(model, np.random.default_rng(1).integers(0, model.config.vocab_size, lengths[-1]).tolist())
    for length in reversed(lengths):
        model.cache.truncate(sequence, length)
        rows = []
        for whole in (True, False):
            model.token_step, model.eager = step if whole else None, not whole
            model.cache.append(sequence, [1])
            rows.append(np.array(model.step([1], [length], sequence.row)))
            model.cache.truncate(sequence, length)
        assert difference(*rows) < 2e-3
        model.token_step, model.eager = step, False
        _check_greedy(model, sequence, 6)
    model.release()


@kernel("i32p", threads=64)
def _too_late(flags):
    # The blocks' first warps wait for each other, one of them in vain; the second ones for a barrier that nobody is at.
    memory = shared_address(cuda.shared.array(0, int64, alignment=16))
    block, thread = int32(cuda.blockIdx.x), int32(cuda.threadIdx.x)
    if thread == 0:
        barrier_init(memory, 1)
    cuda.syncthreads()
    if thread >= 32:
        barrier_wait(memory, 0)
    elif block == 0:
        post_i32(address(flags), 1)
        while peek_i32(address(flags) + 4) != 1:
            pass
    else:
        while peek_i32(address(flags)) != 1:
            pass


@pytest.mark.parametrize("order", [None, 1])
def test_deadlock_is_told(order: int | None) -> None:
    """Who waits where."""
    with pytest.raises(simt.DeadlockError) as failure:
        simt.launch(_too_late, 2, np.zeros(2, np.int32), shared=16, together=True, order=order)
    lines = sorted(str(failure.value).splitlines()[1:])
    assert [line.split(": ")[0] for line in lines] == [
        "block (0, 0, 0), threads 0-31",
        "block (0, 0, 0), threads 32-63",
        "block (1, 0, 0), threads 32-63",
    ]
    assert all("(_too_late)" in line for line in lines)
    assert "(barrier_wait)" in lines[1]
