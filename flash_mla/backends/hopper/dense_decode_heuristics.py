"""Which kernel variant and which schedule serve a problem: plain functions of shapes, testable without a GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

__all__ = [
    "BOXES",
    "CUT_COST",
    "FIXED_COST",
    "DenseDecodeConfig",
    "box_of_pages",
    "dense_decode_config",
    "even_workers",
    "gathers",
]

ROWS = 64  # query rows of a CTA
BLOCK = 64  # tokens in a KV block
TILE = 2 * BLOCK  # tokens in a tile of the plan
FEW_ROWS = (16, 32)  # what few query rows are padded to
BOXES = (BLOCK, 8)  # tokens that one TMA load may bring, all from one page

# Microseconds that a CTA takes for a tile of 128 tokens: its matrix multiplies, alone or with K shared by a cluster of
# two, and reading the tile's KV from HBM when every SM reads its own.
COMPUTE_ALONE = 2.55
COMPUTE_CLUSTER = 2.4
READ = 4.4

# Parts of the SMs that suffice: to draw all of HBM's bandwidth, with few units of few rows, or to compute units kept
# whole as fast as all would compute and merge pieces of them.
LEAST_BUSY, LEAST_BUSY_WITH_FEW_ROWS, LEAST_BUSY_WITH_UNITS = 0.9, 0.95, 0.96

# In tiles: what starting a piece costs, and what cutting units otherwise than alike adds to an equal share of them.
FIXED_COST = 2
CUT_COST = 4

# How much more than an equal share pieces may be where each unit has workers of its own, in quarters of a tile. With
# few rows, whose pieces start in little time, none has.
SLACK = 3


@dataclass(frozen=True)
class DenseDecodeConfig:
    """How dense decode is laid out on a GPU."""

    swapped: bool  # tokens are the rows of products, and query rows, which are few, their columns
    rows: int  # packed query rows of a CTA
    tile: int  # tokens in a tile of the plan
    box: int  # tokens that one TMA load brings
    cluster: int  # CTAs that share K by multicast
    row_tiles: int  # CTAs of a worker: tiles of query rows taken side by side
    passes: int  # turns a worker takes over the rows of a request and KV head
    num_workers: int
    even_workers: int  # that are used where the device finds units of equal length
    min_cost: int  # range of the plan that is worth a worker, in tiles
    slack: int  # of the pieces of units that have workers of their own, in quarters of a tile

    @property
    def unit_rows(self) -> int:
        """Rows of a unit of the plan."""
        return self.row_tiles * self.rows


@functools.cache
def dense_decode_config(rows: int, num_pairs: int, num_sms: int, box: int = BLOCK) -> DenseDecodeConfig:
    """The layout for `rows` packed query rows (query tokens x heads) of each of `num_pairs` (request, KV head).

    More CTAs that take different rows of a unit side by side read its KV from HBM once; fewer leave fewer SMs idle.
    """
    few = next((padded for padded in FEW_ROWS if rows <= padded), None)
    if few is not None and box == BLOCK:  # no other box is compiled for few rows
        return DenseDecodeConfig(
            swapped=True,
            rows=few,
            tile=BLOCK,
            box=box,
            cluster=1,
            row_tiles=1,
            passes=1,
            **_workers(num_pairs, num_sms, LEAST_BUSY_WITH_FEW_ROWS, LEAST_BUSY),
            min_cost=2,
            slack=0,
        )
    tiles = -(-rows // ROWS)

    def cost(row_tiles: int) -> tuple[float, int]:
        passes = -(-tiles // row_tiles)
        busy = tiles / (passes * row_tiles) * (num_sms // row_tiles * row_tiles) / num_sms
        compute = COMPUTE_CLUSTER if row_tiles % 2 == 0 else COMPUTE_ALONE
        return max(compute, READ / row_tiles) / busy, passes

    row_tiles = min(range(1, min(tiles, num_sms) + 1), key=cost)
    passes = -(-tiles // row_tiles)
    units, num_workers = num_pairs * passes, num_sms // row_tiles
    return DenseDecodeConfig(
        swapped=False,
        rows=ROWS,
        tile=TILE,
        box=box,
        cluster=2 if row_tiles % 2 == 0 else 1,
        row_tiles=row_tiles,
        passes=passes,
        **_workers(units, num_workers, LEAST_BUSY, LEAST_BUSY if row_tiles == 1 else LEAST_BUSY_WITH_UNITS),
        min_cost=1,
        slack=SLACK,
    )


def box_of_pages(page_size: int) -> int | None:
    """Tokens of the largest TMA load that pages of `page_size` tokens are a multiple of, if there is one."""
    return next((box for box in BOXES if page_size % box == 0), None)


def gathers(s_q: int, h_q: int, h_kv: int, page_size: int) -> bool:
    """Whether dense decode over a plain cache is left to sparse decode's kernels, which bring KV token by token.

    They take pages of any size, and are faster where one CTA has all rows, unless these are so few, in pages of whole
    blocks, that they have a kernel of their own; but they pack no rows of several query tokens or KV heads.
    """
    rows = s_q * h_q
    packs = h_kv > 1 or s_q * -(-h_q // ROWS) > -(-rows // ROWS)
    box = box_of_pages(page_size)
    if packs or box is None:
        return not packs
    return rows <= ROWS and not (box == BLOCK and rows <= FEW_ROWS[-1])


def _workers(units: int, num_workers: int, few_busy: float, many_busy: float) -> dict[str, int]:
    """Few units are cut alike as if they were equal; with more of them, that depends on their lengths."""
    even = even_workers(units, num_workers, few_busy if units <= num_workers else many_busy)
    return {"num_workers": even if units <= num_workers else num_workers, "even_workers": even}


def even_workers(units: int, num_workers: int, least_busy: float = LEAST_BUSY) -> int:
    """The most workers that cut equal units between them, not within or all in as many pieces, if not too few."""
    even = units // -(-units // num_workers) if units > num_workers else num_workers // units * units
    return even if even >= least_busy * num_workers else num_workers
