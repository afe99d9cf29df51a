"""Dense multi-head attention that looks like an earlier call and is repeated, forward and backward.

A call that looks like one that checks let pass is like it. Checking, choosing a backend and handing over tensors takes
longer than launching kernels, comparing layouts does not. Nor does anyone pay for what is never used: only the second
call of a kind is recorded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from flash_mla import backends
from flash_mla.mha_ops import problem_of
from flash_mla.problem import MHAProblem

__all__ = ["Served", "served"]

Tensors = tuple[torch.Tensor, ...]
OptionalTensors = tuple[torch.Tensor | None, ...]
Results = tuple[torch.Tensor, torch.Tensor]

PLAIN = {int, bool, float}  # what options are, to be compared
RECORDED = 2  # the call of a kind that is


@dataclass
class Served:
    """What repeats calls that look alike."""

    key: tuple[object, ...]  # the forced backend, and all arguments that are no tensors but the scale, with their types
    forward: Callable[[Tensors, float], Results | None] | None = None
    backward: Callable[[OptionalTensors, float], Tensors | None] | None = None
    forwards: int = 0  # that were not repeated
    backwards: int = 0
    default_scale: float = 0.0
    # What checks made of the options.
    max_seqlens: tuple[int, int] = (0, 0)
    flags: tuple[bool, bool] = (False, False)  # causal, deterministic

    def repeated(self, tensors: Tensors, scale: float | None) -> Results | None:
        """out and lse, or None if the tensors do not look the same."""
        forward = self.forward
        if forward is None:
            return None
        scale = self.default_scale if scale is None else scale
        results = forward(tensors, scale)
        if results is not None and torch.is_grad_enabled() and any(x.requires_grad for x in tensors[:3]):
            return _Repeated.apply(self, results, scale, *tensors)
        return results

    def note_forward(
        self, tensors: Tensors, results: Results, max_seqlens: tuple[int, int], flags: tuple[bool, bool]
    ) -> None:
        """A call was checked and gave `results`."""
        self.forwards += 1
        if self.forwards == RECORDED:
            q, k, v, *_ = tensors
            self.default_scale, self.max_seqlens, self.flags = q.shape[-1] ** -0.5, max_seqlens, flags
            problem = problem_of(q, k, v, *flags)
            self.forward = _record("record_mha_forward", problem, tensors, results)

    def gradients(self, dout: torch.Tensor, dlse: torch.Tensor | None, saved: Tensors, scale: float) -> Tensors:
        """Those by q, k and v; saved: these, out, lse and both offsets."""
        tensors, backward = (dout, dlse, *saved), self.backward
        gradients = None if backward is None else backward(tensors, scale)
        if gradients is not None:
            return gradients
        gradients = torch.ops.flash_mla.mha_backward(*tensors, *self.max_seqlens, scale, *self.flags)
        self.backwards += dout.stride(-1) == 1  # else the kernel read a copy
        if self.backwards == RECORDED and backward is None:
            q, k, v, *_ = saved
            problem = problem_of(q, k, v, *self.flags)
            self.backward = _record("record_mha_backward", problem, tensors, gradients, self.max_seqlens)
        return gradients


def _record(name: str, problem: MHAProblem, *call: Any) -> Callable[..., Any] | None:
    """What repeats calls like this one, if the backend can."""
    record = getattr(backends.choose(problem), name, None)
    try:
        return None if record is None else record(problem, *call)
    except torch.OutOfMemoryError:  # the call itself has succeeded
        return None


class _Repeated(torch.autograd.Function):
    """A repeated call in autograd's graph, which knows no transforms of functions: none of theirs is repeated."""

    @staticmethod
    def forward(ctx: Any, served: Served, results: Results, scale: float, *tensors: torch.Tensor) -> Results:
        q, k, v, *offsets = tensors
        ctx.served, ctx.scale = served, scale
        ctx.save_for_backward(q, k, v, *results, *offsets)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> OptionalTensors:
        saved = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(saved[3])
        return None, None, None, *ctx.served.gradients(dout, dlse, saved, ctx.scale), None, None


_latest: Served | None = None


def served(tensors: Tensors, options: tuple[object, ...], scale: float | None) -> tuple[Served | None, Results | None]:
    """What is kept for calls like this one, and its results if it is repeated.

    Args:
        tensors: q, k, v and both offsets; nothing is kept if they are no tensors.
        options: all other arguments but the scale.
        scale: None for the default.
    """
    global _latest
    types = tuple(map(type, options))
    if not PLAIN.issuperset(types):  # a length in a tensor may change
        return None, None
    forced, latest = backends.forced(), _latest
    # Finding an earlier call takes time: it is first taken to be the latest.
    if latest is not None and latest.key == (forced, types, options):
        results = latest.repeated(tensors, scale)
        if results is not None:
            return latest, results
    try:
        like = _like((forced, types, options), *((x.shape, x.stride(), x.dtype, x.device) for x in tensors))
    except (AttributeError, TypeError):
        return None, None
    results = None if like is latest else like.repeated(tensors, scale)
    _latest = like
    return like, results


@functools.lru_cache(maxsize=256)
def _like(key: tuple[object, ...], *_: object) -> Served:
    return Served(key)
