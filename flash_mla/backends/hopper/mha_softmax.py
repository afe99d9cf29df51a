"""Online softmax on a 64 x n score accumulator that a warpgroup holds alone.

A thread holds 2 rows of the accumulator (r = 0, 1): element 4 j + 2 r + c is column 8 j + 2 (lane % 4) + c. The
reference of the exponentials is a row's maximum where scores are masked; elsewhere it stays as long as no thread's sum
of probabilities exceeds LIMIT, which takes no maximum: larger ones are as exact, and the output need not be rescaled.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, range_constexpr

from flash_mla.backends.hopper.softmax import NO_SCORE, largest, quad_max, rescale

LIMIT = 256.0  # of a thread's sum over its columns of a tile, so of every probability: fp16 holds 65504


@dataclass(frozen=True)
class Total:
    """What a thread's two rows have added up to, over the tiles of keys visited."""

    o: cute.Tensor  # the output accumulator
    row_sum: cute.Tensor  # of probabilities, this thread's part
    reference: cute.Tensor  # of both, in unscaled scores

    def clear(self):
        """As before the first tile of keys."""
        self.o.fill(0.0)
        self.row_sum.fill(0.0)
        self.reference.fill(NO_SCORE)


def row_max(scores: cute.Tensor, r: int) -> Float32:
    """Maximum over this thread's columns of its row r."""
    return largest([scores[4 * j + 2 * r + c] for j in range(cute.size(scores) // 4) for c in range(2)])


def exponentials(scores: cute.Tensor, p: cute.Tensor, reference: cute.Tensor, scale: Float32) -> tuple:
    """p = 2^(scale (scores - reference)), rounded to p's dtype; returns this thread's fp32 row sums. Keeps scores."""
    offset = (reference[0] * scale, reference[1] * scale)
    partial: list = [None] * 4
    for j in range(cute.size(scores) // 4):
        for k in range(4):
            e = 4 * j + k
            value = cute.math.exp2(scores[e] * scale - offset[k // 2], fastmath=True)
            partial[k] = value if partial[k] is None else partial[k] + value
            p[e] = value.to(p.element_type)
    return partial[0] + partial[1], partial[2] + partial[3]


@cute.jit
def exact_softmax(scores: cute.Tensor, p: cute.Tensor, total, scale: Float32, begins: cutlass.Constexpr = False):
    """Exponentials against the maximum so far, to which the total moves; their sums are added to it.

    begins: whether the total is still clear.
    """
    reference = cute.make_rmem_tensor(2, Float32)
    for r in range_constexpr(2):
        reference[r] = cute.arch.fmax(total.reference[r], quad_max(row_max(scores, r)))
    sums = exponentials(scores, p, reference, scale)
    if cutlass.const_expr(begins):
        for r in range_constexpr(2):
            total.reference[r] = reference[r]
    else:
        rescale(total.o, total.row_sum, total.reference, reference[0], reference[1], scale)
    for r in range_constexpr(2):
        total.row_sum[r] = total.row_sum[r] + sums[r]


@cute.jit
def optimistic_softmax(scores: cute.Tensor, p: cute.Tensor, total, scale: Float32):
    """Exponentials against the total's reference; their sums are added to it.

    A rare branch redoes the warp's with the reference of rows beyond LIMIT moved.
    """
    sums = cute.make_rmem_tensor(2, Float32)
    sums[0], sums[1] = exponentials(scores, p, total.reference, scale)
    if cute.arch.vote_any_sync(cute.arch.fmax(sums[0], sums[1]) > LIMIT):
        reference = cute.make_rmem_tensor(2, Float32)
        for r in range_constexpr(2):
            old, top = total.reference[r], quad_max(row_max(scores, r))
            # Whether a row's reference moves depends on that row alone.
            reference[r] = cutlass.select_(quad_max(sums[r]) > LIMIT, cute.arch.fmax(old, top), old)
        sums[0], sums[1] = exponentials(scores, p, reference, scale)
        rescale(total.o, total.row_sum, total.reference, reference[0], reference[1], scale)
    for r in range_constexpr(2):
        total.row_sum[r] = total.row_sum[r] + sums[r]


@cute.jit
def mask(scores: cute.Tensor, first_key: Int32, limit0: Int32, limit1: Int32, lane: Int32):
    """Set the scores of keys at or beyond a row's limit to -inf."""
    first = first_key + 2 * (lane % 4)
    for r, limit in enumerate((limit0 - first, limit1 - first)):
        for c in range_constexpr(2):
            n = cutlass.min(cutlass.max((limit - c + 7) >> 3, 0), cute.size(scores) // 4)
            bits = (Int32(1) << n) - 1
            for j in range_constexpr(cute.size(scores) // 4):
                e = 4 * j + 2 * r + c
                scores[e] = cutlass.select_((bits >> j) & 1 != 0, scores[e], -Float32.inf)
