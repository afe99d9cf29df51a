"""Launches of Triton kernels that find the compiled form themselves.

Before every launch Triton binds the arguments, looks at each and spells out a key, which takes longer than a small
kernel runs. Here a launch whose arguments are specialised like an earlier one's goes straight to what that compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton

from flash_mla.backends.triton.variants import COMPILE_OPTIONS

__all__ = ["launch"]

# Since 3.3 compiled kernels are handed all arguments of the kernel, before only those that are no constants.
_HANDS_OVER_CONSTANTS = not triton.__version__.startswith("3.2.")

# By kernel, device, specialisation, constants and options: the compiled kernel, and the constants to hand over.
_compiled: dict[tuple[object, ...], tuple[Any, tuple[object, ...]]] = {}


def launch(
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    constants: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
) -> None:
    """Launch `programs` programs of a kernel on the device of its first argument, whichever is current.

    Args:
        kernel: what @triton.jit returns.
        arguments: by position: tensors, integers, floats or None.
        constants: by name: the constexpr arguments, which come last.
    """
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(device, kernel, programs, arguments, constants, num_warps, num_stages)
    else:
        _launch(device, kernel, programs, arguments, constants, num_warps, num_stages)


def _launch(
    device: torch.device,
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    constants: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
) -> None:
    key = (id(kernel), device.index, *map(_specialisation, arguments), *constants.values(), num_warps, num_stages)
    found = _compiled.get(key)
    if found is not None:
        compiled, handed_over = found
        compiled[programs, 1, 1](*arguments, *handed_over)
        return
    options = {"num_warps": num_warps, "num_stages": num_stages, **COMPILE_OPTIONS}
    compiled = kernel[programs,](*arguments, **constants, **options)
    if compiled is not None:  # as it is in the interpreter
        in_order = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        _compiled[key] = compiled, in_order if _HANDS_OVER_CONSTANTS else ()


def _specialisation(argument: Any) -> object:
    """What Triton compiles for: at most this is built into a kernel, or else its argument has another type."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(1 << 31) <= argument < 1 << 31
    return type(argument)
