"""Dense multi-head attention over packed sequences, backward: persistent CTAs take tiles of 128 keys of a KV head.

With P = exp(S - lse) and dP = dO V^T, dS = P (dP - delta): dV = P^T dO, dK = dS^T Q, dQ = dS K (FlashAttention-2,
arXiv 2307.08691, algorithm 2). A CTA keeps dK and dV in registers while it visits, 64 rows at a time, the queries that
see its keys, of all heads that share them; dQ is added up in global memory in fp32.

A warp brings K and V, then Q and dO by TMA. Two consumer warpgroups, 64 keys each, hold S and dP transposed, which
makes P^T and dS^T the left operands of dV and dK as they are. dS also goes to shared memory, where each warpgroup takes
half of dQ's columns from all keys, one visit late, so that neither waits for the other. Where sums are not zeroed
before, a thread for each half finds out ahead of time whether theirs is the first part (mha_first_sums).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
from cutlass import Float32, Int32, Int64, const_expr, range_constexpr
from cutlass.cute.nvgpu import warpgroup
from cutlass.cute.nvgpu.warpgroup import OperandMajorMode, OperandSource, SmemLayoutAtomKind

from flash_mla.backends.hopper import aot
from flash_mla.backends.hopper.copies import wait_for_staged
from flash_mla.backends.hopper.epilogue import chunk_of
from flash_mla.backends.hopper.mha_backward_loads import (
    D_V,
    K_COLUMNS,
    STAGES,
    V_CHUNKS,
    WORDS,
    BackwardLoads,
    Loads,
    Visit,
)
from flash_mla.backends.hopper.mha_first_sums import claim, publish
from flash_mla.backends.hopper.mha_gradient_rows import (
    GradientRows,
    add_registers,
    add_staged,
    stage_sums,
    store_registers,
)
from flash_mla.backends.hopper.mha_output_rows import WARP_ROWS, OutputRows, write_rows
from flash_mla.backends.hopper.mha_schedule import (
    TILE_KV,
    VISIT_Q,
    KeyTile,
    KeyTiles,
)
from flash_mla.backends.hopper.mha_tiles import operand, release, tma
from flash_mla.backends.hopper.schedule import anew, uniform
from flash_mla.backends.hopper.wgmma import CHUNK, ROWS, gemm, qk_op

SIDES = TILE_KV // ROWS  # consumer warpgroups
WARPGROUP = 128
CONSUMERS = SIDES * WARPGROUP
PRODUCER_WARP = SIDES * 4  # the producer warpgroup's first
CLAIM_WARP = PRODUCER_WARP + 1  # of side 0; then that of side 1, and one that has nothing to do
CONSUMER_REGISTERS = 240
PRODUCER_REGISTERS = 24
Q_CHUNK_ELEMENTS = VISIT_Q * CHUNK
UNIT = 8  # elements that a thread clears at once
STAGED = 1024  # values of a warp's dQ, at most
L2_BYTES = 24 << 20  # of what a group of heads reads and adds to: beyond L2, adding is at most half as fast
# Named barriers, of consumer 0 and 1: it has written to shared memory; it is its turn to issue its scores.
WRITTEN, TURN = 1, 3


@dataclass(frozen=True)
class Barriers:
    """Shared-memory barriers, of Q, dO and dS one for each stage, of dQ one for each side."""

    k_full: cute.Pointer
    k_empty: cute.Pointer
    v_full: cute.Pointer
    v_empty: cute.Pointer
    q_full: cute.Pointer
    q_empty: cute.Pointer
    dout_full: cute.Pointer
    dout_empty: cute.Pointer
    ds_full: cute.Pointer
    ds_empty: cute.Pointer
    dq_claimed: cute.Pointer  # it is known whether a side's dQ is the first part of its sums
    dq_added: cute.Pointer


@dataclass(frozen=True)
class Gradients:
    """What is written."""

    dq_sums: cute.Tensor
    dq_states: cute.Tensor
    dk: OutputRows
    dv: OutputRows


@dataclass(frozen=True)
class Fragments:
    """Operands, as descriptors of all stages unless said otherwise, and accumulators of a consumer warpgroup."""

    k: cute.Tensor  # its 64 keys, no stages
    v: cute.Tensor
    q: cute.Tensor
    dout: cute.Tensor
    q_by_columns: cute.Tensor
    dout_by_columns: cute.Tensor
    ds_by_queries: cute.Tensor
    k_by_columns: cute.Tensor  # its half of the columns, no stages
    s: cute.Tensor
    dp: cute.Tensor
    dq: cute.Tensor
    dk: cute.Tensor
    dv: cute.Tensor
    p: cute.Tensor  # P^T as an A operand
    p_scores: cute.Tensor  # the same registers, in the scores' order
    ds_scores: cute.Tensor  # dS^T
    ds_by_keys: cute.Tensor
    store: tuple  # how to store 64 x 64: (tiled copy, registers of dS retiled, where to)


@dataclass(frozen=True)
class Consumer:
    """A consumer warpgroup: what its steps share."""

    side: Int32
    thread: Int32  # of the warpgroup
    barriers: Barriers
    shared: Any
    f: Fragments
    gradients: Gradients
    scale: Float32
    scale_log2: Float32

    @property
    def warp(self):
        """Of all consumers' warps, this thread's."""
        return cute.arch.make_warp_uniform(self.side * 4 + self.thread // 32)

    @property
    def row(self):
        """The first of this thread's two rows of an accumulator, `row` and `row + 8`."""
        return self.thread // 32 * 16 + self.thread % 32 // 4


