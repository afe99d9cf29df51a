"""Two consumer warpgroups that keep the tensor cores busy in turns: the seesaw of FlashMLA, for 64 query rows.

Of each pair of 64-token KV blocks the left warpgroup scores block 0, the right one block 1; each hands its
probabilities to the other through shared memory, and each accumulates one half of the output's 512 columns. A block
lies in shared memory as chunks of 64 columns, K and V at once; the RoPE chunk, if there is one, is the last.

A kernel derives from `Seesaw`, brings K and Q, and says what a softmax step is (`softmax`) and, if it is not a place of
its own, where in shared memory P lies (`place_of_p`).

A consumer's code is made for one side, or for a side that is only known when it runs. With all code there twice, a
call's first microseconds went by waiting for instructions; with all of it shared, a pair takes 4 % longer. So pairs in
a loop have code for each side, and the rest is there once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr, range_constexpr
from cutlass.cute.nvgpu import warpgroup
from cutlass.cute.nvgpu.warpgroup import OperandSource

from flash_mla.backends.hopper.epilogue import write_scaled_row
from flash_mla.backends.hopper.fragments import BLOCK, D_V, V_CHUNKS, Registers
from flash_mla.backends.hopper.schedule import anew
from flash_mla.backends.hopper.softmax import NO_SCORE, quad_max, quad_sum, rescale
from flash_mla.backends.hopper.wgmma import (
    CHUNK,
    ROWS,
    gemm,
    half_layout,
    k_major_layout,
    pv_op,
    qk_op,
    tile_at,
    v_layout,
)

TILE = 2 * BLOCK  # tokens in a pair of blocks, one for each consumer warpgroup
CHUNK_ELEMENTS = ROWS * CHUNK
WARPGROUP = 128

# Chunks of a K block that come and are freed together: V columns of the left and the right consumer, and RoPE, unless
# that comes with the half of V of the side that does not score the block.
LEFT, RIGHT, ROPE = 0, 1, 2
GROUPS = ((0, 1, 2, 3), (4, 5, 6, 7), (8,))
# The same chunks, as a consumer sees them: its own half of V, the other's, and RoPE. Of the blocks, OWN is the one that
# it scores.
OWN, OTHER = 0, 1
PARTS = GROUPS

# Named barriers of the two consumer warpgroups.
P_READY = 1  # of the left side; the right side's is the next
SUMS_READY, P1_READ, SCORES_ISSUED = 3, 4, 5
FIRST_FREE_BARRIER = 6


@dataclass(frozen=True)
class Running:
    """What an online softmax carries from block to block, for each of a thread's two rows."""

    reference: cute.Tensor  # of the output accumulator and the sums, in unscaled scores
    row_sum: cute.Tensor  # this thread's and this side's part
    top: cute.Tensor | None  # the largest score, this thread's and this side's part; None if nobody asks for it

    @staticmethod
    def allocate(*, top: bool = True) -> Running:
        return Running(*(cute.make_rmem_tensor(2, Float32) if kept else None for kept in (True, True, top)))

    def reset(self):
        self.reference.fill(NO_SCORE)
        self.row_sum.fill(0.0)
        if self.top is not None:
            self.top.fill(-Float32.inf)


@dataclass(frozen=True)
class Position:
    """Where a pair is in its piece of work. A bool is known to the compiler."""

    begins: bool | Boolean  # the piece
    precedes_last: bool | Boolean
    closes: bool | Boolean  # the piece


@dataclass(frozen=True)
class Consumer:
    """A consumer warpgroup: what its steps share."""

    side: int | Int32  # LEFT or RIGHT, the same in a whole warp
    shared: Any
    barriers: Any
    f: Registers
    running: Running
    scale: Float32  # of scores, to base 2
    thread: Int32  # of the warpgroup
    has_room: bool = False  # whether there are registers for addresses to stay in from one use to the next

    @property
    def row(self):
        """The first of this thread's two rows, `row` and `row + 8`."""
        return self.thread // 32 * 16 + self.thread % 32 // 4

    @property
    def side_anew(self):
        """The side, as where its operands lie is told from it for each use: few registers are left to remember that."""
        return self.side if isinstance(self.side, int) else anew(self.side)

    @property
    def thread_anew(self):
        """The thread, as its addresses are told from it for each use if there is no room for them."""
        return self.thread if self.has_room else anew(self.thread)

    def group(self, part: int):
        """Which group of a block's chunks a part of them is."""
        return part if part == ROPE else self.side ^ part

    def of_rows(self, both_sides, of: int) -> cute.Tensor:
        """Of two values per row in shared memory, this side's (OWN) or the other's (OTHER)."""
        return both_sides.get_tensor(cute.make_layout((ROWS, 2)))[None, self.side ^ of]


