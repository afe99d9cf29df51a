"""Torch-level launch of dense multi-head attention on Hopper: choose the variant, allocate, hand over tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

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
    rows_aligned,
    template,
    with_aligned_rows,
)
from flash_mla.backends.hopper.recorded_call import CONSTANT, REFUSALS, record_call, workspace_argument
from flash_mla.problem import MHAProblem

__all__ = ["mha_backward", "mha_forward", "record_mha_backward", "record_mha_forward", "why_not"]

Tensors = tuple[torch.Tensor, ...]
OptionalTensors = tuple[torch.Tensor | None, ...]

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
    flags = _forward_flags(problem, q.shape[0], cu_seqlens_qo.shape[0] - 1)
    if flags is None or k.shape[0] == 0:
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
        *flags,
    )
    return out, lse.T


def _forward_flags(problem: MHAProblem, total_q: int, b: int) -> tuple[int, ...] | None:
    """The kernel's integer arguments; None if there is nothing to do."""
    # At least as many as there are, whatever the lengths.
    tiles = problem.h_q * ((total_q + (TILE - 1) * b) // TILE)
    workers = min(tiles, num_sms(problem.device))
    return (int(problem.causal), workers, int(workers == tiles)) if total_q else None


def record_mha_forward(
    problem: MHAProblem, tensors: Tensors, results: Tensors
) -> Callable[[Tensors, float], tuple[torch.Tensor, torch.Tensor] | None] | None:
    """What repeats a call on its device that `mha_forward` has run; None if its kernel read copies, or nothing.

    Given tensors in its order and a scale, it returns results, or None if they do not look like `tensors`. Those of the
    call stand for its own: memory that is short is not taken twice.
    """
    q, k, v, cu_seqlens_qo, _ = tensors
    device, shape = q.device.index, q.shape
    flags = _forward_flags(problem, q.shape[0], cu_seqlens_qo.shape[0] - 1)
    if (
        flags is None
        or k.shape[0] == 0
        or device != torch.cuda.current_device()
        or not all(map(rows_aligned, (q, k, v)))
    ):
        return None
    out = template((q.shape[0], problem.h_q, problem.d_v), q.dtype, q.device)
    lse = template((problem.h_q, q.shape[0]), torch.float32, q.device)
    given = (*tensors, results[0].detach(), results[1].detach().T, 1.0)
    arguments = [*enumerate(given), *((CONSTANT, flag) for flag in flags)]
    arguments.insert(len(given) - 1, workspace_argument(template((1,), torch.int32, q.device)))  # before the scale
    name = _kernel("forward", problem)
    replay = record_call(name, kernels.load(name), given, arguments)
    if replay is None:
        return None

    def repeat(tensors: Tensors, scale: float) -> tuple[torch.Tensor, torch.Tensor] | None:
        # Results of another size are not even to be allocated.
        if scale <= 0.0 or getattr(tensors[0], "shape", None) != shape or torch.cuda.current_device() != device:
            return None
        results = torch.empty_like(out), torch.empty_like(lse)
        try:
            done = replay(*tensors, *results, scale * LOG2_E)
        except REFUSALS:
            return None
        return (results[0], results[1].T) if done else None

    return repeat


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


def _few_queries(dout: Any, *arguments: Any) -> bool:
    """Whether sequences have less than FEW_QUERIES queries on average, by the arguments of `_backward`."""
    cu_seqlens_qo = arguments[6]
    return dout.shape[0] < FEW_QUERIES * (cu_seqlens_qo.shape[0] - 1)


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
    flags = _backward_flags(problem, cu_seqlens_kv, max_seqlen_kv)
    if flags is None or q.shape[0] == 0 or k.shape[0] == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    workspaces = _backward_workspaces(q, cu_seqlens_qo)
    kernels.load(_kernel("backward", problem))(
        with_aligned_rows(dout),
        _no_dlse(lse) if dlse is None else dlse,
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
        *(torch.empty(shape, dtype=dtype, device=q.device) for shape, dtype in workspaces),
        softmax_scale,
        softmax_scale * LOG2_E,
        *flags,
    )
    return dq, dk, dv


def _no_dlse(lse: torch.Tensor) -> torch.Tensor:
    return constant(0.0, torch.float32, lse.device).expand(lse.shape)


def _backward_flags(problem: MHAProblem, cu_seqlens_kv: torch.Tensor, max_seqlen_kv: int) -> tuple[int, ...] | None:
    """The kernel's integer arguments; None if there is nothing to do."""
    tiles = problem.h_kv * (cu_seqlens_kv.shape[0] - 1) * -(-max_seqlen_kv // TILE)
    return (int(problem.causal), min(tiles, num_sms(problem.device))) if tiles else None


def _backward_workspaces(q: torch.Tensor, cu_seqlens_qo: torch.Tensor) -> Iterator[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what the kernel writes for itself."""
    total_q, h_q, d_qk = q.shape
    tiles = total_q // VISIT_Q + cu_seqlens_qo.shape[0] - 1  # each holds rows of one sequence
    yield (2, h_q, total_q), torch.float32  # values of rows
    yield (h_q, tiles, VISIT_Q * d_qk), torch.float32  # sums of dq
    yield (h_q, tiles, SIDES), torch.int32  # their states
    yield (1,), torch.int32  # the next tile


def record_mha_backward(
    problem: MHAProblem, tensors: OptionalTensors, results: Tensors, max_seqlens: tuple[int, int]
) -> Callable[[OptionalTensors, float], Tensors | None] | None:
    """What repeats a call on its device that `mha_backward` has run with kernels of Hopper, as record_mha_forward does.

    Given tensors in its order and a scale, it returns dq, dk and dv, or None if they do not look like `tensors`.
    """
    dout, dlse, q, k, v, out, lse, cu_seqlens_qo, cu_seqlens_kv = cast("Tensors", tensors)  # but for dlse
    device = q.device.index
    flags = _backward_flags(problem, cu_seqlens_kv, max_seqlens[1])
    if flags is None or problem.deterministic or _few_queries(*tensors) or q.shape[0] == 0 or k.shape[0] == 0:
        return None
    if device != torch.cuda.current_device() or not all(map(rows_aligned, (dout, q, k, v, out))):
        return None
    layouts = (*((tuple(x.shape), x.dtype) for x in (q, k, v)), *_backward_workspaces(q, cu_seqlens_qo))
    *made, next_tile = (template(shape, dtype, q.device) for shape, dtype in layouts)
    given = (*tensors, *results, *map(torch.empty_like, made[len(results) :]), 1.0, 1.0)
    arguments = [*enumerate(given), *((CONSTANT, flag) for flag in flags)]
    if dlse is None:
        arguments[1] = CONSTANT, _no_dlse(lse)
    arguments.insert(len(given) - 2, workspace_argument(next_tile))  # before the scales
    name = _kernel("backward", problem)
    replay = record_call(name, kernels.load(name), given, arguments)
    if replay is None:
        return None

    def repeat(tensors: OptionalTensors, scale: float) -> Tensors | None:
        if torch.cuda.current_device() != device:
            return None
        results = [torch.empty_like(x) for x in made]
        try:
            done = replay(*tensors, *results, scale, scale * LOG2_E)
        except REFUSALS:
            return None
        return tuple(results[:3]) if done else None

    return repeat
