"""Dense MLA decode over a paged cache, BF16 or FP16: persistent CTAs that walk a SplitPlan.

A CTA owns 64 packed query rows (query token x head of one KV head) of its worker's units. Its two consumer warpgroups
keep the seesaw. One warp of the producer warpgroup brings K by TMA, chunk by chunk, for both CTAs of a cluster when
they share a unit; its other warps bring Q of the next piece while this one ends.
"""

from dataclasses import dataclass, replace

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
from cutlass import Float32, Int32, Int64, const_expr, range_constexpr
from cutlass.cute.nvgpu import cpasync, warpgroup

from flash_mla.backends.hopper import aot
from flash_mla.backends.hopper.combine import merge_pieces, scaled_partial_results
from flash_mla.backends.hopper.copies import EVICT_FIRST, EVICT_NORMAL, copy_async, prefetch
from flash_mla.backends.hopper.dense_decode_geometry import Arguments, Pages, by_unit
from flash_mla.backends.hopper.dense_decode_loads import KLoads
from flash_mla.backends.hopper.divisor import Divisor
from flash_mla.backends.hopper.epilogue import chunk_of, copy_rows_of_warp
from flash_mla.backends.hopper.fragments import BLOCK, D_V, V_CHUNKS, Registers
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
from flash_mla.backends.hopper.seesaw import (
    CHUNK_ELEMENTS,
    FIRST_FREE_BARRIER,
    LEFT,
    RIGHT,
    TILE,
    WARPGROUP,
    Consumer,
    Position,
    Running,
    Seesaw,
)
from flash_mla.backends.hopper.softmax import LN2, mask, optimistic_softmax
from flash_mla.backends.hopper.wgmma import CHUNK, ROWS

CONSUMER_REGISTERS = 240
PRODUCER_REGISTERS = 24
K_WARP = 8  # the producer warpgroup's first warp loads K, the others Q
Q_WARPS = 3
Q_ROWS = 8  # of Q that a warp brings at a time

# Pairs of blocks that a CTA loads before it also brings later ones to L2: at first all SMs wait for loads at once, and
# what is not yet needed would delay them (a request of 65,536 tokens: 49 us instead of 52; many pairs: no matter).
PREFETCH_FROM = 4

# Named barriers of one consumer warpgroup: of the left side; the right side's is the next.
CLEARED = FIRST_FREE_BARRIER


@dataclass(frozen=True)
class Barriers:
    """Shared-memory barriers. K's are one for each group of chunks of each buffer."""

    k_full: cute.Pointer
    k_empty: cute.Pointer
    q_full: cute.Pointer
    q_empty: cute.Pointer  # per half of its V columns
    peer: Int32 | None  # rank of the cluster's other CTA


@dataclass(frozen=True)
class Part:
    """What a piece's pairs are part of."""

    args: Arguments
    piece: Piece
    seqlen: Int32  # of its request
    last: Int32  # tile; of an empty request, one of which no row counts
    plain: Int32  # every row of the CTA sees the tokens before this one

    def anew(self) -> "Part":
        """As far as the compiler knows another, so that few registers remember what is computed from it."""
        piece = Piece(anew(self.piece.unit), anew(self.piece.tile), anew(self.piece.split))
        return Part(self.args, piece, anew(self.seqlen), anew(self.last), anew(self.plain))

    def following(self) -> Piece:
        tiles = tiles_of(self.seqlen)
        return next_piece(self.piece, cutlass.min(self.last + 1, tiles), tiles)


@dataclass(frozen=True, kw_only=True)
class PairConsumer(Consumer):
    """A consumer, and the pair of blocks that it is at."""

    token: Int32  # the pair's first
    part: Part | None  # None if every row sees all of the pair


