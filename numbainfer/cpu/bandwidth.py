"""The memory read bandwidth, the ceiling of decoding: measured, not looked up."""

from __future__ import annotations

import time

import numpy as np
from numpy import int32

from numbainfer.cpu.compile import kernel
from numbainfer.cpu.launch import Stream
from numbainfer.cpu.simd import advance, as_words, hsum_i32, load_i8, splat_i32

_BLOCK = 1 << 20  # bytes that a task reads


@kernel
def _read(task, worker, data, sums):
    block = advance(data, task * _BLOCK)
    s0 = s1 = s2 = s3 = splat_i32(int32(0))
    for i in range(0, _BLOCK, 256):
        s0 = s0 + as_words(load_i8(block, i))
        s1 = s1 + as_words(load_i8(block, i + 64))
        s2 = s2 + as_words(load_i8(block, i + 128))
        s3 = s3 + as_words(load_i8(block, i + 192))
    sums[task] = hsum_i32(s0 + s1 + s2 + s3)


class BandwidthProbe:
    """Reads a buffer far larger than the caches; `measure` is called in turn with what it is the ceiling of."""

    def __init__(self, stream: Stream, nbytes: int = 512 << 20) -> None:
        self._stream = stream
        self._data = np.ones(nbytes // _BLOCK * _BLOCK, np.int8)  # written, so that the pages exist
        self._sums = np.empty(nbytes // _BLOCK, np.int32)
        self.measure()  # compiles

    def measure(self) -> float:
        """Bytes per second of one pass."""
        start = time.perf_counter()
        self._stream.launch(_read, self._sums.size, self._data, self._sums)
        return self._data.nbytes / (time.perf_counter() - start)
