"""Sparse prefills that repeat one before."""

import contextlib

import pytest
import torch

from flash_mla import flash_mla_sparse_fwd
from flash_mla.backends.hopper.launch import LOG2_E


def prefill(**changed):
    arguments = {
        "q": torch.randn(3, 16, 576).bfloat16(),
        "kv": torch.randn(40, 1, 576).bfloat16(),
        "indices": torch.randint(40, (3, 1, 100), dtype=torch.int32),
        "sm_scale": 0.5,
    }
    return arguments | changed


def run_prefill(arguments):
    out, max_logits, lse = flash_mla_sparse_fwd(**arguments)
    rows = arguments["kv"][arguments["indices"][:, :, 0].long(), 0, :512]
    assert torch.equal(out, arguments["q"][..., :512] * 2 + rows)
    assert torch.equal(max_logits, torch.full((3, 16), arguments["sm_scale"] * LOG2_E))
    lengths = arguments.get("topk_length", torch.full((3,), 100, dtype=torch.int32))
    assert torch.equal(lse, lengths[:, None] + arguments.get("attn_sink", torch.full((16,), -torch.inf)))
    return out


@pytest.mark.parametrize("optional", [(), ("attn_sink",), ("topk_length",), ("attn_sink", "topk_length")])
def test_a_prefill_like_an_earlier_one_is_repeated_with_its_own_tensors(calls, optional):
    for scale in (0.5, 0.25, 2):
        more = {"attn_sink": torch.randn(16), "topk_length": torch.randint(101, (3,), dtype=torch.int32)}
        run_prefill(prefill(sm_scale=scale, **{name: more[name] for name in optional}))
    assert len(calls.checked) == 1
    assert len(calls.launched) == 3


def test_a_list_of_tokens_is_made_where_a_repeated_prefill_has_lengths(calls):
    q, indices = torch.randn(140, 16, 576).bfloat16(), torch.randint(40, (140, 1, 600), dtype=torch.int32)
    for lengths in (None, 300, None, 200, 100):
        more = {} if lengths is None else {"topk_length": torch.full((140,), lengths, dtype=torch.int32)}
        _, _, lse = flash_mla_sparse_fwd(**prefill(q=q, indices=indices, **more))
        assert torch.equal(lse, torch.full((140, 16), -torch.inf))
        workspace, *numbers = calls.launched[-1][8], *calls.launched[-1][11:]
        assert numbers[4:] == ([0, 1, 0] if lengths is None else [10, 132, 0])
        assert workspace.shape[0] % (64 * 514) == (0 if lengths is None else 280)
    assert len(calls.checked) == 2


def test_prefills_of_several_shapes_take_turns(calls):
    kinds = [{}, {"kv": torch.randn(41, 1, 576).bfloat16()}, {"attn_sink": torch.randn(16)}]
    for _ in range(3):
        for kind in kinds:
            run_prefill(prefill(**kind))
    assert len(calls.checked) == 3
    assert len(calls.launched) == 9


def test_out_of_a_prefill_may_be_given_or_not(calls):
    for given in (False, True, True, False):
        out = torch.full((3, 16, 512), torch.nan, dtype=torch.bfloat16) if given else None
        got = run_prefill(prefill(out=out))
        assert not given or got is out
    assert len(calls.checked) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"q": torch.randn(3, 16, 584).bfloat16()[..., :576]},
        {"q": torch.randn(3, 16, 577).bfloat16()[..., 1:]},
        {"q": torch.randn(3 * 16 * 576 + 1).bfloat16()[1:].view(3, 16, 576)},
        {"q": torch.randn(3, 16, 576).half(), "kv": torch.randn(40, 1, 576).half()},
        {"kv": torch.randn(40, 2, 576).bfloat16()[:, :1]},
        {"kv": torch.randn(40, 1, 577).bfloat16()[..., 1:]},
        {"indices": torch.randint(40, (3, 1, 101), dtype=torch.int32)[..., 1:]},
    ],
)
def test_other_layouts_of_a_prefill_are_served_too(calls, change):
    for changed in ({}, change, change, {}, {}):
        run_prefill(prefill(**changed))
    assert len(calls.launched) == 5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(3, 16, 576)}, TypeError, "q: got dtype float32"),
        ({"q": [1.0]}, TypeError, "q: got list"),
        ({"kv": None}, TypeError, "kv: got NoneType"),
        ({"kv": torch.zeros(40, 1, 576, dtype=torch.bfloat16, device="meta")}, ValueError, "kv: got a tensor on meta"),
        ({"indices": torch.zeros(3, 1, 100)}, TypeError, "indices: got dtype float32"),
        ({"attn_sink": torch.zeros(15)}, ValueError, "attn_sink: got shape"),
        ({"d_v": 576}, ValueError, "d_v: got 576"),
        ({"sm_scale": "1"}, TypeError, "sm_scale: got str"),
        ({"out": torch.zeros(3, 16, 512)}, TypeError, "out: got dtype float32"),
        ({"out": torch.zeros(1, 16, 512).bfloat16().expand(3, -1, -1)}, ValueError, "out: got strides"),
        ({"out": "out"}, TypeError, "out: got str"),
    ],
)
def test_misuse_of_a_prefill_is_told_as_on_a_first_call(calls, change, error, message):
    for _ in range(2):
        run_prefill(prefill())
    with pytest.raises(error, match=message):
        flash_mla_sparse_fwd(**prefill(**change))
    run_prefill(prefill())
    assert len(calls.launched) == 3


def test_a_scale_below_zero_is_checked_at_every_prefill(calls):
    run_prefill(prefill())
    for _ in range(2):
        arguments = prefill(sm_scale=-0.5)
        _, max_logits, _ = flash_mla_sparse_fwd(**arguments)
        assert torch.equal(max_logits, torch.full((3, 16), 0.5 * LOG2_E)), "q is negated, so that the scale is above 0"
    assert len(calls.checked) == 3


def test_a_prefill_on_another_current_device_is_checked(calls, monkeypatch):
    run_prefill(prefill())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    run_prefill(prefill())
    assert len(calls.checked) == 2


def test_another_forced_backend_is_heeded(calls, monkeypatch):
    run_prefill(prefill())
    monkeypatch.setenv("FLASH_MLA_BACKEND", "hopper")
    run_prefill(prefill())
    assert len(calls.checked) == 2
