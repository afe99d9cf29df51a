"""Torch-level launch of dense multi-head attention on Hopper: choose the variant, allocate, hand over tensors."""

from __future__ import annotations

import math
from typing import Any

import torch

from flash_mla import kernels
from flash_mla.backends import triton
from flash_mla.backends.hopper.launch import (
    LOG2_E,
    SHORT_NAME,
    constant,
    num_sms,
    on_its_device,
    positive_scale,
    with_aligned_rows,
)
from flash_mla.problem import MHAProblem

__all__ = ["mha_backward", "mha_forward", "why_not"]

TILE = 128  # query rows of a CTA forward, keys of one backward
VISIT_Q = 64  # query rows that the backward visits at a time
SIDES = 2  # halves of dq's columns, which are summed on their own
FEW_QUERIES = 16  # a sequence: with fewer, most of what visits compute, and of the memory for dq's sums, is padding


def why_not(problem: MHAProblem) -> str | None:
    """The reason these kernels cannot serve `problem`, or None."""
    return kernels.unavailable(_kernel("forward", problem)) or kernels.unavailable(_kernel("backward", problem))


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
    tiles = problem.h_q * (len(cu_seqlens_qo) - 1) * -(-max_seqlen_qo // TILE)
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


def mha_backward(problem: MHAProblem, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a loss by q, k and v: dq, dk, dv shaped and typed like them, contiguous.

    The arguments are those of `_backward`. The sums of dq are taken in any order, so its last bits may differ between
    runs; Triton's kernels, which compute the scores once more for it, serve `deterministic`, and very short sequences
    if they are there.

    Raises:
        RuntimeError: deterministic gradients need Triton, which is not installed.
    """
    if not (problem.deterministic or _few_queries(*arguments)):
        return _backward(problem, *arguments)
    reason = triton.why_not(problem)
    if reason is None:
        return triton.mha_backward(problem, *arguments)  # type: ignore[attr-defined]
    if problem.deterministic:
        raise RuntimeError(f"no backend serves deterministic gradients on {problem.device}: triton: {reason}")
    return _backward(problem, *arguments)


def _few_queries(dout: torch.Tensor, *arguments: Any) -> bool:
    """Whether sequences have less than FEW_QUERIES queries on average, by the arguments of `_backward`."""
    cu_seqlens_qo = arguments[6]
    return dout.shape[0] < FEW_QUERIES * (len(cu_seqlens_qo) - 1)


@on_its_device
def _backward(
    problem: MHAProblem,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_qo: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients by q, k and v, given those by `out` and `lse` (None: the loss does not read lse)."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    tiles = problem.h_kv * (len(cu_seqlens_kv) - 1) * -(-max_seqlen_kv // TILE)
    if tiles == 0 or q.shape[0] == 0 or k.shape[0] == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    sums_tiles = q.shape[0] // VISIT_Q + len(cu_seqlens_qo) - 1  # each holds rows of one sequence
    row_values = torch.empty(2, *lse.T.shape, dtype=torch.float32, device=q.device)
    kernels.load(_kernel("backward", problem))(
        with_aligned_rows(dout),
        constant(0.0, torch.float32, q.device).expand(lse.shape) if dlse is None else dlse,
        with_aligned_rows(q),
        with_aligned_rows(k),
        with_aligned_rows(v),
        with_aligned_rows(out),
        lse,
        cu_seqlens_qo,
        cu_seqlens_kv,
        dq,
        dk,
        dv,
        row_values,
        torch.empty(problem.h_q, sums_tiles, VISIT_Q * problem.d_qk, dtype=torch.float32, device=q.device),
        torch.empty(problem.h_q, sums_tiles, SIDES, dtype=torch.int32, device=q.device),
        torch.empty(1, dtype=torch.int32, device=q.device),
        softmax_scale,
        softmax_scale * LOG2_E,
        int(problem.causal),
        min(tiles, num_sms(q.device)),
    )
    return dq, dk, dv
