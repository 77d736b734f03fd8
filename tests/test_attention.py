"""RoPE, the paged KV cache and attention on every device, over head layouts, page boundaries and batches."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from machine import Machine, assert_close, assert_quantizes, assert_within, normal, poison
from numpy.testing import assert_array_equal

PAGE = 64
# (query heads, key/value heads, head size): MHA, GQA and MQA; sizes below, at and off the multiples of 16
HEADS = [(4, 4, 8), (6, 2, 16), (4, 1, 20), (3, 3, 24), (8, 2, 64), (2, 1, 80), (4, 2, 128)]

# Steps: (sequence, position) of each token.
STEPS = {
    "first token": [(0, 0)],
    "page boundaries in one batch": [(0, 62), (1, 63), (2, 64), (3, 65), (4, 128), (5, 129), (6, 0)],
    "prefill": [(0, p) for p in range(70)],
    "chunk over a boundary": [(0, p) for p in range(60, 69)],
    "chunks and single tokens": [(1, 5), *((0, p) for p in range(61, 66)), (2, 127), *((3, p) for p in range(3))],
    "out of order": [(1, 64), (0, 2), (1, 63), (0, 0), (1, 65), (0, 1)],
}


def tables(size: int, theta: float = 1e4, positions: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [positions, size / 2], rounded from float64."""
    angle = np.arange(positions)[:, None] * reference.rope_inv_freq(size, theta)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotated(x: np.ndarray, positions: np.ndarray, size: int) -> np.ndarray:
    """The reference over the first `size` values of each head. x [T, heads, d]."""
    turned = reference.rope(x[..., :size], positions, reference.rope_inv_freq(size, 1e4))
    return np.concatenate([turned, x[..., size:]], axis=-1)


@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
@pytest.mark.parametrize(
    ("heads", "head_dim", "size"),
    [(1, 8, 8), (3, 16, 16), (4, 20, 20), (2, 24, 24), (9, 64, 64), (2, 80, 32), (3, 128, 128), (5, 64, 20), (2, 8, 2)],
)
def test_rope(machine: Machine, tokens: int, heads: int, head_dim: int, size: int) -> None:
    x = normal(tokens, tokens, heads * head_dim)
    positions = np.random.default_rng(tokens).integers(0, 200, tokens).astype(np.int32)
    cos, sin = tables(size)
    out = machine.put(x)
    machine.run("rope", out, heads, machine.put(positions), machine.put(cos), machine.put(sin))
    expected = rotated(x.reshape(tokens, heads, head_dim), positions, size)
    actual = machine.get(out).reshape(expected.shape)
    assert_close(actual, expected)
    assert_array_equal(actual[..., size:], x.reshape(expected.shape)[..., size:])


class Cache:
    """Pages in a shuffled order, poisoned, for a step's sequences."""

    def __init__(self, step: list[tuple[int, int]], kv_heads: int, head_dim: int, dtype: str) -> None:
        self.sequences, self.positions = np.array(step, np.int32).T.copy()
        self.count = int(self.sequences.max()) + 1
        per_sequence = int(self.positions.max()) // PAGE + 1
        order = np.random.default_rng(24).permutation(self.count * per_sequence + 3)  # three pages are no one's
        self.table = order[: self.count * per_sequence].reshape(self.count, per_sequence).astype(np.int32)
        self.empty = poison((len(order), kv_heads, PAGE, head_dim), np.dtype(dtype))

    def slots(self, sequences: np.ndarray, positions: np.ndarray) -> tuple:
        """Indices of [page, kv_head, slot] that give [T, kv_heads, d]."""
        return self.table[sequences, positions // PAGE], slice(None), positions % PAGE

    def seen(self, window: int) -> list[range]:
        """The positions that the tokens of each sequence see."""
        found = []
        for s in range(self.count):
            positions = self.positions[self.sequences == s]
            first = int(positions.min(initial=999)) + 1 - window if window else 0
            found.append(range(max(0, first), int(positions.max(initial=0)) + 1))
        return found

    def filled(self, history: list[np.ndarray], seen: list[range] | None = None) -> np.ndarray:
        """Pages that hold history[s] [length, kv_heads, d] of each sequence, from the page where seen[s] starts on; all
        other slots stay poisoned."""
        pages = self.empty.copy()
        for s, rows in enumerate(history):
            positions = np.arange(seen[s].start // PAGE * PAGE if seen else 0, len(rows))
            pages[self.slots(np.full(len(positions), s), positions)] = rows[positions]
        return pages


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("step", list(STEPS))
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_attention(machine: Machine, heads: int, kv_heads: int, head_dim: int, step: str, dtype: str) -> None:
    check_attention(machine, heads, kv_heads, head_dim, STEPS[step], dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("window", [1, 5, 64, 90])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 16), (2, 1, 80)])
