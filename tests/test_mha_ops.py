"""Dense multi-head attention as an operator: what torch.compile, opcheck and autograd see of it."""

from __future__ import annotations

import pytest
import torch

from flash_mla import flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func


def inputs(s_q: int = 30, s_kv: int = 40) -> tuple[list[torch.Tensor], tuple[torch.Tensor, torch.Tensor, int, int]]:
    """q, k, v that require gradients, and two sequences' offsets and longest lengths."""
    tensors = [
        torch.randn(shape).bfloat16().requires_grad_() for shape in ((s_q, 4, 192), (s_kv, 2, 192), (s_kv, 2, 128))
    ]
    offsets = [torch.tensor([0, n // 3, n], dtype=torch.int32) for n in (s_q, s_kv)]
    return tensors, (*offsets, s_q, s_kv)


def gradients(function, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """out, lse and the gradients of a function of both."""
    out, lse = function(*tensors)
    loss = out.float().square().sum() + lse.clamp(min=-9).sum()
    return out, lse, *torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break_to_the_same_bits(dynamic):
    _, sequences = inputs()

    def attend(q, k, v):
        # Pointwise work around the call, which compilation may fuse and lay out anew.
        out, lse = flash_attn_varlen_func(q * 2, k, v + 1, *sequences, causal=True)
        return out - 1, lse * 2

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for _ in range(2):
        tensors, _ = inputs()
        for got, want in zip(gradients(compiled, *tensors), gradients(attend, *tensors), strict=True):
            assert torch.equal(got, want)


def test_packed_call_compiles():
    qkv = torch.randn(30, 2, 192 * 2 + 128).bfloat16().requires_grad_()
    offsets = torch.tensor([0, 10, 30], dtype=torch.int32)

    def attend(qkv):
        return flash_attn_varlen_qkvpacked_func(qkv, offsets, 20, 192)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled, qkv), gradients(attend, qkv), strict=True):
        assert torch.equal(got, want)


def test_misuse_in_compiled_code_is_told_as_elsewhere():
    (q, k, v), sequences = inputs()
    compiled = torch.compile(flash_attn_varlen_func, backend="aot_eager")
    with pytest.raises((ValueError, TypeError), match="k: got dtype float32"):
        compiled(q, k.float(), v, *sequences)


@pytest.mark.parametrize("causal", [False, True])
def test_operators_pass_opcheck(causal):
    (q, k, v), sequences = inputs()
    options = (0.1, causal, False)
    forward = torch.ops.flash_mla.mha_forward.default
    torch.library.opcheck(forward, (q, k, v, *sequences, *options))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = forward(q, k, v, *sequences, *options)
    for dlse in (None, torch.randn_like(lse)):
        torch.library.opcheck(
            torch.ops.flash_mla.mha_backward.default,
            (torch.randn_like(out), dlse, q, k, v, out, lse, *sequences, *options),
        )
