"""Torch-level launches of the decode and sparse prefill kernels: choose the variant, allocate, hand over tensors."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import NamedTuple

import torch
import triton

from flash_mla.backends.triton.combine import combine_kernel
from flash_mla.backends.triton.dense_decode import dense_decode_kernel
from flash_mla.backends.triton.dequant import FORMAT_NUMBER
from flash_mla.backends.triton.heuristics import (
    START_COST,
    DenseDecodeConfig,
    Gpu,
    SparseConfig,
    combine_tile,
    dense_decode_config,
    gpu_of_arch,
    sparse_config,
)
from flash_mla.backends.triton.sparse_attention import sparse_attention_kernel
from flash_mla.backends.triton.specialised import launch
from flash_mla.kv_cache import KVCacheFormat
from flash_mla.plan import INVARIANT_PIECE_TILES, MAX_INVARIANT_PIECES, SplitPlan, max_slots, split_plan
from flash_mla.problem import DecodeInputs, DecodeProblem, SparsePrefillInputs, SparsePrefillProblem

__all__ = ["decode", "plan_decode", "sparse_prefill"]

LOG2_E = math.log2(math.e)
NOPE_OF_V4 = 448  # its columns with a scale
# Bytes at multiples of which a cache's tokens must begin: those of its widest plain number.
ALIGNMENT = {KVCacheFormat.FP8_V32: 4, KVCacheFormat.FP8_V4: 2}


class Strides(NamedTuple):
    """Of a tensor [u0, u1, r0, r1, ...], where (u0, u1) is a unit of work and (r0, r1) one of its query rows."""

    u0: int
    u1: int
    r0: int
    r1: int


class Cache(NamedTuple):
    """A cache as kernels take it: bytes or 16-bit floats.

    Kernels are compiled for the strides of pages and tokens, of which a process has few: an address is one instruction
    then, where 64-bit numbers only known when running take five.
    """

    data: torch.Tensor
    page_stride: int
    token_stride: int
    head_stride: int
    num_slots: int
    page_size: int


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU; for the CPU, on which the interpreter runs, a small one that lacks what can be lacking."""
    if device.type == "cpu":
        return gpu_of_arch(8, 0, num_sms=4)
    properties = torch.cuda.get_device_properties(device)
    gpu = gpu_of_arch(properties.major, properties.minor, properties.multi_processor_count)
    # Compiling the tiles that wgmma takes, Triton 3.2 aborts the process.
    return replace(gpu, has_wgmma=False) if triton.__version__.startswith("3.2.") else gpu


@functools.lru_cache(maxsize=1024)
def _dense_config(problem: DecodeProblem) -> DenseDecodeConfig:
    rows = problem.s_q * problem.h_q // problem.h_kv
    return dense_decode_config(rows, gpu_of(problem.device), quantised=problem.kv_format.is_quantised)


@functools.lru_cache(maxsize=1024)
def _sparse_decode_config(problem: DecodeProblem) -> SparseConfig:
    return sparse_config(
        problem.h_q,
        problem.b * problem.s_q,
        problem.topk or 0,
        problem.extra_topk or 0,
        gpu_of(problem.device),
        quantised=any(one is not None and one.is_quantised for one in (problem.kv_format, problem.extra_format)),
        batch_invariant=problem.batch_invariant,
    )


@functools.lru_cache(maxsize=1024)
def _prefill_config(problem: SparsePrefillProblem) -> SparseConfig:
    return sparse_config(problem.h_q, problem.s_q, problem.topk, 0, gpu_of(problem.device), quantised=False)


def plan_decode(problem: DecodeProblem, inputs: DecodeInputs) -> SplitPlan:
    """Plan a decode call on the device.

    Sparse calls cut the indices of every query token into equally many ranges, which their shapes decide: no worker's
    range is planned, and `work` is empty.
    """
    if problem.topk is not None:
        num_units, splits = problem.b * problem.s_q, _sparse_decode_config(problem).splits
        work = torch.empty(1, 4, dtype=torch.int32, device=problem.device)
        return SplitPlan(work, _equal_splits(num_units, splits, problem.device))
    config = _dense_config(problem)
    assert inputs.cache_seqlens is not None
    return split_plan(
        inputs.cache_seqlens,
        tile=config.tiles.tile,
        fixed_cost=START_COST,
        num_workers=config.num_workers,
        units_per_request=problem.h_kv * config.passes,
        batch_invariant=problem.batch_invariant,
    )


