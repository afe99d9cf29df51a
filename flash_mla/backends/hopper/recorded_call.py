"""Repeat a call without Python work on each of its tensors; recorded_call.c does it.

Checking a call and handing its tensors over takes Python longer than launching its kernels. Once a call has run, its
record holds how its tensors are laid out and what the kernel was given for them; a later call that looks the same is
compared and launched in one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from flash_mla import kernels
from flash_mla.backends.hopper.launch import LOG2_E, Argument, DecodeCall, Results, rows_aligned
from flash_mla.problem import DecodeInputs

__all__ = ["CONSTANT", "REFUSALS", "RecordedCall", "record_call", "recorded", "workspace_argument"]

# Of a call's tensors, in the order of DecodeInputs, its scale and both tensors of its plan: its results, or None if it
# does not look the same.
RecordedCall = Callable[[tuple[torch.Tensor | None, ...], float, torch.Tensor, torch.Tensor], Results | None]

OUT = DecodeInputs._fields.index("out")
GIVEN = (*DecodeInputs._fields[:OUT], "work", "splits", "out", "lse", "scale")  # of a decode call to be repeated
CONSTANT, WORKSPACE = -1, -2

# What may keep a recorded call from being repeated; a full check of the call explains it.
REFUSALS = (BufferError, RuntimeError, TypeError, ValueError)


def record_call(
    name: str, kernel: Callable[..., None], given: tuple[object, ...], arguments: Iterable[tuple[int, object]]
) -> Callable[..., bool] | None:
    """What launches a kernel for a call whose arguments look like `given`, and says whether they do.

    Args:
        name: of the kernel, whose shared object holds the C function.
        kernel: itself.
        given: the arguments of a call.
        arguments: for each of the kernel's: which of `given` it is or is a view of, or CONSTANT or WORKSPACE; itself.

    Returns:
        None if a tensor cannot be handed over.
    """
    record = kernels.load(name, "record_call")
    try:
        return record(kernel, len(given), *given, *(value for argument in arguments for value in argument))
    except (BufferError, RuntimeError, ValueError):  # an older torch's DLPack may lack a dtype, or allocation
        return None


def workspace_argument(template: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Of a kernel's arguments, its workspace: memory of each call's own, or once and for all none."""
    return WORKSPACE if template.numel() else CONSTANT, torch.empty_like(template)


def recorded(
    call: DecodeCall,
    inputs: DecodeInputs,
    work: torch.Tensor,
    splits: torch.Tensor,
    results: Results,
    *arguments: Argument,
) -> RecordedCall | None:
    """What repeats a call on its device, the current one.

    Args:
        call: launched before.
        inputs: its inputs.
        work, splits: its plan.
        results: what it gave, which stand for those of a repeated call.
        arguments: what its kernel reads before the plan, but with q as in `inputs`.

    Returns:
        None if the kernel read or wrote copies of q or out, or if a tensor cannot be handed over.
    """
    out, lse = results
    if not (rows_aligned(inputs.q) and rows_aligned(out) and inputs.softmax_scale > 0.0):
        return None
    given = (*inputs[:OUT], work, splits, out, lse, 1.0)
    kernel_arguments = (
        *((CONSTANT if source is None else GIVEN.index(source), tensor) for source, tensor in arguments),
        (GIVEN.index("work"), work),
        (GIVEN.index("splits"), splits),
        workspace_argument(call.workspace),
        *((GIVEN.index(name), value) for name, value in (("out", out), ("lse", lse), ("scale", 1.0))),
        *((CONSTANT, flag) for flag in call.flags),
    )
    replay = record_call(call.name, call.kernel, given, kernel_arguments)
    if replay is None:
        return None
    device = out.device.index

    def repeat(
        tensors: tuple[torch.Tensor | None, ...], scale: float, work: torch.Tensor, splits: torch.Tensor
    ) -> Results | None:
        if scale <= 0.0 or torch.cuda.current_device() != device:
            return None
        out = tensors[OUT]
        if out is None:
            out = torch.empty_like(call.out)
        lse = torch.empty_like(call.lse)
        try:
            done = replay(*tensors[:OUT], work, splits, out, lse, scale * LOG2_E)
        except REFUSALS:
            return None
        return (out, lse) if done else None

    return repeat
