"""Decode with a paged KV cache, dense or token-sparse: read the arguments, plan once, run."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from flash_mla import backends, checks
from flash_mla.decode_ops import Flags, problem_of
from flash_mla.kv_cache import KVCacheFormat
from flash_mla.problem import DecodeInputs, DecodeProblem, has_memory

__all__ = ["FlashMLASchedMeta", "flash_mla_with_kvcache", "get_mla_metadata"]

Results = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass
class FlashMLASchedMeta:
    """The schedule of decode calls: empty when made, filled by the first call, good for calls of one configuration.

    Attributes:
        have_initialized: whether a call has fixed the configuration. Setting it to False empties the schedule.
        config: that configuration.
        tile_scheduler_metadata: int32, which worker attends to which tiles; None until planned. Setting it to None has
            the next call plan again.
        num_splits: int32, where the partial results of each request lie; None until planned.
    """

    @dataclasses.dataclass
    class Config:
        """What must stay the same while a schedule is reused; the names are those of FlashMLA as far as it has them."""

        b: int
        s_q: int
        h_q: int
        page_block_size: int
        h_k: int
        causal: bool
        is_fp8_kvcache: bool
        topk: int | None
        extra_page_block_size: int | None
        extra_topk: int | None
        enable_batch_invariant: bool
        head_dim: int
        dtype: torch.dtype
        device: torch.device
        kv_format: KVCacheFormat
        extra_kv_format: KVCacheFormat | None
        has_topk_length: bool
        has_extra_topk_length: bool

    have_initialized: bool = False
    config: Config | None = None
    tile_scheduler_metadata: torch.Tensor | None = None
    num_splits: torch.Tensor | None = None

    def __post_init__(self) -> None:
        # No fields: clients may take a schedule apart and compare it.
        self._served: _Served | None = None
        self._planned_by: str | None = None  # a backend, whose plans mean nothing to others; None: a client

    @property
    def _is_planned(self) -> bool:
        """Whether its configuration is fixed, and not only until a client said that it is empty."""
        return self.have_initialized and self.config is not None

    def __getstate__(self) -> dict[str, object]:
        """What copies keep: all but the backend, a module, which their next call finds again."""
        return {**self.__dict__, "_served": None}


def get_mla_metadata(*args: object, **kwargs: object) -> tuple[FlashMLASchedMeta, None]:
    """An empty schedule for `flash_mla_with_kvcache`, which its first call fills.

    Arguments are accepted and ignored: older versions of FlashMLA planned here, from cache_seqlens and head counts.

    Returns:
        (schedule, None). Pass both on as tile_scheduler_metadata and num_splits.
    """
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    enable_batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a few new query tokens per request to a paged KV cache, in MLA's MQA mode.

    Without `indices` each request attends to its first cache_seqlens tokens (dense); with `indices` each query token
    attends to the tokens they name (token-sparse). All tensors are on q's device and dense in their last dimension;
    other strides are free.

    Under torch.compile the call is one operator, without a graph break. It leaves the metadata as it is: with empty
    metadata each run of the compiled code plans anew, so lengths may change from run to run; with metadata that an
    uncompiled call planned, it follows that plan.

    Args:
        q: [b, s_q, h_q, d] bfloat16 or float16, d 576 or 512.
        k_cache: [num_pages, page_size, h_kv, d] of q's dtype, or [num_pages, page_size, 1, bytes] in a quantised
            `KVCacheFormat` (dense: FP8_V32 only). h_q is a multiple of h_kv; h_kv is 1 with `indices`. V is the first
            512 columns of K. Rows that no request uses may hold anything, NaN included.
        block_table: [b, max_pages] int32, the pages of each request; entries beyond its length may hold anything.
            Ignored with `indices`.
        cache_seqlens: [b] int32, tokens of each request, 0 included. Ignored with `indices`.
        head_dim_v: 512.
        tile_scheduler_metadata: from `get_mla_metadata`. May be reused while shapes, flags, cache_seqlens and topk
            lengths stay the same.
        num_splits: None.
        softmax_scale: factor of the scores, d ** -0.5 by default.
        causal: query token j sees keys < cache_seqlens - s_q + j + 1. Dense only.
        is_fp8_kvcache: whether k_cache is quantised.
        indices: [b, s_q, topk] int32 slots, page * page_size + offset, in any order, repeats allowed; a negative entry
            is skipped.
        attn_sink: [h_q] float32; out is multiplied by exp(lse) / (exp(lse) + exp(attn_sink)). Only with `indices`.
        extra_k_cache: a second cache attended to in the same softmax, with a page size and format of its own (FP4_V41
            only beside FP8_V41). Only with `indices`.
        extra_indices_in_kvcache: [b, s_q, extra_topk] int32 slots of it.
        topk_length: [b] int32, only so many leading entries of `indices` count.
        extra_topk_length: [b] int32, the same for extra_indices_in_kvcache.
        out: [b, s_q, h_q, 512] of q's dtype to write into.
        enable_batch_invariant: the bits of a request's result do not depend on the rest of the batch.

    Returns:
        out [b, s_q, h_q, 512] of q's dtype, and lse [b, h_q, s_q] float32, the natural logarithm of the sum of
        exponentials of the scaled scores. A query token with nothing to attend to has out 0 and lse +inf.

    Raises:
        TypeError: an argument of the wrong class or dtype.
        ValueError: a shape, stride, device or combination that does not fit; metadata planned for another
            configuration; on the CPU, also a length, page or slot out of range.
        RuntimeError: no backend serves the device.
    """
    meta = tile_scheduler_metadata
    if not isinstance(meta, FlashMLASchedMeta):
        checks.instance("tile_scheduler_metadata", meta, FlashMLASchedMeta, "make one with get_mla_metadata()")
    if num_splits is not None:
        checks.no_num_splits(num_splits)
    if softmax_scale is not None:
        softmax_scale = checks.real_number("softmax_scale", softmax_scale)
    tensors = (
        q,
        k_cache,
        block_table,
        cache_seqlens,
        indices,
        attn_sink,
        extra_k_cache,
        extra_indices_in_kvcache,
        topk_length,
        extra_topk_length,
        out,
    )
    if torch.compiler.is_compiling() or not has_memory(q):
        named = Flags(head_dim_v, causal, is_fp8_kvcache, enable_batch_invariant)
        return _traced(meta, DecodeInputs(*tensors, softmax_scale=1.0), named, softmax_scale)
    # A call that looks like an earlier one is like it. Checking everything takes longer than launching kernels does,
    # comparing layouts does not; hence also a plain tuple here, which equals a named one.
    flags = (head_dim_v, causal, is_fp8_kvcache, enable_batch_invariant)
    served = meta._served
    if served is not None and served.flags == flags and meta.have_initialized:
        results = served.repeated(meta, tensors, softmax_scale)
        if results is not None:
            return results
    before = dict(meta.__dict__)
    try:
        return _checked(meta, tensors, flags, softmax_scale)
    except BaseException:
        meta.__dict__.update(before)  # what failed has planned nothing
        raise


