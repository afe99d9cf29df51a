"""Dense multi-head attention, backward, as three kernels: delta; dq by tiles of queries; dk and dv by tiles of keys.

With P = exp(S - lse) and dP = dout V^T, dS = P * (dP - delta), where delta = rowsum(dout * out) - dlse
(FlashAttention-2, arXiv 2307.08691, algorithm 2; lse adds the last term since its gradient by S is P). P is computed
twice, once for dq and once for dk and dv, so that one program sums a gradient in one order: the same bits on every run.
"""

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


@triton.jit(do_not_specialize=("total_q", "h_q"))
def delta_kernel(
    dout_ptr, out_ptr, dlse_ptr, delta_ptr,
    dout_stride_t, dout_stride_h, out_stride_t, out_stride_h, dlse_stride_t, dlse_stride_h,
    total_q, h_q,
    D_V: tl.constexpr, HAS_DLSE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """delta [h_q, total_q] fp32, for a tile of tokens of a head. The grid is h_q times the tiles."""
    head = (tl.program_id(0) % h_q).to(tl.int64)
    token = tl.program_id(0) // h_q * TILE
    dout = load_rows(dout_ptr + head * dout_stride_h, token, total_q, dout_stride_t, TILE, D_V)
    out = load_rows(out_ptr + head * out_stride_h, token, total_q, out_stride_t, TILE, D_V)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tokens = token + tl.arange(0, TILE)
    if HAS_DLSE:
        dlse_ptrs = dlse_ptr + head * dlse_stride_h + tokens.to(tl.int64) * dlse_stride_t
        delta -= tl.load(dlse_ptrs, mask=tokens < total_q, other=0.0)
    tl.store(delta_ptr + head * total_q + tokens, delta, mask=tokens < total_q)


@triton.jit(do_not_specialize=("lse_stride_h", "delta_stride_h", "h_q", "group", "tiles"))
def dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, cu_seqlens_qo_ptr, cu_seqlens_kv_ptr,
    q_stride_h, k_stride_h, v_stride_h, dout_stride_h, lse_stride_h, delta_stride_h, dq_stride_h,
    softmax_scale, h_q, group, tiles,
    q_stride_t: tl.constexpr, k_stride_t: tl.constexpr, v_stride_t: tl.constexpr, dout_stride_t: tl.constexpr,
    dq_stride_t: tl.constexpr,
    REST: tl.constexpr, D_V: tl.constexpr, CAUSAL: tl.constexpr, TILE_Q: tl.constexpr, TILE_KV: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries of a head: programs, shapes and strides as in the forward kernel."""
    program = tl.program_id(0)
    tile = program % tiles
    if CAUSAL:
        tile = tiles - 1 - tile
    head = (program // tiles % h_q).to(tl.int64)
    i = program // tiles // h_q
    start_q, s_q = sequence(cu_seqlens_qo_ptr, i)
    row = tile * TILE_Q
    if row >= s_q:
        return
    start_kv, s_kv = sequence(cu_seqlens_kv_ptr, i)
    q_ptr += start_q * q_stride_t + head * q_stride_h
    k_ptr += start_kv * k_stride_t + head // group * k_stride_h
    v_ptr += start_kv * v_stride_t + head // group * v_stride_h
    dout_ptr += start_q * dout_stride_t + head * dout_stride_h
    dq_ptr += start_q * dq_stride_t + head * dq_stride_h

    rows = row + tl.arange(0, TILE_Q)
    q = load_rows(q_ptr, row, s_q, q_stride_t, TILE_Q, 128)
    q_rest = load_rest(q_ptr, row, s_q, q_stride_t, TILE_Q, REST)
    dout = load_rows(dout_ptr, row, s_q, dout_stride_t, TILE_Q, D_V)
    lse = tl.load(lse_ptr + head * lse_stride_h + start_q + rows, mask=rows < s_q, other=0.0) * LOG2_E
    delta = tl.load(delta_ptr + head * delta_stride_h + start_q + rows, mask=rows < s_q, other=0.0)
    scale = softmax_scale * LOG2_E
    dq = tl.zeros([TILE_Q, 128], tl.float32)
    dq_rest = tl.zeros([TILE_Q, 64], tl.float32)

    whole = s_kv
    stop = s_kv
    if CAUSAL:
        whole = tl.minimum(s_kv - s_q + row + 1, s_kv)
        stop = tl.minimum(s_kv - s_q + row + TILE_Q, s_kv)
    k_offsets = offsets_in_tile(s_kv, k_stride_t, TILE_KV, 128)
    k_rest_offsets = offsets_in_tile(s_kv, k_stride_t, TILE_KV, REST) if REST > 0 else 0
    v_offsets = offsets_in_tile(s_kv, v_stride_t, TILE_KV, D_V)
    for key in tl.range(0, stop, TILE_KV):
        first = first_of_tile(key, s_kv, TILE_KV)
        k = load_tile(k_ptr, first, k_stride_t, k_offsets)
        k_rest = load_tile(k_ptr + FIRST, first, k_stride_t, k_rest_offsets) if REST > 0 else 0.0
        v = load_tile(v_ptr, first, v_stride_t, v_offsets)
        p = tl.math.exp2(products(q, q_rest, k, k_rest, REST) * scale - lse[:, None])
        ds = p * (tl.dot(dout, tl.trans(v)) - delta[:, None])
        if key + TILE_KV > whole:
            keys = first + tl.arange(0, TILE_KV)
            sees = ((keys >= key) & (keys < s_kv))[None, :]
            if CAUSAL:
                sees = sees & (keys[None, :] <= (s_kv - s_q + rows)[:, None])
            # Also where p overflowed, or a row that sees nothing has lse -inf and any dout.
            ds = tl.where(sees, ds, 0.0)
        ds = ds.to(k.dtype)
        dq = tl.dot(ds, k, dq)
        if REST > 0:
            dq_rest = tl.dot(ds, k_rest, dq_rest)

    store_rows(dq_ptr, row, s_q, dq_stride_t, dq * softmax_scale, TILE_Q, 128)
    if REST > 0:
        store_rows(dq_ptr + 128, row, s_q, dq_stride_t, dq_rest * softmax_scale, TILE_Q, REST)


@triton.jit(do_not_specialize=("lse_stride_h", "delta_stride_h", "h_kv", "group", "tiles"))
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_seqlens_qo_ptr, cu_seqlens_kv_ptr,
    q_stride_h, k_stride_h, v_stride_h, dout_stride_h, lse_stride_h, delta_stride_h, dk_stride_h, dv_stride_h,
    softmax_scale, h_kv, group, tiles,
    q_stride_t: tl.constexpr, k_stride_t: tl.constexpr, v_stride_t: tl.constexpr, dout_stride_t: tl.constexpr,
    dk_stride_t: tl.constexpr, dv_stride_t: tl.constexpr,
    REST: tl.constexpr, D_V: tl.constexpr, CAUSAL: tl.constexpr, TILE_Q: tl.constexpr, TILE_KV: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys of a KV head, over the queries of its group's heads. The grid is tiles * h_kv * b.

    Scores are held transposed, [TILE_KV, TILE_Q], which makes P^T and dS^T the left operands of dv and dk.
    """
    program = tl.program_id(0)
    key = program % tiles * TILE_KV
    kv_head = (program // tiles % h_kv).to(tl.int64)
    i = program // tiles // h_kv
    start_kv, s_kv = sequence(cu_seqlens_kv_ptr, i)
    if key >= s_kv:
        return
    start_q, s_q = sequence(cu_seqlens_qo_ptr, i)
    k_ptr += start_kv * k_stride_t + kv_head * k_stride_h
    v_ptr += start_kv * v_stride_t + kv_head * v_stride_h
    dk_ptr += start_kv * dk_stride_t + kv_head * dk_stride_h
    dv_ptr += start_kv * dv_stride_t + kv_head * dv_stride_h

    keys = key + tl.arange(0, TILE_KV)
    k = load_rows(k_ptr, key, s_kv, k_stride_t, TILE_KV, 128)
    k_rest = load_rest(k_ptr, key, s_kv, k_stride_t, TILE_KV, REST)
    v = load_rows(v_ptr, key, s_kv, v_stride_t, TILE_KV, D_V)
    scale = softmax_scale * LOG2_E
    dk = tl.zeros([TILE_KV, 128], tl.float32)
    dk_rest = tl.zeros([TILE_KV, 64], tl.float32)
    dv = tl.zeros([TILE_KV, D_V], tl.float32)

    # Query tiles begin with the first row that sees a key of this tile, so that none has a row that sees no key at all,
    # whose dout may be NaN. From `whole` on, their rows see every key of this tile.
    start = 0
    whole = 0
    if CAUSAL:
        start = tl.maximum(key + s_q - s_kv, 0)
        sees_all = tl.minimum(tl.maximum(key + TILE_KV - 1 + s_q - s_kv, start), s_q)
        whole = start + tl.cdiv(sees_all - start, TILE_Q) * TILE_Q
    for head in range(kv_head * group, kv_head * group + group):
        q_head = q_ptr + start_q * q_stride_t + head * q_stride_h
        dout_head = dout_ptr + start_q * dout_stride_t + head * dout_stride_h
        lse_head = lse_ptr + head * lse_stride_h + start_q
        delta_head = delta_ptr + head * delta_stride_h + start_q
        for row in tl.range(start, s_q, TILE_Q):
            rows = row + tl.arange(0, TILE_Q)
            q = load_rows(q_head, row, s_q, q_stride_t, TILE_Q, 128)
            q_rest = load_rest(q_head, row, s_q, q_stride_t, TILE_Q, REST)
            dout = load_rows(dout_head, row, s_q, dout_stride_t, TILE_Q, D_V)
            # Rows past the last get P = exp2(0 - inf) = 0.
            lse = tl.load(lse_head + rows, mask=rows < s_q, other=float("inf")) * LOG2_E
            delta = tl.load(delta_head + rows, mask=rows < s_q, other=0.0)
            dp = tl.dot(v, tl.trans(dout))
            p = tl.math.exp2(products(k, k_rest, q, q_rest, REST) * scale - lse[None, :])
            if CAUSAL:  # noqa: SIM102 - one is known when compiling, one only when running
                if row < whole:
                    p = tl.where(keys[:, None] <= (s_kv - s_q + rows)[None, :], p, 0.0)
            ds = (p * (dp - delta[None, :])).to(q.dtype)
            dv = tl.dot(p.to(dout.dtype), dout, dv)
            dk = tl.dot(ds, q, dk)
            if REST > 0:
                dk_rest = tl.dot(ds, q_rest, dk_rest)

    store_rows(dk_ptr, key, s_kv, dk_stride_t, dk * softmax_scale, TILE_KV, 128)
    if REST > 0:
        store_rows(dk_ptr + 128, key, s_kv, dk_stride_t, dk_rest * softmax_scale, TILE_KV, REST)
    store_rows(dv_ptr, key, s_kv, dv_stride_t, dv, TILE_KV, D_V)
