"""Merge the partial results of split units: out = sum_i w_i o_i, w_i = 2^(lse_i - lse), the usual split-KV identity.

Partial outputs are normalised by their own softmax sum; their lse is in base 2, and -inf where a piece attended to
nothing. Units that one worker computed whole were written by the attention kernel and are left alone.
"""

import math
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float16, Float32, Int32, Int64, const_expr, range_constexpr

from flash_mla.backends.hopper import aot
from flash_mla.backends.hopper.copies import discard_line, pointer_at
from flash_mla.backends.hopper.divisor import Divisor
from flash_mla.backends.hopper.epilogue import trade_words
from flash_mla.backends.hopper.sparse_prefill_tokens import TokenList

LANES = 32
WARPS = 8
LSES_IN_FLIGHT = 4  # of a lane
NO_LSE = -3.0e38  # below any, and finite, so that two of them differ by 0
VECTOR_BYTES = 16  # of a load
LINE_BYTES = 128  # of the L2
SCALED_COLUMNS = 256  # of a partial output in fp16 that share a scale
LN2 = math.log(2.0)
LOG2_E = math.log2(math.e)

# How partial outputs lie in the workspace.
PLAIN = "plain"
# In fp16, to be multiplied by a scale for each 256 columns, and in the order in which accumulators lie in registers: of
# each 32 columns, 8 j + 2 q + {0, 1} of all j are neighbours, for q = 0 ... 3.
SCALED = "scaled"
# In the order in which transposed accumulators do: column 64 c + 16 w + 8 r + l is number 128 w + 32 (c / 2) + 4 l +
# 2 (c % 2) + r.
TRANSPOSED = "transposed"


@dataclass(frozen=True)
class OfPrefill:
    """What sparse prefill has besides: row maxima that are merged, too, and units whose u0 a list tells."""

    partial_max: cute.Tensor  # [slots, rows_per_unit] fp32
    max_logits: cute.Tensor  # [u0, u1, r0, r1] fp32
    tokens: TokenList
    first: Int32  # place in it of the first unit


