"""Token-sparse prefill on the CPU: one query token at a time, as each has keys of its own."""

from __future__ import annotations

import torch

from flash_mla.backends.cpu.attention import OnlineSoftmax, in_fp32, keys_per_chunk, scale_by_sink
from flash_mla.problem import SparsePrefillInputs, SparsePrefillProblem

__all__ = ["sparse_prefill"]


@torch.no_grad()
@in_fp32
def sparse_prefill(
    problem: SparsePrefillProblem, inputs: SparsePrefillInputs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out [s_q, h_q, d_v], max_logits [s_q, h_q] fp32, lse [s_q, h_q] fp32)."""
    out = inputs.out
    if out is None:
        out = inputs.q.new_empty(problem.s_q, problem.h_q, problem.d_v)
    max_logits = inputs.q.new_empty(problem.s_q, problem.h_q, dtype=torch.float32)
    lse = torch.empty_like(max_logits)
    kv = inputs.kv[:, 0]
    step = keys_per_chunk(problem.h_q)
    lengths = [problem.topk] * problem.s_q
    if inputs.topk_length is not None:
        lengths = inputs.topk_length.clamp(0, problem.topk).tolist()
    for token, length in enumerate(lengths):
        rows = inputs.indices[token, 0, :length].long()
        rows = rows[(rows >= 0) & (rows < problem.s_kv)]
        softmax = OnlineSoftmax(inputs.q[token], inputs.sm_scale, problem.d_v)
        for chunk in rows.split(step):
            softmax.attend(kv.index_select(0, chunk).float())
        token_out, max_logits[token], lse[token] = softmax.finish()
        if inputs.attn_sink is not None:
            token_out = scale_by_sink(token_out, lse[token], inputs.attn_sink)
        out[token] = token_out
    return out, max_logits, lse
