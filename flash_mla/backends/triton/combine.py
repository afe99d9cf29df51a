"""Merge the partial results of units that were split."""

from __future__ import annotations

import triton
import triton.language as tl

from flash_mla.backends.triton.dequant import NOPE
from flash_mla.backends.triton.softmax import LN_2, natural, row_offsets, sink_factor, store_out


@triton.jit(do_not_specialize=["units_1", "rows_1", "passes", "num_rows", "unit_rows"])
def combine_kernel(
    partial_o_ptr, partial_lse_ptr, partial_max_ptr, splits_ptr, sink_ptr, out_ptr, lse_ptr, max_logits_ptr,
    out_stride_u0, out_stride_u1, out_stride_r0, out_stride_r1,
    lse_stride_u0, lse_stride_u1, lse_stride_r0, lse_stride_r1,
    units_1, rows_1, passes, num_rows, unit_rows,
    ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Merge ROWS rows of a unit, SLOTS of its slots at a time; rows of units without slots are not touched.

    A unit is (u0, u1, pass). out is [u0, u1, r0, r1, 512], lse and max_logits are [u0, u1, r0, r1].
    Without a sink or maxima their pointers are None.
    """
    blocks = tl.cdiv(unit_rows, ROWS)
    unit = tl.program_id(0) // blocks
    begin = tl.load(splits_ptr + unit)
    end = tl.load(splits_ptr + unit + 1)
    in_unit = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    rows = unit % passes * unit_rows + in_unit
    exists = (in_unit < unit_rows) & (rows < num_rows)
    if begin < end:
        top = tl.full([ROWS], float("-inf"), tl.float32)  # maxima of the slots' lse
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, NOPE], tl.float32)
        max_logits = top
        for first in range(begin, end, SLOTS):
            slots = first + tl.arange(0, SLOTS)
            partial_rows = slots[:, None].to(tl.int64) * unit_rows + in_unit[None, :]
            mask = (slots < end)[:, None] & exists[None, :]
            lse = tl.load(partial_lse_ptr + partial_rows, mask=mask, other=float("-inf"))
            new_top = tl.maximum(top, tl.max(lse, 0))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(lse - base[None, :])
            rescale = tl.exp2(top - base)
            o_ptrs = partial_o_ptr + partial_rows[:, :, None] * NOPE + tl.arange(0, NOPE)[None, None, :]
            o = tl.load(o_ptrs, mask=mask[:, :, None], other=0.0)
            acc = acc * rescale[:, None] + tl.sum(o * weights[:, :, None], 0)
            total = total * rescale + tl.sum(weights, 0)
            top = new_top
            if max_logits_ptr is not None:
                slot_max = tl.load(partial_max_ptr + partial_rows, mask=mask, other=float("-inf"))
                max_logits = tl.maximum(max_logits, tl.max(slot_max, 0))

        u0 = unit // passes // units_1
        u1 = unit // passes % units_1
        lse = top + tl.log2(total)
        factor = 1.0 / tl.where(total > 0.0, total, 1.0)
        if sink_ptr is not None:
            factor *= sink_factor(tl.load(sink_ptr + rows, mask=exists, other=0.0), lse)
        out_rows = row_offsets(u0, u1, rows, rows_1, out_stride_u0, out_stride_u1, out_stride_r0, out_stride_r1)
        store_out(out_ptr, out_rows, exists, acc, acc, factor, NOPE, 0)
        lse_rows = row_offsets(u0, u1, rows, rows_1, lse_stride_u0, lse_stride_u1, lse_stride_r0, lse_stride_r1)
        tl.store(lse_ptr + lse_rows, natural(lse), mask=exists)
        if max_logits_ptr is not None:
            tl.store(max_logits_ptr + lse_rows, max_logits * LN_2, mask=exists)
