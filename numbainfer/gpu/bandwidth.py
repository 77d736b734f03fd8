"""The memory read bandwidth, the ceiling of decoding: measured, not looked up."""

from __future__ import annotations

import numpy as np
from numba import cuda
from numpy import int32, int64

from numbainfer.gpu.compile import kernel
from numbainfer.gpu.driver import check
from numbainfer.gpu.launch import Stream
from numbainfer.gpu.memory import Block, DeviceArray
from numbainfer.gpu.ptx import address, let_next_kernel_start, load_weights, wait_for_previous_kernel

THREADS = 512
_PASSES = 4  # over the buffer in one measurement: starting and ending a kernel then count little


@kernel("i8p i64 i32p", threads=THREADS, blocks=2, hot=True)
def _read(data, pieces, sums):
    # Four loads of 16 bytes per thread in flight, and the next four asked for before these are added.
    wait_for_previous_kernel()
    let_next_kernel_start()
    total = int32(0)
    step = int64(cuda.gridDim.x) * THREADS
    base = address(data)
    for i in range(int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x, pieces, 4 * step):
        a = load_weights(base + 16 * i)
        b = load_weights(base + 16 * min(i + step, pieces - 1))
        c = load_weights(base + 16 * min(i + 2 * step, pieces - 1))
        d = load_weights(base + 16 * min(i + 3 * step, pieces - 1))
        for j in range(4):
            total += (a[j] ^ b[j]) + (c[j] ^ d[j])
    if total == int32(0x12345678):  # as good as never: nothing but the reads costs time
        sums[0] = total


class BandwidthProbe:
    """Reads a buffer far larger than the caches; `measure` is called in turn with what it is the ceiling of."""

    def __init__(self, stream: Stream, nbytes: int = 2 << 30) -> None:
        self._stream = stream
        nbytes = min(nbytes, stream.gpu.free_memory() // 2 // 16 * 16)
        block, sums = Block(nbytes), Block(256)
        self._data = DeviceArray(block, block.pointer, (nbytes,), np.dtype(np.int8), stream.copier)
        self._sums = DeviceArray(sums, sums.pointer, (64,), np.dtype(np.int32), stream.copier)
        check(stream.driver.cuMemsetD8(block.pointer, 1, nbytes))
        self._events = [check(stream.driver.cuEventCreate(0)) for _ in range(2)]
        self.measure()

    def measure(self) -> float:
        """Bytes per second of reading the buffer."""
        stream, (start, end) = self._stream, self._events
        stream.flush()
        check(stream.driver.cuEventRecord(start, stream.handle))
        for _ in range(_PASSES):
            grid = 2 * stream.gpu.multiprocessors
            stream.launch(_read, grid, self._data, self._data.nbytes // 16, self._sums)
        check(stream.driver.cuEventRecord(end, stream.handle))
        check(stream.driver.cuEventSynchronize(end))
        milliseconds = check(stream.driver.cuEventElapsedTime(start, end))
        return _PASSES * self._data.nbytes / (milliseconds / 1000)
