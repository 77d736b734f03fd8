"""How a product on tensor cores is cut into tiles and shared among blocks (linear_mma.py)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from numbainfer.gpu.half_rows import BLOCK
from numbainfer.gpu.tile_store import store_bytes

STAGES = 8
"""Tiles of tokens in shared memory or on their way."""


@dataclass(frozen=True)
class Plan:
    """The kernel's constants, and how the work is cut."""

    width: int
    subtiles: int
    depth: int
    splits: int
    tiles: int  # of the result

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory."""
        return 1024 + STAGES * (self.width * 2 * BLOCK + 16) + 2 * store_bytes(self.width) + 16


# What a block costs beside its products, in the time of those of 64 columns of 256 rows and 128 tokens: filling the
# pipeline and storing the tile; where columns are split, leaving partial sums and adding them up; and what products of
# one subtile cost more, as they wait for each other. Measured on an H100, but for the last.
TILE_COST, SPLIT_COST, ALONE_COST = 5.0, 5.0, 1.9


@cache
def choose(rows: int, columns: int, tokens: int, gated: bool, multiprocessors: int, wide: bool) -> Plan:
    """The plan that should take least time. wide: two subtiles are possible (sm_90)."""
    width = next((w for w in (16, 32, 64) if tokens <= w), 128)
    blocks = -(-columns // BLOCK)
    best: tuple[float, Plan] | None = None
    for subtiles in (1, 2) if wide and width == 128 else (1,):
        tile_rows = 64 * subtiles if gated else 128 * subtiles
        tiles = -(-rows // tile_rows) * -(-tokens // width)
        share = subtiles / 2 * max(width, 64) / 128  # of the time of a whole tile
        slots = multiprocessors * (2 if width <= 32 else 1)
        for splits in range(1, max(1, min(16, blocks // 2)) + 1):
            rounds = -(-tiles * splits // slots)
            work = -(-blocks // splits) * share * (1 if subtiles == 2 else ALONE_COST)
            cost = rounds * (work + share * (TILE_COST + (SPLIT_COST * splits if splits > 1 else 0)))
            depth = {16: 2, 32: 1 if gated else 2, 64: 4, 128: 1}[width]
            if best is None or cost < best[0] * 0.97:
                best = cost, Plan(width, subtiles, depth, splits, tiles)
    assert best is not None
    return best[1]
