"""Torch-level launches of token-sparse decode on Hopper, and of dense decode where KV is brought token by token.

The same kernels do both: to them a block table is indices that name whole pages."""

from __future__ import annotations

import functools
from typing import NamedTuple

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
    with_aligned_strides,
)
from flash_mla.backends.hopper.recorded_call import RecordedCall, recorded
from flash_mla.backends.hopper.sparse_decode_heuristics import (
    ROWS,
    TILE,
    SparseDecodeConfig,
    cluster_size,
    few_heads,
    is_compute_bound,
    sparse_decode_config,
)
from flash_mla.kv_cache import KVCacheFormat
from flash_mla.plan import SplitPlan
from flash_mla.problem import DecodeInputs, DecodeProblem

__all__ = ["decode", "plan_decode", "record", "sparse_decode_kernel", "why_not"]

# (main, extra) of the calls whose caches are of two formats.
TWO_FORMATS = ((KVCacheFormat.FP8_V41, KVCacheFormat.FP4_V41),)


class _Names(NamedTuple):
    """What names the tokens of a cache to attend to."""

    indices: Argument  # [b, s_q, n] int32
    lengths: Argument  # [b] int32: how many tokens count; perhaps more than are named, or less than 0
    tokens: int  # that the indices name
    all_count: bool  # whether lengths says no more than tokens does


def why_not(problem: DecodeProblem) -> str | None:
    """The reason there is no kernel that brings KV of a problem token by token, or None."""
    formats = _formats(problem)
    if len(formats) > 1 and formats not in TWO_FORMATS:
        return f"no Hopper kernel for {formats[1].name} beside {formats[0].name} yet"
    return kernels.unavailable(sparse_decode_kernel(problem))


def sparse_decode_kernel(problem: DecodeProblem) -> str:
    """Name of the variant that serves a problem."""
    if not problem.kv_format.is_quantised:
        suffix = "_compute_bound" if _is_compute_bound(problem) else ""
        return f"sparse_decode_{problem.kv_format.value}_{problem.d_qk}{suffix}"
    formats = "_".join(kv_format.value for kv_format in _formats(problem))
    heads = _few_heads(problem)
    # Any number of heads can do without CTAs that share rows. Queries in fp16 are rare; and a peer would have to have
    # NVFP4's RoPE, which is converted, before probabilities take its place.
    shared = problem.dtype == torch.bfloat16 and problem.kv_format is not KVCacheFormat.NVFP4
    cluster = cluster_size(problem.h_q) if shared else 1
    layout = f"cluster{cluster}" if heads is None else f"heads{heads}"
    return f"sparse_decode_{SHORT_NAME[problem.dtype]}_{formats}_{layout}"


def _is_compute_bound(problem: DecodeProblem) -> bool:
    if problem.batch_invariant:  # the number of requests must not choose the kernel, whose bits differ
        return False
    tiles = None if problem.topk is None else _tiles(problem.topk, problem.extra_topk or 0)
    return is_compute_bound(problem.b, problem.s_q, problem.h_q, tiles, num_sms(problem.device))


def _few_heads(problem: DecodeProblem) -> int | None:
    """Heads of the kernel of swapped operands that serves a problem, or None if none does."""
    if problem.dtype != torch.bfloat16 or len(_formats(problem)) > 1:
        return None
    return few_heads(problem.h_q, problem.kv_format)


def _formats(problem: DecodeProblem) -> tuple[KVCacheFormat, ...]:
    """The different formats of the caches, the main one's first."""
    if problem.extra_format in (None, problem.kv_format):
        return (problem.kv_format,)
    return problem.kv_format, problem.extra_format


