"""Dense multi-head attention as PyTorch operators, torch.ops.flash_mla.mha_forward and mha_backward.

torch.compile puts an operator into its graph whole: it needs the schema, a fake implementation that tells the results'
shapes and strides, and the gradient. `Attention` gives the same gradient to calls that are not repeated (mha_served),
which it costs a third of what an operator's autograd does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from flash_mla import backends
from flash_mla.problem import MHAProblem

__all__ = ["Attention", "mha_forward", "problem_of"]

Tensors = tuple[torch.Tensor, ...]


def problem_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, deterministic: bool) -> MHAProblem:
    """The problem that a call poses; arguments as checked by flash_attn_varlen_func."""
    return MHAProblem(
        device=q.device,
        dtype=q.dtype,
        h_q=q.shape[1],
        h_kv=k.shape[1],
        d_qk=q.shape[2],
        d_v=v.shape[2],
        causal=causal,
        deterministic=deterministic,
    )


def mha_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_qo: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
) -> Tensors:
    """out and lse by the backend that serves the problem; arguments as checked by flash_attn_varlen_func."""
    problem = problem_of(q, k, v, causal, deterministic)
    return backends.choose(problem).mha_forward(
        problem, q, k, v, cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv, softmax_scale
    )


def _mha_backward(
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
    causal: bool,
    deterministic: bool,
) -> Tensors:
    problem = problem_of(q, k, v, causal, deterministic)
    if dout.stride(-1) != 1:  # out.sum() hands over an expanded scalar
        dout = dout.contiguous()
    return backends.choose(problem).mha_backward(
        problem, dout, dlse, q, k, v, out, lse, cu_seqlens_qo, cu_seqlens_kv,
        max_seqlen_qo, max_seqlen_kv, softmax_scale,
    )  # fmt: skip


def _fake_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> Tensors:
    total_q, h_q, _d_qk = q.shape
    return q.new_empty(total_q, h_q, v.shape[2]), q.new_empty(h_q, total_q, dtype=torch.float32).T


def _fake_backward(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> Tensors:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


class Attention(torch.autograd.Function):
    """`mha_forward` in autograd's graph."""

    @staticmethod
    def forward(*args: Any) -> Tensors:
        return mha_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        q, k, v, cu_seqlens_qo, cu_seqlens_kv, *ctx.options = inputs
        ctx.save_for_backward(q, k, v, *output, cu_seqlens_qo, cu_seqlens_kv)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if dout is None:
            dout = torch.zeros_like(ctx.saved_tensors[3])
        gradients = torch.ops.flash_mla.mha_backward(dout, dlse, *ctx.saved_tensors, *ctx.options)
        return (*gradients, *[None] * 7)


_LENGTHS = "Tensor cu_seqlens_qo, Tensor cu_seqlens_kv, SymInt max_seqlen_qo, SymInt max_seqlen_kv"
_OPTIONS = "float softmax_scale, bool causal, bool deterministic"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_LIBRARY = torch.library.Library("flash_mla", "FRAGMENT")
_LIBRARY.define(
    f"mha_forward(Tensor q, Tensor k, Tensor v, {_LENGTHS}, {_OPTIONS}) -> (Tensor out, Tensor lse)", tags=_TAGS
)
_LIBRARY.define(
    "mha_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_LENGTHS}, {_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=_TAGS,
)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("mha_forward", mha_forward, _device)
    _LIBRARY.impl("mha_backward", _mha_backward, _device)
torch.library.register_fake("flash_mla::mha_forward", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("flash_mla::mha_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd(
    "flash_mla::mha_forward", Attention.backward, setup_context=Attention.setup_context, lib=_LIBRARY
)
