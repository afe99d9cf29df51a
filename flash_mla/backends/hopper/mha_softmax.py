"""Online softmax on a 64 x n score accumulator that a warpgroup holds alone.

A thread holds 2 rows of the accumulator (r = 0, 1): element 4 j + 2 r + c is column 8 j + 2 (lane % 4) + c. The
reference of the exponentials is a row's maximum where scores are masked; elsewhere it stays as long as no thread's sum
of probabilities exceeds LIMIT, which takes no maximum: larger ones are as exact, and the output need not be rescaled.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, range_constexpr

from flash_mla.backends.hopper.softmax import quad_max

LIMIT = 256.0  # of a thread's sum over its columns of a tile, so of every probability: fp16 holds 65504


def row_max(scores: cute.Tensor, r: int) -> Float32:
    """Maximum over this thread's columns of its row r."""
    values = [scores[4 * j + 2 * r + c] for j in range(cute.size(scores) // 4) for c in range(2)]
    while len(values) > 1:
        pairs = [cute.arch.fmax(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[2 * len(pairs) :]
    return values[0]


def exponentials(scores: cute.Tensor, p: cute.Tensor, sums: cute.Tensor, reference: cute.Tensor, scale: Float32):
    """p = 2^(scale (scores - reference)), rounded to p's dtype; sums = this thread's fp32 row sums. scores are kept."""
    offset = (reference[0] * scale, reference[1] * scale)
    partial: list = [None] * 4
    for j in range(cute.size(scores) // 4):
        for k in range(4):
            e = 4 * j + k
            value = cute.math.exp2(scores[e] * scale - offset[k // 2], fastmath=True)
            partial[k] = value if partial[k] is None else partial[k] + value
            p[e] = value.to(p.element_type)
    sums[0] = partial[0] + partial[1]
    sums[1] = partial[2] + partial[3]


@cute.jit
def exact_softmax(scores: cute.Tensor, p: cute.Tensor, sums: cute.Tensor, reference: cute.Tensor, scale: Float32):
    """Exponentials against the maximum so far.

    reference: in: the largest score of earlier tiles; out: of this one too.
    """
    for r in range_constexpr(2):
        reference[r] = cute.arch.fmax(reference[r], quad_max(row_max(scores, r)))
    exponentials(scores, p, sums, reference, scale)


@cute.jit
def optimistic_softmax(scores: cute.Tensor, p: cute.Tensor, sums: cute.Tensor, reference: cute.Tensor, scale: Float32):
    """Exponentials against the old reference; a rare branch redoes the warp's with that of rows beyond LIMIT moved.

    reference: in: the reference so far; out: the one that p was taken against.
    """
    exponentials(scores, p, sums, reference, scale)
    if cute.arch.vote_any_sync(cute.arch.fmax(sums[0], sums[1]) > LIMIT):
        for r in range_constexpr(2):
            top = quad_max(row_max(scores, r))
            # Whether a row's reference moves depends on that row alone.
            reference[r] = cutlass.select_(quad_max(sums[r]) > LIMIT, cute.arch.fmax(reference[r], top), reference[r])
        exponentials(scores, p, sums, reference, scale)


@cute.jit
def mask(scores: cute.Tensor, first_key: Int32, limit0: Int32, limit1: Int32, lane: Int32):
    """Set the scores of keys at or beyond a row's limit to -inf."""
    for j in range_constexpr(cute.size(scores) // 4):
        for c in range_constexpr(2):
            key = first_key + 8 * j + 2 * (lane % 4) + c
            scores[4 * j + c] = cutlass.select_(key < limit0, scores[4 * j + c], -Float32.inf)
            scores[4 * j + 2 + c] = cutlass.select_(key < limit1, scores[4 * j + 2 + c], -Float32.inf)
