"""Token-sparse MLA decode over a quantised cache: persistent CTAs that walk a SplitPlan. Dense decode is a case of it.

A unit of the plan is a query token and up to 64 of its heads, or 128 for a cluster of two CTAs. Two consumer
warpgroups keep the seesaw of dense_decode: of each pair of 64-token blocks the left one scores block 0, the right one
block 1; each hands its probabilities to the other through shared memory, and each accumulates one half of the output's
512 columns. The producer warpgroup gathers the named rows and converts them to 16 bits, half a row at a time, and has
the raw bytes of two more half rows on their way, across pieces too. In a cluster each CTA converts half of the rows and
copies them to the other.

P takes the place of the RoPE chunk, which nobody needs once the scores are complete: of block 0 it is freed with the
right half of V, of block 1 with the left one, and the producers fill it together with those.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
from cutlass import Float16, Float32, Int32, Int64, Uint8, const_expr, range_constexpr
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.cute.nvgpu.warpgroup import OperandSource

from flash_mla.backends.hopper import aot, dequant
from flash_mla.backends.hopper.combine import merge_pieces, partial_results
from flash_mla.backends.hopper.dequant import (
    CHUNK_BYTES,
    HALF_CHUNKS,
    THREADS_PER_ROW,
    UNIT,
    bf16_to_fp16,
    copy_async,
    load_words,
    store_words,
)
from flash_mla.backends.hopper.epilogue import write_interleaved_row
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
    TILE,
    Arguments,
    Cursor,
    Divisor,
    Source,
    Tokens,
    inverses,
    tiles_of,
)
from flash_mla.backends.hopper.wgmma import CHUNK, ROWS, gemm, k_major_layout, pv_op, qk_op, tile_at, v_layout

BLOCK = TILE // 2  # tokens in a KV block, of which each consumer warpgroup has one of a tile
D_V = 512
V_CHUNKS = D_V // CHUNK
K_CHUNKS = V_CHUNKS + 1  # the last is RoPE, then P
CHUNK_ELEMENTS = ROWS * CHUNK
WARPGROUP = 128
OCTET = 32 // THREADS_PER_ROW  # rows that a warp converts at a time
ROW_BYTES = CHUNK * 2  # of a chunk
PRODUCER_WARP = 8

# Registers of a consumer and of a producer thread, of one format and of two: what ptxas fits without spilling.
REGISTERS, TWO_FORMAT_REGISTERS = (208, 88), (216, 72)

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


@dataclass(frozen=True)
class Lane:
    """What a producer thread works on."""

    warp: Int32
    row: Int32  # of the eight that its warp converts at a time
    slots: dequant.Slots  # of raw bytes
    k: Int32  # address of its columns in the first of eight rows of block 0
    plain: Int32  # address of its columns there in the chunk that is copied as it is
    token: Int32  # of a tile: the one that it looks up
    index: Int32  # address of that token's index


class SparseDecode:
    interleaves = True  # columns of partial outputs

    def __init__(self, dtype: type[cutlass.Numeric], kv_format: str, cluster: int, extra_format: str | None = None):
        self.dtype = dtype
        self.cluster = cluster
        self.loader = getattr(dequant, kv_format)(dtype)
        # Of the extra cache, if it is of another format; its raw bytes take no other places than the main one's.
        self.extra_loader: Any = None if extra_format is None else getattr(dequant, extra_format)(dtype)
        self.has_rope = self.loader.d > D_V
        self.registers = REGISTERS if extra_format is None else TWO_FORMAT_REGISTERS
        self.scales_apart = self.loader.scales_apart
        # Whether the chunk that rows hold in bf16 has to become fp16, in its place.
        self.converts_plain = self.loader.plain_chunk is not None and dtype is Float16
        self.raw_bytes = self.loader.raw_bytes()
        self.octets = BLOCK // OCTET // 4 // cluster  # that each producer warp converts of a block

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
        workspace: cute.Tensor,  # [slots, row_tiles * 64, d_v + 1] fp32 in all: partial outputs, then their lse
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
            indices: cute.struct.MemRange[Int32, WARPGROUP]  # of the next tile
            max0: cute.struct.MemRange[Float32, ROWS]
            max1: cute.struct.MemRange[Float32, ROWS]
            sums: cute.struct.MemRange[Float32, 2 * ROWS]  # of each side
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, V_CHUNKS * CHUNK_ELEMENTS], 1024]
            k: cute.struct.Align[cute.struct.MemRange[self.dtype, 2 * K_CHUNKS * CHUNK_ELEMENTS], 1024]
            raw: cute.struct.Align[cute.struct.MemRange[Uint8, self.raw_bytes], 128]

        self.Shared = Shared
        unit_rows = row_tiles * ROWS
        divisors = (page_size, extra_page_size, run, q.shape[1], (q.shape[2] + unit_rows - 1) // unit_rows)
        partial_o, partial_lse = partial_results(workspace, slots, unit_rows, D_V)
        self.kernel(
            tma_q, q_tma, q, k_cache, indices, lengths, extra_cache, extra_indices, extra_lengths, sink, work, splits,
            partial_o, partial_lse, out, lse, scale_log2, causal, batch_invariant, divisors, inverses(divisors),
        ).launch(
            grid=(row_tiles, work.shape[0] - 1, 1),
            block=(3 * WARPGROUP, 1, 1),
            cluster=(self.cluster, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
        )  # fmt: skip
        if slots != 0:
            self.combine(partial_o, partial_lse, work, splits, sink, out, lse, combine_by_unit, combine_warps, stream)

    @cute.jit
    def combine(
        self,
        partial_o: cute.Tensor,
        partial_lse: cute.Tensor,
        work: cute.Tensor,
        splits: cute.Tensor,
        sink: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        by_unit: Int32,
        warps: Int32,
        stream,
    ):
        (b, s_q, h_q, _), (out_b, out_s, out_h, _) = out.shape, out.stride
        lse_b, lse_h, lse_s = lse.stride
        rows_out = cute.make_tensor(
            out.iterator, cute.make_layout((b, s_q, 1, h_q, D_V), stride=(out_b, out_s, 0, out_h, 1))
        )
        rows_lse = cute.make_tensor(lse.iterator, cute.make_layout((b, s_q, 1, h_q), stride=(lse_b, lse_s, 0, lse_h)))
        rows_sink = cute.make_tensor(sink.iterator, cute.make_layout((s_q, h_q), stride=(0, sink.stride[0])))
        merge_pieces(
            self.dtype, partial_o, partial_lse, work, splits, rows_sink, rows_out, rows_lse, by_unit, warps, stream,
            self.interleaves,
        )  # fmt: skip

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
        out: cute.Tensor,
        lse: cute.Tensor,
        scale_log2: Float32,
        causal: Int32,
        batch_invariant: Int32,
        divisors: tuple,  # page sizes, run, query tokens of a request, passes over their heads
        divisor_inverses: tuple,
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
        page_size, extra_page_size, *rest = map(Divisor, divisors, divisor_inverses)
        args = Arguments(
            q, Source(k_cache, page_size, self.token_bytes(k_cache, False), indices, lengths),
            Source(extra_cache, extra_page_size, self.token_bytes(extra_cache, True), extra_indices, extra_lengths),
            sink, work, splits, partial_o, partial_lse, out, lse, scale_log2, *rest, causal, batch_invariant,
        )  # fmt: skip
        if warp == PRODUCER_WARP:
            cpasync.prefetch_descriptor(tma_q)
        if warp == PRODUCER_WARP + 1:
            args.prefetch()
        self.init_barriers(barriers, warp)
        cute.arch.griddepcontrol_launch_dependents()

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

    def token_bytes(self, cache: cute.Tensor, is_extra: bool) -> Int64 | int:
        """From one token of a page to the next."""
        return ((self.extra_loader if is_extra else None) or self.loader).token_bytes

    def cluster_rank(self) -> Int32:
        return cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())

    @cute.jit
    def init_barriers(self, barriers: Barriers, warp: Int32):
        if warp == 0:
            with cute.arch.elect_one():
                for i in range_constexpr(4):
                    # Every producer thread copies a part of what is not to be converted.
                    copies = WARPGROUP if self.comes_with_copies(i // 2, i % 2) and not self.converts_plain else 0
                    cute.arch.mbarrier_init(barriers.k_full + i, 4 + copies)
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

    def comes_with_copies(self, block, half):
        """Whether a half of a block comes with the chunk that is copied to its place: RoPE with the late half."""
        if self.loader.plain_chunk is None:
            return False
        return (block ^ half) != 0 if self.loader.plain_chunk == V_CHUNKS else half != 0

    def lane(self, shared, thread: Int32) -> Lane:
        lane, warp = thread % 32, cute.arch.make_warp_uniform(thread // 32)
        u, row = lane % THREADS_PER_ROW, lane // THREADS_PER_ROW
        k = Int32(shared.k.data_ptr().toint()) + row * ROW_BYTES
        return Lane(
            warp=warp,
            row=row,
            slots=self.loader.slots(Int32(shared.raw.data_ptr().toint()), thread),
            # Columns 16 u are the units 2 u and 2 u + 1 of a chunk's row, which the swizzle permutes.
            k=k + ((2 * u) ^ row) * UNIT,
            plain=k + (self.loader.plain_chunk or 0) * CHUNK_BYTES + (u ^ row) * UNIT,
            token=self.token(warp, lane),
            index=Int32(shared.indices.data_ptr().toint()) + thread * 4,
        )

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
    def produce(self, args, shared, barriers, tma_q: cute.CopyAtom, q_tma: cute.Tensor, thread: Int32):
        """Fill K blocks in four steps a tile: of block 0 the left half, then the right half and RoPE; of block 1 the
        right half, then the left half and RoPE. That is the order in which the consumers need and free them."""
        lane = self.lane(shared, thread)
        end = end_of_work(args.work)

        cursor = self.settle(args, first_piece(args.work), end)
        self.fetch_index(args, cursor, lane)
        cute.arch.cp_async_commit_group()
        if cursor.exists & (lane.warp == 0):
            self.load_q(args, shared, barriers, tma_q, q_tma, cursor.unit, Int32(0))
        wait_copies(0)

        tiles, pieces, opened = Int32(0), Int32(1), Int32(-1)
        # The first turn looks tokens up and converts none: code that is not there twice is sooner in the caches.
        tokens, exists = Tokens.none(self.scales_apart, self.extra_loader is not None), cutlass.Boolean(False)
        while exists | cursor.exists:
            next_tokens = self.locate(args, cursor, lane)
            next_exists = cursor.exists
            next_opened = cutlass.select_(exists & next_exists & (cursor.opens != 0), cursor.unit, Int32(-1))
            if not exists:
                for i in range_constexpr(2):
                    step, octet = i // self.octets, i % self.octets
                    self.fetch(lane, i, Int32(step), Int32(step), next_tokens.of_lane(octet * OCTET + lane.row))
            cursor = self.next_cursor(args, cursor, end)
            self.fetch_index(args, cursor, lane)
            if not exists:
                cute.arch.cp_async_commit_group()
                wait_copies(0)
            else:
                attended = cute.arch.vote_ballot_sync(tokens.row != 0)
                for step in cutlass.range(4, unroll=1):
                    block, late = step // 2, step % 2
                    cute.arch.mbarrier_wait(barriers.k_empty + (2 * block + (block ^ late)), (tiles & 1) ^ 1)
                    if step == 0 and lane.warp == 0 and opened >= 0:
                        self.load_q(args, shared, barriers, tma_q, q_tma, opened, pieces)
                    if late == 0:
                        self.note_attended(shared, attended, block, lane.warp)
                    self.fill(shared, barriers, lane, tokens, next_tokens, block, late)
                pieces += cutlass.select_(opened >= 0, Int32(1), Int32(0))
                tiles += 1
            tokens, exists, opened = next_tokens, next_exists, next_opened

    @cute.jit
    def fill(self, shared, barriers, lane: Lane, tokens: Tokens, next_tokens: Tokens, block: Int32, late: Int32):
        """Convert half a block of a tile: its first half, or the one that is `late`."""
        half = block ^ late
        full = barriers.k_full + (2 * block + half)
        pending = 1 + self.converts_plain  # groups of copies behind the one that is needed
        if const_expr(self.loader.plain_chunk is not None):
            if self.comes_with_copies(block, half):
                self.copy_plain(lane, tokens, block, full)
        if const_expr(self.converts_plain):
            cute.arch.cp_async_commit_group()
        # Two half rows ahead.
        ahead = 2 * block + late + 2 // self.octets
        sources = tokens.unless(ahead >= 4, next_tokens)
        next_block, next_late = ahead // 2 % 2, ahead % 2
        for i in range_constexpr(self.octets):
            index = i if const_expr(self.octets == 2) else late
            token = sources.of_lane(next_block * (2 * OCTET) + i * OCTET + lane.row)
            to = lane.k + block * (K_CHUNKS * CHUNK_BYTES) + self.octet(lane.warp, i) * (OCTET * ROW_BYTES)
            wait_copies(pending)
            cute.arch.sync_warp()
            following = (next_block ^ next_late, next_late, token)
            if const_expr(self.extra_loader is not None):
                if tokens.extra != 0:
                    self.convert(self.extra_loader, lane, index, half, late, to, following)
                else:
                    self.convert(self.loader, lane, index, half, late, to, following)
            else:
                self.convert(self.loader, lane, index, half, late, to, following)
        if const_expr(self.converts_plain):
            if self.comes_with_copies(block, half):
                wait_copies(pending)
                self.convert_plain(lane, block)
        if const_expr(self.cluster == 1):
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(full)
        else:
            self.push(shared, lane, block, half, full, barriers.peer)

    @cute.jit
    def fetch(self, lane: Lane, index, half: Int32, late: Int32, token: tuple):
        """Start the copies of half a row into the slots number `index`."""
        row, scales, extra = token
        if const_expr(self.extra_loader is not None):
            if extra != 0:
                self.extra_loader.fetch(lane.slots, index, half, row, scales)
            else:
                self.loader.fetch(lane.slots, index, half, row, scales)
        else:
            self.loader.fetch(lane.slots, index, half, row, scales)
        if const_expr(self.loader.rope_codes):
            if late != 0:
                self.loader.fetch_rope(lane.slots, index, row)
        cute.arch.cp_async_commit_group()

    @cute.jit
    def convert(
        self, loader: cutlass.Constexpr, lane: Lane, index, half: Int32, late: Int32, to: Int32, following: tuple
    ):
        """Half a row out of its slots, which at once take the following (half, late, token), and into K at `to`."""
        if const_expr(loader.rope_codes):
            if late != 0:
                at = to + V_CHUNKS * CHUNK_BYTES
                self.loader.store_rope(lane.slots, index, (at, at ^ UNIT))
        scales = loader.read_scales(lane.slots, index, half)
        codes = [loader.read_codes(lane.slots, index, chunk) for chunk in range(2)]
        to += half * (HALF_CHUNKS * CHUNK_BYTES)
        for chunk in range_constexpr(HALF_CHUNKS):
            if const_expr(chunk + 2 < HALF_CHUNKS):  # two chunks ahead: registers do not suffice for more
                codes.append(loader.read_codes(lane.slots, index, chunk + 2))
            if const_expr(chunk + 3 == HALF_CHUNKS):
                self.fetch(lane, index, *following)
            if const_expr(loader.plain_chunk == HALF_CHUNKS + chunk):
                if half == 0:
                    self.store(loader, lane, codes[chunk], scales, to, chunk)
            else:
                self.store(loader, lane, codes[chunk], scales, to, chunk)

    def store(self, loader: dequant.Loader, lane: Lane, codes: tuple, scales: tuple, to: Int32, chunk: int):
        """A chunk of half a row into K, the half beginning at `to`."""
        scale = loader.scale(scales, chunk, lane.slots.thread % THREADS_PER_ROW)
        loader.store(codes, scale, (to, to ^ UNIT), chunk * CHUNK_BYTES)

    @cute.jit
    def settle(self, args, piece: Piece, end):
        """The first tile from the beginning of `piece` on."""
        stop, length, extra_length = Int32(0), Int32(0), Int32(0)
        while remains(piece, end) & (stop <= piece.tile):
            length, extra_length = args.lengths(piece)
            tiles = tiles_of(length) + tiles_of(extra_length)
            stop = piece_stop(piece, end, tiles, args.batch_invariant)
            if stop <= piece.tile:
                piece = next_piece(piece, stop, tiles)
                stop = Int32(0)
        hidden, entries, extra_entries = args.entries(piece)
        return Cursor(piece.unit, piece.tile, stop, Int32(1), length, extra_length, hidden, entries, extra_entries)

    @cute.jit
    def next_cursor(self, args, cursor: Cursor, end):
        following = cursor.advanced()
        if following.tile == following.stop:
            # Which piece of its unit it is, is of no concern here.
            tiles = tiles_of(cursor.length) + tiles_of(cursor.extra_length)
            piece = next_piece(Piece(cursor.unit, cursor.tile, Int32(0)), cursor.stop, tiles)
            following = self.settle(args, piece, end)
        return following

    def entry(self, args, position: Int32) -> Int32:
        """Of the indices: the one that names a token, by the token's position."""
        return cutlass.select_(args.run.value == 1, position, args.run.quotient(position))

    @cute.jit
    def fetch_index(self, args, cursor: Cursor, lane: Lane):
        """Start to bring the index that this lane looks up: of a run of slots, or less than 0 if there is none."""
        length = cutlass.select_(cursor.is_extra, cursor.extra_length, cursor.length)
        position = cursor.position(lane.token)
        if position < cutlass.select_(cursor.exists, length - cursor.hidden, Int32(0)):
            entry = self.entry(args, position)
            entries = cutlass.select_(cursor.is_extra, cursor.extra_entries, cursor.entries)
            copy_async((lane.index, 0), entries, (entries + Int64(entry) * 4, 0), 4)
        else:
            cute.arch.inline_ptx("st.shared.s32 [{$r0}], -1;", read_only_args=[lane.index])

    @cute.jit
    def locate(self, args, cursor: Cursor, lane: Lane):
        """The token whose index of the cursor's tile has arrived."""
        index = cute.arch.inline_ptx(
            "ld.shared.s32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[lane.index]
        )
        position = cursor.position(lane.token)
        slot = (index - self.entry(args, position)) * args.run.value + position
        extra = cursor.is_extra
        sources = (args.main, args.extra)
        page_size, inverse, num_pages, page_bytes, token_bytes, base = (
            cutlass.select_(extra, of_extra, of_main)
            for of_main, of_extra in (
                [source.page_size.value for source in sources],
                [source.page_size.inverse for source in sources],
                [source.cache.shape[0] for source in sources],
                [Int64(source.cache.stride[0]) for source in sources],
                [Int64(source.token_bytes) for source in sources],
                [source.cache.iterator.toint() for source in sources],
            )
        )
        page = Divisor(page_size, inverse).quotient(slot)
        offset = slot - page * page_size
        row = base + Int64(page) * page_bytes + Int64(offset) * token_bytes
        scales = None
        if const_expr(self.scales_apart):
            scales = (page_size - offset) * self.loader.token_bytes + offset * 8
        row = cutlass.select_((slot >= 0) & (page < num_pages), row, Int64(0))
        return Tokens(row, scales, None if self.extra_loader is None else Int32(extra))

    @cute.jit
    def copy_plain(self, lane: Lane, tokens: Tokens, block: Int32, full: cute.Pointer):
        """Copy the values that need no conversion, of all tokens of a block that this warp looks up, into K."""
        u = lane.slots.thread % THREADS_PER_ROW
        for i in range_constexpr(2):
            row = cute.arch.shuffle_sync(tokens.row, block * (2 * OCTET) + i * OCTET + lane.row)
            to = self.plain_place(lane, block, i)
            for units in range_constexpr(0, 2 * THREADS_PER_ROW, THREADS_PER_ROW):
                source = (row + Int64(u * UNIT), self.loader.plain_offset + units * UNIT)
                copy_async((to ^ (units * UNIT), 0), row, source, UNIT)
        if const_expr(not self.converts_plain):
            cute.arch.cp_async_mbarrier_arrive_noinc(full)

    def convert_plain(self, lane: Lane, block: Int32):
        """What this thread has copied of a block by `copy_plain`, to fp16, in place."""
        for i in range(2):
            for units in range(0, 2 * THREADS_PER_ROW, THREADS_PER_ROW):
                at = self.plain_place(lane, block, i) ^ (units * UNIT)
                store_words(at, 0, tuple(bf16_to_fp16(word) for word in load_words(at, 0, 4)))

    def plain_place(self, lane: Lane, block: Int32, i: int) -> Int32:
        return lane.plain + block * (K_CHUNKS * CHUNK_BYTES) + self.octet(lane.warp, i) * (OCTET * ROW_BYTES)

    @cute.jit
    def push(self, shared, lane: Lane, block: Int32, half: Int32, full: cute.Pointer, peer: Int32):
        """Copy what this warp has converted, eight rows of half a block, to the same place in the peer's memory."""
        start = shared.k.data_ptr() + block * K_CHUNKS * CHUNK_ELEMENTS
        source = Int32(start.toint()) + self.octet(lane.warp, 0) * (OCTET * ROW_BYTES)
        there = remote(source, peer) - source
        first = source + half * (HALF_CHUNKS * CHUNK_BYTES)
        full_there = Int32(full.toint()) + there
        # Of four chunks the last may not be converted.
        last_is_plain = self.loader.plain_chunk == V_CHUNKS - 1
        count = HALF_CHUNKS - (half if const_expr(last_is_plain) else 0)
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            # The peer's warp of the same number sends as much.
            cute.arch.mbarrier_arrive_and_expect_tx(full, count * (OCTET * ROW_BYTES))
            for chunk in range_constexpr(HALF_CHUNKS - last_is_plain):
                push_octet(first + chunk * CHUNK_BYTES, there, full_there)
            if const_expr(last_is_plain):
                if half == 0:
                    push_octet(first + (HALF_CHUNKS - 1) * CHUNK_BYTES, there, full_there)

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
                start = args.q[rows.request, rows.token, head, None].iterator + (D_V + 2 * (lane % 4))
                source = cute.make_tensor(start.align(4), cute.make_layout((2, 2, 4), stride=(1, 8, 16)))
                to = cute.make_tensor(f.q_rope.iterator + 2 * r, cute.make_layout((2, 2, 4), stride=(1, 4, 8)))
                cute.autovec_copy(source, to)
        length, extra_length = args.lengths(piece)
        return tiles_of(length) + tiles_of(extra_length), args.slot(piece)

    @dataclass(frozen=True)
    class Fragments:
        """Operands and accumulators of a consumer warpgroup."""

        q: list  # descriptors of Q's eight V chunks
        q_rope: cute.Tensor  # the RoPE chunk, in registers
        k: list  # descriptors of the chunks of this side's K block
        v: list  # descriptors of this side's half of V in both blocks
        p_in: cute.Tensor  # descriptor of the other side's probabilities
        p_out: tuple  # how to store this side's probabilities: (tiled copy, registers, shared memory)
        p: cute.Tensor  # this side's probabilities as an A operand
        p_scores: cute.Tensor  # the same registers, in the scores' order
        s: cute.Tensor
        o: cute.Tensor

    def fragments(self, side: Int32, shared, thread) -> "SparseDecode.Fragments":
        dtype = self.dtype
        chunk, v = k_major_layout(dtype), v_layout(dtype)
        qk = cute.make_tiled_mma(qk_op(dtype, OperandSource.SMEM))
        pv = cute.make_tiled_mma(pv_op(dtype, OperandSource.SMEM))
        qk_slice, pv_slice = qk.get_slice(thread), pv.get_slice(thread)
        q, k = shared.q.data_ptr(), shared.k.data_ptr()
        p, other_p = (tile_at(k, block * K_CHUNKS + V_CHUNKS, chunk) for block in (side, 1 - side))

        s = qk_slice.make_fragment_C(qk_slice.partition_shape_C((ROWS, BLOCK)))
        p_scores = cute.make_rmem_tensor(s.layout, dtype)
        # An A operand takes its registers in the order of the accumulator.
        p_operand = cute.make_tensor(p_scores.iterator, cute.make_layout(((2, 2, 2), 1, 4), stride=((1, 2, 4), 0, 8)))
        store = cute.make_tiled_copy_C(cute.make_copy_atom(cute.nvgpu.warp.StMatrix8x8x16bOp(False, 4), dtype), qk)
        store_slice = store.get_slice(thread)
        return SparseDecode.Fragments(
            q=[qk_slice.make_fragment_A(qk_slice.partition_A(tile_at(q, c, chunk))) for c in range(V_CHUNKS)],
            q_rope=cute.make_rmem_tensor(p_operand.layout, dtype),
            k=[
                qk_slice.make_fragment_B(qk_slice.partition_B(tile_at(k, side * K_CHUNKS + c, chunk)))
                for c in range(K_CHUNKS)
            ],
            v=[
                pv_slice.make_fragment_B(pv_slice.partition_B(tile_at(k, block * K_CHUNKS + HALF_CHUNKS * side, v)))
                for block in range(2)
            ],
            p_in=pv_slice.make_fragment_A(pv_slice.partition_A(other_p)),
            p_out=(store, store_slice.retile(p_scores), store_slice.partition_D(p)),
            p=p_operand,
            p_scores=p_scores,
            s=s,
            o=pv_slice.make_fragment_C(pv_slice.partition_shape_C((ROWS, D_V // 2))),
        )

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

    def issue_pv(self, f, a, block: int):
        """Issue O += P V for this side's half of a block; P in registers or as the other side left it."""
        source = OperandSource.RMEM if a is f.p else OperandSource.SMEM
        gemm(pv_op(self.dtype, source), f.o, a, f.v[block])

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
        max0 = shared.max0.get_tensor(cute.make_layout(ROWS))
        max1 = shared.max1.get_tensor(cute.make_layout(ROWS))

        warpgroup.fence()
        self.issue_qk(LEFT, f, barriers, 0, parity)
        self.issue_qk(LEFT, f, barriers, 1, parity)
        warpgroup.commit_group()
        warpgroup.wait_group(0)
        self.free_q(barriers, closes)

        n[0], n[1] = m[0], m[1]
        self.hide_unattended(f.s, shared, LEFT, thread % 32)
        softmax(f.s, f.p_scores, sums, n, scale)
        # P takes the place of RoPE, which every warp of this side has multiplied by now.
        cute.arch.barrier(barrier_id=LEFT_ONLY, number_of_threads=WARPGROUP)
        cute.copy(f.p_out[0], f.p_out[1], f.p_out[2])
        max0[row], max0[row + 8] = n[0], n[1]
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier_arrive(barrier_id=P0_READY, number_of_threads=2 * WARPGROUP)
        rescale(f.o, row_sum, m, n[0], n[1], scale)
        warpgroup.fence()
        self.issue_pv(f, f.p, 0)
        warpgroup.commit_group()
        row_sum[0], row_sum[1] = row_sum[0] + sums[0], row_sum[1] + sums[1]
        warpgroup.wait_group(0)
        self.free(barriers, 0, LEFT)

        cute.arch.barrier(barrier_id=P1_READY, number_of_threads=2 * WARPGROUP)
        rescale(f.o, row_sum, m, max1[row], max1[row + 8], scale)
        warpgroup.fence()
        self.issue_pv(f, f.p_in, 1)
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
        max0 = shared.max0.get_tensor(cute.make_layout(ROWS))
        max1 = shared.max1.get_tensor(cute.make_layout(ROWS))

        warpgroup.fence()
        self.issue_qk(RIGHT, f, barriers, 0, parity)
        warpgroup.commit_group()
        warpgroup.wait_group(0)
        cute.arch.barrier(barrier_id=P0_READY, number_of_threads=2 * WARPGROUP)
        n[0], n[1] = max0[row], max0[row + 8]
        rescale(f.o, row_sum, m, n[0], n[1], scale)
        warpgroup.fence()
        self.issue_pv(f, f.p_in, 0)
        warpgroup.commit_group()
        self.issue_qk(RIGHT, f, barriers, 1, parity)
        warpgroup.commit_group()
        warpgroup.wait_group(1)
        self.free(barriers, 0, RIGHT)
        warpgroup.wait_group(0)
        self.free_q(barriers, closes)

        self.hide_unattended(f.s, shared, RIGHT, thread % 32)
        softmax(f.s, f.p_scores, sums, n, scale)
        cute.arch.barrier(barrier_id=RIGHT_ONLY, number_of_threads=WARPGROUP)
        cute.copy(f.p_out[0], f.p_out[1], f.p_out[2])
        max1[row], max1[row + 8] = n[0], n[1]
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier_arrive(barrier_id=P1_READY, number_of_threads=2 * WARPGROUP)
        rescale(f.o, row_sum, m, n[0], n[1], scale)
        warpgroup.fence()
        self.issue_pv(f, f.p, 1)
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
        sums = shared.sums.get_tensor(cute.make_layout((ROWS, 2)))
        heads = [cutlass.min(rows.head_tile * ROWS + row0 + 8 * r, args.q.shape[2] - 1) for r in range(2)]
        sinks = [args.sink[head] * LOG2_E for head in heads]  # early, for their latency
        row_sum[0], row_sum[1] = quad_sum(row_sum[0]), quad_sum(row_sum[1])
        if lane % 4 == 0:
            sums[row0, side], sums[row0 + 8, side] = row_sum[0], row_sum[1]
        cute.arch.barrier(barrier_id=SUMS_READY, number_of_threads=2 * WARPGROUP)
        inv = cute.make_rmem_tensor(2, Float32)
        for r in range_constexpr(2):
            total = row_sum[r] + sums[row0 + 8 * r, 1 - side]
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
            write_interleaved_row(f.o, r, inv[r], to, exists, lane)


@cute.jit
def softmax(scores: cute.Tensor, p: cute.Tensor, sums: cute.Tensor, reference: cute.Tensor, scale: Float32):
    """`optimistic_softmax`, but the maximum comes first: scores and p are never all alive, which saves registers."""
    tops = (row_max(scores, 0), row_max(scores, 1))
    if cute.arch.vote_any_sync(cute.arch.fmax(tops[0] - reference[0], tops[1] - reference[1]) * scale > THRESHOLD):
        for r in range_constexpr(2):
            top = quad_max(tops[r])
            reference[r] = cutlass.select_((top - reference[r]) * scale > THRESHOLD, top, reference[r])
    exponentials(scores, p, sums, reference, scale)


def push_octet(source: Int32, there: Int32, full_there: Int32) -> None:
    """Copy eight rows of a chunk, one swizzle atom, to the peer's shared memory, `there` farther."""
    cute.arch.inline_ptx(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
        f"[{{$r0}}], [{{$r1}}], {OCTET * ROW_BYTES}, [{{$r2}}];",
        read_only_args=[source + there, source, full_there],
    )


def remote(address: Int32, peer: Int32) -> Int32:
    """The place of a shared-memory address in the peer's memory."""
    there = cute.arch.inline_ptx(
        "mapa.shared::cluster.u32 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[address, peer]
    )
    return cute.arch.make_warp_uniform(there)


def wait_copies(pending: int) -> None:
    """Wait until at most `pending` of this thread's groups of asynchronous copies are under way."""
    cute.arch.inline_ptx(f"cp.async.wait_group {pending};")


@cute.jit
def write_16bit_row(o: cute.Tensor, r: cutlass.Constexpr, factor: Float32, to: cute.Pointer, exists, lane: Int32):
    """This thread's part of its row r in `to`'s dtype: four neighbours trade words, so that each writes 16 bytes."""
    odd, upper = lane % 2 != 0, lane % 4 >= 2
    start = to + lane % 4 * 8
    for group in range_constexpr(D_V // 2 // 32):
        values = cute.make_rmem_tensor(8, to.dtype)
        for j in range_constexpr(4):
            for c in range_constexpr(2):
                values[2 * j + c] = (o[16 * group + 4 * j + 2 * r + c] * factor).to(to.dtype)
        # Word j is of columns 8 j + 2 (lane % 4) ...: a transpose among the four gives lane j columns 8 j ... 8 j + 7.
        words = cute.recast_tensor(values, Int32)
        for j in range_constexpr(0, 4, 2):
            theirs = cute.arch.shuffle_sync_bfly(cutlass.select_(odd, words[j], words[j + 1]), 1)
            low, high = words[j], words[j + 1]
            words[j], words[j + 1] = cutlass.select_(odd, theirs, low), cutlass.select_(odd, high, theirs)
        for j in range_constexpr(2):
            theirs = cute.arch.shuffle_sync_bfly(cutlass.select_(upper, words[j], words[j + 2]), 2)
            low, high = words[j], words[j + 2]
            words[j], words[j + 2] = cutlass.select_(upper, theirs, low), cutlass.select_(upper, high, theirs)
        if exists:
            cute.autovec_copy(values, cute.make_tensor((start + group * 32).align(16), cute.make_layout(8)))


def compile_variant(dtype: str, kv_format: str, cluster: int, extra_format: str | None = None) -> aot.Compiled:
    """Compile for tensors of any extents whose rows, tokens and pages are 16-byte aligned."""
    kernel = SparseDecode(getattr(cutlass, dtype), kv_format, cluster, extra_format)
    caches = [aot.strided(Uint8, (cute.sym_int(), cute.sym_int()), dense_last=True, align=16) for _ in range(2)]
    return compile_for(kernel, kernel.loader.d, caches)


def compile_for(kernel: SparseDecode, d: int, caches: list) -> aot.Compiled:
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
