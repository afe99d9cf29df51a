"""Which launches go to Triton, and which straight to the kernel that an earlier one compiled."""

import pytest
import torch

pytest.importorskip("triton")

from flash_mla.backends.triton import specialised

TENSOR = torch.zeros(64)


class Compiled:
    def __init__(self, calls):
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *arguments: self.calls.append((grid, arguments))


class Kernel:
    """What @triton.jit returns, as far as launches know it."""

    arg_names = ("x_ptr", "y_ptr", "n", "scale", "TILE", "CAUSAL")

    def __init__(self, *, interpreted=False):
        self.compilations, self.calls = [], []
        self.interpreted = interpreted

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.compilations.append((grid, arguments, constants))
            return None if self.interpreted else Compiled(self.calls)

        return run


def launch(kernel, *, x=TENSOR, y=None, n=48, scale=0.5, tile=32, num_warps=4):
    constants = {"CAUSAL": True, "TILE": tile}
    specialised.launch(kernel, 7, (x, y, n, scale), constants, num_warps=num_warps, num_stages=2)


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(specialised, "_compiled", {})


@pytest.mark.parametrize("hands_over", [True, False])
def test_the_second_launch_is_not_tritons(monkeypatch, hands_over):
    monkeypatch.setattr(specialised, "_HANDS_OVER_CONSTANTS", hands_over)
    kernel, other = Kernel(), torch.ones(64)
    launch(kernel)
    launch(kernel, x=other, n=96, scale=0.25)
    ((grid, arguments, constants),) = kernel.compilations
    assert (grid, arguments) == ((7,), (TENSOR, None, 48, 0.5))
    assert constants.items() >= {"TILE": 32, "CAUSAL": True, "num_warps": 4, "num_stages": 2}.items()
    ((grid, (x, *rest)),) = kernel.calls
    assert grid == (7, 1, 1)
    assert x is other
    assert rest == [None, 96, 0.25, *([32, True] if hands_over else [])]


@pytest.mark.parametrize(
    "change",
    [
        {"x": TENSOR.half()},
        {"x": TENSOR[1:]},
        {"y": TENSOR},
        {"n": 1},
        {"n": 49},
        {"n": 48 << 40},
        {"tile": 64},
        {"num_warps": 8},
    ],
    ids=str,
)
def test_what_triton_builds_into_a_kernel_has_another_compiled(change):
    kernel = Kernel()
    launch(kernel)
    launch(kernel, **change)
    assert (len(kernel.compilations), len(kernel.calls)) == (2, 0)
    launch(kernel, **change)
    assert (len(kernel.compilations), len(kernel.calls)) == (2, 1)


def test_kernels_do_not_share():
    first, second = Kernel(), Kernel()
    launch(first)
    launch(second)
    assert (len(first.compilations), len(second.compilations)) == (1, 1)


def test_the_interpreter_compiles_nothing():
    kernel = Kernel(interpreted=True)
    launch(kernel)
    launch(kernel)
    assert (len(kernel.compilations), len(kernel.calls)) == (2, 0)
