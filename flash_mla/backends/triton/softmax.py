"""Online softmax over tiles of KV (FlashAttention, arXiv 2205.14135), in base 2, and where its results go."""

from __future__ import annotations

import triton
import triton.language as tl

from flash_mla.backends.triton.dequant import NOPE

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_offsets(u0, u1, rows, rows_1, stride_u0, stride_u1, stride_r0, stride_r1):
    """Offsets of `rows` [n] of unit (u0, u1) in a tensor [u0, u1, r0, r1, ...], where rows count r0 * rows_1 + r1."""
    unit = u0.to(tl.int64) * stride_u0 + u1.to(tl.int64) * stride_u1
    return unit + (rows // rows_1).to(tl.int64) * stride_r0 + (rows % rows_1).to(tl.int64) * stride_r1


@triton.jit
def load_q(q_ptr, offsets, exists, COLUMNS: tl.constexpr, D_ROPE: tl.constexpr):
    """The query rows at `offsets` [n], 0 unless `exists` [n], cut as KV is: [n, 512] and [n, D_ROPE]."""
    q = tl.load(q_ptr + offsets[:, None] + tl.arange(0, NOPE)[None, :], mask=exists[:, None], other=0.0)
    if D_ROPE > 0:
        rope_ptrs = q_ptr + offsets[:, None] + COLUMNS + tl.arange(0, D_ROPE)[None, :]
        q_rope = tl.load(rope_ptrs, mask=exists[:, None], other=0.0)
    else:
        q_rope = 0.0
    return q, q_rope


@triton.jit
def start(ROWS: tl.constexpr, D_V_ROPE: tl.constexpr):
    """The result of query rows that have seen nothing: `top`, `total`, `acc` and `acc_rope` of `attend`."""
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = _parts_of_sums(tl.zeros([ROWS, 16], tl.float32))
    return top, total, tl.zeros([ROWS, NOPE], tl.float32), tl.zeros([ROWS, D_V_ROPE if D_V_ROPE > 0 else 1], tl.float32)


@triton.jit
def _parts_of_sums(x):
    """The sums of the rows of x [rows, n] so far as they cost no exchange between threads.

    Where 64 rows are multiplied at a time two warpgroups have half of the columns each, and a thread of theirs those
    that are equal modulo 8: the sums are [rows, 2, 8]. Elsewhere they are [rows].
    """
    return tl.sum(tl.reshape(x, [64, 2, x.shape[1] // 16, 8]), 2) if x.shape[0] == 64 else tl.sum(x, 1)


@triton.jit
def whole(total, ROWS: tl.constexpr):
    """The sums [ROWS] of which `attend` returns parts."""
    if ROWS == 64:
        total = tl.sum(tl.sum(total, 2), 1)
    return total


@triton.jit
def score(q, q_rope, nope, rope, scale_log2, D_ROPE: tl.constexpr):
    """q times a tile of KV, scaled: [rows, n] fp32, of q [rows, 512] and nope [n, 512] with the rope parts beside them.

    What comes of it has to pass through a branch before it is multiplied again, or the compiler sees the chain of
    products and has every warpgroup compute all scores.
    """
    scores = tl.dot(q, tl.trans(nope)) * scale_log2
    if D_ROPE > 0:
        scores += tl.dot(q_rope, tl.trans(rope)) * scale_log2
    return scores


@triton.jit
def attend(scores, nope, rope, top, total, acc, acc_rope, D_V_ROPE: tl.constexpr):
    """Take a tile of KV into the result of some query rows, given their scores [rows, n], -inf where there is none.

    V is nope [n, 512], and rope [n, D_V_ROPE] if any. Returns the rows' new maxima `top` [rows], `total`, of which
    `whole` makes their sums, and unnormalised outputs `acc` [rows, 512] and `acc_rope` [rows, D_V_ROPE], all fp32.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen no token yet has the maximum -inf, and -inf - -inf would be NaN.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    probs = tl.exp2(scores - base[:, None])
    rescale = tl.exp2(top - base)
    if scores.shape[0] == 64:
        total = total * rescale[:, None, None] + _parts_of_sums(probs)
    else:
        total = total * rescale + _parts_of_sums(probs)
    probs = probs.to(nope.dtype)
    acc = tl.dot(probs, nope, acc * rescale[:, None])
    if D_V_ROPE > 0:
        acc_rope = tl.dot(probs, rope, acc_rope * rescale[:, None])
    return new_top, total, acc, acc_rope


@triton.jit
def sink_factor(sink, lse_log2):
    """exp(lse) / (exp(lse) + exp(sink)) [n], for the logarithms `sink` of base e and `lse_log2` of base 2."""
    # A row that has seen nothing has the lse -inf, and -inf - -inf would be NaN.
    return tl.where(lse_log2 == float("-inf"), 1.0, 1.0 / (1.0 + tl.exp2(sink * LOG2_E - lse_log2)))


@triton.jit
def natural(lse_log2):
    """The lse that callers get: of base e, +inf for a row that has seen nothing."""
    return tl.where(lse_log2 == float("-inf"), float("inf"), lse_log2 * LN_2)


@triton.jit
def store_out(ptr, offsets, exists, acc, acc_rope, factor, COLUMNS: tl.constexpr, D_V_ROPE: tl.constexpr):
    """Write `acc` and `acc_rope` times `factor` [n] to the rows at `offsets` [n] that exist."""
    columns = tl.arange(0, NOPE)[None, :]
    ptrs = ptr + offsets[:, None]
    out = (acc * factor[:, None]).to(ptr.dtype.element_ty)
    if D_V_ROPE > 0:
        tl.store(ptrs + columns, out, mask=exists[:, None] & (columns < COLUMNS))
        out_rope = (acc_rope * factor[:, None]).to(ptr.dtype.element_ty)
        tl.store(ptrs + COLUMNS + tl.arange(0, D_V_ROPE)[None, :], out_rope, mask=exists[:, None])
    else:
        tl.store(ptrs + columns, out, mask=exists[:, None])
