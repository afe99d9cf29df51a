"""Torch-level launches of token-sparse decode on Hopper."""

from __future__ import annotations

import functools

import torch

from flash_mla import kernels
from flash_mla.backends.hopper.launch import (
    SHORT_NAME,
    Argument,
    DecodeCall,
    Results,
    constant,
    num_sms,
    on_its_device,
    plan,
    positive_scale,
    with_aligned_rows,
)
from flash_mla.backends.hopper.recorded_call import RecordedCall, recorded
from flash_mla.backends.hopper.sparse_decode_heuristics import (
    TILE,
    SparseDecodeConfig,
    cluster_size,
    sparse_decode_config,
)
from flash_mla.kv_cache import KVCacheFormat
from flash_mla.plan import SplitPlan
from flash_mla.problem import DecodeInputs, DecodeProblem

__all__ = ["decode", "plan_decode", "record", "sparse_decode_kernel", "why_not"]

FORMATS = (KVCacheFormat.FP8_V32, KVCacheFormat.FP8_V4, KVCacheFormat.FP8_V41, KVCacheFormat.NVFP4)


def why_not(problem: DecodeProblem) -> str | None:
    """The reason there is no kernel for a sparse problem, or None."""
    if problem.kv_format not in FORMATS:
        return f"no Hopper kernel for sparse decode over {problem.kv_format.name} yet"
    if problem.extra_format not in (None, problem.kv_format):
        return f"no Hopper kernel for {problem.extra_format.name} beside {problem.kv_format.name} yet"
    if problem.dtype != torch.bfloat16:
        return f"no Hopper kernel for sparse decode of {problem.dtype} queries over {problem.kv_format.name}"
    return kernels.unavailable(sparse_decode_kernel(problem, cluster_size(problem.h_q)))


def sparse_decode_kernel(problem: DecodeProblem, cluster: int) -> str:
    """Name of the variant that serves a problem."""
    return f"sparse_decode_{SHORT_NAME[problem.dtype]}_{problem.kv_format.value}_cluster{cluster}"


def _max_tiles(problem: DecodeProblem) -> int:
    """Tiles of a query token, if all of its indices count."""
    return sum(-(-topk // TILE) for topk in (problem.topk, problem.extra_topk) if topk is not None)


@functools.lru_cache(maxsize=1024)
def _layout(problem: DecodeProblem) -> SparseDecodeConfig:
    equal = not (problem.has_topk_length or problem.has_extra_topk_length)
    tiles = _max_tiles(problem) if equal else None
    return sparse_decode_config(problem.b * problem.s_q, problem.h_q, tiles, num_sms(problem.device))


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
        sparse_decode_kernel(problem, config.cluster),
        num_units,
        num_workers,
        unit_rows=config.unit_rows,
        max_tiles=_max_tiles(problem),
        flags=(problem.page_size, problem.extra_page_size or problem.page_size, config.row_tiles),
        unsplit=config.unsplit and not problem.batch_invariant,
    )


@on_its_device
def decode(problem: DecodeProblem, inputs: DecodeInputs, work: torch.Tensor, splits: torch.Tensor) -> Results:
    """Run a planned sparse decode call: the attention kernel and, behind it, combine."""
    q, scale = positive_scale(with_aligned_rows(inputs.q), inputs.softmax_scale)
    call = _sparse_decode(problem, splits.shape[0] - 1, work.shape[0] - 1)
    return call.launch(inputs.out, scale, *_arguments(problem, inputs, q, work, splits))


@on_its_device
def record(
    problem: DecodeProblem, inputs: DecodeInputs, work: torch.Tensor, splits: torch.Tensor
) -> RecordedCall | None:
    """What repeats a call that `decode` has run, if it can be repeated."""
    call = _sparse_decode(problem, splits.shape[0] - 1, work.shape[0] - 1)
    return recorded(call, inputs, *_arguments(problem, inputs, inputs.q, work, splits))


def _arguments(
    problem: DecodeProblem, inputs: DecodeInputs, q: torch.Tensor, work: torch.Tensor, splits: torch.Tensor
) -> tuple[Argument, ...]:
    """What the kernel reads, in its order."""

    def given(source: str, absent: torch.Tensor) -> Argument:
        tensor = getattr(inputs, source)
        return Argument(None, absent) if tensor is None else Argument(source, tensor)

    assert inputs.indices is not None
    pages, indices = Argument("k_cache", _pages("k_cache", inputs.k_cache)), Argument("indices", inputs.indices)
    extra_pages, extra_indices = pages, indices  # stand in for what is absent
    if inputs.extra_k_cache is not None:
        assert inputs.extra_indices is not None
        extra_pages = Argument("extra_k_cache", _pages("extra_k_cache", inputs.extra_k_cache))
        extra_indices = Argument("extra_indices", inputs.extra_indices)
    no_sink = constant(float("-inf"), torch.float32, problem.device).expand(problem.h_q)
    return (
        Argument("q", q),
        pages,
        indices,
        given("topk_length", _lengths(problem, None, problem.topk)),
        extra_pages,
        extra_indices,
        given("extra_topk_length", _lengths(problem, None, problem.extra_topk)),
        given("attn_sink", no_sink),
        Argument(None, work),
        Argument(None, splits),
    )


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
