"""Dense multi-head attention that looks like an earlier call and is repeated, forward and backward.

A call that looks like one that checks let pass is like it. Checking, choosing a backend and allocating what it needs
takes longer than launching kernels, comparing layouts does not.
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

__all__ = ["Served", "served"]

Tensors = tuple[torch.Tensor, ...]
OptionalTensors = tuple[torch.Tensor | None, ...]
Results = tuple[torch.Tensor, torch.Tensor]

PLAIN = {int, bool, float}  # what options are, to be compared


@dataclass
class Served:
    """What repeats calls that look alike."""

    key: tuple[object, ...]  # the forced backend, and all arguments that are no tensors but the scale, with their types
    forward: Callable[[Tensors, float], Results | None] | None = None
    backward: Callable[[OptionalTensors, float], Tensors | None] | None = None
    default_scale: float = 0.0
    # What checks made of the options.
    max_seqlens: tuple[int, int] = (0, 0)
    flags: tuple[bool, bool] = (False, False)  # causal, deterministic

    def repeated(self, tensors: Tensors, scale: float | None) -> Results | None:
        """out and lse, or None if the tensors do not look the same."""
        if self.forward is None:
            return None
        scale = self.default_scale if scale is None else scale
        results = self.forward(tensors, scale)
        if results is not None and torch.is_grad_enabled() and any(x.requires_grad for x in tensors[:3]):
            return _Repeated.apply(self, results, scale, *tensors)
        return results

    def record(self, tensors: Tensors, max_seqlens: tuple[int, int], flags: tuple[bool, bool]) -> None:
        """Repeat calls like this one, which has run, if the backend can."""
        q, k, v, *_ = tensors
        problem = problem_of(q, k, v, *flags)
        record = getattr(backends.choose(problem), "record_mha_forward", None)
        self.forward = None if record is None else record(problem, *tensors, *max_seqlens)
        self.backward = None
        self.default_scale, self.max_seqlens, self.flags = problem.d_qk**-0.5, max_seqlens, flags

    def gradients(self, dout: torch.Tensor, dlse: torch.Tensor | None, saved: Tensors, scale: float) -> Tensors:
        """Those by q, k and v; saved: these, out, lse and both offsets."""
        tensors = (dout, dlse, *saved)
        gradients = None if self.backward is None else self.backward(tensors, scale)
        if gradients is None:
            gradients = torch.ops.flash_mla.mha_backward(*tensors, *self.max_seqlens, scale, *self.flags)
            if dout.stride(-1) == 1:  # else the kernel read a copy
                q, k, v, *_ = saved
                problem = problem_of(q, k, v, *self.flags)
                record = getattr(backends.choose(problem), "record_mha_backward", None)
                self.backward = None if record is None else record(problem, *tensors, *self.max_seqlens)
        return gradients


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
        tensors: q, k, v and both offsets; nothing is kept if they are none.
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
        like = _like((forced, types, options), *((x.shape, x.dtype, x.device) for x in tensors))
    except (AttributeError, TypeError):
        return None, None
    results = None if like is latest else like.repeated(tensors, scale)
    _latest = like
    return like, results


@functools.lru_cache(maxsize=256)
def _like(key: tuple[object, ...], *_: object) -> Served:
    return Served(key)
