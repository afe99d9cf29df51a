"""Dense multi-head prefill over packed sequences, with gradients: the flash_attn_varlen_* functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.autograd import forward_ad

from flash_mla import checks, mha_ops, mha_served
from flash_mla.problem import has_memory

__all__ = ["flash_attn_varlen_func", "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func"]


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_qo: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multi-head attention over b sequences laid end to end, differentiable in q, k and v.

    Tokens cu_seqlens[i] to cu_seqlens[i + 1] are sequence i; either side of it may be empty. Query head h reads KV head
    h // (h_q // h_kv). Gradients flow from `out` and from `lse`.

    Args:
        q: [total_q, h_q, d_qk], bfloat16 or float16; dense in the last dimension, as are k and v.
        k: [total_kv, h_kv, d_qk] in q's dtype; h_q is a multiple of h_kv.
        v: [total_kv, h_kv, d_v] in q's dtype. (d_qk, d_v) is (192, 128) or (128, 128).
        cu_seqlens_qo: [b + 1] int32 on q's device: 0, then the running sum of the query lengths.
        cu_seqlens_kv: the same for keys. A GPU never reads either back; wrong contents are only noticed on the CPU.
        max_seqlen_qo: at least the longest query length.
        max_seqlen_kv: at least the longest key length.
        dropout_p: must be 0.
        softmax_scale: factor on q k^T; d_qk ** -0.5 when None.
        causal: query i of s_q sees the keys < s_kv - s_q + i + 1 (aligned to the bottom right).
        deterministic: also the gradients have the same bits on every run; the forward always has.
        is_varlen: False promises that every sequence has max_seqlen_qo queries and max_seqlen_kv keys.

    Returns:
        out: [total_q, h_q, d_v] in q's dtype; 0 for a query that sees no key.
        lse: [total_q, h_q] float32, contiguous along the tokens (stride 1): natural log-sum-exp of the scaled scores.
            A query that sees no key has -inf, as in FlashMLA's dense prefill (its decode and sparse prefill say +inf).

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: wrong shapes, head dims, strides or devices, offsets that do not fit, or dropout.
        RuntimeError: no backend serves the call; the message gives each one's reason.
    """
    scale = None if softmax_scale is None else checks.real_number("softmax_scale", softmax_scale)
    tensors = (q, k, v, cu_seqlens_qo, cu_seqlens_kv)
    as_operator = torch.compiler.is_compiling() or not has_memory(q)
    # torch.func.grad and the like need what autograd makes of a call, for which none is repeated.
    is_transformed = not as_operator and (forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active())
    served = None
    if not (as_operator or is_transformed):
        options = (max_seqlen_qo, max_seqlen_kv, dropout_p, causal, deterministic, is_varlen)
        served, results = mha_served.served(tensors, options, scale)
        if results is not None:
            return results
    is_varlen = checks.flag("is_varlen", is_varlen)
    b = checks.mha_tensors(*tensors)
    max_seqlen_qo = checks.max_seqlen("max_seqlen_qo", max_seqlen_qo, b=b, total=q.shape[0], is_varlen=is_varlen)
    max_seqlen_kv = checks.max_seqlen("max_seqlen_kv", max_seqlen_kv, b=b, total=k.shape[0], is_varlen=is_varlen)
    checks.no_dropout(dropout_p)
    causal, deterministic = checks.flag("causal", causal), checks.flag("deterministic", deterministic)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    args = (*tensors, max_seqlen_qo, max_seqlen_kv, scale, causal, deterministic)
    if as_operator:
        return torch.ops.flash_mla.mha_forward(*args)
    if is_transformed or (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        out, lse = mha_ops.Attention.apply(*args)
    else:
        out, lse = mha_ops.mha_forward(*args)  # without what autograd does before it notices
    if served is not None:
        served.note_forward(tensors, (out, lse), (max_seqlen_qo, max_seqlen_kv), (causal, deterministic))
    return out, lse


# What a packed form calls an argument of flash_attn_varlen_func.
_OF_KV = {"k": "kv", "v": "kv"}
_OF_QKV = {
    **dict.fromkeys(("q", "k", "v"), "qkv"),
    **dict.fromkeys(("cu_seqlens_qo", "cu_seqlens_kv"), "cu_seqlens"),
    **dict.fromkeys(("max_seqlen_qo", "max_seqlen_kv"), "max_seqlen"),
}


def _unpacked(names: Mapping[str, str], *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The call of `flash_attn_varlen_func`, whose errors name the packed form's arguments."""
    try:
        return flash_attn_varlen_func(*arguments)
    except (TypeError, ValueError) as error:
        raise checks.renamed(error, names) from error


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Self-attention with q, k and v side by side in the head dimension; see `flash_attn_varlen_func`.

    Args:
        qkv: [total, h, 2 * d_qk + d_v], bfloat16 or float16: each head's q, then its k, then its v.
        cu_seqlens: [b + 1] int32 offsets of the sequences.
        max_seqlen: at least the longest length.
        head_dim_qk: d_qk, 192 or 128.

    Returns:
        out [total, h, d_v] in qkv's dtype, lse [total, h] float32.
    """
    d_v = checks.mha_packed("qkv", qkv, head_dim_qk, qk_parts=2)
    q, k, v = qkv.split([head_dim_qk, head_dim_qk, d_v], dim=-1)
    options = dropout_p, softmax_scale, causal, deterministic, is_varlen
    return _unpacked(_OF_QKV, q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *options)


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_qo: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with k and v side by side in the head dimension; see `flash_attn_varlen_func`.

    Args:
        q: [total_q, h_q, d_qk], bfloat16 or float16.
        kv: [total_kv, h_kv, d_qk + d_v] in q's dtype: each head's k, then its v.
        head_dim_qk: d_qk, 192 or 128.

    Returns:
        out [total_q, h_q, d_v] in q's dtype, lse [total_q, h_q] float32.
    """
    d_v = checks.mha_packed("kv", kv, head_dim_qk, qk_parts=1)
    k, v = kv.split([head_dim_qk, d_v], dim=-1)
    options = dropout_p, softmax_scale, causal, deterministic, is_varlen
    return _unpacked(_OF_KV, q, k, v, cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv, *options)