def _checked(
    meta: FlashMLASchedMeta, tensors: tuple[torch.Tensor | None, ...], flags: tuple[Any, ...], scale: float | None
) -> Results:
    """A call that is not known to look like one before."""
    if not meta._is_planned:
        meta.config = meta.tile_scheduler_metadata = meta.num_splits = meta._served = meta._planned_by = None
    layouts, served = _layouts(tensors), meta._served
    if served is None or served.layouts != layouts or served.flags != flags:
        inputs = DecodeInputs._make((*tensors, 1.0))  # whose scale stands in, as checks read the tensors alone
        served = _serve(meta, inputs, Flags(*flags), layouts)
    problem, backend = served.problem, served.backend
    inputs = DecodeInputs._make((*tensors, served.default_scale if scale is None else scale))
    if problem.b == 0 or problem.s_q == 0:
        return _no_rows(problem, inputs)
    work, splits = meta.tile_scheduler_metadata, meta.num_splits
    if work is None or splits is None:
        plan = backend.plan_decode(problem, inputs)
        work, splits = plan.work, plan.splits
        meta.tile_scheduler_metadata, meta.num_splits, meta._planned_by = work, splits, backend.NAME
    checks.same_backend(meta._planned_by, backend.NAME)
    results = served.repeated(meta, tensors, scale)  # now that fresh metadata has a plan
    if results is not None:
        return results
    results = backend.decode(problem, inputs, work, splits)
    served.record(inputs, work, splits, results)
    return results


