"""The ways to run a problem, and the choice between them.

Each backend is a module with a `NAME` and `why_not(problem) -> str | None`: the reason it cannot serve a problem, or
None when it can. `choose` takes the first that can, in order of speed; `explain` tells the reasons of all.
One that has a `record`, `record_prefill`, `record_mha_forward` or `record_mha_backward` as well can repeat calls of
`decode`, `sparse_prefill`, `mha_forward` or `mha_backward` at less host time than these take.
Being served by a slower one for a reason that the user can mend, such as kernels that are not compiled, gets a warning.
`FLASH_MLA_BACKEND=hopper|cpu|triton` forces one.
"""

from __future__ import annotations

import functools
import os
import warnings
from types import ModuleType

from flash_mla.backends import cpu, hopper, triton
from flash_mla.problem import Mendable, Problem

__all__ = ["BACKENDS", "choose", "explain", "forced"]

# Triton's interpreter serves CPU tensors too, but only when forced, as the CPU backend comes first.
BACKENDS: tuple[ModuleType, ...] = (hopper, cpu, triton)


def forced() -> str | None:
    """The name of the backend that the environment forces."""
    return os.environ.get("FLASH_MLA_BACKEND")


def explain(problem: Problem) -> dict[str, str | None]:
    """Backend name -> None if it serves `problem`, otherwise the reason why not; in order of preference."""
    return {backend.NAME: backend.why_not(problem) for backend in BACKENDS}


def choose(problem: Problem) -> ModuleType:
    """The preferred backend that serves `problem`.

    Raises:
        ValueError: FLASH_MLA_BACKEND names no backend.
        RuntimeError: no backend, or not the forced one, serves the problem; the message gives each reason.
    """
    name = forced()
    candidates = [backend for backend in BACKENDS if name in (None, "", backend.NAME)]
    if name and not candidates:
        names = ", ".join(backend.NAME for backend in BACKENDS)
        raise ValueError(f"FLASH_MLA_BACKEND: got {name!r}, need one of {names}")
    reasons: dict[str, str] = {}
    for backend in candidates:
        reason = backend.why_not(problem)
        if reason is None:
            for better, why in reasons.items():
                if isinstance(why, Mendable):
                    _warn(problem, f"{problem.mode} runs on {backend.NAME}, slower than {better}: {why}")
            return backend
        reasons[backend.NAME] = reason
    which = "the forced backend cannot serve" if name else "no backend serves"
    told = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items())
    raise RuntimeError(f"{which} {problem.mode} on {problem.device}: {told}")


@functools.lru_cache(maxsize=1024)
def _warn(problem: Problem, message: str) -> None:
    """Once for each problem, whatever filter the program has set."""
    warnings.warn(message, stacklevel=3)