class MHABackward(BackwardLoads):
    def __init__(self, dtype: type[cutlass.Numeric], d: int):
        super().__init__(dtype, d)
        self.dq_columns = d // SIDES  # of a consumer
        self.dp_beside_scores = d == 128  # registers hold both, and then dQ beside dP
        self.dq_part = VISIT_Q // 4 * self.dq_columns  # values of dQ that a warp holds
        # Copies from shared memory add so much of it while the warp goes on: there is no room for more.
        self.staged = min(self.dq_part, STAGED)
        # The first to add stores instead, from registers (mha_first_sums). Beside dP that costs more than zeroing.
        self.zeroed = self.dp_beside_scores

    @cute.jit
    def __call__(
        self,
        dout: cute.Tensor,  # [total_q, h_q, d_v]
        dlse: cute.Tensor,  # [total_q, h_q] fp32
        q: cute.Tensor,  # [total_q, h_q, d]
        k: cute.Tensor,  # [total_kv, h_kv, d]
        v: cute.Tensor,  # [total_kv, h_kv, d_v]
        out: cute.Tensor,  # [total_q, h_q, d_v]
        lse: cute.Tensor,  # [total_q, h_q] fp32, natural log
        cu_seqlens_qo: cute.Tensor,  # [b + 1] int32
        cu_seqlens_kv: cute.Tensor,  # [b + 1] int32
        dq: cute.Tensor,  # [total_q, h_q, d]
        dk: cute.Tensor,  # [total_kv, h_kv, d]
        dv: cute.Tensor,  # [total_kv, h_kv, d_v]
        row_values: cute.Tensor,  # [2, h_q, total_q] fp32, any contents
        dq_sums: cute.Tensor,  # [h_q, tiles, 64 * d] fp32, any contents: see mha_gradient_rows
        dq_states: cute.Tensor,  # [h_q, tiles, 2] int32, any contents: see mha_first_sums; unused where sums are zeroed
        next_tile: cute.Tensor,  # [1] int32, any contents
        scale: Float32,
        scale_log2: Float32,
        causal: Int32,
        workers: Int32,
        stream,
    ):
        loads = Loads(tma(q, VISIT_Q), tma(k, TILE_KV, K_COLUMNS), tma(v, TILE_KV), tma(dout, VISIT_Q))
        gradients = Gradients(dq_sums, dq_states, OutputRows.of(dk), OutputRows.of(dv))

        @cute.struct
        class Shared:
            k_full: cute.struct.MemRange[Int64, 1]
            k_empty: cute.struct.MemRange[Int64, 1]
            v_full: cute.struct.MemRange[Int64, 1]
            v_empty: cute.struct.MemRange[Int64, 1]
            q_full: cute.struct.MemRange[Int64, STAGES]
            q_empty: cute.struct.MemRange[Int64, STAGES]
            dout_full: cute.struct.MemRange[Int64, STAGES]
            dout_empty: cute.struct.MemRange[Int64, STAGES]
            ds_full: cute.struct.MemRange[Int64, STAGES]
            ds_empty: cute.struct.MemRange[Int64, STAGES]
            dq_claimed: cute.struct.MemRange[Int64, SIDES]
            dq_added: cute.struct.MemRange[Int64, SIDES]
            dq_first: cute.struct.MemRange[Int32, SIDES]
            work: cute.struct.MemRange[Int32, WORDS]
            row_values: cute.struct.Align[cute.struct.MemRange[Float32, STAGES * 2 * VISIT_Q], 16]
            k: cute.struct.Align[cute.struct.MemRange[self.dtype, TILE_KV * self.d], 1024]
            v: cute.struct.Align[cute.struct.MemRange[self.dtype, TILE_KV * D_V], 1024]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, STAGES * VISIT_Q * self.d], 1024]
            dout: cute.struct.Align[cute.struct.MemRange[self.dtype, STAGES * VISIT_Q * D_V], 1024]
            ds: cute.struct.Align[cute.struct.MemRange[self.dtype, STAGES * VISIT_Q * TILE_KV], 1024]
            staged: cute.struct.Align[cute.struct.MemRange[Float32, CONSUMERS // 32 * self.staged], 1024]

        self.Shared = Shared
        rows = GradientRows(self.dtype, self.d, self.zeroed)
        rows.before(dout, out, lse, dlse, row_values, dq_sums, dq_states, next_tile, stream)
        self.kernel(
            loads, gradients, cu_seqlens_qo, cu_seqlens_kv, row_values, next_tile, scale, scale_log2, causal
        ).launch(grid=(workers, 1, 1), block=(CONSUMERS + WARPGROUP, 1, 1), stream=stream, min_blocks_per_mp=1)
        rows.after(dq_sums, dq_states, cu_seqlens_qo, dq, scale, stream)

    @cute.kernel
    def kernel(
        self,
        loads: Loads,
        gradients: Gradients,
        cu_seqlens_qo: cute.Tensor,
        cu_seqlens_kv: cute.Tensor,
        row_values: cute.Tensor,
        next_tile: cute.Tensor,
        scale: Float32,
        scale_log2: Float32,
        causal: Int32,
    ):
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        shared = utils.SmemAllocator().allocate(self.Shared)
        barriers = Barriers(
            shared.k_full.data_ptr(),
            shared.k_empty.data_ptr(),
            shared.v_full.data_ptr(),
            shared.v_empty.data_ptr(),
            shared.q_full.data_ptr(),
            shared.q_empty.data_ptr(),
            shared.dout_full.data_ptr(),
            shared.dout_empty.data_ptr(),
            shared.ds_full.data_ptr(),
            shared.ds_empty.data_ptr(),
            shared.dq_claimed.data_ptr(),
            shared.dq_added.data_ptr(),
        )
        self.init_barriers(barriers, warp)

        h_q, h_kv = gradients.dq_sums.shape[0], gradients.dk.rows.shape[1]
        group = h_q // h_kv
        if warp >= PRODUCER_WARP:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if warp == PRODUCER_WARP:
                # A query row is read, of Q and dO, and added to, in fp32.
                in_l2 = L2_BYTES // ((self.d + D_V) * 2 + self.d * 4)
                sequences = KeyTiles(cu_seqlens_qo, cu_seqlens_kv, h_q, h_kv, causal, in_l2)
                self.produce(sequences, shared, barriers, loads, row_values, next_tile)
            elif (warp < CLAIM_WARP + SIDES) & (cute.arch.lane_idx() == 0):
                if const_expr(not self.zeroed):
                    self.claim(shared, barriers, gradients, group, warp - CLAIM_WARP)
        else:
            cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            self.consume(shared, barriers, gradients, group, scale, scale_log2, warp // 4, thread % WARPGROUP)

    @cute.jit
    def init_barriers(self, barriers: Barriers, warp: Int32):
        if warp == 0:
            with cute.arch.elect_one():
                for full in (barriers.k_full, barriers.v_full):
                    cute.arch.mbarrier_init(full, 1)
                claims = 0 if self.zeroed else SIDES  # which read what the work is
                cute.arch.mbarrier_init(barriers.k_empty, CONSUMERS // 32 + claims)
                cute.arch.mbarrier_init(barriers.v_empty, CONSUMERS // 32)
                for side in range_constexpr(SIDES):
                    cute.arch.mbarrier_init(barriers.dq_claimed + side, 1)
                    cute.arch.mbarrier_init(barriers.dq_added + side, WARPGROUP // 32)
                for i in range_constexpr(STAGES):
                    cute.arch.mbarrier_init(barriers.q_full + i, 2)  # Q, and the values of its rows
                    cute.arch.mbarrier_init(barriers.dout_full + i, 1)
                    cute.arch.mbarrier_init(barriers.ds_full + i, CONSUMERS // 32)
                    for empty in (barriers.q_empty, barriers.dout_empty, barriers.ds_empty):
                        cute.arch.mbarrier_init(empty + i, CONSUMERS // 32)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

    # ------------------------------------------------------------------------------------------------- claims

    @cute.jit
    def claim(self, shared, barriers, gradients, group: Int32, side: Int32):
        """One thread claims a side's sums of one visit after the other, and tells the consumer whether it is the first.

        It does so a visit ahead, and waits for nothing but its own consumers until they have added, or stored.
        """
        visits = Int32(0)
        works = Int32(0)
        first_sums = self.first_sums(shared)
        work = self.claims_work(shared, barriers, works)
        while work.tiles >= 0:
            visit = Visit(work.kv_head * group, work.first)
            for _ in cutlass.range(work.tiles, unroll=1):
                state = gradients.dq_states[visit.head, work.q_tile + visit.tile, None].iterator + side
                first = claim(state)
                first_sums[side] = first
                cute.arch.mbarrier_arrive(barriers.dq_claimed + side)
                cute.arch.mbarrier_wait(barriers.dq_added + side, visits & 1)
                if first != 0:
                    publish(state)
                visits += 1
                visit = self.next_visit(work, visit)
            works += 1
            work = self.claims_work(shared, barriers, works)

    def claims_work(self, shared, barriers, works: Int32) -> KeyTile:
        """Wait until there is a next work tile."""
        cute.arch.mbarrier_wait(barriers.k_full, works & 1)
        words = self.words(shared)
        work = KeyTile(*(words[i] for i in range(10)))
        cute.arch.mbarrier_arrive(barriers.k_empty)
        return work

    def first_sums(self, shared) -> cute.Tensor:
        """Whether a side's dQ is the first part of its sums."""
        return cute.make_tensor(shared.dq_first.data_ptr(), cute.make_layout(SIDES))

    # ---------------------------------------------------------------------------------------------- consumers

    @cute.jit
    def consume(
        self,
        shared,
        barriers,
        gradients,
        group: Int32,
        scale: Float32,
        scale_log2: Float32,
        side: Int32,
        thread: Int32,
    ):
        """One consumer warpgroup: keys 64 side ... + 63 of every tile."""
        f = self.fragments(shared, side, thread)
        c = Consumer(side, thread, barriers, shared, f, gradients, scale, scale_log2)
        if side == 1:
            self.give_turn(c)  # the first is the other's
        visits = Int32(0)
        works = Int32(0)
        work = self.next_work(c, works)
        while work.tiles >= 0:
            f.dk.fill(0.0)
            f.dv.fill(0.0)
            cute.arch.mbarrier_wait(barriers.v_full, works & 1)
            self.clear_keys(c, work)
            visit = Visit(work.kv_head * group, work.first)
            if work.tiles > 0:
                if work.sees_first + side * ROWS >= (visit.tile + 1) * VISIT_Q:
                    self.skip(c, work, visit, visits)
                else:
                    self.visit(c, work, visit, visit, visits, first=True)
                left = work.tiles - 1
                whole, whole_end = work.whole_visits()
                while left > 0:
                    tile = self.next_visit(work, visit).tile
                    run = cutlass.select_(tile >= whole, cutlass.max(whole_end - tile, 0), Int32(0))
                    for _ in cutlass.range(run, unroll=1):
                        following = self.next_visit(work, visit)
                        visits += 1
                        self.visit(c, work, following, visit, visits, whole=True)
                        visit = following
                    left -= run
                    if left > 0:
                        following = self.next_visit(work, visit)
                        visits += 1
                        self.visit(c, work, following, visit, visits)
                        visit = following
                        left -= 1
            release(barriers.v_empty)
            if work.tiles > 0:
                self.finish(c, work, visit, visits)
                visits += 1
            else:
                wait_for_staged()  # the first visit waits, if there is one
            release(barriers.k_empty)
            self.write(c, work, visits)
            works += 1
            work = self.next_work(c, works)
        wait_for_staged()  # shared memory must outlive the copies

    def next_work(self, c: Consumer, works) -> KeyTile:
        """Wait for the next work's K."""
        cute.arch.mbarrier_wait(c.barriers.k_full, works & 1)
        words = self.words(c.shared)
        return KeyTile(*(uniform(words[i]) for i in range(10)))

    def fragments(self, shared, side, thread) -> Fragments:
        dtype = self.dtype
        score, to_dv, to_dk, to_dq = (
            cute.make_tiled_mma(op).get_slice(thread)
            for op in (self.score_op(), self.dv_op(), self.dk_op(), self.dq_op())
        )

        def smem(kind, data, shape, order):
            atom = warpgroup.make_smem_layout_atom(kind, dtype)
            return operand(data.data_ptr(), cute.tile_to_shape(atom, shape, order))

        k_atom, by_columns = SmemLayoutAtomKind.K_SW128, SmemLayoutAtomKind.MN_SW128
        k = smem(SmemLayoutAtomKind.K_SW64, shared.k, (TILE_KV, self.d), (0, 1))
        v = smem(k_atom, shared.v, (TILE_KV, D_V), (0, 1))
        q = smem(k_atom, shared.q, (VISIT_Q, self.d, STAGES), (0, 1, 2))
        dout = smem(k_atom, shared.dout, (VISIT_Q, D_V, STAGES), (0, 1, 2))
        q_by_columns = smem(by_columns, shared.q, (self.d, VISIT_Q, STAGES), (1, 0, 2))
        dout_by_columns = smem(by_columns, shared.dout, (D_V, VISIT_Q, STAGES), (1, 0, 2))
        ds_by_queries = smem(by_columns, shared.ds, (VISIT_Q, TILE_KV, STAGES), (0, 1, 2))
        k_by_columns = smem(SmemLayoutAtomKind.MN_SW64, shared.k, (self.d, TILE_KV), (1, 0))

        scores = score.partition_shape_C((ROWS, VISIT_Q))
        s = score.make_fragment_C(scores)
        p_scores, ds_scores = (cute.make_rmem_tensor(s.layout, dtype) for _ in range(2))
        # An A operand takes its registers in the order of the accumulator.
        a_layout = cute.make_layout(((2, 2, 2), 1, VISIT_Q // 16), stride=((1, 2, 4), 0, 8))

        ds_rows = self.ds_by_keys(shared)
        store = self.store()
        store_slice = store.get_slice(thread)
        return Fragments(
            k=score.make_fragment_A(score.partition_A(cute.local_tile(k, (ROWS, self.d), (side, 0)))),
            v=score.make_fragment_A(score.partition_A(cute.local_tile(v, (ROWS, D_V), (side, 0)))),
            q=score.make_fragment_B(score.partition_B(q)),
            dout=score.make_fragment_B(score.partition_B(dout)),
            q_by_columns=to_dk.make_fragment_B(to_dk.partition_B(q_by_columns)),
            dout_by_columns=to_dv.make_fragment_B(to_dv.partition_B(dout_by_columns)),
            ds_by_queries=to_dq.make_fragment_A(to_dq.partition_A(ds_by_queries)),
            k_by_columns=to_dq.make_fragment_B(
                to_dq.partition_B(cute.local_tile(k_by_columns, (self.dq_columns, TILE_KV), (side, 0)))
            ),
            s=s,
            dp=score.make_fragment_C(scores),
            dq=to_dq.make_fragment_C(to_dq.partition_shape_C((VISIT_Q, self.dq_columns))),
            dk=to_dk.make_fragment_C(to_dk.partition_shape_C((ROWS, self.d))),
            dv=to_dv.make_fragment_C(to_dv.partition_shape_C((ROWS, D_V))),
            p=cute.make_tensor(p_scores.iterator, a_layout),
            p_scores=p_scores,
            ds_scores=ds_scores,
            ds_by_keys=to_dk.make_fragment_A(to_dk.partition_A(ds_rows)),
            store=(store, store_slice.retile(ds_scores), store_slice.partition_D(ds_rows)),
        )

    def store(self) -> cute.TiledCopy:
        """How to store a 64 x 64 accumulator, rounded."""
        atom = cute.make_copy_atom(cute.nvgpu.warp.StMatrix8x8x16bOp(False, 4), self.dtype)
        return cute.make_tiled_copy_C(atom, cute.make_tiled_mma(qk_op(self.dtype, OperandSource.SMEM)))

    def score_op(self) -> warpgroup.MmaF16BF16Op:
        """S^T[64, 64] += K[64, 16] Q[64, 16]^T, and dP^T of V and dO."""
        shape, k = (ROWS, VISIT_Q, 16), OperandMajorMode.K
        return warpgroup.MmaF16BF16Op(self.dtype, Float32, shape, OperandSource.SMEM, k, k)

    def dv_op(self) -> warpgroup.MmaF16BF16Op:
        """dV[64, d_v] += P^T[64, 16] dO[16, d_v], P^T in registers."""
        shape, k, mn = (ROWS, D_V, 16), OperandMajorMode.K, OperandMajorMode.MN
        return warpgroup.MmaF16BF16Op(self.dtype, Float32, shape, OperandSource.RMEM, k, mn)

    def dk_op(self) -> warpgroup.MmaF16BF16Op:
        """dK[64, d] += dS^T[64, 16] Q[16, d]."""
        shape, k, mn = (ROWS, self.d, 16), OperandMajorMode.K, OperandMajorMode.MN
        return warpgroup.MmaF16BF16Op(self.dtype, Float32, shape, OperandSource.SMEM, k, mn)

    def dq_op(self) -> warpgroup.MmaF16BF16Op:
        """dQ[64, half of d] += dS[64, 16] K[16, half of d]."""
        shape, mn = (ROWS, self.dq_columns, 16), OperandMajorMode.MN
        return warpgroup.MmaF16BF16Op(self.dtype, Float32, shape, OperandSource.SMEM, mn, mn)

    def visit(
        self,
        c: Consumer,
        work: KeyTile,
        visit: Visit,
        previous: Visit,
        number: Int32,
        *,
        first: bool = False,
        whole: bool = False,
    ):
        """Take P and dS of 64 query rows, hand over dS, and add to dV.

        What the `previous` visit's dS adds to dK and dQ comes here, too, so that tensor cores have work under the
        softmax and no consumer waits for the other's dS. A warp that issues products waits until the tensor cores have
        begun most of them: what frees Q comes first.

        Args:
            number: of the visit, among all that the CTA makes.
            first: of the work; there is no previous visit.
            whole: all rows exist, and all keys, and each row sees each key: two copies of the visit are faster than one
                that asks.
        """
        b, f = c.barriers, c.f
        stage, parity, before = number % STAGES, number // STAGES & 1, (number - 1) % STAGES
        early_dq = self.dp_beside_scores and not first
        cute.arch.mbarrier_wait(b.q_full + stage, parity)
        cute.arch.mbarrier_wait(b.dout_full + stage, parity)
        if not whole:
            self.clear_queries(c, work, visit, stage)
        values = self.row_values(c.shared, stage)
        self.take_turn(c)
        warpgroup.fence()
        gemm(self.score_op(), f.s, f.k, f.q[None, None, None, stage], overwrite=True)
        warpgroup.commit_group()
        if not first:
            self.issue_dk(c, number - 1)
        if self.dp_beside_scores:
            self.issue_dp(c, stage)
        self.give_turn(c)
        warpgroup.wait_group(int(self.dp_beside_scores))  # the scores are there, and dK
        if not first:
            release(b.q_empty + before)
        self.probabilities(c, values)
        if not whole:
            self.mask(c, work, visit)
        self.settle_probabilities(c)

        if early_dq:
            self.wait_ds(c, number - 1)
        warpgroup.fence()
        if not self.dp_beside_scores:
            self.issue_dp(c, stage)
        if early_dq:
            self.issue_dq(c, number - 1)
        gemm(self.dv_op(), f.dv, f.p, f.dout_by_columns[None, None, None, stage])
        warpgroup.commit_group()
        warpgroup.wait_group(1 + early_dq)  # dP is there
        self.score_gradients(c, values)
        if early_dq:
            warpgroup.wait_group(1)  # dQ is there
            release(b.ds_empty + before)
            self.stage_dq(c)
        cute.arch.mbarrier_wait(b.ds_empty + stage, parity ^ 1)
        if first:
            wait_for_staged()
        store, ds, to = f.store
        cute.copy(store, ds, to[None, None, None, stage * SIDES + c.side])
        self.written()
        release(b.ds_full + stage)
        if early_dq:
            add_staged(self.sums(c, work, previous), self.room(c), self.staged)
        warpgroup.wait_group(0)
        release(b.dout_empty + stage)
        self.all_written(c)
        if not first and not early_dq:
            self.wait_ds(c, number - 1)
            warpgroup.fence()
            self.issue_dq(c, number - 1)
            warpgroup.wait_group(0)
            release(b.ds_empty + before)
            self.add_dq(c, work, previous, number - 1)

    def skip(self, c: Consumer, work: KeyTile, visit: Visit, number: Int32):
        """The work's first visit, if no query of it sees any of the warpgroup's keys: dS = 0."""
        b = c.barriers
        stage, parity = number % STAGES, number // STAGES & 1
        cute.arch.mbarrier_wait(b.q_full + stage, parity)
        cute.arch.mbarrier_wait(b.dout_full + stage, parity)
        self.clear_queries(c, work, visit, stage)
        self.take_turn(c)
        self.give_turn(c)
        release(b.dout_empty + stage)
        c.f.ds_scores.fill(0.0)
        wait_for_staged()
        cute.arch.mbarrier_wait(b.ds_empty + stage, parity ^ 1)
        store, ds, to = c.f.store
        cute.copy(store, ds, to[None, None, None, stage * SIDES + c.side])
        self.written()
        release(b.ds_full + stage)
        self.all_written(c)

    def finish(self, c: Consumer, work: KeyTile, visit: Visit, number: Int32):
        """Add to dK and dQ what the last visit contributes."""
        self.wait_ds(c, number)
        warpgroup.fence()
        self.issue_dk(c, number)
        self.issue_dq(c, number)
        warpgroup.wait_group(0)
        release(c.barriers.q_empty + number % STAGES)
        release(c.barriers.ds_empty + number % STAGES)
        if self.zeroed:
            self.stage_dq(c)
            self.written()
            add_staged(self.sums(c, work, visit), self.room(c), self.staged)
        else:
            self.add_dq(c, work, visit, number)

    def take_turn(self, c: Consumer):
        """Wait until the other consumer has issued its scores, so that one's softmax is beside the other's products."""
        cute.arch.barrier(barrier_id=TURN + c.side, number_of_threads=CONSUMERS)

    def give_turn(self, c: Consumer):
        cute.arch.barrier_arrive(barrier_id=TURN + 1 - c.side, number_of_threads=CONSUMERS)

    def wait_ds(self, c: Consumer, number):
        cute.arch.mbarrier_wait(c.barriers.ds_full + number % STAGES, number // STAGES & 1)

    def issue_dp(self, c: Consumer, stage: Int32):
        """Issue dP^T = V dO^T."""
        gemm(self.score_op(), c.f.dp, c.f.v, c.f.dout[None, None, None, stage], overwrite=True)
        warpgroup.commit_group()

    def issue_dk(self, c: Consumer, number):
        """Issue dK += dS^T Q for the visit `number`."""
        stage = number % STAGES
        ds = c.f.ds_by_keys[None, None, None, stage * SIDES + c.side]
        gemm(self.dk_op(), c.f.dk, ds, c.f.q_by_columns[None, None, None, stage])
        warpgroup.commit_group()

    def issue_dq(self, c: Consumer, number):
        """Issue this consumer's columns of dQ = dS K for the visit `number`."""
        stage = number % STAGES
        gemm(self.dq_op(), c.f.dq, c.f.ds_by_queries[None, None, None, stage], c.f.k_by_columns, overwrite=True)
        warpgroup.commit_group()

    def probabilities(self, c: Consumer, values):
        """P^T = 2^(S^T scale - lse), rounded."""
        for j in range(VISIT_Q // 8):
            minus_lse = self.of_columns(c, values, j, 0)
            for e in range(4):
                score = c.f.s[4 * j + e] * c.scale_log2 + minus_lse[e % 2]
                c.f.p_scores[4 * j + e] = cute.math.exp2(score, fastmath=True).to(self.dtype)

    def settle_probabilities(self, c: Consumer):
        """Have later uses of P unpack the registers that dV takes, which else it would keep beside unpacked ones."""
        packed = cute.recast_tensor(c.f.p_scores, Int32)
        for i in range(cute.size(packed)):
            packed[i] = anew(packed[i])

    def score_gradients(self, c: Consumer, values):
        """dS^T = P^T (dP^T - delta), rounded."""
        for j in range(VISIT_Q // 8):
            minus_delta = self.of_columns(c, values, j, 1)
            for e in range(4):
                p = c.f.p_scores[4 * j + e].to(Float32)
                c.f.ds_scores[4 * j + e] = (p * (c.f.dp[4 * j + e] + minus_delta[e % 2])).to(self.dtype)

    def of_columns(self, c: Consumer, values, j: int, kind: int) -> cute.Tensor:
        """The value of query rows 8 j + 2 (lane % 4) + {0, 1}."""
        pair = cute.make_rmem_tensor(2, Float32)
        start = values.iterator + kind * VISIT_Q + 8 * j + c.thread % 4 * 2
        cute.autovec_copy(cute.make_tensor(start.align(8), cute.make_layout(2)), pair)
        return pair

    @cute.jit
    def mask(self, c, work, visit):
        """P = 0 where a query does not see a key, or the key does not exist."""
        first_key = c.side * ROWS
        # Of the visit's queries, the first that sees the warpgroup's first key.
        first = work.sees_first + first_key - visit.tile * VISIT_Q
        if (first + (ROWS - 1) > 0) | (work.keys < first_key + ROWS):
            for r in range_constexpr(2):
                key = c.row + 8 * r
                limit = cutlass.select_(first_key + key < work.keys, first + key, Int32(VISIT_Q))
                for j in range_constexpr(VISIT_Q // 8):
                    for i in range_constexpr(2):
                        e = 4 * j + 2 * r + i
                        hidden = 8 * j + c.thread % 4 * 2 + i < limit
                        p = c.f.p_scores[e]
                        c.f.p_scores[e] = cutlass.select_(hidden, self.dtype(0.0), p)

    def sums(self, c: Consumer, work: KeyTile, visit: Visit) -> cute.Pointer:
        """Where this warp's part of dQ is added up."""
        tile = c.gradients.dq_sums[visit.head, work.q_tile + visit.tile, None].iterator
        return tile + c.warp * self.dq_part

    def room(self, c: Consumer) -> cute.Pointer:
        """Where this warp stages its part of dQ."""
        return c.shared.staged.data_ptr() + c.warp * self.staged

    def stage_dq(self, c: Consumer):
        """Leave dQ where it can be added from, once what was staged before has been read."""
        wait_for_staged()
        stage_sums(c.f.dq, self.room(c), c.thread % 32, self.staged)

    @cute.jit
    def add_dq(self, c: Consumer, work: KeyTile, visit: Visit, number: Int32):
        """Add dQ of the visit `number`, or store it if it is the first part of its sums."""
        to, lane = self.sums(c, work, visit), c.thread % 32
        cute.arch.mbarrier_wait(c.barriers.dq_claimed + c.side, number & 1)
        if uniform(self.first_sums(c.shared)[c.side]) != 0:
            store_registers(to, c.f.dq, lane)
        else:
            self.stage_dq(c)
            self.written()
            add_staged(to, self.room(c), self.staged)
            add_registers(to, c.f.dq, lane, self.staged)
        cute.arch.sync_warp()
        release(c.barriers.dq_added + c.side)

    def written(self):
        """Let copies and tensor cores read what this warp has stored."""
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()

    @cute.jit
    def clear_keys(self, c, work):
        """Zero K and V beyond the sequence: 0 * NaN must not reach dQ.

        Either consumer does so, before it reads, of all that is there for both: they need not wait for each other.
        """
        if work.keys < TILE_KV:
            self.clear(c, c.shared.k.data_ptr(), TILE_KV, K_COLUMNS, self.k_chunks, Int32(0), work.keys)
            self.clear(c, c.shared.v.data_ptr(), TILE_KV, CHUNK, V_CHUNKS, Int32(0), work.keys)
            self.written()
            self.all_written(c)

    @cute.jit
    def clear_queries(self, c, work, visit, stage: Int32):
        """Zero Q and dO before the first query that sees a key and beyond the last one: neighbours may hold NaN."""
        first = visit.tile * VISIT_Q
        begin, end = work.blind - first, work.seqlen_qo - first
        if (begin > 0) | (end < VISIT_Q):
            q = c.shared.q.data_ptr() + stage * (self.chunks * Q_CHUNK_ELEMENTS)
            dout = c.shared.dout.data_ptr() + stage * (V_CHUNKS * Q_CHUNK_ELEMENTS)
            self.clear(c, q, VISIT_Q, CHUNK, self.chunks, begin, end)
            self.clear(c, dout, VISIT_Q, CHUNK, V_CHUNKS, begin, end)
            self.written()
            self.all_written(c)

    @cute.jit
    def clear(
        self, c, start: cute.Pointer, rows: cutlass.Constexpr, columns: cutlass.Constexpr, chunks: cutlass.Constexpr,
        begin: Int32, end: Int32,
    ):  # fmt: skip
        """Zero, in chunks of rows x columns, the rows before `begin` and from `end` on; a warp takes whole rows."""
        zeros = cute.make_rmem_tensor(UNIT, self.dtype)
        zeros.fill(0.0)
        threads = columns // UNIT  # of a row
        thread = anew(c.thread)
        for first in range_constexpr(0, rows, WARPGROUP // threads):
            row = first + thread // threads
            if (row < begin) | (row >= end):
                for chunk in range_constexpr(chunks):
                    to = start + (chunk * rows + row) * columns + thread % threads * UNIT
                    cute.autovec_copy(zeros, cute.make_tensor(to.align(16), zeros.layout))

    def all_written(self, c: Consumer):
        """Wait until all warps of the consumer have written."""
        cute.arch.barrier(barrier_id=WRITTEN + c.side, number_of_threads=WARPGROUP)

    def write(self, c, work, visits: Int32):
        """Write dK and dV of the keys that exist, staged where this warp's dS of the next two visits will be."""
        for chunk in range(V_CHUNKS):
            self.write_chunk(c, work, c.f.dv, c.gradients.dv, chunk, Float32(1.0), visits + chunk % STAGES)
        for chunk in range(self.chunks):
            self.write_chunk(c, work, c.f.dk, c.gradients.dk, chunk, c.scale, visits + chunk % STAGES)

    @cute.jit
    def write_chunk(
        self, c, work, gradient: cute.Tensor, to: OutputRows, chunk: cutlass.Constexpr, scale: Float32, visit: Int32
    ):  # fmt: skip
        """Write 64 columns of this warp's keys, staged where its dS of `visit` will be."""
        thread, stage = anew(c.thread), visit % STAGES
        cute.arch.mbarrier_wait(c.barriers.ds_empty + stage, (visit // STAGES & 1) ^ 1)
        wait_for_staged(STAGES - 1)
        factors = cute.make_rmem_tensor(2, Float32)
        factors.fill(scale)
        values = cute.make_rmem_tensor(c.f.ds_scores.layout, self.dtype)
        chunk_of(gradient, chunk, factors, values)
        tile = stage * SIDES + c.side
        store = self.store()
        slice_ = store.get_slice(thread)
        cute.copy(store, slice_.retile(values), slice_.partition_D(self.ds_by_keys(c.shared))[None, None, None, tile])
        self.written()
        of_side = uniform(thread // 32) * WARP_ROWS
        first = c.side * ROWS + of_side
        staged = c.shared.ds.data_ptr() + tile * (ROWS * VISIT_Q) + of_side * CHUNK
        write_rows(staged, to, work.kv_row + first, work.keys - first, work.kv_head, chunk, thread % 32)

    def ds_by_keys(self, shared) -> cute.Tensor:
        """dS^T [64 keys, 64 queries, tile], a tile for each consumer at each stage."""
        atom = warpgroup.make_smem_layout_atom(SmemLayoutAtomKind.K_SW128, self.dtype)
        layout = cute.tile_to_shape(atom, (ROWS, VISIT_Q, STAGES * SIDES), (0, 1, 2))
        return operand(shared.ds.data_ptr(), layout)


def compile_variant(dtype: str, d: int) -> aot.Compiled:
    """Compile for tensors of any extents whose rows are 16-byte aligned."""
    element = getattr(cutlass, dtype)
    total_q, total_kv, h_q, h_kv, offsets, tiles = (cute.sym_int() for _ in range(6))

    def rows(tokens, heads, columns):
        return aot.strided(element, (tokens, heads, columns), dense_last=True, align=16)

    return aot.compile_kernel(
        MHABackward(element, d),
        rows(total_q, h_q, D_V),
        aot.strided(Float32, (total_q, h_q)),
        rows(total_q, h_q, d),
        rows(total_kv, h_kv, d),
        rows(total_kv, h_kv, D_V),
        rows(total_q, h_q, D_V),
        aot.strided(Float32, (total_q, h_q)),
        aot.strided(Int32, (offsets,)),
        aot.strided(Int32, (offsets,)),
        rows(total_q, h_q, d),
        rows(total_kv, h_kv, d),
        rows(total_kv, h_kv, D_V),
        aot.strided(Float32, (2, h_q, total_q), dense_last=True),
        aot.strided(Float32, (h_q, tiles, VISIT_Q * d), dense_last=True, align=16),
        aot.compact(Int32, (h_q, tiles, SIDES)),
        aot.compact(Int32, (1,)),
        Float32(1.0), Float32(1.0), Int32(0), Int32(1),
    )  # fmt: skip
