"""What dense decode's roles know of a call: which query rows a piece has, and where its keys lie."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from flash_mla.backends.hopper.schedule import Piece, slot_of, uniform
from flash_mla.backends.hopper.wgmma import ROWS


@dataclass(frozen=True)
class Arguments:
    """What every role reads of the call; shapes at `DenseDecode.__call__`."""

    q: cute.Tensor
    block_table: cute.Tensor
    seqlens: cute.Tensor
    work: cute.Tensor
    splits: cute.Tensor
    partial_o: cute.Tensor
    partial_lse: cute.Tensor
    partial_scale: cute.Tensor
    out: cute.Tensor
    lse: cute.Tensor
    h_kv: Int32
    boxes_per_page: Int32
    scale_log2: Float32
    causal: Int32
    batch_invariant: Int32

    @property
    def group(self):
        """Query heads per KV head."""
        return self.q.shape[2] // self.h_kv

    @property
    def passes(self):
        """Passes that a worker's CTAs take over the packed rows of a request and KV head."""
        tile = cute.arch.grid_dim()[0] * ROWS
        return (self.q.shape[1] * self.group + tile - 1) // tile

    def rows(self, piece: Piece) -> "Rows":
        """The rows of this CTA in the piece's unit."""
        unit, turn = piece.unit // self.passes, piece.unit % self.passes
        first = (turn * cute.arch.grid_dim()[0] + cute.arch.block_idx()[0]) * ROWS
        count = self.q.shape[1] * self.group - first
        return Rows(unit // self.h_kv, unit % self.h_kv, first, count, self.group)

    def seqlen(self, piece: Piece) -> Int32:
        return uniform(self.seqlens[piece.unit // self.passes // self.h_kv])

    def slot(self, piece: Piece) -> Int32:
        """Where the piece's partial result goes, or -1 if it is a whole unit."""
        return slot_of(self.splits, piece)


class Boxes:
    """Where the TMA boxes of a tile lie: row of boxes within the page, and page. Lives in registers, across loops.

    Lane l of the warp knows box l.
    """

    def __init__(self, row: Int32, page: Int32):
        self.row, self.page = row, page

    def __extract_mlir_values__(self):
        return [value.ir_value() for value in (self.row, self.page)]

    def __new_from_mlir_values__(self, values):
        return Boxes(*(Int32(value) for value in values))

    def get(self, box: Int32) -> tuple[Int32, Int32]:
        """(row, page) of a box; called by the whole warp."""
        return cute.arch.shuffle_sync(self.row, box), cute.arch.shuffle_sync(self.page, box)


@dataclass(frozen=True)
class Pages:
    """The pages of a request, cut into boxes."""

    block_table: cute.Tensor
    request: Int32
    boxes: Int32
    boxes_per_page: Int32
    boxes_per_tile: int

    def locate(self, tile: Int32) -> Boxes:
        """Boxes beyond the request stand for its last one: no table entry beyond its pages is read."""
        box = cutlass.min(tile * self.boxes_per_tile + cute.arch.lane_idx(), self.boxes - 1)
        return Boxes(box % self.boxes_per_page, self.block_table[self.request, box // self.boxes_per_page])


@dataclass(frozen=True)
class Rows:
    """The packed query rows of a CTA within one unit."""

    request: Int32
    kv_head: Int32
    first: Int32  # of the rows of this request and KV head
    count: Int32  # of rows that exist, may be <= 0
    group: Int32  # query heads per KV head

    def query(self, row):
        """(query token, query head) of row number `row` of the CTA."""
        packed = self.first + row
        return packed // self.group, self.kv_head * self.group + packed % self.group


def by_unit(out: cute.Tensor, lse: cute.Tensor, h_kv: Int32) -> tuple[cute.Tensor, cute.Tensor]:
    """`out` [b, s_q, h_q, d_v] and `lse` [b, h_q, s_q] as combine sees them: (request, KV head), then packed rows."""
    (b, s_q, h_q, d_v), (out_b, out_s, out_h, _) = out.shape, out.stride
    lse_b, lse_h, lse_s = lse.stride
    group = h_q // h_kv
    return (
        cute.make_tensor(
            out.iterator, cute.make_layout((b, h_kv, s_q, group, d_v), stride=(out_b, out_h * group, out_s, out_h, 1))
        ),
        cute.make_tensor(
            lse.iterator, cute.make_layout((b, h_kv, s_q, group), stride=(lse_b, lse_h * group, lse_s, lse_h))
        ),
    )
