"""Token-sparse MLA decode: persistent CTAs that walk a SplitPlan. Dense decode over gathered tokens is a case of it.

A unit of the plan is a query token and up to 64 of its heads, or 128 for a cluster of two CTAs. Two consumer
warpgroups keep the seesaw of dense_decode: of each pair of 64-token blocks the left one scores block 0, the right one
block 1; each hands its probabilities to the other through shared memory, and each accumulates one half of the output's
512 columns. Producers, which gather the named rows, are in quantised_sparse_decode and plain_sparse_decode.

P takes the place of the RoPE chunk, which nobody needs once the scores are complete: of block 0 it is freed with the
right half of V, of block 1 with the left one, and the producers fill it together with those. Without RoPE both blocks'
P take one place in turns: a warp, which reads and writes its own 16 rows of it, has read the other side's when it
writes its own.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
from cutlass import Float32, Int32, Int64, Uint8, const_expr, range_constexpr
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.cute.nvgpu.warpgroup import OperandSource

from flash_mla.backends.hopper import aot
from flash_mla.backends.hopper.combine import merge_pieces, scaled_partial_results
from flash_mla.backends.hopper.dequant import CHUNK_BYTES, HALF_CHUNKS
from flash_mla.backends.hopper.divisor import Divisor
from flash_mla.backends.hopper.epilogue import write_16bit_row, write_scaled_row
from flash_mla.backends.hopper.fragments import BLOCK, D_V, V_CHUNKS, Fragments
from flash_mla.backends.hopper.schedule import Piece, end_of_work, first_piece, next_piece, piece_stop, remains
from flash_mla.backends.hopper.softmax import (
    LN2,
    LOG2_E,
    NO_SCORE,
    THRESHOLD,
    exponentials,
    quad_max,
    quad_sum,
    rescale,
    row_max,
)
from flash_mla.backends.hopper.sparse_decode_walk import (
    Arguments,
    Source,
    TokenWalk,
    tiles_of,
)
from flash_mla.backends.hopper.wgmma import CHUNK, ROWS, gemm, k_major_layout, qk_op, tile_at

CHUNK_ELEMENTS = ROWS * CHUNK
WARPGROUP = 128
OCTET = 8  # rows whose tokens are looked up by lanes in a row
ROW_BYTES = CHUNK * 2  # of a chunk
PRODUCER_WARP = 8

REGISTERS = (208, 88)  # of a consumer and of a producer thread: what ptxas fits without spilling

LEFT, RIGHT = 0, 1

# Named barriers of the two consumer warpgroups.
P0_READY, P1_READY, SUMS_READY, LEFT_ONLY, RIGHT_ONLY = 1, 2, 3, 4, 5


@dataclass(frozen=True)
class Barriers:
    """Shared-memory barriers; of K, [block][half]."""

    k_full: cute.Pointer
    k_empty: cute.Pointer
    q_full: cute.Pointer
    q_empty: cute.Pointer
    peer: Int32 | None  # rank of the cluster's other CTA


class SparseDecode(TokenWalk):
    """What kernels of 64 heads a CTA have in common, whatever their producers do."""

    def __init__(
        self,
        dtype: type[cutlass.Numeric],
        d: int,
        cluster: int = 1,
        raw_bytes: int = 0,  # of shared memory for rows as they lie in the cache
        registers: tuple[int, int] = REGISTERS,  # of a consumer and of a producer thread
    ):
        self.dtype = dtype
        self.has_rope = d > D_V
        self.k_chunks = V_CHUNKS + self.has_rope  # of a block
        self.cluster = cluster
        self.raw_bytes = raw_bytes
        self.registers = registers

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [b, s_q, h_q, d]
        k_cache: cute.Tensor,  # [num_pages, bytes of a page] uint8
        indices: cute.Tensor,  # [b, s_q, topk]
        lengths: cute.Tensor,  # [b]: entries of indices that count
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
            k_full: cute.struct.MemRange[Int64, 4]
            k_empty: cute.struct.MemRange[Int64, 4]
            q_full: cute.struct.MemRange[Int64, 1]
            q_empty: cute.struct.MemRange[Int64, 1]
            attended: cute.struct.MemRange[Int64, 2]  # of each block, a bit a token
            maxima: cute.struct.MemRange[Float32, 2 * ROWS]  # of each side; at the end of a piece, the other's sums
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, V_CHUNKS * CHUNK_ELEMENTS], 1024]
            k: cute.struct.Align[
                cute.struct.MemRange[self.dtype, (self.p_chunk(1) + 1) * CHUNK_ELEMENTS], 1024
            ]  # and P
            raw: cute.struct.Align[cute.struct.MemRange[Uint8, self.raw_bytes], 128]
            indices: cute.struct.MemRange[Int32, WARPGROUP]  # of the next tile

        self.Shared = Shared
        unit_rows = row_tiles * ROWS
        passes = (q.shape[2] + unit_rows - 1) // unit_rows
        divisors = map(Divisor.of, (page_size, extra_page_size, run, q.shape[1], passes))
        partials = scaled_partial_results(workspace, slots, unit_rows, D_V)
        self.kernel(
            tma_q, q_tma, q, k_cache, indices, lengths, extra_cache, extra_indices, extra_lengths, sink, work, splits,
            *partials, out, lse, scale_log2, *divisors, causal, batch_invariant,
        ).launch(
            grid=(row_tiles, work.shape[0] - 1, 1),
            block=(3 * WARPGROUP, 1, 1),
            cluster=(self.cluster, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
        )  # fmt: skip
        if slots != 0:
            merge_queries(self.dtype, *partials, work, splits, sink, out, lse, combine_by_unit, combine_warps, stream)

    @cute.kernel
    def kernel(
        self,
        tma_q: cute.CopyAtom,
        q_tma: cute.Tensor,
        q: cute.Tensor,
        k_cache: cute.Tensor,
        indices: cute.Tensor,
        lengths: cute.Tensor,
        extra_cache: cute.Tensor,
        extra_indices: cute.Tensor,
        extra_lengths: cute.Tensor,
        sink: cute.Tensor,
        work: cute.Tensor,
        splits: cute.Tensor,
        partial_o: cute.Tensor,
        partial_lse: cute.Tensor,
        partial_scale: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        scale_log2: Float32,
        page_size: Divisor,
        extra_page_size: Divisor,
        run: Divisor,
        tokens: Divisor,
        passes: Divisor,
        causal: Int32,
        batch_invariant: Int32,
    ):
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
        args = Arguments(
            q, Source(k_cache, page_size, self.token_bytes(k_cache, False), indices, lengths),
            Source(extra_cache, extra_page_size, self.token_bytes(extra_cache, True), extra_indices, extra_lengths),
            sink, work, splits, partial_o, partial_lse, partial_scale, out, lse, scale_log2, run, tokens, passes,
            causal, batch_invariant,
        )  # fmt: skip
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
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()

    def p_chunk(self, block):
        """Which chunk of K's shared memory P of a block takes."""
        return block * self.k_chunks + V_CHUNKS if self.has_rope else 2 * V_CHUNKS

    def cluster_rank(self) -> Int32:
        return cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())

    @cute.jit
    def init_barriers(self, barriers: Barriers, warp: Int32):
        if warp == 0:
            with cute.arch.elect_one():
                for i in range_constexpr(4):
                    cute.arch.mbarrier_init(barriers.k_full + i, 4 + self.copies(i // 2, i % 2))
                    cute.arch.mbarrier_init(barriers.k_empty + i, 4 * self.cluster)
                cute.arch.mbarrier_init(barriers.q_full, 1)
                cute.arch.mbarrier_init(barriers.q_empty, 8)
        cute.arch.mbarrier_init_fence()
        if const_expr(self.cluster > 1):
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

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
        cute.arch.mbarrier_wait(barriers.q_empty, (pieces & 1) ^ 1)
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

        The sides have code of their own for pairs alone: what both run is sooner in the instruction caches.
        """
        lane = thread % 32
        row0 = thread // 32 * 16 + lane // 4  # of this thread's two rows, row0 and row0 + 8
        f = self.fragments(side, shared, thread)
        m = cute.make_rmem_tensor(2, Float32)
        row_sum = cute.make_rmem_tensor(2, Float32)
        scale = args.scale_log2

        pairs = Int32(0)
        pieces = Int32(0)
        tiles, slot = Int32(0), Int32(0)
        piece, end = first_piece(args.work), end_of_work(args.work)
        if remains(piece, end):
            tiles, slot = self.begin_piece(args, f, piece, row0, lane)
        while remains(piece, end):
            stop = piece_stop(piece, end, tiles, args.batch_invariant)
            following = next_piece(piece, stop, tiles)
            next_tiles, next_slot = Int32(0), Int32(0)
            f.o.fill(0.0)
            m.fill(NO_SCORE)
            row_sum.fill(0.0)
            if stop > piece.tile:
                cute.arch.mbarrier_wait(barriers.q_full, pieces & 1)
                pieces += 1
            if side == LEFT:
                for tile in cutlass.range(piece.tile, stop, unroll=1):
                    parity = (pairs + tile - piece.tile) & 1
                    self.pair_left(shared, barriers, f, m, row_sum, scale, parity, tile + 1 == stop, thread)
            else:
                for tile in cutlass.range(piece.tile, stop, unroll=1):
                    parity = (pairs + tile - piece.tile) & 1
                    self.pair_right(shared, barriers, f, m, row_sum, scale, parity, tile + 1 == stop, thread)
            pairs += cutlass.max(stop - piece.tile, 0)
            if remains(following, end):
                next_tiles, next_slot = self.begin_piece(args, f, following, row0, lane)

            self.write(side, args, shared, f, m, row_sum, slot, args.rows(piece), thread)
            piece, tiles, slot = following, next_tiles, next_slot

    @cute.jit
    def begin_piece(self, args, f, piece: Piece, row0: Int32, lane: Int32):
        """Start early what a piece needs from global memory: Q's RoPE chunk; (tiles, slot) are returned."""
        if const_expr(self.has_rope):
            rows = args.rows(piece)
            for r in range_constexpr(2):
                # The last head there is stands for those that are not.
                head = cutlass.min(rows.head_tile * ROWS + row0 + 8 * r, args.q.shape[2] - 1)
                f.load_q_rope(r, args.q[rows.request, rows.token, head, None].iterator, lane)
        length, extra_length = args.lengths(piece)
        return tiles_of(length) + tiles_of(extra_length), args.slot(piece)

    def fragments(self, side: Int32, shared, thread) -> Fragments:
        chunk, q, k = k_major_layout(self.dtype), shared.q.data_ptr(), shared.k.data_ptr()
        p, other_p = (tile_at(k, self.p_chunk(block), chunk) for block in (side, 1 - side))
        return Fragments.of(self.dtype, side, thread, q, k, self.k_chunks, p, other_p)

    def issue_qk(self, side: int, f, barriers: Barriers, part: int, parity):
        """Issue a part of S = Q K^T: this side's half of the V columns, then the other half and RoPE."""
        half = side ^ part
        cute.arch.mbarrier_wait(barriers.k_full + (2 * side + half), parity)
        # Their stores become visible to wgmma by a fence on this side: on theirs it would wait for copies under way.
        cute.arch.fence_proxy("async.shared", space="cta")
        for i in range(HALF_CHUNKS):
            chunk = half * HALF_CHUNKS + i
            gemm(qk_op(self.dtype, OperandSource.SMEM), f.s, f.q[chunk], f.k[chunk], overwrite=part == 0 and i == 0)
        if part == 1 and self.has_rope:
            gemm(qk_op(self.dtype, OperandSource.RMEM), f.s, f.q_rope, f.k[V_CHUNKS])

    def free(self, barriers: Barriers, block: int, half: int):
        """Tell the producers, the peer's too, that half a block has been read."""
        empty = barriers.k_empty + (2 * block + half)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(empty)
            if self.cluster > 1:
                cute.arch.mbarrier_arrive(empty, barriers.peer)

    def pair_left(self, shared, barriers, f, m, row_sum, scale, parity, closes, thread):
        """A pair of K blocks on the left side; `closes` its piece or not."""
        n = cute.make_rmem_tensor(2, Float32)
        sums = cute.make_rmem_tensor(2, Float32)
        row = thread // 32 * 16 + thread % 32 // 4
        maxima = shared.maxima.get_tensor(cute.make_layout((ROWS, 2)))
        max0, max1 = maxima[None, LEFT], maxima[None, RIGHT]

        warpgroup.fence()
        self.issue_qk(LEFT, f, barriers, 0, parity)
        self.issue_qk(LEFT, f, barriers, 1, parity)
        warpgroup.commit_group()
        warpgroup.wait_group(0)
        self.free_q(barriers, closes)

        n[0], n[1] = m[0], m[1]
        self.hide_unattended(f.s, shared, LEFT, thread % 32)
        softmax(f.s, f.p_scores, sums, n, scale)
        if self.has_rope:  # P takes its place, once every warp of this side has multiplied it
            cute.arch.barrier(barrier_id=LEFT_ONLY, number_of_threads=WARPGROUP)
        cute.copy(f.p_out[0], f.p_out[1], f.p_out[2])
        max0[row], max0[row + 8] = n[0], n[1]
        cute.arch.barrier_arrive(barrier_id=P0_READY, number_of_threads=2 * WARPGROUP)
        rescale(f.o, row_sum, m, n[0], n[1], scale)
        warpgroup.fence()
        f.issue_pv(f.p, 0)
        warpgroup.commit_group()
        row_sum[0], row_sum[1] = row_sum[0] + sums[0], row_sum[1] + sums[1]
        warpgroup.wait_group(0)
        self.free(barriers, 0, LEFT)

        cute.arch.barrier(barrier_id=P1_READY, number_of_threads=2 * WARPGROUP)
        # For the other side's P; on that side a fence would hold up its own P V.
        cute.arch.fence_proxy("async.shared", space="cta")
        rescale(f.o, row_sum, m, max1[row], max1[row + 8], scale)
        warpgroup.fence()
        f.issue_pv(f.p_in, 1)
        warpgroup.commit_group()
        warpgroup.wait_group(0)
        self.free(barriers, 1, LEFT)

    def pair_right(self, shared, barriers, f, m, row_sum, scale, parity, closes, thread):
        """A pair of K blocks on the right side.

        The left side's probabilities come between the parts of the scores: the part of K that is converted last has
        until then, and the producers get the right half of block 0 back before it.
        """
        n = cute.make_rmem_tensor(2, Float32)
        sums = cute.make_rmem_tensor(2, Float32)
        row = thread // 32 * 16 + thread % 32 // 4
        maxima = shared.maxima.get_tensor(cute.make_layout((ROWS, 2)))
        max0, max1 = maxima[None, LEFT], maxima[None, RIGHT]

        warpgroup.fence()
        self.issue_qk(RIGHT, f, barriers, 0, parity)
        warpgroup.commit_group()
        warpgroup.wait_group(0)
        cute.arch.barrier(barrier_id=P0_READY, number_of_threads=2 * WARPGROUP)
        cute.arch.fence_proxy("async.shared", space="cta")
        n[0], n[1] = max0[row], max0[row + 8]
        rescale(f.o, row_sum, m, n[0], n[1], scale)
        warpgroup.fence()
        f.issue_pv(f.p_in, 0)
        warpgroup.commit_group()
        self.issue_qk(RIGHT, f, barriers, 1, parity)
        warpgroup.commit_group()
        warpgroup.wait_group(1)
        self.free(barriers, 0, RIGHT)
        warpgroup.wait_group(0)
        self.free_q(barriers, closes)

        self.hide_unattended(f.s, shared, RIGHT, thread % 32)
        softmax(f.s, f.p_scores, sums, n, scale)
        if self.has_rope:
            cute.arch.barrier(barrier_id=RIGHT_ONLY, number_of_threads=WARPGROUP)
        cute.copy(f.p_out[0], f.p_out[1], f.p_out[2])
        max1[row], max1[row + 8] = n[0], n[1]
        cute.arch.barrier_arrive(barrier_id=P1_READY, number_of_threads=2 * WARPGROUP)
        rescale(f.o, row_sum, m, n[0], n[1], scale)
        warpgroup.fence()
        f.issue_pv(f.p, 1)
        warpgroup.commit_group()
        row_sum[0], row_sum[1] = row_sum[0] + sums[0], row_sum[1] + sums[1]
        warpgroup.wait_group(0)
        self.free(barriers, 1, RIGHT)

    @cute.jit
    def free_q(self, barriers: Barriers, closes):
        """Tell the producers that this warp has read Q for the last time in a piece, if this pair `closes` it."""
        if closes:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(barriers.q_empty)

    @cute.jit
    def hide_unattended(self, s: cute.Tensor, shared, block: cutlass.Constexpr, lane: Int32):
        """Set the scores of a block's tokens that are not attended to, if there are any, to -inf."""
        bits = cute.make_tensor(cute.recast_ptr(shared.attended.data_ptr() + block, dtype=Int32), cute.make_layout(2))
        words = (bits[0], bits[1])
        if words[0] & words[1] != -1:
            for j in range_constexpr(8):
                mine = words[j // 4] >> (8 * (j % 4) + 2 * (lane % 4))
                for c in range_constexpr(2):
                    for r in range_constexpr(2):
                        e = 4 * j + 2 * r + c
                        s[e] = cutlass.select_(mine & (1 << c) != 0, s[e], -Float32.inf)

    @cute.jit
    def write(
        self,
        side: Int32,
        args,
        shared,
        f,
        m: cute.Tensor,
        row_sum: cute.Tensor,
        slot: Int32,
        rows,
        thread: Int32,
    ):
        """Normalise and write a whole unit to the outputs, a piece of one to its slot of the workspace."""
        lane = thread % 32
        row0 = thread // 32 * 16 + lane // 4
        # Nobody but the warp that reads a maximum of the other side writes its sum there.
        sums = shared.maxima.get_tensor(cute.make_layout((ROWS, 2)))
        heads = [cutlass.min(rows.head_tile * ROWS + row0 + 8 * r, args.q.shape[2] - 1) for r in range(2)]
        sinks = [args.sink[head] * LOG2_E for head in heads]  # early, for their latency
        row_sum[0], row_sum[1] = quad_sum(row_sum[0]), quad_sum(row_sum[1])
        if lane % 4 == 0:
            sums[row0, 1 - side], sums[row0 + 8, 1 - side] = row_sum[0], row_sum[1]
        cute.arch.barrier(barrier_id=SUMS_READY, number_of_threads=2 * WARPGROUP)
        inv = cute.make_rmem_tensor(2, Float32)
        for r in range_constexpr(2):
            total = row_sum[r] + sums[row0 + 8 * r, side]
            inv[r] = cutlass.select_(total > 0.0, cute.arch.rcp_approx(total), Float32(0.0))
            # lse in base 2; an empty row's is -inf here.
            row_sum[r] = cute.math.log2(total) + m[r] * args.scale_log2
        # The sums are read before the next piece may overwrite them.
        cute.arch.barrier(barrier_id=SUMS_READY, number_of_threads=2 * WARPGROUP)
        if slot < 0:
            self.write_outputs(side, args, f, row_sum, inv, heads, sinks, rows, row0, lane)
        else:
            self.write_partials(side, args, f, row_sum, inv, slot, rows, row0, lane)

    @cute.jit
    def write_outputs(
        self,
        side: Int32,
        args,
        f,
        lse2: cute.Tensor,
        inv: cute.Tensor,
        heads: list,
        sinks: list,
        rows,
        row0: Int32,
        lane: Int32,
    ):
        for r in range_constexpr(2):
            exists, head = row0 + 8 * r < rows.count, heads[r]
            seen = lse2[r] > -Float32.inf
            # exp(lse) / (exp(lse) + exp(sink))
            kept = 1.0 / (1.0 + cute.math.exp2(sinks[r] - lse2[r], fastmath=True))
            factor = cutlass.select_(seen, inv[r] * kept, Float32(0.0))
            if exists and lane % 4 == 0 and side == LEFT:
                args.lse[rows.request, head, rows.token] = cutlass.select_(seen, lse2[r] * LN2, Float32.inf)
            to = args.out[rows.request, rows.token, head, None].iterator + side * (D_V // 2)
            write_16bit_row(f.o, r, factor, to, exists, lane)

    @cute.jit
    def write_partials(
        self,
        side: Int32,
        args,
        f,
        lse2: cute.Tensor,
        inv: cute.Tensor,
        slot: Int32,
        rows,
        row0: Int32,
        lane: Int32,
    ):
        for r in range_constexpr(2):
            row = row0 + 8 * r
            exists = row < rows.count
            unit_row = cute.arch.block_idx()[0] * ROWS + row
            if exists and lane % 4 == 0 and side == LEFT:
                args.partial_lse[slot, unit_row] = lse2[r]
            to = args.partial_o[slot, unit_row, None].iterator + side * (D_V // 2)
            scale = write_scaled_row(f.o, r, to, exists, lane)
            if exists and lane % 4 == 0:
                args.partial_scale[slot, unit_row, side] = scale * inv[r]


@cute.jit
def softmax(scores: cute.Tensor, p: cute.Tensor, sums: cute.Tensor, reference: cute.Tensor, scale: Float32):
    """`optimistic_softmax`, but the maximum comes first: scores and p are never all alive, which saves registers."""
    tops = (row_max(scores, 0), row_max(scores, 1))
    if cute.arch.vote_any_sync(cute.arch.fmax(tops[0] - reference[0], tops[1] - reference[1]) * scale > THRESHOLD):
        for r in range_constexpr(2):
            top = quad_max(tops[r])
            reference[r] = cutlass.select_((top - reference[r]) * scale > THRESHOLD, top, reference[r])
    exponentials(scores, p, sums, reference, scale)


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
