"""What holds for the whole test run.

Every test draws its random inputs from a seed of its own, the same on every run; `--seed N` draws others, as does
Hypothesis then. How long one example takes says nothing on a shared machine. Where there is no GPU, Triton's kernels
run on CPU tensors in its interpreter, which Triton is told when it is first imported; so tests of Triton kernels put
their tensors on the GPU if there is one, and are the same tests for both.
"""

import importlib.util
import os
import random
import zlib

import pytest
import torch
from hypothesis import settings

# Compiles against tvm-ffi, which is there on Linux alone.
collect_ignore = ["repeated_calls"] if importlib.util.find_spec("tvm_ffi") is None else []

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# pytest's processes share the cores: with a thread a core for each of them they wait for one another.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="draw other random inputs than a run without it does")


def pytest_configure(config):
    # A thousand runs of the same tests should end alike: fresh inputs are for whoever asks for them.
    settings.register_profile("flash-mla", deadline=None, print_blob=True, derandomize=config.getoption("--seed") == 0)
    settings.load_profile("flash-mla")


@pytest.fixture(autouse=True)
def random_inputs(request):
    """What `random` and PyTorch draw depends on the test's name and --seed alone."""
    seed = zlib.crc32(f"{request.config.getoption('--seed')} {request.node.nodeid}".encode())
    random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(random.randrange(2**31))
