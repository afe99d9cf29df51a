"""Softmax attention to keys that arrive in chunks, with the running maximum and sum of FlashAttention (2205.14135)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["OnlineSoftmax", "in_fp32", "keys_per_chunk", "scale_by_sink"]

Result = TypeVar("Result")

# Long enough that the matmuls take nearly all the time, short enough that a chunk of fp32 keys (4.7 MB) stays in cache.
MAX_KEYS_PER_CHUNK = 2048
MIN_KEYS_PER_CHUNK = 64
# 16 MB of fp32 scores: with more query rows the chunks of keys get shorter.
MAX_SCORES = 1 << 22


def in_fp32(compute: Callable[..., Result]) -> Callable[..., Result]:
    """Decorates what computes in the dtypes that it says, whatever torch.autocast would rather have."""

    @functools.wraps(compute)
    def without_autocast(*arguments: object) -> Result:
        with torch.autocast("cpu", enabled=False):
            return compute(*arguments)

    return without_autocast


def keys_per_chunk(rows: int) -> int:
    """Keys to process at a time beside `rows` query rows; a function of the request's own shape alone."""
    return min(MAX_KEYS_PER_CHUNK, max(MIN_KEYS_PER_CHUNK, MAX_SCORES // max(1, rows)))


class OnlineSoftmax:
    """Attention of some query rows to one key set, chunk by chunk; V is the first `d_v` columns of K.

    Args:
        q: [rows, d], any floating dtype.
        scale: factor of the scores.
        d_v: columns of a key that are its value.
    """

    def __init__(self, q: torch.Tensor, scale: float, d_v: int) -> None:
        self.q = q.float()
        self.scale = scale
        self.max = self.q.new_full((len(q),), -torch.inf)
        self.sum = self.q.new_zeros(len(q))
        self.acc = self.q.new_zeros(len(q), d_v)

    def attend(self, kv: torch.Tensor, rows: slice = slice(None)) -> None:
        """The query rows `rows` attend to every key of `kv` [n, d] fp32; other rows and keys never meet."""
        if len(kv) == 0:
            return
        # Keys first: BLAS is faster with the long dimension of this product as its rows.
        scores = (kv @ self.q[rows].T).mul_(self.scale)
        old_max = self.max[rows]
        new_max = torch.maximum(old_max, scores.amax(dim=0))
        # A row whose scores are all -inf so far has that maximum, and -inf - -inf would be NaN.
        base = new_max.masked_fill(new_max == -torch.inf, 0.0)
        probs = scores.sub_(base).exp_()
        rescale = torch.exp(old_max - base)
        old_max.copy_(new_max)
        self.sum[rows].mul_(rescale).add_(probs.sum(dim=0))
        self.acc[rows].mul_(rescale[:, None]).addmm_(probs.T, kv[:, : self.acc.shape[1]])

    def finish(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(out [rows, d_v], max_logits [rows], lse [rows]), fp32; a row that saw no key gets 0, -inf and +inf."""
        unseen = self.max == -torch.inf
        out = self.acc / self.sum.masked_fill(unseen, 1.0)[:, None]
        lse = (self.max + self.sum.log()).masked_fill(unseen, torch.inf)
        return out, self.max, lse


def scale_by_sink(out: torch.Tensor, lse: torch.Tensor, attn_sink: torch.Tensor) -> torch.Tensor:
    """`out` [rows, d_v] times exp(lse) / (exp(lse) + exp(attn_sink)), which a sigmoid gives without overflow."""
    # Rows that saw no key have the lse +inf, and +inf - +inf would be NaN.
    return out * torch.sigmoid(lse - attn_sink).masked_fill(lse == torch.inf, 0.0)[:, None]
