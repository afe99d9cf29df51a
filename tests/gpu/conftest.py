"""GPU tests are collected everywhere. Those of Triton run from SM80 on; the others run on Hopper, with its kernels
compiled, so that none passes by what a slower backend gives."""

import functools

import pytest
import torch

from flash_mla import kernels
from flash_mla.backends.hopper.variants import VARIANTS


def is_of_triton(path):
    return path.name.startswith("test_triton_")


def pytest_collection_modifyitems(items):
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    for item in items:
        if "gpu" not in item.keywords:
            continue
        if is_of_triton(item.path):
            item.add_marker(pytest.mark.skipif(capability < (8, 0), reason="needs an SM80 GPU or a newer one"))
        else:
            item.add_marker(pytest.mark.skipif(capability != (9, 0), reason="needs a Hopper GPU"))


@functools.cache
def lacking_kernels():
    return [reason for name in VARIANTS if (reason := kernels.unavailable(name))]


@pytest.fixture(autouse=True)
def hopper_kernels(request):
    assert is_of_triton(request.path) or not lacking_kernels(), f"run `make kernels` first: {lacking_kernels()[0]}"
