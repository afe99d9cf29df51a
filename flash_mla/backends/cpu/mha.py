"""Dense multi-head attention on the CPU, forward and backward: flash-attention tiles in fp32.

A tile is a few queries of one sequence under a few KV heads; it visits the keys its queries see chunk by chunk, so the
scores held at once are bounded by TILE_SCORES, however long the sequences are. Chunks are widened to fp32 as they are
read: half precision matmuls are slow on most CPUs, and fp32 accumulation is what GPU kernels do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from flash_mla.backends.cpu.attention import in_fp32
from flash_mla.problem import MHAProblem

__all__ = ["mha_backward", "mha_forward"]

Q_CHUNK = 256  # score rows a KV head has in a tile: query tokens times the query heads that share the KV head
K_CHUNK = 512  # keys visited at a time
TILE_SCORES = 1 << 20  # scores held at once; short sequences take more KV heads into a tile


@dataclass(frozen=True)
class _Tile:
    """Some queries of one sequence under some KV heads; every query of a tile sees at least the sequence's key 0."""

    queries: slice  # rows of q
    q_heads: slice
    kv_heads: slice
    device: torch.device
    key_0: int  # row of k and v that holds the sequence's first key
    seen_by_first: int  # keys that the first query sees; under a causal mask, each next query sees one more
    seen_by_last: int

    def key_chunks(self) -> Iterator[tuple[slice, torch.Tensor | None]]:
        """Rows of k and v, and which (query, key) pairs among them the causal mask hides, or None for no pair."""
        for start in range(0, self.seen_by_last, K_CHUNK):
            stop = min(start + K_CHUNK, self.seen_by_last)
            hidden = None
            if stop > self.seen_by_first:
                queries = torch.arange(self.queries.stop - self.queries.start, device=self.device)
                keys = torch.arange(start, stop, device=self.device)
                hidden = keys >= self.seen_by_first + queries[:, None]
            yield slice(self.key_0 + start, self.key_0 + stop), hidden

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """The tile's part of x [total_q, h_q, d] as fp32 [kv_heads, group * queries, d]."""
        return self._by_kv_head(x).float().flatten(1, 2)

    def set_rows(self, x: torch.Tensor, value: torch.Tensor) -> None:
        """Write [kv_heads, group * queries, d] to the tile's part of x [total_q, h_q, d]."""
        part = self._by_kv_head(x)
        part.copy_(value.view(part.shape))

    def keys(self, x: torch.Tensor, chunk: slice) -> torch.Tensor:
        """A chunk of x [total_kv, h_kv, d], viewed as [kv_heads, keys, d]."""
        return x[chunk, self.kv_heads].transpose(0, 1)

    def _by_kv_head(self, x: torch.Tensor) -> torch.Tensor:
        part = x[self.queries, self.q_heads]
        return part.unflatten(1, (self.kv_heads.stop - self.kv_heads.start, -1)).permute(1, 2, 0, 3)


def _lengths(name: str, cu_seqlens: torch.Tensor, total: int, max_seqlen: int) -> list[int]:
    """Offsets as ints, once they are known to split `total` tokens into sequences of at most `max_seqlen`."""
    offsets: list[int] = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != total:
        raise ValueError(
            f"cu_seqlens_{name}: got offsets from {offsets[0]} to {offsets[-1]}, need them from 0 to {total} tokens"
        )
    for i, (start, stop) in enumerate(pairwise(offsets)):
        if stop < start:
            raise ValueError(f"cu_seqlens_{name}: got {start} then {stop} at index {i}, need offsets that never fall")
        if stop - start > max_seqlen:
            raise ValueError(
                f"max_seqlen_{name}: got {max_seqlen}, need at least {stop - start}, the length of sequence {i}"
            )
    return offsets


