"""Two consumer warpgroups that keep the tensor cores busy in turns: the seesaw of FlashMLA, for 64 query rows.

Of each pair of 64-token KV blocks the left warpgroup scores block 0, the right one block 1; each hands its
probabilities to the other through shared memory, and each accumulates one half of the output's 512 columns. A block
lies in shared memory as chunks of 64 columns, K and V at once; the RoPE chunk, if there is one, is the last.

A kernel derives from `Seesaw` and says how K arrives (`wait_chunks`) and what a softmax step is (`softmax`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, range_constexpr
from cutlass.cute.nvgpu import warpgroup
from cutlass.cute.nvgpu.warpgroup import OperandSource

from flash_mla.backends.hopper.fragments import BLOCK, V_CHUNKS, Fragments
from flash_mla.backends.hopper.softmax import NO_SCORE, quad_max, quad_sum, rescale
from flash_mla.backends.hopper.wgmma import CHUNK, ROWS, gemm, k_major_layout, qk_op, tile_at

TILE = 2 * BLOCK  # tokens in a pair of blocks, one for each consumer warpgroup
CHUNK_ELEMENTS = ROWS * CHUNK
WARPGROUP = 128

# Chunks of a K block that come and are freed together: V columns of the left and the right consumer, and RoPE.
LEFT, RIGHT, ROPE = 0, 1, 2
GROUPS = ((0, 1, 2, 3), (4, 5, 6, 7), (8,))

# Named barriers of the two consumer warpgroups.
P0_READY, P1_READY, SUMS_READY, P1_READ, SCORES_ISSUED = 1, 2, 3, 4, 5


@dataclass(frozen=True)
class Running:
    """What an online softmax carries from block to block, for each of a thread's two rows."""

    reference: cute.Tensor  # of the output accumulator and the sums, in unscaled scores
    row_sum: cute.Tensor  # this thread's and this side's part
    top: cute.Tensor  # the largest score, this thread's and this side's part

    @staticmethod
    def allocate() -> Running:
        return Running(*(cute.make_rmem_tensor(2, Float32) for _ in range(3)))

    def reset(self):
        self.reference.fill(NO_SCORE)
        self.row_sum.fill(0.0)
        self.top.fill(-Float32.inf)


@dataclass(frozen=True)
class Consumer:
    """A consumer warpgroup: what its steps share."""

    side: int  # LEFT or RIGHT
    shared: Any
    barriers: Any
    f: Fragments
    running: Running
    scale: Float32  # of scores, to base 2
    thread: Int32  # of the warpgroup

    @property
    def row(self):
        """The first of this thread's two rows, `row` and `row + 8`."""
        return self.thread // 32 * 16 + self.thread % 32 // 4


