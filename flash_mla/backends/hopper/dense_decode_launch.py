"""Torch-level launches of dense decode on Hopper: choose the variant, allocate, hand over tensors."""

from __future__ import annotations

import functools

import torch

from flash_mla import kernels
from flash_mla.backends.hopper.dense_decode_heuristics import (
    BOXES,
    CUT_COST,
    FIXED_COST,
    DenseDecodeConfig,
    box_of_pages,
    dense_decode_config,
)
from flash_mla.backends.hopper.launch import (
    SHORT_NAME,
    Argument,
    DecodeCall,
    Results,
    num_sms,
    on_its_device,
    plan,
    positive_scale,
    rows_aligned,
    with_aligned_rows,
    with_aligned_strides,
)
from flash_mla.backends.hopper.recorded_call import RecordedCall, recorded
from flash_mla.plan import SplitPlan
from flash_mla.problem import DecodeInputs, DecodeProblem

__all__ = ["decode", "dense_decode_kernel", "plan_decode", "record", "why_not"]


def why_not(problem: DecodeProblem) -> str | None:
    """The reason there is no kernel that loads the pages of a dense problem, or None."""
    if box_of_pages(problem.page_size) is None:
        return (
            f"no Hopper kernel for pages of {problem.page_size} tokens, s_q={problem.s_q}, h_q={problem.h_q} and "
            f"h_kv={problem.h_kv}, where query rows need packing; only for pages of a multiple of {min(BOXES)} tokens"
        )
    return kernels.unavailable(dense_decode_kernel(problem))


@functools.lru_cache(maxsize=1024)
def _layout(problem: DecodeProblem) -> DenseDecodeConfig:
    rows = problem.s_q * problem.h_q // problem.h_kv
    box = box_of_pages(problem.page_size)
    assert box is not None
    return dense_decode_config(rows, problem.b * problem.h_kv, num_sms(problem.device), box)


def dense_decode_kernel(problem: DecodeProblem) -> str:
    """Name of the variant that serves a problem."""
    config = _layout(problem)
    shape = f"rows{config.rows}" if config.swapped else f"cluster{config.cluster}_pages{config.box}"
    return f"dense_decode_{SHORT_NAME[problem.dtype]}_{problem.d_qk}_{shape}"


@on_its_device
def plan_decode(problem: DecodeProblem, inputs: DecodeInputs) -> SplitPlan:
    """Plan a decode call on the device."""
    config = _layout(problem)
    assert inputs.cache_seqlens is not None
    return plan(
        inputs.cache_seqlens,
        tile=config.tile,
        fixed_cost=FIXED_COST,
        num_workers=config.num_workers,
        even_workers=config.even_workers,
        units_per_request=problem.h_kv * config.passes,
        min_cost=config.min_cost,
        cut_cost=CUT_COST,
        slack=config.slack,
        batch_invariant=problem.batch_invariant,
    )


@functools.lru_cache(maxsize=1024)
def _dense_decode(problem: DecodeProblem, num_units: int, num_workers: int, max_pages: int) -> DecodeCall:
    config = _layout(problem)
    return DecodeCall.of(
        problem,
        dense_decode_kernel(problem),
        num_units,
        num_workers,
        unit_rows=config.unit_rows,
        max_tiles=-(-max_pages * problem.page_size // config.tile),
        flags=(problem.causal,) if config.swapped else (problem.causal, config.row_tiles),
        scaled=not config.swapped,
    )


@on_its_device
def decode(problem: DecodeProblem, inputs: DecodeInputs, work: torch.Tensor, splits: torch.Tensor) -> Results:
    """Run a planned dense decode call: the attention kernel and, behind it, combine."""
    q, scale = positive_scale(with_aligned_rows(inputs.q), inputs.softmax_scale)
    return _call(problem, inputs, work, splits).launch(inputs.out, scale, work, splits, *_arguments(inputs, q))


@on_its_device
def record(
    problem: DecodeProblem, inputs: DecodeInputs, work: torch.Tensor, splits: torch.Tensor, results: Results
) -> RecordedCall | None:
    """What repeats a call that `decode` has run with these results, if it can be repeated."""
    call, arguments = _call(problem, inputs, work, splits), _arguments(inputs, inputs.q)
    return recorded(call, inputs, work, splits, results, *arguments)


def _call(problem: DecodeProblem, inputs: DecodeInputs, work: torch.Tensor, splits: torch.Tensor) -> DecodeCall:
    assert inputs.block_table is not None
    return _dense_decode(problem, splits.shape[0] - 1, work.shape[0] - 1, inputs.block_table.shape[1])


def _arguments(inputs: DecodeInputs, q: torch.Tensor) -> tuple[Argument, ...]:
    """What the kernel reads before the plan, in its order."""
    k_cache, block_table, cache_seqlens = inputs.k_cache, inputs.block_table, inputs.cache_seqlens
    assert block_table is not None
    assert cache_seqlens is not None
    k_cache = with_aligned_strides(k_cache)
    if not rows_aligned(k_cache):
        raise ValueError(
            f"k_cache: got strides {list(k_cache.stride())} at address {k_cache.data_ptr():#x}, "
            "need rows of their own that begin at multiples of 16 bytes"
        )
    return (
        Argument("q", q),
        Argument("k_cache", k_cache),
        Argument("block_table", block_table),
        Argument("cache_seqlens", cache_seqlens),
    )
