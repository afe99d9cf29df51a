"""Decode as an operator: what torch.compile and opcheck see of it, and what becomes of the schedule."""

from __future__ import annotations

import random
import re

import pytest
import torch
from compilation import BACKENDS, compiled
from helpers import dense_inputs, poisoned_out, randn, sparse_scope
from test_decode import call, sparse_args
from test_decode_misuse import DENSE_MISUSE, SPARSE_MISUSE, both_args, dense_args
from torch._dynamo.testing import CompileCounterWithBackend

from flash_mla import FlashMLASchedMeta, KVCacheFormat, flash_mla_with_kvcache, get_mla_metadata
from flash_mla.backends import cpu

F = KVCacheFormat


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(random.randrange(2**32))


def dense(seqlens: tuple[int, ...] = (70, 5), kv_format: KVCacheFormat = F.BF16, **more) -> dict:
    args = dense_inputs(generator(), kv_format, list(seqlens), s_q=2, **more)
    return args | {"is_fp8_kvcache": kv_format.is_quantised}


def sparse() -> dict:
    gen = generator()
    return sparse_args(randn(gen, 2, 2, 4, 576), sparse_scope(gen, F.BF16, 2, 2, 30))


def sparse_with_everything() -> dict:
    gen = generator()
    scope = sparse_scope(gen, F.FP8_V41, 2, 2, 9, d=512, lengths=random.choices(range(10), k=2))
    extra = sparse_scope(gen, F.FP4_V41, 2, 2, 7, d=512, page_size=2, lengths=random.choices(range(8), k=2))
    return sparse_args(randn(gen, 2, 2, 4, 512), scope, extra) | {"attn_sink": torch.randn(4)}


def fp8() -> dict:
    return dense(kv_format=F.FP8_V32)


MODES = [dense, fp8, sparse, sparse_with_everything]


