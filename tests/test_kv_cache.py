"""The KV cache's accounts: which page belongs to whom, and what is left."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models

from numbainfer.config import ModelConfig
from numbainfer.errors import NumbaInferError
from numbainfer.kv_cache import PAGE, KVCache, Sequence
from numbainfer.memory import MemoryPool

CONFIG = ModelConfig.from_dict(tiny_models.hf_config("qwen3_tied"))
CTX = 2 * PAGE + 10  # three pages, the last of them not whole


@pytest.fixture
def cache() -> KVCache:
    return KVCache(MemoryPool(), CONFIG, CTX, sequences=3)


def grow(cache: KVCache, sequence: Sequence, count: int) -> None:
    cache.append(sequence, list(range(len(sequence), len(sequence) + count)))


def assert_consistent(cache: KVCache, *sequences: Sequence) -> None:
    """Every page has one owner or is free, and the page table says what the sequences say."""
    owned = [page for sequence in sequences for page in sequence.pages]
    assert sorted(owned + cache._free_pages) == list(range(len(cache.k_pages[0])))
    assert len({sequence.row for sequence in sequences}) == len(sequences)
    for sequence in sequences:
        assert len(sequence.pages) == -(-len(sequence) // PAGE)
        assert cache.page_table[sequence.row, : len(sequence.pages)].tolist() == sequence.pages
        assert sequence.tokens == list(range(len(sequence)))


def test_shapes(cache: KVCache) -> None:
    pages = (9, CONFIG.kv_heads, PAGE, CONFIG.head_dim)
    assert [a.shape for a in (*cache.k_pages, *cache.v_pages)] == [pages] * 2 * CONFIG.layers
    assert cache.page_table.shape == (3, 3)
    assert cache.nbytes == 2 * CONFIG.layers * int(np.prod(pages)) * 2  # float16


def test_pages_come_and_go(cache: KVCache) -> None:
    first, second = cache.add_sequence(), cache.add_sequence()
    for count in (1, PAGE - 1, 1, 30, 0, 33, 7):
        for sequence in (first, second):
            grow(cache, sequence, count)
            assert_consistent(cache, first, second)
    assert len(first) == CTX - 3
    for length in (CTX, 2 * PAGE + 1, 2 * PAGE, PAGE + 1, PAGE, 1, 0):
        cache.truncate(first, length)
        assert len(first) == min(length, CTX - 3)
        assert_consistent(cache, first, second)
    grow(cache, first, CTX)
    assert_consistent(cache, first, second)


def test_truncation_gives_pages_to_whoever_needs_them(cache: KVCache) -> None:
    rng = np.random.default_rng(0)
    sequences = [cache.add_sequence() for _ in range(3)]
    for _ in range(300):
        sequence = sequences[rng.integers(3)]
        cache.truncate(sequence, int(rng.integers(len(sequence) + 1)))
        grow(cache, sequence, int(rng.integers(CTX - len(sequence) + 1)))
        assert_consistent(cache, *sequences)


def test_the_context_ends(cache: KVCache) -> None:
    sequence = cache.add_sequence()
    grow(cache, sequence, CTX)
    for _ in range(2):
        with pytest.raises(NumbaInferError, match=rf"{CTX + 1} tokens do not fit the context of {CTX}; raise"):
            grow(cache, sequence, 1)
        assert_consistent(cache, sequence)  # nothing changed
    other = cache.add_sequence()
    with pytest.raises(NumbaInferError, match=f"{CTX + 1} tokens"):
        grow(cache, other, CTX + 1)
    assert other.pages == []


def test_rows_are_given_out_once(cache: KVCache) -> None:
    sequences = [cache.add_sequence() for _ in range(3)]
    assert_consistent(cache, *sequences)
    with pytest.raises(NumbaInferError, match="3 sequences, all in use"):
        cache.add_sequence()
    grow(cache, sequences[1], 100)
    cache.remove(sequences[1])
    assert_consistent(cache, sequences[0], sequences[2])
    with pytest.raises(ValueError, match="removed before"):
        cache.remove(sequences[1])
    again = cache.add_sequence()
    assert again.row == sequences[1].row
    assert_consistent(cache, sequences[0], again, sequences[2])


def test_memory_goes_back_to_the_pool() -> None:
    pool = MemoryPool()
    for _ in range(2):
        cache = KVCache(pool, CONFIG, CTX)
        assert pool.statistics.in_use >= cache.nbytes
        cache.release()
        assert pool.statistics.in_use == 0
    assert pool.statistics.reuses == pool.statistics.allocations