@pytest.mark.parametrize(
    "step",
    [
        [(0, 0)],
        [(0, 3), (1, 64), (2, 130), (3, 199)],  # one token each: decode
        [(0, p) for p in range(100)],
        [(0, p) for p in range(118, 150)],  # the first pages are out of reach
        [*((0, p) for p in range(190, 196)), (1, 63), (1, 0), *((2, p) for p in range(66, 70))],
    ],
    ids=["first", "decode", "prefill", "chunk", "batch"],
)
def test_attention_window(
    machine: Machine, heads: int, kv_heads: int, head_dim: int, step: list, window: int, dtype: str
) -> None:
    check_attention(machine, heads, kv_heads, head_dim, step, dtype, window)


def check_attention(
    machine: Machine, heads: int, kv_heads: int, head_dim: int, step: list, dtype: str, window: int = 0
) -> None:
    """The operator against the reference. Pages that no token of a sequence sees stay poisoned."""
    cache = Cache(step, kv_heads, head_dim, dtype)
    seen = cache.seen(window)
    rng = np.random.default_rng(head_dim)
    # rounded to the cache's type first, so that the reference sees the same keys and values
    keys, values = ([rng.standard_normal((r.stop, kv_heads, head_dim)).astype(dtype) for r in seen] for _ in range(2))
    tokens, width = len(cache.positions), heads * head_dim
    qkv = poison((tokens, (heads + 2 * kv_heads) * head_dim), np.float32)  # only q's columns are read
    qkv[:, :width] = 2 * normal(25, tokens, width)
    scale = 1 / np.sqrt(head_dim)
    arguments = (
        *(machine.put(qkv), heads, scale, window, machine.put(cache.positions), machine.put(cache.sequences)),
        *(machine.put(cache.filled(keys, seen)), machine.put(cache.filled(values, seen)), machine.put(cache.table)),
    )
    q = qkv[:, :width].reshape(tokens, heads, head_dim)
    expected = reference.attention(q, keys, values, cache.sequences, cache.positions, window=window)
    expected = expected.reshape(tokens, width)
    out = machine.out(tokens, width)
    machine.run("attention", *arguments, out)
    # A mean of values: errors are relative to the largest value, and a score of size s adds s * 2^-24 through e^s.
    # The GPU's tensor cores, for many tokens, take queries and weights in float16.
    largest = max(np.abs(v.astype(np.float64)).max() for v in values)
    halves = machine.ops.device.kind == "cuda" and dtype == "float16" and (tokens > 64 or head_dim not in (32, 64, 128))
    assert_within(machine.get(out), expected, (2e-3 if halves else 2e-6) * largest)

    for group in [g for g in (32, 64, 128) if width % g == 0]:
        rows = machine.rows(tokens, width, group, planes=1 + tokens % 2)
        machine.run("attention", *arguments, rows)
        assert_quantizes(machine, rows, machine.get(out), relative=1e-6)