def _tiles(problem: MHAProblem, offsets_qo: list[int], offsets_kv: list[int]) -> Iterator[_Tile]:
    """Tiles that together hold, once each, every query that sees a key."""
    group = problem.h_q // problem.h_kv
    q_chunk = max(1, Q_CHUNK // group)
    for (q_0, q_end), (key_0, key_end) in zip(pairwise(offsets_qo), pairwise(offsets_kv), strict=True):
        s_q, s_kv = q_end - q_0, key_end - key_0
        if s_q == 0 or s_kv == 0:
            continue
        tile_rows = group * min(q_chunk, s_q)
        heads = max(1, TILE_SCORES // (tile_rows * min(K_CHUNK, s_kv)))
        # Aligned to the bottom right, a causal mask leaves nothing to the queries before the last s_kv.
        first = max(0, s_q - s_kv) if problem.causal else 0
        for head in range(0, problem.h_kv, heads):
            head_end = min(head + heads, problem.h_kv)
            for start in range(first, s_q, q_chunk):
                stop = min(start + q_chunk, s_q)
                yield _Tile(
                    queries=slice(q_0 + start, q_0 + stop),
                    q_heads=slice(head * group, head_end * group),
                    kv_heads=slice(head, head_end),
                    device=problem.device,
                    key_0=key_0,
                    seen_by_first=s_kv - s_q + start + 1 if problem.causal else s_kv,
                    seen_by_last=s_kv - s_q + stop if problem.causal else s_kv,
                )


def _scores(q: torch.Tensor, k: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
    """q [heads, group * queries, d] (scaled) times k [heads, keys, d]; -inf where `hidden` [queries, keys]."""
    scores = q @ k.mT
    if hidden is not None:
        scores.unflatten(1, (-1, hidden.shape[0])).masked_fill_(hidden, float("-inf"))
    return scores


@in_fp32
def mha_forward(
    problem: MHAProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_qo: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query over the keys of its sequence that it sees, by an online softmax.

    Args:
        q: [total_q, h_q, d_qk]; k: [total_kv, h_kv, d_qk]; v: [total_kv, h_kv, d_v].
        cu_seqlens_qo, cu_seqlens_kv: [b + 1] int32 offsets of the sequences.

    Returns:
        out [total_q, h_q, d_v] in q's dtype; lse [total_q, h_q] fp32, contiguous along the tokens.

    Raises:
        ValueError: offsets that do not split the tokens, or a sequence longer than its max_seqlen.
    """
    offsets_qo = _lengths("qo", cu_seqlens_qo, q.shape[0], max_seqlen_qo)
    offsets_kv = _lengths("kv", cu_seqlens_kv, k.shape[0], max_seqlen_kv)
    out = q.new_zeros(q.shape[0], problem.h_q, problem.d_v)
    lse = q.new_full((problem.h_q, q.shape[0]), float("-inf"), dtype=torch.float32).T
    for tile in _tiles(problem, offsets_qo, offsets_kv):
        q_rows = tile.rows(q) * softmax_scale
        # Key 0 is in the first chunk and every row sees it, so the maximum is finite from then on.
        row_max = q_rows.new_full((*q_rows.shape[:2], 1), float("-inf"))
        row_sum = torch.zeros_like(row_max)
        acc = q_rows.new_zeros(*q_rows.shape[:2], problem.d_v)
        for chunk, hidden in tile.key_chunks():
            p = _scores(q_rows, tile.keys(k, chunk).float(), hidden)
            new_max = torch.maximum(row_max, p.amax(-1, keepdim=True))
            p.sub_(new_max).exp_()
            shrink = row_max.sub_(new_max).exp_()
            row_sum.mul_(shrink).add_(p.sum(-1, keepdim=True))
            acc.mul_(shrink).baddbmm_(p, tile.keys(v, chunk).float())
            row_max = new_max
        tile.set_rows(out, acc.div_(row_sum))
        tile.set_rows(lse.unsqueeze(-1), row_sum.log_().add_(row_max))
    return out, lse


@in_fp32
def mha_backward(
    problem: MHAProblem,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a loss by q, k and v, given those by `out` and `lse` (None: the loss does not read lse).

    With P = exp(S - lse) and dP = dout V^T, dS = P * (dP - delta), where delta = rowsum(dout * out) - dlse
    (FlashAttention-2, arXiv 2307.08691, algorithm 2; lse adds the last term since its gradient by S is P).

    Returns:
        dq, dk, dv: shaped and typed like q, k, v.
    """
    offsets_qo = _lengths("qo", cu_seqlens_qo, q.shape[0], max_seqlen_qo)
    offsets_kv = _lengths("kv", cu_seqlens_kv, k.shape[0], max_seqlen_kv)
    dq = q.new_zeros(q.shape)
    # Queries of many tiles add up in these.
    dk, dv = (x.new_zeros(x.shape, dtype=torch.float32) for x in (k, v))
    for tile in _tiles(problem, offsets_qo, offsets_kv):
        q_rows = tile.rows(q) * softmax_scale
        dout_rows = tile.rows(dout)
        lse_rows = tile.rows(lse.unsqueeze(-1))
        delta = (dout_rows * tile.rows(out)).sum(-1, keepdim=True)
        if dlse is not None:
            delta -= tile.rows(dlse.unsqueeze(-1))
        dq_rows = torch.zeros_like(q_rows)
        for chunk, hidden in tile.key_chunks():
            k_chunk = tile.keys(k, chunk).float()
            p = _scores(q_rows, k_chunk, hidden).sub_(lse_rows).exp_()
            tile.keys(dv, chunk).baddbmm_(p.mT, dout_rows)
            ds = (dout_rows @ tile.keys(v, chunk).float().mT).sub_(delta).mul_(p)
            tile.keys(dk, chunk).baddbmm_(ds.mT, q_rows)
            dq_rows.baddbmm_(ds, k_chunk)
        tile.set_rows(dq, dq_rows.mul_(softmax_scale))
    return dq, dk.to(k.dtype), dv.to(v.dtype)
