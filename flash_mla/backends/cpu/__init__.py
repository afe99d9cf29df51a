"""Plain PyTorch on CPU tensors, in fp32, with memory bounded by working through the keys in chunks."""

from __future__ import annotations

from flash_mla.backends.cpu.decode import decode, plan_decode
from flash_mla.backends.cpu.mha import mha_backward, mha_forward
from flash_mla.backends.cpu.sparse_prefill import sparse_prefill
from flash_mla.problem import Problem

__all__ = ["NAME", "decode", "mha_backward", "mha_forward", "plan_decode", "sparse_prefill", "why_not"]

NAME = "cpu"


def why_not(problem: Problem) -> str | None:
    """The reason this backend cannot serve `problem`, or None."""
    if problem.device.type != "cpu":
        return f"the tensors are on {problem.device}, not on the CPU"
    return None
