"""How sparse prefill is laid out on a GPU: plain functions of shapes, testable without one."""

from __future__ import annotations

import functools
from dataclasses import dataclass

__all__ = ["ROWS", "SparsePrefillConfig", "is_short", "sparse_prefill_config"]

ROWS = 64  # heads of a piece of work
TILE = 128  # indices in a tile

# In the time of a tile: what a piece costs beside its tiles; what merging pieces costs, in all and for each of them,
# and more where pieces occupy every SM, so that combine is not there when they end.
PIECE_COST = 0.7
MERGE_COST = 1.0
MERGE_SLOT_COST = 0.02
LATE_MERGE_COST = 1.0
MOST_SMS = 0.9  # that leave room for combine
# Tiles of an SM from which on it pays to list tokens by their length, which takes the time of one; and to look for
# lengths that are not given, which takes that of two, and often finds that all are equal.
LIST_TILES = 4
LOOK_TILES = 192

# Tiles of an SM up to which less code is faster than code that is faster once it is in the caches.
SHORT_TILES = 14


@dataclass(frozen=True)
class SparsePrefillConfig:
    """The order of the work: whole tokens first, as many as give every SM the same number, then the rest in splits.

    Tokens may differ in length. They are then listed by it, the longest first.
    """

    workers: int  # CTAs
    whole_tokens: int  # tokens whose heads are taken 64 at a time, over all of their indices
    splits: int  # pieces of every 64 heads of the other tokens
    split_units: int  # how many such 64 heads there are
    length_bits: int  # of a word of the list, which says a token and its length; 0: tokens are taken as they come
    round_tokens: int  # of the list
    finds_lengths: bool  # whether the list's are looked for, in the indices

    @property
    def slots(self) -> int:
        """Partial results."""
        return self.split_units * self.splits


@functools.lru_cache(maxsize=1024)
def sparse_prefill_config(
    s_q: int, h_q: int, topk: int, num_sms: int, *, has_lengths: bool = False
) -> SparsePrefillConfig:
    """The layout of a call, given whether the caller says tokens' lengths.

    Work that does not fill the SMs, all of a small call or what is left over of a large one, is split over its indices.
    """
    head_tiles, tiles = _tiles(h_q, topk)
    units = s_q * head_tiles
    whole_tokens = units // num_sms * num_sms // head_tiles
    rest = units - whole_tokens * head_tiles

    def cost(splits: int) -> float:
        slots = rest * splits
        attention = -(-slots // num_sms) * (-(-tiles // splits) + PIECE_COST)
        if splits == 1:
            return attention
        late = whole_tokens > 0 or slots >= MOST_SMS * num_sms
        return attention + MERGE_COST + slots * MERGE_SLOT_COST + late * LATE_MERGE_COST

    bits = topk.bit_length()
    pays = units > num_sms and units // num_sms * tiles >= (LIST_TILES if has_lengths else LOOK_TILES)
    is_listed = pays and s_q << bits < 1 << 31  # in a word
    order = (bits, max(1, num_sms // head_tiles), not has_lengths) if is_listed else (0, 1, False)
    splits = min(range(1, tiles + 1), key=cost)
    if rest == 0 or splits == 1:
        return SparsePrefillConfig(min(num_sms, units), s_q, 1, 0, *order)
    pieces = whole_tokens * head_tiles + rest * splits
    return SparsePrefillConfig(min(num_sms, pieces), whole_tokens, splits, rest, *order)


def is_short(s_q: int, h_q: int, topk: int, num_sms: int) -> bool:
    """Whether a call is so short that less code is faster."""
    head_tiles, tiles = _tiles(h_q, topk)
    return s_q * head_tiles * tiles <= SHORT_TILES * num_sms


def _tiles(h_q: int, topk: int) -> tuple[int, int]:
    """Of a query token: (tiles of heads, tiles of indices)."""
    return -(-h_q // ROWS), max(1, -(-topk // TILE))
