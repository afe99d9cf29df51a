"""Dense multi-head attention over packed sequences, BF16 or FP16, forward: persistent CTAs take tiles of 128 queries.

A warp brings Q, K and V by TMA and finds the tiles. Two consumer warpgroups, 64 rows each, take turns on the tensor
cores: one issues its P V and the next Q K^T while the other is in its softmax; one whose rows lie beyond the sequence
stands by. Keys are visited from the last one that a tile sees to the first, so the tiles of keys that need masks come
first. A tile's first scores are under way while the output of the tile before it is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
from cutlass import Boolean, Float32, Int32, Int64, range_constexpr
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.cute.nvgpu.warpgroup import OperandMajorMode, OperandSource

from flash_mla.backends.hopper import aot
from flash_mla.backends.hopper.copies import wait_for_staged
from flash_mla.backends.hopper.epilogue import chunk_of
from flash_mla.backends.hopper.mha_output_rows import WARP_ROWS, OutputRows, write_rows
from flash_mla.backends.hopper.mha_schedule import (
    L2_BYTES,
    TILE_KV,
    TILE_Q,
    InRegisters,
    QueryTile,
    QueryTiles,
    Window,
    find,
    take_number,
)
from flash_mla.backends.hopper.mha_softmax import Total, exact_softmax, mask, optimistic_softmax
from flash_mla.backends.hopper.mha_tiles import expect, operand, partition, release, tma
from flash_mla.backends.hopper.schedule import uniform
from flash_mla.backends.hopper.softmax import LN2, quad_sum
from flash_mla.backends.hopper.wgmma import CHUNK, ROWS, gemm, k_major_layout, qk_op

D_V = 128
STAGES = 2  # of K and of V, a power of two
SIDES = TILE_Q // ROWS  # consumer warpgroups
WARPGROUP = 128
CONSUMERS = SIDES * WARPGROUP
PRODUCER_WARP = SIDES * 4  # the producer warpgroup's first; its others have nothing to do
CONSUMER_REGISTERS = 232
PRODUCER_REGISTERS = 40
Q_CHUNK_ELEMENTS = ROWS * CHUNK
KV_CHUNK_ELEMENTS = TILE_KV * CHUNK
V_CHUNKS = D_V // CHUNK
Q_CHUNKS_IN_REGISTERS = 1  # spares shared memory, nearly as busy as the tensor cores, their reads
AHEAD = 4  # tiles of keys: so many from its end, what follows a work tile is found and its Q brought to L2
NO_TILE = 0x7FFFFFFF  # a number beyond all tiles
WORDS = 8  # of a work tile as the producer hands it to a consumer

# Named barriers: the turns of consumer 0 and 1 at the tensor cores, and "V's rows beyond the sequence are zero".
TURN, V_CLEARED = 1, 3


@dataclass(frozen=True)
class Barriers:
    """Shared-memory barriers: of Q one for each consumer, of K and V one for each stage."""

    q_full: cute.Pointer
    q_empty: cute.Pointer
    k_full: cute.Pointer
    k_empty: cute.Pointer
    v_full: cute.Pointer
    v_empty: cute.Pointer


@dataclass(frozen=True)
class Fragments:
    """Operands and accumulators of a consumer warpgroup."""

    q: cute.Tensor  # descriptors of its 64 rows, the chunks that are not held in registers
    q_held: cute.Tensor  # the first chunks in registers, as A operands
    load_q: tuple  # how to load them: (tiled copy, shared memory, retiled registers)
    k: cute.Tensor  # descriptors of all stages
    v: cute.Tensor
    p: cute.Tensor  # probabilities as an A operand
    p_scores: cute.Tensor  # the same registers, in the scores' order
    s: cute.Tensor
    o: cute.Tensor
    stage_out: tuple  # how to store 64 columns of the output: (tiled copy, registers, retiled registers)
    staged_out: list  # where to, for each chunk of them: (pointer, as the copy sees it)


@dataclass(frozen=True)
class Consumer:
    """A consumer warpgroup: what its steps share."""

    side: Int32
    thread: Int32  # of the warpgroup
    barriers: Barriers
    shared: Any
    f: Fragments
    total: Total
    scale: Float32  # of scores, to base 2
    causal: Int32

    @property
    def row(self):
        """The first of this thread's two rows, `row` and `row + 8`."""
        return self.thread // 32 * 16 + self.thread % 32 // 4


