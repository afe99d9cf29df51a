"""torch.compile as the tests of operators use it."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch

no_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler for CPU tensors"
)
BACKENDS = ["aot_eager", pytest.param("inductor", marks=no_compiler)]


def compiled(function: Callable, backend: object = "aot_eager", *, dynamic: bool = False) -> Callable:
    """`function` compiled afresh; a graph break is an error."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
