"""How token-sparse decode is laid out on a GPU: plain functions of shapes, testable without one."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from flash_mla.backends.hopper.dense_decode_heuristics import even_workers
from flash_mla.kv_cache import KVCacheFormat

__all__ = [
    "ROWS",
    "TILE",
    "SparseDecodeConfig",
    "cluster_size",
    "few_heads",
    "is_compute_bound",
    "sparse_decode_config",
]

ROWS = 64  # query heads of a CTA, unless there are few

# Query heads of the kernels of swapped operands. Where codes have multipliers, 32 heads are left to padding.
FEW_HEADS = {
    KVCacheFormat.FP8_V32: (8, 16, 32),
    KVCacheFormat.FP8_V4: (8, 16),
    KVCacheFormat.FP8_V41: (8, 16),
}
TILE = 128  # tokens in a tile of the plan

LONG = 16  # tiles of a unit that make up for what its start costs


class Costs(NamedTuple):
    """What work costs besides its tiles, in the time of one; in microseconds it is much the same for all kernels."""

    start: int  # starting a piece
    first_merge: float  # merging hardly any pieces
    merge: float  # besides, merging a piece of every worker
    cut: int  # what cutting units otherwise than alike adds to an equal share
    slack: int  # in quarters: what pieces may be beyond an equal share where each unit has workers of its own


FEW_HEADS_COSTS = Costs(2, 0.75, 1.5, 5, 3)
QUANTISED_COSTS = Costs(1, 0.25, 1.0, 3, 3)
PLAIN_COSTS = Costs(1, 0.25, 1.0, 3, 4)


@dataclass(frozen=True)
class SparseDecodeConfig:
    """How sparse decode is laid out on a GPU."""

    rows: int  # query heads of a CTA
    row_tiles: int  # CTAs of a worker: tiles of `rows` heads taken side by side
    passes: int  # units that the heads of a query token make
    num_workers: int
    even_workers: int  # that are used where the device finds units of equal length
    fixed_cost: int  # of starting a piece, in tiles; 0 only if no unit is empty
    cut_cost: int  # of cutting units otherwise than alike, in tiles
    slack: int  # of the pieces of units that have workers of their own, in quarters of a tile
    unsplit: bool  # whether every cut of the plan falls between units

    @property
    def unit_rows(self) -> int:
        """Rows of a unit of the plan."""
        return self.row_tiles * self.rows

    def of_workers(self, num_workers: int, **changes: Any) -> SparseDecodeConfig:
        """With so many workers, whatever the lengths."""
        return replace(self, num_workers=num_workers, even_workers=num_workers, **changes)


def few_heads(h_q: int, kv_format: KVCacheFormat) -> int | None:
    """Heads of the smallest kernel of swapped operands that takes h_q heads, or None if there is none."""
    return next((heads for heads in FEW_HEADS.get(kv_format, ()) if h_q <= heads), None)


def cluster_size(h_q: int) -> int:
    """CTAs that take the heads of a query token side by side; of a quantised cache, they convert its rows together."""
    return 1 if h_q <= ROWS else 2


def is_compute_bound(b: int, s_q: int, h_q: int, tiles: int | None, num_sms: int) -> bool:
    """Whether decode over a plain cache is, with `tiles` tiles a query token, or None if it is dense.

    It is where several CTAs attend to the same rows, those of other heads or, if dense, of other query tokens. Short
    units and pieces of them rather wait for the memory: 128 requests with 512 indices each are 11 % faster flushed if
    they do not count.
    """
    shares_rows = h_q > ROWS or (s_q > 1 and tiles is None)
    return shares_rows and b * s_q >= num_sms // cluster_size(h_q) and (tiles is None or tiles >= LONG)


@functools.lru_cache(maxsize=1024)
def sparse_decode_config(
    queries: int, h_q: int, tiles: int | None, num_sms: int, rows: int = ROWS, *, plain: bool = False
) -> SparseDecodeConfig:
    """The layout for `queries` query tokens of h_q heads, of `tiles` tiles each, or None where lengths differ.

    A CTA takes `rows` heads; the cache is `plain` or quantised. Units of equal length are kept whole, cut alike into as
    many pieces as there are workers for them, whose starting costs then do not count, or cut into equal shares,
    whichever takes least.
    """
    row_tiles = cluster_size(h_q)
    passes = -(-h_q // (row_tiles * rows))
    units, workers = queries * passes, num_sms // row_tiles
    costs = FEW_HEADS_COSTS if rows < ROWS else PLAIN_COSTS if plain else QUANTISED_COSTS
    balanced = SparseDecodeConfig(
        rows, row_tiles, passes, workers, workers, fixed_cost=costs.start, cut_cost=costs.cut,
        slack=costs.slack, unsplit=False,
    )  # fmt: skip
    if not tiles:
        # Cut alike or kept whole, equal units are up to a fifth faster.
        return replace(balanced, even_workers=even_workers(units, workers))
    rounds = -(-units // workers)
    piece = -(-tiles // max(1, workers // units))  # tiles of the largest, cut alike
    pieces = -(-tiles // piece)
    whole = rounds * (tiles + costs.start)
    alike = costs.start + piece + costs.first_merge + costs.merge * units * pieces / workers
    shares = max(1.0, units * (tiles + costs.start) / workers) + costs.cut
    if pieces > 1 and alike < min(whole, shares):
        return balanced.of_workers(units * pieces, fixed_cost=0)
    # Cuts fall on units only if every worker gets as many.
    if whole <= shares and units % rounds == 0:
        return balanced.of_workers(units // rounds, unsplit=True)
    return balanced
