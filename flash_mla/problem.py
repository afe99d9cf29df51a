"""What a call asks for, apart from its data: shapes, formats and flags, as frozen values that backends choose by."""

from __future__ import annotations

from dataclasses import dataclass

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
    batch_invariant: bool = False

    @property
    def mode(self) -> str:
        return "dense decode" if self.topk is None else "sparse decode"


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


Problem = DecodeProblem | SparsePrefillProblem | MHAProblem
