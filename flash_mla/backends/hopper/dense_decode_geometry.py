"""What dense decode's roles know of a call: which query rows a piece has, and where its keys lie."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from flash_mla.backends.hopper.divisor import Divisor
from flash_mla.backends.hopper.fragments import BLOCK
from flash_mla.backends.hopper.schedule import Piece, anew, slot_of, uniform
from flash_mla.backends.hopper.wgmma import ROWS


@dataclass(frozen=True)
class Arguments:
    """What every role reads of the call: an argument of the kernel. Shapes at `DenseDecode.__call__`."""

    q: cute.Tensor
    block_table: cute.Tensor
    seqlens: cute.Tensor
    work: cute.Tensor
    splits: cute.Tensor
    partial_o: cute.Tensor
    partial_lse: cute.Tensor
    partial_scale: cute.Tensor | None  # None if partial outputs are fp32
    out: cute.Tensor
    lse: cute.Tensor
    h_kv: Divisor
    group: Divisor  # query heads per KV head
    passes: Divisor | None  # of a worker's CTAs over the packed rows of a request and KV head; None if one CTA has all
    boxes_per_page: Divisor
    scale_log2: Float32
    causal: Int32
    batch_invariant: Int32
    cache_policy: Int64  # of K in L2

    def place(self, piece: Piece) -> tuple[Int32, Int32, Int32]:
        """(request, KV head, pass) of a piece's unit."""
        pair, turn = piece.unit, Int32(0)
        if self.passes is not None:
            pair, turn = self.passes.divmod(piece.unit)
        return *self.h_kv.divmod(pair), turn

    def rows(self, piece: Piece) -> "Rows":
        """The rows of this CTA in the piece's unit."""
        request, kv_head, turn = self.place(piece)
        first = Int32(0)
        if self.passes is not None:
            first = (turn * cute.arch.grid_dim()[0] + cute.arch.block_idx()[0]) * ROWS
        count = self.q.shape[1] * self.group.value - first
        return Rows(request, kv_head, first, count, self.group)

    def seqlen(self, piece: Piece) -> Int32:
        request, _, _ = self.place(piece)
        return uniform(self.seqlens[request])

    def visible(self, piece: Piece, seqlen: Int32, row: Int32) -> Int32:
        """A row of the CTA sees the tokens before this one.

        Causality is aligned to the bottom right: query token j sees those before seqlen - s_q + j + 1.
        """
        hidden = self.q.shape[1] - 1 - self.rows(piece).query(row)[0]
        return seqlen - cutlass.select_(self.causal != 0, hidden, Int32(0))

    def slot(self, piece: Piece) -> Int32:
        """Where the piece's partial result goes, or -1 if it is a whole unit."""
        return slot_of(self.splits, piece)


class Boxes:
    """Where the TMA boxes of two tiles lie: row of boxes within the page, and page. Lives in registers, across loops.

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
    """The pages of a piece's request, cut into boxes."""

    args: Arguments
    piece: Piece
    seqlen: Int32
    box: int  # tokens

    def locate(self, tile: Int32) -> Boxes:
        """The boxes of a tile of two blocks and of the next; those beyond the request stand for its last one.

        So no table entry beyond its pages is read. Few registers are left to remember what depends on no tile.
        """
        request, _, _ = self.args.place(Piece(anew(self.piece.unit), self.piece.tile, self.piece.split))
        last = (anew(self.seqlen) + (self.box - 1)) // self.box - 1
        box = cutlass.min(tile * (2 * BLOCK // self.box) + cute.arch.lane_idx(), last)
        entry, row = self.args.boxes_per_page.divmod(box)
        return Boxes(row, self.args.block_table[request, entry])


@dataclass(frozen=True)
class Rows:
    """The packed query rows of a CTA within one unit."""

    request: Int32
    kv_head: Int32
    first: Int32  # of the rows of this request and KV head
    count: Int32  # of rows that exist, may be <= 0
    group: Divisor  # query heads per KV head

    def query(self, row) -> tuple[Int32, Int32]:
        """(query token, query head) of row number `row` of the CTA."""
        token, head = self.group.divmod(self.first + row)
        return token, self.kv_head * self.group.value + head


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
