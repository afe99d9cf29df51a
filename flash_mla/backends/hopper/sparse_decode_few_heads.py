"""Token-sparse MLA decode for up to 32 query heads: the operands are swapped, so that no row of a product is padding.

S^T[64 tokens, heads] = K Q^T and O^T[512 columns, heads] = V^T P^T: a warpgroup multiplies 64 rows at once, and these
are tokens or columns here, while the heads are the 8, 16 or 32 columns of the product. What is left is the memory's
time.

K and V^T are A operands in registers, converted from the cache's raw bytes on their way out of shared memory: nothing
is written there but what arrives, and no warp waits for another to convert. Two consumer warpgroups take turns with
64-token blocks, each with an output accumulator and a softmax of its own; they meet at the end of a piece. The producer
warpgroup does no more than to gather rows.

Codes become fp16 without the factors that a token's row has (few_heads_rows). These go into its scores, in fp32, one
accumulator for all that share a factor, and into its probabilities: P has a version for each factor. P is fp16, too; so
the softmax reference bounds not a token's probability but its product with the token's largest factor.
"""

from dataclasses import dataclass, replace

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
from cutlass import BFloat16, Float16, Float32, Int32, Int64, Uint8, Uint32, const_expr, range_constexpr
from cutlass.cute.nvgpu import warpgroup
from cutlass.cute.nvgpu.warpgroup import OperandMajorMode, OperandSource

from flash_mla.backends.hopper import aot, dequant, few_heads_rows
from flash_mla.backends.hopper.combine import partial_results
from flash_mla.backends.hopper.copies import EVICT_FIRST, copy_async, wait_copies
from flash_mla.backends.hopper.dequant import load_words
from flash_mla.backends.hopper.divisor import Divisor
from flash_mla.backends.hopper.few_heads_rows import (
    GROUP,
    UNIT,
    UNIT_COLUMNS,
    WARP_TOKENS,
    biased_exponent,
    pack,
    power_of_two,
)
from flash_mla.backends.hopper.schedule import (
    anew,
    end_of_work,
    first_piece,
    next_piece,
    piece_stop,
    remains,
    uniform,
)
from flash_mla.backends.hopper.softmax import LN2, LOG2_E, NO_SCORE, largest
from flash_mla.backends.hopper.sparse_decode import (
    BLOCK,
    D_V,
    LEFT,
    PRODUCER_WARP,
    WARPGROUP,
    compile_for,
    merge_queries,
)
from flash_mla.backends.hopper.sparse_decode_walk import Arguments, Source, TokenWalk, tiles_of
from flash_mla.backends.hopper.wgmma import CHUNK, ROWS

GROUPS = D_V // GROUP
CHUNKS = D_V // CHUNK  # of V
UNIT_ROWS = 8  # of a swizzle atom
ROW_BYTES = CHUNK * 2  # of a chunk of Q or P
SHARED_BYTES = 227 * 1024
SMALL_BYTES = 6 * 1024  # of it, for barriers and what there is of each head, and lost to alignment
WARPGROUPS = 2  # of consumers
HALVES = 2  # of a block's tokens: two warps gather each

# In log2: a reference is set this far below the largest score, and moves if a score exceeds it by more than LIMIT.
# P is at most 2^LIMIT, in fp16's range, and full of precision down to 2^-(14 + MARGIN) of the largest.
MARGIN, LIMIT = 6.0, 14.0
LEAST_FACTOR = 2.0**-60  # stands for smaller ones of a token, whose logarithm is taken
Q_EXPONENT = 14  # of the largest value of a query head, which is scaled by a power of two to fit fp16

# Named barriers: of each consumer warpgroup, and of both.
ONE, BOTH = 1, 3


@dataclass(frozen=True)
class Barriers:
    """Shared-memory barriers.

    A block may arrive before the one ahead of it, which is the other side's. Hence each side has barriers of its own: a
    stage is used by both if stages are an odd number, and the parity that one side would wait for there is also what
    the barrier shows until the other side's block before has arrived.
    """

    full: cute.Pointer  # [side][turn]: a side's blocks take turns with as many as there are stages
    empty: cute.Pointer  # [stage][half of its tokens]


@dataclass(frozen=True)
class Lane:
    """What a producer thread looks up."""

    token: Int32  # of a tile
    index: Int32  # address of that token's index


@dataclass(frozen=True)
class Consumer:
    """What a consumer thread works on; of shared memory, addresses."""

    side: Int32  # LEFT or RIGHT
    warp: Int32  # of its warpgroup
    lane: Int32
    p_out: Int32  # where stmatrix writes its row of P's first version
    p_trade: Int32  # where it trades a quarter of the output with the other side
    q: list  # descriptors of Q's chunks
    p: list  # descriptors of P's versions
    s: list  # accumulators of scores, which take turns
    o: list  # accumulators of V's chunks

    @property
    def place(self) -> tuple[Int32, Int32, Int32]:
        """(warp, lane / 4, lane % 4): which elements of an operand or accumulator the thread has."""
        return self.warp, self.lane // 4, self.lane % 4


@dataclass(frozen=True)
class Block:
    """A block of tokens that has arrived: addresses in shared memory."""

    raw: Int32
    attended: Int32  # a bit a token
    table: Int32  # what `few_heads_rows` notes of its scales
    empty: cute.Pointer  # barriers of the stage


