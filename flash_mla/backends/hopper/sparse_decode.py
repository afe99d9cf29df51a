"""Token-sparse MLA decode: persistent CTAs that walk a SplitPlan. Dense decode over gathered tokens is a case of it.

A unit of the plan is a query token and up to 64 of its heads, or 128 for a cluster of two CTAs. Two consumer
warpgroups keep the seesaw. Producers, which gather the named rows, are in quantised_sparse_decode and
plain_sparse_decode.

Unless it has a place of its own, P takes that of the RoPE chunk, which nobody needs once the scores are complete: of
block 0 it is freed with the right half of V, of block 1 with the left one, and the producers fill it together with
those. Without RoPE both blocks' P take one place in turns: a warp, which reads and writes its own 16 rows of it, has
read the other side's when it writes its own.
"""

from dataclasses import dataclass, replace

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
from cutlass import Float32, Int32, Int64, Uint8, const_expr, range_constexpr
from cutlass.cute.nvgpu import cpasync, warpgroup

from flash_mla.backends.hopper import aot
from flash_mla.backends.hopper.combine import merge_pieces, scaled_partial_results
from flash_mla.backends.hopper.dequant import CHUNK_BYTES
from flash_mla.backends.hopper.divisor import Divisor
from flash_mla.backends.hopper.epilogue import write_16bit_row
from flash_mla.backends.hopper.fragments import BLOCK, D_V, V_CHUNKS, Registers
from flash_mla.backends.hopper.schedule import Piece, end_of_work, first_piece, next_piece, piece_stop, remains
from flash_mla.backends.hopper.seesaw import (
    CHUNK_ELEMENTS,
    LEFT,
    OTHER,
    OWN,
    RIGHT,
    WARPGROUP,
    Consumer,
    Running,
    Seesaw,
    mask_by_bits,
)
from flash_mla.backends.hopper.softmax import LN2, LOG2_E, THRESHOLD, exponentials, quad_max, row_max
from flash_mla.backends.hopper.sparse_decode_walk import (
    Arguments,
    Source,
    TokenWalk,
    tiles_of,
)
from flash_mla.backends.hopper.wgmma import CHUNK, ROWS, k_major_layout

OCTET = 8  # rows whose tokens are looked up by lanes in a row
ROW_BYTES = CHUNK * 2  # of a chunk
PRODUCER_WARP = 8

REGISTERS = (208, 88)  # of a consumer and of a producer thread: what ptxas fits without spilling

SCORED = 6  # named barrier of the left consumer warpgroup alone; the right one's is the next


@dataclass(frozen=True)
class Barriers:
    """Shared-memory barriers; of K, [block][half]."""

    k_full: cute.Pointer
    k_empty: cute.Pointer
    q_full: cute.Pointer
    q_empty: cute.Pointer
    peer: Int32 | None  # rank of the cluster's other CTA


