"""Decode on the CPU: one request at a time, so that its result cannot depend on what else is in the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flash_mla.backends.cpu.attention import OnlineSoftmax, in_fp32, keys_per_chunk, scale_by_sink
from flash_mla.kv_cache import KVCacheFormat
from flash_mla.plan import SplitPlan, split_plan
from flash_mla.problem import DecodeInputs, DecodeProblem

__all__ = ["decode", "plan_decode"]


def plan_decode(problem: DecodeProblem, inputs: DecodeInputs) -> SplitPlan:
    """The schedule of one worker that does everything: the CPU does not split, but clients look for the tensors.

    Raises:
        ValueError: a length or a page in use is out of range.
    """
    if inputs.block_table is not None and inputs.cache_seqlens is not None and problem.topk is None:
        _check_pages(inputs.block_table, inputs.cache_seqlens, len(inputs.k_cache), problem.page_size)
        return split_plan(inputs.cache_seqlens, fixed_cost=1, num_workers=1)
    lengths = [scope.lengths for scope in _scopes(problem, inputs)]
    return split_plan(
        lengths[0],
        extra_lengths=lengths[1] if len(lengths) > 1 else None,
        fixed_cost=1,
        num_workers=1,
        units_per_request=problem.s_q,
    )


@torch.no_grad()
@in_fp32
def decode(
    problem: DecodeProblem, inputs: DecodeInputs, work: torch.Tensor, splits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [b, s_q, h_q, d_v], lse [b, h_q, s_q] fp32). The plan (`work`, `splits`) has one worker and is not read.

    Raises:
        ValueError: a length, a page or an index in use is out of range; `out` is then untouched.
    """
    out = inputs.out
    if out is None:
        out = inputs.q.new_empty(problem.b, problem.s_q, problem.h_q, problem.d_v)
    lse = inputs.q.new_empty(problem.b, problem.h_q, problem.s_q, dtype=torch.float32)
    if inputs.block_table is not None and inputs.cache_seqlens is not None and problem.topk is None:
        _dense(problem, inputs, inputs.block_table, inputs.cache_seqlens, out, lse)
    else:
        _sparse(problem, inputs, out, lse)
    return out, lse


