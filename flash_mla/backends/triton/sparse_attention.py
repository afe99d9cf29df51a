"""Token-sparse attention, decode and prefill: each query token gathers the rows of KV that its indices name."""

from __future__ import annotations

import triton
import triton.language as tl

from flash_mla.backends.triton.dequant import NOPE, load_nope, load_rope, token_offsets
from flash_mla.backends.triton.softmax import (
    LN_2,
    attend,
    load_q,
    natural,
    row_offsets,
    score,
    sink_factor,
    start,
    store_out,
    whole,
)


@triton.jit
def _count(lengths_ptr, u0, topk):
    """How many leading indices of the query tokens (u0, ...) count."""
    count = topk
    if lengths_ptr is not None:
        count = tl.maximum(0, tl.minimum(tl.load(lengths_ptr + u0), topk))
    return count


@triton.jit
def _slots(indices_ptr, tile, count, TILE: tl.constexpr):
    """The slots that a tile of the indices names [TILE], -1 behind the first `count`."""
    # Counted from the tile's first entry, as a compiler that saw larger numbers would compare in 64 bits.
    entries = tl.arange(0, TILE)
    return tl.load(indices_ptr + tile * TILE + entries, mask=entries < count - tile * TILE, other=-1)


@triton.jit
def _are_in(slots, num_slots):
    """Which slots are of the cache: neither negative nor beyond it, in one comparison."""
    return slots.to(tl.uint32, bitcast=True) < num_slots.to(tl.uint32)


