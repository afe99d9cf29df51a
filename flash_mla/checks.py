"""Every argument check of the public functions, and every error message.

A check names the argument, says what came and what is needed. Wrong kinds of objects and dtypes raise TypeError,
everything else ValueError. Checks read shapes, strides and dtypes alone, never a tensor's contents, so they cost
microseconds and never synchronise a device.
"""

from __future__ import annotations

import torch

__all__ = ["dtype_name", "positive_int", "real_number", "same_device", "tensor"]


def dtype_name(dtype: torch.dtype | tuple[torch.dtype, ...]) -> str:
    """'bfloat16' or 'bfloat16 or float16'."""
    if isinstance(dtype, torch.dtype):
        return str(dtype).removeprefix("torch.")
    return " or ".join(dtype_name(one) for one in dtype)


def tensor(
    name: str,
    value: object,
    dims: str,
    dtypes: torch.dtype | tuple[torch.dtype, ...],
    *,
    device: torch.device | None = None,
    **sizes: int,
) -> torch.Tensor:
    """Require a tensor of the named dimensions.

    `dims` names the dimensions in order ("b s_q h_q d"); `sizes` fixes the extents of some of them (`b=4`). The last
    dimension must be dense (stride 1). Returns the tensor, so that checkers narrow its type.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, need a torch.Tensor [{dims.replace(' ', ', ')}]")
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else dtypes
    if value.dtype not in allowed:
        raise TypeError(f"{name}: got dtype {dtype_name(value.dtype)}, need {dtype_name(allowed)}")
    names = dims.split()
    wrong = value.dim() != len(names) or any(
        dim in sizes and value.shape[i] != sizes[dim] for i, dim in enumerate(names)
    )
    if wrong:
        need = ", ".join(f"{dim}={sizes[dim]}" if dim in sizes else dim for dim in names)
        raise ValueError(f"{name}: got shape {list(value.shape)}, need [{need}]")
    if value.dim() and value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name}: got stride {value.stride(-1)} in the last dimension, need 1 (pass {name}.contiguous())"
        )
    if device is not None:
        same_device(name, value, device)
    return value


def same_device(name: str, value: torch.Tensor, device: torch.device) -> None:
    """Require `value` on `device`."""
    if value.device != device:
        raise ValueError(f"{name}: got a tensor on {value.device}, need it on {device} like q")


def positive_int(name: str, value: object) -> int:
    """Require an int >= 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, need an int")
    if value < 1:
        raise ValueError(f"{name}: got {value}, need at least 1")
    return value


def real_number(name: str, value: object) -> float:
    """Require a finite float or int."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, need a float")
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{name}: got {value}, need a finite number")
    return float(value)


def like_cache(name: str, value: torch.Tensor, cache: torch.Tensor) -> None:
    """Require `value` on the device of a KV cache."""
    if value.device != cache.device:
        raise ValueError(f"{name}: got a tensor on {value.device}, need it on {cache.device} like the cache")
