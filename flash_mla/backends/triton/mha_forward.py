"""Dense multi-head attention, forward: a program per tile of queries, head and sequence."""

from __future__ import annotations

import triton
import triton.language as tl

from flash_mla.backends.triton.mha_tiles import (
    FIRST,
    LOG2_E,
    first_of_tile,
    load_rest,
    load_rows,
    load_tile,
    offsets_in_tile,
    products,
    sequence,
    store_rows,
)


@triton.jit
def _softmax(s, scale, row_max, row_sum, NEGATIVE_SCALE: tl.constexpr):
    """Take scores s [n, m] into the rows' maxima [n] and sums [n, 8].

    Returns exponentials p [n, m], the factor [n] of what earlier ones were relative to, and the new maxima and sums.
    Columns that are equal modulo 8 are a thread's, so sums of those and, first, maxima of those cost no exchange.
    """
    groups = tl.reshape(s, [s.shape[0], s.shape[1] // 8, 8])
    extreme = tl.min(tl.min(groups, 1), 1) if NEGATIVE_SCALE else tl.max(tl.max(groups, 1), 1)
    new_max = tl.maximum(row_max, extreme * scale)
    reference = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row may have seen nothing yet
    p = tl.math.exp2(s * scale - reference[:, None])
    shrink = tl.math.exp2(row_max - reference)
    row_sum = row_sum * shrink[:, None] + tl.sum(tl.reshape(p, [p.shape[0], p.shape[1] // 8, 8]), 1)
    return p, shrink, new_max, row_sum


@triton.jit(do_not_specialize=("lse_stride_h", "h_q", "group", "tiles"))
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_seqlens_qo_ptr, cu_seqlens_kv_ptr,
    q_stride_h, k_stride_h, v_stride_h, out_stride_h, lse_stride_h, softmax_scale, h_q, group, tiles,
    q_stride_t: tl.constexpr, k_stride_t: tl.constexpr, v_stride_t: tl.constexpr, out_stride_t: tl.constexpr,
    REST: tl.constexpr, D_V: tl.constexpr, CAUSAL: tl.constexpr, NEGATIVE_SCALE: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_KV: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys that a tile of queries sees (FlashAttention-2, arXiv 2307.08691, algorithm 1).

    q [total_q, h_q, 128 + REST], k and v likewise with h_q / group heads, out [total_q, h_q, D_V], lse [total_q, h_q]
    with token stride 1. `tiles` is the number of query tiles of the longest sequence, the grid tiles * h_q * b.
    """
    program = tl.program_id(0)
    tile = program % tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # the tiles with the most keys start first
    head = (program // tiles % h_q).to(tl.int64)
    i = program // tiles // h_q
    start_q, s_q = sequence(cu_seqlens_qo_ptr, i)
    start_kv, s_kv = sequence(cu_seqlens_kv_ptr, i)  # before the branch, so that a program waits for memory once
    row = tile * TILE_Q
    if row >= s_q:
        return
    q_ptr += start_q * q_stride_t + head * q_stride_h
    k_ptr += start_kv * k_stride_t + head // group * k_stride_h
    v_ptr += start_kv * v_stride_t + head // group * v_stride_h
    out_ptr += start_q * out_stride_t + head * out_stride_h
    lse_ptr += start_q + head * lse_stride_h

    rows = row + tl.arange(0, TILE_Q)
    q = load_rows(q_ptr, row, s_q, q_stride_t, TILE_Q, 128)
    q_rest = load_rest(q_ptr, row, s_q, q_stride_t, TILE_Q, REST)
    # In units of log 2; never 0, so that a hidden score times it is -inf.
    scale = tl.where(softmax_scale == 0.0, 1e-30, softmax_scale * LOG2_E)
    row_max = tl.full([TILE_Q], float("-inf"), tl.float32)  # of the scaled scores
    row_sum = tl.zeros([TILE_Q, 8], tl.float32)
    acc = tl.zeros([TILE_Q, D_V], tl.float32)

    # A row sees the keys under its limit: all rows see those before `whole`, some row those before `stop`. One loop
    # takes both: between two, ptxas would have every product on Hopper wait for the one before.
    whole = s_kv
    stop = s_kv
    limits = tl.full([TILE_Q], s_kv, tl.int32)
    if CAUSAL:
        whole = tl.minimum(s_kv - s_q + row + 1, s_kv)
        stop = tl.minimum(s_kv - s_q + row + TILE_Q, s_kv)
        limits = tl.minimum(s_kv - s_q + rows + 1, s_kv)
    k_offsets = offsets_in_tile(s_kv, k_stride_t, TILE_KV, 128)
    k_rest_offsets = offsets_in_tile(s_kv, k_stride_t, TILE_KV, REST) if REST > 0 else 0
    v_offsets = offsets_in_tile(s_kv, v_stride_t, TILE_KV, D_V)
    for key in tl.range(0, stop, TILE_KV):
        first = first_of_tile(key, s_kv, TILE_KV)
        k = load_tile(k_ptr, first, k_stride_t, k_offsets)
        k_rest = load_tile(k_ptr + FIRST, first, k_stride_t, k_rest_offsets) if REST > 0 else 0.0
        s = products(q, q_rest, k, k_rest, REST)
        if key + TILE_KV > whole:
            keys = first + tl.arange(0, TILE_KV)
            sees = (keys >= key)[None, :] & (keys[None, :] < limits[:, None])
            s = tl.where(sees, s, float("inf") if NEGATIVE_SCALE else float("-inf"))
        p, shrink, row_max, row_sum = _softmax(s, scale, row_max, row_sum, NEGATIVE_SCALE)
        v = load_tile(v_ptr, first, v_stride_t, v_offsets)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])

    row_sum = tl.sum(row_sum, 1)
    sees_any = row_sum > 0.0
    row_sum = tl.where(sees_any, row_sum, 1.0)
    acc = acc * (1.0 / row_sum)[:, None]
    lse = tl.where(sees_any, row_max / LOG2_E + tl.math.log(row_sum), float("-inf"))
    store_rows(out_ptr, row, s_q, out_stride_t, acc, TILE_Q, D_V)
    tl.store(lse_ptr + rows, lse, mask=rows < s_q)
