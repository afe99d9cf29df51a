"""Dense MLA decode for few packed query rows: products with swapped operands, tokens as M and query rows as N.

Without padding rows to 64 the products take a fraction of the time that reading KV does, so everything here keeps loads
in flight: the roles are a warp that brings K by TMA, warps that bring Q, a warpgroup for the scores S^T = K Q^T and the
softmax, and a warpgroup for the output O^T += V^T P^T. Neither warpgroup waits for the other but through the
double-buffered P^T, so scores of a block and the output of the one before overlap.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
from cutlass import Float32, Int32, Int64, const_expr, range_constexpr
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.cute.nvgpu.warpgroup import OperandMajorMode, OperandSource, SmemLayoutAtomKind

from flash_mla.backends.hopper import aot
from flash_mla.backends.hopper.combine import TRANSPOSED, merge_pieces, partial_results
from flash_mla.backends.hopper.copies import EVICT_FIRST, EVICT_LAST, copy_or_zeros, pointer_at, store_vector
from flash_mla.backends.hopper.dense_decode_geometry import Arguments, by_unit
from flash_mla.backends.hopper.divisor import Divisor
from flash_mla.backends.hopper.schedule import (
    Piece,
    anew,
    end_of_work,
    first_piece,
    next_piece,
    piece_stop,
    remains,
    uniform,
)
from flash_mla.backends.hopper.softmax import LN2, NO_SCORE, THRESHOLD
from flash_mla.backends.hopper.wgmma import CHUNK, gemm, k_major_layout

BLOCK = 64  # tokens in a KV block, which one page holds, and in a tile of the plan
D_V = 512
V_CHUNKS = D_V // CHUNK
CHUNK_BYTES = BLOCK * CHUNK * 2
WARPGROUP = 128
Q_WARPS = 3  # of the producer warpgroup, whose first warp loads K
STAGES = 2  # of K, Q and P

# Chunks of a K block that are freed together.
GROUPS = ((0, 1, 2, 3), (4, 5, 6, 7), (8,))
V_GROUPS, ROPE = (0, 1), 2

# Named barriers.
SCORES_ONLY, OUTPUT_ONLY, READY = 1, 2, 3

K_WARP = 8  # the warpgroup of the scores, that of the output, then the producers


@dataclass(frozen=True)
class Barriers:
    """Shared-memory barriers. All come in STAGES: K's full per chunk, empty per group of chunks."""

    k_full: cute.Pointer
    k_empty: cute.Pointer
    q_full: cute.Pointer
    q_empty: cute.Pointer
    p_full: cute.Pointer
    p_empty: cute.Pointer
    sums_full: cute.Pointer
    sums_empty: cute.Pointer


