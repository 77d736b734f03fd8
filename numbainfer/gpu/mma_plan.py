"""How a product on tensor cores is cut into tiles and shared among blocks (mma_kernel.py)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from numbainfer.gpu.half_rows import BLOCK
from numbainfer.gpu.tile_store import NARROW, store_bytes


def stages(width: int) -> int:
    """Tiles of so many tokens in shared memory or on their way."""
    return 5 if width == 256 else 8


@dataclass(frozen=True)
class Plan:
    """The kernel's constants, and how the work is cut."""

    width: int
    paired: bool
    splits: int
    tiles: int  # of the result; paired, an even number of rows of tiles

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory."""
        factors = 4 * self.width if self.width <= NARROW else 0
        return 1024 + stages(self.width) * (self.width * 2 * BLOCK + 16) + 2 * store_bytes(self.width) + 16 + factors


def blocks_together(width: int) -> int:
    """How many blocks of a kernel a multiprocessor has room for: two hide each other's waits."""
    return 2 if width <= 32 else 1


@dataclass(frozen=True)
class Costs:
    """What a tile costs, in the time that products of 64 columns take in one of 128 tokens: those products; filling the
    pipeline and storing the result; and for each part, where columns are split, leaving and adding up partial sums."""

    products: float
    tile: float
    part: float


COSTS = {128: Costs(1.0, 8.0, 4.0), 256: Costs(1.7, 12.0, 8.0)}
NARROW_COSTS = Costs(1.0, 11.3, 0.9)
"""By the width of tiles, and of less than 128 tokens. Measured on an H100: 12 shapes of three models, 1 to 16 parts, 32
and 128 to 2,048 tokens. Plans of clusters are 0.4% from the best on average, of single blocks for 128 tokens 1.2%."""


@cache
def choose(rows: int, columns: int, tokens: int, gated: bool, multiprocessors: int, paired: bool) -> Plan:
    """The plan that should take least time. paired: clusters are possible (int8 weights on
    sm_90)."""
    narrow = next((w for w in (16, 32, 64, 128) if tokens <= w), 128)
    blocks = -(-columns // BLOCK)
    best: tuple[float, Plan] | None = None
    paired = paired and narrow == 128
    for width in (128, 256) if paired and tokens > 128 else (narrow,):
        tiles = -(-rows // (64 if gated else 128))
        tiles = -(-tiles // 2) * 2 if paired else tiles
        tiles *= -(-tokens // width)
        costs = COSTS.get(width, NARROW_COSTS)
        slots = multiprocessors * blocks_together(width)
        for splits in range(1, max(1, min(16, blocks // 2)) + 1):
            rounds, work = -(-tiles * splits // slots), -(-blocks // splits)
            cost = rounds * (costs.products * work + costs.tile + (costs.part * splits if splits > 1 else 0))
            if best is None or cost < best[0] * 0.97:
                best = cost, Plan(width, paired, splits, tiles)
    assert best is not None
    return best[1]
