"""Which queries a CTA of dense MHA attends with next: tiles of a head's query rows, in an order kept on the device.

The tiles of a sequence are grouped by heads whose K and V fit L2 together; within a group those with the most keys
come first. CTAs take tiles in that order: each the one of its own number, later whichever is next.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from flash_mla.backends.hopper.schedule import uniform

LANES = 32
TILE_Q = 128  # query rows of a CTA
TILE_KV = 128  # keys visited at a time
L2_BYTES = 32 << 20  # of K and V that may be in use at once
MAX_HEADS = 16  # KV heads of a group: enough for a smooth order


@dataclass(frozen=True)
class Sequences:
    """The call's sequences, and how their tiles are ordered."""

    cu_seqlens_qo: cute.Tensor
    cu_seqlens_kv: cute.Tensor
    h_q: Int32
    h_kv: Int32
    causal: Int32
    kv_in_l2: int  # tokens of one KV head that L2 holds

    @property
    def count(self):
        return self.cu_seqlens_qo.shape[0] - 1


class WorkTile:
    """Some query rows of a head and the keys that they see; lives in registers, across loops."""

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

    def __extract_mlir_values__(self):
        values = self.tiles, self.head, self.q_row, self.rows, self.kv_row, self.seqlen_kv, self.seen
        return [value.ir_value() for value in values]

    def __new_from_mlir_values__(self, values):
        return WorkTile(*(Int32(value) for value in values))


class Window:
    """32 consecutive sequences, a lane each: from `first` on, with `before` tiles in front of them. In registers."""

    def __init__(self, first: Int32, before: Int32):
        self.first = first
        self.before = before

    def __extract_mlir_values__(self):
        return [self.first.ir_value(), self.before.ir_value()]

    def __new_from_mlir_values__(self, values):
        return Window(*(Int32(value) for value in values))


@cute.jit
def find(sequences, window: Window, number: Int32):
    """Tile `number`, and the window that holds it; a warp calls it with numbers that never fall."""
    lane = cute.arch.lane_idx()
    first, before = window.first, window.before
    tiles = tiles_of(sequences, first + lane)
    through = before + inclusive_sum(tiles, lane)
    end = cute.arch.shuffle_sync(through, LANES - 1)
    while (end <= number) & (first + LANES < sequences.count):
        first += LANES
        before = end
        tiles = tiles_of(sequences, first + lane)
        through = before + inclusive_sum(tiles, lane)
        end = cute.arch.shuffle_sync(through, LANES - 1)
    passed = cute.arch.popc(cute.arch.vote_ballot_sync(through <= number))
    start = cute.arch.shuffle_sync(through - tiles, cutlass.min(passed, LANES - 1))
    sequence = uniform(cutlass.min(first + passed, sequences.count - 1))
    tile = tile_of(sequences, sequence, uniform(number - start))
    tile.tiles = cutlass.select_(end <= number, Int32(-1), tile.tiles)
    return tile, Window(first, before)


@cute.jit
def tiles_of(sequences, sequence: Int32) -> Int32:
    """How many tiles a sequence has, 0 beyond the last one."""
    tiles = Int32(0)
    if sequence < sequences.count:
        rows = sequences.cu_seqlens_qo[sequence + 1] - sequences.cu_seqlens_qo[sequence]
        tiles = (rows + TILE_Q - 1) // TILE_Q * sequences.h_q
    return tiles


def tile_of(sequences: Sequences, sequence: Int32, number: Int32) -> WorkTile:
    """Tile `number` of a sequence: by groups of heads, then from the last rows to the first, then by heads."""
    q_begin, q_end = (uniform(sequences.cu_seqlens_qo[sequence + i]) for i in range(2))
    kv_begin, kv_end = (uniform(sequences.cu_seqlens_kv[sequence + i]) for i in range(2))
    seqlen_qo, seqlen_kv = q_end - q_begin, kv_end - kv_begin
    row_tiles = cutlass.max((seqlen_qo + TILE_Q - 1) // TILE_Q, 1)

    heads = Int32(1)  # KV heads of a group: a power of two, as most head counts are multiples of one
    for _ in range(MAX_HEADS.bit_length() - 1):
        heads = cutlass.select_(2 * heads * seqlen_kv <= sequences.kv_in_l2, 2 * heads, heads)
    heads = heads * (sequences.h_q // sequences.h_kv)
    base = number // (heads * row_tiles) * heads
    heads = cutlass.min(heads, sequences.h_q - base)
    number = number - base * row_tiles
    row = (row_tiles - 1 - number // heads) * TILE_Q

    rows = cutlass.min(seqlen_qo - row, TILE_Q)
    seen = seqlen_kv - sequences.causal * (seqlen_qo - row - 1)
    seen_by_last = cutlass.max(seen + sequences.causal * (rows - 1), 0)
    return WorkTile(
        tiles=(seen_by_last + TILE_KV - 1) // TILE_KV,
        head=base + number % heads,
        q_row=q_begin + row,
        rows=rows,
        kv_row=kv_begin,
        seqlen_kv=seqlen_kv,
        seen=seen,
    )


def inclusive_sum(value: Int32, lane: Int32) -> Int32:
    """Sum over this lane and those before it."""
    for i in range(5):
        other = cute.arch.shuffle_sync_up(value, 1 << i, mask_and_clamp=0)
        value = value + cutlass.select_(lane >= (1 << i), other, Int32(0))
    return value
