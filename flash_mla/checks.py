"""Every argument check of the public functions, and every error message.

A check names the argument, says what came and what is needed. Wrong kinds of objects and dtypes raise TypeError,
everything else ValueError. Checks read shapes, strides and dtypes alone, never a tensor's contents, so they cost
microseconds and never synchronise a device.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # not at run time: the cache formats that problems name check their arguments here
    from flash_mla.problem import DecodeInputs, DecodeProblem, SparsePrefillInputs

__all__ = [
    "decode",
    "decode_formats",
    "dtype_name",
    "flag",
    "instance",
    "integer",
    "max_seqlen",
    "mha_packed",
    "mha_tensors",
    "mqa_value_dim",
    "no_dropout",
    "no_num_splits",
    "positive_int",
    "real_number",
    "renamed",
    "same_backend",
    "same_device",
    "same_plan",
    "sparse_prefill",
    "tensor",
]


def dtype_name(dtype: torch.dtype | tuple[torch.dtype, ...]) -> str:
    """'bfloat16' or 'bfloat16 or float16'."""
    if isinstance(dtype, torch.dtype):
        return str(dtype).removeprefix("torch.")
    return " or ".join(dtype_name(one) for one in dtype)


def tensor(
    name: str,
    value: object,
    dims: str,
    dtypes: torch.dtype | tuple[torch.dtype, ...],
    *,
    device: torch.device | None = None,
    **sizes: int,
) -> torch.Tensor:
    """Require a tensor of the named dimensions.

    `dims` names the dimensions in order ("b s_q h_q d"); `sizes` fixes the extents of some of them (`b=4`). The last
    dimension must be dense (stride 1). Returns the tensor, so that checkers narrow its type.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, need a torch.Tensor [{dims.replace(' ', ', ')}]")
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else dtypes
    if value.dtype not in allowed:
        raise TypeError(f"{name}: got dtype {dtype_name(value.dtype)}, need {dtype_name(allowed)}")
    names, shape = dims.split(), value.shape
    if len(shape) != len(names) or any(shape[names.index(dim)] != size for dim, size in sizes.items()):
        need = ", ".join(f"{dim}={sizes[dim]}" if dim in sizes else dim for dim in names)
        raise ValueError(f"{name}: got shape {list(value.shape)}, need [{need}]")
    if shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name}: got stride {value.stride(-1)} in the last dimension, need 1 (pass {name}.contiguous())"
        )
    if device is not None:
        same_device(name, value, device)
    return value


def same_device(name: str, value: torch.Tensor, device: torch.device, *, like: str = "q") -> None:
    """Require `value` on `device`, that of the argument `like`."""
    if value.device != device:
        raise ValueError(f"{name}: got a tensor on {value.device}, need it on {device} like {like}")


def _class_of(value: object) -> str:
    """Its name, with the module's if it is no builtin: NumPy has a bool, too."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def integer(name: str, value: object, *, least: int) -> int:
    """Require an int >= `least`, of Python or NumPy."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name}: got {_class_of(value)}, need an int")
    value = int(value)
    if value < least:
        raise ValueError(f"{name}: got {value}, need at least {least}")
    return value


def positive_int(name: str, value: object) -> int:
    """Require an int >= 1."""
    return integer(name, value, least=1)


