"""CuTe DSL kernels for NVIDIA Hopper (SM90), compiled ahead of time."""

from __future__ import annotations

import functools

import torch

from flash_mla import kernels
from flash_mla.backends.hopper.launch import decode, dense_decode_kernel, plan_decode
from flash_mla.kv_cache import KVCacheFormat
from flash_mla.problem import DecodeProblem, Problem

__all__ = ["NAME", "decode", "plan_decode", "why_not"]

NAME = "hopper"


@functools.lru_cache(maxsize=1024)
def why_not(problem: Problem) -> str | None:
    """The reason this backend cannot serve `problem`, or None."""
    if problem.device.type != "cuda":
        return f"the tensors are on {problem.device}, not on a CUDA device"
    major, minor = torch.cuda.get_device_capability(problem.device)
    if (major, minor) != (9, 0):
        return f"{problem.device} is an sm_{major}{minor} GPU, not Hopper (sm_90)"
    if not isinstance(problem, DecodeProblem) or problem.topk is not None:
        return f"no Hopper kernel for {problem.mode} yet"
    if problem.kv_format not in (KVCacheFormat.BF16, KVCacheFormat.FP16):
        return f"no Hopper kernel for dense decode over {problem.kv_format.name} yet"
    if problem.page_size % 64:
        return f"no Hopper kernel for pages of {problem.page_size} tokens yet, only for multiples of 64"
    return kernels.unavailable(dense_decode_kernel(problem.dtype, problem.d_qk, 1))
