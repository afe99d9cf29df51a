"""Mends Triton's interpreter when imported, so that on CPU tensors it computes what a GPU would.

The interpreter takes the bits of bfloat16 for integers in tl.dot and cuts digits off where the hardware rounds to
nearest. Up to Triton 3.6 its scalars are no indices with NumPy 2.4, and 3.2 stores past a mask whose only element is
False, which it takes for no mask.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

__all__: list[str] = []


def _exact_bfloat16():
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self, src, dst_type):
        to = dst_type.scalar
        if src.dtype.scalar == tl.bfloat16 and to == tl.float32:
            return TensorHandle((src.data.astype(np.uint32) << 16).view(np.float32), to)
        if src.dtype.scalar == tl.float32 and to == tl.bfloat16:
            bits = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16).numpy()
            return TensorHandle(bits.view(np.uint16), to)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, *rest):
        a, b = (cast_impl(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot


def _sound_conversions():
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()
        tensor.__bool__ = lambda self: self.type.is_block() or bool(self.handle.data)

    interpreter._patch_lang_tensor = patch_lang_tensor


_exact_bfloat16()
_sound_conversions()
