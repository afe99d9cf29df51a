"""Which problems the Triton backend takes, and that nothing needs Triton before it does."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from flash_mla import backends
from flash_mla.backends import triton
from flash_mla.problem import SparsePrefillProblem


def problem(device: str) -> SparsePrefillProblem:
    return SparsePrefillProblem(torch.device(device), torch.bfloat16, 1, 1, 1, 576, 512, 1)


@pytest.fixture(autouse=True)
def fresh_answers():
    triton.why_not.cache_clear()
    triton._no_triton.cache_clear()
    yield
    triton.why_not.cache_clear()
    triton._no_triton.cache_clear()


def test_an_old_gpu_and_another_device_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert triton.why_not(problem("cuda:0")) == "cuda:0 is an sm_75 GPU, older than sm_80"
    assert triton.why_not(problem("meta")) == "the tensors are on meta, not on a CUDA device"


def test_without_triton_the_reason_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in (triton.why_not(problem("cuda:0")) or "")


def test_the_cpu_is_served_in_the_interpreter_alone_and_only_when_forced(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.choose(problem("cpu")).NAME == "cpu"
    monkeypatch.setenv("FLASH_MLA_BACKEND", "triton")
    assert backends.choose(problem("cpu")) is triton
    monkeypatch.delenv("TRITON_INTERPRET")
    triton.why_not.cache_clear()
    with pytest.raises(RuntimeError, match="triton: the tensors are on cpu, not on a CUDA device"):
        backends.choose(problem("cpu"))


@pytest.mark.parametrize(("version", "has_wgmma"), [("3.2.0", False), ("3.3.1", True), ("3.20.0", True)])
def test_triton_3_2_is_given_no_tiles_for_wgmma(monkeypatch, version, has_wgmma):
    launch = pytest.importorskip("flash_mla.backends.triton.launch")
    hopper = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: hopper)
    monkeypatch.setattr(launch.triton, "__version__", version)
    assert launch.gpu_of.__wrapped__(torch.device("cuda:0")).has_wgmma is has_wgmma
