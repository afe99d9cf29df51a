"""Which tile a CTA of dense MHA takes next: query rows of a head forward, keys of a KV head backward.

The order is kept on the device. The tiles of a sequence are grouped by heads that fit L2 together; within a group those
with the most work come first. CTAs take tiles in that order: each the one of its own number, later whichever is next.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from flash_mla.backends.hopper.schedule import uniform
from flash_mla.backends.hopper.warp_sums import inclusive_sum

LANES = 32
TILE_Q = 128  # query rows of a CTA, forward
TILE_KV = 128  # keys visited at a time forward, and of a CTA backward
VISIT_Q = 64  # query rows visited at a time, backward
L2_BYTES = 32 << 20  # of what a group of heads reads and writes
MAX_HEADS = 16  # KV heads of a group: enough for a smooth order
ALL_SEEN = -(1 << 30)


class InRegisters:
    """Base of structs of Int32 that live in registers, across loops."""

    def __extract_mlir_values__(self):
        return [value.ir_value() for value in vars(self).values()]

    def __new_from_mlir_values__(self, values):
        return type(self)(*(Int32(value) for value in values))


class QueryTile(InRegisters):
    """Some query rows of a head and the keys that they see."""

    def __init__(
        self, tiles: Int32, head: Int32, q_row: Int32, rows: Int32, kv_row: Int32, seqlen_kv: Int32, seen: Int32
    ):
        self.tiles = tiles  # of keys to visit; < 0 if there is no work left
        self.head = head
        self.q_row = q_row  # the first row, of q
        self.rows = rows  # that exist, from the first on
        self.kv_row = kv_row  # the sequence's first, of k and v
        self.seqlen_kv = seqlen_kv
        self.seen = seen  # keys that the first row sees, < 0 if some are lacking; each next row sees one more if causal


class KeyTile(InRegisters):
    """Some keys of a KV head and the queries that see them."""

    def __init__(
        self,
        tiles: Int32,
        kv_head: Int32,
        kv_row: Int32,
        keys: Int32,
        q_row: Int32,
        q_tile: Int32,
        seqlen_qo: Int32,
        first: Int32,
        sees_first: Int32,
        blind: Int32,
    ):
        self.tiles = tiles  # of queries to visit, over all heads of the group; < 0 if there is no work left
        self.kv_head = kv_head
        self.kv_row = kv_row  # the first key, of k and v
        self.keys = keys  # that exist, from the first on
        self.q_row = q_row  # the sequence's first, of q
        self.q_tile = q_tile  # the sequence's first, where every sequence begins a tile
        self.seqlen_qo = seqlen_qo
        self.first = first  # query tile to visit, of each head
        self.sees_first = sees_first  # the query from which on the first key is seen; each next key one query later
        self.blind = blind  # queries, the first ones, that see no key at all

    def whole_visits(self) -> tuple[Int32, Int32]:
        """The query tiles, from and up to which all rows exist and see all of the tile's keys, which all exist."""
        sees_all = cutlass.max(cutlass.max(self.sees_first + (TILE_KV - 1), self.blind), 0)
        end = cutlass.select_(self.keys < TILE_KV, Int32(0), self.seqlen_qo // VISIT_Q)
        return (sees_all + (VISIT_Q - 1)) // VISIT_Q, end


class Window(InRegisters):
    """32 consecutive sequences, a lane each: from `first` on, with `before` tiles in front of them."""

    def __init__(self, first: Int32, before: Int32):
        self.first = first
        self.before = before


@dataclass(frozen=True)
class Sequences:
    """The call's sequences, and how their tiles are ordered."""

    cu_seqlens_qo: cute.Tensor
    cu_seqlens_kv: cute.Tensor
    h_q: Int32
    h_kv: Int32
    causal: Int32
    tokens_in_l2: int  # of one head; forward of a KV head, backward of a query head

    @property
    def count(self):
        return self.cu_seqlens_qo.shape[0] - 1

    @property
    def group(self):
        """Query heads of a KV head."""
        return self.h_q // self.h_kv

    def extents(self, sequence: Int32) -> tuple:
        """(first query, queries, first key, keys)."""
        q_begin, q_end = (uniform(self.cu_seqlens_qo[sequence + i]) for i in range(2))
        kv_begin, kv_end = (uniform(self.cu_seqlens_kv[sequence + i]) for i in range(2))
        return q_begin, q_end - q_begin, kv_begin, kv_end - kv_begin


class QueryTiles(Sequences):
    """The forward's tiles."""

    @cute.jit
    def tiles_of(self, sequence: Int32) -> Int32:
        """How many tiles a sequence has, 0 beyond the last one."""
        tiles = Int32(0)
        if sequence < self.count:
            rows = self.cu_seqlens_qo[sequence + 1] - self.cu_seqlens_qo[sequence]
            tiles = (rows + TILE_Q - 1) // TILE_Q * self.h_q
        return tiles

    def tile_of(self, sequence: Int32, number: Int32) -> QueryTile:
        """Tile `number` of a sequence: by groups of heads, then from the last rows to the first, then by heads."""
        q_begin, seqlen_qo, kv_begin, seqlen_kv = self.extents(sequence)
        row_tiles = cutlass.max((seqlen_qo + TILE_Q - 1) // TILE_Q, 1)
        heads = heads_together(seqlen_kv, self.tokens_in_l2) * self.group
        head, row_tile = in_groups(number, heads, self.h_q, row_tiles)
        row = (row_tiles - 1 - row_tile) * TILE_Q

        rows = cutlass.min(seqlen_qo - row, TILE_Q)
        seen = seqlen_kv - self.causal * (seqlen_qo - row - 1)
        seen_by_last = cutlass.max(seen + self.causal * (rows - 1), 0)
        return QueryTile(
            tiles=(seen_by_last + TILE_KV - 1) // TILE_KV,
            head=head,
            q_row=q_begin + row,
            rows=rows,
            kv_row=kv_begin,
            seqlen_kv=seqlen_kv,
            seen=seen,
        )


class KeyTiles(Sequences):
    """The backward's tiles."""

    @cute.jit
    def tiles_of(self, sequence: Int32) -> Int32:
        """How many tiles a sequence has, 0 beyond the last one."""
        tiles = Int32(0)
        if sequence < self.count:
            keys = self.cu_seqlens_kv[sequence + 1] - self.cu_seqlens_kv[sequence]
            tiles = (keys + TILE_KV - 1) // TILE_KV * self.h_kv
        return tiles

    def tile_of(self, sequence: Int32, number: Int32) -> KeyTile:
        """Tile `number` of a sequence: by groups of heads, then from the first keys to the last, then by heads."""
        q_begin, seqlen_qo, kv_begin, seqlen_kv = self.extents(sequence)
        key_tiles = cutlass.max((seqlen_kv + TILE_KV - 1) // TILE_KV, 1)
        heads = heads_together(seqlen_qo * self.group, self.tokens_in_l2)
        kv_head, key_tile = in_groups(number, heads, self.h_kv, key_tiles)
        key = key_tile * TILE_KV

        sees_first = cutlass.select_(self.causal != 0, seqlen_qo - seqlen_kv + key, Int32(ALL_SEEN))
        first = cutlass.max(sees_first, 0) // VISIT_Q
        visits = cutlass.max((seqlen_qo + VISIT_Q - 1) // VISIT_Q - first, 0)
        return KeyTile(
            tiles=visits * self.group,
            kv_head=kv_head,
            kv_row=kv_begin + key,
            keys=cutlass.min(seqlen_kv - key, TILE_KV),
            q_row=q_begin,
            q_tile=first_tile(q_begin, sequence),
            seqlen_qo=seqlen_qo,
            first=first,
            sees_first=sees_first,
            blind=self.causal * cutlass.max(seqlen_qo - seqlen_kv, 0),
        )


def first_tile(q_begin: Int32, sequence: Int32) -> Int32:
    """Where a sequence begins among tiles of VISIT_Q rows that hold one sequence each; some tiles stay empty."""
    return q_begin // VISIT_Q + sequence


def heads_together(tokens: Int32, tokens_in_l2: int) -> Int32:
    """KV heads of a group: a power of two, as most head counts are multiples of one."""
    heads = Int32(1)
    for _ in range(MAX_HEADS.bit_length() - 1):
        heads = cutlass.select_(2 * heads * tokens <= tokens_in_l2, 2 * heads, heads)
    return heads


def in_groups(number: Int32, heads: Int32, all_heads: Int32, tiles: Int32) -> tuple[Int32, Int32]:
    """(head, tile of it) of the tile `number` among groups of `heads` heads with `tiles` each, by tiles, then heads."""
    base = number // (heads * tiles) * heads
    heads = cutlass.min(heads, all_heads - base)
    number = number - base * tiles
    return base + number % heads, number // heads


@cute.jit
def find(sequences, window: Window, number: Int32):
    """Tile `number`, and the window that holds it; a warp calls it with numbers that never fall."""
    lane = cute.arch.lane_idx()
    first, before = window.first, window.before
    tiles = sequences.tiles_of(first + lane)
    through = before + inclusive_sum(tiles, lane)
    end = cute.arch.shuffle_sync(through, LANES - 1)
    while (end <= number) & (first + LANES < sequences.count):
        first += LANES
        before = end
        tiles = sequences.tiles_of(first + lane)
        through = before + inclusive_sum(tiles, lane)
        end = cute.arch.shuffle_sync(through, LANES - 1)
    passed = cute.arch.popc(cute.arch.vote_ballot_sync(through <= number))
    start = cute.arch.shuffle_sync(through - tiles, cutlass.min(passed, LANES - 1))
    sequence = uniform(cutlass.min(first + passed, sequences.count - 1))
    tile = sequences.tile_of(sequence, uniform(number - start))
    tile.tiles = cutlass.select_(end <= number, Int32(-1), tile.tiles)
    return tile, Window(first, before)


@cute.jit
def take_number(next_tile: cute.Tensor) -> Int32:
    """The number of the next tile that no CTA has taken, beyond those that CTAs take by their own numbers."""
    number = Int32(0)
    if cute.arch.lane_idx() == 0:
        number = cute.arch.atomic_add(next_tile.iterator, Int32(1))
    return cute.arch.shuffle_sync(number, 0) + cute.arch.grid_dim()[0]
