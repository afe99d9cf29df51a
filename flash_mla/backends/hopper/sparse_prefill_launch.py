"""Torch-level launch of sparse prefill on Hopper: choose the variant and the layout, allocate, hand over tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from flash_mla import kernels
from flash_mla.backends.hopper.launch import (
    LOG2_E,
    SHORT_NAME,
    constant,
    num_sms,
    on_its_device,
    out_with_aligned_rows,
    positive_scale,
    with_aligned_rows,
)
from flash_mla.backends.hopper.sparse_prefill_heuristics import ROWS, SparsePrefillConfig, sparse_prefill_config
from flash_mla.problem import SparsePrefillInputs, SparsePrefillProblem

__all__ = ["sparse_prefill", "sparse_prefill_kernel"]

Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def sparse_prefill_kernel(dtype: torch.dtype, d: int) -> str:
    """Name of the sparse prefill variant."""
    return f"sparse_prefill_{SHORT_NAME[dtype]}_{d}"


class _Call(NamedTuple):
    """What a call needs apart from its tensors."""

    kernel: Callable[..., None]
    config: SparsePrefillConfig
    unit_slots: torch.Tensor  # [split_units + 1] int32
    all_indices: torch.Tensor  # [s_q] int32: topk, for calls without topk_length
    no_sink: torch.Tensor  # [h_q] fp32: -inf, for calls without attn_sink


@functools.lru_cache(maxsize=1024)
def _call(problem: SparsePrefillProblem) -> _Call:
    device = problem.device
    config = sparse_prefill_config(problem.s_q, problem.h_q, problem.topk, num_sms(device))
    return _Call(
        kernel=kernels.load(sparse_prefill_kernel(problem.dtype, problem.d_qk)),
        config=config,
        unit_slots=torch.arange(config.split_units + 1, dtype=torch.int32, device=device) * config.splits,
        all_indices=constant(problem.topk, torch.int32, device).expand(problem.s_q),
        no_sink=constant(-math.inf, torch.float32, device).expand(problem.h_q),
    )


@on_its_device
def sparse_prefill(problem: SparsePrefillProblem, inputs: SparsePrefillInputs) -> Results:
    """(out [s_q, h_q, d_v], max_logits [s_q, h_q] fp32, lse [s_q, h_q] fp32)."""
    out = out_with_aligned_rows(inputs.out, (problem.s_q, problem.h_q, problem.d_v), problem)
    max_logits = torch.empty(problem.s_q, problem.h_q, dtype=torch.float32, device=problem.device)
    lse = torch.empty_like(max_logits)
    if problem.s_kv == 0 or problem.topk == 0:
        out.zero_()
        max_logits.fill_(-math.inf)
        lse.fill_(math.inf)
    else:
        _launch(_call(problem), inputs, out, max_logits, lse)
    if inputs.out is not None and inputs.out is not out:
        out = inputs.out.copy_(out)
    return out, max_logits, lse


def _launch(
    call: _Call, inputs: SparsePrefillInputs, out: torch.Tensor, max_logits: torch.Tensor, lse: torch.Tensor
) -> None:
    q, scale = positive_scale(with_aligned_rows(inputs.q), inputs.sm_scale)
    config = call.config
    slots = config.slots
    workspace = torch.empty(slots * ROWS * (out.shape[-1] + 2), dtype=torch.float32, device=out.device)
    call.kernel(
        q,
        with_aligned_rows(inputs.kv[:, 0]),
        inputs.indices[:, 0],
        call.all_indices if inputs.topk_length is None else inputs.topk_length,
        call.no_sink if inputs.attn_sink is None else inputs.attn_sink,
        out,
        max_logits,
        lse,
        workspace,
        call.unit_slots,
        scale * LOG2_E,
        config.workers,
        config.whole_tokens,
        config.splits,
    )
