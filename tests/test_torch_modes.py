"""What a program has told PyTorch, autocast or defaults, changes no result; and tensors need not be real."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_mla import (
    KVCacheFormat,
    PagedKVCache,
    flash_attn_varlen_func,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
)

CPU = torch.device("cpu")


def normal(*shape):
    return (torch.randn(*shape, dtype=torch.float32, device=CPU) / 10).bfloat16()


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=CPU)


def dense():
    def call(q, k_cache, table, lengths):
        return flash_mla_with_kvcache(q, k_cache, table, lengths, 512, get_mla_metadata()[0], causal=True)

    return call, (normal(2, 2, 4, 576), normal(3, 16, 1, 576), ints([[0, 1], [2, 2]]), ints([20, 9]))


def sparse():
    def call(q, k_cache, indices):
        return flash_mla_with_kvcache(
            q, k_cache, None, None, 512, get_mla_metadata()[0], indices=indices, is_fp8_kvcache=True
        )

    cache = KVCacheFormat.FP8_V32.pack(normal(3, 16, 1, 576))
    return call, (normal(2, 1, 4, 576), cache, ints([[[3, 5, -1]], [[40, 3, 3]]]))


def prefill():
    def call(q, kv, indices):
        return flash_mla_sparse_fwd(q, kv, indices, 0.1)

    return call, (normal(2, 4, 576), normal(9, 1, 576), ints([[[0, 8, 9]], [[-1, 2, 2]]]))


def mha():
    def call(q, k, v, offsets):
        return flash_attn_varlen_func(q, k, v, offsets, offsets, 6, 6, causal=True)

    return call, (normal(9, 2, 192), normal(9, 2, 192), normal(9, 2, 128), ints([0, 3, 9]))


def mha_gradients():
    def call(q, k, v, offsets):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = flash_attn_varlen_func(*leaves, offsets, offsets, 6, 6, causal=True)
        return torch.autograd.grad((out, lse), leaves, (out.detach(), lse.detach()))

    return call, mha()[1]


MODES = pytest.mark.parametrize("make", [dense, sparse, prefill, mha, mha_gradients])


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@MODES
@pytest.mark.parametrize(
    "told",
    [
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.autocast("cpu", dtype=torch.float16),
        lambda: default_dtype(torch.bfloat16),
        lambda: default_dtype(torch.float64),
        lambda: torch.device("meta"),
    ],
    ids=["autocast to bf16", "autocast to fp16", "bf16 by default", "fp64 by default", "meta by default"],
)
def test_results_are_the_same(make, told):
    call, tensors = make()
    want = call(*tensors)
    with told():
        got = call(*tensors)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@MODES
def test_results_of_fake_tensors_are_fake(make):
    call, tensors = make()
    want = call(*tensors)
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(x) for x in tensors]
    with mode:
        got = call(*fakes)
    for one, other in zip(got, want, strict=True):
        assert type(one) is not torch.Tensor
        assert (one.shape, one.stride(), one.dtype, one.device) == (other.shape, other.stride(), other.dtype, CPU)
    for one, other in zip(call(*tensors), want, strict=True):
        assert torch.equal(one, other), "nothing fake was kept for later calls"


def test_a_default_device_moves_no_pages():
    with torch.device("meta"):
        pool = PagedKVCache(4, 2, device="cpu")
        pool.allocate("a")
        pool.append(["a"], normal(3, 576), [3])
        assert pool.slots("a", [0, 2]).tolist() == [0, 2]
        assert pool.block_table(["a"]).tolist() == [[0, 1]]