class SparseDecode(TokenWalk, Seesaw):
    """What kernels of 64 heads a CTA have in common, whatever their producers do.

    stores_unfenced: whether producers leave it to the consumers to make their stores visible to wgmma.
    """

    stores_unfenced = True

    def __init__(
        self,
        dtype: type[cutlass.Numeric],
        d: int,
        cluster: int = 1,
        raw_bytes: int = 0,  # of shared memory for rows as they lie in the cache
        registers: tuple[int, int] = REGISTERS,  # of a consumer and of a producer thread
        p_apart: bool = False,  # whether P has a place of its own, and RoPE comes for itself
    ):
        super().__init__(dtype, d, cluster=cluster, rope_apart=p_apart)
        self.p_chunks = 2 if p_apart else 1 - self.has_rope  # of shared memory, for P alone
        self.q_parts = 2 if p_apart else 1  # that are freed one by one
        self.raw_bytes = raw_bytes
        self.registers = registers

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [b, s_q, h_q, d]
        k_cache: cute.Tensor,  # uint8 [num_pages, bytes of a page], or [num_pages, page_size, bytes] of a plain one
        indices: cute.Tensor,  # [b, s_q, topk]
        lengths: cute.Tensor,  # [b]: tokens that count, of those that indices name
        extra_cache: cute.Tensor,  # the same of a second cache
        extra_indices: cute.Tensor,
        extra_lengths: cute.Tensor,
        sink: cute.Tensor,  # [h_q] fp32, natural log
        work: cute.Tensor,  # [workers + 1, 4]: SplitPlan.work over units (request, query token, head tiles)
        splits: cute.Tensor,  # [units + 1]: SplitPlan.splits
        workspace: cute.Tensor,  # fp32, at least [slots, row_tiles * 64, d_v / 2 + 3]: scaled partial results
        out: cute.Tensor,  # [b, s_q, h_q, d_v]
        lse: cute.Tensor,  # [b, h_q, s_q] fp32, natural log
        scale_log2: Float32,
        page_size: Int32,
        extra_page_size: Int32,
        run: Int32,  # consecutive tokens that an index names, a multiple of itself: 1, or a page in dense decode
        causal: Int32,  # dense decode: whether a query token sees one key more than the one before
        row_tiles: Int32,  # CTAs of a worker
        slots: Int32,  # 0 if no unit is split
        batch_invariant: Int32,
        combine_by_unit: Int32,
        combine_warps: Int32,
        stream,
    ):
        by_heads = cute.make_tensor(q.iterator, cute.select(q.layout, mode=[2, 3, 1, 0]))
        tma_q, q_tma = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(), by_heads, k_major_layout(self.dtype), (ROWS, CHUNK)
        )

        @cute.struct
        class Shared:
            k_full: cute.struct.MemRange[Int64, 2 * len(self.groups)]
            k_empty: cute.struct.MemRange[Int64, 2 * len(self.groups)]
            q_full: cute.struct.MemRange[Int64, 1]
            q_empty: cute.struct.MemRange[Int64, self.q_parts]
            attended: cute.struct.MemRange[Int64, 2]  # of each block, a bit a token
            maxima: cute.struct.MemRange[Float32, 2 * ROWS]  # of each side; at the end of a piece, the other's sums
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, V_CHUNKS * CHUNK_ELEMENTS], 1024]
            k: cute.struct.Align[
                cute.struct.MemRange[self.dtype, (2 * self.chunks + self.p_chunks) * CHUNK_ELEMENTS], 1024
            ]  # and P
            raw: cute.struct.Align[cute.struct.MemRange[Uint8, self.raw_bytes], 128]
            indices: cute.struct.MemRange[Int32, WARPGROUP]  # of the next tile

        self.Shared = Shared
        unit_rows = row_tiles * ROWS
        passes = (q.shape[2] + unit_rows - 1) // unit_rows
        page_sizes = Divisor.of(page_size), Divisor.of(extra_page_size)
        partials = scaled_partial_results(workspace, slots, unit_rows, D_V)
        args = Arguments(
            q, Source(k_cache, page_sizes[0], self.token_bytes(k_cache, False), indices, lengths),
            Source(extra_cache, page_sizes[1], self.token_bytes(extra_cache, True), extra_indices, extra_lengths),
            sink, work, splits, *partials, out, lse, scale_log2, Divisor.of(run), Divisor.of(q.shape[1]),
            Divisor.of(passes), causal, batch_invariant,
        )  # fmt: skip
        self.kernel(args, tma_q, q_tma).launch(
            grid=(row_tiles, work.shape[0] - 1, 1),
            block=(3 * WARPGROUP, 1, 1),
            cluster=(self.cluster, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
        )
        if slots != 0:
            merge_queries(self.dtype, *partials, work, splits, sink, out, lse, combine_by_unit, combine_warps, stream)

    @cute.kernel
    def kernel(self, args: Arguments, tma_q: cute.CopyAtom, q_tma: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        shared = utils.SmemAllocator().allocate(self.Shared)
        barriers = Barriers(
            shared.k_full.data_ptr(),
            shared.k_empty.data_ptr(),
            shared.q_full.data_ptr(),
            shared.q_empty.data_ptr(),
            self.cluster_rank() ^ 1 if const_expr(self.cluster > 1) else None,
        )
        if warp == PRODUCER_WARP:
            cpasync.prefetch_descriptor(tma_q)
        if warp == PRODUCER_WARP + 1:
            args.prefetch()
        self.init_barriers(barriers, warp)
        if warp == 0:
            args.prefetch_indices()
        cute.arch.griddepcontrol_wait()  # for the kernel before, under whose end all this has run
        cute.arch.griddepcontrol_launch_dependents()  # not earlier: combine reads the plan without waiting for it

        if warp >= PRODUCER_WARP:
            cute.arch.setmaxregister_decrease(self.registers[1])
            self.produce(args, shared, barriers, tma_q, q_tma, thread - PRODUCER_WARP * 32)
        else:
            cute.arch.setmaxregister_increase(self.registers[0])
            side = cute.arch.make_warp_uniform(warp // 4)
            self.consume(side, args, shared, barriers, thread - side * WARPGROUP)
        if const_expr(self.cluster > 1):  # the peer may still signal our barriers
            self.meet()

    @cute.jit
    def init_barriers(self, barriers: Barriers, warp: Int32):
        if warp == 0:
            with cute.arch.elect_one():
                for i in range_constexpr(2 * len(self.groups)):
                    cute.arch.mbarrier_init(barriers.k_full + i, 4 + self.copies(*divmod(i, len(self.groups))))
                    cute.arch.mbarrier_init(barriers.k_empty + i, 4 * self.cluster)
                cute.arch.mbarrier_init(barriers.q_full, 1)
                for i in range_constexpr(self.q_parts):
                    cute.arch.mbarrier_init(barriers.q_empty + i, 8)
        cute.arch.mbarrier_init_fence()
        self.meet()

    # ---------------------------------------------------------------------------------------------- producers

    def produce(self, args, shared, barriers, tma_q: cute.CopyAtom, q_tma: cute.Tensor, thread: Int32):
        """Fill K blocks in four steps a tile: of block 0 the left half, then the right half and RoPE; of block 1 the
        right half, then the left half and RoPE. That is the order in which the consumers need and free them."""
        raise NotImplementedError

    def token_bytes(self, cache: cute.Tensor, is_extra: bool) -> Int64 | int:
        """From one token of a page to the next."""
        raise NotImplementedError

    def copies(self, block: int, half: int) -> int:
        """How many threads' copies half a block consists of, besides what each of the producers' four warps does."""
        raise NotImplementedError

    def token(self, warp: Int32, lane: Int32) -> Int32:
        """The token of a tile that a producer lane looks up: half of the lanes block 0's, half block 1's; the first
        eight of each, those of octet 0."""
        octet = self.octet(warp, lane // OCTET % 2)
        return lane // (2 * OCTET) * BLOCK + octet * OCTET + lane % OCTET

    def octet(self, warp, i):
        """Number, in a block, of the i-th eight rows that a producer warp looks up; the first self.octets are its own.

        In a cluster, i = 1 is what the peer's warp converts.
        """
        return 2 * warp + i if self.cluster == 1 else 4 * (self.cluster_rank() ^ i) + warp

    @cute.jit
    def note_attended(self, shared, attended: Int32, block: Int32, warp: Int32):
        """Tell the consumers which tokens of a block this warp has looked up to be attended to."""
        bits = shared.attended.data_ptr()
        with cute.arch.elect_one():
            for i in range_constexpr(2):
                byte = Int32(bits.toint()) + block * 8 + self.octet(warp, i)
                cute.arch.inline_ptx(
                    "st.shared.u8 [{$r0}], {$r1};", read_only_args=[byte, attended >> (block * 16 + i * OCTET)]
                )

    @cute.jit
    def load_q(self, args, shared, barriers, tma_q: cute.CopyAtom, q_tma: cute.Tensor, unit: Int32, pieces: Int32):
        """Bring the V columns of a unit's queries by TMA; heads beyond the last are zeros."""
        rows = args.rows(Piece(unit, Int32(0), Int32(0)))
        layout = cute.tile_to_shape(k_major_layout(self.dtype), (ROWS, CHUNK, V_CHUNKS), (0, 1, 2))
        to, source = cpasync.tma_partition(
            tma_q,
            0,
            cute.make_layout(1),
            cute.group_modes(shared.q.get_tensor(layout.outer, swizzle=layout.inner), 0, 2),
            cute.group_modes(cute.local_tile(q_tma, (ROWS, CHUNK), (None, None, None, None)), 0, 2),
        )
        for part in range_constexpr(self.q_parts):
            cute.arch.mbarrier_wait(barriers.q_empty + part, (pieces & 1) ^ 1)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(barriers.q_full, V_CHUNKS * CHUNK_BYTES)
        for chunk in cutlass.range(V_CHUNKS, unroll=1):
            cute.copy(
                tma_q,
                source[None, rows.head_tile, chunk, rows.token, rows.request],
                to[None, chunk],
                tma_bar_ptr=barriers.q_full,
            )

    # ---------------------------------------------------------------------------------------------- consumers

    @cute.jit
    def consume(self, side: Int32, args, shared, barriers, thread: Int32):
        """One consumer warpgroup: scores of block `side` of each pair, half `side` of the output columns.

        The sides have code of their own for pairs in a loop alone.
        """
        running = Running.allocate(top=False)
        f = Registers.allocate(self.dtype)
        c = Consumer(side, shared, barriers, f, running, args.scale_log2, thread, has_room=True)
        parity, q_parity = Int32(0), Int32(0)  # of pairs and pieces
        piece, end = first_piece(args.work), end_of_work(args.work)
        tiles, slot = Int32(0), Int32(0)
        if remains(piece, end):
            self.load_q_rope(args, c, piece)
            tiles, slot = self.extent(args, piece)
        while remains(piece, end):
            stop = piece_stop(piece, end, tiles, args.batch_invariant)
            running.reset()
            c.f.o.fill(0.0)  # a piece may be empty
            if stop > piece.tile:
                cute.arch.mbarrier_wait(barriers.q_full, q_parity)
                q_parity ^= 1
                if side == LEFT:
                    parity = self.pairs(replace(c, side=LEFT), parity, piece.tile, stop)
                else:
                    parity = self.pairs(replace(c, side=RIGHT), parity, piece.tile, stop)
                self.merge_sides(c)
            rows = args.rows(piece)
            sinks = self.sinks(args, c, rows)
            following = next_piece(piece, stop, tiles)
            next_tiles, next_slot = Int32(0), Int32(0)
            if remains(following, end):
                self.load_q_rope(args, c, following)
                next_tiles, next_slot = self.extent(args, following)
            self.write(args, c, rows, sinks, slot)
            piece, tiles, slot = following, next_tiles, next_slot

    @cute.jit
    def pairs(self, c, parity: Int32, tile: Int32, stop: Int32) -> Int32:
        """All pairs of a piece; returns the parity behind them."""
        while tile < stop:
            tile += 1
            self.paced_pair(c, parity, tile == stop)
            parity ^= 1
        return parity

    @cute.jit
    def paced_pair(self, c, parity, closes):
        """One pair of K blocks, at the pace of producers; whether it `closes` its piece.

        What takes time is to fill K, one half of a block after the other. So the right side takes P0 between the parts
        of its scores: the half that is filled last has until then, and the producers get the right half of block 0 back
        before it. If both sides' scores came before softmax, as in `pair`, they would wait for that (3 to 9 % slower).
        """
        n, sums = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32)
        n[0], n[1] = c.running.reference[0], c.running.reference[1]
        warpgroup.fence()
        self.issue_scores(c, (OWN,), parity)
        if c.side == LEFT:
            self.issue_scores(c, (OTHER,), parity)
            warpgroup.wait_group(0)
        else:
            warpgroup.wait_group(0)
            self.take_over(c, n, False)
            self.issue_scores(c, (OTHER,), parity)
            warpgroup.wait_group(1)
            self.free(c, OTHER, OWN)
            warpgroup.wait_group(0)
        self.free_q(c, LEFT, closes)  # stands for all of it, which comes at once

        self.softmax(c, n, sums, parity, False)
        self.hand_over(c, n)
        self.accumulate(c, n, sums, False)
        warpgroup.wait_group(0)
        self.free(c, OWN, OWN)

        if c.side == LEFT:
            self.take_over(c, n, False)
            warpgroup.wait_group(0)
            self.free(c, OTHER, OWN)

    def load_q_rope(self, args, c: Consumer, piece: Piece):
        """Start to load what a piece needs besides what the producers bring: Q's RoPE chunk."""
        if self.has_rope:
            rows = args.rows(piece)
            for r, head in enumerate(self.heads(args, c, rows)):
                c.f.load_q_rope(r, args.q[rows.request, rows.token, head, None].iterator, c.thread % 32)

    def heads(self, args, c: Consumer, rows) -> list[Int32]:
        """Of this thread's two rows; the last head there is stands for those that are not."""
        return [cutlass.min(rows.head_tile * ROWS + c.row + 8 * r, args.q.shape[2] - 1) for r in range(2)]

    def sinks(self, args, c: Consumer, rows) -> list[Float32]:
        """Start to load those of this thread's two rows."""
        return [args.sink[head] for head in self.heads(args, c, rows)]

    def extent(self, args, piece: Piece) -> tuple[Int32, Int32]:
        """(tiles of a piece's unit, slot of its result)."""
        length, extra_length = args.lengths(piece)
        return tiles_of(length) + tiles_of(extra_length), args.slot(piece)

    def wait_chunks(self, c: Consumer, part: int, parity):
        super().wait_chunks(c, part, parity)
        if self.stores_unfenced:
            cute.arch.fence_proxy("async.shared", space="cta")

    def place_of_p(self, c: Consumer, of: int) -> cute.Pointer:
        chunk = (c.side ^ of) * self.chunks + V_CHUNKS if self.has_rope else 2 * V_CHUNKS
        return c.shared.k.data_ptr() + chunk * CHUNK_ELEMENTS

    def free_p(self, c: Consumer):
        if self.has_rope:  # every warp of this side has multiplied that
            cute.arch.barrier(barrier_id=SCORED + c.side, number_of_threads=WARPGROUP)

    def places_of_sums(self, c: Consumer) -> tuple[cute.Tensor, cute.Tensor]:
        # Nobody but the warp that reads a maximum of the other side writes its sum there.
        return c.of_rows(c.shared.maxima, OTHER), c.of_rows(c.shared.maxima, OWN)

    @cute.jit
    def softmax(self, c, n, sums, parity, begins):
        """The maximum comes first: scores and probabilities are never all alive, which saves registers."""
        scores, scale = c.f.s, c.scale
        attended = cute.recast_ptr(c.shared.attended.data_ptr() + c.side, dtype=Int32)
        words = cute.make_tensor(attended, cute.make_layout(2))
        bits = [words[0], words[1]]
        if bits[0] & bits[1] != -1:
            mask_by_bits(scores, bits, c.thread % 32)
        tops = (row_max(scores, 0), row_max(scores, 1))
        if cute.arch.vote_any_sync(cute.arch.fmax(tops[0] - n[0], tops[1] - n[1]) * scale > THRESHOLD):
            for r in range_constexpr(2):
                top = quad_max(tops[r])
                n[r] = cutlass.select_((top - n[r]) * scale > THRESHOLD, top, n[r])
        exponentials(scores, c.f.p_scores, sums, n, scale)

    @cute.jit
    def write(self, args, c, rows, sinks: list, slot: Int32):
        """Normalise and write a whole unit to the outputs, a piece of one to its slot of the workspace."""
        inv, lse2 = self.inverse_and_lse(c)
        if slot < 0:
            self.write_outputs(args, c, inv, lse2, rows, sinks)
        else:
            self.write_partials(args, c, rows.count, inv, lse2, slot)

    @cute.jit
    def write_outputs(self, args, c, inv: cute.Tensor, lse2: cute.Tensor, rows, sinks: list):
        lane = c.thread % 32
        heads = self.heads(args, c, rows)
        for r in range_constexpr(2):
            exists, head = c.row + 8 * r < rows.count, heads[r]
            seen = lse2[r] > -Float32.inf
            # exp(lse) / (exp(lse) + exp(sink))
            kept = 1.0 / (1.0 + cute.math.exp2(sinks[r] * LOG2_E - lse2[r], fastmath=True))
            factor = cutlass.select_(seen, inv[r] * kept, Float32(0.0))
            if exists and lane % 4 == 0 and c.side == LEFT:
                args.lse[rows.request, head, rows.token] = cutlass.select_(seen, lse2[r] * LN2, Float32.inf)
            to = args.out[rows.request, rows.token, head, None].iterator + c.side * (D_V // 2)
            write_16bit_row(c.f.o, r, factor, to, exists, lane)


@cute.jit
def merge_queries(
    dtype: cutlass.Constexpr,
    partial_o: cute.Tensor,
    partial_lse: cute.Tensor,
    partial_scale: cute.Tensor | None,
    work: cute.Tensor,
    splits: cute.Tensor,
    sink: cute.Tensor,
    out: cute.Tensor,
    lse: cute.Tensor,
    by_unit: Int32,
    warps: Int32,
    stream,
):
    """`merge_pieces` of units that are query tokens and some of their heads."""
    (b, s_q, h_q, _), (out_b, out_s, out_h, _) = out.shape, out.stride
    lse_b, lse_h, lse_s = lse.stride
    rows_out = cute.make_tensor(
        out.iterator, cute.make_layout((b, s_q, 1, h_q, D_V), stride=(out_b, out_s, 0, out_h, 1))
    )
    rows_lse = cute.make_tensor(lse.iterator, cute.make_layout((b, s_q, 1, h_q), stride=(lse_b, lse_s, 0, lse_h)))
    rows_sink = cute.make_tensor(sink.iterator, cute.make_layout((s_q, h_q), stride=(0, sink.stride[0])))
    merge_pieces(
        dtype, partial_o, partial_lse, partial_scale, work, splits, rows_sink, rows_out, rows_lse, by_unit, warps,
        stream,
    )  # fmt: skip


def compile_for(kernel: TokenWalk, d: int, caches: list) -> aot.Compiled:
    """Compile for descriptions of the main and the extra cache, and queries of head dim d."""
    b, s_q, h_q = (cute.sym_int() for _ in range(3))
    q = aot.strided(kernel.dtype, (b, s_q, h_q, d), dense_last=True, align=16)
    sources = []
    for cache in caches:
        indices = aot.strided(Int32, (b, s_q, cute.sym_int()), dense_last=True)
        sources += [cache, indices, aot.strided(Int32, (b,))]
    sink = aot.strided(Float32, (h_q,))
    work = aot.compact(Int32, (cute.sym_int(), 4), align=16)
    splits = aot.compact(Int32, (cute.sym_int(),))
    workspace = aot.compact(Float32, (cute.sym_int(),), align=16)
    out = aot.strided(kernel.dtype, (b, s_q, h_q, D_V), dense_last=True, align=16)
    lse = aot.strided(Float32, (b, h_q, s_q))
    return aot.compile_kernel(
        kernel, q, *sources, sink, work, splits, workspace, out, lse, Float32(1.0), *[Int32(0)] * 9
    )
