"""A step of one token as one kernel, run in Python (simt.py), against the CPU's operators."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import chain, pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the gpu extra is not installed")

import simt
from building import Checkpoints, build_model, difference, source_weights
from conftest import operators
from numba import cuda
from numpy import int32, int64
from simt_world import Array
from tiny_models import TOKEN_CONFIGS

from numbainfer.gpu import token_kernel, token_plan, token_weights
from numbainfer.gpu.attention_core import KEYS
from numbainfer.gpu.compile import kernel
from numbainfer.gpu.pipeline import barrier_init, barrier_wait
from numbainfer.gpu.ptx import address, peek_i32, post_i32, shared_address
from numbainfer.gpu.token_plan import (
    AREAS,
    IN_FLIGHT,
    SHAPE,
    SHAPES,
    SLOT,
    WARPS,
    Plan,
    Shape,
    cut,
    longest_way,
    make_plan,
    slot_size,
    slots_of,
)
from numbainfer.gpu.token_step import TokenStep, block_shares, token_step
from numbainfer.gpu.token_weights import make_share
from numbainfer.kv_cache import PAGE, KVCache, Sequence
from numbainfer.model import Model
from numbainfer.quantization import GROUPS, QuantizedMatrix

SLOTS = 3  # of the history
SHARED_MEMORY = 227 << 10  # bytes of a block, on an H100
MEMORY_RATE = 12.8  # bytes a cycle for each multiprocessor, on an H100


class Emulated:
    """A model's step of one token on a GPU of so many multiprocessors. It is the stream and the pool too."""

    def __init__(self, model: Model, blocks: int, order: int | None) -> None:
        self.gpu = SimpleNamespace(
            capability=(9, 0), multiprocessors=blocks, shared_memory=SHARED_MEMORY, memory_rate=MEMORY_RATE
        )
        self.order, self.held = order, list[np.ndarray]()
        self.captured: list[Any] | None = None
        self.seconds = 0.0
        layers = [
            replace(layer, **{f.name: self._seen(getattr(layer, f.name)) for f in fields(layer)})
            for layer in model.layers
        ]
        k_pages, v_pages = (list(map(self._seen, pages)) for pages in (model.cache.k_pages, model.cache.v_pages))
        cache = SimpleNamespace(k_pages=k_pages, v_pages=v_pages, page_table=model.cache.page_table)
        others = {name: self._seen(getattr(model, name)) for name in ("embedding", "head", "norm", "cos", "sin")}
        seen = SimpleNamespace(config=model.config, layers=layers, cache=cache, **others)
        made = token_step(self, self, seen)  # type: ignore[arg-type]
        assert isinstance(made, TokenStep)
        self.step = made

    def _seen(self, value: Any) -> Any:
        """An array, or what has some, with pointers."""
        if isinstance(value, QuantizedMatrix):
            return replace(value, codes=self._seen(value.codes), scales=self._seen(value.scales))
        if isinstance(value, np.ndarray):
            value = value.view(Array)
            self.held.append(value)
        return value

    def launch(self, kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
        """As a stream."""
        if self.captured is not None:
            self.captured.append(((kernel, grid, *arguments), options))
            return
        simt.launch(kernel, grid, *arguments, **options, order=self.order, others=self.held)

    @contextmanager
    def capture(self) -> Iterator[list[Any]]:
        """As a stream; of launches."""
        self.captured = []
        yield self.captured
        self.captured = None

    def time(self, programs: list[list[Any]]) -> list[float]:
        """As a stream: each is faster than the one before."""
        for launched, options in chain(*programs):
            self.launch(*launched, **options)
        self.seconds -= 1
        return [self.seconds for _ in programs]

    def empty(self, shape: Any, dtype: Any) -> Array:
        """As a pool."""
        return np.zeros(shape, dtype).view(Array)

    zeros = empty

    def release(self, array: Array) -> None:
        """As a pool: what is in it afterwards means nothing."""
        array.view(np.int8)[...] = 0x55


@pytest.fixture(autouse=True)
def _as_it_comes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator does not try arrangements: its time says nothing."""
    if "gpu" not in request.keywords:
        monkeypatch.setattr(sys.modules[TokenStep.__module__], "SMALL", 0)


def filled(model: Model, text: list[int]) -> Sequence:
    """A sequence of which the cache holds a text."""
    sequence = model.cache.add_sequence()
    for start in range(0, len(text), model.chunk):
        part = text[start : start + model.chunk]
        model.cache.append(sequence, part)
        model.step(part, np.arange(start, start + len(part)), sequence.row, "none")
    return sequence


def stored(cache: KVCache, sequence: Sequence, position: int) -> np.ndarray:
    """Of all layers, the keys and values at a position."""
    page, slot = sequence.pages[position // PAGE], position % PAGE
    return np.array([pages[page, :, slot] for pages in (*cache.k_pages, *cache.v_pages)], np.float32)


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
    monkeypatch.setattr("test_gpu_token.SHARED_MEMORY", shared_memory)
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
    step.settle()
    assert not step.state.any()
    blocks = step.shapes[:, SHAPES * SHAPE].tolist()
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


@pytest.mark.parametrize("past", [0, 150])
def test_a_ring_of_few_slots(past: int, checkpoint_of: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warp goes past many slots that hold none of its rows, or of its keys. Copies come out of order, and threads run
    in any: every bit is the same."""
    monkeypatch.setattr("test_gpu_token.SHARED_MEMORY", 72 << 10)
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


def _shares(parts_shift: int, units: int) -> Any:
    """The kernel that says of each block, one a thread, which keys are its own."""
    share = make_share(WARPS, 1)

    @kernel("i32p i32 i32", threads=32 * WARPS)
    def shares(out, position, window):
        block = int32(cuda.threadIdx.x)
        start, end, chunks, here, size, sources = share(position, window, block, units, parts_shift)
        out[6 * block], out[6 * block + 1], out[6 * block + 2] = start, end, int32(1 if here else 0)
        out[6 * block + 3], out[6 * block + 4], out[6 * block + 5] = size, sources, chunks

    return shares


@pytest.mark.parametrize(("parts_shift", "units"), [(0, 2), (1, 3), (2, 1), (5, 2)])
def test_every_key_is_one_blocks(parts_shift: int, units: int) -> None:
    """In attention, of the keys before a step's own: each is in one part, which the units of heads agree on. Parts that
    their readers add up are as many as are said, and short."""
    parts = 1 << parts_shift
    for window in (0, 40, 4096):
        for position in (0, 1, 63, 64, 65, 127, 128, 129, 255, 511, 512, 513, 1000, 1025, 4097, 8191, 20000):
            out = np.full((32 * WARPS, 6), -1, np.int32)
            simt.launch(_shares(parts_shift, units), 1, out, position, window)
            first = max(0, position + 1 - window) // PAGE * PAGE if window else 0
            assert not out[parts * units :, 2].any()
            for unit in range(units):
                mine = out[unit * parts : (unit + 1) * parts]
                own = mine[mine[:, 2] == 1]
                assert own[0, 0] == first
                assert own[-1, 1] == position
                assert (own[1:, 0] == own[:-1, 1]).all()
                assert (own[1:, 1] > own[1:, 0]).all()
                np.testing.assert_array_equal(own[:, 5], -(-(own[:, 1] - own[:, 0]) // KEYS))
                assert not mine[len(own) :, 5].any()
                sources = int(out[0, 4])
                assert (out[:, 4] == sources).all()
                assert 1 <= sources <= min(AREAS, parts)
                if sources > 1:
                    assert len(own) == sources
                    assert own[0, 3] <= WARPS * KEYS


def ways(shape: Shape, blocks: int, slot_codes: int) -> Iterator[int]:
    """From each slot that a warp of the kernel waits for to its next one, in a matrix or in gate and up; to the first
    one from the slot before, which is known to be full."""
    for count in {(b + 1) * shape.pairs // blocks - b * shape.pairs // blocks for b in range(blocks)}:
        pieces, most = count * shape.split, slot_codes // shape.piece
        of_slot = (pieces - 1) // -(-pieces // most) + 1
        for warp in range(16):
            of_row = warp % shape.parts * shape.split // shape.parts
            mine = range(warp // shape.parts * shape.split + of_row, pieces, 16 // shape.parts * shape.split)
            at = [-1, *(shape.halves * (piece // of_slot) + half for piece in mine for half in range(shape.halves))]
            yield from (b - a for a, b in pairwise(at))


@pytest.mark.parametrize("blocks", [132, 114, 60])
def test_plans_of_real_shapes(blocks: int) -> None:
    """No warp waits for a slot whose filling before it might take for the right one; every part is short enough."""
    for heads, kv_heads, head_dim, hidden, inner, vocabulary in [
        (14, 2, 64, 896, 4864, 151936),  # Qwen2.5-0.5B
        (32, 8, 64, 2048, 8192, 128256),  # Llama-3.2-1B
        (28, 4, 128, 3584, 18944, 152064),  # Qwen2.5-7B
        (32, 8, 128, 4096, 14336, 128256),  # Llama-3.1-8B
        (64, 8, 128, 5120, 25600, 151936),  # Qwen3-32B
        (64, 8, 128, 8192, 28672, 128256),  # Llama-3.1-70B
    ]:
        for group in GROUPS:
            rows = [(heads + 2 * kv_heads) * head_dim, hidden, inner, hidden, vocabulary]
            columns = [hidden, heads * head_dim, hidden, inner, hidden]
            slot = slot_size(list(zip(rows, columns, strict=True)), blocks)
            cuts = [cut(*shape, group, blocks, 16, slot) for shape in zip(rows, (1, 1, 2, 1, 1), columns, strict=True)]
            shapes = [shape for shape in cuts if shape is not None]
            assert len(shapes) == 5
            plan = make_plan(
                *(head_dim, heads // kv_heads, 2, hidden, group, shapes, blocks, 16, slot),
                *(SHARED_MEMORY - 1024, MEMORY_RATE),
            )
            if plan is None:
                assert inner > 18000
                continue
            assert plan.nbytes <= SHARED_MEMORY - 1024
            assert 1 <= plan.halves <= min(32, 2 * plan.slot_codes // plan.chunk)
            assert plan.area % 16 == plan.shapes % 16 == plan.squares % 16 == 0
            assert slots_of(plan.attending, plan.halves) < plan.slots
            for shape in shapes:
                first, count, _, _, _, _, times, inverse, _, pieces, piece, of_slot = block_shares(
                    shape, blocks, plan.slot_codes
                ).T
                np.testing.assert_array_equal(np.append(first, shape.pairs), np.append(0, np.cumsum(count)))
                assert (of_slot * piece <= plan.slot_codes).all()
                assert ((times - 1) * of_slot < pieces).all()
                assert (pieces <= times * of_slot).all()
                for p, n, i in {(int(p), int(n), int(i)) for p, n, i in zip(pieces, of_slot, inverse, strict=True)}:
                    np.testing.assert_array_equal(np.arange(p) * i >> 16, np.arange(p) // n)
                longest = max(ways(shape, blocks, plan.slot_codes), default=0)
                assert longest <= longest_way(shape, blocks, plan.slot_codes, 16)
                assert 1 <= plan.in_flight <= min(max(1, IN_FLIGHT // plan.slot_codes), plan.slots - longest)


@pytest.mark.parametrize("blocks", [132, 17])
@pytest.mark.parametrize("name", TOKEN_CONFIGS)
def test_small_models_have_a_plan(name: str, blocks: int, checkpoint_of: Checkpoints) -> None:
    """Blocks with a row or two of a matrix are served as well: there are fewer slots than warps to wait for them."""
    model = build_model(operators("cpu"), source_weights(checkpoint_of(name), "int8", 32), 64)
    assert isinstance(Emulated(model, blocks, None).step, TokenStep)


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
