"""CuTe DSL kernels for NVIDIA Hopper (SM90), compiled ahead of time."""

from __future__ import annotations

from flash_mla.problem import Problem

NAME = "hopper"


def why_not(problem: Problem) -> str | None:
    """The reason this backend cannot serve `problem`, or None."""
    if problem.device.type != "cuda":
        return f"the tensors are on {problem.device}, not on a CUDA device"
    return f"no Hopper kernel for {problem.mode} yet"