@triton.jit
def _attend_to_rows(
    q, q_rope, cache_ptr, num_slots, indices_ptr, count, begin, end, scale_log2, top, total, acc, acc_rope,
    page_stride: tl.constexpr, token_stride: tl.constexpr, FORMAT: tl.constexpr, PAGE_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr, D_ROPE: tl.constexpr, D_V_ROPE: tl.constexpr, HAS_FP8: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Attend to what the tiles begin ... end - 1 of the indices, of which `count` count, name in one cache."""
    slots = _slots(indices_ptr, begin, count, TILE)
    for tile in range(begin, end):
        seen = _are_in(slots, num_slots)
        token, scales = token_offsets(
            slots // PAGE_SIZE, slots % PAGE_SIZE, page_stride, token_stride, FORMAT, PAGE_SIZE
        )
        all_seen = tl.min(seen.to(tl.int32), 0) == 1
        # A tile early, so that its addresses do not wait for them.
        slots = _slots(indices_ptr, tile + 1, count, TILE)
        nope = load_nope(cache_ptr, token, scales, seen, FORMAT, COLUMNS, HAS_FP8, q.dtype)
        rope = load_rope(cache_ptr, token, seen, FORMAT, COLUMNS, D_ROPE, HAS_FP8, q.dtype)
        scores = score(q, q_rope, nope, rope, scale_log2, D_ROPE)
        if not all_seen:
            # Loaded again, as to keep them for this rare case costs registers in every other.
            again = _are_in(_slots(indices_ptr, tile, count, TILE), num_slots)
            scores = tl.where(again[None, :], scores, float("-inf"))
        top, total, acc, acc_rope = attend(scores, nope, rope, top, total, acc, acc_rope, D_V_ROPE)
    return top, total, acc, acc_rope


@triton.jit(
    do_not_specialize=[
        "num_units", "units_1", "h_q", "splits", "row_tiles", "topk", "num_slots", "extra_topk", "extra_num_slots",
    ]
)  # fmt: skip
def sparse_attention_kernel(
    q_ptr, sink_ptr, out_ptr, lse_ptr, max_logits_ptr, partial_o_ptr, partial_lse_ptr, partial_max_ptr,
    cache_ptr, num_slots,
    indices_ptr, indices_stride_u0, indices_stride_u1, topk, lengths_ptr,
    extra_cache_ptr, extra_num_slots,
    extra_indices_ptr, extra_indices_stride_u0, extra_indices_stride_u1, extra_topk, extra_lengths_ptr,
    q_stride_u0, q_stride_u1, q_stride_h, out_stride_u0, out_stride_u1, out_stride_h,
    lse_stride_u0, lse_stride_u1, lse_stride_h,
    scale_log2, num_units, units_1, h_q, splits, row_tiles,
    page_stride: tl.constexpr, token_stride: tl.constexpr, FORMAT: tl.constexpr, PAGE_SIZE: tl.constexpr,
    extra_page_stride: tl.constexpr, extra_token_stride: tl.constexpr, EXTRA_FORMAT: tl.constexpr,
    EXTRA_PAGE_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr, D_ROPE: tl.constexpr, D_V_ROPE: tl.constexpr, HAS_FP8: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Attend with the h_q heads of each query token.

    A unit is a query token (u0, u1): request and token in decode, token and 0 in prefill. Its tiles of indices, and
    behind them those of the extra cache, are cut into `splits` equal ranges. A range for ROWS heads is a piece, and a
    program takes every num_programs-th piece. With more than one range results go to partial_o
    [num_units * splits, row_tiles * ROWS, 512], partial_lse and partial_max [num_units * splits, row_tiles * ROWS],
    fp32, of base 2. Optional tensors are None.
    """
    for piece in range(tl.program_id(0), num_units * row_tiles * splits, tl.num_programs(0)):
        row_tile = piece % row_tiles
        unit = piece // row_tiles % num_units
        split = piece // (row_tiles * num_units)
        u0 = unit // units_1
        u1 = unit % units_1
        heads = row_tile * ROWS + tl.arange(0, ROWS)
        exists = heads < h_q
        q_rows = row_offsets(u0, u1, heads, h_q, q_stride_u0, q_stride_u1, 0, q_stride_h)
        q, q_rope = load_q(q_ptr, q_rows, exists, COLUMNS, D_ROPE)

        count = _count(lengths_ptr, u0, topk)
        tiles = (count + TILE - 1) // TILE
        extra_count = 0
        if extra_cache_ptr is not None:
            extra_count = _count(extra_lengths_ptr, u0, extra_topk)
        all_tiles = tiles + (extra_count + TILE - 1) // TILE
        share = (all_tiles + splits - 1) // splits
        begin = split * share
        end = tl.minimum(begin + share, all_tiles)

        top, total, acc, acc_rope = start(ROWS, D_V_ROPE)
        indices = indices_ptr + u0.to(tl.int64) * indices_stride_u0 + u1.to(tl.int64) * indices_stride_u1
        top, total, acc, acc_rope = _attend_to_rows(
            q, q_rope, cache_ptr, num_slots, indices, count, begin, tl.minimum(end, tiles), scale_log2,
            top, total, acc, acc_rope,
            page_stride, token_stride, FORMAT, PAGE_SIZE, COLUMNS, D_ROPE, D_V_ROPE, HAS_FP8, TILE,
        )  # fmt: skip
        if extra_cache_ptr is not None:
            extra_indices = extra_indices_ptr + u0.to(tl.int64) * extra_indices_stride_u0
            extra_indices += u1.to(tl.int64) * extra_indices_stride_u1
            top, total, acc, acc_rope = _attend_to_rows(
                q, q_rope, extra_cache_ptr, extra_num_slots, extra_indices, extra_count,
                tl.maximum(begin, tiles) - tiles, end - tiles, scale_log2, top, total, acc, acc_rope,
                extra_page_stride, extra_token_stride, EXTRA_FORMAT, EXTRA_PAGE_SIZE,
                COLUMNS, D_ROPE, D_V_ROPE, HAS_FP8, TILE,
            )  # fmt: skip

        total = whole(total, ROWS)
        lse = top + tl.log2(total)
        factor = 1.0 / tl.where(total > 0.0, total, 1.0)
        if partial_o_ptr is None:
            if sink_ptr is not None:
                factor *= sink_factor(tl.load(sink_ptr + heads, mask=exists, other=0.0), lse)
            out_rows = row_offsets(u0, u1, heads, h_q, out_stride_u0, out_stride_u1, 0, out_stride_h)
            store_out(out_ptr, out_rows, exists, acc, acc_rope, factor, COLUMNS, D_V_ROPE)
            lse_rows = row_offsets(u0, u1, heads, h_q, lse_stride_u0, lse_stride_u1, 0, lse_stride_h)
            tl.store(lse_ptr + lse_rows, natural(lse), mask=exists)
            if max_logits_ptr is not None:
                tl.store(max_logits_ptr + lse_rows, top * LN_2, mask=exists)
        else:
            partial_rows = (unit.to(tl.int64) * splits + split) * (row_tiles * ROWS) + heads
            store_out(partial_o_ptr, partial_rows * NOPE, exists, acc, acc_rope, factor, COLUMNS, D_V_ROPE)
            tl.store(partial_lse_ptr + partial_rows, lse, mask=exists)
            if max_logits_ptr is not None:
                tl.store(partial_max_ptr + partial_rows, top, mask=exists)
