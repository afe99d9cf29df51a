"""Online softmax on a 64 x 64 score accumulator: lazy rescaling, optimistic exponentials.

A thread holds 2 rows of the accumulator (r = 0, 1), 16 columns of each: element 4 j + 2 r + c is column
8 j + 2 (lane % 4) + c. The softmax reference m moves only when a row maximum exceeds it by more than 2^THRESHOLD: until
then probabilities above 1 are exact enough in fp32 sums and bf16 P, and the accumulator need not be rescaled.
"""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, range_constexpr

THRESHOLD = 8.0  # log2 of how far a score may exceed the reference
NO_SCORE = -1.0e30  # reference before any score: finite, so that differences of references are
LOG2_E = math.log2(math.e)
LN2 = math.log(2.0)


def row_max(scores: cute.Tensor, r: int) -> Float32:
    """Maximum over this thread's columns of its row r."""
    return largest([scores[4 * j + 2 * r + c] for j in range(8) for c in range(2)])


def largest(values: list) -> Float32:
    """Of at least one value, in a tree."""
    while len(values) > 1:
        left_over = values[-1:] if len(values) % 2 else []
        values = [cute.arch.fmax(values[i], values[i + 1]) for i in range(0, len(values) - 1, 2)] + left_over
    return values[0]


def quad_max(x: Float32) -> Float32:
    """Maximum over the four threads that share a row."""
    x = cute.arch.fmax(x, cute.arch.shuffle_sync_bfly(x, 1))
    return cute.arch.fmax(x, cute.arch.shuffle_sync_bfly(x, 2))


def quad_sum(x: Float32) -> Float32:
    """Sum over the four threads that share a row."""
    x = x + cute.arch.shuffle_sync_bfly(x, 1)
    return x + cute.arch.shuffle_sync_bfly(x, 2)


def exponentials(scores: cute.Tensor, p: cute.Tensor, sums: cute.Tensor, reference: cute.Tensor, scale: Float32):
    """p = 2^(scale (scores - reference)), rounded to p's dtype; sums = this thread's fp32 row sums. scores are kept."""
    offset = (reference[0] * scale, reference[1] * scale)
    partial: list = [None] * 4
    for j in range(8):
        for r in range(2):
            for c in range(2):
                e = 4 * j + 2 * r + c
                value = cute.math.exp2(scores[e] * scale - offset[r], fastmath=True)
                k = 2 * r + c
                partial[k] = value if partial[k] is None else partial[k] + value
                p[e] = value.to(p.element_type)
    sums[0] = partial[0] + partial[1]
    sums[1] = partial[2] + partial[3]


@cute.jit
def optimistic_softmax(scores: cute.Tensor, p: cute.Tensor, sums: cute.Tensor, reference: cute.Tensor, scale: Float32):
    """Exponentials against the old reference while the maximum is still being checked; a rare branch redoes them.

    reference: in: the reference so far; out: the one that p was taken against.
    """
    top0 = row_max(scores, 0)
    top1 = row_max(scores, 1)
    exponentials(scores, p, sums, reference, scale)
    if cute.arch.vote_any_sync(cute.arch.fmax(top0 - reference[0], top1 - reference[1]) * scale > THRESHOLD):
        top0 = quad_max(top0)
        top1 = quad_max(top1)
        reference[0] = cutlass.select_((top0 - reference[0]) * scale > THRESHOLD, top0, reference[0])
        reference[1] = cutlass.select_((top1 - reference[1]) * scale > THRESHOLD, top1, reference[1])
        exponentials(scores, p, sums, reference, scale)


@cute.jit
def rescale(o: cute.Tensor, row_sum: cute.Tensor, m: cute.Tensor, new0: Float32, new1: Float32, scale: Float32):
    """Move the reference of the output accumulator and of the row sums from m to (new0, new1), if it moves."""
    if cute.arch.vote_any_sync((new0 - m[0]) + (new1 - m[1]) != 0.0):
        s0 = cute.math.exp2((m[0] - new0) * scale, fastmath=True)
        s1 = cute.math.exp2((m[1] - new1) * scale, fastmath=True)
        for i in range_constexpr(cute.size(o) // 4):
            o[4 * i] = o[4 * i] * s0
            o[4 * i + 1] = o[4 * i + 1] * s0
            o[4 * i + 2] = o[4 * i + 2] * s1
            o[4 * i + 3] = o[4 * i + 3] * s1
        row_sum[0] = row_sum[0] * s0
        row_sum[1] = row_sum[1] * s1
        m[0] = new0
        m[1] = new1


@cute.jit
def mask(scores: cute.Tensor, first_token: Int32, limit0: Int32, limit1: Int32, lane: Int32):
    """Set the scores of tokens at or beyond a row's limit to -inf."""
    for j in range_constexpr(8):
        for c in range_constexpr(2):
            token = first_token + 8 * j + 2 * (lane % 4) + c
            scores[4 * j + c] = cutlass.select_(token < limit0, scores[4 * j + c], -Float32.inf)
            scores[4 * j + 2 + c] = cutlass.select_(token < limit1, scores[4 * j + 2 + c], -Float32.inf)
