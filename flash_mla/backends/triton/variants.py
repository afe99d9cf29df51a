"""The Triton kernels as they get compiled, listed without a GPU: what flash_mla.backends.triton.check checks.

A module with kernels joins by a function `variants(capability) -> Iterator[Variant]`, which lists its kernels in the
configurations that its heuristics take on GPUs of that compute capability, and by its name in MODULES.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["COMPILE_OPTIONS", "MODULES", "Capability", "Variant", "variants"]

Capability = tuple[int, int]

# Of every kernel, whatever its tiles. Products are to be added unrounded, whether or not that is Triton's default.
COMPILE_OPTIONS = {"enable_fp_fusion": True}

MODULES = ("decode_variants", "mha")


@dataclass(frozen=True)
class Variant:
    """A kernel with everything that its machine code depends on."""

    name: str
    kernel: Any  # what @triton.jit returns
    types: Mapping[str, str]  # of the arguments known when running, as Triton spells them: "*bf16"; else "i32"
    constants: Mapping[str, Any]  # the others
    num_warps: int
    num_stages: int = 1
    spill: int = 0  # bytes a thread may keep in local memory
    multiplies: bool = True  # on the tensor cores

    @property
    def signature(self) -> dict[str, str]:
        """Triton's type of each argument."""
        names = self.kernel.arg_names
        return {name: "constexpr" if name in self.constants else self.types.get(name, "i32") for name in names}

    @property
    def aligned(self) -> list[int]:
        """Positions of the arguments that are multiples of 16, as contiguous tensors' pointers and strides are."""
        signature = self.signature.items()
        return [i for i, (name, kind) in enumerate(signature) if kind[0] == "*" or (kind == "i32" and "stride" in name)]


def variants(capability: Capability) -> Iterator[Variant]:
    """All of them for GPUs of one compute capability."""
    for name in MODULES:
        yield from importlib.import_module(f"flash_mla.backends.triton.{name}").variants(capability)