def real_number(name: str, value: object) -> float:
    """Require a finite float or int, of Python or NumPy."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name}: got {_class_of(value)}, need a float")
    if not -math.inf < float(value) < math.inf:  # which torch.compile can trace, unlike math.isfinite
        raise ValueError(f"{name}: got {value}, need a finite number")
    return float(value)


# --- dense multi-head attention -------------------------------------------------------------------------------------

MHA_DTYPES = (torch.bfloat16, torch.float16)
MHA_HEAD_DIMS = ((192, 128), (128, 128))  # (d_qk, d_v)


def mha_tensors(q: object, k: object, v: object, cu_seqlens_qo: object, cu_seqlens_kv: object) -> int:
    """Require the tensors of `flash_attn_varlen_func` to fit together; returns b, the number of sequences."""
    q = tensor("q", q, "total_q h_q d_qk", MHA_DTYPES)
    k = tensor("k", k, "total_kv h_kv d_qk", q.dtype, device=q.device, d_qk=q.shape[-1])
    total_kv, h_kv, d_qk = k.shape
    v = tensor("v", v, "total_kv h_kv d_v", q.dtype, device=q.device, total_kv=total_kv, h_kv=h_kv)
    if (d_qk, v.shape[-1]) not in MHA_HEAD_DIMS:
        need = " or ".join(f"d_qk={qk} with d_v={v}" for qk, v in MHA_HEAD_DIMS)
        raise ValueError(f"q, v: got head dims d_qk={d_qk} with d_v={v.shape[-1]}, need {need}")
    h_q = q.shape[1]
    if h_kv == 0 or h_q == 0 or h_q % h_kv:
        raise ValueError(f"q: got h_q={h_q}, need a positive multiple of k's h_kv={h_kv}")
    cu_seqlens_qo = tensor("cu_seqlens_qo", cu_seqlens_qo, "b+1", torch.int32, device=q.device)
    b = cu_seqlens_qo.shape[0] - 1
    if b < 1:
        raise ValueError(f"cu_seqlens_qo: got shape {list(cu_seqlens_qo.shape)}, need [b+1] for b >= 1 sequences")
    tensor("cu_seqlens_kv", cu_seqlens_kv, "b+1", torch.int32, device=q.device, **{"b+1": b + 1})
    return b


def mha_packed(name: str, packed: object, head_dim_qk: object, *, qk_parts: int) -> int:
    """Require `qk_parts` times d_qk columns, then d_v columns, in the last dimension of `packed`; returns d_v."""
    packed = tensor(name, packed, "total h d", MHA_DTYPES)
    head_dim_qk = integer("head_dim_qk", head_dim_qk, least=1)
    widths = {qk: qk_parts * qk + v for qk, v in MHA_HEAD_DIMS}
    if head_dim_qk not in widths:
        raise ValueError(f"head_dim_qk: got {head_dim_qk}, need {' or '.join(map(str, widths))}")
    if packed.shape[-1] != widths[head_dim_qk]:
        raise ValueError(
            f"{name}: got shape {list(packed.shape)}, need [total, h, {widths[head_dim_qk]}] for d_qk={head_dim_qk}"
        )
    return packed.shape[-1] - qk_parts * head_dim_qk


def max_seqlen(name: str, value: object, *, b: int, total: int, is_varlen: bool) -> int:
    """Require an upper bound on the lengths of `b` sequences of `total` tokens; equal lengths unless `is_varlen`."""
    if isinstance(value, bool) or not (isinstance(value, int) or hasattr(value, "__index__")):
        raise TypeError(f"{name}: got {type(value).__name__}, need an int")
    # torch.compile's sizes of dynamic tensors are ints, but know no __index__.
    bound = value if isinstance(value, int) else operator.index(value)
    if not is_varlen and bound * b != total:
        raise ValueError(f"{name}: got {bound}, need {total} tokens / {b} sequences when is_varlen is False")
    if bound < 0 or bound * b < total:
        raise ValueError(f"{name}: got {bound}, need at least {-(-total // b)}: {b} sequences hold {total} tokens")
    return bound


def renamed(error: Exception, names: Mapping[str, str]) -> Exception:
    """The same error of a function whose arguments have other names."""
    return type(error)(re.sub(rf"\b({'|'.join(names)})\b", lambda name: names[name[0]], str(error)))


def no_dropout(dropout_p: object) -> None:
    """Require a dropout probability of 0."""
    if real_number("dropout_p", dropout_p) != 0:
        raise ValueError(f"dropout_p: got {dropout_p}, need 0.0 (dropout is not supported)")


# --- decode -----------------------------------------------------------------------------------------------------------

_FLOAT16 = (torch.bfloat16, torch.float16)
_CACHE_DTYPES = (*_FLOAT16, torch.float8_e4m3fn, torch.uint8, torch.int8)


def instance(name: str, value: object, kind: type, hint: str) -> None:
    """Require an object of class `kind`; `hint` says how to get one."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: got {type(value).__name__}, need a {kind.__name__} ({hint})")


