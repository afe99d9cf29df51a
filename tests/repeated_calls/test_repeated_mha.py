"""Dense multi-head attention that repeats a call before, forward and backward."""

import pytest
import torch

from flash_mla import flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func
from flash_mla.backends import hopper
from flash_mla.backends.hopper.launch import LOG2_E


def mha(s_q=40, **changed):
    arguments = {
        "q": torch.randn(s_q, 4, 192).bfloat16(),
        "k": torch.randn(50, 2, 192).bfloat16(),
        "v": torch.randn(50, 2, 128).bfloat16(),
        "cu_seqlens_qo": torch.tensor([0, s_q], dtype=torch.int32),
        "cu_seqlens_kv": torch.tensor([0, 50], dtype=torch.int32),
        "max_seqlen_qo": s_q,
        "max_seqlen_kv": 50,
        "softmax_scale": 0.5,
    }
    return arguments | changed


def run_mha(arguments):
    out, lse = flash_attn_varlen_func(**arguments)
    assert torch.equal(out, arguments["q"][..., :128] * 2)
    assert torch.equal(lse, torch.full(out.shape[:2], arguments["softmax_scale"] * LOG2_E))
    assert lse.T.is_contiguous()
    return out, lse


def test_a_forward_like_an_earlier_one_is_repeated_with_its_own_tensors(calls):
    kept = [run_mha(mha(softmax_scale=scale)) for scale in (0.5, 0.25, 2, 3)]
    assert calls.checked == ["mha_forward"] * 2, "the second of a kind is recorded"
    assert len(calls.launched) == 4
    assert len({tensor.data_ptr() for results in kept for tensor in results}) == 8
    for _ in range(2):
        _, lse = flash_attn_varlen_func(**mha(softmax_scale=None))
        assert torch.equal(lse, torch.full((40, 4), 192**-0.5 * LOG2_E))
    assert len(calls.checked) == 2


def test_forwards_of_several_kinds_take_turns(calls):
    kinds = [{}, {"s_q": 41}, {"causal": True}, {"max_seqlen_kv": 60}, {"v": torch.randn(50, 3, 128).bfloat16()[:, :2]}]
    for _ in range(4):
        for kind in kinds:
            run_mha(mha(**kind))
    assert len(calls.checked) == 10
    assert [arguments[9] for arguments in calls.launched] == [0, 0, 1, 0, 0] * 4


def test_forwards_of_ever_new_sizes_are_not_recorded(calls, monkeypatch):
    monkeypatch.setattr(hopper, "record_mha_forward", lambda *_: pytest.fail("recorded"))
    for s_q in range(1, 20):
        run_mha(mha(s_q))


def test_memory_that_is_short_keeps_calls_from_being_recorded_alone(calls, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(hopper, "record_mha_forward", fail)
    for _ in range(4):
        run_mha(mha())
    assert len(calls.checked) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"q": torch.randn(40, 4, 193).bfloat16()[..., 1:]},
        {"k": torch.randn(50 * 2 * 192 + 1).bfloat16()[1:].view(50, 2, 192)},
        {"softmax_scale": torch.finfo(torch.float32).tiny},
        {"max_seqlen_qo": torch.tensor(40)},
    ],
    ids=["rows", "start", "scale", "length"],
)
def test_other_forwards_are_served_too(calls, change):
    for changed in ({}, {}, {}, change, change, change, {}, {}):
        run_mha(mha(**changed))
    assert len(calls.launched) == 8


def test_a_length_in_a_tensor_is_read_at_every_call(calls):
    length = torch.tensor(40)
    arguments = mha(max_seqlen_qo=length)
    for _ in range(4):
        run_mha(arguments)
    length.fill_(4)
    with pytest.raises(ValueError, match="max_seqlen_qo: got 4, need at least 40"):
        flash_attn_varlen_func(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(40, 4, 192)}, TypeError, "q: got dtype float32"),
        ({"q": [1.0]}, TypeError, "q: got list"),
        (
            {"k": torch.zeros(50, 3, 192).bfloat16(), "v": torch.zeros(50, 3, 128).bfloat16()},
            ValueError,
            "q: got h_q=4",
        ),
        ({"cu_seqlens_kv": torch.zeros(2)}, TypeError, "cu_seqlens_kv: got dtype float32"),
        ({"max_seqlen_qo": 39}, ValueError, "max_seqlen_qo: got 39"),
        ({"dropout_p": 0.5}, ValueError, "dropout"),
        ({"softmax_scale": "1"}, TypeError, "softmax_scale: got str"),
    ],
)
def test_misuse_of_a_forward_is_told_as_on_a_first_call(calls, change, error, message):
    for _ in range(3):
        run_mha(mha())
    with pytest.raises(error, match=message):
        flash_attn_varlen_func(**mha(**change))
    run_mha(mha())
    assert len(calls.checked) == 2


