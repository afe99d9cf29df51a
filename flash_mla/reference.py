"""The oracle: every mode of the library in fp32 PyTorch, as plainly as its definition, slow, on any device.

Nothing but tests and `flash-mla check` imports this module.
"""

from __future__ import annotations

import torch

from flash_mla.kv_cache import KVCacheFormat


def mha_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_qo: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multi-head attention over packed sequences, differentiable by autograd.

    Args:
        q: [total_q, h_q, d_qk]; k: [total_kv, h_kv, d_qk]; v: [total_kv, h_kv, d_v].
        cu_seqlens_qo, cu_seqlens_kv: [b + 1] int32.
        causal: query i of s_q sees the keys < s_kv - s_q + i + 1.

    Returns:
        out [total_q, h_q, d_v] and lse [total_q, h_q], both fp32; 0 and -inf for a query that sees no key.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for i in range(len(cu_seqlens_qo) - 1):
        q_i = q[cu_seqlens_qo[i] : cu_seqlens_qo[i + 1]].float()
        k_i = k[cu_seqlens_kv[i] : cu_seqlens_kv[i + 1]].float().repeat_interleave(group, dim=1)
        v_i = v[cu_seqlens_kv[i] : cu_seqlens_kv[i + 1]].float().repeat_interleave(group, dim=1)
        s_q, s_kv = len(q_i), len(k_i)
        blind = max(0, s_q - s_kv) if causal or s_kv == 0 else 0  # the queries, the first ones, that see no key
        scores = torch.einsum("qhd,khd->qhk", q_i, k_i) * scale
        if causal:
            hidden = torch.ones(s_q, s_kv, dtype=torch.bool, device=q.device).triu(s_kv - s_q + 1)
            scores = scores.masked_fill(hidden[:, None], float("-inf"))
        # Rows without a key are left out of the softmax, where they would turn every gradient into NaN.
        seen = scores[blind:]
        outs += [q_i.new_zeros(blind, *v_i.shape[1:]), torch.einsum("qhk,khd->qhd", seen.softmax(-1), v_i)]
        lses += [q_i.new_full((blind, q.shape[1]), float("-inf")), seen.logsumexp(-1)]
    return torch.cat(outs), torch.cat(lses)


def decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`flash_mla_with_kvcache`: out [b, s_q, h_q, d_v] and lse [b, h_q, s_q], both fp32."""
    b, s_q, h_q, d = q.shape
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    tokens = _tokens(k_cache, d, is_fp8_kvcache)
    extra_tokens = None if extra_k_cache is None else _tokens(extra_k_cache, d, extra_k_cache.element_size() == 1)
    h_kv = tokens.shape[1]

    out = torch.empty(b, s_q, h_q, head_dim_v, dtype=torch.float32, device=q.device)
    lse = torch.empty(b, h_q, s_q, dtype=torch.float32, device=q.device)
    for i in range(b):
        for j in range(s_q):
            if indices is not None:
                kv = tokens[_named(indices[i, j], None if topk_length is None else topk_length[i])]
                if extra_tokens is not None and extra_indices_in_kvcache is not None:
                    extra_length = None if extra_topk_length is None else extra_topk_length[i]
                    kv = torch.cat([kv, extra_tokens[_named(extra_indices_in_kvcache[i, j], extra_length)]])
            elif block_table is not None and cache_seqlens is not None:
                s_k, page_size = int(cache_seqlens[i]), k_cache.shape[1]
                seen = torch.arange(max(0, s_k - s_q + j + 1) if causal else s_k, device=q.device)
                kv = tokens[block_table[i, seen // page_size].long() * page_size + seen % page_size]
            kv = kv.repeat_interleave(h_q // h_kv, dim=1)
            out[i, j], _, lse[i, :, j] = _attend(q[i, j], kv, scale, head_dim_v, attn_sink)
    return out, lse


def sparse_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`flash_mla_sparse_fwd`: out [s_q, h_q, d_v], max_logits [s_q, h_q] and lse [s_q, h_q], all fp32."""
    s_q, h_q, _ = q.shape
    out = torch.empty(s_q, h_q, d_v, dtype=torch.float32, device=q.device)
    max_logits = torch.empty(s_q, h_q, dtype=torch.float32, device=q.device)
    lse = torch.empty_like(max_logits)
    for j in range(s_q):
        rows = _named(indices[j, 0], None if topk_length is None else topk_length[j])
        keys = kv[rows[rows < len(kv)]].float().expand(-1, h_q, -1)
        out[j], max_logits[j], lse[j] = _attend(q[j], keys, sm_scale, d_v, attn_sink)
    return out, max_logits, lse


def _tokens(cache: torch.Tensor, d: int, is_fp8: bool) -> torch.Tensor:
    """The values of a paged cache by slot: [num_pages * page_size, h_kv, d] fp32."""
    if not is_fp8:
        return cache.float().flatten(0, 1)
    return KVCacheFormat.detect(cache, d, is_fp8=True, extra=True).unpack(cache).flatten(0, 1)


def _named(indices: torch.Tensor, length: torch.Tensor | None) -> torch.Tensor:
    """The entries of `indices` [topk] that count."""
    counted = indices if length is None else indices[: max(0, int(length))]
    return counted[counted >= 0].long()


def _attend(
    q: torch.Tensor, kv: torch.Tensor, scale: float, d_v: int, attn_sink: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One query token `q` [h_q, d] and its keys `kv` [n, h_q, d]: (out [h_q, d_v], max_logits [h_q], lse [h_q])."""
    if len(kv) == 0:
        nothing = torch.full((len(q),), float("inf"), device=q.device)
        return torch.zeros(len(q), d_v, device=q.device), -nothing, nothing
    scores = torch.einsum("hd,nhd->hn", q.float(), kv) * scale
    lse = scores.logsumexp(-1)
    out = torch.einsum("hn,nhd->hd", scores.softmax(-1), kv[..., :d_v])
    if attn_sink is not None:
        # exp(lse) / (exp(lse) + exp(attn_sink)), divided by exp(lse)
        out = out / (1 + torch.exp(attn_sink - lse))[:, None]
    return out, scores.amax(-1), lse
