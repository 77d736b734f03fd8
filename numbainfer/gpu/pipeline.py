"""Moving tiles from global to shared memory while others are worked on: barriers in shared memory, and bulk copies.

A barrier (PTX: mbarrier) counts arrivals; when all that are expected have come, its phase flips and who waits for it
goes on. A stage of a pipeline has two: `full`, which the copy itself completes, and `empty`, at which its readers
arrive.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.cuda.extending import intrinsic
from numpy import int32

from numbainfer.gpu import ptx
from numbainfer.gpu.compile import device_function
from numbainfer.gpu.ptx import copy_async_16, i32, i64, instruction

_WAIT = "{{ .reg .pred p; AGAIN: mbarrier.{} p, [$0], $1; @p bra.uni DONE; bra.uni AGAIN; DONE: }}"


@intrinsic
def bulk_copies(typingctx):
    """True where the copy engine exists (sm_90 on); known when the kernel is compiled."""
    return types.boolean(), lambda context, builder, sig, args: ir.Constant(ir.IntType(1), int(ptx.target >= (9, 0)))


@instruction("mbarrier.init.shared.b64 [$0], $1;", types.void, i32, i32)
def barrier_init(barrier, arrivals):
    """A barrier in 8 bytes of shared memory; one thread does this, then the block synchronizes."""


@instruction("fence.proxy.async.shared::cta;", types.void, minimum=(9, 0))
def fence_for_copies():
    """What this thread wrote to shared memory is visible to bulk copies and wgmma from here on."""


@instruction("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [$0]; }", types.void, i32)
def barrier_arrive(barrier):
    """One arrival."""


@instruction(_WAIT.format("try_wait.parity.shared::cta.b64"), types.void, i32, i32, minimum=(9, 0))
def _try_wait(barrier, parity):
    """sm_90: sleeps for a while in the instruction."""


@instruction(_WAIT.format("test_wait.parity.shared.b64"), types.void, i32, i32)
def _test_wait(barrier, parity):
    """sm_80: polls."""


@instruction(
    "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [$1], $2; selp.b32 $0, 1, 0, p; }",
    *(i32, i32, i32),
    minimum=(9, 0),
)
def barrier_passed(barrier, parity):
    """1 if the phase of that parity is complete, else 0."""


@instruction("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", types.void, i32, i32, minimum=(9, 0))
def expect_bytes(barrier, size):
    """One arrival, and the phase waits for `size` more bytes."""


@instruction(
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
    *(types.void, i32, i64, i32, i32),
    minimum=(9, 0),
)
def copy_bulk(to, source, size, barrier):
    """Starts the copy of `size` bytes, a multiple of 16, which counts its bytes at the barrier."""


@instruction("cp.async.bulk.prefetch.L2.global [$0], $1;", types.void, i64, i32, minimum=(9, 0))
def prefetch_bulk(source, size):
    """Starts to bring `size` bytes, a multiple of 16, to the second-level cache."""


@instruction("cp.async.mbarrier.arrive.noinc.shared.b64 [$0];", types.void, i32)
def _arrive_after_copies(barrier):
    """One arrival, once the copies that this thread started are done."""


@instruction("bar.sync $0, $1;", types.void, i32, i32)
def synchronize_threads(name, threads):
    """Waits for that many threads, whole warps, at the block's barrier number `name`; 0 is syncthreads' own."""


@instruction("bar.arrive $0, $1;", types.void, i32, i32)
def arrive_threads(name, threads):
    """Counts at such a barrier as one that has come, and does not wait."""


def fewer_registers(count: int) -> Any:
    """The function with which all warps of a warpgroup keep only so many registers a thread, for others to have."""

    @instruction(f"setmaxnreg.dec.sync.aligned.u32 {count};", types.void, only=(9, 0))
    def dealt():
        """Gives registers away."""

    return dealt


def more_registers(count: int) -> Any:
    """The function with which all warps of a warpgroup take so many registers a thread, once others have given them."""

    @instruction(f"setmaxnreg.inc.sync.aligned.u32 {count};", types.void, only=(9, 0))
    def dealt():
        """Takes registers."""

    return dealt


# --- two blocks that share what they read: a cluster -----------------------------------------------------------------


@instruction("mov.u32 $0, %cluster_ctarank;", i32, effects=False, minimum=(9, 0))
def rank_in_cluster():
    """Which block of its cluster this is."""


@instruction("fence.mbarrier_init.release.cluster;", types.void, minimum=(9, 0))
def fence_for_cluster():
    """Barriers that this thread made are seen by the cluster's other blocks after `synchronize_cluster`."""


@instruction(
    "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;", types.void, minimum=(9, 0)
)
def synchronize_cluster():
    """Waits for all threads of the cluster's blocks that have not ended."""


@instruction(
    "{ .reg .b32 there; mapa.shared::cluster.u32 there, $0, $1; mbarrier.arrive.shared::cluster.b64 _, [there]; }",
    *(types.void, i32, i32),
    minimum=(9, 0),
)
def barrier_arrive_at(barrier, rank):
    """One arrival at the same barrier of the cluster's block `rank`."""


@instruction(
    "{ .reg .b16 both; mov.b16 both, 3; cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    ".multicast::cluster [$0], [$1], $2, [$3], both; }",
    *(types.void, i32, i64, i32, i32),
    minimum=(9, 0),
)
def copy_bulk_to_both(to, source, size, barrier):
    """copy_bulk to the same place in both blocks of a cluster of two, each counting the bytes at its own barrier."""


@device_function
def barrier_wait(barrier, parity):
    """Waits until the phase of that parity is complete. A new barrier counts as complete in phase 1."""
    if bulk_copies():
        _try_wait(barrier, parity)
    else:
        _test_wait(barrier, parity)


@device_function
def fetch(to, source, size, barrier, lane):
    """By a warp: starts the copy of `size` contiguous bytes, a multiple of 16, for a barrier of `fetch_arrivals()`."""
    if bulk_copies():
        if lane == 0:
            expect_bytes(barrier, size)
            copy_bulk(to, source, size, barrier)
    else:
        for offset in range(16 * lane, size, 16 * 32):
            copy_async_16(to + offset, source + offset)
        _arrive_after_copies(barrier)


@device_function
def fetch_half(to, source, size, barrier, rank, lane):
    """`fetch` by the warps of both blocks of a cluster together: each brings half to both."""
    if lane == 0:
        half = size >> 1
        expect_bytes(barrier, size)
        copy_bulk_to_both(int32(to + rank * half), source + rank * half, half, barrier)


@device_function
def fetch_arrivals():
    """How many arrivals a `fetch` makes: one, or one of each lane where there is no copy engine."""
    return 1 if bulk_copies() else 32
