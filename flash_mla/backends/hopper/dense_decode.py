"""Dense MLA decode over a paged cache, BF16 or FP16: persistent CTAs that walk a SplitPlan.

A CTA owns 64 packed query rows (query token x head of one KV head) of its worker's units. Two consumer warpgroups keep
the seesaw of FlashMLA: of each pair of 64-token blocks the left one scores block 0, the right one block 1; each hands
its probabilities to the other through shared memory, and each accumulates one half of the output's 512 columns. One
warp of the producer warpgroup brings K by TMA, chunk by chunk, for both CTAs of a cluster when they share a unit; its
other warps bring Q of the next piece while this one ends.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
from cutlass import Float32, Int32, Int64, const_expr, range_constexpr
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.cute.nvgpu.warpgroup import OperandSource

from flash_mla.backends.hopper import aot
from flash_mla.backends.hopper.combine import merge_pieces, scaled_partial_results
from flash_mla.backends.hopper.copies import EVICT_FIRST, EVICT_NORMAL, copy_or_zeros, prefetch
from flash_mla.backends.hopper.dense_decode_geometry import Arguments, Pages, Rows, by_unit
from flash_mla.backends.hopper.divisor import Divisor
from flash_mla.backends.hopper.epilogue import chunk_of, copy_rows_of_warp, write_scaled_row
from flash_mla.backends.hopper.fragments import BLOCK, D_V, V_CHUNKS, Fragments
from flash_mla.backends.hopper.schedule import end_of_work, first_piece, next_piece, piece_stop, remains
from flash_mla.backends.hopper.softmax import (
    LN2,
    NO_SCORE,
    mask,
    optimistic_softmax,
    quad_sum,
    rescale,
)
from flash_mla.backends.hopper.wgmma import CHUNK, ROWS, gemm, k_major_layout, qk_op, tile_at

TILE = 2 * BLOCK  # tokens in a tile of the plan: a pair of blocks, one for each consumer warpgroup
CHUNK_ELEMENTS = ROWS * CHUNK
WARPGROUP = 128
CONSUMER_REGISTERS = 232
PRODUCER_REGISTERS = 40
K_WARP = 8  # the producer warpgroup's first warp loads K, the others Q
Q_WARPS = 3

# Chunks of a K block that are freed together: V columns of the left and the right consumer, and RoPE.
LEFT, RIGHT, ROPE = 0, 1, 2
GROUPS = ((0, 1, 2, 3), (4, 5, 6, 7), (8,))

# Pairs of blocks that a CTA loads before it also brings later ones to L2: at first all SMs wait for loads at once, and
# what is not yet needed would delay them (a request of 65,536 tokens: 49 us instead of 52; many pairs: no matter).
PREFETCH_FROM = 4

# Kinds of tiles that a consumer takes: all of it visible to every row, or perhaps not, or the last of a piece.
PLAIN, MASKED, LAST = 0, 1, 2

# Named barriers of the two consumer warpgroups.
P0_READY, P1_READY, SUMS_READY, LEFT_ONLY, RIGHT_ONLY = 1, 2, 3, 4, 5


@dataclass(frozen=True)
class Barriers:
    """Shared-memory barriers. K ones come in pairs of buffers: full per chunk, empty per group of chunks."""

    k_full: cute.Pointer
    k_empty: cute.Pointer
    q_full: cute.Pointer
    q_empty: cute.Pointer
    peer: Int32 | None  # rank of the cluster's other CTA


class DenseDecode:
    def __init__(self, dtype: type[cutlass.Numeric], d: int, cluster: int, box: int):
        self.dtype = dtype
        self.d = d
        self.chunks = d // CHUNK
        self.has_rope = self.chunks > V_CHUNKS
        self.groups = GROUPS[: 3 if self.has_rope else 2]
        self.cluster = cluster
        self.box = box  # tokens that one TMA load brings
        self.boxes = BLOCK // box  # in a block
        # CTAs of a cluster load a half each of a box that is a whole block; of smaller boxes they load every other.
        self.shares_of_box = cluster if box == BLOCK else 1
        self.shares_of_block = cluster // self.shares_of_box
        # The order in which each consumer takes the chunks: its own half of V first, because that is freed last.
        rope = (8,) if self.has_rope else ()
        self.qk_order = ((0, 1, 2, 3, *rope, 4, 5, 6, 7), (4, 5, 6, 7, *rope, 0, 1, 2, 3))

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [b, s_q, h_q, d]
        k_cache: cute.Tensor,  # [num_pages, page_size, h_kv, d]
        block_table: cute.Tensor,  # [b, max_pages]
        seqlens: cute.Tensor,  # [b]
        work: cute.Tensor,  # [workers + 1, 4]: SplitPlan.work over units (request, KV head, pass)
        splits: cute.Tensor,  # [units + 1]: SplitPlan.splits
        workspace: cute.Tensor,  # fp32, at least [slots, row_tiles * 64, d_v / 2 + 3]: scaled partial results
        out: cute.Tensor,  # [b, s_q, h_q, d_v]
        lse: cute.Tensor,  # [b, h_q, s_q] fp32, natural log
        scale_log2: Float32,
        causal: Int32,
        row_tiles: Int32,  # CTAs of a worker
        slots: Int32,
        batch_invariant: Int32,
        combine_by_unit: Int32,
        combine_warps: Int32,
        stream,
    ):
        box_layout = self.box_layout()
        paged = cute.make_tensor(k_cache.iterator, cute.select(k_cache.layout, mode=[1, 3, 2, 0]))
        load_op = cpasync.CopyBulkTensorTileG2SMulticastOp() if self.cluster > 1 else cpasync.CopyBulkTensorTileG2SOp()
        tma_k, k_tma = cpasync.make_tiled_tma_atom(
            load_op, paged, box_layout, (self.box, CHUNK), num_multicast=self.shares_of_box
        )

        @cute.struct
        class Shared:
            k_full: cute.struct.MemRange[Int64, 2 * self.chunks]
            k_empty: cute.struct.MemRange[Int64, 2 * len(self.groups)]
            q_full: cute.struct.MemRange[Int64, 1]
            q_empty: cute.struct.MemRange[Int64, 1]
            max0: cute.struct.MemRange[Float32, ROWS]
            max1: cute.struct.MemRange[Float32, ROWS]
            sum0: cute.struct.MemRange[Float32, ROWS]
            sum1: cute.struct.MemRange[Float32, ROWS]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, V_CHUNKS * CHUNK_ELEMENTS], 1024]
            p0: cute.struct.Align[cute.struct.MemRange[self.dtype, CHUNK_ELEMENTS], 1024]
            p1: cute.struct.Align[cute.struct.MemRange[self.dtype, CHUNK_ELEMENTS], 1024]
            k: cute.struct.Align[cute.struct.MemRange[self.dtype, 2 * self.chunks * CHUNK_ELEMENTS], 1024]

        self.Shared = Shared
        h_kv = k_cache.shape[2]
        group = q.shape[2] // h_kv
        unit_rows = row_tiles * ROWS
        partials = scaled_partial_results(workspace, slots, unit_rows, D_V)
        args = Arguments(
            q, block_table, seqlens, work, splits, *partials, out, lse, Divisor.of(h_kv), Divisor.of(group),
            Divisor.of((q.shape[1] * group + unit_rows - 1) // unit_rows), Divisor.of(k_cache.shape[1] // self.box),
            scale_log2, causal, batch_invariant,
        )  # fmt: skip
        self.kernel(args, tma_k, k_tma, k_cache).launch(
            grid=(row_tiles, work.shape[0] - 1, 1),
            block=(3 * WARPGROUP, 1, 1),
            cluster=(self.cluster, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
        )
        merge_pieces(
            self.dtype, *partials, work, splits, None, *by_unit(out, lse, h_kv), combine_by_unit, combine_warps, stream
        )

    @cute.kernel
    def kernel(self, args: Arguments, tma_k: cute.CopyAtom, k_tma: cute.Tensor, k_cache: cute.Tensor):
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
        self.init_barriers(barriers, warp)
        cute.arch.griddepcontrol_launch_dependents()

        if warp >= K_WARP:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if warp == K_WARP:
                self.load_k(args, shared, barriers, tma_k, k_tma, k_cache)
            else:
                self.load_q(args, shared, barriers, thread - (K_WARP + 1) * 32)
        elif warp < 4:
            cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            self.consume(LEFT, args, shared, barriers, thread)
        else:
            cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            self.consume(RIGHT, args, shared, barriers, thread - WARPGROUP)
        if const_expr(self.cluster > 1):  # the peer may still signal our barriers
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()

    @cute.jit
    def init_barriers(self, barriers: Barriers, warp: Int32):
        if warp == 0:
            with cute.arch.elect_one():
                for i in range_constexpr(2 * self.chunks):
                    cute.arch.mbarrier_init(barriers.k_full + i, 1)
                for i in range_constexpr(2 * len(self.groups)):
                    cute.arch.mbarrier_init(barriers.k_empty + i, 4 * self.cluster)
                cute.arch.mbarrier_init(barriers.q_full, Q_WARPS)
                cute.arch.mbarrier_init(barriers.q_empty, 8)
        cute.arch.mbarrier_init_fence()
        if const_expr(self.cluster > 1):
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    # ---------------------------------------------------------------------------------------------- producers

    @cute.jit
    def load_k(self, args, shared, barriers, tma_k: cute.CopyAtom, k_tma: cute.Tensor, k_cache: cute.Tensor):
        """Bring K blocks, a pair at a time; each chunk as soon as its group of the buffer is free."""
        cpasync.prefetch_descriptor(tma_k)
        smem_layout = cute.make_layout(
            (self.box, CHUNK, self.boxes, 2 * self.chunks), stride=(CHUNK, 1, self.box * CHUNK, CHUNK_ELEMENTS)
        )
        smem = shared.k.get_tensor(smem_layout, swizzle=self.box_layout().inner)
        to, source = cpasync.tma_partition(
            tma_k,
            self.cluster_rank() if const_expr(self.shares_of_box > 1) else 0,
            cute.make_layout(self.shares_of_box),
            cute.group_modes(smem, 0, 2),
            cute.group_modes(cute.local_tile(k_tma, (self.box, CHUNK), (None, None, None, None)), 0, 2),
        )
        row_tiles = cute.arch.grid_dim()[0]
        # K that no other cluster reads need not stay in L2, where Q, outputs and partial results are.
        cache_policy = Int64(cutlass.select_(row_tiles == self.cluster, Int64(EVICT_FIRST), Int64(EVICT_NORMAL)))

        pairs = Int32(0)
        piece, end = first_piece(args.work), end_of_work(args.work)
        while remains(piece, end):
            request, kv_head, _ = args.place(piece)
            seqlen = args.seqlen(piece)
            tiles = (seqlen + (TILE - 1)) // TILE
            stop = piece_stop(piece, end, tiles, args.batch_invariant)
            if stop > piece.tile:
                boxes = (seqlen + (self.box - 1)) // self.box
                pages = Pages(args.block_table, request, boxes, args.boxes_per_page, 2 * self.boxes)
                # Two pairs ahead, so that no load of a table entry delays a load of K.
                now, then = pages.locate(piece.tile), pages.locate(piece.tile + 1)
                for tile in cutlass.range(piece.tile, stop, unroll=1):
                    later = pages.locate(tile + 2)
                    if const_expr(self.cluster > 1):
                        if (pairs >= PREFETCH_FROM) & (tile + 1 < stop):
                            self.prefetch(tma_k, source, k_cache, then, kv_head)
                    for buffer, group in self.load_order():
                        empty = barriers.k_empty + (buffer * len(self.groups) + group)
                        cute.arch.mbarrier_wait(empty, (pairs & 1) ^ 1)
                        self.load_group(tma_k, source, to, barriers, now, kv_head, buffer, group, cache_policy)
                    now, then = then, later
                    pairs += 1
            piece = next_piece(piece, stop, tiles)

    def load_order(self):
        """(buffer, group) in the order in which the consumers free and then need them."""
        rope = ((0, ROPE), (1, ROPE)) if self.has_rope else ()
        return (*rope, (0, LEFT), (0, RIGHT), (1, RIGHT), (1, LEFT))

    @cute.jit
    def prefetch(self, tma_k: cute.CopyAtom, source: cute.Tensor, k_cache: cute.Tensor, boxes, kv_head: Int32):
        """Bring a pair of blocks into L2, shared among the CTAs of this worker."""
        cta, row_tiles = cute.arch.block_idx()[0], cute.arch.grid_dim()[0]
        if const_expr(self.box == BLOCK):
            for box in cutlass.range(2, unroll=2):
                row, page = boxes.get(box)
                for chunk in cutlass.range(cta // self.cluster, self.chunks, row_tiles // self.cluster, unroll=1):
                    cute.prefetch(tma_k, source[None, row, chunk, kv_head, page])
        else:  # loading small boxes takes all of TMA's time: a lane asks for a token's lines instead
            for i in range_constexpr(TILE // 32):
                token = 32 * i + cute.arch.lane_idx()
                row, page = boxes.get(token // self.box)
                start = k_cache[page, row * self.box + token % self.box, kv_head, None].iterator.toint()
                for line in cutlass.range(cta, self.d * 2 // 128, row_tiles, unroll=1):
                    prefetch(start + Int64(line * 128))

    @cute.jit
    def load_group(
        self,
        tma_k: cute.CopyAtom,
        source: cute.Tensor,
        to: cute.Tensor,
        barriers,
        boxes,
        kv_head: Int32,
        buffer: cutlass.Constexpr,
        group: cutlass.Constexpr,
        cache_policy: Int64,
    ):
        """Bring this CTA's share of a group of chunks of a block, for both CTAs of a cluster."""
        first = buffer * self.chunks
        for chunk in self.groups[group]:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(barriers.k_full + (first + chunk), CHUNK_ELEMENTS * 2)
        multicast = {"mcast_mask": cutlass.Int16(3)} if self.cluster > 1 else {}
        turn = self.cluster_rank() if const_expr(self.shares_of_block > 1) else Int32(0)
        for i in cutlass.range(self.boxes // self.shares_of_block, unroll=1):
            box = turn + i * self.shares_of_block
            row, page = boxes.get(buffer * self.boxes + box)
            for chunk in self.groups[group]:
                cute.copy(
                    tma_k,
                    source[None, row, chunk, kv_head, page],
                    to[None, box, first + chunk],
                    tma_bar_ptr=barriers.k_full + (first + chunk),
                    cache_policy=cache_policy,
                    **multicast,
                )

    @cute.jit
    def load_q(self, args, shared, barriers, thread: Int32):
        """Bring the 512 V columns of Q by 16-byte asynchronous copies: rows have any stride."""
        lane = thread % 32
        smem = Int32(shared.q.data_ptr().toint())
        pieces = Int32(0)
        piece, end = first_piece(args.work), end_of_work(args.work)
        while remains(piece, end):
            rows = args.rows(piece)
            tiles = (args.seqlen(piece) + (TILE - 1)) // TILE
            stop = piece_stop(piece, end, tiles, args.batch_invariant)
            if stop > piece.tile:
                # Lane l looks up row warp + 3 l, and has its lines brought to L2 while the piece before still uses Q.
                mine = thread // 32 + Q_WARPS * lane
                exists = mine < cutlass.min(rows.count, ROWS)
                token, head = rows.query(cutlass.select_(exists, mine, Int32(0)))
                address = args.q[rows.request, token, head, None].iterator.toint()
                # A row that does not exist reads nothing and is filled with zeros.
                size = cutlass.select_(exists, Int32(16), Int32(0))
                if exists:
                    for line in range_constexpr(self.d * 2 // 128):
                        prefetch(address + line * 128)
                cute.arch.mbarrier_wait(barriers.q_empty, (pieces & 1) ^ 1)
                for i in cutlass.range(-(-ROWS // Q_WARPS), unroll=2):
                    row = thread // 32 + Q_WARPS * i
                    source = cute.arch.shuffle_sync(address, i) + Int64(lane * 16)
                    row_size = cute.arch.shuffle_sync(size, i)
                    # Lane l copies 8 columns of chunks l / 8 and l / 8 + 4; the swizzle permutes 16-byte units.
                    to = smem + (lane // 8) * (CHUNK_ELEMENTS * 2) + row * 128 + ((lane % 8) ^ (row % 8)) * 16
                    if row < ROWS:
                        for half in range_constexpr(2):
                            copy_or_zeros(to + half * 4 * CHUNK_ELEMENTS * 2, source + half * 512, row_size)
                cute.arch.cp_async_commit_group()
                cute.arch.cp_async_wait_group(0)
                cute.arch.fence_proxy("async.shared", space="cta")
                cute.arch.sync_warp()
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(barriers.q_full)
                pieces += 1
            piece = next_piece(piece, stop, tiles)

    # ---------------------------------------------------------------------------------------------- consumers

    @cute.jit
    def consume(self, side: cutlass.Constexpr, args, shared, barriers, thread: Int32):
        """One consumer warpgroup: scores of block `side` of each pair, half `side` of the output columns."""
        lane = thread % 32
        row0 = thread // 32 * 16 + lane // 4  # of this thread's two rows, row0 and row0 + 8
        f = self.fragments(side, shared, thread)
        m = cute.make_rmem_tensor(2, Float32)
        row_sum = cute.make_rmem_tensor(2, Float32)
        scale = args.scale_log2

        pairs = Int32(0)
        pieces = Int32(0)
        seqlen, slot = Int32(0), Int32(0)
        piece, end = first_piece(args.work), end_of_work(args.work)
        if remains(piece, end):
            seqlen, slot = self.begin_piece(args, f, piece, row0, lane)
        while remains(piece, end):
            rows = args.rows(piece)
            tiles = (seqlen + (TILE - 1)) // TILE
            stop = piece_stop(piece, end, tiles, args.batch_invariant)
            following = next_piece(piece, stop, tiles)
            next_seqlen, next_slot = Int32(0), Int32(0)
            f.o.fill(0.0)
            m.fill(NO_SCORE)
            row_sum.fill(0.0)
            if stop > piece.tile:
                bounds = self.bounds(args, rows, seqlen, row0)
                cute.arch.mbarrier_wait(barriers.q_full, pieces & 1)
                warpgroup.fence()
                self.issue_qk(side, f, barriers, 0, self.chunks, pairs & 1)
                warpgroup.commit_group()
                warpgroup.wait_group(0)
                # The last tile, after which no wgmma may be in flight, is peeled: one in flight over a loop's back edge
                # makes ptxas serialise all of them. So are the tiles that need masks, whose tests cost 4 % elsewhere.
                last = stop - 1
                plain_end = cutlass.max(piece.tile, cutlass.min(last, bounds.plain // TILE))
                for tile in cutlass.range(piece.tile, plain_end, unroll=1):
                    self.pair(side, PLAIN, shared, barriers, f, m, row_sum, tile, bounds, scale, pairs, thread)
                    pairs += 1
                for tile in cutlass.range(plain_end, last, unroll=1):
                    self.pair(side, MASKED, shared, barriers, f, m, row_sum, tile, bounds, scale, pairs, thread)
                    pairs += 1
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(barriers.q_empty)
                if remains(following, end):
                    next_seqlen, next_slot = self.begin_piece(args, f, following, row0, lane)
                self.pair(side, LAST, shared, barriers, f, m, row_sum, last, bounds, scale, pairs, thread)
                pairs += 1
                pieces += 1
            elif remains(following, end):
                next_seqlen, next_slot = self.begin_piece(args, f, following, row0, lane)

            self.write(side, args, shared, f, m, row_sum, slot, rows, thread)
            piece, seqlen, slot = following, next_seqlen, next_slot

    @cute.jit
    def begin_piece(self, args, f, piece, row0: Int32, lane: Int32):
        """Start early what a piece needs from global memory: Q's RoPE chunk; (length, slot) are returned."""
        if const_expr(self.has_rope):
            rows = args.rows(piece)
            for r in range_constexpr(2):
                # The last row there is stands for those that are not; it may be one of another CTA.
                token, head = rows.query(cutlass.min(row0 + 8 * r, rows.count - 1))
                f.load_q_rope(r, args.q[rows.request, token, head, None].iterator, lane)
        return args.seqlen(piece), args.slot(piece)

    def bounds(self, args, rows: Rows, seqlen: Int32, row0: Int32) -> "DenseDecode.Bounds":
        """Causality is aligned to the bottom right: query token j sees the tokens below seqlen - s_q + j + 1."""
        hidden = cutlass.select_(args.causal != 0, args.q.shape[1] - 1, Int32(0))
        shown = cutlass.select_(args.causal != 0, Int32(1), Int32(0))
        limits = [seqlen - hidden + shown * rows.query(row)[0] for row in (row0, row0 + 8, 0)]
        return DenseDecode.Bounds(*limits, seqlen)

    @dataclass(frozen=True)
    class Bounds:
        """Which tokens count: those below a limit for each of a thread's rows, below `plain` for all of the CTA's."""

        row0: Int32
        row1: Int32
        plain: Int32
        seqlen: Int32

    def fragments(self, side: int, shared, thread) -> Fragments:
        p = [tile_at(x.data_ptr(), 0, k_major_layout(self.dtype)) for x in (shared.p0, shared.p1)]
        q, k = shared.q.data_ptr(), shared.k.data_ptr()
        return Fragments.of(self.dtype, side, thread, q, k, self.chunks, p[side], p[1 - side])

    def issue_qk(self, side: int, f, barriers: Barriers, begin: int, end: int, parity):
        """Issue S = Q K^T for a range of this side's chunk order, each as soon as it has arrived."""
        for i in range(begin, end):
            chunk = self.qk_order[side][i]
            cute.arch.mbarrier_wait(barriers.k_full + (side * self.chunks + chunk), parity)
            if chunk == V_CHUNKS:
                gemm(qk_op(self.dtype, OperandSource.RMEM), f.s, f.q_rope, f.k[chunk], overwrite=i == 0)
            else:
                gemm(qk_op(self.dtype, OperandSource.SMEM), f.s, f.q[chunk], f.k[chunk], overwrite=i == 0)

    def free(self, barriers: Barriers, buffer: int, group: int):
        """Tell the producers, the peer's too, that a group of chunks has been read."""
        if group == ROPE and not self.has_rope:
            return
        empty = barriers.k_empty + (buffer * len(self.groups) + group)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(empty)
            if self.cluster > 1:
                cute.arch.mbarrier_arrive(empty, barriers.peer)

    def pair(self, side, kind, shared, barriers, f, m, row_sum, tile, bounds, scale, pairs, thread):
        """One pair of K blocks: its scores are complete on entry; unless LAST, those of the next pair are on exit."""
        role = self.pair_left if side == LEFT else self.pair_right
        role(kind, shared, barriers, f, m, row_sum, tile * TILE, bounds, scale, (pairs + 1) & 1, thread)

    def pair_left(self, kind, shared, barriers, f, m, row_sum, token, bounds, scale, next_parity, thread):
        n = cute.make_rmem_tensor(2, Float32)
        sums = cute.make_rmem_tensor(2, Float32)
        row = thread // 32 * 16 + thread % 32 // 4
        max0 = shared.max0.get_tensor(cute.make_layout(ROWS))
        max1 = shared.max1.get_tensor(cute.make_layout(ROWS))

        n[0], n[1] = m[0], m[1]
        self.mask_block(kind, f.s, token, bounds, thread)
        optimistic_softmax(f.s, f.p_scores, sums, n, scale)
        cute.copy(f.p_out[0], f.p_out[1], f.p_out[2])
        max0[row], max0[row + 8] = n[0], n[1]
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier_arrive(barrier_id=P0_READY, number_of_threads=2 * WARPGROUP)
        rescale(f.o, row_sum, m, n[0], n[1], scale)
        self.clear_unused(kind, LEFT, shared, 0, token, bounds, thread)
        warpgroup.fence()
        f.issue_pv(f.p, 0)
        warpgroup.commit_group()
        row_sum[0], row_sum[1] = row_sum[0] + sums[0], row_sum[1] + sums[1]
        self.free(barriers, 0, ROPE)
        warpgroup.wait_group(0)
        self.free(barriers, 0, LEFT)

        cute.arch.barrier(barrier_id=P1_READY, number_of_threads=2 * WARPGROUP)
        rescale(f.o, row_sum, m, max1[row], max1[row + 8], scale)
        self.clear_unused(kind, LEFT, shared, 1, token + BLOCK, bounds, thread)
        warpgroup.fence()
        f.issue_pv(f.p_in, 1)
        warpgroup.commit_group()
        if kind == LAST:
            warpgroup.wait_group(0)
            self.free(barriers, 1, LEFT)
        else:
            self.issue_qk(LEFT, f, barriers, 0, 4, next_parity)
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            self.free(barriers, 1, LEFT)
            self.issue_qk(LEFT, f, barriers, 4, self.chunks, next_parity)
            warpgroup.commit_group()
            warpgroup.wait_group(0)

    def pair_right(self, kind, shared, barriers, f, m, row_sum, token, bounds, scale, next_parity, thread):
        n = cute.make_rmem_tensor(2, Float32)
        sums = cute.make_rmem_tensor(2, Float32)
        row = thread // 32 * 16 + thread % 32 // 4
        max0 = shared.max0.get_tensor(cute.make_layout(ROWS))
        max1 = shared.max1.get_tensor(cute.make_layout(ROWS))

        cute.arch.barrier(barrier_id=P0_READY, number_of_threads=2 * WARPGROUP)
        n[0], n[1] = max0[row], max0[row + 8]
        rescale(f.o, row_sum, m, n[0], n[1], scale)
        self.clear_unused(kind, RIGHT, shared, 0, token, bounds, thread)
        warpgroup.fence()
        f.issue_pv(f.p_in, 0)
        warpgroup.commit_group()
        self.mask_block(kind, f.s, token + BLOCK, bounds, thread)
        optimistic_softmax(f.s, f.p_scores, sums, n, scale)
        cute.copy(f.p_out[0], f.p_out[1], f.p_out[2])
        max1[row], max1[row + 8] = n[0], n[1]
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier_arrive(barrier_id=P1_READY, number_of_threads=2 * WARPGROUP)
        self.free(barriers, 1, ROPE)
        warpgroup.wait_group(0)
        self.free(barriers, 0, RIGHT)

        rescale(f.o, row_sum, m, n[0], n[1], scale)
        self.clear_unused(kind, RIGHT, shared, 1, token + BLOCK, bounds, thread)
        warpgroup.fence()
        f.issue_pv(f.p, 1)
        warpgroup.commit_group()
        row_sum[0], row_sum[1] = row_sum[0] + sums[0], row_sum[1] + sums[1]
        warpgroup.wait_group(0)
        self.free(barriers, 1, RIGHT)
        if kind != LAST:
            warpgroup.fence()
            self.issue_qk(RIGHT, f, barriers, 0, self.chunks, next_parity)
            warpgroup.commit_group()
            warpgroup.wait_group(0)

    @cute.jit
    def mask_block(self, kind: cutlass.Constexpr, s: cute.Tensor, token: Int32, bounds, thread: Int32):
        """Hide what the rows must not see of the block that begins at `token`, if there is any."""
        if const_expr(kind != PLAIN):
            if token + BLOCK > bounds.plain:
                mask(s, token, bounds.row0, bounds.row1, thread % 32)

    @cute.jit
    def clear_unused(
        self,
        kind: cutlass.Constexpr,
        side: cutlass.Constexpr,
        shared,
        buffer: cutlass.Constexpr,
        token: Int32,
        bounds,
        thread: Int32,
    ):
        """Zero this side's half of V in the rows beyond the request: 0 * NaN must not reach the output."""
        seqlen = bounds.seqlen
        if const_expr(kind != PLAIN):
            if token + BLOCK > seqlen:
                row = thread // 2
                if row >= seqlen - token:
                    base = shared.k.data_ptr() + (buffer * self.chunks + 4 * side) * CHUNK_ELEMENTS
                    start = base + row * CHUNK + thread % 2 * (CHUNK // 2)
                    zeros = cute.make_rmem_tensor((CHUNK // 2, 4), self.dtype)
                    zeros.fill(0.0)
                    layout = cute.make_layout((CHUNK // 2, 4), stride=(1, CHUNK_ELEMENTS))
                    cute.autovec_copy(zeros, cute.make_tensor(start.align(16), layout))
                cute.arch.fence_proxy("async.shared", space="cta")
                barrier = LEFT_ONLY if const_expr(side == LEFT) else RIGHT_ONLY
                cute.arch.barrier(barrier_id=barrier, number_of_threads=WARPGROUP)

    @cute.jit
    def write(
        self,
        side: cutlass.Constexpr,
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
        sum0 = shared.sum0.get_tensor(cute.make_layout(ROWS))
        sum1 = shared.sum1.get_tensor(cute.make_layout(ROWS))
        mine, other = (sum0, sum1) if const_expr(side == LEFT) else (sum1, sum0)
        row_sum[0], row_sum[1] = quad_sum(row_sum[0]), quad_sum(row_sum[1])
        if lane % 4 == 0:
            mine[row0], mine[row0 + 8] = row_sum[0], row_sum[1]
        # Behind this barrier the other side has also read its last P: the buffers of P are free.
        cute.arch.barrier(barrier_id=SUMS_READY, number_of_threads=2 * WARPGROUP)
        inv = cute.make_rmem_tensor(2, Float32)
        for r in range_constexpr(2):
            total = row_sum[r] + other[row0 + 8 * r]
            inv[r] = cutlass.select_(total > 0.0, cute.arch.rcp_approx(total), Float32(0.0))
            # lse in base 2; an empty row's is -inf here.
            row_sum[r] = cute.math.log2(total) + m[r] * args.scale_log2
        # The sums are read before the next piece may overwrite them.
        cute.arch.barrier(barrier_id=SUMS_READY, number_of_threads=2 * WARPGROUP)
        if slot < 0:
            self.write_outputs(side, args, shared, f, row_sum, inv, rows, thread)
        else:
            self.write_partials(side, args, f, row_sum, inv, slot, rows, thread)

    @cute.jit
    def write_outputs(
        self,
        side: cutlass.Constexpr,
        args,
        shared,
        f,
        lse2: cute.Tensor,
        inv: cute.Tensor,
        rows,
        thread: Int32,
    ):
        lane, first_row = thread % 32, thread // 32 * 16
        if const_expr(side == LEFT):
            for r in range_constexpr(2):
                row = first_row + lane // 4 + 8 * r
                if row < rows.count and lane % 4 == 0:
                    token, head = rows.query(row)
                    seen = lse2[r] > -Float32.inf
                    args.lse[rows.request, head, token] = cutlass.select_(seen, lse2[r] * LN2, Float32.inf)

        destinations = []
        for i in range_constexpr(4):
            row = first_row + lane // 8 + 4 * i
            exists = row < rows.count
            token, head = rows.query(cutlass.select_(exists, row, Int32(0)))
            destinations.append((exists, args.out[rows.request, token, head, None].iterator + side * (D_V // 2)))
        # Each warp stages its own rows, so warps need not wait for each other.
        staging = (shared.p0 if const_expr(side == LEFT) else shared.p1).data_ptr()
        for chunk in range_constexpr(D_V // 2 // CHUNK):
            chunk_of(f.o, chunk, inv, f.p_scores)
            cute.copy(f.p_out[0], f.p_out[1], f.p_out[2])
            cute.arch.sync_warp()
            at = [(exists, to + chunk * CHUNK) for exists, to in destinations]
            copy_rows_of_warp(staging, first_row, at, lane)
            cute.arch.sync_warp()

    @cute.jit
    def write_partials(
        self,
        side: cutlass.Constexpr,
        args,
        f,
        lse2: cute.Tensor,
        inv: cute.Tensor,
        slot: Int32,
        rows,
        thread: Int32,
    ):
        lane = thread % 32
        tile_row = cute.arch.block_idx()[0] * ROWS
        for r in range_constexpr(2):
            row = thread // 32 * 16 + lane // 4 + 8 * r
            exists = row < rows.count
            if const_expr(side == LEFT):
                if exists and lane % 4 == 0:
                    args.partial_lse[slot, tile_row + row] = lse2[r]
            to = args.partial_o[slot, tile_row + row, None].iterator + side * (D_V // 2)
            scale = write_scaled_row(f.o, r, to, exists, lane)
            if exists and lane % 4 == 0:
                args.partial_scale[slot, tile_row + row, side] = scale * inv[r]

    # ---------------------------------------------------------------------------------------------- geometry

    def box_layout(self):
        """A TMA box in shared memory: rows of one chunk, swizzled by address like the chunk as a whole."""
        rows = cute.make_layout((self.box, CHUNK), stride=(CHUNK, 1))
        return cute.make_composed_layout(k_major_layout(self.dtype).inner, 0, rows)

    def cluster_rank(self) -> Int32:
        return cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())


def compile_variant(dtype: str, d: int, cluster: int, box: int) -> aot.Compiled:
    """Compile for tensors of any extents whose rows are 16-byte aligned, and pages of a multiple of `box` tokens."""
    element = getattr(cutlass, dtype)
    b, s_q, h_q, h_kv = (cute.sym_int() for _ in range(4))
    q = aot.strided(element, (b, s_q, h_q, d), dense_last=True, align=16)
    k_cache = aot.strided(element, (cute.sym_int(), cute.sym_int(divisibility=box), h_kv, d), dense_last=True, align=16)
    block_table = aot.strided(Int32, (b, cute.sym_int()), dense_last=True)
    seqlens = aot.strided(Int32, (b,))
    work = aot.compact(Int32, (cute.sym_int(), 4), align=16)
    splits = aot.compact(Int32, (cute.sym_int(),))
    workspace = aot.compact(Float32, (cute.sym_int(),), align=16)
    out = aot.strided(element, (b, s_q, h_q, D_V), dense_last=True, align=16)
    lse = aot.strided(Float32, (b, h_q, s_q))
    return aot.compile_kernel(
        DenseDecode(element, d, cluster, box), q, k_cache, block_table, seqlens, work, splits, workspace, out, lse,
        Float32(1.0), *[Int32(0)] * 6,
    )  # fmt: skip
