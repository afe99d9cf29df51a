"""Triton kernels for every NVIDIA GPU from SM80 on; Triton's interpreter runs them on CPU tensors, for tests.

Triton is imported when a problem first asks for it: the import takes a moment, and installs without a GPU lack it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os

import torch

from flash_mla.problem import Problem

__all__ = ["NAME", "why_not"]

NAME = "triton"

# Where the functions of a backend lie. A submodule may be called like a function, and importing one binds its name
# here, so the functions are bound once all submodules have been imported.
_FUNCTIONS = {"launch": ("decode", "plan_decode", "sparse_prefill"), "mha": ("mha_backward", "mha_forward")}


@functools.lru_cache(maxsize=1024)
def why_not(problem: Problem) -> str | None:
    """The reason this backend cannot serve `problem`, or None."""
    reason = _no_device(problem.device) or _no_triton()
    if reason is None:
        _bind_functions()
    return reason


def _no_device(device: torch.device) -> str | None:
    if device.type == "cpu" and _interprets():
        return None
    if device.type != "cuda":
        return f"the tensors are on {device}, not on a CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"{device} is an sm_{major}{minor} GPU, older than sm_80"
    return None


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None


@functools.cache
def _bind_functions() -> None:
    if _interprets():
        importlib.import_module(f"{__name__}.interpreter")
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in _FUNCTIONS}
    for name, functions in _FUNCTIONS.items():
        globals().update({function: getattr(modules[name], function) for function in functions})