class DenseDecode(Seesaw):
    def __init__(self, dtype: type[cutlass.Numeric], d: int, cluster: int, box: int):
        super().__init__(dtype, d, cluster=cluster, by_octets=box < BLOCK)
        self.k_loads = KLoads(dtype, self.groups, cluster, box)

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
        atoms = self.k_loads.atoms(k_cache)

        @cute.struct
        class Shared:
            k_full: cute.struct.MemRange[Int64, 2 * len(self.groups)]
            k_empty: cute.struct.MemRange[Int64, 2 * len(self.groups)]
            q_full: cute.struct.MemRange[Int64, 1]
            q_empty: cute.struct.MemRange[Int64, 2]
            # Of each row, the left side's and the right side's.
            maxima: cute.struct.MemRange[Float32, 2 * ROWS]
            sums: cute.struct.MemRange[Float32, 2 * ROWS]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, V_CHUNKS * CHUNK_ELEMENTS], 1024]
            p: cute.struct.Align[cute.struct.MemRange[self.dtype, 2 * CHUNK_ELEMENTS], 1024]
            k: cute.struct.Align[cute.struct.MemRange[self.dtype, 2 * self.chunks * CHUNK_ELEMENTS], 1024]

        self.Shared = Shared
        h_kv = k_cache.shape[2]
        group = q.shape[2] // h_kv
        unit_rows = row_tiles * ROWS
        partials = scaled_partial_results(workspace, slots, unit_rows, D_V)
        # K that no other cluster reads need not stay in L2, where Q, outputs and partial results are.
        cache_policy = Int64(cutlass.select_(row_tiles == self.cluster, Int64(EVICT_FIRST), Int64(EVICT_NORMAL)))
        args = Arguments(
            q, block_table, seqlens, work, splits, *partials, out, lse, Divisor.of(h_kv), Divisor.of(group),
            Divisor.of((q.shape[1] * group + unit_rows - 1) // unit_rows),
            Divisor.of(k_cache.shape[1] // self.k_loads.box), scale_log2, causal, batch_invariant, cache_policy,
        )  # fmt: skip
        self.kernel(args, atoms).launch(
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
    def kernel(self, args: Arguments, atoms: list):
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
                self.load_k(args, shared, barriers, atoms)
            else:
                self.load_q(args, shared, barriers, thread - (K_WARP + 1) * 32)
        else:
            cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            side = cute.arch.make_warp_uniform(warp // 4)
            self.consume(side, args, shared, barriers, thread - side * WARPGROUP)
        if const_expr(self.cluster > 1):  # the peer may still signal our barriers
            self.meet()

    @cute.jit
    def init_barriers(self, barriers: Barriers, warp: Int32):
        if warp == 0:
            with cute.arch.elect_one():
                for i in range_constexpr(2 * len(self.groups)):
                    cute.arch.mbarrier_init(barriers.k_full + i, 1)
                    cute.arch.mbarrier_init(barriers.k_empty + i, 4 * self.cluster)
                cute.arch.mbarrier_init(barriers.q_full, Q_WARPS)
                for i in range_constexpr(2):
                    cute.arch.mbarrier_init(barriers.q_empty + i, 8)
        cute.arch.mbarrier_init_fence()
        self.meet()

    # ---------------------------------------------------------------------------------------------- producers

    @cute.jit
    def load_k(self, args, shared, barriers, atoms: list):
        """Bring K blocks, a pair at a time; each group of a buffer's chunks as soon as it is free."""
        for tma, _ in atoms:
            cpasync.prefetch_descriptor(tma)
        loads = self.k_loads.of_groups(shared.k.data_ptr(), atoms, self.cluster_rank())
        pairs = Int32(0)
        piece = first_piece(args.work)
        # Few registers are left here, so where the work ends is read anew.
        while remains(piece, end_of_work(args.work)):
            _, kv_head, _ = args.place(piece)
            seqlen = args.seqlen(piece)
            stop = piece_stop(piece, end_of_work(args.work), tiles_of(seqlen), args.batch_invariant)
            if stop > piece.tile:
                pages = Pages(args, piece, seqlen, self.k_loads.box)
                boxes = pages.locate(piece.tile)
                for tile in cutlass.range(piece.tile, stop, unroll=1):
                    following = pages.locate(tile + 1)  # a pair ahead, so that no table entry delays a load of K
                    if const_expr(self.cluster > 1):
                        if (pairs >= PREFETCH_FROM) & (tile + 1 < stop):
                            self.k_loads.prefetch(loads, boxes, kv_head)
                    for buffer, group in self.load_order():
                        number = buffer * len(self.groups) + group
                        cute.arch.mbarrier_wait(barriers.k_empty + number, (pairs & 1) ^ 1)
                        full = barriers.k_full + number
                        self.k_loads.load(loads[group], boxes, kv_head, buffer, full, args.cache_policy)
                    boxes = following
                    pairs += 1
            else:  # an empty request, of which no role but this one and masks need know: a pair of which no row counts
                for buffer, group in self.load_order():
                    number = buffer * len(self.groups) + group
                    cute.arch.mbarrier_wait(barriers.k_empty + number, (pairs & 1) ^ 1)
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive(barriers.k_full + number)
                pairs += 1
            piece = next_piece(piece, stop, tiles_of(anew(seqlen)))

    @cute.jit
    def load_q(self, args, shared, barriers, thread: Int32):
        """Bring the 512 V columns of Q by 16-byte asynchronous copies: rows have any stride."""
        lane = thread % 32
        smem = Int32(shared.q.data_ptr().toint())
        pieces = Int32(0)
        piece = first_piece(args.work)
        while remains(piece, end_of_work(args.work)):  # read anew, as K's producer does
            turns = -(-ROWS // (Q_WARPS * Q_ROWS))
            if pieces > 0:  # brought to L2 while the piece before still uses Q
                for turn in cutlass.range(turns, unroll=1):
                    address, _ = self.locate_q(args, piece, self.q_row(turn, thread))
                    address += Int64(lane % 4 * 256)
                    for line in range_constexpr(2):
                        prefetch(address + Int64(line * 128))
            for half in range_constexpr(2):
                cute.arch.mbarrier_wait(barriers.q_empty + half, (pieces & 1) ^ 1)
            for turn in cutlass.range(turns, unroll=1):
                row = self.q_row(turn, thread)
                if row < ROWS:
                    address, exists = self.locate_q(args, piece, row)
                    # A row that does not exist reads nothing and is filled with zeros.
                    present = cutlass.select_(exists, address, Int64(0))
                    # A copy takes half a chunk, whose 16-byte units the swizzle permutes.
                    to = [smem + row * 128 + ((4 * half + lane % 4) ^ (row % 8)) * 16 for half in range(2)]
                    address += Int64(lane % 4 * 16)
                    for half_chunk in range_constexpr(2 * V_CHUNKS):
                        chunk = half_chunk // 2 * (CHUNK_ELEMENTS * 2)
                        copy_async((to[half_chunk % 2], chunk), present, (address, half_chunk * CHUNK), 16)
            cute.arch.cp_async_commit_group()
            tiles = tiles_of(args.seqlen(piece))
            stop = piece_stop(piece, end_of_work(args.work), tiles, args.batch_invariant)
            cute.arch.cp_async_wait_group(0)
            cute.arch.fence_proxy("async.shared", space="cta")
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(barriers.q_full)
            pieces += 1
            piece = next_piece(piece, stop, tiles)

    def q_row(self, turn: Int32, thread: Int32) -> Int32:
        """The row of which a thread of the warps that bring Q copies a quarter; may be beyond the last."""
        return Q_ROWS * (thread // 32 + Q_WARPS * turn) + thread % 32 // 4

    def locate_q(self, args, piece: Piece, row: Int32) -> tuple:
        """(where a row of Q lies, whether it exists); the last one that there is stands for those that do not.

        That one may be of another CTA. Few registers are left to remember what depends on no row.
        """
        rows = args.rows(Piece(anew(piece.unit), piece.tile, piece.split))
        token, head = rows.query(cutlass.min(row, rows.count - 1))
        return args.q[rows.request, token, head, None].iterator.toint(), row < rows.count

    # ---------------------------------------------------------------------------------------------- consumers

    @cute.jit
    def consume(self, side: Int32, args, shared, barriers, thread: Int32):
        """One consumer warpgroup: scores of block `side` of each pair, half `side` of the output columns."""
        c = Consumer(
            side, shared, barriers, Registers.allocate(self.dtype), Running.allocate(top=False), args.scale_log2, thread
        )
        parity, q_parity = Int32(0), Int32(0)  # of pairs and pieces
        piece, end = first_piece(args.work), end_of_work(args.work)
        ahead = cute.make_rmem_tensor(2, Int32)  # the next piece's length and slot
        self.load_piece(args, c, piece, ahead)
        while remains(piece, end):
            seqlen, slot = ahead[0], ahead[1]
            stop = piece_stop(piece, end, tiles_of(seqlen), args.batch_invariant)
            last = cutlass.max(piece.tile, stop - 1)
            part = Part(args, piece, seqlen, last, args.visible(piece, seqlen, Int32(0)))
            work = (part, ahead)
            c.running.reset()
            cute.arch.mbarrier_wait(barriers.q_full, q_parity)
            warpgroup.fence()
            self.issue_scores(c, self.qk_order, parity)
            warpgroup.wait_group(0)
            # Tests for masks cost 4 %, so that tiles that need none have code of their own, and that for each side. The
            # last tile, after which no wgmma may be in flight, is peeled: one in flight over a loop's back edge makes
            # ptxas serialise all of them.
            plain_stop = cutlass.max(piece.tile, cutlass.min(part.last, part.plain // TILE))
            if side == LEFT:
                parity = self.pairs(replace(c, side=LEFT), None, parity, piece.tile, plain_stop, work)
            else:
                parity = self.pairs(replace(c, side=RIGHT), None, parity, piece.tile, plain_stop, work)
            parity = self.pairs(c, part, parity, plain_stop, part.last, work)
            closing = PairConsumer(**vars(c), token=part.last * TILE, part=part)
            self.pair(closing, parity, Position(piece.tile == part.last, False, True), work)
            parity ^= 1
            q_parity ^= 1
            self.write(args, c, piece, slot)
            piece = part.anew().following()

    @cute.jit
    def pairs(self, c, seen: Part | None, parity: Int32, tile: Int32, stop: Int32, work) -> Int32:
        """The pairs of tiles before `stop`, none of them the piece's last; returns the parity behind them.

        seen: None if every row sees all of them, else the piece.
        """
        part, _ = work
        while tile < stop:
            at = Position(tile == part.piece.tile, tile + 1 == part.last, False)
            self.pair(PairConsumer(**vars(c), token=tile * TILE, part=seen), parity, at, work)
            parity ^= 1
            tile += 1
        return parity

    def load_ahead(self, c: Consumer, work: tuple[Part, cute.Tensor]):
        part, ahead = work
        self.load_piece(part.args, c, part.anew().following(), ahead)

    def load_piece(self, args: Arguments, c: Consumer, piece: Piece, ahead: cute.Tensor):
        """Start early what a piece needs from global memory: Q's RoPE chunk, its length and slot.

        Beyond the last piece that may be those of any.
        """
        piece = Piece(cutlass.min(piece.unit, args.splits.shape[0] - 2), piece.tile, piece.split)
        if self.has_rope:
            rows, thread = args.rows(piece), anew(c.thread)
            row = thread // 32 * 16 + thread % 32 // 4
            for r in range(2):
                # The last row there is stands for those that are not; it may be one of another CTA.
                token, head = rows.query(cutlass.min(row + 8 * r, rows.count - 1))
                c.f.load_q_rope(r, args.q[rows.request, token, head, None].iterator, thread % 32)
        ahead[0], ahead[1] = args.seqlen(piece), args.slot(piece)

    @cute.jit
    def softmax(self, c, n, sums, parity, begins):
        if const_expr(c.part is not None):
            token = c.token + c.side * BLOCK
            if token + BLOCK > c.part.plain:
                part, thread = c.part.anew(), anew(c.thread)
                row = thread // 32 * 16 + thread % 32 // 4
                limits = [part.args.visible(part.piece, part.seqlen, row + 8 * r) for r in range(2)]
                mask(c.f.s, token, *limits, thread % 32)
        optimistic_softmax(c.f.s, c.f.p_scores, sums, n, c.scale)

    @cute.jit
    def prepare_v(self, c, of: cutlass.Constexpr):
        """Zero V in the rows beyond the request: 0 * NaN must not reach the output."""
        if const_expr(c.part is not None):
            buffer, thread = c.side ^ of, anew(c.thread)
            used = c.part.seqlen - (c.token + buffer * BLOCK)
            if used < BLOCK:
                row = thread // 2
                if row >= used:
                    half = c.shared.k.data_ptr() + (buffer * self.chunks + V_CHUNKS // 2 * c.side) * CHUNK_ELEMENTS
                    start = half + self.k_loads.v_row(row) + thread % 2 * (CHUNK // 2)
                    zeros = cute.make_rmem_tensor((CHUNK // 2, V_CHUNKS // 2), self.dtype)
                    zeros.fill(0.0)
                    layout = cute.make_layout((CHUNK // 2, V_CHUNKS // 2), stride=(1, self.k_loads.v_chunk))
                    cute.autovec_copy(zeros, cute.make_tensor(start.align(16), layout))
                cute.arch.fence_proxy("async.shared", space="cta")
                cute.arch.barrier(barrier_id=CLEARED + c.side, number_of_threads=WARPGROUP)

    @cute.jit
    def write(self, args, c, piece: Piece, slot: Int32):
        """Normalise and write a whole unit to the outputs, a piece of one to its slot of the workspace."""
        # What is computed from these is not to take registers while pairs run.
        c = replace(c, thread=anew(c.thread), side=uniform(anew(c.side)))
        inv, lse2 = self.inverse_and_lse(c)
        if slot < 0:
            self.write_outputs(args, c, piece, inv, lse2)
        else:
            self.write_partials(args, c, args.rows(piece).count, inv, lse2, slot)

    @cute.jit
    def write_outputs(self, args, c, piece: Piece, inv: cute.Tensor, lse2: cute.Tensor):
        lane, first_row, rows = c.thread % 32, c.thread // 32 * 16, args.rows(piece)
        if c.side == LEFT:
            for r in range_constexpr(2):
                row = c.row + 8 * r
                if row < rows.count and lane % 4 == 0:
                    token, head = rows.query(row)
                    seen = lse2[r] > -Float32.inf
                    args.lse[rows.request, head, token] = cutlass.select_(seen, lse2[r] * LN2, Float32.inf)

        destinations = []
        for i in range_constexpr(4):
            row = first_row + lane // 8 + 4 * i
            exists = row < rows.count
            token, head = rows.query(cutlass.select_(exists, row, Int32(0)))
            destinations.append((exists, args.out[rows.request, token, head, None].iterator + c.side * (D_V // 2)))
        # Each warp stages its own rows, so warps need not wait for each other.
        staging = c.shared.p.data_ptr() + c.side * CHUNK_ELEMENTS
        for chunk in range_constexpr(D_V // 2 // CHUNK):
            chunk_of(c.f.o, chunk, inv, c.f.p_scores)
            self.stage(c, staging)
            cute.arch.sync_warp()
            at = [(exists, to + chunk * CHUNK) for exists, to in destinations]
            copy_rows_of_warp(staging, first_row, at, lane)
            cute.arch.sync_warp()


def tiles_of(seqlen: Int32) -> Int32:
    return (seqlen + (TILE - 1)) // TILE


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
