"""Plain PyTorch on CPU tensors, in fp32, with memory bounded by working through the keys in chunks."""

from __future__ import annotations

from flash_mla.problem import Problem

NAME = "cpu"


def why_not(problem: Problem) -> str | None:
    """The reason this backend cannot serve `problem`, or None."""
    if problem.device.type != "cpu":
        return f"the tensors are on {problem.device}, not on the CPU"
    return None