def with_gradients(dlse=None, dout=None, **changed):
    """The gradients of a call, which must be what the stand-in makes of it."""
    arguments = mha(**changed)
    leaves = [arguments[name].requires_grad_() for name in ("q", "k", "v")]
    out, lse = run_mha(arguments)
    results, given = [out], [torch.randn_like(out) if dout is None else dout]
    if dlse is not None:
        results, given = [out, lse], [*given, torch.full_like(lse, dlse)]
    dq, dk, dv = torch.autograd.grad(results, leaves, given, retain_graph=True)
    assert torch.equal(dq, leaves[0] * 3)
    assert torch.equal(dk, (leaves[1] + (dlse or 0.0)).bfloat16())
    assert torch.equal(dv, torch.full_like(dv, arguments["softmax_scale"]))
    assert all(x.is_contiguous() for x in (dq, dk, dv))
    return results, leaves


def test_gradients_are_repeated_too(calls):
    for scale in (0.5, 0.25, 1.0, 2.0, 3.0, 4.0):
        with_gradients(softmax_scale=scale)
    assert calls.checked == [*["mha_forward", "mha_backward"] * 2, *["mha_backward"] * 2], "of two repeated forwards"
    assert len(calls.launched) == 12


def test_gradients_of_lse_and_of_expanded_sums(calls):
    ones = torch.ones((), dtype=torch.bfloat16).expand(40, 4, 128)
    kinds = ((None, None), (2.0, None), (None, ones))
    for dlse, dout in (*kinds, *kinds, *kinds[::-1], *(kind for kind in kinds for _ in range(3))):
        with_gradients(dlse, dout)
    assert len(calls.launched) == 36


def test_gradients_of_lse_alone(calls):
    for _ in range(6):
        arguments = mha()
        k = arguments["k"].requires_grad_()
        _, lse = flash_attn_varlen_func(**arguments)
        (dk,) = torch.autograd.grad(lse, k, torch.full_like(lse, 3.0))
        assert torch.equal(dk, k + 3)


def test_second_derivatives_of_a_repeated_call_are_refused(calls):
    for _ in range(6):
        results, leaves = with_gradients()
        (dq, *_) = torch.autograd.grad(results[0].float().square().sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dq.sum().backward()


def test_packed_tensors_are_repeated(calls):
    offsets = torch.tensor([0, 30], dtype=torch.int32)
    for _ in range(6):
        qkv = torch.randn(30, 4, 512).bfloat16().requires_grad_()
        out, _ = flash_attn_varlen_qkvpacked_func(qkv, offsets, 30, 192, softmax_scale=0.5)
        (gradient,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
        q, k, _ = qkv.split([192, 192, 128], -1)
        assert torch.equal(gradient, torch.cat([q * 3, k, torch.full_like(out, 0.5)], -1))
    assert calls.checked.count("mha_forward") == 2
    assert calls.checked.count("mha_backward") == 4


def test_deterministic_gradients_are_not_repeated(calls, monkeypatch):
    seen = []
    monkeypatch.setattr(hopper, "mha_backward", lambda problem, *inputs: seen.append(problem) or inputs[2:5])
    for _ in range(6):
        arguments = mha(deterministic=True)
        q = arguments["q"].requires_grad_()
        out, _ = flash_attn_varlen_func(**arguments)
        torch.autograd.grad(out, q, torch.ones_like(out))
    assert [problem.deterministic for problem in seen] == [True] * 6


def test_transforms_of_functions_are_not_repeated(calls):
    arguments = mha()
    q = arguments.pop("q")
    for _ in range(3):
        run_mha(arguments | {"q": q})
    dq = torch.func.grad(lambda q: flash_attn_varlen_func(q=q, **arguments)[0].float().sum())(q)
    assert torch.equal(dq, q * 3)

    for captured in (q, q.clone().requires_grad_()):
        arguments["q"] = captured
        dx = torch.func.grad(lambda x: (flash_attn_varlen_func(**arguments)[0].float() * x).sum())(torch.ones(()))
        assert torch.equal(dx, (q[..., :128] * 2).float().sum())