class SparseDecodeFewHeads(TokenWalk):
    def __init__(self, dtype: type[cutlass.Numeric], kv_format: str, heads: int):
        self.dtype = dtype
        self.loader = getattr(dequant, kv_format)(self.dtype)  # which tells where tokens lie in a cache
        self.scales_apart = self.loader.scales_apart
        self.rows = getattr(few_heads_rows, kv_format + "Rows")()
        self.heads = heads
        self.stage_bytes = BLOCK * self.rows.pitch
        self.q_bytes = heads * ROW_BYTES  # of a chunk
        self.q_chunks = self.rows.d // CHUNK
        self.p_bytes = GROUPS * self.q_bytes  # of a side: as many versions, or a group of the output in fp32
        self.table_bytes = 2 * WARPGROUPS * self.rows.table_bytes  # two turns of each side
        self.registers = (216, 72) if heads < 32 else (232, 40)  # of a consumer and of a producer thread
        taken = self.q_chunks * self.q_bytes + WARPGROUPS * self.p_bytes + self.table_bytes
        self.stages = (SHARED_BYTES - SMALL_BYTES - taken) // self.stage_bytes

    @cute.jit
    def __call__(
        self,
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
        workspace: cute.Tensor,  # [slots, heads, d_v + 1] fp32 in all: partial outputs, then their lse
        out: cute.Tensor,
        lse: cute.Tensor,
        scale_log2: Float32,
        page_size: Int32,
        extra_page_size: Int32,
        run: Int32,
        causal: Int32,
        row_tiles: Int32,
        slots: Int32,
        batch_invariant: Int32,
        combine_by_unit: Int32,
        combine_warps: Int32,
        stream,
    ):
        """Arguments that are not described are those of `SparseDecode.__call__`."""
        heads = self.heads

        @cute.struct
        class Storage:
            full: cute.struct.MemRange[Int64, WARPGROUPS * self.stages]
            empty: cute.struct.MemRange[Int64, HALVES * self.stages]
            attended: cute.struct.MemRange[Int64, self.stages]  # of a block, a bit a token
            indices: cute.struct.MemRange[Int32, WARPGROUP]  # of the next tile
            q_scale: cute.struct.MemRange[Float32, heads]  # what turns scores to base 2
            tops: cute.struct.MemRange[Float32, 8 * heads]  # of each consumer warp
            sums: cute.struct.MemRange[Float32, 8 * heads]
            references: cute.struct.MemRange[Float32, 2 * heads]  # of each side
            factors: cute.struct.MemRange[Float32, 2 * heads]  # of each side's output
            sinks: cute.struct.MemRange[Float32, heads]
            q: cute.struct.Align[cute.struct.MemRange[Uint8, self.q_chunks * self.q_bytes], 1024]
            p: cute.struct.Align[cute.struct.MemRange[Uint8, WARPGROUPS * self.p_bytes], 1024]
            table: cute.struct.Align[cute.struct.MemRange[Uint8, self.table_bytes + UNIT], UNIT]
            raw: cute.struct.Align[cute.struct.MemRange[Uint8, self.stages * self.stage_bytes], 128]

        self.Storage = Storage
        partial_o, partial_lse = partial_results(workspace, slots, heads, D_V)
        token_bytes = self.loader.token_bytes
        args = Arguments(
            q, Source(k_cache, Divisor.of(page_size), token_bytes, indices, lengths),
            Source(extra_cache, Divisor.of(extra_page_size), token_bytes, extra_indices, extra_lengths), sink, work,
            splits, partial_o, partial_lse, None, out, lse, scale_log2, *map(Divisor.of, (run, q.shape[1], 1)), causal,
            batch_invariant,
        )  # fmt: skip
        self.kernel(args).launch(
            grid=(1, work.shape[0] - 1, 1),
            block=(3 * WARPGROUP, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
        )
        if slots != 0:
            merge_queries(
                self.dtype, partial_o, partial_lse, None, work, splits, sink, out, lse, combine_by_unit, combine_warps,
                stream,
            )  # fmt: skip

    @cute.kernel
    def kernel(self, args: Arguments):
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        shared = utils.SmemAllocator().allocate(self.Storage)
        barriers = Barriers(shared.full.data_ptr(), shared.empty.data_ptr())
        if warp == PRODUCER_WARP:
            args.prefetch()
        if warp == 0:
            with cute.arch.elect_one():
                for i in range_constexpr(WARPGROUPS * self.stages):
                    # A warp arrives when it has noted who is attended to, a thread when it has copied scales.
                    cute.arch.mbarrier_init(barriers.full + i, 4 + (WARPGROUP if self.rows.scales_apart else 0))
                for i in range_constexpr(HALVES * self.stages):
                    cute.arch.mbarrier_init(barriers.empty + i, 4)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if warp == 0:
            args.prefetch_indices()
        cute.arch.griddepcontrol_wait()  # for the kernel before, under whose end all this has run
        cute.arch.griddepcontrol_launch_dependents()  # not earlier: combine reads the plan without waiting for it

        if warp >= PRODUCER_WARP:
            cute.arch.setmaxregister_decrease(self.registers[1])
            self.produce(args, shared, barriers, thread - PRODUCER_WARP * 32)
        else:
            cute.arch.setmaxregister_increase(self.registers[0])
            side = cute.arch.make_warp_uniform(warp // 4)
            self.consume(side, args, shared, barriers, thread - side * WARPGROUP)

    # ---------------------------------------------------------------------------------------------- producers

    @cute.jit
    def produce(self, args, shared, barriers, thread: Int32):
        """Gather the rows of a block into a stage, as they are; of tokens that are not attended to, zeros."""
        number, warp = thread % 32, cute.arch.make_warp_uniform(thread // 32)
        lane = Lane(
            # Half of the lanes look up tokens of block 0, half of block 1.
            token=number // WARP_TOKENS * BLOCK + warp * WARP_TOKENS + number % WARP_TOKENS,
            index=Int32(shared.indices.data_ptr().toint()) + thread * 4,
        )
        end = end_of_work(args.work)
        bits = Int32(shared.attended.data_ptr().toint()) + warp * 2
        raw = Int32(shared.raw.data_ptr().toint()) + warp * (WARP_TOKENS * self.rows.pitch)

        cursor = self.settle(args, first_piece(args.work), end)
        self.fetch_index(args, cursor, lane)
        cute.arch.cp_async_commit_group()
        cute.arch.cp_async_commit_group()  # as if of the scales of a tile before the first
        stage, parity = Int32(0), Int32(1)
        turn, turn_parity, last_turn, last_parity = Int32(0), Int32(0), Int32(0), Int32(1)
        while cursor.exists:
            wait_copies(1)  # for this tile's index, not for the last one's scales
            tokens = self.locate(args, cursor, lane)
            cursor = self.next_cursor(args, cursor, end)
            self.fetch_index(args, cursor, lane)
            cute.arch.cp_async_commit_group()
            attended = cute.arch.vote_ballot_sync(tokens.row != 0)
            for block in range_constexpr(2):
                full, last = (barriers.full + (block * self.stages + one) for one in (turn, last_turn))
                cute.arch.mbarrier_wait(barriers.empty + (HALVES * stage + warp // 2), parity)
                # Two blocks on their way suffice. With more, SMs that the memory favours would get farther ahead.
                cute.arch.mbarrier_wait(last, last_parity)
                present = (attended >> (block * WARP_TOKENS)) & ((1 << WARP_TOKENS) - 1)
                with cute.arch.elect_one():
                    cute.arch.inline_ptx(
                        "st.shared.u16 [{$r0}], {$r1};", read_only_args=[bits + stage * 8, cutlass.Uint16(present)]
                    )
                self.gather(tokens, present, block, raw + stage * self.stage_bytes, full, number)
                stage, parity = self.advance(stage, parity, 1)
            last_turn, last_parity = turn, turn_parity
            turn, turn_parity = self.advance(turn, turn_parity, 1)
            cute.arch.cp_async_commit_group()

    def advance(self, position: Int32, parity: Int32, by: int) -> tuple[Int32, Int32]:
        """(position, parity of its barrier) that comes `by` later, of as many positions as there are stages."""
        wraps = position >= self.stages - by
        position = cutlass.select_(wraps, position + (by - self.stages), position + by)
        return position, cutlass.select_(wraps, parity ^ 1, parity)

    @cute.jit
    def gather(self, tokens, present: Int32, block: cutlass.Constexpr, to: Int32, full: cute.Pointer, lane: Int32):
        """Copy the rows of a block that this warp has looked up, a lane each; `present`: a bit a row."""
        mine, row = lane // WARP_TOKENS == block, lane % WARP_TOKENS
        at = to + row * self.rows.pitch
        if mine & (tokens.row == 0):
            for unit in cutlass.range(self.rows.token_bytes // UNIT, unroll=1):
                store_zeros(at + unit * UNIT)
            cute.arch.fence_proxy("async.shared", space="cta")  # before a later copy overwrites them
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(full, cute.arch.popc(present) * self.rows.token_bytes)
        if mine & (tokens.row != 0):
            copy_row(at, tokens.row, self.rows.token_bytes, Int32(full.toint()))
        if const_expr(self.rows.scales_apart):
            if mine:
                copy_async((at, self.rows.token_bytes), tokens.row, (tokens.row + Int64(tokens.scales), 0), 8)
            cute.arch.cp_async_mbarrier_arrive_noinc(full)

    # ---------------------------------------------------------------------------------------------- consumers

    def consumer(self, side: Int32, shared, thread: Int32) -> Consumer:
        warp, lane = cute.arch.make_warp_uniform(thread // 32), thread % 32
        p = Int32(shared.p.data_ptr().toint()) + side * self.p_bytes
        # A lane gives stmatrix the address of a row: of a head, eight tokens.
        half, head = lane // 8 % 2, lane % 8 + (lane // 16 * 8 if self.heads > 8 else 0)
        slices = {dtype: cute.make_tiled_mma(self.op(dtype)).get_slice(thread) for dtype in (Float16, BFloat16)}

        def operand(base, chunk, dtype):
            pointer = cute.recast_ptr(base.data_ptr(), dtype=dtype) + chunk * (self.heads * CHUNK)
            atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, dtype)
            layout = cute.tile_to_shape(atom, (self.heads, CHUNK), (0, 1))
            tile = cute.make_tensor(cute.recast_ptr(pointer, layout.inner), layout.outer)
            return slices[dtype].make_fragment_B(slices[dtype].partition_B(tile))

        def accumulator():
            return slices[Float16].make_fragment_C(slices[Float16].partition_shape_C((ROWS, self.heads)))

        return Consumer(
            side=side,
            warp=warp,
            lane=lane,
            p_out=p + head * ROW_BYTES + ((2 * warp + half) ^ (head % UNIT_ROWS)) * UNIT,
            p_trade=p + thread * UNIT,
            q=[operand(shared.q, chunk, self.q_dtype(chunk)) for chunk in range(self.q_chunks)],
            p=[operand(shared.p, side * GROUPS + i, dtype) for i, (dtype, _) in enumerate(self.rows.versions)],
            s=[accumulator() for _ in range(2 if self.heads < 32 and len(self.rows.parts) > 1 else 1)],
            o=[accumulator() for _ in range(CHUNKS)],
        )

    def op(self, dtype: type[cutlass.Numeric]) -> warpgroup.MmaF16BF16Op:
        """S^T[64, heads] += K[64, 16] Q[heads, 16]^T, or O^T += V^T P."""
        shape = (ROWS, self.heads, 16)
        return warpgroup.MmaF16BF16Op(dtype, Float32, shape, OperandSource.RMEM, OperandMajorMode.K, OperandMajorMode.K)

    @cute.jit
    def consume(self, side: Int32, args, shared, barriers, thread: Int32):
        """One consumer warpgroup: every second block of a piece, all columns of the output."""
        c = self.consumer(side, shared, thread)
        sums = cute.make_rmem_tensor(self.heads // 4, Float32)  # of heads 8 j + 2 (lane % 4) + {0, 1}
        references = shared.references.get_tensor(cute.make_layout((self.heads, 2)))
        raw, attended, table = (Int32(room.data_ptr().toint()) for room in (shared.raw, shared.attended, shared.table))
        table += side * 2 * self.rows.table_bytes
        stage, turn, parity, table_half = Int32(side), Int32(0), Int32(0), Int32(0)
        piece, end = first_piece(args.work), end_of_work(args.work)
        if (side == LEFT) & (thread < self.heads):  # who will merge the sums of a head
            head = cutlass.min(thread, args.q.shape[2] - 1)
            sink = (args.sink.iterator + head * args.sink.stride[0]).toint()
            copy_async((Int32(shared.sinks.data_ptr().toint()) + thread * 4, 0), sink, (sink, 0), 4)
        cute.arch.cp_async_commit_group()
        while remains(piece, end):
            rows = args.rows(piece)
            queries = self.load_queries(args, rows, 4 * side + c.warp, anew(c.lane))
            slot = args.slot(piece)
            length, extra_length = args.lengths(piece)
            tiles = tiles_of(length) + tiles_of(extra_length)
            stop = piece_stop(piece, end, tiles, args.batch_invariant)
            if thread < self.heads:
                references[thread, side] = Float32(NO_SCORE)
            self.prepare_queries(args, shared, queries, rows.count, 4 * side + c.warp, anew(c.lane))
            for o in c.o:
                o.fill(0.0)
            sums.fill(0.0)
            for _ in cutlass.range(piece.tile, stop, unroll=1):
                cute.arch.mbarrier_wait(barriers.full + (side * self.stages + turn), parity)
                block = Block(
                    raw + stage * self.stage_bytes,
                    attended + stage * 8 + c.warp * 2,
                    table + table_half * self.rows.table_bytes,
                    barriers.empty + HALVES * stage,
                )
                self.attend(replace(c, lane=anew(c.lane)), shared, block, sums)
                table_half ^= 1
                stage, _ = self.advance(stage, parity, 2)
                turn, parity = self.advance(turn, parity, 1)
            self.write(replace(c, lane=anew(c.lane)), args, shared, sums, slot, rows)
            piece = next_piece(piece, stop, tiles)

    def load_queries(self, args, rows, warp: Int32, lane: Int32) -> cute.Tensor:
        """Start to load heads warp, warp + 8, ... of Q, a pair of columns of each chunk to a lane.

        The last head stands for those that do not exist.
        """
        queries = cute.make_rmem_tensor((self.q_chunks, self.heads // 8), Uint32)
        size = self.dtype.width // 8
        for i in range(self.heads // 8):
            head = cutlass.min(warp + 8 * i, rows.count - 1)
            first = args.q[rows.request, rows.token, head, None].iterator.toint() + Int64(lane // 4 * 4)
            starts = {step: first + Int64(lane % 4 * (step * UNIT_COLUMNS * size)) for step in (1, 2)}
            for chunk in range(self.q_chunks):
                unit, step = self.rows.units(chunk)
                queries[chunk, i] = load_global(starts[step], unit * UNIT_COLUMNS * size)
        return queries

    @cute.jit
    def prepare_queries(self, args, shared, queries: cute.Tensor, count: Int32, warp: Int32, lane: Int32):
        """Bring Q in the order in which threads take the columns of K, each head times a power of two to fit fp16."""
        q_scale = shared.q_scale.get_tensor(cute.make_layout(self.heads))
        # Lanes of a store have different banks.
        to = Int32(shared.q.data_ptr().toint()) + warp * ROW_BYTES + (lane // 4 ^ warp) * UNIT + lane % 4 * 4
        pairs = cute.recast_tensor(queries, self.dtype)
        # Code that is there once for all heads is sooner in the caches.
        for first in cutlass.range(0, self.heads, 8, unroll=1):
            head = first + warp
            values, tops = [], []
            for chunk in range_constexpr(self.q_chunks):
                pair = [pairs[2 * chunk + j, 0].to(Float32) for j in range(2)]
                pair = [cutlass.select_(head < count, value, Float32(0.0)) for value in pair]
                values.append(pair)
                tops.append(cute.arch.fmax(*(cute.arch.fmax(value, -value) for value in pair)))
            top = largest(tops)
            exponent = cute.arch.warp_redux_sync(biased_exponent(top), "max") - Q_EXPONENT
            exponent = cutlass.max(20, cutlass.min(exponent, 230))
            if lane == 0:
                q_scale[head] = power_of_two(exponent) * args.scale_log2
            factor = power_of_two(254 - exponent)
            for chunk in range_constexpr(self.q_chunks):
                pair = pack(self.q_dtype(chunk), values[chunk][0] * factor, values[chunk][1] * factor)
                store_word(to + first * ROW_BYTES, chunk * self.q_bytes, pair)
            # The next head moves up.
            for i in range_constexpr(self.heads // 8 - 1):
                for chunk in range_constexpr(self.q_chunks):
                    queries[chunk, i] = queries[chunk, i + 1]
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=BOTH, number_of_threads=2 * WARPGROUP)

    def q_dtype(self, chunk: int) -> type[cutlass.Numeric]:
        """What a chunk of Q is multiplied as: bf16 where K has no factor."""
        return BFloat16 if any(chunk in part and factor is None for part, factor in self.rows.parts) else Float16

    @cute.jit
    def attend(self, c, shared, block, sums: cute.Tensor):
        """One block: scores, softmax, output."""
        if const_expr(self.rows.table_bytes > 0):
            self.rows.write_table(block.raw, block.table, c.warp * 32 + c.lane)
            # Every warp has also finished with the last block's P and table.
            cute.arch.barrier(barrier_id=ONE + c.side, number_of_threads=WARPGROUP)
        warp, g, t = c.place
        s = self.scores(c, block)
        factors = [self.rows.factors(block.raw, block.table, warp * WARP_TOKENS + g, r) for r in range(2)]
        bits = few_heads_rows.load_short(block.attended, 0)
        q_scale = shared.q_scale.get_tensor(cute.make_layout(self.heads))
        references = shared.references.get_tensor(cute.make_layout((self.heads, 2)))
        top_factors = []
        for r in range_constexpr(2):
            top = Float32(LEAST_FACTOR)
            for factor in factors[r]:
                top = cute.arch.fmax(top, cute.arch.fmax(factor, -factor))
            top_factors.append(cute.math.log2(top, fastmath=True))
            hidden = (Int32(bits) >> (g + 8 * r)) & 1 == 0
            for j in range_constexpr(self.heads // 8):
                for h in range_constexpr(2):
                    e = 4 * j + 2 * r + h
                    score = s[e] * q_scale[8 * j + 2 * t + h]
                    s[e] = cutlass.select_(hidden, -Float32.inf, score)
        reference = cute.make_rmem_tensor(self.heads // 4, Float32)
        for n in range_constexpr(self.heads // 4):
            reference[n] = references[n // 2 * 8 + 2 * t + n % 2, c.side]
        p = cute.make_rmem_tensor_like(s)
        if const_expr(self.rows.table_bytes == 0):
            # Every warp has finished with the last block's P.
            cute.arch.barrier(barrier_id=ONE + c.side, number_of_threads=WARPGROUP)
        # Once more if the reference has to move, as it has in a piece's first block.
        attempts = Int32(1)
        while attempts > 0:
            excess = self.probabilities(c, s, p, factors, top_factors, reference)
            cute.arch.fence_proxy("async.shared", space="cta")
            exceeds = uniform(any_of_warpgroup(ONE + c.side, excess > LIMIT))
            attempts = cutlass.select_((exceeds != 0) & (attempts == 1), Int32(2), Int32(0))
            if attempts > 0:
                self.move_reference(c, shared, s, top_factors, reference, sums)
        for e in range_constexpr(self.heads // 2):
            n = e // 4 * 2 + e % 2
            sums[n] = sums[n] + p[e]
        self.accumulate(c, block)

    def scores(self, c: Consumer, block: Block) -> cute.Tensor:
        """Scores of this thread's two tokens, of all heads, without the heads' own scale."""
        s = cute.make_rmem_tensor_like(c.s[0])
        turns = len(c.s)  # with one accumulator, a part is added before the next one's first product
        order = [(part, chunk) for part, (chunks, _) in enumerate(self.rows.parts) for chunk in chunks]
        # Words are on their way while those before them are converted and multiplied.
        words = self.rows.k_words(block.raw, block.table, order[0][1], *c.place)
        for i, (part, chunk) in enumerate(order):
            begins = i == 0 or order[i - 1][0] != part
            following = None
            if i + 1 < len(order):
                following = self.rows.k_words(block.raw, block.table, order[i + 1][1], *c.place)
            a = self.rows.k_operand(chunk, words)
            words = following
            if begins and part > 0:
                factors = self.factors_of(c, block, part - 1)
            if begins and part > 0 and turns == 1:
                warpgroup.wait_group(0)
                self.add_scores(s, c.s[0], factors, part - 1)
            warpgroup.fence()
            self.issue(c.s[part % turns], a, c.q[chunk], overwrite=begins)
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            if begins and part > 0 and turns > 1:
                self.add_scores(s, c.s[(part - 1) % turns], factors, part - 1)
        factors = self.factors_of(c, block, len(self.rows.parts) - 1)
        warpgroup.wait_group(0)
        self.add_scores(s, c.s[order[-1][0] % turns], factors, order[-1][0])
        return s

    def factors_of(self, c: Consumer, block: Block, part: int) -> list | None:
        """What this thread's two tokens have as a factor of a part of the scores; None if there is none."""
        _, factor = self.rows.parts[part]
        if factor is None:
            return None
        warp, g, _ = c.place
        return [self.rows.factor(block.raw, block.table, warp * WARP_TOKENS + g, r, factor) for r in range(2)]

    def add_scores(self, s: cute.Tensor, acc: cute.Tensor, factors: list | None, part: int):
        """Add a part of the scores to s, or begin with it."""
        for i in range(self.heads // 2):
            score = acc[i] if factors is None else acc[i] * factors[i // 2 % 2]
            s[i] = score if part == 0 else s[i] + score

    def issue(self, acc: cute.Tensor, a: cute.Tensor, b: cute.Tensor, *, first: int = 0, overwrite: bool = False):
        """Issue acc (+)= a b over the k-steps of a, which are those of b from `first` on, without waiting."""
        tiled = cute.make_tiled_mma(self.op(a.element_type))
        for k in range(cute.size(a, mode=[2])):
            tiled.set(warpgroup.Field.ACCUMULATE, not (overwrite and k == 0))
            cute.gemm(tiled, acc, a[None, None, k], b[None, None, first + k], acc)

    def probabilities(self, c: Consumer, s, p, factors: list, top_factors: list, reference: cute.Tensor) -> Float32:
        """p = 2^(s - reference), and P's versions to shared memory; how far scores with scales exceed the reference.

        The versions are transposed on their way: heads by tokens.
        """
        excess: list = [-Float32.inf, -Float32.inf]
        for e in range(self.heads // 2):
            r = e // 2 % 2
            difference = s[e] - reference[e // 4 * 2 + e % 2]
            excess[r] = cute.arch.fmax(excess[r], difference)
            p[e] = cute.math.exp2(difference, fastmath=True)
        for version, (dtype, factor) in enumerate(self.rows.versions):
            scaled = [p[e] if factor is None else p[e] * factors[e // 2 % 2][factor] for e in range(self.heads // 2)]
            words = [pack(dtype, scaled[e], scaled[e + 1]) for e in range(0, len(scaled), 2)]
            for i in range(0, len(words), 4):
                # Four matrices are 16 heads.
                offset = version * self.q_bytes + i // 4 * (16 * ROW_BYTES)
                store_transposed(c.p_out, offset, words[i : i + 4])
        return cute.arch.fmax(excess[0] + top_factors[0], excess[1] + top_factors[1])

    @cute.jit
    def move_reference(self, c, shared, s: cute.Tensor, top_factors: list, reference: cute.Tensor, sums: cute.Tensor):
        """Set the references of heads whose scores exceed them by far; sums and output follow."""
        tops = shared.tops.get_tensor(cute.make_layout((self.heads, 4, 2)))
        references = shared.references.get_tensor(cute.make_layout((self.heads, 2)))
        for j in range_constexpr(self.heads // 8):
            for h in range_constexpr(2):
                top = cute.arch.fmax(s[4 * j + h] + top_factors[0], s[4 * j + 2 + h] + top_factors[1])
                for lanes in range_constexpr(2, 5):
                    top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, 1 << lanes))
                if c.lane < 4:
                    tops[8 * j + 2 * c.lane + h, c.warp, c.side] = top
        cute.arch.barrier(barrier_id=ONE + c.side, number_of_threads=WARPGROUP)
        for j in range_constexpr(self.heads // 8):
            for h in range_constexpr(2):
                n, head = 2 * j + h, 8 * j + 2 * (c.lane % 4) + h
                top = cute.arch.fmax(
                    cute.arch.fmax(tops[head, 0, c.side], tops[head, 1, c.side]),
                    cute.arch.fmax(tops[head, 2, c.side], tops[head, 3, c.side]),
                )
                moved = cutlass.select_(top - reference[n] > LIMIT, top - MARGIN, reference[n])
                factor = cute.math.exp2(reference[n] - moved, fastmath=True)
                reference[n] = moved
                if c.lane < 4 and c.warp == 0:
                    references[head, c.side] = moved
                sums[n] = sums[n] * factor
                for chunk in range_constexpr(CHUNKS):
                    o = c.o[chunk]
                    for r in range_constexpr(2):
                        o[4 * j + 2 * r + h] = o[4 * j + 2 * r + h] * factor

    @cute.jit
    def accumulate(self, c, block):
        """O^T += V^T P^T, and free the stage, half of its tokens after half of the time."""
        steps = [(group, first) for first in range(0, 4, 2) for group in range(GROUPS)]
        words = self.rows.v_words(block.raw, block.table, *steps[0], *c.place)
        for i in range_constexpr(len(steps)):
            group, first = steps[i]
            last = i + 1 == len(steps)
            following = None
            if const_expr(not last):
                following = self.rows.v_words(block.raw, block.table, *steps[i + 1], *c.place)
            a = self.rows.v_operands(group, words)
            words = following
            if const_expr(group == GROUPS - 1):
                cute.arch.sync_warp()
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(block.empty + first // 2)
            warpgroup.fence()
            for half in range_constexpr(2):
                chunk = 2 * group + half
                self.issue(c.o[chunk], a[half], c.p[self.rows.version(chunk)], first=first)
            warpgroup.commit_group()
            warpgroup.wait_group(0 if last else 1)

    @cute.jit
    def write(self, c, args, shared, sums: cute.Tensor, slot: Int32, rows):
        """Merge the two sides; write a whole unit to the outputs, a piece of one to its slot of the workspace.

        Each side ends up with two of the four groups of columns.
        """
        t = c.lane % 4
        all_sums = shared.sums.get_tensor(cute.make_layout((self.heads, 4, 2)))
        factors = shared.factors.get_tensor(cute.make_layout((self.heads, 2)))
        for n in range_constexpr(self.heads // 4):
            for lanes in range_constexpr(2, 5):
                sums[n] = sums[n] + cute.arch.shuffle_sync_bfly(sums[n], 1 << lanes)
            if c.lane < 4:
                all_sums[n // 2 * 8 + 2 * t + n % 2, c.warp, c.side] = sums[n]
        cute.arch.barrier(barrier_id=BOTH, number_of_threads=2 * WARPGROUP)
        if (c.side == LEFT) & (c.warp == 0) & (c.lane < self.heads):
            self.merge_sums(args, shared, slot, rows, c.lane)
        cute.arch.barrier(barrier_id=BOTH, number_of_threads=2 * WARPGROUP)
        for n in range_constexpr(self.heads // 4):
            factor = factors[n // 2 * 8 + 2 * t + n % 2, c.side]
            # What this side gives away comes first.
            for chunk in range_constexpr(CHUNKS // 2):
                left, right = c.o[chunk], c.o[chunk + CHUNKS // 2]
                for r in range_constexpr(2):
                    e = n // 2 * 4 + 2 * r + n % 2
                    given = cutlass.select_(c.side == LEFT, right[e], left[e])
                    kept = cutlass.select_(c.side == LEFT, left[e], right[e])
                    left[e], right[e] = given * factor, kept * factor
        self.trade(c, 0)
        cute.arch.barrier(barrier_id=BOTH, number_of_threads=2 * WARPGROUP)
        self.trade(c, 1)
        if slot < 0:
            self.write_rows(c, args.out[rows.request, rows.token, None, None], rows.count)
        else:
            self.write_rows(c, args.partial_o[slot, None, None], rows.count)

    @cute.jit
    def merge_sums(self, args, shared, slot: Int32, rows, head: Int32):
        """Of a head: write lse, and note what each side's output is to be multiplied by."""
        all_sums = shared.sums.get_tensor(cute.make_layout((self.heads, 4, 2)))
        references = shared.references.get_tensor(cute.make_layout((self.heads, 2)))
        factors = shared.factors.get_tensor(cute.make_layout((self.heads, 2)))
        sinks = shared.sinks.get_tensor(cute.make_layout(self.heads))
        top = cute.arch.fmax(references[head, 0], references[head, 1])
        weights = [cute.math.exp2(references[head, side] - top, fastmath=True) for side in range(2)]
        total = Float32(0.0)
        for side in range_constexpr(2):
            part = (all_sums[head, 0, side] + all_sums[head, 1, side]) + (
                all_sums[head, 2, side] + all_sums[head, 3, side]
            )
            total += part * weights[side]
        # lse in base 2; an empty row's is -inf here.
        lse2 = top + cute.math.log2(total, fastmath=True)
        seen, exists = total > 0.0, head < rows.count
        factor = cutlass.select_(seen, cute.arch.rcp_approx(total), Float32(0.0))
        wait_copies(0)  # for the sink
        if slot < 0:
            # exp(lse) / (exp(lse) + exp(sink))
            kept = cute.arch.rcp_approx(1.0 + cute.math.exp2(sinks[head] * LOG2_E - lse2, fastmath=True))
            factor = cutlass.select_(seen, factor * kept, Float32(0.0))
            if exists:
                args.lse[rows.request, head, rows.token] = cutlass.select_(seen, lse2 * LN2, Float32.inf)
        elif exists:
            args.partial_lse[slot, head] = lse2
        for side in range_constexpr(2):
            factors[head, side] = weights[side] * factor

    @cute.jit
    def trade(self, c, i: cutlass.Constexpr):
        """Add the other side's part to this side's i-th group, through P's place."""
        given, kept = i, 2 + i
        other = c.p_trade + (1 - 2 * c.side) * self.p_bytes
        values = self.heads  # of a thread and a group
        for j in range_constexpr(0, values, 4):
            o = c.o[2 * given + j // (values // 2)]
            first = j % (values // 2)
            cute.arch.inline_ptx(
                f"st.shared.v4.f32 [{{$r0}}+{j * 4 * WARPGROUP}], {{{{$r1}}, {{$r2}}, {{$r3}}, {{$r4}}}};",
                read_only_args=[c.p_trade, *(o[first + k] for k in range(4))],
            )
        cute.arch.barrier(barrier_id=BOTH, number_of_threads=2 * WARPGROUP)
        for j in range_constexpr(0, values, 4):
            o = c.o[2 * kept + j // (values // 2)]
            first = j % (values // 2)
            theirs = load_words(other, j * 4 * WARPGROUP, 4, Float32)
            for k in range_constexpr(4):
                o[first + k] = o[first + k] + theirs[k]

    @cute.jit
    def write_rows(self, c, to: cute.Tensor, count: Int32):
        """This thread's columns, two of each chunk of this side's two groups, of the heads that exist."""
        width = to.element_type.width // 8
        for n in range_constexpr(self.heads // 4):
            head = n // 2 * 8 + 2 * (c.lane % 4) + n % 2
            if head < count:
                row = to[head, None].iterator
                for i in range_constexpr(2):
                    values = cute.make_rmem_tensor(4, to.element_type)
                    for k in range_constexpr(4):
                        o = c.o[CHUNKS // 2 + 2 * i + k // 2]
                        values[k] = o[n // 2 * 4 + k % 2 * 2 + n % 2].to(to.element_type)
                    starts = [row + self.kept_column(c, 2 * i + half) for half in range(2)]
                    if const_expr(self.rows.neighbours(i) and self.rows.neighbours(GROUPS // 2 + i)):
                        cute.autovec_copy(values, cute.make_tensor(starts[0].align(4 * width), cute.make_layout(4)))
                    else:
                        for half in range_constexpr(2):
                            pair = cute.make_tensor(values.iterator + 2 * half, cute.make_layout(2))
                            cute.autovec_copy(
                                pair, cute.make_tensor(starts[half].align(2 * width), cute.make_layout(2))
                            )

    def kept_column(self, c, chunk: int) -> Int32:
        """The column of V that is this thread's in one of the chunks that its side keeps."""
        left, right = (self.rows.column(first + chunk, c.warp, c.lane // 4) for first in (0, CHUNKS // 2))
        return cutlass.select_(c.side == LEFT, left, right)


def load_global(address: Int64, offset: int) -> Uint32:
    """32 bits of global memory."""
    return cute.arch.inline_ptx(
        f"ld.global.u32 {{$w0}}, [{{$r0}}+{offset}];", write_only_types=[Uint32], read_only_args=[address]
    )


def store_word(address: Int32, offset: int, word: Uint32) -> None:
    """32 bits to shared memory."""
    cute.arch.inline_ptx(f"st.shared.u32 [{{$r0}}+{offset}], {{$r1}};", read_only_args=[address, word])


def store_transposed(address: Int32, offset: int, words: list) -> None:
    """A word of each of two or four 8 x 8 matrices; lanes 8 i ... 8 i + 7 give the addresses of columns of the i-th."""
    names = ", ".join(f"{{$r{i + 1}}}" for i in range(len(words)))
    cute.arch.inline_ptx(
        f"stmatrix.sync.aligned.m8n8.x{len(words)}.trans.shared.b16 [{{$r0}}+{offset}], {{{names}}};",
        read_only_args=[address, *words],
    )


def any_of_warpgroup(barrier: Int32, condition) -> Int32:
    """Wait at a named barrier for the warpgroup; 1 if the condition holds for any of its threads, else 0."""
    return cute.arch.inline_ptx(
        f"""{{
.reg .pred mine, any;
setp.ne.s32 mine, {{$r0}}, 0;
barrier.cta.red.or.pred any, {{$r1}}, {WARPGROUP}, mine;
selp.s32 {{$w0}}, 1, 0, any;
}}""",
        write_only_types=[Int32],
        read_only_args=[cutlass.select_(condition, Int32(1), Int32(0)), barrier],
    )


def copy_row(to: Int32, row: Int64, nbytes: int, full: Int32) -> None:
    """Start a copy to shared memory, which the barrier `full` counts."""
    cute.arch.inline_ptx(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        f"[{{$r0}}], [{{$r1}}], {nbytes}, [{{$r2}}], {{$r3}};",
        read_only_args=[to, row, full, Int64(EVICT_FIRST)],
    )


def store_zeros(address: Int32) -> None:
    """16 bytes to shared memory."""
    cute.arch.inline_ptx("st.shared.v4.u32 [{$r0}], {0, 0, 0, 0};", read_only_args=[address])


def compile_variant(dtype: str, kv_format: str, heads: int) -> aot.Compiled:
    """Compile for tensors of any extents whose rows, tokens and pages are 16-byte aligned."""
    kernel = SparseDecodeFewHeads(getattr(cutlass, dtype), kv_format, heads)
    caches = [aot.strided(Uint8, (cute.sym_int(), cute.sym_int()), dense_last=True, align=16) for _ in range(2)]
    return compile_for(kernel, kernel.rows.d, caches)
