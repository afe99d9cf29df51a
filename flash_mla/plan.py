"""The split-KV schedule: which worker attends to which KV tiles, and where partial results go.

The work of a decode call is a row of *units* (a request, or a KV head or query token of one) of as many *tiles* as
their lengths need. A unit costs its tiles plus a fixed cost (loading Q, writing out). Laid end to end, the units fill a
cost axis that is cut into equal ranges, one a *worker* (a CTA, or the CTAs that share a unit's KV). A range that ends
inside a unit splits it: each of its pieces is then a partial result in a *slot* of the workspace, and a combine pass
merges them. Where pieces become hardly longer by it, each unit has workers of its own instead, of which none starts a
second piece.

Every cut is a closed form of the prefix sum of the costs, so the plan is a few vectorised operations on the lengths,
on whatever device they are, without synchronising it. The Hopper planner kernel computes the same integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = [
    "FEW_PIECES",
    "INVARIANT_PIECE_TILES",
    "MAX_INVARIANT_PIECES",
    "PIECE_SIZES",
    "Piece",
    "SplitPlan",
    "max_slots",
    "split_plan",
]

# Batch-invariant plans cut a unit into pieces of this many tiles, or into this many pieces if that makes larger ones:
# sizes that depend on the unit's own length alone.
INVARIANT_PIECE_TILES = 32
MAX_INVARIANT_PIECES = 32

FEW_PIECES = 64  # of a unit, which are merged in little time

PIECE_SIZES = 3  # that are tried, the largest first, where each unit may have workers of its own


class Piece(NamedTuple):
    """The tiles [begin, end) of a unit, attended to by one worker; `slot` is -1 when they are the whole unit."""

    worker: int
    unit: int
    begin: int
    end: int
    slot: int


@dataclass(frozen=True)
class SplitPlan:
    """A schedule as two int32 tensors, the form in which kernels read it.

    work: [num_workers + 1, 4]; worker w begins at row w and ends where worker w + 1 begins. A row is (unit, tile,
        split, slot): the first unit and its first tile there, the number of that piece within its unit and its slot, or
        -1 when the unit begins there. An empty unit is part of its worker's range, so that its output gets written.
    splits: [num_units + 1]; unit u's partial results are the slots splits[u] ... splits[u + 1] - 1, none if whole.
    """

    work: torch.Tensor
    splits: torch.Tensor

    def pieces(self, tiles: list[int], *, batch_invariant: bool = False) -> Iterator[Piece]:
        """Every piece in order, as a kernel walks them; `tiles` are the units' tile counts."""
        work, splits = self.work.tolist(), self.splits.tolist()
        for worker, (first, begin, _, _) in enumerate(work[:-1]):
            last, stop = work[worker + 1][:2]
            for unit in range(first, min(last + 1, len(tiles))):
                end = stop if unit == last else tiles[unit]
                if unit == last and stop == begin:
                    continue
                step = piece_tiles(tiles[unit]) if batch_invariant else max(1, end - begin)
                for split, start in enumerate(range(begin, max(end, begin + 1), step)):
                    whole = splits[unit] == splits[unit + 1]
                    slot = splits[unit] + (work[worker][2] if unit == first else 0) + split
                    yield Piece(worker, unit, start, min(end, start + step), -1 if whole else slot)
                begin = 0


