"""What a call asks for: shapes, formats and flags, frozen, that backends choose by, and the tensors beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from flash_mla.kv_cache import KVCacheFormat


@dataclass(frozen=True)
class DecodeProblem:
    """One `flash_mla_with_kvcache` configuration; sparse when `topk` is set."""

    device: torch.device
    dtype: torch.dtype
    b: int
    s_q: int
    h_q: int
    h_kv: int
    d_qk: int
    d_v: int
    kv_format: KVCacheFormat
    page_size: int
    causal: bool = False
    topk: int | None = None
    extra_format: KVCacheFormat | None = None
    extra_page_size: int | None = None
    extra_topk: int | None = None
    has_topk_length: bool = False
    has_extra_topk_length: bool = False
    batch_invariant: bool = False
    # By their strides, caches' pages, and rows of plain caches, begin at multiples of 16 bytes.
    aligned: bool = True

    @property
    def mode(self) -> str:
        return "dense decode" if self.topk is None else "sparse decode"


class DecodeInputs(NamedTuple):
    """The data of one `flash_mla_with_kvcache` call; shapes as documented there."""

    q: torch.Tensor
    k_cache: torch.Tensor
    block_table: torch.Tensor | None
    cache_seqlens: torch.Tensor | None
    indices: torch.Tensor | None
    attn_sink: torch.Tensor | None
    extra_k_cache: torch.Tensor | None
    extra_indices: torch.Tensor | None
    topk_length: torch.Tensor | None
    extra_topk_length: torch.Tensor | None
    out: torch.Tensor | None
    softmax_scale: float


@dataclass(frozen=True)
class SparsePrefillProblem:
    """One `flash_mla_sparse_fwd` configuration."""

    device: torch.device
    dtype: torch.dtype
    s_q: int
    s_kv: int
    h_q: int
    d_qk: int
    d_v: int
    topk: int

    mode = "sparse prefill"


class SparsePrefillInputs(NamedTuple):
    """The data of one `flash_mla_sparse_fwd` call; shapes as documented there."""

    q: torch.Tensor
    kv: torch.Tensor
    indices: torch.Tensor
    sm_scale: float
    attn_sink: torch.Tensor | None = None
    topk_length: torch.Tensor | None = None
    out: torch.Tensor | None = None


@dataclass(frozen=True)
class MHAProblem:
    """One `flash_attn_varlen_func` configuration; forward and, with gradients, backward."""

    device: torch.device
    dtype: torch.dtype
    h_q: int
    h_kv: int
    d_qk: int
    d_v: int
    causal: bool
    deterministic: bool = False

    mode = "dense MHA"


class Mendable(str):
    """Why a backend does not serve a problem, where its user can change that: a slower one that does is warned of."""


def has_memory(tensor: object) -> bool:
    """Whether it is a tensor of memory of its own, unlike a fake one: calls of others go through an operator."""
    kind = type(tensor)
    if kind is torch.Tensor:
        return True
    return getattr(kind, "__torch_dispatch__", None) is torch.Tensor.__torch_dispatch__


Problem = DecodeProblem | SparsePrefillProblem | MHAProblem