def test_attention_with_scores_far_apart(machine: Machine) -> None:
    """One key wins by more than float32's e^x reaches, on the last page or the first: its value comes out."""
    cache = Cache([(0, 129), (1, 129)], 1, 16, "float32")
    q = np.zeros((2, 48), np.float32)
    q[:, 0] = 1000
    keys = [np.zeros((130, 1, 16), np.float32) for _ in range(2)]
    keys[0][129, 0, 0] = keys[1][3, 0, 0] = 1
    values = [normal(s, 130, 1, 16) for s in range(2)]
    out = machine.out(2, 16)
    pages = [machine.put(cache.filled(rows)) for rows in (keys, values)]
    indices = [machine.put(a) for a in (cache.positions, cache.sequences)]
    machine.run("attention", machine.put(q), 1, 1.0, 0, *indices, *pages, machine.put(cache.table), out)
    assert_array_equal(machine.get(out), np.stack([values[0][129, 0], values[1][3, 0]]))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("form", ["rope", "rope and norms", "norms only", "neither", "partial"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_rope_and_store(machine: Machine, heads: int, kv_heads: int, head_dim: int, form: str, dtype: str) -> None:
    step = [*STEPS["page boundaries in one batch"], *((7, p) for p in (66, 61, 63, 64, 62, 65))]
    cache = Cache(step, kv_heads, head_dim, dtype)
    tokens, all_heads = len(step), heads + 2 * kv_heads
    qkv = normal(26, tokens, all_heads * head_dim)
    size = {"rope": head_dim, "rope and norms": head_dim, "partial": head_dim // 4 * 2}.get(form, 0)
    norms = [1 + 0.1 * normal(27 + i, head_dim) for i in range(2)] if "norms" in form else [None, None]
    cos, sin = map(machine.put, tables(size)) if size else (None, None)
    k_pages, v_pages = machine.put(cache.empty), machine.put(cache.empty)
    device = machine.put(qkv)
    machine.run(
        "rope_and_store",
        *(device, heads, *(None if n is None else machine.put(n) for n in norms), 1e-5),
        *(machine.put(cache.positions), machine.put(cache.sequences), cos, sin),
        *(k_pages, v_pages, machine.put(cache.table)),
    )
    split = qkv.reshape(tokens, all_heads, head_dim)
    q, k = split[:, :heads].astype(np.float64), split[:, heads : heads + kv_heads].astype(np.float64)
    v = split[:, heads + kv_heads :]
    if norms[0] is not None:
        q, k = reference.rmsnorm(q, norms[0], 1e-5), reference.rmsnorm(k, norms[1], 1e-5)
    if size:
        q, k = rotated(q, cache.positions, size), rotated(k, cache.positions, size)
    actual_q = machine.get(device).reshape(split.shape)[:, :heads]
    slots = cache.slots(cache.sequences, cache.positions)
    stored_k, stored_v = machine.get(k_pages), machine.get(v_pages)
    assert_close(actual_q, q)
    assert_array_equal(stored_v[slots], v.astype(dtype))
    # float32 arithmetic, then one rounding to float16: half of 2^-10, or of 2^-24 for a subnormal
    largest = np.abs(k).max(axis=-1, keepdims=True)
    rounding = 2.0**-11 * np.abs(k) + 2.0**-25 if dtype == "float16" else 0
    assert_within(stored_k[slots].astype(np.float64), k, 1.001e-6 * largest + rounding)
    if form == "neither":
        assert_array_equal(actual_q, split[:, :heads])
        assert_array_equal(stored_k[slots], split[:, heads : heads + kv_heads].astype(dtype))
    for stored in (stored_k, stored_v):  # nothing else was written
        stored[slots] = poison((1,), np.dtype(dtype))
        assert (stored.view(np.uint8) == 0xFF).all()


def test_float16_store_rounds_to_nearest_even_and_saturates(machine: Machine) -> None:
    rng = np.random.default_rng(28)
    every = np.arange(0x7BFF, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (every[:-1] + every[1:]) / 2  # exact in float32
    values = np.concatenate([every, ties, np.nextafter(ties, 0), np.nextafter(ties, np.float32(np.inf))])
    values = np.concatenate([values, -values, [65519, 65520, 1e6, 3e38, -65520, -3e38, np.inf, -np.inf]])
    values = np.concatenate([values, rng.uniform(-1, 1, -len(values) % 128)]).astype(np.float32)
    rows = values.reshape(-1, 1, 128)
    cache = Cache([(0, p) for p in range(len(rows))], 1, 128, "float16")
    qkv = np.repeat(rows, 3, axis=1).reshape(len(rows), 384)
    pages = [machine.put(cache.empty), machine.put(cache.empty)]
    indices = [machine.put(a) for a in (cache.positions, cache.sequences)]
    machine.run(
        *("rope_and_store", machine.put(qkv), 1, None, None, 1e-5, *indices, None, None),
        *(*pages, machine.put(cache.table)),
    )
    expected = np.clip(rows, -65504, 65504).astype(np.float16)
    for stored in pages:
        assert_array_equal(machine.get(stored)[cache.slots(cache.sequences, cache.positions)], expected)