class FewRowsDecode:
    """`rows` (16 or 32) is what the packed query rows of a request and KV head are padded to."""

    def __init__(self, dtype: type[cutlass.Numeric], d: int, rows: int):
        self.dtype = dtype
        self.d = d
        self.rows = rows
        self.chunks = d // CHUNK
        self.groups = GROUPS[: 3 if self.chunks > V_CHUNKS else 2]

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [b, s_q, h_q, d]
        k_cache: cute.Tensor,  # [num_pages, page_size, h_kv, d]
        block_table: cute.Tensor,  # [b, max_pages]
        seqlens: cute.Tensor,  # [b]
        work: cute.Tensor,  # [workers + 1, 4]: SplitPlan.work over units (request, KV head)
        splits: cute.Tensor,  # [units + 1]: SplitPlan.splits
        workspace: cute.Tensor,  # [slots, rows, d_v + 1] fp32 in all: partial outputs, then their lse
        out: cute.Tensor,  # [b, s_q, h_q, d_v]
        lse: cute.Tensor,  # [b, h_q, s_q] fp32, natural log
        scale_log2: Float32,
        causal: Int32,
        slots: Int32,
        batch_invariant: Int32,
        combine_by_unit: Int32,
        combine_warps: Int32,
        stream,
    ):
        paged = cute.make_tensor(k_cache.iterator, cute.select(k_cache.layout, mode=[1, 3, 2, 0]))
        tma_k, k_tma = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(), paged, k_major_layout(self.dtype), (BLOCK, CHUNK)
        )

        @cute.struct
        class Shared:
            k_full: cute.struct.MemRange[Int64, STAGES * self.chunks]
            k_empty: cute.struct.MemRange[Int64, STAGES * len(self.groups)]
            q_full: cute.struct.MemRange[Int64, STAGES]
            q_empty: cute.struct.MemRange[Int64, STAGES]
            p_full: cute.struct.MemRange[Int64, STAGES]
            p_empty: cute.struct.MemRange[Int64, STAGES]
            sums_full: cute.struct.MemRange[Int64, STAGES]
            sums_empty: cute.struct.MemRange[Int64, STAGES]
            moved: cute.struct.MemRange[Int32, STAGES]
            factors: cute.struct.MemRange[Float32, STAGES * self.rows]
            tops: cute.struct.MemRange[Float32, STAGES * 4 * self.rows]
            sums: cute.struct.MemRange[Float32, STAGES * 4 * self.rows]
            p: cute.struct.Align[cute.struct.MemRange[self.dtype, STAGES * BLOCK * self.rows], 1024]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, STAGES * self.chunks * self.rows * CHUNK], 1024]
            k: cute.struct.Align[cute.struct.MemRange[self.dtype, STAGES * self.chunks * BLOCK * CHUNK], 1024]

        self.Shared = Shared
        h_kv = k_cache.shape[2]
        partial_o, partial_lse = partial_results(workspace, slots, self.rows, D_V)
        args = Arguments(
            q, block_table, seqlens, work, splits, partial_o, partial_lse, None, out, lse, Divisor.of(h_kv),
            Divisor.of(q.shape[2] // h_kv), None, Divisor.of(k_cache.shape[1] // BLOCK), scale_log2, causal,
            batch_invariant, Int64(EVICT_FIRST),
        )  # fmt: skip
        self.kernel(args, tma_k, k_tma).launch(
            grid=(1, work.shape[0] - 1, 1),
            block=(3 * WARPGROUP, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
        )
        merge_pieces(
            self.dtype, partial_o, partial_lse, None, work, splits, None, *by_unit(out, lse, h_kv), combine_by_unit,
            combine_warps, stream, TRANSPOSED,
        )  # fmt: skip

    @cute.kernel
    def kernel(self, args: Arguments, tma_k: cute.CopyAtom, k_tma: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        shared = utils.SmemAllocator().allocate(self.Shared)
        barriers = Barriers(
            shared.k_full.data_ptr(),
            shared.k_empty.data_ptr(),
            shared.q_full.data_ptr(),
            shared.q_empty.data_ptr(),
            shared.p_full.data_ptr(),
            shared.p_empty.data_ptr(),
            shared.sums_full.data_ptr(),
            shared.sums_empty.data_ptr(),
        )
        cute.arch.griddepcontrol_launch_dependents()
        # On their way while barriers are made, which the warp that brings K does not wait for: it makes them.
        piece, end = first_piece(args.work), end_of_work(args.work)
        if warp == K_WARP:
            cpasync.prefetch_descriptor(tma_k)
            self.init_barriers(barriers)
            cute.arch.barrier_arrive(barrier_id=READY, number_of_threads=3 * WARPGROUP)
            # Shuffles keep the compiler from waiting for the work before it makes barriers.
            piece = Piece(*(cute.arch.shuffle_sync(value, 0) for value in (piece.unit, piece.tile, piece.split)))
            self.load_k(args, shared, barriers, piece, end, tma_k, k_tma)
        else:
            cute.arch.barrier(barrier_id=READY, number_of_threads=3 * WARPGROUP)
            if warp > K_WARP:  # first, since code that is far off comes later
                self.load_q(args, shared, barriers, piece, end, thread - (K_WARP + 1) * 32)
            elif warp < 4:
                self.score(args, shared, barriers, piece, end, thread)
            else:
                self.accumulate(args, shared, barriers, piece, end, thread - WARPGROUP)

    @cute.jit
    def init_barriers(self, barriers: Barriers):
        with cute.arch.elect_one():
            for i in range_constexpr(STAGES * self.chunks):
                cute.arch.mbarrier_init(barriers.k_full + i, 1)
            for i in range_constexpr(STAGES * len(self.groups)):
                cute.arch.mbarrier_init(barriers.k_empty + i, 4)
            for i in range_constexpr(STAGES):
                cute.arch.mbarrier_init(barriers.q_full + i, Q_WARPS)
                cute.arch.mbarrier_init(barriers.q_empty + i, 4)
                cute.arch.mbarrier_init(barriers.p_full + i, 4)
                cute.arch.mbarrier_init(barriers.p_empty + i, 4)
                cute.arch.mbarrier_init(barriers.sums_full + i, 4)
                cute.arch.mbarrier_init(barriers.sums_empty + i, 4)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_warp()

    # ---------------------------------------------------------------------------------------------- producers

    @cute.jit
    def load_k(
        self,
        args,
        shared,
        barriers,
        piece: Piece,
        end: tuple[Int32, Int32],
        tma_k: cute.CopyAtom,
        k_tma: cute.Tensor,
    ):
        """Bring K blocks, each chunk as soon as its group of the stage is free."""
        layout = self.k_layout()
        smem = shared.k.get_tensor(layout.outer, swizzle=layout.inner)
        to, source = cpasync.tma_partition(
            tma_k,
            0,
            cute.make_layout(1),
            cute.group_modes(smem, 0, 2),
            cute.group_modes(cute.local_tile(k_tma, (BLOCK, CHUNK), (None, None, None, None)), 0, 2),
        )
        count = Int32(0)  # of blocks
        while remains(piece, end):
            request, kv_head, _ = args.place(piece)
            # Table entries do not wait for the length, nor one for another.
            first, second = (self.locate(args, request, piece.tile + i) for i in range(2))
            tiles = (args.seqlen(piece) + (BLOCK - 1)) // BLOCK
            stop = piece_stop(piece, end, tiles, args.batch_invariant)
            if stop > piece.tile:
                # Two blocks ahead, so that no load of a table entry delays a load of K.
                row, page = first
                next_row, next_page = second
                for tile in cutlass.range(piece.tile, stop, unroll=1):
                    later_row, later_page = self.locate(args, request, tile + 2)
                    stage, parity = count % STAGES, count // STAGES & 1
                    for group in self.load_order():
                        cute.arch.mbarrier_wait(barriers.k_empty + (stage * len(self.groups) + group), parity ^ 1)
                        for chunk in self.groups[group]:
                            full = barriers.k_full + (stage * self.chunks + chunk)
                            with cute.arch.elect_one():
                                cute.arch.mbarrier_arrive_and_expect_tx(full, CHUNK_BYTES)
                            cute.copy(
                                tma_k,
                                source[None, row, chunk, kv_head, page],
                                to[None, stage * self.chunks + chunk],
                                tma_bar_ptr=full,
                                cache_policy=args.cache_policy,
                            )
                    row, page, next_row, next_page = next_row, next_page, later_row, later_page
                    count += 1
            piece = next_piece(piece, stop, tiles)

    @cute.jit
    def locate(self, args, request: Int32, block: Int32) -> tuple[Int32, Int32]:
        """(row in blocks, page) of a block; of one beyond the request, which nobody loads, whatever the table holds."""
        entry, row = args.boxes_per_page.divmod(block)
        entry = cutlass.min(entry, args.block_table.shape[1] - 1)
        page = Int32(0)
        if entry >= 0:  # the table of a batch without any token may have no column
            page = args.block_table[request, entry]
        return row, page

    def load_order(self):
        """Groups in the order in which they are freed and then needed."""
        return (ROPE, 0, 1)[0 if len(self.groups) > ROPE else 1 :]

    @cute.jit
    def load_q(self, args, shared, barriers, piece: Piece, end: tuple[Int32, Int32], thread: Int32):
        """Bring Q by 16-byte asynchronous copies: rows have any stride.

        Nothing that they need waits for a length, so that they are under way before K's, behind which they would queue.
        """
        lane = thread % 32
        pieces = Int32(0)
        while remains(piece, end):
            rows = args.rows(piece)
            stage, parity = pieces % STAGES, pieces // STAGES & 1
            smem = Int32(shared.q.data_ptr().toint()) + stage * (self.chunks * self.rows * CHUNK * 2)
            cute.arch.mbarrier_wait(barriers.q_empty + stage, parity ^ 1)
            for i in range_constexpr(-(-self.rows // Q_WARPS)):
                row = thread // 32 + Q_WARPS * i
                exists = row < rows.count
                token, head = rows.query(cutlass.select_(exists, row, Int32(0)))
                source = args.q[rows.request, token, head, None].iterator.toint() + Int64(lane * 16)
                # A row that does not exist reads nothing and is filled with zeros.
                size = cutlass.select_(exists, Int32(16), Int32(0))
                # Lane l copies 8 columns of chunks l / 8, l / 8 + 4, ...; the swizzle permutes 16-byte units.
                to = smem + lane // 8 * (self.rows * CHUNK * 2) + row * 128 + ((lane % 8) ^ (row % 8)) * 16
                if row < self.rows:
                    for chunk in range_constexpr(0, self.chunks, 4):
                        if lane // 8 < self.chunks - chunk:
                            copy_or_zeros(to + chunk * self.rows * CHUNK * 2, source + chunk * 128, size)
            cute.arch.cp_async_commit_group()
            tiles = (args.seqlen(piece) + (BLOCK - 1)) // BLOCK
            stop = piece_stop(piece, end, tiles, args.batch_invariant)
            cute.arch.cp_async_wait_group(0)
            cute.arch.fence_proxy("async.shared", space="cta")
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(barriers.q_full + stage)
            pieces += 1
            piece = next_piece(piece, stop, tiles)

    # ---------------------------------------------------------------------------------------------- scores

    @cute.jit
    def score(self, args, shared, barriers, piece: Piece, end: tuple[Int32, Int32], thread: Int32):
        """The warpgroup of the scores and the softmax."""
        lane, warp = thread % 32, cute.arch.make_warp_uniform(thread // 32)
        op = warpgroup.MmaF16BF16Op(
            self.dtype, Float32, (BLOCK, self.rows, 16), OperandSource.SMEM, OperandMajorMode.K, OperandMajorMode.K
        )
        mma = cute.make_tiled_mma(op)
        part = mma.get_slice(thread)
        k_layout, q_layout = self.k_layout(), self.q_layout()
        k = part.make_fragment_A(part.partition_A(shared.k.get_tensor(k_layout.outer, swizzle=k_layout.inner)))
        q = part.make_fragment_B(part.partition_B(shared.q.get_tensor(q_layout.outer, swizzle=q_layout.inner)))
        s = part.make_fragment_C(part.partition_shape_C((BLOCK, self.rows)))
        p = cute.make_rmem_tensor(s.layout, self.dtype)
        store = cute.make_tiled_copy_C(
            cute.make_copy_atom(cute.nvgpu.warp.StMatrix8x8x16bOp(False, 4), self.dtype), mma
        ).get_slice(thread)
        p_layout = self.p_layout()
        p_smem = shared.p.get_tensor(cute.select(p_layout.outer, mode=[1, 0, 2]), swizzle=p_layout.inner)
        p_out = store.partition_D(p_smem)

        # A thread's columns: 8 j + 2 (lane % 4) + c is number 2 j + c.
        columns = self.rows // 4
        m = cute.make_rmem_tensor(columns, Float32)
        sums = cute.make_rmem_tensor(columns, Float32)
        factors = cute.make_rmem_tensor(columns, Float32)
        tops = shared.tops.get_tensor(cute.make_ordered_layout((STAGES, 4, self.rows), order=(2, 1, 0)))
        shared_factors = shared.factors.get_tensor(cute.make_ordered_layout((STAGES, self.rows), order=(1, 0)))
        moved = shared.moved.get_tensor(cute.make_layout(STAGES))
        scale = args.scale_log2

        count, pieces = Int32(0), Int32(0)
        while remains(piece, end):
            rows = args.rows(piece)
            seqlen, slot = args.seqlen(piece), args.slot(piece)
            tiles = (seqlen + (BLOCK - 1)) // BLOCK
            stop = piece_stop(piece, end, tiles, args.batch_invariant)
            q_stage, q_parity = pieces % STAGES, pieces // STAGES & 1
            m.fill(NO_SCORE)
            sums.fill(0.0)
            if stop > piece.tile:
                # Causality is aligned to the bottom right: query token j sees tokens below seqlen - s_q + j + 1.
                plain = uniform(cutlass.select_(args.causal != 0, seqlen - args.q.shape[1] + 1, seqlen))
                for tile in cutlass.range(piece.tile, stop, unroll=1):
                    stage, parity = count % STAGES, count // STAGES & 1
                    # Q stays; waiting for it here leaves what can be computed before to be computed before.
                    cute.arch.mbarrier_wait(barriers.q_full + q_stage, q_parity)
                    warpgroup.fence()
                    for i in range_constexpr(self.chunks):
                        chunk = self.chunk_order()[i]
                        cute.arch.mbarrier_wait(barriers.k_full + (stage * self.chunks + chunk), parity)
                        gemm(
                            op,
                            s,
                            k[None, None, None, stage * self.chunks + chunk],
                            q[None, None, None, q_stage * self.chunks + chunk],
                            overwrite=i == 0,
                        )
                    warpgroup.commit_group()
                    warpgroup.wait_group(0)
                    if const_expr(len(self.groups) > ROPE):
                        with cute.arch.elect_one():
                            cute.arch.mbarrier_arrive(barriers.k_empty + (stage * len(self.groups) + ROPE))
                    if (tile + 1) * BLOCK > plain:
                        self.mask(args, s, rows, plain, tile * BLOCK + warp * 16, anew(lane))

                    p_stage, p_parity = count % STAGES, count // STAGES & 1
                    self.column_tops(s, tops, p_stage, warp, lane, factors)
                    # P and the factors of this stage have been read.
                    cute.arch.mbarrier_wait(barriers.p_empty + p_stage, p_parity ^ 1)
                    moves = Int32(0)
                    for i in range_constexpr(columns):
                        top = factors[i]
                        above = (top - m[i]) * scale > THRESHOLD
                        top = cutlass.select_(above, top, m[i])
                        moves = cutlass.select_(above, Int32(1), moves)
                        factors[i] = cute.math.exp2((m[i] - top) * scale, fastmath=True)
                        m[i] = top
                    any_moves = cute.arch.vote_any_sync(moves != 0)
                    if warp == 0:
                        if lane == 0:
                            moved[p_stage] = cutlass.select_(any_moves, Int32(1), Int32(0))
                        if lane < 4:
                            for i in range_constexpr(columns):
                                shared_factors[p_stage, self.column(lane, i)] = factors[i]
                    for i in range_constexpr(columns):
                        offset = m[i] * scale
                        total = sums[i] * factors[i]
                        for r in range_constexpr(2):
                            e = self.element(i, r)
                            value = cute.math.exp2(s[e] * scale - offset, fastmath=True)
                            total = total + value
                            p[e] = value.to(self.dtype)
                        sums[i] = total
                    cute.copy(store, store.retile(p), p_out[None, None, None, p_stage])
                    cute.arch.fence_proxy("async.shared", space="cta")
                    cute.arch.sync_warp()
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive(barriers.p_full + p_stage)
                    count += 1
            cute.arch.mbarrier_wait(barriers.q_full + q_stage, q_parity)  # of an empty piece, which has not waited
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(barriers.q_empty + q_stage)
            self.finish(args, shared, barriers, rows, slot, m, sums, pieces, warp, lane)
            pieces += 1
            piece = next_piece(piece, stop, tiles)

    def chunk_order(self):
        """RoPE first: it is freed first."""
        return (*range(V_CHUNKS, self.chunks), *range(V_CHUNKS))

    def column(self, lane, i: int):
        """The query row of a thread's column number i."""
        return i // 2 * 8 + lane % 4 * 2 + i % 2

    def element(self, i: int, r: int) -> int:
        """Which element of the accumulator is (row r, column number i) of a thread."""
        return i // 2 * 4 + 2 * r + i % 2

    @cute.jit
    def mask(self, args, s: cute.Tensor, rows, plain: Int32, first_token: Int32, lane: Int32):
        """Set the scores of tokens that a query row does not see to -inf; the first query token sees those < plain."""
        for i in range_constexpr(self.rows // 4):
            more = cutlass.select_(args.causal != 0, rows.query(self.column(lane, i))[0], Int32(0))
            for r in range_constexpr(2):
                e = self.element(i, r)
                s[e] = cutlass.select_(first_token + lane // 4 + 8 * r < plain + more, s[e], -Float32.inf)

    @cute.jit
    def column_tops(self, s: cute.Tensor, tops: cute.Tensor, stage: Int32, warp: Int32, lane: Int32, to: cute.Tensor):
        """Maxima of the block's scores of each of this thread's query rows."""
        for i in range_constexpr(self.rows // 4):
            top = cute.arch.fmax(s[self.element(i, 0)], s[self.element(i, 1)])
            for distance in (4, 8, 16):
                top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, distance))
            to[i] = top
        if lane < 4:
            for i in range_constexpr(self.rows // 4):
                tops[stage, warp, self.column(lane, i)] = to[i]
        # One barrier is enough: what is written next is the other stage.
        cute.arch.barrier(barrier_id=SCORES_ONLY, number_of_threads=WARPGROUP)
        for i in range_constexpr(self.rows // 4):
            top = tops[stage, 0, self.column(lane, i)]
            for w in range_constexpr(1, 4):
                top = cute.arch.fmax(top, tops[stage, w, self.column(lane, i)])
            to[i] = top

    @cute.jit
    def finish(self, args, shared, barriers, rows, slot: Int32, m, sums, pieces: Int32, warp: Int32, lane: Int32):
        """Hand the sums of a piece's rows to the output's warpgroup and write their lse."""
        shared_sums = self.shared_sums(shared)
        stage = pieces % STAGES
        for i in range_constexpr(self.rows // 4):
            for distance in (4, 8, 16):
                sums[i] = sums[i] + cute.arch.shuffle_sync_bfly(sums[i], distance)
        cute.arch.mbarrier_wait(barriers.sums_empty + stage, (pieces // STAGES & 1) ^ 1)
        if lane < 4:
            for i in range_constexpr(self.rows // 4):
                shared_sums[self.column(lane, i), warp, stage] = sums[i]
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(barriers.sums_full + stage)
        # Keeps the warps within a piece of each other, too, so that no stage is overwritten before it is read here.
        cute.arch.barrier(barrier_id=SCORES_ONLY, number_of_threads=WARPGROUP)
        if (warp == 0) & (lane < 4):
            for i in range_constexpr(self.rows // 4):
                column = self.column(lane, i)
                # lse in base 2; an empty row's is -inf here.
                lse2 = cute.math.log2(self.total(shared_sums, column, stage)) + m[i] * args.scale_log2
                if column < rows.count:
                    if slot < 0:
                        token, head = rows.query(column)
                        seen = lse2 > -Float32.inf
                        args.lse[rows.request, head, token] = cutlass.select_(seen, lse2 * LN2, Float32.inf)
                    else:
                        args.partial_lse[slot, column] = lse2

    def shared_sums(self, shared) -> cute.Tensor:
        """[rows, 4 warps, stages]: the sums of each warp's probabilities."""
        return shared.sums.get_tensor(cute.make_ordered_layout((self.rows, 4, STAGES), order=(1, 0, 2)))

    @cute.jit
    def total(self, shared_sums: cute.Tensor, row: Int32, stage: Int32) -> Float32:
        """Sum of a row's probabilities over all tokens of a piece."""
        of_warps = cute.make_rmem_tensor(4, Float32)
        cute.autovec_copy(shared_sums[row, None, stage], of_warps)
        return (of_warps[0] + of_warps[1]) + (of_warps[2] + of_warps[3])

    # ---------------------------------------------------------------------------------------------- output

    @cute.jit
    def accumulate(self, args, shared, barriers, piece: Piece, end: tuple[Int32, Int32], thread: Int32):
        """The warpgroup of the output: tiles of 64 columns, all query rows."""
        lane = thread % 32
        op = warpgroup.MmaF16BF16Op(
            self.dtype, Float32, (CHUNK, self.rows, 16), OperandSource.SMEM, OperandMajorMode.MN, OperandMajorMode.MN
        )
        part = cute.make_tiled_mma(op).get_slice(thread)
        v_layout, p_layout = self.v_layout(), self.p_layout()
        v = part.make_fragment_A(part.partition_A(shared.k.get_tensor(v_layout.outer, swizzle=v_layout.inner)))
        p = part.make_fragment_B(part.partition_B(shared.p.get_tensor(p_layout.outer, swizzle=p_layout.inner)))
        o = [part.make_fragment_C(part.partition_shape_C((CHUNK, self.rows))) for _ in range(V_CHUNKS)]
        shared_factors = shared.factors.get_tensor(cute.make_ordered_layout((STAGES, self.rows), order=(1, 0)))
        moved = shared.moved.get_tensor(cute.make_layout(STAGES))
        shared_sums = self.shared_sums(shared)

        count, pieces = Int32(0), Int32(0)
        while remains(piece, end):
            seqlen, slot = args.seqlen(piece), args.slot(piece)
            tiles = (seqlen + (BLOCK - 1)) // BLOCK
            stop = piece_stop(piece, end, tiles, args.batch_invariant)
            for chunk in range_constexpr(V_CHUNKS):
                o[chunk].fill(0.0)
            for tile in cutlass.range(piece.tile, stop, unroll=1):
                stage, p_stage = count % STAGES, count % STAGES
                cute.arch.mbarrier_wait(barriers.p_full + p_stage, count // STAGES & 1)
                if uniform(moved[p_stage]) != 0:
                    for i in range_constexpr(self.rows // 4):
                        factor = shared_factors[p_stage, self.column(lane, i)]
                        for chunk in range_constexpr(V_CHUNKS):
                            for r in range_constexpr(2):
                                e = self.element(i, r)
                                o[chunk][e] = o[chunk][e] * factor
                if (tile + 1) * BLOCK > seqlen:
                    self.clear_unused(shared, stage, seqlen - tile * BLOCK, thread)
                warpgroup.fence()
                for group in V_GROUPS:
                    for chunk in self.groups[group]:
                        gemm(
                            op, o[chunk], v[None, None, None, stage * self.chunks + chunk], p[None, None, None, p_stage]
                        )
                    warpgroup.commit_group()
                for group in V_GROUPS:
                    warpgroup.wait_group(V_GROUPS[-1] - group)
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive(barriers.k_empty + (stage * len(self.groups) + group))
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(barriers.p_empty + p_stage)
                count += 1

            sums_stage = pieces % STAGES
            cute.arch.mbarrier_wait(barriers.sums_full + sums_stage, pieces // STAGES & 1)
            for i in range_constexpr(self.rows // 4):
                total = self.total(shared_sums, self.column(lane, i), sums_stage)
                factor = cutlass.select_(total > 0.0, cute.arch.rcp_approx(total), Float32(0.0))
                for chunk in range_constexpr(V_CHUNKS):
                    for r in range_constexpr(2):
                        e = self.element(i, r)
                        o[chunk][e] = o[chunk][e] * factor
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(barriers.sums_empty + sums_stage)
            self.write(args, o, args.rows(piece), slot, thread)
            pieces += 1
            piece = next_piece(piece, stop, tiles)

    @cute.jit
    def clear_unused(self, shared, stage: Int32, used: Int32, thread: Int32):
        """Zero V in the rows of a stage beyond its `used` first: 0 * NaN must not reach the output."""
        row = thread // 2
        if row >= used:
            start = shared.k.data_ptr() + (stage * self.chunks * BLOCK + row) * CHUNK + thread % 2 * (CHUNK // 2)
            zeros = cute.make_rmem_tensor((CHUNK // 2, V_CHUNKS), self.dtype)
            zeros.fill(0.0)
            layout = cute.make_layout((CHUNK // 2, V_CHUNKS), stride=(1, BLOCK * CHUNK))
            cute.autovec_copy(zeros, cute.make_tensor(start.align(16), layout))
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=OUTPUT_ONLY, number_of_threads=WARPGROUP)

    @cute.jit
    def write(self, args, o: list[cute.Tensor], rows, slot: Int32, thread: Int32):
        """Write a whole unit to the outputs, a piece of one to its slot of the workspace."""
        thread = anew(thread)
        lane = thread % 32
        if slot < 0:
            for j in range_constexpr(self.rows // 8):
                # A transposed 8 x 8 matrix: lane / 4 is the query row, the output columns are adjacent.
                row = 8 * j + lane // 4
                exists = row < rows.count
                token, head = rows.query(cutlass.select_(exists, row, Int32(0)))
                to = args.out[rows.request, token, head, None].iterator + (thread // 32 * 16 + lane % 4 * 2)
                address = to.toint()
                for chunk in range_constexpr(V_CHUNKS):
                    for r in range_constexpr(2):
                        pair = cute.make_rmem_tensor(2, self.dtype)
                        for c in range_constexpr(2):
                            pair[c] = o[chunk][4 * j + 2 * r + c].to(self.dtype)
                        self.transpose(pair)
                        if exists:
                            target = pointer_at(self.dtype, address, (chunk * CHUNK + 8 * r) * 2, align=4)
                            cute.autovec_copy(pair, cute.make_tensor(target, cute.make_layout(2)))
        else:
            for i in range_constexpr(self.rows // 4):
                row = self.column(lane, i)
                if row < rows.count:
                    # As combine takes TRANSPOSED rows: what this thread has of two chunks lies together.
                    to = args.partial_o[slot, row, None].iterator + (thread // 32 * 128 + lane // 4 * 4)
                    for chunk in range_constexpr(0, V_CHUNKS, 2):
                        values = [o[chunk + e // 2][self.element(i, e % 2)] for e in range(4)]
                        store_vector(to.toint(), chunk * 64, values, EVICT_LAST)  # until combine has read them

    def transpose(self, pair: cute.Tensor):
        """Transpose the 8 x 8 matrix of which each lane of a warp holds a pair of adjacent elements."""
        words = cute.recast_tensor(pair, Int32)
        words[0] = cute.arch.inline_ptx(
            "movmatrix.sync.aligned.m8n8.trans.b16 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[words[0]]
        )

    # ---------------------------------------------------------------------------------------------- shared memory

    def k_layout(self):
        """K's chunks: 64 tokens x 64 columns, dense in the columns."""
        return cute.tile_to_shape(k_major_layout(self.dtype), (BLOCK, CHUNK, STAGES * self.chunks), (0, 1, 2))

    def v_layout(self):
        """The same bytes as V^T: 64 columns x 64 tokens."""
        atom = warpgroup.make_smem_layout_atom(SmemLayoutAtomKind.MN_SW128, self.dtype)
        return cute.tile_to_shape(atom, (CHUNK, BLOCK, STAGES * self.chunks), (0, 1, 2))

    def q_layout(self):
        """Q's chunks: query rows x 64 columns, dense in the columns."""
        atom = warpgroup.make_smem_layout_atom(SmemLayoutAtomKind.K_SW128, self.dtype)
        return cute.tile_to_shape(atom, (self.rows, CHUNK, STAGES * self.chunks), (0, 1, 2))

    def p_layout(self):
        """P^T as a B operand: query rows x tokens, dense in the query rows."""
        kinds = {16: SmemLayoutAtomKind.MN_SW32, 32: SmemLayoutAtomKind.MN_SW64}
        atom = warpgroup.make_smem_layout_atom(kinds[self.rows], self.dtype)
        return cute.tile_to_shape(atom, (self.rows, BLOCK, STAGES), (0, 1, 2))


def compile_variant(dtype: str, d: int, rows: int) -> aot.Compiled:
    """Compile for tensors of any extents whose rows are 16-byte aligned, and pages of a multiple of 64 tokens."""
    element = getattr(cutlass, dtype)
    b, s_q, h_q, h_kv = (cute.sym_int() for _ in range(4))
    q = aot.strided(element, (b, s_q, h_q, d), dense_last=True, align=16)
    k_cache = aot.strided(
        element, (cute.sym_int(), cute.sym_int(divisibility=BLOCK), h_kv, d), dense_last=True, align=16
    )
    block_table = aot.strided(Int32, (b, cute.sym_int()), dense_last=True)
    seqlens = aot.strided(Int32, (b,))
    work = aot.compact(Int32, (cute.sym_int(), 4), align=16)
    splits = aot.compact(Int32, (cute.sym_int(),))
    workspace = aot.compact(Float32, (cute.sym_int(),), align=16)
    out = aot.strided(element, (b, s_q, h_q, D_V), dense_last=True, align=16)
    lse = aot.strided(Float32, (b, h_q, s_q))
    return aot.compile_kernel(
        FewRowsDecode(element, d, rows), q, k_cache, block_table, seqlens, work, splits, workspace, out, lse,
        Float32(1.0), *[Int32(0)] * 5,
    )  # fmt: skip
