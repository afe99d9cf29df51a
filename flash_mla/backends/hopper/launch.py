"""Torch-level launches of the kernels that every split-KV mode shares: the planner and combine."""

from __future__ import annotations

import functools

import torch

from flash_mla import kernels
from flash_mla.plan import SplitPlan

__all__ = ["combine", "plan"]

# From this many rows on, a warp each keeps every SM's memory pipeline full.
ROWS_TO_FILL_A_GPU = 4096
SHORT_NAME = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@functools.cache
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One element on the device, made once; a broadcast view of it stands for an absent argument."""
    return torch.tensor([value], dtype=dtype, device=device)


def plan(
    lengths: torch.Tensor,
    *,
    extra_lengths: torch.Tensor | None = None,
    tile: int = 64,
    fixed_cost: int,
    num_workers: int,
    units_per_request: int = 1,
    min_tiles: int = 1,
    batch_invariant: bool = False,
) -> SplitPlan:
    """`flash_mla.plan.split_plan` in one kernel launch, without synchronising; can be captured into a CUDA graph."""
    device = lengths.device
    (b,) = lengths.shape
    if extra_lengths is None:
        extra_lengths = _constant(0, torch.int32, device).expand(b)
    work = torch.empty(num_workers + 1, 4, dtype=torch.int32, device=device)
    splits = torch.empty(b * units_per_request + 1, dtype=torch.int32, device=device)
    kernel = kernels.load("planner_batch_invariant" if batch_invariant else "planner_balanced")
    kernel(lengths, extra_lengths, work, splits, tile, fixed_cost, min_tiles, units_per_request)
    return SplitPlan(work, splits)


def combine(
    partial_o: torch.Tensor,
    partial_lse: torch.Tensor,
    split_plan: SplitPlan,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    sink: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> None:
    """Merge the partial results of every split unit into `out` and `lse`; rows of whole units are not touched.

    Args:
        partial_o: [slots, rows_per_unit, d_v] fp32, each normalised by its own softmax sum.
        partial_lse: [slots, rows_per_unit] fp32 in base 2, -inf where nothing was attended to.
        split_plan: which slots belong to which unit.
        out: [u0, u1, r0, r1, d_v] bf16 or fp16, any strides but a dense last dimension. A unit is (u0, u1), or one of
            its passes if its r0 * r1 rows are more than rows_per_unit.
        lse: [u0, u1, r0, r1] fp32, natural log, any strides.
        sink: [u1, r1] fp32, natural log, as `attn_sink`.
        batch_invariant: the plan is batch-invariant.
    """
    num_workers, num_units = split_plan.work.shape[0] - 1, split_plan.splits.shape[0] - 1
    if sink is None:
        sink = _constant(float("-inf"), torch.float32, out.device).expand(out.shape[1], out.shape[3])
    by_unit = batch_invariant or num_units <= num_workers
    candidates = num_units if by_unit else num_workers
    shape = "many_rows" if candidates * partial_o.shape[1] >= ROWS_TO_FILL_A_GPU else "many_splits"
    kernel = kernels.load(f"combine_{SHORT_NAME[out.dtype]}_{shape}")
    kernel(partial_o, partial_lse, split_plan.work, split_plan.splits, sink, out, lse, candidates, int(by_unit))
