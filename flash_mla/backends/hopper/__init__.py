"""CuTe DSL kernels for NVIDIA Hopper (SM90), compiled ahead of time."""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from flash_mla import kernels
from flash_mla.backends.hopper import dense_decode_launch, mha_launch, sparse_decode_launch
from flash_mla.backends.hopper.dense_decode_heuristics import gathers
from flash_mla.backends.hopper.launch import Results
from flash_mla.backends.hopper.mha_launch import mha_backward, mha_forward, record_mha_backward, record_mha_forward
from flash_mla.backends.hopper.recorded_call import RecordedCall
from flash_mla.backends.hopper.sparse_prefill_launch import record_prefill, sparse_prefill, sparse_prefill_kernel
from flash_mla.plan import SplitPlan
from flash_mla.problem import DecodeInputs, DecodeProblem, Mendable, MHAProblem, Problem, SparsePrefillProblem

__all__ = [
    "NAME",
    "decode",
    "mha_backward",
    "mha_forward",
    "plan_decode",
    "record",
    "record_mha_backward",
    "record_mha_forward",
    "record_prefill",
    "sparse_prefill",
    "why_not",
]

NAME = "hopper"


@functools.lru_cache(maxsize=1024)
def why_not(problem: Problem) -> str | None:
    """The reason this backend cannot serve `problem`, or None."""
    if problem.device.type != "cuda":
        return f"the tensors are on {problem.device}, not on a CUDA device"
    major, minor = torch.cuda.get_device_capability(problem.device)
    if (major, minor) != (9, 0):
        return f"{problem.device} is an sm_{major}{minor} GPU, not Hopper (sm_90)"
    if isinstance(problem, SparsePrefillProblem):
        return kernels.unavailable(sparse_prefill_kernel(problem))
    if isinstance(problem, MHAProblem):
        return mha_launch.why_not(problem)
    if not problem.aligned:
        return Mendable(
            "by its strides, pages of a cache, or rows of a plain one, do not begin at multiples of 16 bytes"
        )
    return _of_its_mode(problem).why_not(problem)


def plan_decode(problem: DecodeProblem, inputs: DecodeInputs) -> SplitPlan:
    """Plan a decode call on the device."""
    return _of_its_mode(problem).plan_decode(problem, inputs)


def decode(
    problem: DecodeProblem, inputs: DecodeInputs, work: torch.Tensor, splits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [b, s_q, h_q, d_v], lse [b, h_q, s_q] fp32) of a planned call."""
    return _of_its_mode(problem).decode(problem, _with_pages(inputs), work, splits)


def record(
    problem: DecodeProblem, inputs: DecodeInputs, work: torch.Tensor, splits: torch.Tensor, results: Results
) -> RecordedCall | None:
    """What repeats a call that `decode` has run with these results, if it can be repeated."""
    if _with_pages(inputs) is not inputs:
        return None
    return _of_its_mode(problem).record(problem, inputs, work, splits, results)


def _with_pages(inputs: DecodeInputs) -> DecodeInputs:
    """Each cache with a page at least: kernels load some row, to be dropped, in place of one that is not there."""
    caches = {name: getattr(inputs, name) for name in ("k_cache", "extra_k_cache")}
    empty = {name: cache for name, cache in caches.items() if cache is not None and cache.shape[0] == 0}
    if not empty:
        return inputs
    return inputs._replace(**{name: cache.new_empty(1, *cache.shape[1:]) for name, cache in empty.items()})


def _of_its_mode(problem: DecodeProblem) -> ModuleType:
    p = problem
    if p.topk is not None or p.kv_format.is_quantised or gathers(p.s_q, p.h_q, p.h_kv, p.page_size):
        return sparse_decode_launch
    return dense_decode_launch
