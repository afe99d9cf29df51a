"""What holds for the whole test run.

Hypothesis draws fresh examples on every run; how long one takes says nothing on a shared machine. Where there is no
GPU, Triton's kernels run on CPU tensors in its interpreter, which Triton is told when it is first imported; so tests
of Triton kernels put their tensors on the GPU if there is one, and are the same tests for both.
"""

import os

import torch
from hypothesis import settings

settings.register_profile("flash-mla", deadline=None, print_blob=True)
settings.load_profile("flash-mla")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
