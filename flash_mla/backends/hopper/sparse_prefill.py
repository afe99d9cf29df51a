"""Token-sparse prefill, BF16 or FP16: persistent CTAs take pieces of work, 64 heads of a query token each, in order.

That is the order of the tokens, or of a list of them by their length (sparse_prefill_order). The producer warpgroup
gathers the KV rows that a token's indices name, 16 bytes at a time, straight into the swizzled chunks that the tensor
cores read; it runs ahead into the next piece while the consumers finish one. The consumer warpgroups keep the seesaw,
and write a piece's output while the next one's Q and K arrive. Without a RoPE chunk there is shared memory left for TMA
to write the output from, and the next piece's first scores are computed meanwhile.
"""

from dataclasses import dataclass, replace

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
from cutlass import Boolean, Float32, Int32, Int64, Uint16, const_expr, range_constexpr
from cutlass.cute.nvgpu import cpasync, warpgroup

from flash_mla.backends.hopper import aot
from flash_mla.backends.hopper.combine import OfPrefill, merge_pieces
from flash_mla.backends.hopper.copies import EVICT_FIRST, copy_or_zeros, pointer_at
from flash_mla.backends.hopper.epilogue import chunk_of, copy_rows_of_warp, write_fp32_row
from flash_mla.backends.hopper.fragments import BLOCK, D_V, V_CHUNKS, Registers
from flash_mla.backends.hopper.schedule import anew, uniform
from flash_mla.backends.hopper.seesaw import (
    CHUNK_ELEMENTS,
    LEFT,
    RIGHT,
    TILE,
    WARPGROUP,
    Consumer,
    Position,
    Running,
    Seesaw,
    mask_by_bits,
)
from flash_mla.backends.hopper.softmax import LN2, LOG2_E, THRESHOLD, exponentials, quad_max, row_max
from flash_mla.backends.hopper.sparse_prefill_order import TokenOrder
from flash_mla.backends.hopper.sparse_prefill_tokens import TokenList
from flash_mla.backends.hopper.wgmma import CHUNK, ROWS, k_major_layout

CONSUMER_REGISTERS = 232
PRODUCER_REGISTERS = 40
PRODUCER_WARP = 8  # the producer warpgroup's first
# Chunks of a piece's output that a side writes between issuing the next piece's scores over its own half of V's columns
# and those over the other half; the rest follows.
WRITTEN_AMID = 1
TILE_BITS = TILE.bit_length() - 1
STAGES = 2  # chunks of each side's output that shared memory has room for beside K and Q, without RoPE
WARP_ROWS = 16  # rows of a block that a producer warp gathers, and of the output that a consumer warp writes


@dataclass(frozen=True)
class Barriers:
    """Shared-memory barriers. K's are one for each group of chunks of each buffer; to free it, one for each step."""

    k_full: cute.Pointer
    k_empty: cute.Pointer
    valid_full: cute.Pointer  # per buffer: which of its rows count is known
    q_full: cute.Pointer
    q_empty: cute.Pointer  # per half of its V columns


class Piece:
    """The tiles [begin, stop) of a query token for 64 of its heads; lives in registers, across loops."""

    def __init__(self, token: Int32, head_tile: Int32, begin: Int32, stop: Int32, length: Int32):
        self.token = token
        self.head_tile = head_tile
        self.begin = begin
        self.stop = stop
        self.length = length  # indices of the token that count

    def _values(self):
        return self.token, self.head_tile, self.begin, self.stop, self.length

    def __extract_mlir_values__(self):
        return [value.ir_value() for value in self._values()]

    def __new_from_mlir_values__(self, values):
        return Piece(*(Int32(value) for value in values))


