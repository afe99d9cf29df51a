"""Ahead-of-time compilation of a CuTe DSL kernel: descriptions of its arguments, no tensors and no GPU."""

from __future__ import annotations

from typing import Any

import cutlass.cute as cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

Compiled = Any  # cutlass's JIT function, which its package does not type


def compact(dtype: Any, shape: tuple, align: int | None = None) -> Any:
    """A row-major tensor argument; extents are ints or `cute.sym_int()`."""
    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align or dtype.width // 8)


def strided(dtype: Any, shape: tuple, *, dense_last: bool = False, align: int | None = None) -> Any:
    """A tensor argument of any strides; with `dense_last` the last is 1 and the others keep rows `align`ed."""
    align = align or dtype.width // 8
    divisor = align * 8 // dtype.width
    strides: tuple = tuple(cute.sym_int64(divisibility=divisor) for _ in shape)
    if dense_last:
        strides = (*strides[:-1], 1)
    return make_fake_tensor(dtype, shape, strides, assumed_align=align)


def compile_kernel(kernel: Any, *arguments: Any) -> Compiled:
    """Compile the launcher `kernel` for the described arguments and torch's current stream."""
    return cute.compile(kernel, *arguments, make_fake_stream(use_tvm_ffi_env_stream=True), options="--enable-tvm-ffi")
