"""Dense decode: persistent programs walk a split plan over the pages of each request."""

from __future__ import annotations

import triton
import triton.language as tl

from flash_mla.backends.triton.dequant import NOPE, load_nope, load_rope, token_offsets
from flash_mla.backends.triton.softmax import (
    attend,
    load_q,
    natural,
    row_offsets,
    score,
    start,
    store_out,
    whole,
)


@triton.jit
def _pages(table_ptr, tile, seqlen, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr):
    """The pages of the tokens of a tile: one if it cannot have more, else [TILE]."""
    first = tile * TILE
    if PAGE_SIZE % TILE == 0:
        page = tl.load(table_ptr + first // PAGE_SIZE, mask=first < seqlen, other=0)
    else:
        tokens = first + _existing(tile, seqlen, TILE)
        page = tl.load(table_ptr + tokens // PAGE_SIZE, mask=tokens < seqlen, other=0)
    return page


@triton.jit
def _offsets(tile, seqlen, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Where in their pages the tokens of a tile are [TILE]."""
    first = tile * TILE
    if PAGE_SIZE % TILE == 0:
        offset = first % PAGE_SIZE + _existing(tile, seqlen, TILE)
    else:
        offset = (first + _existing(tile, seqlen, TILE)) % PAGE_SIZE
    return offset


@triton.jit
def _existing(tile, seqlen, TILE: tl.constexpr):
    """The tokens of a tile, counted from its first [TILE], the last one of the request instead of those that do not
    exist.

    So loads need no mask, and no NaN that lies behind the last token gets into products with 0.
    """
    return tl.minimum(tl.arange(0, TILE), seqlen - 1 - tile * TILE)


@triton.jit(do_not_specialize=["table_stride", "num_units", "s_q", "h_kv", "group", "passes", "row_tiles"])
def dense_decode_kernel(
    q_ptr, cache_ptr, block_table_ptr, seqlens_ptr, work_ptr, splits_ptr, out_ptr, lse_ptr, partial_o_ptr,
    partial_lse_ptr,
    q_stride_u0, q_stride_u1, q_stride_r0, q_stride_r1,
    out_stride_u0, out_stride_u1, out_stride_r0, out_stride_r1,
    head_stride, table_stride,
    scale_log2, num_units, s_q, h_kv, group, passes, row_tiles,
    page_stride: tl.constexpr, token_stride: tl.constexpr,
    FORMAT: tl.constexpr, PAGE_SIZE: tl.constexpr, D_ROPE: tl.constexpr, CAUSAL: tl.constexpr,
    BATCH_INVARIANT: tl.constexpr, MIN_PIECE: tl.constexpr, MAX_PIECES: tl.constexpr, HAS_FP8: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Attend with the s_q * group query rows of each request and KV head.

    A unit of the plan is (request, KV head, pass); a pass takes row_tiles * ROWS rows, row_tiles programs side by side.
    q and out are [b, h_kv, s_q, group, d], lse is [b, h_kv * group, s_q] without gaps. The rows of pieces go to
    partial_o [slots, row_tiles * ROWS, 512] and partial_lse [slots, row_tiles * ROWS], fp32, of base 2.
    """
    row_tile = tl.program_id(0) % row_tiles
    range_ptr = work_ptr + tl.program_id(0) // row_tiles * 4
    first_unit = tl.load(range_ptr)
    first_tile = tl.load(range_ptr + 1)
    first_split = tl.load(range_ptr + 2)
    last_unit = tl.load(range_ptr + 4)
    last_stop = tl.load(range_ptr + 5)
    for unit in range(first_unit, tl.minimum(last_unit + 1, num_units)):
        request = unit // (h_kv * passes)
        head = unit // passes % h_kv
        in_unit = row_tile * ROWS + tl.arange(0, ROWS)
        rows = unit % passes * (row_tiles * ROWS) + in_unit
        exists = rows < s_q * group
        seqlen = tl.load(seqlens_ptr + request)
        # A row sees the tokens under its limit; all rows see those under the first limit.
        first_limit = seqlen - s_q + 1 if CAUSAL else seqlen
        limits = first_limit + (rows // group if CAUSAL else tl.zeros_like(rows))
        q_rows = row_offsets(request, head, rows, group, q_stride_u0, q_stride_u1, q_stride_r0, q_stride_r1)
        q, q_rope = load_q(q_ptr, q_rows, exists, NOPE, D_ROPE)
        head_ptr = cache_ptr + head.to(tl.int64) * head_stride
        table_ptr = block_table_ptr + request.to(tl.int64) * table_stride

        tiles = (seqlen + TILE - 1) // TILE
        begin = tl.where(unit == first_unit, first_tile, 0)
        end = tl.where(unit == last_unit, last_stop, tiles)
        # An empty unit is a piece all the same, whose rows have to be written; an empty rest of the last one is not.
        stop = tl.where(unit == last_unit, end, tl.maximum(end, begin + 1))
        step = tl.maximum(end - begin, 1)
        if BATCH_INVARIANT:
            step = tl.maximum(MIN_PIECE, (tiles + MAX_PIECES - 1) // MAX_PIECES)
        first_slot = tl.load(splits_ptr + unit)
        is_whole = first_slot == tl.load(splits_ptr + unit + 1)
        slot = first_slot + tl.where(unit == first_unit, first_split, 0)
        for piece in range(begin, stop, step):
            top, total, acc, acc_rope = start(ROWS, 0)
            page = _pages(table_ptr, piece, seqlen, PAGE_SIZE, TILE)
            for tile in range(piece, tl.minimum(piece + step, end)):
                offset = _offsets(tile, seqlen, PAGE_SIZE, TILE)
                token, scales = token_offsets(page, offset, page_stride, token_stride, FORMAT, PAGE_SIZE)
                # A tile early, so that its addresses do not wait for them.
                page = _pages(table_ptr, tile + 1, seqlen, PAGE_SIZE, TILE)
                nope = load_nope(head_ptr, token, scales, None, FORMAT, NOPE, HAS_FP8, q_ptr.dtype.element_ty)
                rope = load_rope(head_ptr, token, None, FORMAT, NOPE, D_ROPE, HAS_FP8, q_ptr.dtype.element_ty)
                scores = score(q, q_rope, nope, rope, scale_log2, D_ROPE)
                if (tile + 1) * TILE > first_limit:
                    seen = (tile * TILE + tl.arange(0, TILE))[None, :] < limits[:, None]
                    scores = tl.where(seen, scores, float("-inf"))
                top, total, acc, acc_rope = attend(scores, nope, rope, top, total, acc, acc_rope, 0)
            total = whole(total, ROWS)
            lse = top + tl.log2(total)
            factor = 1.0 / tl.where(total > 0.0, total, 1.0)
            if is_whole:
                out_rows = row_offsets(
                    request, head, rows, group, out_stride_u0, out_stride_u1, out_stride_r0, out_stride_r1
                )
                store_out(out_ptr, out_rows, exists, acc, acc_rope, factor, NOPE, 0)
                lse_rows = row_offsets(request, head, rows, group, h_kv * group * s_q, group * s_q, 1, s_q)
                tl.store(lse_ptr + lse_rows, natural(lse), mask=exists)
            else:
                partial_rows = slot.to(tl.int64) * (row_tiles * ROWS) + in_unit
                store_out(partial_o_ptr, partial_rows * NOPE, exists, acc, acc_rope, factor, NOPE, 0)
                tl.store(partial_lse_ptr + partial_rows, lse, mask=exists)
            slot += 1