@dataclasses.dataclass
class _Served:
    """What calls that are alike look like from outside, what checks made of them, who runs and what repeats them."""

    layouts: list[object]
    flags: Flags
    problem: DecodeProblem
    config: FlashMLASchedMeta.Config
    backend: ModuleType
    default_scale: float
    repeat: Callable[..., Results | None] | None = None
    is_recorded: bool = False

    def record(self, inputs: DecodeInputs, work: torch.Tensor, splits: torch.Tensor, results: Results) -> None:
        """Have the backend, if it can, repeat calls like this one, which has run and given `results`."""
        if not self.is_recorded:
            record = getattr(self.backend, "record", None)
            try:
                self.repeat = None if record is None else record(self.problem, inputs, work, splits, results)
            except torch.OutOfMemoryError:  # the call itself has succeeded
                return
            self.is_recorded = True

    def repeated(
        self, meta: FlashMLASchedMeta, tensors: tuple[torch.Tensor | None, ...], scale: float | None
    ) -> Results | None:
        """out and lse by the metadata's plan; None if there is none, or the tensors look different."""
        work, splits = meta.tile_scheduler_metadata, meta.num_splits
        if self.repeat is None or work is None or splits is None:
            return None
        return self.repeat(tensors, self.default_scale if scale is None else scale, work, splits)


@dataclasses.dataclass
class _Kept:
    """For calls that look alike, whatever their metadata."""

    served: _Served | None = None


def _layouts(tensors: tuple[object, ...]) -> list[object]:
    """All that checks read of tensors."""
    return [
        None
        if value is None
        else (value.shape, value.stride(), value.dtype, value.device)
        if isinstance(value, torch.Tensor)
        else type(value)
        for value in tensors
    ]


def _serve(meta: FlashMLASchedMeta, inputs: DecodeInputs, flags: Flags, layouts: list[object]) -> _Served:
    """Check a call and choose its backend, unless that was done for one like it; note what came of it."""
    try:
        kept = _kept(backends.forced(), *flags, *layouts)
    except TypeError:  # flags that checks will explain
        kept = _Kept()
    served = kept.served
    if served is None:
        problem, config = _check(meta, inputs, flags)
        served = _Served(layouts, flags, problem, config, backends.choose(problem), problem.d_qk**-0.5)
        kept.served = served
    elif meta.config is not None:
        checks.same_plan(meta.config, served.config)
    meta.have_initialized, meta.config, meta._served = True, copy.copy(served.config), served
    return served


@functools.lru_cache(maxsize=256, typed=True)
def _kept(*_: object) -> _Kept:
    return _Kept()


def _check(
    meta: FlashMLASchedMeta, inputs: DecodeInputs, flags: Flags
) -> tuple[DecodeProblem, FlashMLASchedMeta.Config]:
    """Check a call, against its metadata too."""
    checks.decode(inputs, *flags)
    problem = problem_of(inputs, flags)
    checks.decode_formats(problem)
    config = _config(problem, flags)
    if meta._is_planned:
        checks.same_plan(meta.config, config)
    return problem, config


def _traced(
    meta: FlashMLASchedMeta, inputs: DecodeInputs, flags: Flags, softmax_scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The call as an operator in torch.compile's graph, which plans when it runs unless the metadata has a plan."""
    problem, _ = _check(meta, inputs, flags)
    if problem.b == 0 or problem.s_q == 0:
        return _no_rows(problem, inputs)
    out = inputs.out
    if out is None:
        out = inputs.q.new_empty(problem.b, problem.s_q, problem.h_q, problem.d_v)
    scale = problem.d_qk**-0.5 if softmax_scale is None else softmax_scale
    *tensors, _, _ = inputs  # all but out and the scale; older versions of torch.compile do not know _replace
    plan = (meta.tile_scheduler_metadata, meta.num_splits, meta._planned_by) if meta._is_planned else (None,) * 3
    lse = torch.ops.flash_mla.decode(*tensors, out, scale, *flags, *plan)
    return out, lse


def _config(problem: DecodeProblem, flags: Flags) -> FlashMLASchedMeta.Config:
    return FlashMLASchedMeta.Config(
        b=problem.b,
        s_q=problem.s_q,
        h_q=problem.h_q,
        page_block_size=problem.page_size,
        h_k=problem.h_kv,
        causal=problem.causal,
        is_fp8_kvcache=flags.is_fp8_kvcache,
        topk=problem.topk,
        extra_page_block_size=problem.extra_page_size,
        extra_topk=problem.extra_topk,
        enable_batch_invariant=problem.batch_invariant,
        head_dim=problem.d_qk,
        dtype=problem.dtype,
        device=problem.device,
        kv_format=problem.kv_format,
        extra_kv_format=problem.extra_format,
        has_topk_length=problem.has_topk_length,
        has_extra_topk_length=problem.has_extra_topk_length,
    )


def _no_rows(problem: DecodeProblem, inputs: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The result of a batch without query tokens; there is nothing to plan or to launch."""
    out = inputs.out
    if out is None:
        out = inputs.q.new_empty(problem.b, problem.s_q, problem.h_q, problem.d_v)
    return out, inputs.q.new_empty(problem.b, problem.h_q, problem.s_q, dtype=torch.float32)
