"""Torch-level launch of dense multi-head attention on Hopper: choose the variant, allocate, hand over tensors."""

from __future__ import annotations

import math

import torch

from flash_mla import kernels
from flash_mla.backends.hopper.launch import (
    LOG2_E,
    SHORT_NAME,
    num_sms,
    on_its_device,
    positive_scale,
    with_aligned_rows,
)
from flash_mla.problem import MHAProblem

__all__ = ["mha_forward", "why_not"]

TILE_Q = 128  # query rows that a CTA takes at a time


def why_not(problem: MHAProblem) -> str | None:
    """The reason these kernels cannot serve `problem`, or None."""
    return kernels.unavailable(_kernel("forward", problem))


def _kernel(direction: str, problem: MHAProblem) -> str:
    return f"mha_{direction}_{SHORT_NAME[problem.dtype]}_{problem.d_qk}"


@on_its_device
def mha_forward(
    problem: MHAProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_qo: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query over the keys of its sequence that it sees.

    Args:
        q: [total_q, h_q, d_qk]; k: [total_kv, h_kv, d_qk]; v: [total_kv, h_kv, d_v].
        cu_seqlens_qo, cu_seqlens_kv: [b + 1] int32 offsets of the sequences, read on the device alone.

    Returns:
        out [total_q, h_q, d_v] in q's dtype; lse [total_q, h_q] fp32, contiguous along the tokens.
    """
    out = q.new_empty(q.shape[0], problem.h_q, problem.d_v)
    lse = q.new_empty(problem.h_q, q.shape[0], dtype=torch.float32)
    # More than there are, if the lengths differ.
    tiles = problem.h_q * (len(cu_seqlens_qo) - 1) * -(-max_seqlen_qo // TILE_Q)
    if tiles == 0 or k.shape[0] == 0:
        return out.zero_(), lse.fill_(-math.inf).T
    q, scale = positive_scale(q, softmax_scale)
    kernels.load(_kernel("forward", problem))(
        with_aligned_rows(q),
        with_aligned_rows(k),
        with_aligned_rows(v),
        cu_seqlens_qo,
        cu_seqlens_kv,
        out,
        lse,
        torch.empty(1, dtype=torch.int32, device=q.device),
        scale * LOG2_E,
        int(problem.causal),
        min(tiles, num_sms(q.device)),
    )
    return out, lse.T
