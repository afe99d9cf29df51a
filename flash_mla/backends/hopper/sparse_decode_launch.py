"""Torch-level launches of token-sparse decode on Hopper."""

from __future__ import annotations

import functools

import torch

from flash_mla import kernels
from flash_mla.backends.hopper.launch import (
    SHORT_NAME,
    DecodeCall,
    constant,
    num_sms,
    on_its_device,
    plan,
    positive_scale,
    with_aligned_rows,
)
from flash_mla.backends.hopper.sparse_decode_heuristics import (
    ROWS,
    TILE,
    SparseDecodeConfig,
    cluster_size,
    few_heads,
    sparse_decode_config,
)
from flash_mla.kv_cache import KVCacheFormat
from flash_mla.plan import SplitPlan
from flash_mla.problem import DecodeInputs, DecodeProblem

__all__ = ["decode", "plan_decode", "sparse_decode_kernel", "why_not"]

FORMATS = (KVCacheFormat.FP8_V32, KVCacheFormat.FP8_V4, KVCacheFormat.FP8_V41, KVCacheFormat.NVFP4)


def why_not(problem: DecodeProblem) -> str | None:
    """The reason there is no kernel for a sparse problem, or None."""
    if problem.kv_format not in FORMATS:
        return f"no Hopper kernel for sparse decode over {problem.kv_format.name} yet"
    if problem.extra_format not in (None, problem.kv_format):
        return f"no Hopper kernel for {problem.extra_format.name} beside {problem.kv_format.name} yet"
    if problem.dtype != torch.bfloat16:
        return f"no Hopper kernel for sparse decode of {problem.dtype} queries over {problem.kv_format.name}"
    return kernels.unavailable(sparse_decode_kernel(problem))


def sparse_decode_kernel(problem: DecodeProblem) -> str:
    """Name of the variant that serves a problem."""
    heads = few_heads(problem.h_q, problem.kv_format)
    layout = f"cluster{cluster_size(problem.h_q)}" if heads is None else f"heads{heads}"
    return f"sparse_decode_{SHORT_NAME[problem.dtype]}_{problem.kv_format.value}_{layout}"


def _max_tiles(problem: DecodeProblem) -> int:
    """Tiles of a query token, if all of its indices count."""
    return sum(-(-topk // TILE) for topk in (problem.topk, problem.extra_topk) if topk is not None)


@functools.lru_cache(maxsize=1024)
def _layout(problem: DecodeProblem) -> SparseDecodeConfig:
    equal = not (problem.has_topk_length or problem.has_extra_topk_length)
    tiles = _max_tiles(problem) if equal else None
    rows = few_heads(problem.h_q, problem.kv_format) or ROWS
    return sparse_decode_config(problem.b * problem.s_q, problem.h_q, tiles, num_sms(problem.device), rows)


def _lengths(problem: DecodeProblem, given: torch.Tensor | None, topk: int | None) -> torch.Tensor:
    """[b] int32: how many indices count; perhaps more than there are, or less than 0."""
    return constant(topk or 0, torch.int32, problem.device).expand(problem.b) if given is None else given


@on_its_device
def plan_decode(problem: DecodeProblem, inputs: DecodeInputs) -> SplitPlan:
    """Plan a decode call on the device."""
    config = _layout(problem)
    lengths, extra_lengths = (
        _lengths(problem, given, topk) if given is None else given.clamp(0, topk)
        for given, topk in (
            (inputs.topk_length, problem.topk),
            (inputs.extra_topk_length, problem.extra_topk),
        )
    )
    return plan(
        lengths,
        extra_lengths=extra_lengths,
        tile=TILE,
        fixed_cost=config.fixed_cost,
        num_workers=config.num_workers,
        units_per_request=problem.s_q * config.passes,
        min_cost=config.min_cost,
        batch_invariant=problem.batch_invariant,
    )


@functools.lru_cache(maxsize=1024)
def _sparse_decode(problem: DecodeProblem, num_units: int, num_workers: int) -> DecodeCall:
    config = _layout(problem)
    return DecodeCall.of(
        problem,
        sparse_decode_kernel(problem),
        num_units,
        num_workers,
        unit_rows=config.unit_rows,
        max_tiles=_max_tiles(problem),
        flags=(problem.page_size, problem.extra_page_size or problem.page_size, config.row_tiles),
    )


@on_its_device
def decode(
    problem: DecodeProblem, inputs: DecodeInputs, work: torch.Tensor, splits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a planned sparse decode call: the attention kernel and, behind it, combine."""
    q, scale = positive_scale(with_aligned_rows(inputs.q), inputs.softmax_scale)
    call = _sparse_decode(problem, splits.shape[0] - 1, work.shape[0] - 1)
    pages = _pages("k_cache", inputs.k_cache)
    assert inputs.indices is not None
    extra_pages, extra_indices = pages, inputs.indices  # stand in for what is absent
    if inputs.extra_k_cache is not None:
        assert inputs.extra_indices is not None
        extra_pages, extra_indices = _pages("extra_k_cache", inputs.extra_k_cache), inputs.extra_indices
    sink = inputs.attn_sink
    if sink is None:
        sink = constant(float("-inf"), torch.float32, problem.device).expand(problem.h_q)
    return call.launch(
        problem, inputs.out, scale,
        q, pages, inputs.indices, _lengths(problem, inputs.topk_length, problem.topk),
        extra_pages, extra_indices, _lengths(problem, inputs.extra_topk_length, problem.extra_topk),
        sink, work, splits,
    )  # fmt: skip


def _pages(name: str, cache: torch.Tensor) -> torch.Tensor:
    """The bytes of a cache: [num_pages, bytes of a page] uint8, a view."""
    pages = cache.view(torch.uint8).flatten(1)
    if len(pages) == 1:  # its stride means nothing
        pages = pages.as_strided(pages.shape, (-(-pages.shape[1] // 16) * 16, 1))
    if pages.data_ptr() % 16 or pages.stride(0) % 16:
        raise ValueError(
            f"{name}: got a page stride of {pages.stride(0)} bytes at address {pages.data_ptr():#x}, "
            "need pages that begin at multiples of 16 bytes"
        )
    return pages