def flag(name: str, value: object) -> bool:
    """Require a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {_class_of(value)}, need a bool")
    return value


def no_num_splits(value: object) -> None:
    """Require the None that `get_mla_metadata` returns beside the metadata object."""
    if value is not None:
        raise TypeError(
            f"num_splits: got {type(value).__name__}, need None (the plan is kept in tile_scheduler_metadata; pass the "
            "None that get_mla_metadata returns)"
        )


def writable(name: str, value: torch.Tensor) -> None:
    """Require every element of `value` to have memory of its own."""
    if any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True)):
        raise ValueError(f"{name}: got strides {list(value.stride())}, need memory of its own for every element")


def mqa_query(value: object, dims: str) -> torch.Tensor:
    """Require queries of MLA's MQA mode, of at least one head."""
    q = tensor("q", value, dims, _FLOAT16)
    h_q, d = q.shape[-2:]
    if d not in (576, 512):
        raise ValueError(f"q: got head dim {d}, need 576 or 512")
    if h_q == 0:
        raise ValueError("q: got 0 heads, need at least 1")
    return q


def mqa_value_dim(name: str, value: object) -> None:
    """Require the head dim of V in MLA's MQA mode: the first 512 columns of K."""
    if positive_int(name, value) != 512:
        raise ValueError(f"{name}: got {value}, need 512")


def attn_sink(value: object, h_q: int, device: torch.device) -> None:
    """Require [h_q] fp32 sink logits."""
    tensor("attn_sink", value, "h_q", torch.float32, device=device, h_q=h_q)


def decode(
    inputs: DecodeInputs, head_dim_v: object, causal: object, is_fp8_kvcache: object, enable_batch_invariant: object
) -> None:
    """Require arguments of `flash_mla_with_kvcache` that fit together, but for the caches' formats."""
    q = mqa_query(inputs.q, "b s_q h_q d")
    b, s_q, h_q, _ = q.shape
    mqa_value_dim("head_dim_v", head_dim_v)
    causal = flag("causal", causal)
    flag("is_fp8_kvcache", is_fp8_kvcache)
    flag("enable_batch_invariant", enable_batch_invariant)

    h_kv = _decode_cache("k_cache", inputs.k_cache, q.device)
    if h_q % h_kv:
        raise ValueError(f"q: got {h_q} heads, need a multiple of the {h_kv} of k_cache")
    if inputs.indices is None:
        _dense_decode(inputs, b, q.device)
    else:
        _sparse_decode(inputs, b, s_q, h_q, h_kv, causal)
    if inputs.out is not None:
        tensor("out", inputs.out, "b s_q h_q d_v", q.dtype, device=q.device, b=b, s_q=s_q, h_q=h_q, d_v=512)
        writable("out", inputs.out)


def _decode_cache(name: str, cache: object, device: torch.device) -> int:
    """The number of KV heads of a paged cache."""
    cache = tensor(name, cache, "num_pages page_size h_kv d_or_bytes", _CACHE_DTYPES, device=device)
    if cache.shape[1] == 0 or cache.shape[2] == 0:
        raise ValueError(f"{name}: got shape {list(cache.shape)}, need a page size and h_kv of at least 1")
    return cache.shape[2]


def _dense_decode(inputs: DecodeInputs, b: int, device: torch.device) -> None:
    for name, value in (
        ("attn_sink", inputs.attn_sink),
        ("extra_k_cache", inputs.extra_k_cache),
        ("extra_indices_in_kvcache", inputs.extra_indices),
        ("topk_length", inputs.topk_length),
        ("extra_topk_length", inputs.extra_topk_length),
    ):
        if value is not None:
            raise ValueError(f"{name}: got {type(value).__name__}, need None without indices (dense decode)")
    tensor("block_table", inputs.block_table, "b max_pages", torch.int32, device=device, b=b)
    tensor("cache_seqlens", inputs.cache_seqlens, "b", torch.int32, device=device, b=b)


