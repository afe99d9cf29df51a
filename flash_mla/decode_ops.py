"""Decode as a PyTorch operator, torch.ops.flash_mla.decode, on tensors and flags alone.

torch.compile puts an operator into its graph whole: it needs the schema and a fake implementation that tells the
result's shape. A schedule enters as its two tensors and who made them; without them the operator plans each time it
runs, so a compiled graph holds no plan that lengths could outdate. It writes into an `out` that is always given, so
that the compiler plans the memory of new ones and a given one is not copied.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from flash_mla import backends, checks
from flash_mla.kv_cache import KVCacheFormat
from flash_mla.problem import DecodeInputs, DecodeProblem

__all__ = ["Flags", "problem_of"]


class Flags(NamedTuple):
    """The arguments of a call that are neither tensors nor its scale."""

    head_dim_v: int
    causal: bool
    is_fp8_kvcache: bool
    enable_batch_invariant: bool


def problem_of(inputs: DecodeInputs, flags: Flags) -> DecodeProblem:
    """The problem that a call poses; arguments as checked by `checks.decode`."""
    b, s_q, h_q, d = inputs.q.shape
    extra_format = None
    if inputs.extra_k_cache is not None:
        extra_is_fp8 = inputs.extra_k_cache.element_size() == 1
        extra_format = KVCacheFormat.detect(
            inputs.extra_k_cache, d, is_fp8=extra_is_fp8, name="extra_k_cache", extra=True
        )
    return DecodeProblem(
        device=inputs.q.device,
        dtype=inputs.q.dtype,
        b=b,
        s_q=s_q,
        h_q=h_q,
        h_kv=inputs.k_cache.shape[2],
        d_qk=d,
        d_v=int(flags.head_dim_v),
        kv_format=KVCacheFormat.detect(inputs.k_cache, d, is_fp8=flags.is_fp8_kvcache),
        page_size=inputs.k_cache.shape[1],
        causal=flags.causal,
        topk=None if inputs.indices is None else inputs.indices.shape[-1],
        extra_format=extra_format,
        extra_page_size=None if inputs.extra_k_cache is None else inputs.extra_k_cache.shape[1],
        extra_topk=None if inputs.extra_indices is None else inputs.extra_indices.shape[-1],
        has_topk_length=inputs.topk_length is not None,
        has_extra_topk_length=inputs.extra_topk_length is not None,
        batch_invariant=flags.enable_batch_invariant,
        aligned=all(_is_aligned(cache, inputs.indices is None) for cache in (inputs.k_cache, inputs.extra_k_cache)),
    )


def _is_aligned(cache: torch.Tensor | None, each_its_own: bool) -> bool:
    """Whether pages of a quantised cache or rows of a plain one may begin at multiples of 16 bytes.

    each_its_own: and no two at the same one.
    """
    if cache is None:
        return True
    dims = 1 if cache.element_size() == 1 else cache.dim() - 1
    strides = [cache.stride(dim) for dim in range(dims) if cache.shape[dim] > 1]  # those that mean something
    return all(stride * cache.element_size() % 16 == 0 and (stride > 0 or not each_its_own) for stride in strides)


def _decode(*arguments: Any) -> torch.Tensor:
    inputs = DecodeInputs(*arguments[:_NUM_INPUTS])
    *flags, work, splits, planned_by = arguments[_NUM_INPUTS:]
    problem = problem_of(inputs, Flags(*flags))
    backend = backends.choose(problem)
    if work is None or splits is None:
        plan = backend.plan_decode(problem, inputs)
        work, splits = plan.work, plan.splits
    else:
        checks.same_backend(planned_by, backend.NAME)
    _, lse = backend.decode(problem, inputs, work, splits)
    return lse


def _fake(q: torch.Tensor, *_: Any) -> torch.Tensor:
    b, s_q, h_q, _d = q.shape
    return q.new_empty(b, h_q, s_q, dtype=torch.float32)


# The fields of DecodeInputs, those of Flags, and the schedule.
_INPUTS = (
    "Tensor q, Tensor k_cache, Tensor? block_table, Tensor? cache_seqlens, Tensor? indices, Tensor? attn_sink, "
    "Tensor? extra_k_cache, Tensor? extra_indices, Tensor? topk_length, Tensor? extra_topk_length, Tensor(a!) out, "
    "float softmax_scale"
)
_FLAGS = "int head_dim_v, bool causal, bool is_fp8_kvcache, bool enable_batch_invariant"
_SCHEDULE = "Tensor? tile_scheduler_metadata, Tensor? num_splits, str? planned_by"
_NUM_INPUTS = len(DecodeInputs._fields)
_LIBRARY = torch.library.Library("flash_mla", "FRAGMENT")
_LIBRARY.define(
    f"decode({_INPUTS}, {_FLAGS}, {_SCHEDULE}) -> Tensor lse",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("decode", _decode, _device)
_LIBRARY.impl("decode", torch.library.fallthrough_kernel, "Autograd")  # results have no gradients
torch.library.register_fake("flash_mla::decode", _fake, lib=_LIBRARY)
