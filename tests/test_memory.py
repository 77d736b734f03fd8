"""MemoryPool: what it hands out, what it takes back, and what it counts."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest

from numbainfer.errors import NumbaInferError
from numbainfer.memory import ALIGNMENT, HostAllocator, MemoryPool, PoolStatistics, size_class


class LimitedAllocator(HostAllocator):
    """Host memory that ends: `limit` bytes in all."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0

    def allocate(self, nbytes: int) -> np.ndarray:
        if self.used + nbytes > self.limit:
            raise MemoryError
        self.used += nbytes
        return super().allocate(nbytes)


@pytest.mark.parametrize("dtype", [np.int8, np.float16, np.float32, np.int64])
@pytest.mark.parametrize("shape", [(), 1, 63, (3, 5), (2, 3, 7), (1000, 33)])
def test_arrays_are_what_was_asked_for(shape: Any, dtype: Any) -> None:
    pool = MemoryPool()
    for array in (pool.empty(shape, dtype), pool.zeros(shape, dtype)):
        assert array.shape == ((shape,) if isinstance(shape, int) else shape)
        assert array.dtype == dtype
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert array.ctypes.data % ALIGNMENT == 0


def test_zeros_clears_a_reused_block() -> None:
    pool = MemoryPool()
    dirty = pool.empty(100, np.float32)
    dirty[...] = 7
    pool.release(dirty)
    assert not pool.zeros(100, np.float32).any()
    assert pool.statistics.reuses == 1


def test_live_arrays_do_not_overlap() -> None:
    pool = MemoryPool()
    rng = np.random.default_rng(0)
    live: list[tuple[np.ndarray, int]] = []
    for mark in range(500):
        array = pool.empty(int(rng.integers(0, 3000)), np.int32)
        array[...] = mark
        live.append((array, mark))
        if mark % 3 == 2:
            released, _ = live.pop(int(rng.integers(len(live))))
            pool.release(released)
    assert all((array == mark).all() for array, mark in live)
    assert pool.statistics.reuses > 50


def test_negative_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        MemoryPool().empty((3, -1), np.float32)


def test_size_classes() -> None:
    sizes = [size_class(n) for n in range(1, 70000)]
    assert sizes[0] == sizes[255] == 256
    assert size_class(0) == 256
    assert sizes == sorted(sizes)
    assert all(n <= size for n, size in enumerate(sizes, 1))
    assert all(size <= 1.25 * n for n, size in enumerate(sizes, 1) if n > 256)
    assert all(size % ALIGNMENT == 0 and size_class(size) == size for size in set(sizes))
    assert [s for s in sorted(set(sizes)) if 1024 <= s <= 2048] == [1024, 1280, 1536, 1792, 2048]
    assert size_class(2**40 + 1) == 2**40 + 2**38


def test_reuse_is_within_a_size_class() -> None:
    pool = MemoryPool()
    small, large = pool.empty(300, np.int8), pool.empty(3000, np.int8)
    small_at, large_at = small.ctypes.data, large.ctypes.data
    pool.release(small)
    pool.release(large)
    assert pool.empty((70, 10), np.float32).ctypes.data == large_at  # 2800 and 3000 bytes: both 3072
    assert pool.empty(310, np.int8).ctypes.data == small_at
    assert pool.empty(310, np.int8).ctypes.data not in (small_at, large_at)
    assert (pool.statistics.allocations, pool.statistics.reuses) == (3, 2)


def test_statistics() -> None:
    pool = MemoryPool()
    a, b = pool.empty(1024, np.int8), pool.empty(256, np.float32)
    assert pool.statistics == PoolStatistics(2048, 2048, 2048, allocations=2, reuses=0)
    pool.release(a)
    assert pool.statistics == PoolStatistics(1024, 2048, 2048, allocations=2, reuses=0)
    c = pool.empty(1000, np.int8)  # reuses a's block
    assert pool.statistics == PoolStatistics(2048, 2048, 2048, allocations=2, reuses=1)
    pool.release(b)
    pool.release(c)
    d = pool.empty(2048, np.int8)
    assert pool.statistics == PoolStatistics(2048, 4096, 2048, allocations=3, reuses=1)
    pool.release(d)
    assert pool.statistics == PoolStatistics(0, 4096, 2048, allocations=3, reuses=1)


