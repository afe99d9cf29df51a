"""Which kernel variant and which schedule serve a problem: plain functions of shapes, testable without a GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

__all__ = ["DenseDecodeConfig", "dense_decode_config"]

ROWS = 64  # query rows of a CTA
TILE = 128  # tokens in a tile of the plan

# Microseconds that a CTA takes for a tile of 128 tokens: its matrix multiplies, alone or with K shared by a cluster of
# two, and reading the tile's KV from HBM when every SM reads its own.
COMPUTE_ALONE = 2.55
COMPUTE_CLUSTER = 2.4
READ = 4.4


@dataclass(frozen=True)
class DenseDecodeConfig:
    """How dense decode is laid out on a GPU."""

    cluster: int  # CTAs that share K by multicast
    row_tiles: int  # CTAs of a worker: tiles of 64 packed query rows taken side by side
    passes: int  # turns a worker takes over the rows of a request and KV head
    num_workers: int
    fixed_cost: int  # of starting a piece, in tiles
    min_cost: int  # range of the plan that is worth a worker, in tiles

    @property
    def unit_rows(self) -> int:
        """Rows of a unit of the plan."""
        return self.row_tiles * ROWS


@functools.cache
def dense_decode_config(rows: int, num_sms: int) -> DenseDecodeConfig:
    """The layout for `rows` packed query rows (query tokens x heads) of each request and KV head.

    More CTAs that take different rows of a unit side by side read its KV from HBM once; fewer leave fewer SMs idle.
    """
    tiles = -(-rows // ROWS)

    def cost(row_tiles: int) -> tuple[float, int]:
        passes = -(-tiles // row_tiles)
        busy = tiles / (passes * row_tiles) * (num_sms // row_tiles * row_tiles) / num_sms
        compute = COMPUTE_CLUSTER if row_tiles % 2 == 0 else COMPUTE_ALONE
        return max(compute, READ / row_tiles) / busy, passes

    row_tiles = min(range(1, min(tiles, num_sms) + 1), key=cost)
    return DenseDecodeConfig(
        cluster=2 if row_tiles % 2 == 0 else 1,
        row_tiles=row_tiles,
        passes=-(-tiles // row_tiles),
        num_workers=num_sms // row_tiles,
        fixed_cost=4,
        min_cost=1,
    )
