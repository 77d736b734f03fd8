"""How models are cut for the kernel that runs one token (token_plan.py): shares, slots and what fits."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the gpu extra is not installed")

import simt
from building import Checkpoints, build_model, source_weights
from conftest import operators
from emulated_token import MEMORY_RATE, SHARED_MEMORY, Emulated
from numba import cuda
from numpy import int32
from tiny_models import TOKEN_CONFIGS

from numbainfer.gpu.attention_core import KEYS
from numbainfer.gpu.compile import kernel
from numbainfer.gpu.token_plan import (
    AREAS,
    IN_FLIGHT,
    WARPS,
    Shape,
    cut,
    longest_way,
    make_plan,
    slot_size,
    slots_of,
)
from numbainfer.gpu.token_step import TokenStep, block_shares
from numbainfer.gpu.token_weights import make_share
from numbainfer.kv_cache import PAGE
from numbainfer.quantization import GROUPS


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
            assert plan.area % 16 == plan.shapes % 16 == plan.role % 16 == plan.squares % 16 == 0
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