def _tiles(*tokens: int) -> int:
    """Tiles of a query token that attends to so many tokens of each cache."""
    return sum(-(-n // TILE) for n in tokens)


@functools.lru_cache(maxsize=1024)
def _layout(problem: DecodeProblem) -> SparseDecodeConfig:
    equal = problem.topk is not None and not (problem.has_topk_length or problem.has_extra_topk_length)
    tiles = _tiles(problem.topk or 0, problem.extra_topk or 0) if equal else None
    rows = _few_heads(problem) or ROWS
    queries, sms, plain = problem.b * problem.s_q, num_sms(problem.device), not problem.kv_format.is_quantised
    return sparse_decode_config(queries, problem.h_q, tiles, sms, rows, plain=plain)


def _names(problem: DecodeProblem, inputs: DecodeInputs) -> tuple[_Names, _Names]:
    """Of the main and of the extra cache."""
    if inputs.indices is None:
        assert inputs.block_table is not None
        assert inputs.cache_seqlens is not None
        pages = inputs.block_table[:, None].expand(-1, problem.s_q, -1)
        lengths = Argument("cache_seqlens", inputs.cache_seqlens)
        main = _Names(Argument("block_table", pages), lengths, pages.shape[2] * problem.page_size, all_count=False)
    else:
        main = _sparse_names(problem, inputs, "indices", "topk_length")
    if inputs.extra_indices is None:
        source, indices = main.indices
        none = Argument(source, indices[..., :0])
        return main, _Names(none, _constant_length(problem, 0), 0, all_count=True)
    return main, _sparse_names(problem, inputs, "extra_indices", "extra_topk_length")


def _sparse_names(problem: DecodeProblem, inputs: DecodeInputs, indices: str, lengths: str) -> _Names:
    """Of the cache that these inputs name the tokens of."""
    named, counts = Argument(indices, getattr(inputs, indices)), getattr(inputs, lengths)
    topk = named.tensor.shape[2]
    if counts is not None:
        return _Names(named, Argument(lengths, counts), topk, all_count=False)
    return _Names(named, _constant_length(problem, topk), topk, all_count=True)


def _constant_length(problem: DecodeProblem, topk: int) -> Argument:
    return Argument(None, constant(topk, torch.int32, problem.device).expand(problem.b))


@on_its_device
def plan_decode(problem: DecodeProblem, inputs: DecodeInputs) -> SplitPlan:
    """Plan a decode call on the device."""
    config = _layout(problem)
    lengths, extra_lengths = (
        names.lengths.tensor if names.all_count else names.lengths.tensor.clamp(0, names.tokens)
        for names in _names(problem, inputs)
    )
    return plan(
        lengths,
        extra_lengths=extra_lengths,
        tile=TILE,
        fixed_cost=config.fixed_cost,
        num_workers=config.num_workers,
        even_workers=config.even_workers,
        units_per_request=problem.s_q * config.passes,
        cut_cost=config.cut_cost,
        slack=config.slack,
        batch_invariant=problem.batch_invariant,
    )


@functools.lru_cache(maxsize=1024)
def _sparse_decode(problem: DecodeProblem, num_units: int, num_workers: int, max_tiles: int) -> DecodeCall:
    config = _layout(problem)
    return DecodeCall.of(
        problem,
        sparse_decode_kernel(problem),
        num_units,
        num_workers,
        unit_rows=config.unit_rows,
        max_tiles=max_tiles,
        flags=(
            problem.page_size,
            problem.extra_page_size or problem.page_size,
            problem.page_size if problem.topk is None else 1,  # tokens that an index names
            problem.causal,
            config.row_tiles,
        ),
        scaled=_few_heads(problem) is None,
        unsplit=config.unsplit and not problem.batch_invariant,
        most_splits=max_tiles,
    )


@on_its_device
def decode(problem: DecodeProblem, inputs: DecodeInputs, work: torch.Tensor, splits: torch.Tensor) -> Results:
    """Run a planned call: the attention kernel and, behind it, combine."""
    q, scale = positive_scale(with_aligned_rows(inputs.q), inputs.softmax_scale)
    call, arguments = _call(problem, inputs, q, work, splits)
    return call.launch(inputs.out, scale, work, splits, *arguments)


@on_its_device
def record(
    problem: DecodeProblem, inputs: DecodeInputs, work: torch.Tensor, splits: torch.Tensor, results: Results
) -> RecordedCall | None:
    """What repeats a call that `decode` has run with these results, if it can be repeated."""
    call, arguments = _call(problem, inputs, inputs.q, work, splits)
    return recorded(call, inputs, work, splits, results, *arguments)


def _call(
    problem: DecodeProblem, inputs: DecodeInputs, q: torch.Tensor, work: torch.Tensor, splits: torch.Tensor
) -> tuple[DecodeCall, tuple[Argument, ...]]:
    """The call over a plan, and what its kernel reads before the plan, in its order."""
    main, extra = _names(problem, inputs)
    max_tiles = _tiles(main.tokens, extra.tokens)
    pages = extra_pages = Argument("k_cache", _pages("k_cache", problem.kv_format, inputs.k_cache))
    if inputs.extra_k_cache is not None:
        assert problem.extra_format is not None
        extra_pages = Argument("extra_k_cache", _pages("extra_k_cache", problem.extra_format, inputs.extra_k_cache))
    if inputs.attn_sink is None:
        sink = Argument(None, constant(float("-inf"), torch.float32, problem.device).expand(problem.h_q))
    else:
        sink = Argument("attn_sink", inputs.attn_sink)
    return _sparse_decode(problem, splits.shape[0] - 1, work.shape[0] - 1, max_tiles), (
        Argument("q", q),
        pages,
        main.indices,
        main.lengths,
        extra_pages,
        extra.indices,
        extra.lengths,
        sink,
    )


def _pages(name: str, kv_format: KVCacheFormat, cache: torch.Tensor) -> torch.Tensor:
    """A cache as uint8, a view: [num_pages, bytes of a page], or [num_pages, page_size, bytes] of a plain one."""
    if not kv_format.is_quantised:
        pages = with_aligned_strides(cache).view(torch.uint8)
        if pages.data_ptr() % 16 or any(stride % 16 for stride in pages.stride()[:2]):
            raise ValueError(
                f"{name}: got strides {list(cache.stride())} at address {cache.data_ptr():#x}, "
                "need rows that begin at multiples of 16 bytes"
            )
        return pages[:, :, 0]
    pages = cache.view(torch.uint8).flatten(1)
    if len(pages) == 1:  # its stride means nothing
        pages = pages.as_strided(pages.shape, (-(-pages.shape[1] // 16) * 16, 1))
    if pages.data_ptr() % 16 or pages.stride(0) % 16:
        raise ValueError(
            f"{name}: got a page stride of {pages.stride(0)} bytes at address {pages.data_ptr():#x}, "
            "need pages that begin at multiples of 16 bytes"
        )
    return pages
