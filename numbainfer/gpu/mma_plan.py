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
    splits: int
    tiles: int  # of the result

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory."""
        return 1024 + STAGES * (self.width * 2 * BLOCK + 16) + 2 * store_bytes(self.width) + 16


def blocks_together(width: int, subtiles: int) -> int:
    """How many blocks of a kernel a multiprocessor has room for: two hide each other's waits."""
    return 2 if subtiles == 1 and width <= 32 else 1


# What a block costs beside its products, in the time of those of 64 columns: filling the pipeline and storing the tile;
# where columns are split, leaving partial sums and adding them up, for each part; and what products of one subtile cost
# more, as they wait for each other. Measured on an H100: tiles of 128 tokens, and of 32 (12 shapes, 1 to 16 parts).
TILE_COST, SPLIT_COST, ALONE_COST = 5.0, 5.0, 1.9
NARROW_TILE_COST, NARROW_SPLIT_COST = 11.3, 0.9


@cache
def choose(rows: int, columns: int, tokens: int, gated: bool, multiprocessors: int, wide: bool) -> Plan:
    """The plan that should take least time. wide: two subtiles are possible (sm_90)."""
    width = next((w for w in (16, 32, 64) if tokens <= w), 128)
    blocks = -(-columns // BLOCK)
    best: tuple[float, Plan] | None = None
    for subtiles in (1, 2) if wide and width == 128 else (1,):
        tile_rows = 64 * subtiles if gated else 128 * subtiles
        tiles = -(-rows // tile_rows) * -(-tokens // width)
        slots = multiprocessors * blocks_together(width, subtiles)
        for splits in range(1, max(1, min(16, blocks // 2)) + 1):
            rounds, work = -(-tiles * splits // slots), -(-blocks // splits)
            parts = splits if splits > 1 else 0
            if width < 128:
                cost = rounds * (work + NARROW_TILE_COST + NARROW_SPLIT_COST * parts)
            else:
                each = work * (1 if subtiles == 2 else ALONE_COST) + TILE_COST + SPLIT_COST * parts
                cost = rounds * subtiles / 2 * each
            if best is None or cost < best[0] * 0.97:
                best = cost, Plan(width, subtiles, splits, tiles)
    assert best is not None
    return best[1]
