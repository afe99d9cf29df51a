"""How the roles of a CTA walk their worker's share of a SplitPlan, piece by piece."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from flash_mla.plan import INVARIANT_PIECE_TILES, MAX_INVARIANT_PIECES


class Piece:
    """The tiles of `unit` from `tile` on; `split` numbers the unit's pieces. Lives in registers, across loops."""

    def __init__(self, unit: Int32, tile: Int32, split: Int32):
        self.unit = unit
        self.tile = tile
        self.split = split

    def __extract_mlir_values__(self):
        return [value.ir_value() for value in (self.unit, self.tile, self.split)]

    def __new_from_mlir_values__(self, values):
        return Piece(*(Int32(value) for value in values))


def uniform(value: Int32) -> Int32:
    """Tell the compiler that a loaded value is the same in a whole warp: wgmma must not look divergent."""
    return cute.arch.make_warp_uniform(value)


def anew(value: Int32) -> Int32:
    """The same value, as far as the compiler knows another: what is computed from it is not kept across loops."""
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[value])


def first_piece(work: cute.Tensor) -> Piece:
    """Where this worker (the CTA's row of the grid) begins."""
    worker = cute.arch.block_idx()[1]
    return Piece(*(uniform(work[worker, i]) for i in range(3)))


def end_of_work(work: cute.Tensor) -> tuple[Int32, Int32]:
    """(unit, tile) where the next worker begins."""
    worker = cute.arch.block_idx()[1]
    return uniform(work[worker + 1, 0]), uniform(work[worker + 1, 1])


def remains(piece: Piece, end: tuple[Int32, Int32]):
    """Whether this worker has work from `piece` on."""
    return (piece.unit < end[0]) | (piece.tile < end[1])


def piece_stop(piece: Piece, end: tuple[Int32, Int32], tiles: Int32, batch_invariant: Int32) -> Int32:
    """The tile before which the piece ends, in a unit of `tiles` tiles."""
    stop = cutlass.select_(piece.unit == end[0], end[1], tiles)
    by_pieces = (tiles + (MAX_INVARIANT_PIECES - 1)) // MAX_INVARIANT_PIECES
    step = cutlass.max(by_pieces, INVARIANT_PIECE_TILES)
    return cutlass.select_(batch_invariant != 0, cutlass.min(stop, piece.tile + step), stop)


def next_piece(piece: Piece, stop: Int32, tiles: Int32) -> Piece:
    """The piece after the one that ends before tile `stop`."""
    unit_done = stop == tiles
    return Piece(
        cutlass.select_(unit_done, piece.unit + 1, piece.unit),
        cutlass.select_(unit_done, Int32(0), stop),
        cutlass.select_(unit_done, Int32(0), piece.split + 1),
    )


def slot_of(splits: cute.Tensor, piece: Piece) -> Int32:
    """Where a piece's partial result goes, or -1 if it is a whole unit; `splits` as in SplitPlan."""
    first, after = splits[piece.unit], splits[piece.unit + 1]
    return uniform(cutlass.select_(first == after, Int32(-1), first + piece.split))