def piece_tiles(tiles: int) -> int:
    """Tiles in each piece of a unit of `tiles` tiles under a batch-invariant plan."""
    return max(INVARIANT_PIECE_TILES, -(-tiles // MAX_INVARIANT_PIECES))


def max_slots(num_units: int, num_workers: int, *, batch_invariant: bool = False, max_tiles: int | None = None) -> int:
    """Slots that suffice for any lengths; `max_tiles` bounds a unit's tiles (for the batch-invariant plan)."""
    if not batch_invariant:
        # A worker's first and its last unit may be shared with others; those between are its own.
        return 2 * max(0, num_workers - 1)
    pieces = MAX_INVARIANT_PIECES if max_tiles is None else -(-max_tiles // piece_tiles(max_tiles))
    return num_units * pieces if pieces > 1 else 0


def split_plan(
    lengths: torch.Tensor,
    *,
    extra_lengths: torch.Tensor | None = None,
    tile: int = 64,
    fixed_cost: int,
    num_workers: int,
    even_workers: int | None = None,
    units_per_request: int = 1,
    min_cost: int = 1,
    cut_cost: int = 0,
    slack: int = 0,
    batch_invariant: bool = False,
) -> SplitPlan:
    """Plan a call.

    Args:
        lengths: [b] int32, tokens of each request.
        extra_lengths: [b] int32, tokens of a second cache; its tiles follow those of the first.
        tile: tokens in a tile.
        fixed_cost: what starting a piece costs, in tiles. It does not count where units of as many tiles are cut alike
            for `even_workers`, of which each then starts one.
        num_workers: workers that run at once.
        even_workers: as many of them as are used where all units have as many tiles; num_workers by default. Fewer may
            cut such units alike, or not at all.
        units_per_request: each request makes this many consecutive units of its length.
        min_cost: beyond FEW_PIECES for each unit, fewer workers are used rather than giving each a range of less than
            this, in tiles.
        cut_cost: what cutting units costs a call besides starting pieces, in tiles. Units that are not cut alike are
            kept whole, if there is a worker for each, where the longest takes less than an equal share and this.
        slack: how much more than an equal share the largest piece may be for each unit to have workers of its own,
            which then start one piece each; in quarters of a tile, 0 for never.
        batch_invariant: cut a unit only at places that depend on its own length.

    Returns:
        A SplitPlan on the device of `lengths`. Loads exceed their mean by at most one tile plus the fixed cost, by the
        slack, or by one piece in a batch-invariant plan, unless units are kept whole.
    """
    tiles = (lengths.long() + (tile - 1)) // tile
    if extra_lengths is not None:
        tiles = tiles + (extra_lengths.long() + (tile - 1)) // tile
    if units_per_request > 1:
        tiles = tiles.repeat_interleave(units_per_request, output_size=tiles.numel() * units_per_request)

    even_workers = num_workers if even_workers is None else even_workers
    units = tiles.numel()
    step = torch.clamp((tiles + (MAX_INVARIANT_PIECES - 1)) // MAX_INVARIANT_PIECES, min=INVARIANT_PIECE_TILES)
    num_pieces = torch.clamp((tiles + step - 1) // step, min=1) if batch_invariant else torch.ones_like(tiles)

    def shared(fixed: torch.Tensor | int, most: torch.Tensor | int) -> tuple[torch.Tensor, ...]:
        """(costs of the units, their sum, workers that share it)."""
        costs = tiles + fixed * num_pieces
        total = costs.sum()
        wanted = torch.maximum(total // min_cost, torch.clamp(total, min=1, max=FEW_PIECES * units))
        return costs, total, torch.clamp(wanted, max=most)

    alike = (tiles == tiles[0]).all()
    cut_alike = alike & (tiles[0] > 0) & (even_workers % units == 0)
    fixed = torch.where(cut_alike, 0, fixed_cost)
    costs, total, workers = shared(fixed, torch.where(alike, even_workers, num_workers))
    has_own = torch.tensor(False, device=lengths.device)  # whether each unit has workers of its own
    if not batch_invariant:
        is_short = (tiles.max() + fixed - cut_cost) * workers < total
        has_own, own = ~cut_alike & (units <= workers) & is_short, torch.ones_like(tiles)  # kept whole
        if slack > 0:
            _, cost, most = shared(fixed_cost, num_workers)
            suffice, cut = own_pieces(tiles, cost, most, slack)
            has_own, own = has_own | suffice, torch.where(suffice, cut, own)
        costs, fixed = torch.where(has_own, own, costs), torch.where(has_own, 0, fixed)
        total, workers = (torch.where(has_own, own.sum(), value) for value in (total, workers))
    begins = torch.nn.functional.pad(costs.cumsum(0), (1, 0))

    # Worker w's range of the cost axis begins at floor(w * total / workers); workers beyond that number stay idle.
    worker = torch.arange(num_workers + 1, device=lengths.device)
    cut = torch.minimum(worker * total // workers, total)
    unit = torch.searchsorted(begins[1:], cut, right=True)
    at_end = unit == units
    inside = unit.clamp(max=units - 1)
    offset = cut - begins[inside]

    if batch_invariant:
        split = (offset + fixed + step[inside] - 1) // (fixed + step[inside])
        next_unit = split >= num_pieces[inside]
        unit = torch.where(next_unit & ~at_end, unit + 1, unit)
        split = torch.where(next_unit | at_end, 0, split)
        begin_tile = split * step[inside]
        counts = torch.where(num_pieces > 1, num_pieces, 0)
    else:
        # A cut within the fixed cost moves to the unit's beginning; the first worker cut beyond it begins piece 1.
        begin_tile = torch.where(has_own, offset * tiles[inside] // costs[inside], offset - fixed)
        begin_tile = torch.where(at_end, 0, torch.clamp(begin_tile, min=0))
        first = -(-(begins[:-1] + fixed + 1) * workers // total)
        counts = -(-begins[1:] * workers // total) - first
        counts = torch.where(counts > 0, counts + 1, 0)
        split = torch.where(begin_tile > 0, worker - first[inside] + 1, 0)

    splits = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    slot = torch.where(split > 0, splits[inside] + split, -1)
    work = torch.stack([unit, begin_tile, split, slot], dim=1)
    return SplitPlan(work.int(), splits.int())


def own_pieces(
    tiles: torch.Tensor, cost: torch.Tensor, workers: torch.Tensor, slack: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(whether the workers suffice for pieces of less than their share of the cost and the slack, pieces of each unit).

    The pieces are those of the least of PIECE_SIZES sizes for which the workers suffice.
    """
    largest = (4 * cost + slack * workers - 1) // (4 * workers)
    sizes = torch.clamp(largest - torch.arange(PIECE_SIZES, device=tiles.device), min=1)[:, None]
    pieces = torch.clamp((tiles + sizes - 1) // sizes, min=1)
    suffices = pieces.sum(1) <= workers
    return suffices[0], pieces[torch.clamp(suffices.sum() - 1, min=0)]