@dataclass(frozen=True)
class Arguments:
    """What every role reads of the call; shapes at `SparsePrefill.__call__`."""

    q: cute.Tensor
    kv: cute.Tensor
    indices: cute.Tensor
    tokens: TokenList
    sink: cute.Tensor
    out: cute.Tensor
    tma_out: cute.CopyAtom
    out_tma: cute.Tensor  # [h_q, d_v, s_q]: out, as tma_out takes it
    max_logits: cute.Tensor
    lse: cute.Tensor
    partial_o: cute.Tensor
    partial_lse: cute.Tensor
    partial_max: cute.Tensor
    whole_pieces: Int32  # how many pieces are whole; those behind them are parts of the other tokens
    pieces: Int32
    # Not `Divisor`, with whose one correction more registers spill.
    head_tiles: cute.FastDivmodDivisorV2  # of a token
    splits: cute.FastDivmodDivisorV2  # pieces of 64 heads of a token that is split
    scale_log2: Float32

    def place(self, number: Int32) -> tuple[Int32, Int32, Int32]:
        """(place of its token, 64 of its heads, split) of a piece; a split unit's pieces are consecutive."""
        slot = self.slot(number)
        unit, split = divmod(slot, self.splits)
        unit = cutlass.select_(slot < 0, number, self.whole_pieces + Int32(unit))
        token, head_tile = divmod(unit, self.head_tiles)
        return cutlass.min(Int32(token), self.q.shape[0] - 1), Int32(head_tile), Int32(split)

    def word(self, number: Int32) -> Int32:
        """What the list of tokens holds for a piece."""
        return self.tokens.words[self.place(number)[0]]

    def piece(self, number: Int32, word: Int32) -> Piece:
        """Piece `number`, given its `word`; beyond the last one, a piece without rows of KV."""
        place, head_tile, split = self.place(number)
        token, length = self.tokens.read(place, uniform(word))
        length = cutlass.min(cutlass.max(length, 0), self.indices.shape[1])
        length = cutlass.select_(number < self.pieces, length, Int32(0))
        tiles = (length + TILE - 1) >> TILE_BITS
        is_whole = number < self.whole_pieces
        begin = cutlass.select_(is_whole, Int32(0), Int32(split * tiles // self.splits))
        stop = cutlass.select_(is_whole, tiles, Int32((split + 1) * tiles // self.splits))
        # A piece without tiles takes the one beyond the token's last, which holds no rows: no role has to know.
        is_empty = begin == stop
        begin = cutlass.select_(is_empty, tiles, begin)
        stop = cutlass.select_(is_empty, tiles + 1, stop)
        return Piece(token, head_tile, begin, stop, length)

    def slot(self, number: Int32) -> Int32:
        """Where a piece's partial result goes; < 0 if it is whole."""
        return number - self.whole_pieces

    def rows(self, piece: Piece) -> Int32:
        """How many of the piece's 64 heads exist."""
        return self.q.shape[1] - piece.head_tile * ROWS

    def head(self, piece: Piece, row) -> Int32:
        return piece.head_tile * ROWS + row


class SparsePrefill(Seesaw):
    def __init__(self, dtype: type[cutlass.Numeric], d: int, short: bool):
        # Without RoPE a producer warp's 16 rows come as soon as they are free. With it that gained nothing.
        super().__init__(dtype, d, steps=1 if d > D_V else BLOCK // WARP_ROWS)
        # The end of a piece overlaps with the next one's begin. With RoPE there is room for a single stage of output,
        # by which that gained nothing.
        self.overlaps = not self.has_rope
        # In short calls code is read once or twice, from memory: less of it is faster.
        self.short = short
        # Where RoPE takes its registers, the loop over pairs is faster without what closes a piece. That is then code
        # of its own, for both sides.
        self.peels = self.has_rope and not short

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [s_q, h_q, d]
        kv: cute.Tensor,  # [s_kv, d]
        indices: cute.Tensor,  # [s_q, topk] int32
        lengths: cute.Tensor,  # [s_q] int32, how many leading indices count; unread if they are looked for
        sink: cute.Tensor,  # [h_q] fp32, natural log
        out: cute.Tensor,  # [s_q, h_q, d_v]
        max_logits: cute.Tensor,  # [s_q, h_q] fp32
        lse: cute.Tensor,  # [s_q, h_q] fp32, natural log
        # [slots * 64 * (d_v + 2)] fp32: partial outputs, their lse and maxima; if tokens are listed, 2 * s_q words more
        workspace: cute.Tensor,
        unit_slots: cute.Tensor,  # [split units + 1] int32: first slot of each unit (token, 64 heads) that is split
        scale_log2: Float32,
        workers: Int32,
        whole_tokens: Int32,  # tokens before this one are not split
        splits: Int32,  # pieces of the others
        combine_warps: Int32,  # that merge the splits of a row
        length_bits: Int32,  # of the list of tokens (sparse_prefill_tokens); 0: they are taken as they come
        round_tokens: Int32,  # of the list
        finds_lengths: Int32,  # whether they are looked for, in the indices
        stream,
    ):
        chunk_layout = k_major_layout(self.dtype)
        tma_q, q_tma = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(),
            cute.make_tensor(q.iterator, cute.select(q.layout, mode=[1, 2, 0])),
            chunk_layout,
            (ROWS, CHUNK),
        )
        tma_out, out_tma = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileS2GOp(),
            cute.make_tensor(out.iterator, cute.select(out.layout, mode=[1, 2, 0])),
            k_major_layout(self.dtype, rows=WARP_ROWS),
            (WARP_ROWS, CHUNK),
        )

        @cute.struct
        class Shared:
            k_full: cute.struct.MemRange[Int64, 2 * len(self.groups)]
            k_empty: cute.struct.MemRange[Int64, 2 * len(self.groups) * self.steps]
            valid_full: cute.struct.MemRange[Int64, 2]
            q_full: cute.struct.MemRange[Int64, 1]
            q_empty: cute.struct.MemRange[Int64, 2]
            valid: cute.struct.MemRange[Int64, 2]  # a bit for each row of a buffer
            # Of each row, the left side's and the right side's.
            maxima: cute.struct.MemRange[Float32, 2 * ROWS]
            sums: cute.struct.MemRange[Float32, 2 * ROWS]
            tops: cute.struct.MemRange[Float32, 2 * ROWS]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, V_CHUNKS * CHUNK_ELEMENTS], 1024]
            p: cute.struct.Align[cute.struct.MemRange[self.dtype, 2 * CHUNK_ELEMENTS], 1024]
            k: cute.struct.Align[cute.struct.MemRange[self.dtype, 2 * self.chunks * CHUNK_ELEMENTS], 1024]
            out: cute.struct.Align[cute.struct.MemRange[self.dtype, 2 * self.overlaps * CHUNK_ELEMENTS], 1024]

        self.Shared = Shared
        s_q, units = q.shape[0], unit_slots.shape[0] - 1
        slots = units * splits
        partial_o = cute.make_tensor(workspace.iterator, cute.make_ordered_layout((slots, ROWS, D_V), order=(2, 1, 0)))
        row_layout = cute.make_ordered_layout((slots, ROWS), order=(1, 0))
        partial_lse = cute.make_tensor(workspace.iterator + Int64(slots) * ROWS * D_V, row_layout)
        partial_max = cute.make_tensor(workspace.iterator + Int64(slots) * ROWS * (D_V + 1), row_layout)
        behind = cute.recast_ptr(workspace.iterator + Int64(slots) * ROWS * (D_V + 2), dtype=Int32)
        listed, found = (cute.make_tensor(at, cute.make_layout((s_q,))) for at in (behind, behind + s_q))
        lengths = either(finds_lengths != 0, found, lengths)
        if length_bits > 0:
            TokenOrder()(
                indices, kv.shape[0], lengths, listed, length_bits, whole_tokens, round_tokens, finds_lengths, stream
            )
        tokens = TokenList(either(length_bits > 0, listed, lengths), length_bits)
        head_tiles = (q.shape[1] + ROWS - 1) // ROWS
        whole_pieces = whole_tokens * head_tiles
        divisors = [cute.FastDivmodDivisorV2(n) for n in (head_tiles, splits)]
        args = Arguments(
            q, kv, indices, tokens, sink, out, tma_out, out_tma, max_logits, lse, partial_o, partial_lse, partial_max,
            whole_pieces, whole_pieces + slots, *divisors, scale_log2,
        )  # fmt: skip
        self.kernel(args, tma_q, q_tma).launch(
            grid=(workers, 1, 1),
            block=(3 * WARPGROUP, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=cutlass.select_(length_bits > 0, Int32(1), Int32(0)),  # it waits for the list
        )
        if units > 0:
            self.combine(
                partial_o,
                partial_lse,
                partial_max,
                unit_slots,
                sink,
                out,
                max_logits,
                lse,
                tokens,
                whole_tokens,
                combine_warps,
                stream,
            )

    @cute.jit
    def combine(
        self,
        partial_o: cute.Tensor,
        partial_lse: cute.Tensor,
        partial_max: cute.Tensor,
        unit_slots: cute.Tensor,
        sink: cute.Tensor,
        out: cute.Tensor,
        max_logits: cute.Tensor,
        lse: cute.Tensor,
        tokens: TokenList,
        whole_tokens: Int32,
        combine_warps: Int32,
        stream,
    ):
        """Merge the pieces of split tokens; launched while the attention kernel still runs, starts when it is done."""
        s_q, h_q, _ = out.shape
        (out_s, out_h, _), (lse_s, lse_h), (max_s, max_h) = out.stride, lse.stride, max_logits.stride
        # A unit is (token, KV head, 64 of its heads); a row of it is (0, head).
        rows_out = cute.make_tensor(
            out.iterator, cute.make_layout((s_q, 1, 1, h_q, D_V), stride=(out_s, 0, 0, out_h, 1))
        )
        rows_lse = cute.make_tensor(lse.iterator, cute.make_layout((s_q, 1, 1, h_q), stride=(lse_s, 0, 0, lse_h)))
        rows_max = cute.make_tensor(
            max_logits.iterator, cute.make_layout((s_q, 1, 1, h_q), stride=(max_s, 0, 0, max_h))
        )
        sinks = cute.make_tensor(sink.iterator, cute.make_layout((1, h_q), stride=(0, sink.stride[0])))
        no_work = cute.make_tensor(unit_slots.iterator, cute.make_layout((1, 4)))  # every unit is looked at
        merge_pieces(
            self.dtype, partial_o, partial_lse, None, no_work, unit_slots, sinks, rows_out, rows_lse, Int32(1),
            combine_warps, stream, of_prefill=OfPrefill(partial_max, rows_max, tokens, whole_tokens),
        )  # fmt: skip

    @cute.kernel
    def kernel(self, args: Arguments, tma_q: cute.CopyAtom, q_tma: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        shared = utils.SmemAllocator().allocate(self.Shared)
        barriers = Barriers(
            shared.k_full.data_ptr(),
            shared.k_empty.data_ptr(),
            shared.valid_full.data_ptr(),
            shared.q_full.data_ptr(),
            shared.q_empty.data_ptr(),
        )
        self.init_barriers(barriers, warp)
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()  # for the list of tokens, if there is one

        if warp >= PRODUCER_WARP:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            self.produce(args, shared, barriers, tma_q, q_tma, warp - PRODUCER_WARP, thread % 32)
        else:
            cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            side = cute.arch.make_warp_uniform(warp // 4)
            self.consume(side, args, shared, barriers, thread - side * WARPGROUP)

    @cute.jit
    def init_barriers(self, barriers: Barriers, warp: Int32):
        if warp == 0:
            with cute.arch.elect_one():
                for i in range_constexpr(2 * len(self.groups)):
                    cute.arch.mbarrier_init(barriers.k_full + i, WARPGROUP)
                for i in range_constexpr(2 * len(self.groups) * self.steps):
                    cute.arch.mbarrier_init(barriers.k_empty + i, 4)
                for i in range_constexpr(2):
                    cute.arch.mbarrier_init(barriers.valid_full + i, 4)
                cute.arch.mbarrier_init(barriers.q_full, 1)
                for i in range_constexpr(2):
                    cute.arch.mbarrier_init(barriers.q_empty + i, 8)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

    # ---------------------------------------------------------------------------------------------- producer

    @cute.jit
    def produce(
        self,
        args,
        shared,
        barriers,
        tma_q: cute.CopyAtom,
        q_tma: cute.Tensor,
        warp: Int32,
        lane: Int32,
    ):
        """One warp of the producers: rows 16 warp ... + 15 of every block; the first brings Q as well."""
        if warp == 0:
            cpasync.prefetch_descriptor(tma_q)
        workers = cute.arch.grid_dim()[0]
        number = cute.arch.block_idx()[0]
        piece = args.piece(number, args.word(number))
        # What is loaded here is used a tile or a piece later, so that no latency of it delays the gathering of rows.
        word = args.word(number + workers)
        now = self.load_index(args, piece.token, piece.begin, piece.length, warp, lane)
        parity, q_parity = Int32(1), Int32(1)  # of pairs and pieces
        while number < args.pieces:
            number += workers
            following = args.piece(number, word)
            word = args.word(number + workers)
            tile = piece.begin
            while tile < piece.stop:
                ends = tile + 1 == piece.stop
                then = self.load_index(
                    args,
                    cutlass.select_(ends, following.token, piece.token),
                    cutlass.select_(ends, following.begin, tile + 1),
                    cutlass.select_(ends, following.length, piece.length),
                    warp,
                    lane,
                )
                if ends & (warp == 0):
                    self.prefetch_q(shared, tma_q, q_tma, following)
                row = cutlass.select_(now < args.kv.shape[0], now, Int32(-1))
                valid = cute.arch.vote_ballot_sync(row >= 0)
                rows = (self.locate(args, 0, row, lane), self.locate(args, 1, row, lane))
                brings_q = (tile == piece.begin) & (warp == 0)
                if const_expr(self.overlaps):
                    if brings_q:
                        self.load_q(shared, barriers, tma_q, q_tma, piece, q_parity)
                for buffer, group in self.load_order():
                    first = (buffer * len(self.groups) + group) * self.steps
                    empty = barriers.k_empty + (first + (warp if const_expr(self.steps > 1) else 0))
                    cute.arch.mbarrier_wait(empty, parity)
                    self.gather(shared, barriers, buffer, group, rows[buffer], warp, lane)
                    if const_expr(group == buffer):  # the group whose side scores this buffer
                        self.publish_valid(shared, barriers, buffer, valid, warp)
                    if const_expr(not self.overlaps and (buffer, group) == (0, LEFT)):
                        if brings_q:
                            self.load_q(shared, barriers, tma_q, q_tma, piece, q_parity)
                now = then
                parity ^= 1
                tile += 1  # what is derived from it takes no registers of its own
            q_parity ^= 1
            piece = following

    @cute.jit
    def load_index(self, args, token: Int32, tile: Int32, length: Int32, warp: Int32, lane: Int32):
        """This lane's index, -1 if it does not count: lanes 0 ... 15 hold block 0's, the others block 1's."""
        position = tile * TILE + lane // WARP_ROWS * BLOCK + warp * WARP_ROWS + lane % WARP_ROWS
        index = Int32(-1)
        if position < length:
            index = args.indices[token, position]
        return index

    @cute.jit
    def publish_valid(self, shared, barriers, buffer: cutlass.Constexpr, valid: Int32, warp: Int32):
        """Tell the consumer of a block which of this warp's rows count."""
        words = cute.make_tensor(
            cute.recast_ptr(shared.valid.data_ptr() + buffer, dtype=Uint16), cute.make_layout(BLOCK // WARP_ROWS)
        )
        with cute.arch.elect_one():
            words[warp] = Uint16((valid >> (WARP_ROWS * buffer)) & 0xFFFF)
            cute.arch.mbarrier_arrive(barriers.valid_full + buffer)

    def locate(self, args, buffer: int, index, lane) -> list:
        """(address, bytes) of what this lane copies of four of its warp's rows of a block: 16 or, to fill, 0."""
        rows = []
        for i in range(WARP_ROWS // 4):
            row = cute.arch.shuffle_sync(index, WARP_ROWS * buffer + 4 * i + lane // 8)
            exists = row >= 0
            start = args.kv[cutlass.select_(exists, row, Int32(0)), None].iterator.toint()
            rows.append((start + Int64(lane % 8 * 16), cutlass.select_(exists, Int32(16), Int32(0))))
        return rows

    def gather(self, shared, barriers, buffer: int, group: int, rows: list, warp, lane):
        """Start copying this warp's rows of a group of chunks; a row that does not count is filled with zeros."""
        base = Int32(shared.k.data_ptr().toint()) + (warp * WARP_ROWS + lane // 8) * (CHUNK * 2)
        # The swizzle permutes a row's units of 16 bytes by its number modulo 8.
        units = [(lane % 8 ^ (lane // 8 + 4 * odd)) * 16 for odd in range(2)]
        for chunk in self.groups[group]:
            number = buffer * self.chunks + chunk
            for i, (start, size) in enumerate(rows):
                to = base + units[i % 2] + (number * CHUNK_ELEMENTS + 4 * i * CHUNK) * 2
                copy_or_zeros(to, start + Int64(chunk * CHUNK * 2), size)
        # It arrives when the bytes lie in shared memory, so that, as in CUTLASS's main loop over cp.async and wgmma, no
        # proxy fence follows.
        cute.arch.cp_async_mbarrier_arrive_noinc(barriers.k_full + (buffer * len(self.groups) + group))

    def q_chunks(self, shared, tma_q, q_tma) -> tuple:
        """Q's 512 V columns in shared memory [., chunk] and in global memory [., 64 heads, chunk, token]."""
        smem_layout = cute.tile_to_shape(k_major_layout(self.dtype), (ROWS, CHUNK, V_CHUNKS), (0, 1, 2))
        smem = shared.q.get_tensor(smem_layout.outer, swizzle=smem_layout.inner)
        source = cute.local_tile(q_tma, (ROWS, CHUNK), (None, None, None))
        return cpasync.tma_partition(
            tma_q, 0, cute.make_layout(1), cute.group_modes(smem, 0, 2), cute.group_modes(source, 0, 2)
        )

    @cute.jit
    def load_q(self, shared, barriers, tma_q: cute.CopyAtom, q_tma: cute.Tensor, piece: Piece, parity: Int32):
        """Bring the 512 V columns of Q; heads that do not exist become zeros."""
        to, source = self.q_chunks(shared, tma_q, q_tma)
        # What is read or written once leaves the L2 to KV.
        policy = {"cache_policy": Int64(EVICT_FIRST)} if self.overlaps else {}
        for group in (RIGHT, LEFT):  # the order in which the right side, the last to read Q, is done with them
            cute.arch.mbarrier_wait(barriers.q_empty + group, parity)
            if const_expr(group == RIGHT):
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(barriers.q_full, V_CHUNKS * CHUNK_ELEMENTS * 2)
            for chunk in self.groups[group]:
                of_q = source[None, piece.head_tile, chunk, piece.token]
                cute.copy(tma_q, of_q, to[None, chunk], tma_bar_ptr=barriers.q_full, **policy)

    @cute.jit
    def prefetch_q(self, shared, tma_q: cute.CopyAtom, q_tma: cute.Tensor, piece: Piece):
        """Bring what `load_q` will load to L2."""
        _, source = self.q_chunks(shared, tma_q, q_tma)
        for chunk in range_constexpr(V_CHUNKS):
            cute.prefetch(tma_q, source[None, piece.head_tile, chunk, piece.token])

    # ---------------------------------------------------------------------------------------------- consumers

    @cute.jit
    def consume(self, side: Int32, args, shared, barriers, thread: Int32):
        """One consumer warpgroup: scores of block `side` of each pair, half `side` of the output columns.

        The sides have code of their own for pairs in a loop alone, and not in short calls.
        """
        c = Consumer(
            side, shared, barriers, Registers.allocate(self.dtype), Running.allocate(), args.scale_log2, thread
        )
        parity, q_parity = Int32(0), Int32(0)  # of pairs and pieces
        workers = cute.arch.grid_dim()[0]
        number = cute.arch.block_idx()[0]
        piece = args.piece(number, args.word(number))
        self.load_q_rope(args, c, piece)
        following = cute.make_rmem_tensor(2, Int32)
        following[0] = args.word(number + workers)  # the next piece's, early
        if const_expr(self.overlaps):
            self.wait_q(c, q_parity)
            self.issue_scores(c, self.qk_order, parity)
            warpgroup.wait_group(0)
        while number < args.pieces:
            c.running.reset()
            if const_expr(not self.overlaps):
                following[0] = args.word(number + workers)  # RoPE leaves no register for what was loaded ahead
                self.wait_q(c, q_parity)
                self.issue_scores(c, self.qk_order, parity)
                warpgroup.wait_group(0)
            work = (args, number + workers, following)
            if const_expr(self.short):
                parity = self.pairs(c, parity, piece, work)
            elif side == LEFT:
                parity = self.pairs(replace(c, side=LEFT), parity, piece, work)
            else:
                parity = self.pairs(replace(c, side=RIGHT), parity, piece, work)
            if const_expr(self.peels):
                self.pair(c, parity, Position(piece.begin + 1 == piece.stop, False, True), work)
                parity ^= 1
            q_parity ^= 1
            # Without a next piece, this one's K and Q, which are there, stand for it.
            step = cutlass.select_(number + workers < args.pieces, Int32(0), Int32(1))
            # While the output is written, the next piece's Q and K arrive.
            self.write(args, c, piece, args.slot(number), (q_parity ^ step, parity ^ step))
            number += workers
            piece = args.piece(number, following[0])
            if const_expr(self.overlaps):
                following[0] = following[1]
        if const_expr(self.overlaps):
            self.free_staging(0)

    @cute.jit
    def pairs(self, c, parity: Int32, piece: Piece, work) -> Int32:
        """All pairs of a piece, but the last one if that is peeled; returns the parity behind them."""
        tile = piece.begin
        while tile < piece.stop - self.peels:
            closes = False if self.peels else tile + 1 == piece.stop
            self.pair(c, parity, Position(tile == piece.begin, tile + 2 == piece.stop, closes), work)
            parity ^= 1
            tile += 1
        return parity

    def wait_q(self, c: Consumer, parity: Int32):
        """Wait for the Q of a piece before its first scores, given whether the number of those before it is odd."""
        cute.arch.mbarrier_wait(c.barriers.q_full, parity)
        warpgroup.fence()

    def free_p(self, c: Consumer):
        if self.overlaps:
            self.free_staging(0)

    def load_q_rope(self, args, c: Consumer, piece: Piece):
        """Start to load what a piece needs besides what the producers bring: Q's RoPE chunk."""
        if self.has_rope:
            # The last head there is stands for those that are not.
            heads = [cutlass.min(args.head(piece, c.row + 8 * r), args.q.shape[1] - 1) for r in range(2)]
            rows = [args.q[piece.token, head, None].iterator for head in heads]
            for r in range(2):
                c.f.load_q_rope(r, rows[r], c.thread % 32)

    def load_ahead(self, c: Consumer, work: tuple):
        """Load the next piece's RoPE chunk of Q, and the word of the one behind it."""
        args, number, following = work
        number, c = anew(number), replace(c, thread=anew(c.thread))
        self.load_q_rope(args, c, args.piece(number, following[0]))
        if self.overlaps:
            following[1] = args.word(number + cute.arch.grid_dim()[0])

    def softmax(self, c: Consumer, n, sums, parity, begins):
        cute.arch.mbarrier_wait(c.barriers.valid_full + c.side, parity)
        words = cute.make_tensor(
            cute.recast_ptr(c.shared.valid.data_ptr() + c.side, dtype=Int32), cute.make_layout(BLOCK // 32)
        )
        self.masked_softmax(c, n, sums, words[0], words[1], begins)

    @cute.jit
    def masked_softmax(
        self, c, reference: cute.Tensor, sums: cute.Tensor, valid0: Int32, valid1: Int32, begins: Boolean
    ):
        """Exponentials as if all rows counted and the reference need not move; a rare branch redoes them.

        A piece's first reference does move, so its first exponentials are not taken twice.
        """
        scores, p, top, scale = c.f.s, c.f.p_scores, c.running.top, c.scale
        top0, top1 = -Float32.inf, -Float32.inf
        moves = Boolean(True)
        if not begins:
            top0, top1 = row_max(scores, 0), row_max(scores, 1)
            exponentials(scores, p, sums, reference, scale)
            exceeds = cute.arch.fmax(top0 - reference[0], top1 - reference[1]) * scale > THRESHOLD
            moves = cute.arch.vote_any_sync(exceeds | ((valid0 & valid1) != -1))
        if moves:
            mask_by_bits(scores, [valid0, valid1], anew(c.thread) % 32)
            top0, top1 = quad_max(row_max(scores, 0)), quad_max(row_max(scores, 1))
            reference[0] = cutlass.select_((top0 - reference[0]) * scale > THRESHOLD, top0, reference[0])
            reference[1] = cutlass.select_((top1 - reference[1]) * scale > THRESHOLD, top1, reference[1])
            exponentials(scores, p, sums, reference, scale)
        top[0] = cute.arch.fmax(top[0], top0)
        top[1] = cute.arch.fmax(top[1], top1)

    @cute.jit
    def write(self, args, c, piece: Piece, slot: Int32, following: tuple[Int32, Int32]):
        """Normalise and write a whole piece to the outputs, a part of a token to its slot of the workspace.

        slot: < 0 if the piece is whole.
        following: parities of pieces and pairs before the next one; if pieces overlap, the scores of its first pair are
        complete on exit.
        """
        # What is computed from these is not to take registers while pairs run.
        c = replace(c, thread=anew(c.thread), side=uniform(anew(c.side)))
        is_whole = slot < 0
        sinks = self.sinks(args, c, piece)
        first, *rest = self.qk_order
        if const_expr(self.overlaps):
            self.wait_q(c, following[0])
            self.issue_scores(c, (first,), following[1])
        inv = self.normalisation(c, sinks)
        if const_expr(self.overlaps):
            if is_whole:
                self.write_chunks_by_tma(args, c, piece, inv, range(WRITTEN_AMID))
            self.issue_scores(c, tuple(rest), following[1])
        if is_whole:
            if const_expr(self.overlaps):
                self.write_chunks_by_tma(args, c, piece, inv, range(WRITTEN_AMID, V_CHUNKS // 2))
            else:
                self.write_rows(args, c, piece, inv)
            # Both sides have them; the left one's scores are wanted first.
            if c.side == RIGHT:
                self.write_statistics(args, c, piece)
        else:
            self.write_part(args, c, piece, slot)
        if const_expr(self.overlaps):
            warpgroup.wait_group(0)

    def sinks(self, args, c: Consumer, piece: Piece) -> list:
        """Of this thread's two rows, in base 2."""
        # The last head there is stands for those that are not.
        last = args.q.shape[1] - 1
        return [args.sink[cutlass.min(args.head(piece, c.row + 8 * r), last)] * LOG2_E for r in range(2)]

    def normalisation(self, c: Consumer, sinks: list) -> cute.Tensor:
        """What this thread's two rows of the output are multiplied by."""
        running, inv = c.running, cute.make_rmem_tensor(2, Float32)
        for r in range(2):
            total = running.row_sum[r]
            # The sink takes part in the normalisation as one more token without a value would.
            with_sink = total + cute.math.exp2(sinks[r] - running.reference[r] * c.scale, fastmath=True)
            inv[r] = cutlass.select_(total > 0.0, cute.arch.rcp_approx(with_sink), Float32(0.0))
        return inv

    @cute.jit
    def write_statistics(self, args, c, piece: Piece):
        """lse and max_logits of this thread's rows."""
        running = c.running
        for r in range_constexpr(2):
            row = c.row + 8 * r
            if row < args.rows(piece) and c.thread % 4 == 0:
                head, total = args.head(piece, row), running.row_sum[r]
                row_lse = (cute.math.log2(total) + running.reference[r] * c.scale) * LN2
                args.lse[piece.token, head] = cutlass.select_(total > 0.0, row_lse, Float32.inf)
                args.max_logits[piece.token, head] = running.top[r] * (c.scale * LN2)

    @cute.jit
    def write_chunks_by_tma(self, args, c, piece: Piece, inv: cute.Tensor, chunks: cutlass.Constexpr):
        """A range of chunks of this side's columns, each warp's rows for itself.

        TMA leaves out the rows that do not exist.
        """
        warp = uniform(c.thread // 32)
        rows_of_warp = piece.head_tile * (ROWS // WARP_ROWS) + warp
        layout = k_major_layout(self.dtype, rows=WARP_ROWS)
        out = cute.group_modes(cute.local_tile(args.out_tma, (WARP_ROWS, CHUNK), (None, None, None)), 0, 2)
        stages = [staging.data_ptr() + c.side * CHUNK_ELEMENTS for staging in (c.shared.p, c.shared.out)]
        for chunk in range_constexpr(chunks.start, chunks.stop):
            staging = stages[chunk % STAGES]
            self.free_staging(STAGES - 1)
            chunk_of(c.f.o, chunk, inv, c.f.p_scores)
            self.stage(c, staging)
            cute.arch.fence_proxy("async.shared", space="cta")
            cute.arch.sync_warp()
            rows = cute.make_tensor(cute.recast_ptr(staging + warp * (WARP_ROWS * CHUNK), layout.inner), layout.outer)
            source, to = cpasync.tma_partition(args.tma_out, 0, cute.make_layout(1), cute.group_modes(rows, 0, 2), out)
            to = to[None, rows_of_warp, c.side * (V_CHUNKS // 2) + chunk, piece.token]
            cute.copy(args.tma_out, source, to, cache_policy=Int64(EVICT_FIRST))
            cute.arch.cp_async_bulk_commit_group()

    def free_staging(self, latest: int):
        """Wait until TMA has read what this warp staged, but for the `latest` chunks."""
        cute.arch.cp_async_bulk_wait_group(latest, read=True)
        cute.arch.sync_warp()

    @cute.jit
    def write_rows(self, args, c, piece: Piece, inv: cute.Tensor):
        """This side's columns, by way of P's shared memory; each warp's rows for itself."""
        lane, first_row, rows = c.thread % 32, c.thread // 32 * WARP_ROWS, args.rows(piece)
        destinations = []
        for i in range_constexpr(4):
            row = first_row + lane // 8 + 4 * i
            head = args.head(piece, cutlass.min(row, rows - 1))
            destinations.append((row < rows, args.out[piece.token, head, None].iterator + c.side * (D_V // 2)))
        staging = c.shared.p.data_ptr() + c.side * CHUNK_ELEMENTS
        for chunk in range_constexpr(D_V // 2 // CHUNK):
            chunk_of(c.f.o, chunk, inv, c.f.p_scores)
            self.stage(c, staging)
            cute.arch.sync_warp()
            copy_rows_of_warp(staging, first_row, [(exists, to + chunk * CHUNK) for exists, to in destinations], lane)
            cute.arch.sync_warp()

    @cute.jit
    def write_part(self, args, c, piece: Piece, slot: Int32):
        lane, running = c.thread % 32, c.running
        for r in range_constexpr(2):
            row = c.row + 8 * r
            exists = row < args.rows(piece)
            total = running.row_sum[r]
            if c.side == LEFT:
                if exists and lane % 4 == 0:
                    # In base 2; -inf for a row that sees nothing.
                    args.partial_lse[slot, row] = cute.math.log2(total) + running.reference[r] * c.scale
                    args.partial_max[slot, row] = running.top[r] * (c.scale * LN2)
            inv = cutlass.select_(total > 0.0, cute.arch.rcp_approx(total), Float32(0.0))
            to = args.partial_o[slot, row, None].iterator + c.side * (D_V // 2)
            write_fp32_row(c.f.o, r, inv, to, exists, lane)


def either(condition, first: cute.Tensor, second: cute.Tensor) -> cute.Tensor:
    """One of two vectors."""
    address = cutlass.select_(condition, first.iterator.toint(), second.iterator.toint())
    stride = cutlass.select_(condition, *(Int64(x.stride[0]) for x in (first, second)))
    start = pointer_at(first.element_type, address, 0, align=4)
    return cute.make_tensor(start, cute.make_layout((first.shape[0],), stride=(stride,)))


def compile_variant(dtype: str, d: int, *, short: bool = False) -> aot.Compiled:
    """Compile for tensors of any extents whose rows of q, kv and out are 16-byte aligned."""
    element = getattr(cutlass, dtype)
    s_q, h_q = cute.sym_int(), cute.sym_int()
    q = aot.strided(element, (s_q, h_q, d), dense_last=True, align=16)
    kv = aot.strided(element, (cute.sym_int(), d), dense_last=True, align=16)
    indices = aot.strided(Int32, (s_q, cute.sym_int()), dense_last=True)
    lengths = aot.strided(Int32, (s_q,))
    sink = aot.strided(Float32, (h_q,))
    out = aot.strided(element, (s_q, h_q, D_V), dense_last=True, align=16)
    max_logits = aot.strided(Float32, (s_q, h_q))
    lse = aot.strided(Float32, (s_q, h_q))
    workspace = aot.compact(Float32, (cute.sym_int(),), align=16)
    unit_slots = aot.compact(Int32, (cute.sym_int(),))
    return aot.compile_kernel(
        SparsePrefill(element, d, short), q, kv, indices, lengths, sink, out, max_logits, lse, workspace, unit_slots,
        Float32(1.0), *[Int32(0)] * 7,
    )  # fmt: skip