def _sparse_decode(inputs: DecodeInputs, b: int, s_q: int, h_q: int, h_kv: int, causal: bool) -> None:
    device = inputs.q.device
    if causal:
        raise ValueError("causal: got True, need False with indices (sparse decode)")
    if h_kv != 1:
        raise ValueError(f"k_cache: got {h_kv} heads, need 1 with indices (sparse decode)")
    tensor("indices", inputs.indices, "b s_q topk", torch.int32, device=device, b=b, s_q=s_q)
    if inputs.topk_length is not None:
        tensor("topk_length", inputs.topk_length, "b", torch.int32, device=device, b=b)
    if inputs.attn_sink is not None:
        attn_sink(inputs.attn_sink, h_q, device)

    if inputs.extra_k_cache is None:
        for name, value in (
            ("extra_indices_in_kvcache", inputs.extra_indices),
            ("extra_topk_length", inputs.extra_topk_length),
        ):
            if value is not None:
                raise ValueError(f"{name}: got {type(value).__name__}, need None without extra_k_cache")
        return
    if (extra_h_kv := _decode_cache("extra_k_cache", inputs.extra_k_cache, device)) != 1:
        raise ValueError(f"extra_k_cache: got {extra_h_kv} heads, need 1")
    if inputs.extra_indices is None:
        raise ValueError("extra_indices_in_kvcache: got None, need [b, s_q, extra_topk] int32 beside extra_k_cache")
    tensor(
        "extra_indices_in_kvcache", inputs.extra_indices, "b s_q extra_topk", torch.int32, device=device, b=b, s_q=s_q
    )
    if inputs.extra_topk_length is not None:
        tensor("extra_topk_length", inputs.extra_topk_length, "b", torch.int32, device=device, b=b)


def decode_formats(problem: DecodeProblem) -> None:
    """Require cache formats that go with q, with each other and with the mode."""
    formats = [("k_cache", problem.kv_format)]
    if problem.extra_format is not None:
        formats.append(("extra_k_cache", problem.extra_format))
    for name, kv_format in formats:
        if not kv_format.is_quantised and kv_format.dtype != problem.dtype:
            raise TypeError(f"{name}: got dtype {dtype_name(kv_format.dtype)}, need {dtype_name(problem.dtype)} like q")
    if problem.topk is None and problem.kv_format.is_quantised and problem.kv_format.name != "FP8_V32":
        raise ValueError(
            f"k_cache: got format {problem.kv_format.name} without indices, need BF16, FP16 or FP8_V32 for dense decode"
        )
    if (
        problem.extra_format is not None
        and problem.extra_format.name == "FP4_V41"
        and problem.kv_format.name != "FP8_V41"
    ):
        raise ValueError(
            f"extra_k_cache: got format FP4_V41 beside a {problem.kv_format.name} k_cache, need FP8_V41 there"
        )


def same_plan(planned: Any, given: Any) -> None:
    """Require two configurations, dataclasses of one class, to be equal."""
    for field in dataclasses.fields(planned):
        before, now = getattr(planned, field.name), getattr(given, field.name)
        if before != now:
            raise ValueError(
                f"tile_scheduler_metadata: planned for {field.name}={before}, but this call has {field.name}={now}; "
                "make a fresh one with get_mla_metadata() for each configuration"
            )


def same_backend(planned_by: str | None, backend: str) -> None:
    """Require a plan by the backend that is to follow it, or by a client."""
    if planned_by not in (None, backend):
        raise ValueError(
            f"tile_scheduler_metadata: planned by the backend {planned_by}, but {backend} serves this call, by its "
            "strides or by FLASH_MLA_BACKEND; make a fresh one with get_mla_metadata()"
        )


# --- sparse prefill ---------------------------------------------------------------------------------------------------


def sparse_prefill(inputs: SparsePrefillInputs) -> None:
    """Require tensors of `flash_mla_sparse_fwd` that fit together."""
    q = mqa_query(inputs.q, "s_q h_q d")
    s_q, h_q, d = q.shape
    tensor("kv", inputs.kv, "s_kv h_kv d", q.dtype, device=q.device, h_kv=1, d=d)
    tensor("indices", inputs.indices, "s_q h_kv topk", torch.int32, device=q.device, s_q=s_q, h_kv=1)
    if inputs.attn_sink is not None:
        attn_sink(inputs.attn_sink, h_q, q.device)
    if inputs.topk_length is not None:
        tensor("topk_length", inputs.topk_length, "s_q", torch.int32, device=q.device, s_q=s_q)
    if inputs.out is not None:
        tensor("out", inputs.out, "s_q h_q d_v", q.dtype, device=q.device, s_q=s_q, h_q=h_q, d_v=512)
        writable("out", inputs.out)