class Combine:
    """Warps own slices of rows: a whole row (many rows) or `columns` of one (few rows, many splits)."""

    def __init__(self, dtype: type[cutlass.Numeric], d_v: int, columns: int, order: str = PLAIN):
        self.dtype = dtype
        self.order = order
        self.scaled = order == SCALED
        self.d_v = d_v
        self.partial_dtype = Float16 if self.scaled else Float32
        self.vector = VECTOR_BYTES * 8 // self.partial_dtype.width
        self.chunks = columns // (LANES * self.vector)
        self.columns = columns  # of a slice
        self.slices = d_v // columns  # of a row
        # Many rows of fp32 behind a kernel that waits for nothing but memory; elsewhere the time is not won back.
        self.discards = order == TRANSPOSED and self.slices == 1
        # Splits whose loads are issued together.
        self.in_flight = 8 if self.chunks == 1 else 2

    @cute.jit
    def __call__(
        self,
        partial_o: cute.Tensor,  # [slots, rows_per_unit, d_v] fp32, or fp16 if scaled
        partial_lse: cute.Tensor,  # [slots, rows_per_unit] fp32, base 2
        partial_scale: cute.Tensor | None,  # [slots, rows_per_unit, d_v / 256] fp32, if scaled
        work: cute.Tensor,  # [workers + 1, 4]: SplitPlan.work
        splits: cute.Tensor,  # [units + 1]: SplitPlan.splits
        sink: cute.Tensor | None,  # [u1, r1] fp32, natural log
        out: cute.Tensor,  # [u0, u1, r0, r1, d_v]: unit (u0, u1, pass), row (r0, r1) of all its passes
        lse: cute.Tensor,  # [u0, u1, r0, r1] fp32, natural log
        candidates: Int32,  # grid extent: workers, or units if by_unit
        by_unit: Int32,  # 1: look at every unit; 0: at the unit in which each worker begins its second piece
        warps: Int32,  # that share a slice's splits: 1, 2, 4 or 8
        stream,
        of_prefill: OfPrefill | None = None,
    ):
        slices_per_cta = WARPS // warps
        rows, rows_per_unit = out.shape[2] * out.shape[3], partial_o.shape[1]
        ctas = (cutlass.min(rows, rows_per_unit) * self.slices + slices_per_cta - 1) // slices_per_cta
        passes = (rows + rows_per_unit - 1) // rows_per_unit
        divisors = [Divisor.of(n) for n in (warps, passes, out.shape[1], out.shape[3])]
        self.kernel(
            partial_o, partial_lse, partial_scale, of_prefill, work, splits, sink, out, lse, by_unit, *divisors
        ).launch(grid=(ctas, Int32(candidates), 1), block=(WARPS * LANES, 1, 1), stream=stream, use_pdl=True)

    @cute.kernel
    def kernel(
        self,
        partial_o: cute.Tensor,
        partial_lse: cute.Tensor,
        partial_scale: cute.Tensor | None,
        of_prefill: OfPrefill | None,
        work: cute.Tensor,
        splits: cute.Tensor,
        sink: cute.Tensor | None,
        out: cute.Tensor,
        lse: cute.Tensor,
        by_unit: Int32,
        warps: Divisor,
        passes: Divisor,
        u1: Divisor,
        r1: Divisor,
    ):
        cute.arch.griddepcontrol_launch_dependents()
        cta, candidate, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        group, rank = warps.divmod(warp)
        number = cta * warps.quotient(Int32(WARPS)) + group
        row, slice = number // self.slices, number % self.slices
        rows_per_unit = partial_o.shape[1]

        # The plan is older than the attention kernel, so only what there is to merge waits for that.
        unit = candidate
        split = Int32(1)
        if by_unit == 0:
            unit = work[candidate, 0]
            split = work[candidate, 2]
        pair, turn = passes.divmod(unit)
        out_row = turn * rows_per_unit + row
        # What is launched behind this kernel takes its end for the attention kernel's, too.
        if (cta == 0) & (candidate == 0):
            cute.arch.griddepcontrol_wait()
        # Only the worker that begins a unit's second piece stands for the unit, so each is merged once.
        if split == 1:
            first = splits[unit]
            count = splits[unit + 1] - first
            if count > 0:
                exists = (row < rows_per_unit) & (out_row < out.shape[2] * out.shape[3])
                any_row = cutlass.select_(exists, row, Int32(0))
                pieces = self.pieces(partial_o, partial_lse, partial_scale, of_prefill, first, count, any_row, slice)
                cute.arch.griddepcontrol_wait()
                self.merge_slice(
                    pieces, sink, out, lse, of_prefill, (pair, u1), (out_row, r1), exists, rank, warps.value
                )

    def pieces(
        self,
        partial_o: cute.Tensor,
        partial_lse: cute.Tensor,
        partial_scale: cute.Tensor | None,
        of_prefill,  # OfPrefill or None
        first: Int32,
        count: Int32,
        row: Int32,
        slice: Int32,
    ) -> "Pieces":
        """The `count` pieces of a unit from slot `first` on, as a lane sees them that merges a slice of a row."""
        start = cute.domain_offset((first, row, slice * self.columns + cute.arch.lane_idx() * self.vector), partial_o)
        scale = None
        if const_expr(partial_scale is not None):
            scale = cute.domain_offset((first, row, slice), partial_scale).iterator.toint()
        maximum = None
        if const_expr(of_prefill is not None):
            maximum = cute.domain_offset((first, row), of_prefill.partial_max).iterator.toint()
        return Pieces(
            start.iterator.toint(),
            cute.domain_offset((first, row), partial_lse).iterator.toint(),
            scale,
            maximum,
            partial_o.shape[1],
            count,
            slice,
        )

    @cute.jit
    def merge_slice(
        self,
        pieces: "Pieces",
        sink: cute.Tensor | None,
        out: cute.Tensor,
        lse: cute.Tensor,
        of_prefill,  # OfPrefill or None
        unit: tuple[Int32, Divisor],
        row: tuple[Int32, Divisor],
        exists,
        rank: Int32,
        warps: Int32,
    ):
        """Merge a slice as warp `rank` of those that share it; all warps of a CTA come here, rows or not.

        unit, row: numbers of (u0, u1) and (r0, r1), and the extents of u1 and r1.
        """
        lane = cute.arch.lane_idx()
        acc = cute.make_rmem_tensor((self.vector, self.chunks), Float32)
        acc.fill(0.0)
        o = cute.make_rmem_tensor((self.vector, self.chunks, self.in_flight), self.partial_dtype)
        scales = cute.make_rmem_tensor((self.chunks, self.in_flight), Float32)
        scales.fill(1.0)
        lses = cute.make_rmem_tensor(self.in_flight, Float32)
        if const_expr(self.slices == 1):  # a warp takes a whole row
            rank, warps = Int32(0), Int32(1)
        self.load(pieces, rank, warps, o, scales, lses)
        top, total, max_logit = self.merged_lse(pieces, lane)
        inv_total = cutlass.select_(total > 0.0, cute.arch.rcp_approx(total), Float32(0.0))
        for begin in cutlass.range(rank, pieces.count, warps * self.in_flight, unroll=1):
            if begin != rank:
                self.load(pieces, begin, warps, o, scales, lses)
            for k in range_constexpr(self.in_flight):
                if begin + k * warps < pieces.count:
                    weight = cute.math.exp2(lses[k] - top, fastmath=True) * inv_total
                    for c in range_constexpr(self.chunks):
                        for v in range_constexpr(self.vector):
                            acc[v, c] = acc[v, c] + weight * scales[c, k] * o[v, c, k].to(Float32)

        if const_expr(self.discards):
            if exists:
                self.discard(pieces, lane)
        if const_expr(self.slices > 1):
            self.sum_over_warps(acc, rank, warps, lane)
        if (rank == 0) & exists:
            to = *unit[1].divmod(unit[0]), *row[1].divmod(row[0])
            if const_expr(of_prefill is not None):
                to = of_prefill.tokens.token(of_prefill.first + to[0]), *to[1:]
            out_row = out[to[0], to[1], to[2], to[3], None]
            row_lse = cutlass.select_(total > 0.0, (top + cute.math.log2(total)) * LN2, Float32.inf)
            if const_expr(sink is not None):
                # exp(lse) / (exp(lse) + exp(sink)); an empty row's out is 0 in any case.
                kept = 1.0 / (1.0 + cute.math.exp2((sink[to[1], to[3]] - row_lse) * LOG2_E, fastmath=True))
                acc.store(acc.load() * cutlass.select_(total > 0.0, kept, Float32(0.0)))
            if const_expr(self.order == TRANSPOSED):
                self.write_transposed(acc, out_row, pieces.slice, lane)
            else:
                result = cute.make_rmem_tensor((self.vector, self.chunks), self.dtype)
                result.store(acc.load().to(self.dtype))
                if const_expr(self.scaled):
                    for c in range_constexpr(self.chunks):
                        trade_words(cute.recast_tensor(result[None, c], Int32), lane)
                cute.autovec_copy(result, self.lane_view(out_row, pieces.slice, lane))
            if (lane == 0) & (pieces.slice == 0):
                lse[to] = row_lse
                if const_expr(of_prefill is not None):
                    of_prefill.max_logits[to] = max_logit

    @cute.jit
    def load(
        self,
        pieces: "Pieces",
        begin: Int32,
        step: Int32,
        o: cute.Tensor,
        scales: cute.Tensor,
        lses: cute.Tensor,
    ):
        """Start the loads of the partial results begin, begin + step, ... of a slice."""
        for k in range_constexpr(self.in_flight):
            i = begin + k * step
            if i < pieces.count:
                row_bytes = self.d_v * self.partial_dtype.width // 8
                start = pointer_at(self.partial_dtype, pieces.o, i * pieces.rows * row_bytes, align=16)
                cute.autovec_copy(cute.make_tensor(start, self.lane_layout()), o[None, None, k])
                lses[k] = pieces.lse_of(i)
                if const_expr(self.scaled):
                    for c in range_constexpr(self.chunks):  # of 256 columns each
                        scales[c, k] = pieces.scale_of(i, c, self.d_v // SCALED_COLUMNS)

    @cute.jit
    def discard(self, pieces: "Pieces", lane: Int32):
        """Drop a row's partial results, which nobody reads again, from the L2.

        It would write them to memory to make room, while the next kernel draws all of the memory's bandwidth.
        """
        row_bytes = self.d_v * self.partial_dtype.width // 8
        cute.arch.sync_warp()  # all lanes have read
        if lane % (LINE_BYTES // VECTOR_BYTES) == 0:
            for i in cutlass.range(pieces.count, unroll=1):
                for c in range_constexpr(self.chunks):
                    discard_line(pieces.o + Int64(i * pieces.rows * row_bytes + c * LANES * VECTOR_BYTES))

    @cute.jit
    def merged_lse(self, pieces: "Pieces", lane: Int32):
        """(m, s, x): the largest partial lse, the sum of 2^(lse_i - m) and, if there are any, the largest maximum.

        s is 0 if no piece attended to anything.
        """
        top, total, max_logit = Float32(NO_LSE), Float32(0.0), -Float32.inf
        lses = cute.make_rmem_tensor(LSES_IN_FLIGHT, Float32)
        for begin in cutlass.range(0, pieces.count, LSES_IN_FLIGHT * LANES, unroll=1):
            lses.fill(-Float32.inf)
            for k in range_constexpr(LSES_IN_FLIGHT):
                i = begin + k * LANES + lane
                if i < pieces.count:
                    lses[k] = pieces.lse_of(i)
                    if const_expr(pieces.max is not None):
                        max_logit = cute.arch.fmax(max_logit, pieces.max_of(i))
            above = top
            for k in range_constexpr(LSES_IN_FLIGHT):
                above = cute.arch.fmax(above, lses[k])
            total = total * cute.math.exp2(top - above, fastmath=True)
            for k in range_constexpr(LSES_IN_FLIGHT):
                total = total + cute.math.exp2(lses[k] - above, fastmath=True)
            top = above
        above = cute.arch.warp_reduction_max(top)
        total = cute.arch.warp_reduction_sum(total * cute.math.exp2(top - above, fastmath=True))
        if const_expr(pieces.max is not None):
            max_logit = cute.arch.warp_reduction_max(max_logit)
        return above, total, max_logit

    @cute.jit
    def lane_view(self, row: cute.Tensor, slice: Int32, lane: Int32) -> cute.Tensor:
        """The (vector, chunks) elements of a slice of a row of `out` that a lane owns."""
        size = self.dtype.width // 8
        offset = (slice * self.columns + lane * self.vector) * size
        start = pointer_at(self.dtype, row.iterator.toint(), offset, align=self.vector * size)
        return cute.make_tensor(start, self.lane_layout())

    def lane_layout(self) -> cute.Layout:
        return cute.make_layout((self.vector, self.chunks), stride=(1, LANES * self.vector))

    @cute.jit
    def write_transposed(self, acc: cute.Tensor, row: cute.Tensor, slice: Int32, lane: Int32):
        """Write a slice of a row: neighbouring lanes, which have neighbouring columns of two groups, trade one."""
        odd = lane % 2
        for w in range_constexpr(self.chunks):
            for c in range_constexpr(2):
                low, high = acc[2 * c, w], acc[2 * c + 1, w]
                theirs = cute.arch.shuffle_sync_bfly(cutlass.select_(odd != 0, low, high), 1)
                pair = cute.make_rmem_tensor(2, self.dtype)
                pair[0] = Float32(cutlass.select_(odd != 0, theirs, low)).to(self.dtype)
                pair[1] = Float32(cutlass.select_(odd != 0, high, theirs)).to(self.dtype)
                column = 64 * (lane // 8 * 2 + c) + 16 * (slice + w) + 8 * odd + lane % 8 - odd
                to = pointer_at(self.dtype, row.iterator.toint(), column * 2, align=4)
                cute.autovec_copy(pair, cute.make_tensor(to, cute.make_layout(2)))

    @cute.jit
    def sum_over_warps(self, acc: cute.Tensor, rank: Int32, warps: Int32, lane: Int32):
        """Add the accumulators of the warps that share a slice, in order, into that of the first."""
        layout = cute.make_layout(
            (self.vector, self.chunks, LANES, WARPS),
            stride=(1, LANES * self.vector, self.vector, self.columns),
        )
        shared = cute.make_tensor(cute.arch.alloc_smem(Float32, cute.cosize(layout), alignment=16), layout)
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        cute.autovec_copy(acc, shared[None, None, lane, warp])
        cute.arch.sync_threads()
        if rank == 0:
            other = cute.make_rmem_tensor_like(acc)
            for w in range_constexpr(1, WARPS):
                if w < warps:
                    cute.autovec_copy(shared[None, None, lane, warp + w], other)
                    for c in range_constexpr(self.chunks):
                        for v in range_constexpr(self.vector):
                            acc[v, c] = acc[v, c] + other[v, c]


@dataclass(frozen=True)
class Pieces:
    """The partial results of one row of a unit, as a lane sees them: addresses of the first piece's."""

    o: Int64  # of this lane's first vector
    lse: Int64
    scale: Int64 | None  # of this slice
    max: Int64 | None
    rows: Int32  # of a slot
    count: Int32
    slice: Int32

    def lse_of(self, i: Int32) -> Float32:
        return cute.make_tensor(pointer_at(Float32, self.lse, i * self.rows * 4, align=4), cute.make_layout(1))[0]

    def max_of(self, i: Int32) -> Float32:
        return cute.make_tensor(pointer_at(Float32, self.max, i * self.rows * 4, align=4), cute.make_layout(1))[0]

    def scale_of(self, i: Int32, part: int, parts: int) -> Float32:
        offset = (i * self.rows * parts + part) * 4
        return cute.make_tensor(pointer_at(Float32, self.scale, offset, align=4), cute.make_layout(1))[0]


def partial_results(
    workspace: cute.Tensor, slots: Int32, rows: Int32 | int, d_v: int
) -> tuple[cute.Tensor, cute.Tensor]:
    """(partial_o [slots, rows, d_v], partial_lse [slots, rows]), one behind the other in a workspace of fp32."""
    partial_o = cute.make_tensor(workspace.iterator, cute.make_ordered_layout((slots, rows, d_v), order=(2, 1, 0)))
    partial_lse = cute.make_tensor(
        workspace.iterator + Int64(slots) * rows * d_v, cute.make_ordered_layout((slots, rows), order=(1, 0))
    )
    return partial_o, partial_lse


def scaled_partial_results(workspace: cute.Tensor, slots: Int32, rows: Int32 | int, d_v: int) -> tuple:
    """(partial_o [slots, rows, d_v] in fp16, partial_lse [slots, rows], partial_scale [slots, rows, d_v / 256]), one
    behind the other in a workspace of fp32."""
    o, lse = cute.recast_ptr(workspace.iterator, dtype=Float16), workspace.iterator + Int64(slots) * rows * (d_v // 2)
    scale, scales = lse + Int64(slots) * rows, d_v // SCALED_COLUMNS
    partial_o = cute.make_tensor(o, cute.make_ordered_layout((slots, rows, d_v), order=(2, 1, 0)))
    partial_lse = cute.make_tensor(lse, cute.make_ordered_layout((slots, rows), order=(1, 0)))
    partial_scale = cute.make_tensor(scale, cute.make_ordered_layout((slots, rows, scales), order=(2, 1, 0)))
    return partial_o, partial_lse, partial_scale


@cute.jit
def merge_pieces(
    dtype: cutlass.Constexpr,
    partial_o: cute.Tensor,
    partial_lse: cute.Tensor,
    partial_scale: cute.Tensor | None,
    work: cute.Tensor,
    splits: cute.Tensor,
    sink: cute.Tensor | None,
    out: cute.Tensor,
    lse: cute.Tensor,
    by_unit: Int32,
    warps: Int32,
    stream,
    order: cutlass.Constexpr = PLAIN,
    of_prefill: OfPrefill | None = None,
):
    """Merge the pieces of split units; launched while the attention kernel still runs, starts when it is done.

    The arguments are those of `Combine` and of its `__call__`. One warp takes a whole row; of more, each takes splits
    of as few columns as its lanes can load.
    """
    candidates = cutlass.select_(by_unit != 0, Int32(splits.shape[0] - 1), Int32(work.shape[0] - 1))
    tensors = (partial_o, partial_lse, partial_scale, work, splits, sink, out, lse)
    d_v = partial_o.shape[2]
    order = order if partial_scale is None else SCALED
    if warps == 1:
        Combine(dtype, d_v, d_v, order)(*tensors, candidates, by_unit, warps, stream, of_prefill)
    else:
        columns = SCALED_COLUMNS if order == SCALED else d_v // 4
        Combine(dtype, d_v, columns, order)(*tensors, candidates, by_unit, warps, stream, of_prefill)


def compile_variant(dtype: str, d_v: int) -> aot.Compiled:
    """Compile for tensors of any extents; the last dimension of `out` is dense, its rows 16-byte aligned."""
    element = getattr(cutlass, dtype)
    slots, rows, workers, units = (cute.sym_int() for _ in range(4))
    u0, u1, r0, r1 = (cute.sym_int() for _ in range(4))
    partial_o = aot.compact(Float32, (slots, rows, d_v), align=16)
    partial_lse = aot.compact(Float32, (slots, rows))
    work = aot.compact(Int32, (workers, 4), align=16)
    splits = aot.compact(Int32, (units,))
    sink = aot.strided(Float32, (u1, r1))
    out = aot.strided(element, (u0, u1, r0, r1, d_v), dense_last=True, align=16)
    lse = aot.strided(Float32, (u0, u1, r0, r1))
    return aot.compile_kernel(
        merge_pieces, element, partial_o, partial_lse, None, work, splits, sink, out, lse, Int32(1), Int32(1)
    )