class Seesaw:
    def __init__(
        self,
        dtype: type[cutlass.Numeric],
        d: int,
        *,
        cluster: int = 1,  # CTAs that bring K for each other
        rope_apart: bool = True,  # whether RoPE, if any, is a group of its own
        by_octets: bool = False,  # whether each half of V lies by 8 tokens, instead of by chunks
        steps: int = 1,  # in which a block's rows are freed: 1, or as many as P V takes k-blocks
    ):
        self.steps = steps
        self.cluster = cluster
        self.by_octets = by_octets
        self.dtype = dtype
        self.d = d
        self.chunks = d // CHUNK
        self.has_rope = self.chunks > V_CHUNKS
        rope_apart &= self.has_rope
        self.groups = GROUPS[: 3 if rope_apart else 2]
        rope = PARTS[ROPE] if self.has_rope and not rope_apart else ()
        self.parts = (PARTS[OWN], PARTS[OTHER] + rope, *PARTS[ROPE : len(self.groups)])
        # The order in which each consumer takes the parts of a block: its own half of V first, because that is freed
        # last.
        self.qk_order = (OWN, *((ROPE,) if rope_apart else ()), OTHER)

    # What a kernel adds.

    def place_of_p(self, c: Consumer, of: int) -> cute.Pointer:
        """Where in shared memory this side's P (OWN) or the other's lies."""
        return c.shared.p.data_ptr() + (c.side ^ of) * CHUNK_ELEMENTS

    def places_of_sums(self, c: Consumer) -> tuple[cute.Tensor, cute.Tensor]:
        """Where in shared memory this side's row sums lie when it is done with a piece of work, and the other's."""
        return c.of_rows(c.shared.sums, OWN), c.of_rows(c.shared.sums, OTHER)

    def free_p(self, c: Consumer):
        """Wait until this side's P in shared memory may be written, if it is used for anything else."""

    def softmax(self, c: Consumer, n, sums, parity, begins: bool | Boolean):
        """From c.f.s: c.f.p_scores and this thread's `sums` against n, which moves if it must; c.running.top.

        begins: whether n is of no score yet.
        """
        raise NotImplementedError

    def prepare_v(self, c: Consumer, of: int):
        """Make V of this side's block (OWN) or the other's fit to be multiplied; no wgmma is in flight."""

    def load_ahead(self, c: Consumer, work: Any):
        """Start loads that the end of the piece of work waits for: Q has been read, and no fence comes before it."""
        raise NotImplementedError

    # What it gets.

    def load_order(self) -> tuple:
        """(buffer, group of chunks) in the order in which consumers free and then need them."""
        rope = ((0, ROPE), (1, ROPE)) if len(self.groups) > ROPE else ()
        return (*rope, (0, LEFT), (0, RIGHT), (1, RIGHT), (1, LEFT))

    def wait_chunks(self, c: Consumer, part: int, parity):
        """Wait until a part of this side's block has arrived."""
        cute.arch.mbarrier_wait(c.barriers.k_full + (c.side * len(self.groups) + c.group(part)), parity)

    def q_and_k(self, c: Consumer) -> tuple[list, list]:
        """Descriptors of the chunks of Q's V columns, and of this side's block, as `PARTS` numbers them."""
        side = c.side_anew
        qk = cute.make_tiled_mma(qk_op(self.dtype, OperandSource.SMEM)).get_slice(0)
        q = qk.make_fragment_A(qk.partition_A(chunks_at(c.shared.q.data_ptr(), self.dtype, V_CHUNKS)))
        chunks = [V_CHUNKS // 2 * (side ^ part) + i for part in (OWN, OTHER) for i in range(V_CHUNKS // 2)]
        k = []
        for part in (OWN, OTHER):
            first = side * self.chunks + V_CHUNKS // 2 * (side ^ part)
            tile = tile_at(c.shared.k.data_ptr(), first, half_layout(self.dtype, self.by_octets))
            half = qk.make_fragment_B(qk.partition_B(tile))
            k += [half[None, None, None, i] for i in range(V_CHUNKS // 2)]
        if self.has_rope:
            tile = tile_at(c.shared.k.data_ptr(), side * self.chunks + V_CHUNKS, k_major_layout(self.dtype))
            k.append(qk.make_fragment_B(qk.partition_B(tile)))
        return [q[None, None, None, i] for i in chunks], k

    def issue_pv(self, c: Consumer, of: int, begins: bool | Boolean):
        """Issue and commit O += P V for this side's half of V of its block (OWN) or the other's; P is of the same side.

        begins: whether O = P V instead.
        """
        side = c.side_anew
        pv = cute.make_tiled_mma(pv_op(self.dtype, OperandSource.SMEM)).get_slice(0)
        first = (side ^ of) * self.chunks + V_CHUNKS // 2 * side
        half = tile_at(c.shared.k.data_ptr(), first, v_layout(self.dtype, self.by_octets))
        v = pv.make_fragment_B(pv.partition_B(half))
        source, p = OperandSource.RMEM, c.f.p
        if of == OTHER:
            tile = tile_at(self.place_of_p(replace(c, side=side), OTHER), 0, k_major_layout(self.dtype))
            source, p = OperandSource.SMEM, pv.make_fragment_A(pv.partition_A(tile))
        gemm(pv_op(self.dtype, source), c.f.o, p, v, overwrite=begins, commits=self.steps > 1)
        if self.steps == 1:
            warpgroup.commit_group()

    @cute.jit
    def issue_scores(self, c, parts: cutlass.Constexpr, parity, frees: cutlass.Constexpr = False):
        """Issue S (+)= Q K^T over parts of this side's block, each as soon as it has arrived.

        frees: whether the left side has P V in flight, and frees V behind that.
        """
        f = c.f
        all_q, all_k = self.q_and_k(c)
        for part in parts:
            self.wait_chunks(c, part, parity)
            for i in self.parts[part]:
                is_rope = i in PARTS[ROPE]
                source, q = (OperandSource.RMEM, f.q_rope) if is_rope else (OperandSource.SMEM, all_q[i])
                gemm(qk_op(self.dtype, source), f.s, q, all_k[i], overwrite=i == 0)
                if const_expr(frees and i == 0):
                    # What a side takes first has been free for long, so the tensor cores need not run dry; issuing more
                    # than a chunk of it before K's other buffer is freed would wait for the tensor cores.
                    warpgroup.commit_group()
                    if c.side == LEFT:
                        self.free_read(c, OTHER, 1, True)
        warpgroup.commit_group()

    def free(self, c: Consumer, block: int, part: int, step: int | None = None):
        """Tell the producers that a part of this side's (OWN) or the other's block, or a step of it, has been read."""
        if part >= len(self.groups):
            return
        first = ((c.side ^ block) * len(self.groups) + c.group(part)) * self.steps
        with cute.arch.elect_one():
            for i in range(self.steps) if step is None else (step,):
                self.signal(c, c.barriers.k_empty + (first + i))

    @cute.jit
    def free_read(self, c, block: cutlass.Constexpr, later: cutlass.Constexpr, is_read: bool | Boolean):
        """Wait until P V in flight has read V of a block, and tell the producers if it `is_read` at all.

        Step by step, so that the first rows of the next block are on their way while the last ones here are read.

        later: groups in flight behind P V.
        """
        for step in range_constexpr(self.steps):
            warpgroup.wait_group(later + self.steps - 1 - step)
            if is_read:
                self.free(c, block, OWN, step)

    def signal(self, c: Consumer, empty: cute.Pointer):
        """Arrive on a barrier of producers, those of the cluster's other CTA, too."""
        cute.arch.mbarrier_arrive(empty)
        if self.cluster > 1:
            cute.arch.mbarrier_arrive(empty, c.barriers.peer)

    def cluster_rank(self) -> Int32:
        return cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())

    def meet(self):
        """Wait for all threads of the cluster."""
        if self.cluster > 1:
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    @cute.jit
    def free_q(self, c, group, is_read: bool | Boolean):
        """Tell the producers that a group of Q's chunks has been read, if it has."""
        if is_read:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(c.barriers.q_empty + group)

    def hand_over(self, c: Consumer, n: cute.Tensor):
        """Give the other side this one's probabilities and the reference that they were taken against.

        It has read the previous ones: this side's scores are of K that came where that side's P V was done with V.
        """
        self.free_p(c)
        self.stage(c, self.place_of_p(c, OWN))
        c, maxima = replace(c, thread=c.thread_anew), c.of_rows(c.shared.maxima, OWN)
        maxima[c.row], maxima[c.row + 8] = n[0], n[1]
        cute.arch.barrier_arrive(barrier_id=P_READY + c.side, number_of_threads=2 * WARPGROUP)

    def stage(self, c: Consumer, to: cute.Pointer):
        """Write this side's 64 x 64 probabilities, or what else is in their registers, to a chunk of shared memory."""
        store, values = c.f.store
        chunk = store.get_slice(c.thread_anew).partition_D(tile_at(to, 0, k_major_layout(self.dtype)))
        cute.copy(store, values, chunk)

    def take_over(self, c: Consumer, n: cute.Tensor, begins: bool | Boolean):
        """Wait for the other side's probabilities, issue O += P V of them, and leave their reference in n.

        The fence is the reader's, who has no wgmma in flight: the writer's would wait for those.
        """
        cute.arch.barrier(barrier_id=P_READY + (c.side ^ OTHER), number_of_threads=2 * WARPGROUP)
        cute.arch.fence_proxy("async.shared", space="cta")
        c, maxima = replace(c, thread=c.thread_anew), c.of_rows(c.shared.maxima, OTHER)
        n[0], n[1] = maxima[c.row], maxima[c.row + 8]
        self.move_reference(c, n, begins)
        self.prepare_v(c, OTHER)
        warpgroup.fence()
        self.issue_pv(c, OTHER, begins)

    def accumulate(self, c: Consumer, n: cute.Tensor, sums: cute.Tensor, begins: bool | Boolean):
        """Issue O += P V of this side's probabilities, which were taken against n, and add this thread's `sums`."""
        row_sum = c.running.row_sum
        self.move_reference(c, n, begins)
        self.prepare_v(c, OWN)
        warpgroup.fence()
        self.issue_pv(c, OWN, begins)
        row_sum[0], row_sum[1] = row_sum[0] + sums[0], row_sum[1] + sums[1]

    def move_reference(self, c: Consumer, n: cute.Tensor, begins: bool | Boolean):
        """Take the reference n for O and the sums, of which there are none if the piece of work `begins`."""
        m = c.running.reference
        if begins is not False:
            m[0], m[1] = cutlass.select_(begins, n[0], m[0]), cutlass.select_(begins, n[1], m[1])
        rescale(c.f.o, c.running.row_sum, m, n[0], n[1], c.scale)

    @cute.jit
    def pair(self, c, parity, at, work):
        """One pair of K blocks: its scores are complete on entry, those of the next pair on exit, if there is one.

        No wgmma is in flight on entry and exit: one over a loop's back edge makes ptxas serialise all of them.

        parity: whether the number of those before it, of this and earlier work, is odd.
        at: its `Position`.
        work: of `load_ahead`.
        """
        n, sums = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32)
        n[0], n[1] = c.running.reference[0], c.running.reference[1]
        is_left = c.side == LEFT
        leads = at.begins & is_left
        self.free(c, OWN, ROPE)
        if at.closes:
            self.free_q(c, LEFT, True)
            self.free_q(c, RIGHT, at.begins | is_left)  # for a next pair the right side has done it
        if c.side == RIGHT:
            self.take_over(c, n, at.begins)

        self.softmax(c, n, sums, parity, leads)
        self.hand_over(c, n)
        warpgroup.wait_group(0)
        if c.side == RIGHT:
            self.free(c, OTHER, OWN)
        self.accumulate(c, n, sums, leads)
        if at.closes:
            self.load_ahead(c, work)
            if c.side == RIGHT:
                self.merge_sides(c)
        self.free_read(c, OWN, 0, True)

        if c.side == LEFT:
            self.take_over(c, n, False)
        if at.closes:
            if c.side == LEFT:
                self.merge_sides(c)
            # Only the left side's P V, but ptxas must see on all paths that nothing is left in flight.
            self.free_read(c, OTHER, 0, c.side == LEFT)
            if c.side == LEFT:
                cute.arch.barrier_arrive(barrier_id=P1_READ, number_of_threads=2 * WARPGROUP)
            else:
                cute.arch.barrier(barrier_id=P1_READ, number_of_threads=2 * WARPGROUP)
        else:
            if c.side == RIGHT:
                # The left side's scores are wanted first: they do not share the tensor cores with this side's.
                cute.arch.barrier(barrier_id=SCORES_ISSUED, number_of_threads=2 * WARPGROUP)
            warpgroup.fence()
            first, *rest = self.qk_order
            self.issue_scores(c, (first,), parity ^ 1, True)
            self.issue_scores(c, tuple(rest), parity ^ 1)
            if c.side == LEFT:
                cute.arch.barrier_arrive(barrier_id=SCORES_ISSUED, number_of_threads=2 * WARPGROUP)
            elif at.precedes_last:
                # This side is the last to read Q: half of the next one comes while it still reads the rest.
                warpgroup.wait_group(1)
                self.free_q(c, RIGHT, True)
            warpgroup.wait_group(0)

    @cute.jit
    def merge_sides(self, c):
        """Row sums and largest scores over all threads of a row and over both sides, in place, once both are final.

        What it leaves in shared memory is overwritten by the next piece of work behind barriers of that piece's pairs.
        """
        c = replace(c, thread=c.thread_anew)
        sums, other_sums = self.places_of_sums(c)
        row_sum, top = c.running.row_sum, c.running.top
        if const_expr(top is not None):
            tops, other_tops = c.of_rows(c.shared.tops, OWN), c.of_rows(c.shared.tops, OTHER)
        for r in range_constexpr(2):
            row_sum[r] = quad_sum(row_sum[r])
            if const_expr(top is not None):
                top[r] = quad_max(top[r])
            if c.thread % 4 == 0:
                sums[c.row + 8 * r] = row_sum[r]
                if const_expr(top is not None):
                    tops[c.row + 8 * r] = top[r]
        cute.arch.barrier(barrier_id=SUMS_READY, number_of_threads=2 * WARPGROUP)
        for r in range_constexpr(2):
            row_sum[r] = row_sum[r] + other_sums[c.row + 8 * r]
            if const_expr(top is not None):
                top[r] = cute.arch.fmax(top[r], other_tops[c.row + 8 * r])

    def inverse_and_lse(self, c: Consumer) -> tuple[cute.Tensor, cute.Tensor]:
        """(what this thread's two rows of O are multiplied by, their lse in base 2), once sums are merged.

        The lse of an empty row is -inf here.
        """
        inv, lse2 = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32)
        for r in range(2):
            total = c.running.row_sum[r]
            inv[r] = cutlass.select_(total > 0.0, cute.arch.rcp_approx(total), Float32(0.0))
            lse2[r] = cute.math.log2(total) + c.running.reference[r] * c.scale
        return inv, lse2

    @cute.jit
    def write_partials(self, args, c, count: Int32, inv: cute.Tensor, lse2: cute.Tensor, slot: Int32):
        """Write this side's half of a piece's partial result, of the first `count` rows, to the workspace."""
        lane, first = c.thread % 32, cute.arch.block_idx()[0] * ROWS
        for r in range_constexpr(2):
            row = c.row + 8 * r
            writes_values = row < count and lane % 4 == 0
            if writes_values and c.side == LEFT:
                args.partial_lse[slot, first + row] = lse2[r]
            to = args.partial_o[slot, first + row, None].iterator + c.side * (D_V // 2)
            scale = write_scaled_row(c.f.o, r, to, row < count, lane)
            if writes_values:
                args.partial_scale[slot, first + row, c.side] = scale * inv[r]


def chunks_at(base: cute.Pointer, dtype: type[cutlass.Numeric], count: int) -> cute.Tensor:
    """`count` chunks of shared memory from `base` on: [64 rows, 64 columns, chunk]."""
    layout = cute.tile_to_shape(k_major_layout(dtype), (ROWS, CHUNK, count), (0, 1, 2))
    return cute.make_tensor(cute.recast_ptr(base, layout.inner), layout.outer)


def mask_by_bits(scores: cute.Tensor, bits: list, lane: Int32):
    """Set the scores of tokens whose bit is 0 to -inf; bits: two words for the 64 tokens of a block."""
    mine = [word >> (2 * (lane % 4)) for word in bits]
    for j in range(8):
        for c in range(2):
            counts = (mine[j // 4] & (1 << (8 * (j % 4) + c))) != 0
            for r in range(2):
                e = 4 * j + 2 * r + c
                scores[e] = cutlass.select_(counts, scores[e], -Float32.inf)