def _dense(
    problem: DecodeProblem,
    inputs: DecodeInputs,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    s_q, page_size = problem.s_q, problem.page_size
    _check_pages(block_table, cache_seqlens, len(inputs.k_cache), page_size)
    group = problem.h_q // problem.h_kv
    # The query tokens and heads that share a KV head read its keys once, as the rows of one matrix: row j * group + h
    # is token j of the group's head h.
    rows = s_q * group
    step = keys_per_chunk(rows)
    for request, seqlen in enumerate(cache_seqlens.tolist()):
        pages = block_table[request, : -(-seqlen // page_size)].long()
        seen_by_all = max(0, seqlen - s_q + 1) if problem.causal else seqlen
        for h_kv in range(problem.h_kv):
            heads = slice(h_kv * group, (h_kv + 1) * group)
            cache = inputs.k_cache[:, :, h_kv : h_kv + 1]
            softmax = OnlineSoftmax(inputs.q[request, :, heads].reshape(rows, -1), inputs.softmax_scale, problem.d_v)
            for start in range(0, seen_by_all, step):
                slots = _slots(pages, page_size, start, min(start + step, seen_by_all))
                softmax.attend(problem.kv_format.gather(cache, slots))
            # A mask would not do for the last keys: a NaN there times a probability of 0 is NaN in rows that may not
            # see it. So each query token meets just its own keys.
            for start in range(seen_by_all, seqlen, step):
                stop = min(start + step, seqlen)
                kv = problem.kv_format.gather(cache, _slots(pages, page_size, start, stop))
                for token in range(s_q):
                    seen = max(0, seqlen - s_q + token + 1 - start)
                    softmax.attend(kv[:seen], slice(token * group, (token + 1) * group))
            out_rows, _, lse_rows = softmax.finish()
            out[request, :, heads] = out_rows.view(s_q, group, -1)
            lse[request, heads] = lse_rows.view(s_q, group).T


def _slots(pages: torch.Tensor, page_size: int, start: int, stop: int) -> torch.Tensor:
    """Slots of the tokens `start` to `stop` of a request whose `pages` [n] int64 these are."""
    first = start // page_size
    last = -(-stop // page_size)
    slots = pages[first:last, None] * page_size + torch.arange(page_size, device=pages.device)
    return slots.view(-1)[start - first * page_size : stop - first * page_size]


def _sparse(problem: DecodeProblem, inputs: DecodeInputs, out: torch.Tensor, lse: torch.Tensor) -> None:
    scopes = _scopes(problem, inputs)
    for scope in scopes:
        scope.check_slots()
    step = keys_per_chunk(problem.h_q)
    for request in range(problem.b):
        for token in range(problem.s_q):
            softmax = OnlineSoftmax(inputs.q[request, token], inputs.softmax_scale, problem.d_v)
            for scope in scopes:
                for slots in scope.slots(request, token).split(step):
                    softmax.attend(scope.kv_format.gather(scope.cache, slots))
            out_rows, _, lse_rows = softmax.finish()
            if inputs.attn_sink is not None:
                out_rows = scale_by_sink(out_rows, lse_rows, inputs.attn_sink)
            out[request, token] = out_rows
            lse[request, :, token] = lse_rows


@dataclass(frozen=True)
class _Scope:
    """One of the caches of a sparse call, with the indices [b, s_q, topk] into it and how many of them count [b]."""

    name: str
    cache: torch.Tensor
    kv_format: KVCacheFormat
    indices: torch.Tensor
    lengths: torch.Tensor

    def slots(self, request: int, token: int) -> torch.Tensor:
        """The slots that a query token attends to: of the entries that count, those that are not negative."""
        slots = self.indices[request, token, : int(self.lengths[request])].long()
        return slots[slots >= 0]

    def check_slots(self) -> None:
        num_slots = self.cache.shape[0] * self.cache.shape[1]
        counts = torch.arange(self.indices.shape[-1], device=self.indices.device) < self.lengths[:, None, None]
        wrong = torch.nonzero(counts & (self.indices >= num_slots))
        if len(wrong):
            request, token, entry = wrong[0].tolist()
            raise ValueError(
                f"{self.name}: got slot {int(self.indices[request, token, entry])} at [{request}, {token}, {entry}], "
                f"need less than {num_slots} (pages x page size of the cache), or negative to skip the entry"
            )


def _scopes(problem: DecodeProblem, inputs: DecodeInputs) -> list[_Scope]:
    scopes = []
    for name, cache, kv_format, indices, topk_length in (
        ("indices", inputs.k_cache, problem.kv_format, inputs.indices, inputs.topk_length),
        (
            "extra_indices_in_kvcache",
            inputs.extra_k_cache,
            problem.extra_format,
            inputs.extra_indices,
            inputs.extra_topk_length,
        ),
    ):
        if cache is not None and kv_format is not None and indices is not None:
            topk = indices.shape[-1]
            if topk_length is None:
                topk_length = indices.new_full((problem.b,), topk)
            scopes.append(_Scope(name, cache, kv_format, indices, topk_length.clamp(0, topk)))
    return scopes


def _check_pages(block_table: torch.Tensor, cache_seqlens: torch.Tensor, num_pages: int, page_size: int) -> None:
    """Reading tensor contents costs nothing on the CPU, and a wild read would end the process."""
    max_pages = block_table.shape[1]
    wrong = torch.nonzero((cache_seqlens < 0) | (cache_seqlens > max_pages * page_size))
    if len(wrong):
        request = int(wrong[0])
        raise ValueError(
            f"cache_seqlens: got {int(cache_seqlens[request])} for request {request}, need 0 to "
            f"{max_pages * page_size} (block_table has {max_pages} pages of {page_size} tokens a request)"
        )
    used = torch.arange(max_pages, device=block_table.device) * page_size < cache_seqlens[:, None]
    wrong = torch.nonzero(used & ((block_table < 0) | (block_table >= num_pages)))
    if len(wrong):
        request, page = wrong[0].tolist()
        raise ValueError(
            f"block_table: got page {int(block_table[request, page])} at [{request}, {page}], need 0 to "
            f"{num_pages - 1} (k_cache has {num_pages} pages)"
        )