def stage(number: Int32) -> Int32:
    """Where tile `number` of keys lies; bits are taken, for a signed number's remainder takes long to compute."""
    return number & (STAGES - 1)


def phase(number: Int32) -> Int32:
    """The parity of the phase of its stage's barriers in which tile `number` lies there."""
    return number >> (STAGES.bit_length() - 1) & 1


class Rows(InRegisters):
    """A consumer's 64 query rows of a work tile."""

    def __init__(self, tiles: Int32, head: Int32, first: Int32, count: Int32, seqlen_kv: Int32, seen: Int32):
        self.tiles = tiles  # of keys to visit; < 0 if there is no work left
        self.head = head
        self.first = first  # row of q
        self.count = count  # of rows that exist, may be <= 0
        self.seqlen_kv = seqlen_kv
        self.seen = seen  # keys that the first row sees, may be < 0; each next row sees one more if causal

    def attend(self) -> Boolean:
        """Whether rows exist, and the work tile has keys to visit."""
        return uniform(cutlass.min(self.tiles, self.count)) > 0


@dataclass(frozen=True)
class Loads:
    """What TMA brings: (atom, tensor) of each."""

    q: tuple
    k: tuple
    v: tuple


class MHAForward:
    def __init__(self, dtype: type[cutlass.Numeric], d: int):
        self.dtype = dtype
        self.d = d
        self.chunks = d // CHUNK

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [total_q, h_q, d]
        k: cute.Tensor,  # [total_kv, h_kv, d]
        v: cute.Tensor,  # [total_kv, h_kv, d_v]
        cu_seqlens_qo: cute.Tensor,  # [b + 1] int32
        cu_seqlens_kv: cute.Tensor,  # [b + 1] int32
        out: cute.Tensor,  # [total_q, h_q, d_v]
        lse: cute.Tensor,  # [h_q, total_q] fp32, natural log
        next_tile: cute.Tensor,  # [1] int32, any contents
        scale_log2: Float32,
        causal: Int32,
        workers: Int32,
        all_taken: Int32,  # whether there are no more tiles than workers
        stream,
    ):
        loads = Loads(tma(q, ROWS), tma(k, TILE_KV), tma(v, TILE_KV))
        rows_out = OutputRows.of(out)

        @cute.struct
        class Shared:
            q_full: cute.struct.MemRange[Int64, SIDES]
            q_empty: cute.struct.MemRange[Int64, SIDES]
            k_full: cute.struct.MemRange[Int64, STAGES]
            k_empty: cute.struct.MemRange[Int64, STAGES]
            v_full: cute.struct.MemRange[Int64, STAGES]
            v_empty: cute.struct.MemRange[Int64, STAGES]
            work: cute.struct.MemRange[Int32, SIDES * WORDS]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, SIDES * self.chunks * Q_CHUNK_ELEMENTS], 1024]
            k: cute.struct.Align[cute.struct.MemRange[self.dtype, STAGES * self.chunks * KV_CHUNK_ELEMENTS], 1024]
            v: cute.struct.Align[cute.struct.MemRange[self.dtype, STAGES * V_CHUNKS * KV_CHUNK_ELEMENTS], 1024]
            out: cute.struct.Align[cute.struct.MemRange[self.dtype, SIDES * Q_CHUNK_ELEMENTS], 1024]

        self.Shared = Shared
        if all_taken == 0:
            self.begin(next_tile).launch(grid=(1, 1, 1), block=(32, 1, 1), stream=stream)
        self.kernel(
            loads, cu_seqlens_qo, cu_seqlens_kv, rows_out, lse, next_tile, k.shape[1], scale_log2, causal, all_taken
        ).launch(
            grid=(workers, 1, 1),
            block=(CONSUMERS + WARPGROUP, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=1 - all_taken,  # it waits for `begin`, but not for what a caller launched before
        )

    @cute.kernel
    def begin(self, next_tile: cute.Tensor):
        """Nothing but the first tiles, which CTAs take by their own numbers, has been taken."""
        cute.arch.griddepcontrol_launch_dependents()
        if cute.arch.thread_idx()[0] == 0:
            next_tile[0] = 0

    @cute.kernel
    def kernel(
        self,
        loads: Loads,
        cu_seqlens_qo: cute.Tensor,
        cu_seqlens_kv: cute.Tensor,
        out: OutputRows,
        lse: cute.Tensor,
        next_tile: cute.Tensor,
        h_kv: Int32,
        scale_log2: Float32,
        causal: Int32,
        all_taken: Int32,
    ):
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        shared = utils.SmemAllocator().allocate(self.Shared)
        barriers = Barriers(
            shared.q_full.data_ptr(),
            shared.q_empty.data_ptr(),
            shared.k_full.data_ptr(),
            shared.k_empty.data_ptr(),
            shared.v_full.data_ptr(),
            shared.v_empty.data_ptr(),
        )
        self.init_barriers(barriers, warp)

        if warp >= PRODUCER_WARP:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if warp == PRODUCER_WARP:
                kv_in_l2 = L2_BYTES // ((self.d + D_V) * 2)
                sequences = QueryTiles(cu_seqlens_qo, cu_seqlens_kv, lse.shape[0], h_kv, causal, kv_in_l2)
                self.produce(sequences, shared, barriers, loads, next_tile, all_taken)
        else:
            cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            self.consume(shared, barriers, out, lse, scale_log2, causal, warp // 4, thread % WARPGROUP)

    @cute.jit
    def init_barriers(self, barriers: Barriers, warp: Int32):
        if warp == 0:
            with cute.arch.elect_one():
                for i in range_constexpr(SIDES):
                    cute.arch.mbarrier_init(barriers.q_full + i, 1)
                    cute.arch.mbarrier_init(barriers.q_empty + i, 4)
                for i in range_constexpr(STAGES):
                    for full, empty in ((barriers.k_full, barriers.k_empty), (barriers.v_full, barriers.v_empty)):
                        cute.arch.mbarrier_init(full + i, 1)
                        cute.arch.mbarrier_init(empty + i, CONSUMERS // 32)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

    # ---------------------------------------------------------------------------------------------- producer

    @cute.jit
    def produce(self, sequences, shared, barriers, loads, next_tile: cute.Tensor, all_taken: Int32):
        """Bring K, Q and V of one tile after the other, in the order in which the consumers need them."""
        for tma_atom, _ in (loads.q, loads.k, loads.v):
            cpasync.prefetch_descriptor(tma_atom)
        loaded = Int32(0)  # tiles of keys
        works = Int32(0)
        work, window = find(sequences, Window(Int32(0), Int32(0)), cute.arch.block_idx()[0])
        while work.tiles >= 0:
            kv_head = work.head // sequences.group
            k_to, k_from = partition(self.dtype, *loads.k, shared.k, TILE_KV, STAGES * self.chunks, work.kv_row)
            v_to, v_from = partition(self.dtype, *loads.v, shared.v, TILE_KV, STAGES * V_CHUNKS, work.kv_row)
            following, reached = work, window
            for i in cutlass.range(cutlass.max(work.tiles, 1), unroll=1):
                block = work.tiles - 1 - i  # < 0 if its rows see no key: they are written all the same
                at, parity = stage(loaded), phase(loaded) ^ 1
                if block >= 0:
                    cute.arch.mbarrier_wait(barriers.k_empty + at, parity)
                    expect(barriers.k_full + at, self.chunks * KV_CHUNK_ELEMENTS)
                    for c in range_constexpr(self.chunks):
                        source, to = k_from[None, block, c, kv_head], k_to[None, at * self.chunks + c]
                        cute.copy(loads.k[0], source, to, tma_bar_ptr=barriers.k_full + at)
                if i == 0:
                    self.load_q(work, sequences.causal, shared, barriers, loads, works)
                if block >= 0:
                    cute.arch.mbarrier_wait(barriers.v_empty + at, parity)
                    expect(barriers.v_full + at, V_CHUNKS * KV_CHUNK_ELEMENTS)
                    for c in range_constexpr(V_CHUNKS):
                        source, to = v_from[None, block, c, kv_head], v_to[None, at * V_CHUNKS + c]
                        cute.copy(loads.v[0], source, to, tma_bar_ptr=barriers.v_full + at)
                    loaded += 1
                if i == cutlass.max(work.tiles - AHEAD, 0):
                    number = Int32(NO_TILE)
                    if all_taken == 0:
                        cute.arch.griddepcontrol_wait()  # until `begin` has reset the counter
                        number = take_number(next_tile)
                    following, reached = find(sequences, window, number)
                    self.prefetch_q(following, loads, shared)
            works += 1
            work, window = following, reached
        for side in range_constexpr(SIDES):
            cute.arch.mbarrier_wait(barriers.q_empty + side, (works & 1) ^ 1)
            with cute.arch.elect_one():
                self.words(shared, side)[0] = work.tiles
                cute.arch.mbarrier_arrive(barriers.q_full + side)

    @cute.jit
    def prefetch_q(self, work: QueryTile, loads, shared):
        """Bring the rows of Q to L2."""
        if work.tiles >= 0:
            _, source = partition(self.dtype, *loads.q, shared.q, ROWS, SIDES * self.chunks, work.q_row)
            for side in range_constexpr(SIDES):
                for c in range_constexpr(self.chunks):
                    cute.prefetch(loads.q[0], source[None, side, c, work.head])

    def words(self, shared, side) -> cute.Tensor:
        """Where a consumer reads its work: tiles, head, its first row of q, its rows, seqlen_kv, seen by its first."""
        return cute.make_tensor(shared.work.data_ptr() + side * WORDS, cute.make_layout(WORDS))

    @cute.jit
    def load_q(self, work: QueryTile, causal: Int32, shared, barriers, loads, works: Int32):
        """Bring each consumer its rows of Q and tell it what they are."""
        to, source = partition(self.dtype, *loads.q, shared.q, ROWS, SIDES * self.chunks, work.q_row)
        for side in range_constexpr(SIDES):
            full = barriers.q_full + side
            cute.arch.mbarrier_wait(barriers.q_empty + side, (works & 1) ^ 1)
            first = side * ROWS
            with cute.arch.elect_one():
                words = self.words(shared, side)
                words[0], words[1] = work.tiles, work.head
                words[2], words[3] = work.q_row + first, work.rows - first
                words[4], words[5] = work.seqlen_kv, work.seen + causal * first
                cute.arch.mbarrier_arrive_and_expect_tx(full, self.chunks * Q_CHUNK_ELEMENTS * 2)
            for c in range_constexpr(self.chunks):
                to_chunk = to[None, side * self.chunks + c]
                cute.copy(loads.q[0], source[None, side, c, work.head], to_chunk, tma_bar_ptr=full)

    # ---------------------------------------------------------------------------------------------- consumers

    @cute.jit
    def consume(
        self,
        shared,
        barriers,
        out: OutputRows,
        lse: cute.Tensor,
        scale: Float32,
        causal: Int32,
        side: Int32,
        thread: Int32,
    ):
        """One consumer warpgroup: rows 64 side ... + 63 of every tile."""
        f = self.fragments(shared, side, thread)
        total = Total(f.o, cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32))
        c = Consumer(side, thread, barriers, shared, f, total, scale, causal)
        if side == 1:
            self.give_turn(c)  # the first is the other's
        visited = Int32(0)  # tiles of keys
        works = Int32(0)
        rows = self.next_rows(c, works)
        self.begin_rows(c, rows, visited, rows.tiles > 0)
        while rows.tiles >= 0:
            works += 1
            if rows.attend():
                last = rows.tiles - 1
                # Keys before this one are seen by all rows.
                plain = cutlass.min(cutlass.max(rows.seen, 0) // TILE_KV, last)
                for i in cutlass.range(last - plain, unroll=1):
                    self.step(c, rows, last - 1 - i, visited, True)
                    visited += 1
                for i in cutlass.range(plain, unroll=1):
                    self.step(c, rows, plain - 1 - i, visited, False)
                    visited += 1
                following = self.next_rows(c, works)
                if following.attend():
                    self.issue_both(c, visited)
                    warpgroup.wait_group(1)
                    release(barriers.v_empty + stage(visited))
                    self.write(c, rows, out, lse)
                    self.first_probabilities(c, following, visited + 1)
                else:
                    self.last_values(c, visited)
                    warpgroup.wait_group(0)
                    release(barriers.v_empty + stage(visited))
                    self.write(c, rows, out, lse)
                visited += 1
                rows = following
            else:
                others_end = rows.tiles > 0
                if others_end:
                    self.stand_by(c, rows, visited)
                    visited += rows.tiles
                else:
                    total.clear()
                    self.write(c, rows, out, lse)
                self.release_q(c)
                rows = self.next_rows(c, works)
                self.begin_rows(c, rows, visited, others_end | (rows.tiles > 0))
        wait_for_staged()  # shared memory must outlive the copies

    @cute.jit
    def begin_rows(self, c, rows, visited: Int32, has_turn: Boolean):
        """Take the first probabilities of rows that do not follow others which attend.

        has_turn: whether the other consumer takes one, for the first scores of its rows or the last values before them.
        """
        if rows.attend():
            self.first_scores(c, visited)
            self.first_probabilities(c, rows, visited)
        elif has_turn:
            self.pass_turn(c)

    @cute.jit
    def stand_by(self, c, rows, visited: Int32):
        """Let the other consumer visit the keys of its rows, where none exist for this one, up to its last turn."""
        self.clear_values(c, rows, rows.tiles - 1, visited)
        for i in cutlass.range(rows.tiles, unroll=1):
            number = visited + i
            for full, empty in ((c.barriers.k_full, c.barriers.k_empty), (c.barriers.v_full, c.barriers.v_empty)):
                self.wait(full, number)
                release(empty + stage(number))
            if i > 0:
                self.pass_turn(c)

    def next_rows(self, c: Consumer, works) -> Rows:
        """Wait for the next work's Q."""
        cute.arch.mbarrier_wait(c.barriers.q_full + c.side, works & 1)
        cute.copy(c.f.load_q[0], c.f.load_q[1], c.f.load_q[2])
        words = self.words(c.shared, c.side)
        return Rows(*(uniform(words[i]) for i in range(6)))

    def fragments(self, shared, side, thread) -> Fragments:
        dtype = self.dtype
        qk, pv = cute.make_tiled_mma(self.qk_op()), cute.make_tiled_mma(self.pv_op())
        qk_slice, pv_slice = qk.get_slice(thread), pv.get_slice(thread)
        k_atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, dtype)
        v_atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.MN_SW128, dtype)
        held = Q_CHUNKS_IN_REGISTERS
        q_start = shared.q.data_ptr() + side * (self.chunks * Q_CHUNK_ELEMENTS)
        q_layout = cute.tile_to_shape(k_atom, (ROWS, self.d - held * CHUNK), (0, 1))
        q = operand(q_start + held * Q_CHUNK_ELEMENTS, q_layout)
        held_qk = cute.make_tiled_mma(self.qk_op(OperandSource.RMEM))
        held_slice = held_qk.get_slice(thread)
        q_held = held_slice.make_fragment_A(held_slice.partition_shape_A((ROWS, held * CHUNK)))
        load = cute.make_tiled_copy_A(cute.make_copy_atom(cute.nvgpu.warp.LdMatrix8x8x16bOp(False, 4), dtype), held_qk)
        load_slice = load.get_slice(thread)
        load_from = load_slice.partition_S(operand(q_start, cute.tile_to_shape(k_atom, (ROWS, held * CHUNK), (0, 1))))
        k = operand(shared.k.data_ptr(), cute.tile_to_shape(k_atom, (TILE_KV, self.d, STAGES), (0, 1, 2)))
        v = operand(shared.v.data_ptr(), cute.tile_to_shape(v_atom, (D_V, TILE_KV, STAGES), (1, 0, 2)))

        s = qk_slice.make_fragment_C(qk_slice.partition_shape_C((ROWS, TILE_KV)))
        p_scores = cute.make_rmem_tensor(s.layout, dtype)
        # An A operand takes its registers in the order of the accumulator.
        p_layout = cute.make_layout(((2, 2, 2), 1, TILE_KV // 16), stride=((1, 2, 4), 0, 8))

        chunk = cute.make_tiled_mma(qk_op(dtype, OperandSource.SMEM))  # 64 columns
        chunk_slice = chunk.get_slice(thread)
        values = cute.make_rmem_tensor(chunk_slice.partition_shape_C((ROWS, CHUNK)), dtype)
        store = cute.make_tiled_copy_C(cute.make_copy_atom(cute.nvgpu.warp.StMatrix8x8x16bOp(False, 4), dtype), chunk)
        store_slice = store.get_slice(thread)
        # Q's first chunk makes room as soon as registers hold it.
        rooms = (shared.out.data_ptr() + side * Q_CHUNK_ELEMENTS, q_start)
        return Fragments(
            q=qk_slice.make_fragment_A(qk_slice.partition_A(q)),
            q_held=q_held,
            load_q=(load, load_from, load_slice.retile(q_held)),
            k=qk_slice.make_fragment_B(qk_slice.partition_B(k)),
            v=pv_slice.make_fragment_B(pv_slice.partition_B(v)),
            p=cute.make_tensor(p_scores.iterator, p_layout),
            p_scores=p_scores,
            s=s,
            o=pv_slice.make_fragment_C(pv_slice.partition_shape_C((ROWS, D_V))),
            stage_out=(store, values, store_slice.retile(values)),
            staged_out=[(room, store_slice.partition_D(operand(room, k_major_layout(dtype)))) for room in rooms],
        )

    def qk_op(self, source: OperandSource = OperandSource.SMEM) -> warpgroup.MmaF16BF16Op:
        """S[64, 128] += Q[64, 16] K[128, 16]^T."""
        shape, k = (ROWS, TILE_KV, 16), OperandMajorMode.K
        return warpgroup.MmaF16BF16Op(self.dtype, Float32, shape, source, k, k)

    def pv_op(self) -> warpgroup.MmaF16BF16Op:
        """O[64, 128] += P[64, 16] V[16, 128], P in registers."""
        shape, k, mn = (ROWS, D_V, 16), OperandMajorMode.K, OperandMajorMode.MN
        return warpgroup.MmaF16BF16Op(self.dtype, Float32, shape, OperandSource.RMEM, k, mn)

    def issue_scores(self, c: Consumer, number):
        """Issue S = Q K^T for the tile of keys `number`, counted over all work."""
        k = c.f.k[None, None, None, stage(number)]
        held = 4 * Q_CHUNKS_IN_REGISTERS
        tiled = cute.make_tiled_mma(self.qk_op(OperandSource.RMEM))
        for i in range(held):
            tiled.set(warpgroup.Field.ACCUMULATE, i > 0)
            cute.gemm(tiled, c.f.s, c.f.q_held[None, None, i], k[None, None, i], c.f.s)
        tiled = cute.make_tiled_mma(self.qk_op())
        tiled.set(warpgroup.Field.ACCUMULATE, True)
        for i in range(cute.size(c.f.q, mode=[2])):
            cute.gemm(tiled, c.f.s, c.f.q[None, None, i], k[None, None, held + i], c.f.s)
        warpgroup.commit_group()

    def issue_values(self, c: Consumer, number):
        """Issue O += P V for the tile of keys `number`."""
        gemm(self.pv_op(), c.f.o, c.f.p, c.f.v[None, None, None, stage(number)])
        warpgroup.commit_group()

    def wait(self, full, number):
        cute.arch.mbarrier_wait(full + stage(number), phase(number))

    def take_turn(self, c: Consumer):
        cute.arch.barrier(barrier_id=TURN + c.side, number_of_threads=CONSUMERS)

    def give_turn(self, c: Consumer):
        cute.arch.barrier_arrive(barrier_id=TURN + 1 - c.side, number_of_threads=CONSUMERS)

    def pass_turn(self, c: Consumer):
        self.take_turn(c)
        self.give_turn(c)

    def first_scores(self, c: Consumer, number):
        """Issue the scores of the first tile of keys visited, which is the last that a row sees."""
        self.wait(c.barriers.k_full, number)
        self.take_turn(c)
        warpgroup.fence()
        self.issue_scores(c, number)
        self.give_turn(c)

    def first_probabilities(self, c: Consumer, rows: Rows, number):
        """Wait for the first scores and take their probabilities."""
        block = rows.tiles - 1
        warpgroup.wait_group(0)
        release(c.barriers.k_empty + stage(number))
        self.release_q_behind(c, block)
        self.mask_block(c, rows, block)
        c.total.clear()
        exact_softmax(c.f.s, c.f.p_scores, c.total, c.scale, begins=True)
        self.clear_values(c, rows, block, number)

    def issue_both(self, c: Consumer, number):
        """Issue the values of the tile of keys `number` and, in the same turn, the scores of the next."""
        self.wait(c.barriers.v_full, number)
        self.take_turn(c)
        warpgroup.fence()
        self.issue_values(c, number)
        self.wait(c.barriers.k_full, number + 1)  # behind the values, which take longer to issue than this
        self.issue_scores(c, number + 1)
        self.give_turn(c)

    def step(self, c: Consumer, rows: Rows, block, number, masked: bool):
        """Add the values of the tile of keys `number`, whose probabilities are there, and take those of the next."""
        b = c.barriers
        self.issue_both(c, number)
        warpgroup.wait_group(1)
        release(b.v_empty + stage(number))
        warpgroup.wait_group(0)
        release(b.k_empty + stage(number + 1))
        self.release_q_behind(c, block)

        if masked:
            self.mask_block(c, rows, block)
            exact_softmax(c.f.s, c.f.p_scores, c.total, c.scale)
        else:
            optimistic_softmax(c.f.s, c.f.p_scores, c.total, c.scale)

    def last_values(self, c: Consumer, number):
        """Issue the values of the last tile of keys visited."""
        self.wait(c.barriers.v_full, number)
        self.take_turn(c)
        warpgroup.fence()
        self.issue_values(c, number)
        self.give_turn(c)

    @cute.jit
    def release_q_behind(self, c, block: Int32):
        """Behind the scores of the sequence's first keys, Q has been read."""
        if block == 0:
            self.release_q(c)

    def release_q(self, c: Consumer):
        """Free Q, and with it what was staged there of the output before."""
        wait_for_staged()
        release(c.barriers.q_empty + c.side)

    @cute.jit
    def mask_block(self, c, rows, block: Int32):
        """Hide the keys that rows must not see, if there are any."""
        key = block * TILE_KV
        if key + TILE_KV > cutlass.min(rows.seen, rows.seqlen_kv):
            limits = [cutlass.min(rows.seen + c.causal * (c.row + 8 * r), rows.seqlen_kv) for r in range(2)]
            mask(c.f.s, key, limits[0], limits[1], c.thread % 32)

    @cute.jit
    def clear_values(self, c, rows, block: Int32, number: Int32):
        """Zero V beyond the sequence, in the tile of keys where it ends: 0 * NaN must not reach the output."""
        valid = rows.seqlen_kv - block * TILE_KV
        if valid < TILE_KV:
            self.wait(c.barriers.v_full, number)
            thread = c.side * WARPGROUP + c.thread
            row, chunk = thread // V_CHUNKS, thread % V_CHUNKS
            if row >= valid:
                start = (stage(number) * V_CHUNKS + chunk) * KV_CHUNK_ELEMENTS + row * CHUNK
                zeros = cute.make_rmem_tensor(CHUNK, self.dtype)
                zeros.fill(0.0)
                to = cute.make_tensor((c.shared.v.data_ptr() + start).align(16), cute.make_layout(CHUNK))
                cute.autovec_copy(zeros, to)
            cute.arch.fence_proxy("async.shared", space="cta")
            cute.arch.barrier(barrier_id=V_CLEARED, number_of_threads=CONSUMERS)

    @cute.jit
    def write(self, c, rows, out: OutputRows, lse: cute.Tensor):
        """Normalise and write the rows that exist; the chunk of Q that is held in registers is there."""
        lane, first_row = c.thread % 32, uniform(c.thread // 32) * WARP_ROWS
        inv = cute.make_rmem_tensor(2, Float32)
        for r in range_constexpr(2):
            total = quad_sum(c.total.row_sum[r])
            inv[r] = cutlass.select_(total > 0.0, cute.arch.rcp_approx(total), Float32(0.0))
            if (lane % 4 == 0) & (c.row + 8 * r < rows.count):
                # -inf, as log2(0) is, for a row that sees no key.
                row_lse = (cute.math.log2(total) + c.total.reference[r] * c.scale) * LN2
                lse[rows.head, rows.first + c.row + 8 * r] = row_lse

        # Each warp stages its own rows, so warps need not wait for each other.
        wait_for_staged()
        store, values, retiled = c.f.stage_out
        for chunk, (_, staged) in enumerate(c.f.staged_out):
            chunk_of(c.f.o, chunk, inv, values)
            cute.copy(store, retiled, staged)
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        for chunk, (room, _) in enumerate(c.f.staged_out):
            staged, token = room + first_row * CHUNK, rows.first + first_row
            write_rows(staged, out, token, uniform(rows.count - first_row), rows.head, chunk, lane)


def compile_variant(dtype: str, d: int) -> aot.Compiled:
    """Compile for tensors of any extents whose rows are 16-byte aligned."""
    element = getattr(cutlass, dtype)
    total_q, total_kv, h_q, h_kv, offsets = (cute.sym_int() for _ in range(5))
    q = aot.strided(element, (total_q, h_q, d), dense_last=True, align=16)
    k = aot.strided(element, (total_kv, h_kv, d), dense_last=True, align=16)
    v = aot.strided(element, (total_kv, h_kv, D_V), dense_last=True, align=16)
    cu_seqlens_qo, cu_seqlens_kv = (aot.strided(Int32, (offsets,)) for _ in range(2))
    out = aot.strided(element, (total_q, h_q, D_V), dense_last=True, align=16)
    lse = aot.strided(Float32, (h_q, total_q), dense_last=True)
    next_tile = aot.compact(Int32, (1,))
    return aot.compile_kernel(
        MHAForward(element, d), q, k, v, cu_seqlens_qo, cu_seqlens_kv, out, lse, next_tile,
        Float32(1.0), Int32(0), Int32(1), Int32(0),
    )  # fmt: skip
