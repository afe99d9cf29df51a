"""Decode calls that repeat one before."""

import contextlib

import pytest
import torch

from flash_mla import flash_mla_with_kvcache, get_mla_metadata
from flash_mla.backends import hopper
from flash_mla.backends.hopper.launch import LOG2_E


def dense(**changed):
    arguments = {
        "q": torch.randn(4, 2, 16, 576).bfloat16(),
        "k_cache": torch.zeros(8, 64, 1, 576, dtype=torch.bfloat16),
        "block_table": torch.zeros(4, 2, dtype=torch.int32),
        "cache_seqlens": torch.zeros(4, dtype=torch.int32),
        "head_dim_v": 512,
        "softmax_scale": 0.5,
    }
    return arguments | changed


def sparse(**changed):
    arguments = dense(block_table=None, cache_seqlens=None, is_fp8_kvcache=True)
    arguments["k_cache"] = torch.zeros(8, 64, 1, 656, dtype=torch.uint8)
    arguments["indices"] = torch.zeros(4, 2, 100, dtype=torch.int32)
    return arguments | changed


def run(meta, arguments):
    out, lse = flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta)
    assert torch.equal(out, arguments["q"][..., :512] * 2)
    assert torch.equal(lse, torch.full((4, 16, 2), arguments["softmax_scale"] * LOG2_E))
    return out


MODES = pytest.mark.parametrize("make", [dense, sparse])


@MODES
def test_a_call_like_the_last_one_is_repeated_with_its_own_tensors(calls, make):
    meta, _ = get_mla_metadata()
    for scale in (0.5, 0.25, 2.0):
        run(meta, make(softmax_scale=scale))
    assert len(calls.checked) == 1
    assert len(calls.launched) == 3


@MODES
def test_a_cache_without_pages_gets_one_and_is_not_recorded(calls, make):
    arguments = make()
    empty = arguments | {"k_cache": arguments["k_cache"][:0]}
    meta, _ = get_mla_metadata()
    for _ in range(2):
        run(meta, empty)
    assert len(calls.checked) == 2
    assert all(arguments[1].shape[0] == 1 for arguments in calls.launched)


@MODES
def test_metadata_that_is_said_to_be_empty_is_planned_for_the_next_call(calls, make):
    arguments = make()
    half = {name: x[:2] if isinstance(x, torch.Tensor) and len(x) == 4 else x for name, x in arguments.items()}
    meta, _ = get_mla_metadata()
    run(meta, arguments)
    meta.have_initialized = False
    out, _ = flash_mla_with_kvcache(**half, tile_scheduler_metadata=meta)
    assert len(out) == 2
    assert meta.config.b == 2
    with pytest.raises(ValueError, match="planned for b=2, but this call has b=4"):
        run(meta, arguments)


@MODES
def test_memory_that_is_short_keeps_calls_from_being_recorded_alone(calls, make, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(hopper, "record", fail)
    meta, _ = get_mla_metadata()
    for _ in range(3):
        run(meta, make())
    assert len(calls.checked) == 3


@MODES
def test_out_may_be_given_or_not(calls, make):
    meta, _ = get_mla_metadata()
    for given in (False, True, True, False):
        out = torch.full((4, 2, 16, 512), torch.nan, dtype=torch.bfloat16) if given else None
        got = run(meta, make(out=out))
        assert not given or got is out
    assert len(calls.checked) == 1


@MODES
@pytest.mark.parametrize(
    "change",
    [
        {"q": torch.randn(4, 2, 16, 584).bfloat16()[..., :576]},
        {"q": torch.randn(4, 2, 16, 577).bfloat16()[..., 1:]},
        {"q": torch.randn(4 * 2 * 16 * 576 + 1).bfloat16()[1:].view(4, 2, 16, 576)},
        {"q": torch.randn(4, 2, 16, 576).bfloat16().requires_grad_()},
        {"out": torch.full((4, 2, 16, 520), torch.nan, dtype=torch.bfloat16)[..., :512]},
        {"out": torch.full((4, 2, 16, 513), torch.nan, dtype=torch.bfloat16)[..., :512]},
    ],
)
def test_other_layouts_are_served_too(calls, make, change):
    meta, _ = get_mla_metadata()
    for changed in ({}, change, change, {}, {}):
        run(meta, make(**changed))
    assert len(calls.launched) == 5


def test_copies_are_made_at_every_call(calls):
    """A kernel reads misaligned rows from a copy, which a record must not take for the call's own."""
    meta, _ = get_mla_metadata()
    for _ in range(3):
        run(meta, dense(q=torch.randn(4, 2, 16, 577).bfloat16()[..., 1:]))
    assert len(calls.checked) == 3


def test_a_cache_of_bytes_by_any_name_is_repeated(calls):
    meta, _ = get_mla_metadata()
    for dtype in (torch.uint8, torch.int8, torch.float8_e4m3fn):
        for _ in range(3):
            run(meta, sparse(k_cache=torch.zeros(8, 64, 1, 656, dtype=torch.uint8).view(dtype)))
    assert len(calls.checked) == 3


def test_each_scale_below_zero_is_checked(calls):
    meta, _ = get_mla_metadata()
    run(meta, dense())
    for _ in range(2):
        arguments = dense(softmax_scale=-0.5)
        out, lse = flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta)
        assert torch.equal(out, arguments["q"][..., :512] * -2), "q is negated for a kernel that wants a scale above 0"
        assert torch.equal(lse, torch.full((4, 16, 2), 0.5 * LOG2_E))