def test_trim_gives_back_only_what_is_free() -> None:
    pool = MemoryPool()
    kept, freed = pool.empty(1024, np.int8), pool.empty(1024, np.int8)
    kept[...] = 5
    pool.release(freed)
    pool.trim()
    assert pool.statistics == PoolStatistics(1024, 1024, 2048, allocations=2, reuses=0)
    pool.empty(1024, np.int8)[...] = 6
    assert pool.statistics.allocations == 3
    assert (kept == 5).all()
    pool.release(kept)
    assert pool.statistics.in_use == 1024


def test_zero_size_arrays_are_arrays_of_their_own() -> None:
    pool = MemoryPool()
    arrays = [pool.empty(shape, np.float32) for shape in (0, (0, 5), (5, 0), 0)]
    assert [a.shape for a in arrays] == [(0,), (0, 5), (5, 0), (0,)]
    other = pool.empty(10, np.float32)
    for array in arrays:
        pool.release(array)
    for array in arrays:
        with pytest.raises(ValueError, match="not the pool's"):
            pool.release(array)
    assert pool.statistics.in_use == size_class(40)
    pool.release(other)
    assert pool.statistics.in_use == 0


def test_what_the_pool_does_not_take_back() -> None:
    pool = MemoryPool()
    array = pool.empty((4, 8), np.float32)
    foreign = [np.empty((4, 8), np.float32), MemoryPool().empty((4, 8), np.float32)]
    views = [array[1:], array[:1], array[:], array.reshape(-1), array.view(np.int32), array.T]
    for wrong in (*foreign, *views):
        with pytest.raises(ValueError, match="not the pool's"):
            pool.release(wrong)
    assert pool.statistics.in_use == 256
    pool.release(array)
    with pytest.raises(ValueError, match="released before"):
        pool.release(array)
    assert pool.statistics.in_use == 0


def test_a_second_release_does_not_free_the_next_owner() -> None:
    """The block of a released array serves another; releasing the first once more must not touch that."""
    pool = MemoryPool()
    first = pool.empty(100, np.float32)
    pool.release(first)
    second = pool.empty(100, np.float32)
    assert second.ctypes.data == first.ctypes.data
    with pytest.raises(ValueError, match="released before"):
        pool.release(first)
    third = pool.empty(100, np.float32)
    assert third.ctypes.data != second.ctypes.data


def test_arrays_stay_the_pools_when_the_caller_drops_them() -> None:
    """A dropped array's block is lost until the pool goes, but its id can't be mistaken for another's."""
    pool = MemoryPool()
    for _ in range(10):
        pool.empty(100, np.float32)
    assert pool.statistics.in_use == 10 * size_class(400)
    for _ in range(100):
        with pytest.raises(ValueError, match="not the pool's"):
            pool.release(np.empty(100, np.float32))


def test_out_of_memory_says_what_to_do() -> None:
    pool = MemoryPool(LimitedAllocator(10 << 20))
    held = pool.empty(8 << 20, np.int8)
    with pytest.raises(NumbaInferError, match=r"asked for 4 MiB with 8 MiB in use; lower --ctx-size") as failure:
        pool.empty(4 << 20, np.int8)
    assert "\n" not in str(failure.value)
    assert failure.value.__cause__ is None
    assert pool.statistics == PoolStatistics(8 << 20, 8 << 20, 8 << 20, allocations=1, reuses=0)
    pool.release(held)
    assert pool.empty(8 << 20, np.int8).nbytes == 8 << 20  # the pool still works


def test_out_of_memory_first_gives_kept_blocks_back() -> None:
    """The second block fits only once the first, released but kept by the pool, went back to the system."""

    class OneBlock(HostAllocator):
        block: weakref.ref | None = None

        def allocate(self, nbytes: int) -> np.ndarray:
            if self.block is not None and self.block() is not None:
                raise MemoryError
            block = super().allocate(nbytes)
            self.block = weakref.ref(block)
            return block

    pool = MemoryPool(OneBlock())
    first = pool.empty(1024, np.int8)
    pool.release(first)
    del first  # a view, which would keep the block alive
    assert pool.empty(4096, np.int8).nbytes == 4096
    assert pool.statistics == PoolStatistics(4096, 4096, 4096, allocations=2, reuses=0)


def test_a_request_beyond_any_machine() -> None:
    with pytest.raises(NumbaInferError, match="out of memory"):
        MemoryPool().empty((1 << 40, 1 << 20), np.float32)
    with pytest.raises(NumbaInferError, match="out of memory"):
        MemoryPool().empty((1 << 40, 1 << 40), np.float32)  # more than an address