def _equal_splits(num_units: int, splits: int, device: torch.device) -> torch.Tensor:
    """Where the slots of each unit begin, [num_units + 1] int32, when each has `splits`; none if that is one."""
    slots = splits if splits > 1 else 0
    return torch.arange(num_units + 1, dtype=torch.int32, device=device) * slots


def decode(
    problem: DecodeProblem, inputs: DecodeInputs, work: torch.Tensor, splits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a planned decode call: (out [b, s_q, h_q, d_v], lse [b, h_q, s_q] fp32).

    Raises:
        ValueError: a quantised cache whose tokens do not begin at multiples of its widest number's size.
    """
    out = inputs.out
    if out is None:
        out = inputs.q.new_empty(problem.b, problem.s_q, problem.h_q, problem.d_v)
    lse = inputs.q.new_empty(problem.b, problem.h_q, problem.s_q, dtype=torch.float32)
    if problem.topk is None:
        _dense_decode(problem, inputs, work, splits, out, lse)
    else:
        _sparse_decode(problem, inputs, splits, out, lse)
    return out, lse


def _dense_decode(
    problem: DecodeProblem,
    inputs: DecodeInputs,
    work: torch.Tensor,
    splits: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    assert inputs.block_table is not None
    assert inputs.cache_seqlens is not None
    config, q = _dense_config(problem), inputs.q
    tiles, group = config.tiles, problem.h_q // problem.h_kv
    cache = _cache("k_cache", inputs.k_cache, problem.kv_format)
    num_units = splits.shape[0] - 1
    slots = max_slots(
        num_units,
        config.num_workers,
        batch_invariant=problem.batch_invariant,
        max_tiles=-(-inputs.block_table.shape[1] * problem.page_size // tiles.tile),
    )
    partial_o, partial_lse = _workspace(slots, config.unit_rows, problem.d_v, q)
    out_strides = Strides(out.stride(0), group * out.stride(2), out.stride(1), out.stride(2))
    q_strides = q.stride()
    launch(
        dense_decode_kernel,
        config.num_workers * config.row_tiles,
        (
            q, cache.data, inputs.block_table, inputs.cache_seqlens, work, splits, out, lse, partial_o, partial_lse,
            q_strides[0], group * q_strides[2], q_strides[1], q_strides[2], *out_strides,
            cache.head_stride, inputs.block_table.stride(0),
            inputs.softmax_scale * LOG2_E, num_units, problem.s_q, problem.h_kv, group, config.passes,
            config.row_tiles,
        ),
        {
            "page_stride": cache.page_stride, "token_stride": cache.token_stride,
            "FORMAT": FORMAT_NUMBER[problem.kv_format], "PAGE_SIZE": problem.page_size,
            "D_ROPE": problem.d_qk - problem.d_v, "CAUSAL": problem.causal,
            "BATCH_INVARIANT": problem.batch_invariant, "MIN_PIECE": INVARIANT_PIECE_TILES,
            "MAX_PIECES": MAX_INVARIANT_PIECES,
            "HAS_FP8": gpu_of(problem.device).has_fp8, "ROWS": tiles.rows, "TILE": tiles.tile,
        },
        tiles.num_warps,
        tiles.num_stages,
    )  # fmt: skip
    if slots:
        rows = problem.s_q * group
        lse_strides = Strides(problem.h_q * problem.s_q, rows, 1, problem.s_q)
        _combine(
            _Partial(partial_o, partial_lse, None, splits),
            _Merged(out, lse, None, None, out_strides, lse_strides),
            units_1=problem.h_kv,
            rows_1=group,
            passes=config.passes,
            num_rows=rows,
        )


def _sparse_decode(
    problem: DecodeProblem, inputs: DecodeInputs, splits: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    assert inputs.indices is not None
    q, s_q, h_q = inputs.q, problem.s_q, problem.h_q
    main = _Scope(
        _slots_of(_cache("k_cache", inputs.k_cache, problem.kv_format), problem.kv_format),
        problem.kv_format,
        inputs.indices,
        inputs.indices.stride(0),
        inputs.indices.stride(1),
        inputs.topk_length,
    )
    extra = None
    if inputs.extra_k_cache is not None and problem.extra_format is not None and inputs.extra_indices is not None:
        extra = _Scope(
            _slots_of(_cache("extra_k_cache", inputs.extra_k_cache, problem.extra_format), problem.extra_format),
            problem.extra_format,
            inputs.extra_indices,
            inputs.extra_indices.stride(0),
            inputs.extra_indices.stride(1),
            inputs.extra_topk_length,
        )
    out_strides = Strides(out.stride(0), out.stride(1), 0, out.stride(2))
    merged = _Merged(out, lse, None, inputs.attn_sink, out_strides, Strides(h_q * s_q, 1, 0, s_q))
    q_strides = Strides(q.stride(0), q.stride(1), 0, q.stride(2))
    scale = inputs.softmax_scale
    _sparse_attention(_sparse_decode_config(problem), q, q_strides, scale, main, extra, merged, splits, units_1=s_q)


def sparse_prefill(
    problem: SparsePrefillProblem, inputs: SparsePrefillInputs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out [s_q, h_q, d_v], max_logits [s_q, h_q] fp32, lse [s_q, h_q] fp32)."""
    q, kv, indices, out = inputs.q, inputs.kv, inputs.indices, inputs.out
    if out is None:
        out = q.new_empty(problem.s_q, problem.h_q, problem.d_v)
    max_logits = q.new_empty(problem.s_q, problem.h_q, dtype=torch.float32)
    lse = torch.empty_like(max_logits)
    config = _prefill_config(problem)
    splits = _equal_splits(problem.s_q, config.splits, q.device) if config.splits > 1 else None
    main = _Scope(
        Cache(kv, kv.stride(0), 0, 0, num_slots=problem.s_kv, page_size=1),  # the rows of kv are pages of one token
        KVCacheFormat.BF16 if problem.dtype == torch.bfloat16 else KVCacheFormat.FP16,
        indices,
        indices.stride(0),
        0,
        inputs.topk_length,
    )
    out_strides = Strides(out.stride(0), 0, 0, out.stride(1))
    merged = _Merged(out, lse, max_logits, inputs.attn_sink, out_strides, Strides(problem.h_q, 0, 0, 1))
    q_strides = Strides(q.stride(0), 0, 0, q.stride(1))
    _sparse_attention(config, q, q_strides, inputs.sm_scale, main, None, merged, splits, units_1=1)
    return out, max_logits, lse


class _Scope(NamedTuple):
    """A cache, and of the indices [u0, u1, topk] into it the first `lengths` [u0], if not all."""

    cache: Cache
    kv_format: KVCacheFormat
    indices: torch.Tensor
    stride_u0: int
    stride_u1: int
    lengths: torch.Tensor | None

    def arguments(self) -> tuple[object, ...]:
        """As the kernel takes them."""
        return (
            self.cache.data,
            self.cache.num_slots,
            self.indices,
            self.stride_u0,
            self.stride_u1,
            self.indices.shape[-1],
            self.lengths,
        )


NO_SCOPE = (None, 0, None, 0, 0, 0, None)  # the arguments of an absent one


class _Partial(NamedTuple):
    """The results of split units, by slot, and which slots are whose."""

    o: torch.Tensor
    lse: torch.Tensor
    max_logits: torch.Tensor | None
    splits: torch.Tensor


class _Merged(NamedTuple):
    """Where results go, and the sinks that scale them."""

    out: torch.Tensor
    lse: torch.Tensor
    max_logits: torch.Tensor | None
    sink: torch.Tensor | None
    out_strides: Strides
    lse_strides: Strides


def _sparse_attention(
    config: SparseConfig,
    q: torch.Tensor,
    q_strides: Strides,
    scale: float,
    main: _Scope,
    extra: _Scope | None,
    merged: _Merged,
    splits: torch.Tensor | None,
    *,
    units_1: int,
) -> None:
    """Attend with the heads of the query tokens (u0, u1), of which there are `units_1` to a u0."""
    tiles, h_q, gpu = config.tiles, q.shape[-2], gpu_of(q.device)
    num_units = q.numel() // (h_q * q.shape[-1])
    partial_o = partial_lse = partial_max = None
    if splits is not None and config.splits > 1:
        slots = num_units * config.splits
        partial_o, partial_lse = _workspace(slots, config.unit_rows, merged.out.shape[-1], q)
        partial_max = None if merged.max_logits is None else torch.empty_like(partial_lse)
    extra_format = main.kv_format if extra is None else extra.kv_format
    rope_is_value = KVCacheFormat.FP8_V4 in (main.kv_format, extra_format)
    columns = NOPE_OF_V4 if rope_is_value else merged.out.shape[-1]
    d_rope = q.shape[-1] - columns
    launch(
        sparse_attention_kernel,
        min(num_units * config.row_tiles * config.splits, gpu.num_sms * tiles.programs_per_sm),
        (
            q, merged.sink, merged.out, merged.lse, merged.max_logits, partial_o, partial_lse, partial_max,
            *main.arguments(), *(NO_SCOPE if extra is None else extra.arguments()),
            q_strides.u0, q_strides.u1, q_strides.r1,
            merged.out_strides.u0, merged.out_strides.u1, merged.out_strides.r1,
            merged.lse_strides.u0, merged.lse_strides.u1, merged.lse_strides.r1,
            scale * LOG2_E, num_units, units_1, h_q, config.splits, config.row_tiles,
        ),
        {
            "page_stride": main.cache.page_stride, "token_stride": main.cache.token_stride,
            "FORMAT": FORMAT_NUMBER[main.kv_format], "PAGE_SIZE": main.cache.page_size,
            "extra_page_stride": 0 if extra is None else extra.cache.page_stride,
            "extra_token_stride": 0 if extra is None else extra.cache.token_stride,
            "EXTRA_FORMAT": FORMAT_NUMBER[extra_format],
            "EXTRA_PAGE_SIZE": 1 if extra is None else extra.cache.page_size,
            "COLUMNS": columns, "D_ROPE": d_rope, "D_V_ROPE": d_rope if rope_is_value else 0,
            "HAS_FP8": gpu.has_fp8, "ROWS": tiles.rows, "TILE": tiles.tile,
        },
        tiles.num_warps,
        tiles.num_stages,
    )  # fmt: skip
    if partial_o is not None and partial_lse is not None and splits is not None:
        partial = _Partial(partial_o, partial_lse, partial_max, splits)
        _combine(partial, merged, units_1=units_1, rows_1=h_q, passes=1, num_rows=h_q)


def _combine(partial: _Partial, merged: _Merged, *, units_1: int, rows_1: int, passes: int, num_rows: int) -> None:
    """Merge the slots of every split unit into `merged`; other units are not touched."""
    num_units, unit_rows = partial.splits.shape[0] - 1, partial.lse.shape[1]
    rows, slots = combine_tile(num_units * unit_rows)
    launch(
        combine_kernel,
        num_units * -(-unit_rows // rows),
        (
            partial.o, partial.lse, partial.max_logits, partial.splits, merged.sink,
            merged.out, merged.lse, merged.max_logits, *merged.out_strides, *merged.lse_strides,
            units_1, rows_1, passes, num_rows, unit_rows,
        ),
        {"ROWS": rows, "SLOTS": slots},
        num_warps=4,
        num_stages=3,
    )  # fmt: skip


def _workspace(slots: int, rows: int, d_v: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for partial results: o [slots, rows, d_v] and lse [slots, rows], fp32."""
    o = like.new_empty(slots, rows, d_v, dtype=torch.float32)
    return o, like.new_empty(slots, rows, dtype=torch.float32)


def _cache(name: str, cache: torch.Tensor, kv_format: KVCacheFormat) -> Cache:
    num_pages, page_size = cache.shape[:2]
    data = cache.view(torch.uint8) if kv_format.is_quantised else cache
    page_stride, token_stride, head_stride, _ = data.stride()
    alignment = ALIGNMENT.get(kv_format, 1)
    if data.data_ptr() % alignment or page_stride % alignment:
        raise ValueError(
            f"{name}: got page stride {page_stride} at address {data.data_ptr():#x}, need multiples of {alignment} "
            f"bytes for {kv_format.name}"
        )
    return Cache(data, page_stride, token_stride, head_stride, num_pages * page_size, page_size)


def _slots_of(cache: Cache, kv_format: KVCacheFormat) -> Cache:
    """`cache` for calls that name slots: if no gaps part its pages, as pages of one token, which divides nothing."""
    if cache.page_stride != cache.page_size * cache.token_stride or kv_format is KVCacheFormat.FP8_V4:
        return cache
    return cache._replace(page_stride=cache.token_stride, page_size=1)