def step(q: torch.Tensor, args: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode with a schedule of its own between pointwise work, which compilation may fuse and lay out anew."""
    out, lse = call({**args, "q": q * 2})
    return out - 1, lse * 2


def assert_same_bits(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.fixture
def plans(monkeypatch) -> list[list[int]]:
    """The lengths of every dense call that was planned from now on."""
    lengths = []
    plan_decode = cpu.plan_decode

    def noted(problem, inputs):
        lengths.append(inputs.cache_seqlens.tolist())
        return plan_decode(problem, inputs)

    monkeypatch.setattr(cpu, "plan_decode", noted)
    return lengths


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("make", MODES)
def test_compiles_without_a_graph_break_to_the_same_bits(backend, dynamic, make):
    function = compiled(step, backend, dynamic=dynamic)
    for _ in range(2):
        args = make()
        q = args.pop("q")
        assert_same_bits(function(q, args), step(q, args))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_code_writes_into_out(backend, strided, dynamic):
    function = compiled(call, backend, dynamic=dynamic)
    args = dense()
    out = poisoned_out(2, 2, 4, 512, dtype=torch.bfloat16, strided=strided)
    around = out._base.clone() if strided else out
    got = function(args, out=out, softmax_scale=0.1, causal=True)
    assert got[0] is out
    assert_same_bits(got, call(args, softmax_scale=0.1, causal=True))
    if strided:
        around[1:, 1:, 1:, 8:] = out
        assert torch.equal(out._base.view(torch.int16), around.view(torch.int16))


def test_one_dynamic_graph_serves_all_sizes():
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(step, counter, dynamic=True)
    frames = []
    # In the first call all dimensions differ, as compilation takes equal ones for the same.
    for seqlens in ((270, 5, 64), (9, 200), (65, 64, 63, 1, 128)):
        args = dense(seqlens)
        q = args.pop("q")
        assert_same_bits(function(q, args), step(q, args))
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3


def test_empty_metadata_stays_empty_and_every_run_plans(plans):
    meta, _ = get_mla_metadata()
    function = compiled(call)
    args = dense((70, 5))
    for seqlens in ([70, 5], [1, 0], [64, 3]):
        args["cache_seqlens"] = torch.tensor(seqlens, dtype=torch.int32)
        got = function(args, tile_scheduler_metadata=meta)
        assert plans.pop() == seqlens
        assert plans == []
        assert meta == FlashMLASchedMeta()
        assert_same_bits(got, call(args))
        plans.clear()


def test_metadata_that_is_said_to_be_empty_is_in_compiled_code(plans):
    args, more = dense((70, 5)), dense((70, 5, 9))
    meta, _ = get_mla_metadata()
    call(args, tile_scheduler_metadata=meta)
    meta.have_initialized = False
    plans.clear()
    assert_same_bits(compiled(call, "aot_eager")(more, tile_scheduler_metadata=meta), call(more))
    assert len(plans) == 2, "each call plans"


def test_compiled_code_refuses_the_plan_of_another_backend():
    args = dense()
    meta, _ = get_mla_metadata()
    call(args, tile_scheduler_metadata=meta)
    meta._planned_by = "hopper"
    with pytest.raises(ValueError, match="planned by the backend hopper, but cpu serves this call"):
        compiled(call, "aot_eager")(args, tile_scheduler_metadata=meta)


def test_compiled_code_follows_a_plan_made_before(monkeypatch, plans):
    """Also the plans of later steps, without compiling again."""
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(call, counter)
    followed = []
    decode = cpu.decode
    monkeypatch.setattr(cpu, "decode", lambda *args: (followed.append(args[2:]), decode(*args))[1])
    frames = []
    for seqlens in ((70, 5), (64, 128)):
        args = dense(seqlens)
        meta, _ = get_mla_metadata()
        want = call(args, tile_scheduler_metadata=meta)
        plan = meta.tile_scheduler_metadata, meta.num_splits
        plans.clear()
        followed.clear()
        assert_same_bits(function(args, tile_scheduler_metadata=meta), want)
        assert plans == []
        assert_same_bits(followed[0], plan)
        assert (meta.tile_scheduler_metadata, meta.num_splits) == plan
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 2


def test_metadata_whose_plan_was_dropped_plans_in_each_run(plans):
    meta, _ = get_mla_metadata()
    args = dense()
    want = call(args, tile_scheduler_metadata=meta)
    meta.num_splits = None
    function = compiled(call)
    plans.clear()
    for _ in range(2):
        assert_same_bits(function(args, tile_scheduler_metadata=meta), want)
    assert plans == [[70, 5]] * 2


def test_metadata_of_another_configuration_is_refused_in_compiled_code():
    meta, _ = get_mla_metadata()
    call(dense(), tile_scheduler_metadata=meta)
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="planned for causal=False, but this call has causal=True"):
        torch.compile(call, backend="eager")(dense(), tile_scheduler_metadata=meta, causal=True)


def test_layers_in_one_graph_share_metadata():
    def model(q, args):
        meta, none = get_mla_metadata()
        for _ in range(3):
            out, lse = flash_mla_with_kvcache(
                q, **args, head_dim_v=512, tile_scheduler_metadata=meta, num_splits=none, enable_batch_invariant=True
            )
            q = torch.nn.functional.pad(out, (0, 64))
        return out, lse

    args = dense()
    q = args.pop("q")
    assert_same_bits(compiled(model)(q, args), model(q, args))


@pytest.mark.parametrize(("b", "s_q"), [(0, 1), (2, 0)])
def test_batches_without_query_tokens_compile(b, s_q):
    out, lse = compiled(call)(dense_inputs(generator(), F.BF16, [3] * b, s_q=s_q))
    assert out.shape == (b, s_q, 4, 512)
    assert lse.shape == (b, 4, s_q)


@pytest.mark.parametrize("backend", ["eager", *BACKENDS])
def test_compiled_code_records_no_gradients(backend):
    args = dense()
    q = args.pop("q").requires_grad_()
    got = compiled(step, backend)(q, args)
    assert not any(result.requires_grad for result in got)
    assert_same_bits(got, step(q.detach(), args))


MISUSE = [(dense_args, *row) for row in DENSE_MISUSE[::5]] + [(both_args, *row) for row in SPARSE_MISUSE[::5]]


@pytest.mark.parametrize(("make", "change", "error", "message"), MISUSE)
def test_misuse_in_compiled_code_is_told_as_elsewhere(make, change, error, message):
    torch._dynamo.reset()
    args = make()
    with pytest.raises(error, match=re.escape(message)):
        torch.compile(call, backend="eager")(args | change(args))


def test_wild_lengths_in_compiled_code_leave_out_untouched():
    args = dense()
    out = poisoned_out(2, 2, 4, 512, dtype=torch.bfloat16, strided=False)
    function = compiled(call)
    with pytest.raises(ValueError, match="cache_seqlens: got 1070 for request 0"):
        function(args | {"cache_seqlens": args["cache_seqlens"] + 1000}, out=out)
    assert out.isnan().all()


@pytest.mark.parametrize("make", MODES)
@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_operator_passes_opcheck(make, planned, strided):
    args = {"block_table": None, "cache_seqlens": None, **make()}
    is_fp8 = args["is_fp8_kvcache"]
    if is_fp8:  # opcheck cannot compare float8 tensors
        args |= {name: args[name].view(torch.uint8) for name in ("k_cache", "extra_k_cache") if name in args}
    meta = FlashMLASchedMeta()
    if planned:
        call(args, tile_scheduler_metadata=meta)
    args["q"].requires_grad_()
    tensors = [
        args.get(name)
        for name in (
            "q", "k_cache", "block_table", "cache_seqlens", "indices", "attn_sink", "extra_k_cache",
            "extra_indices_in_kvcache", "topk_length", "extra_topk_length",
        )
    ]  # fmt: skip
    out = poisoned_out(2, 2, 4, 512, dtype=torch.bfloat16, strided=strided)
    plan = meta.tile_scheduler_metadata, meta.num_splits, "cpu" if planned else None
    torch.library.opcheck(
        torch.ops.flash_mla.decode.default,
        (*tensors, out, 0.1, 512, False, is_fp8, False, *plan),
    )
