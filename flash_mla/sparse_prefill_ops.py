"""Token-sparse prefill as a PyTorch operator, torch.ops.flash_mla.sparse_prefill.

torch.compile puts an operator into its graph whole: it needs the schema and a fake implementation that tells the
results' shapes. This one writes into an `out` that is always given, so that the compiler plans the memory of new ones
and a given one is not copied.
"""

from __future__ import annotations

from types import ModuleType

import torch

from flash_mla import backends
from flash_mla.problem import SparsePrefillInputs, SparsePrefillProblem

__all__ = ["problem_of", "sparse_prefill"]


def problem_of(inputs: SparsePrefillInputs, d_v: int) -> SparsePrefillProblem:
    """The problem that a call poses; inputs as checked by `checks.sparse_prefill`."""
    s_q, h_q, d = inputs.q.shape
    return SparsePrefillProblem(
        device=inputs.q.device,
        dtype=inputs.q.dtype,
        s_q=s_q,
        s_kv=inputs.kv.shape[0],
        h_q=h_q,
        d_qk=d,
        d_v=d_v,
        topk=inputs.indices.shape[-1],
    )


def sparse_prefill(
    problem: SparsePrefillProblem, backend: ModuleType, inputs: SparsePrefillInputs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, max_logits and lse by a backend that serves the problem."""
    if problem.s_q > 0:
        return backend.sparse_prefill(problem, inputs)
    out = inputs.out
    if out is None:
        out = inputs.q.new_empty(0, problem.h_q, problem.d_v)
    return out, *_new_statistics(inputs.q)


def _new_statistics(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for max_logits and lse."""
    s_q, h_q, _d = q.shape
    return q.new_empty(s_q, h_q, dtype=torch.float32), q.new_empty(s_q, h_q, dtype=torch.float32)


def _into_out(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = SparsePrefillInputs(q, kv, indices, sm_scale, attn_sink, topk_length, out)
    problem = problem_of(inputs, out.shape[-1])
    _, max_logits, lse = sparse_prefill(problem, backends.choose(problem), inputs)
    return max_logits, lse


def _fake(q: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return _new_statistics(q)


_LIBRARY = torch.library.Library("flash_mla", "FRAGMENT")
_LIBRARY.define(
    "sparse_prefill(Tensor q, Tensor kv, Tensor indices, float sm_scale, Tensor? attn_sink, Tensor? topk_length, "
    "Tensor(a!) out) -> (Tensor max_logits, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("sparse_prefill", _into_out, _device)
_LIBRARY.impl("sparse_prefill", torch.library.fallthrough_kernel, "Autograd")  # results have no gradients
torch.library.register_fake("flash_mla::sparse_prefill", _fake, lib=_LIBRARY)
