"""Where tests of Triton kernels put their tensors: on the GPU, or without one on the CPU, for Triton's interpreter."""

import torch

__all__ = ["DEVICE"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    import flash_mla.backends.triton.interpreter  # noqa: F401
