"""Torch-level launch of sparse prefill on Hopper: choose the variant and the layout, allocate, hand over tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
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
    rows_aligned,
    template,
    who_merges,
    with_aligned_rows,
)
from flash_mla.backends.hopper.recorded_call import CONSTANT, REFUSALS, record_call, workspace_argument
from flash_mla.backends.hopper.sparse_prefill_heuristics import ROWS, is_short, sparse_prefill_config
from flash_mla.problem import SparsePrefillInputs, SparsePrefillProblem

__all__ = ["RecordedPrefill", "record_prefill", "sparse_prefill", "sparse_prefill_kernel"]

Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# Of a call's inputs: its results, or None if it does not look like the recorded one.
RecordedPrefill = Callable[[SparsePrefillInputs], Results | None]


def sparse_prefill_kernel(problem: SparsePrefillProblem) -> str:
    """Name of the variant that serves a problem; with RoPE there is one for short calls."""
    p = problem
    short = p.d_qk > p.d_v and is_short(p.s_q, p.h_q, p.topk, num_sms(p.device))
    return f"sparse_prefill_{SHORT_NAME[p.dtype]}_{p.d_qk}{'_short' if short else ''}"


class _Call(NamedTuple):
    """What calls that differ in kv and scale alone need apart from their tensors."""

    name: str
    kernel: Callable[..., None]
    out: torch.Tensor  # these three are templates
    max_logits: torch.Tensor
    workspace: torch.Tensor
    unit_slots: torch.Tensor  # [split_units + 1] int32
    numbers: tuple[int, ...]  # the kernel's integer arguments
    all_indices: torch.Tensor  # [s_q] int32: topk, for calls without topk_length
    no_sink: torch.Tensor  # [h_q] fp32: -inf, for calls without attn_sink


def _multiples(largest: int, device: torch.device) -> torch.Tensor:
    """[n, n] int32 on the device, n > largest: row i holds the multiples of i, from 0 on.

    One for all shapes, so that none is made while a call is captured into a CUDA graph.
    """
    return _table_of_multiples(max(2 * num_sms(device), 1 << largest.bit_length()), device)


@functools.cache  # for good: CUDA graphs refer to it; and copied from the host, which any stream waits for
def _table_of_multiples(n: int, device: torch.device) -> torch.Tensor:
    numbers = torch.arange(n, dtype=torch.int32, device="cpu")
    return torch.outer(numbers, numbers).to(device)


@functools.lru_cache(maxsize=1024)
def _call(problem: SparsePrefillProblem, has_lengths: bool) -> _Call:
    device, s_q, h_q, d_v, topk = problem.device, problem.s_q, problem.h_q, problem.d_v, problem.topk
    config = sparse_prefill_config(s_q, h_q, topk, num_sms(device), has_lengths=has_lengths)
    name = sparse_prefill_kernel(problem)
    combine_warps = 1
    if config.splits > 1:
        _, combine_warps = who_merges(config.split_units, config.slots, min(ROWS, h_q), batch_invariant=False)
    order = (config.length_bits, config.round_tokens, int(config.finds_lengths))
    words = 2 * s_q if config.length_bits else 0  # of the list of tokens, and of their lengths
    return _Call(
        name=name,
        kernel=kernels.load(name),
        out=template((s_q, h_q, d_v), problem.dtype, device),
        max_logits=template((s_q, h_q), torch.float32, device),
        workspace=template((config.slots * ROWS * (d_v + 2) + words,), torch.float32, device),
        unit_slots=_multiples(max(config.splits, config.split_units), device)[config.splits, : config.split_units + 1],
        numbers=(config.workers, config.whole_tokens, config.splits, combine_warps, *order),
        all_indices=constant(topk, torch.int32, device).expand(s_q),
        no_sink=constant(-math.inf, torch.float32, device).expand(h_q),
    )


def _call_of(problem: SparsePrefillProblem, inputs: SparsePrefillInputs) -> _Call:
    return _call(replace(problem, s_kv=0), inputs.topk_length is not None)


@on_its_device
def sparse_prefill(problem: SparsePrefillProblem, inputs: SparsePrefillInputs) -> Results:
    """(out [s_q, h_q, d_v], max_logits [s_q, h_q] fp32, lse [s_q, h_q] fp32)."""
    call = _call_of(problem, inputs)
    out = out_with_aligned_rows(inputs.out, call.out)
    max_logits, lse = torch.empty_like(call.max_logits), torch.empty_like(call.max_logits)
    if problem.s_kv == 0 or problem.topk == 0:
        out.zero_()
        max_logits.fill_(-math.inf)
        lse.fill_(math.inf)
    else:
        _launch(call, inputs, out, max_logits, lse)
    if inputs.out is not None and inputs.out is not out:
        out = inputs.out.copy_(out)
    return out, max_logits, lse


def _launch(
    call: _Call, inputs: SparsePrefillInputs, out: torch.Tensor, max_logits: torch.Tensor, lse: torch.Tensor
) -> None:
    q, scale = positive_scale(with_aligned_rows(inputs.q), inputs.sm_scale)
    call.kernel(
        q,
        with_aligned_rows(inputs.kv.select(1, 0)),
        inputs.indices.select(1, 0),
        call.all_indices if inputs.topk_length is None else inputs.topk_length,
        call.no_sink if inputs.attn_sink is None else inputs.attn_sink,
        out,
        max_logits,
        lse,
        torch.empty_like(call.workspace),
        call.unit_slots,
        scale * LOG2_E,
        *call.numbers,
    )


def record_prefill(
    problem: SparsePrefillProblem, inputs: SparsePrefillInputs, results: Results
) -> RecordedPrefill | None:
    """What repeats a call on its device that `sparse_prefill` has run; None if its kernel read or wrote copies.

    Its results stand for those of a repeated call: memory that is short is not taken twice.
    """
    if problem.s_kv == 0 or problem.topk == 0 or problem.device.index != torch.cuda.current_device():
        return None
    q, kv, indices, scale, sink, lengths, given_out = inputs
    rows = kv.select(1, 0)
    copied = not all(tensor is None or rows_aligned(tensor) for tensor in (q, rows, given_out))
    if copied or scale <= 0.0:
        return None
    call = _call_of(problem, inputs)
    out, max_logits, lse = results
    given = (q, kv, indices, sink, lengths, out, max_logits, lse, 1.0)
    arguments = (
        (0, q),
        (1, rows),
        (2, indices.select(1, 0)),
        (CONSTANT, call.all_indices) if lengths is None else (4, lengths),
        (CONSTANT, call.no_sink) if sink is None else (3, sink),
        (5, out),
        (6, max_logits),
        (7, lse),
        workspace_argument(call.workspace),
        (CONSTANT, call.unit_slots),
        (8, 1.0),
        *((CONSTANT, number) for number in call.numbers),
    )
    replay = record_call(call.name, call.kernel, given, arguments)
    if replay is None:
        return None
    device = problem.device.index

    def repeat(inputs: SparsePrefillInputs) -> Results | None:
        q, kv, indices, scale, sink, lengths, out = inputs
        if scale <= 0.0 or torch.cuda.current_device() != device:
            return None
        if out is None:
            out = torch.empty_like(call.out)
        max_logits, lse = torch.empty_like(call.max_logits), torch.empty_like(call.max_logits)
        try:
            done = replay(q, kv, indices, sink, lengths, out, max_logits, lse, scale * LOG2_E)
        except REFUSALS:
            return None
        return (out, max_logits, lse) if done else None

    return repeat