@MODES
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(4, 2, 16, 576)}, TypeError, "q: got dtype float32"),
        ({"q": [1.0]}, TypeError, "q: got list"),
        ({"q": torch.zeros(4, 2, 8, 576).bfloat16()}, ValueError, "planned for h_q=16, but this call has h_q=8"),
        ({"q": torch.zeros(4, 2, 16, 576, dtype=torch.bfloat16, device="meta")}, ValueError, "need it on meta"),
        ({"head_dim_v": 576}, ValueError, "head_dim_v: got 576"),
        ({"enable_batch_invariant": True}, ValueError, "planned for enable_batch_invariant=False"),
        ({"out": torch.zeros(4, 2, 16, 512)}, TypeError, "out: got dtype float32"),
        ({"out": "out"}, TypeError, "out: got str"),
    ],
)
def test_misuse_is_told_as_on_a_first_call(calls, make, change, error, message):
    meta, _ = get_mla_metadata()
    for _ in range(2):
        run(meta, make())
    with pytest.raises(error, match=message):
        flash_mla_with_kvcache(**make(**change), tile_scheduler_metadata=meta)
    run(meta, make())
    assert len(calls.launched) == 3


def test_a_tensor_that_changed_its_size_is_noticed(calls):
    meta, _ = get_mla_metadata()
    arguments = dense()
    for _ in range(2):
        run(meta, arguments)
    arguments["q"].set_(torch.zeros(4, 1, 16, 576, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="planned for s_q=2, but this call has s_q=1"):
        flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta)


def test_a_new_plan_is_followed(calls):
    meta, _ = get_mla_metadata()
    for _ in range(2):
        run(meta, dense())
    meta.tile_scheduler_metadata = None
    for _ in range(2):
        run(meta, dense())
    assert len(calls.checked) == 1
    plans = [addresses[4:6] for addresses in calls.addresses]
    assert plans[0] == plans[1] != plans[2] == plans[3]
    assert plans[3] == [meta.tile_scheduler_metadata.data_ptr(), meta.num_splits.data_ptr()]


@MODES
def test_fresh_metadata_is_planned_and_followed(calls, make):
    """Calls that look alike are repeated whatever their metadata, but each by its own plan."""
    metas = [get_mla_metadata()[0] for _ in range(3)]
    for _ in range(2):
        for meta in metas:
            run(meta, make())
    assert len(calls.checked) == 1
    plan = slice(4, 6) if make is dense else slice(8, 10)
    for meta, addresses in zip(metas * 2, calls.addresses, strict=True):
        assert addresses[plan] == [meta.tile_scheduler_metadata.data_ptr(), meta.num_splits.data_ptr()]
    assert len({meta.tile_scheduler_metadata.data_ptr() for meta in metas}) == 3
    assert metas[0].config == metas[1].config
    assert metas[0].config is not metas[1].config


@MODES
def test_metadata_of_another_configuration_refuses_a_call_that_was_served(calls, make):
    metas = [get_mla_metadata()[0] for _ in range(2)]
    other = make(q=torch.randn(4, 2, 32, 576).bfloat16())
    run(metas[0], make())
    flash_mla_with_kvcache(**other, tile_scheduler_metadata=metas[1])
    for meta, arguments in zip(metas, (other, make()), strict=True):
        with pytest.raises(ValueError, match="planned for h_q"):
            flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta)


def test_another_current_device_is_left_to_the_checked_call(calls, monkeypatch):
    meta, _ = get_mla_metadata()
    run(meta, dense())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    run(meta, dense())
    assert len(calls.checked) == 2