class Seesaw:
    def __init__(self, dtype: type[cutlass.Numeric], d: int):
        self.dtype = dtype
        self.d = d
        self.chunks = d // CHUNK
        self.has_rope = self.chunks > V_CHUNKS
        self.groups = GROUPS[: 3 if self.has_rope else 2]
        # The order in which each consumer takes the groups: its own half of V first, because that is freed last.
        rope = (ROPE,) if self.has_rope else ()
        self.qk_order = ((LEFT, *rope, RIGHT), (RIGHT, *rope, LEFT))

    # What a kernel adds.

    def wait_chunks(self, c: Consumer, group: int, parity):
        """Wait until a group of chunks of this side's block has arrived."""
        raise NotImplementedError

    def free_p(self, c: Consumer):
        """Wait until this side's P in shared memory may be written, if it is used for anything else."""

    def softmax(self, c: Consumer, n, sums, parity, begins: bool | Boolean):
        """From c.f.s: c.f.p_scores and this thread's `sums` against n, which moves if it must; c.running.top.

        begins: whether n is of no score yet.
        """
        raise NotImplementedError

    # What it gets.

    def fragments(self, side: int, shared, thread) -> Fragments:
        p = [tile_at(x.data_ptr(), 0, k_major_layout(self.dtype)) for x in (shared.p0, shared.p1)]
        q, k = shared.q.data_ptr(), shared.k.data_ptr()
        return Fragments.of(self.dtype, side, thread, q, k, self.chunks, p[side], p[1 - side])

    def issue_scores(self, c: Consumer, groups: Sequence[int], parity, after_first: Callable[[], None] | None = None):
        """Issue S (+)= Q K^T over groups of chunks of this side's block, each as soon as it has arrived.

        after_first: called when the first chunk has been issued, as a group of wgmma of its own.
        """
        f, first_chunk = c.f, GROUPS[self.qk_order[c.side][0]][0]
        for group in groups:
            self.wait_chunks(c, group, parity)
            for chunk in GROUPS[group]:
                source, q = (OperandSource.RMEM, f.q_rope) if group == ROPE else (OperandSource.SMEM, f.q[chunk])
                gemm(qk_op(self.dtype, source), f.s, q, f.k[chunk], overwrite=chunk == first_chunk)
                if after_first is not None and chunk == first_chunk:
                    warpgroup.commit_group()
                    after_first()
        warpgroup.commit_group()

    def free(self, c: Consumer, buffer: int, group: int):
        """Tell the producers that a group of chunks has been read."""
        if group == ROPE and not self.has_rope:
            return
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(c.barriers.k_empty + (buffer * len(self.groups) + group))

    @cute.jit
    def free_q(self, c, group: cutlass.Constexpr, is_read: bool | Boolean):
        """Tell the producers that a group of Q's chunks has been read, if it has."""
        if is_read:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(c.barriers.q_empty + group)

    def hand_over(self, c: Consumer, p_max: cute.Tensor, n: cute.Tensor, ready: int):
        """Give the other side this one's probabilities and the reference that they were taken against.

        It has read the previous ones: this side's scores are of K that came where that side's P V was done with V.
        """
        self.free_p(c)
        cute.copy(c.f.p_out[0], c.f.p_out[1], c.f.p_out[2])
        p_max[c.row], p_max[c.row + 8] = n[0], n[1]
        cute.arch.barrier_arrive(barrier_id=ready, number_of_threads=2 * WARPGROUP)

    def take_over(self, c: Consumer, p_max: cute.Tensor, n: cute.Tensor, ready: int):
        """Wait for the other side's probabilities and read their reference.

        The fence is the reader's, who has no wgmma in flight: the writer's would wait for those.
        """
        cute.arch.barrier(barrier_id=ready, number_of_threads=2 * WARPGROUP)
        cute.arch.fence_proxy("async.shared", space="cta")
        n[0], n[1] = p_max[c.row], p_max[c.row + 8]

    def pair(self, c: Consumer, pairs, begins, precedes_last):
        """One pair of K blocks, not the last one: its scores are complete on entry, those of the next pair on exit.

        pairs: how many went before, of this and earlier work.
        begins: whether it is the first of a piece of work.
        precedes_last: whether the next one is the piece's last.
        """
        if c.side == LEFT:
            self.pair_left(c, pairs & 1, begins, None)
        else:
            self.pair_right(c, pairs & 1, begins, None, precedes_last)

    def last_pair(self, c: Consumer, pairs, begins, prepare: tuple):
        """The last pair of a piece of work. K's and P's buffers are free on exit, and the sides are merged.

        prepare: (function, its arguments), called when Q has been read and nothing that it loads can hold up a fence;
        its result is returned.
        """
        if c.side == LEFT:
            return self.pair_left(c, pairs & 1, begins, prepare)
        return self.pair_right(c, pairs & 1, begins, prepare)

    def move_reference(self, c: Consumer, n: cute.Tensor, begins: bool | Boolean = False):
        """Take the reference n for O and the sums, of which there are none if the piece of work `begins`."""
        m = c.running.reference
        if begins is not False:
            m[0], m[1] = cutlass.select_(begins, n[0], m[0]), cutlass.select_(begins, n[1], m[1])
        rescale(c.f.o, c.running.row_sum, m, n[0], n[1], c.scale)

    def pair_left(self, c: Consumer, parity, begins, prepare: tuple | None):
        f, m, row_sum = c.f, c.running.reference, c.running.row_sum
        n, sums = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32)
        max0, max1 = (x.get_tensor(cute.make_layout(ROWS)) for x in (c.shared.max0, c.shared.max1))
        prepared = None

        n[0], n[1] = m[0], m[1]
        self.softmax(c, n, sums, parity, begins)
        self.hand_over(c, max0, n, P0_READY)
        self.move_reference(c, n, begins)
        warpgroup.fence()
        f.issue_pv(f.p, 0, begins)
        warpgroup.commit_group()
        row_sum[0], row_sum[1] = row_sum[0] + sums[0], row_sum[1] + sums[1]
        self.free(c, 0, ROPE)
        if prepare is not None:
            prepared = prepare[0](*prepare[1:])
        warpgroup.wait_group(0)
        self.free(c, 0, LEFT)

        self.take_over(c, max1, n, P1_READY)
        self.move_reference(c, n)
        warpgroup.fence()
        f.issue_pv(f.p_in, 1)
        warpgroup.commit_group()
        if prepare is None:
            # What this side takes first has been free for long, so the tensor cores need not run dry; issuing more than
            # a chunk of it before K's other buffer is freed would wait for the tensor cores.
            self.issue_scores(c, self.qk_order[LEFT], parity ^ 1, lambda: self.free_behind_scores(c))
            cute.arch.barrier_arrive(barrier_id=SCORES_ISSUED, number_of_threads=2 * WARPGROUP)
            warpgroup.wait_group(0)
        else:
            self.merge_sides(c)
            warpgroup.wait_group(0)
            self.free(c, 1, LEFT)
            cute.arch.barrier_arrive(barrier_id=P1_READ, number_of_threads=2 * WARPGROUP)
        return prepared

    def free_behind_scores(self, c: Consumer):
        """The left side is done with V of buffer 1 when all but the last group of wgmma are."""
        warpgroup.wait_group(1)
        self.free(c, 1, LEFT)

    def pair_right(self, c: Consumer, parity, begins, prepare: tuple | None, precedes_last=False):
        f, row_sum = c.f, c.running.row_sum
        n, sums = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32)
        max0, max1 = (x.get_tensor(cute.make_layout(ROWS)) for x in (c.shared.max0, c.shared.max1))
        prepared = None

        self.free(c, 1, ROPE)
        self.take_over(c, max0, n, P0_READY)
        self.move_reference(c, n, begins)
        warpgroup.fence()
        f.issue_pv(f.p_in, 0, begins)
        warpgroup.commit_group()
        self.softmax(c, n, sums, parity, False)
        self.hand_over(c, max1, n, P1_READY)
        warpgroup.wait_group(0)
        self.free(c, 0, RIGHT)

        self.move_reference(c, n)
        warpgroup.fence()
        f.issue_pv(f.p, 1)
        warpgroup.commit_group()
        row_sum[0], row_sum[1] = row_sum[0] + sums[0], row_sum[1] + sums[1]
        if prepare is not None:
            prepared = prepare[0](*prepare[1:])
            self.merge_sides(c)
        warpgroup.wait_group(0)
        self.free(c, 1, RIGHT)
        if prepare is not None:
            cute.arch.barrier(barrier_id=P1_READ, number_of_threads=2 * WARPGROUP)
        else:
            first, *rest = self.qk_order[RIGHT]
            # The left side's scores are wanted first: they do not share the tensor cores with this side's.
            cute.arch.barrier(barrier_id=SCORES_ISSUED, number_of_threads=2 * WARPGROUP)
            warpgroup.fence()
            self.issue_scores(c, (first,), parity ^ 1)
            self.issue_scores(c, rest, parity ^ 1)
            # This side is the last to read Q: half of the next one comes while it still reads the rest.
            warpgroup.wait_group(1)
            self.free_q(c, first, precedes_last)
            warpgroup.wait_group(0)
        return prepared

    def by_side(self, side: int, left, right) -> tuple:
        """(this side's, the other side's) of two values per row in shared memory."""
        left, right = (x.get_tensor(cute.make_layout(ROWS)) for x in (left, right))
        return (left, right) if side == LEFT else (right, left)

    @cute.jit
    def merge_sides(self, c):
        """Row sums and largest scores over all threads of a row and over both sides, in place, once both are final.

        What it leaves in shared memory is overwritten by the next piece of work behind barriers of that piece's pairs.
        """
        sums, other_sums = self.by_side(c.side, c.shared.sum0, c.shared.sum1)
        tops, other_tops = self.by_side(c.side, c.shared.top0, c.shared.top1)
        row_sum, top = c.running.row_sum, c.running.top
        for r in range_constexpr(2):
            row_sum[r], top[r] = quad_sum(row_sum[r]), quad_max(top[r])
            if c.thread % 4 == 0:
                sums[c.row + 8 * r], tops[c.row + 8 * r] = row_sum[r], top[r]
        cute.arch.barrier(barrier_id=SUMS_READY, number_of_threads=2 * WARPGROUP)
        for r in range_constexpr(2):
            row_sum[r] = row_sum[r] + other_sums[c.row + 8 * r]
            top[r] = cute.arch.fmax(top[r], other_tops[c.row + 8 * r])


def mask_by_bits(scores: cute.Tensor, bits: list, lane: Int32):
    """Set the scores of tokens whose bit is 0 to -inf; bits: two words for the 64 tokens of a block."""
    mine = [word >> (2 * (lane % 4)) for word in bits]
    for j in range(8):
        for c in range(2):
            counts = (mine[j // 4] & (1 << (8 * (j % 4) + c))) != 0
            for r in range(2):
                e = 4 * j + 2 * r + c
                scores[e] = cutlass.select_(counts, scores[e], -Float32.inf)
