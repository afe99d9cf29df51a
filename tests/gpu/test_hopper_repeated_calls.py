"""Calls that repeat one before on Hopper: the same results at less host time, and never for another call."""

import pytest
import torch
from test_hopper_dense_decode import case as dense_case
from test_hopper_sparse_decode import case as sparse_case
from test_hopper_sparse_prefill import case as prefill_case

from flash_mla import KVCacheFormat, flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata, sparse_prefill
from flash_mla.backends import hopper

pytestmark = pytest.mark.gpu

LENGTHS = [700, 0, 64, 1]


def dense(seed=0, h_q=64):
    torch.manual_seed(seed)
    q, k_cache, table, lengths = dense_case(4, 2, h_q, 1, LENGTHS)
    return {"q": q, "k_cache": k_cache, "block_table": table, "cache_seqlens": lengths, "head_dim_v": 512}


def sparse(seed=0, h_q=64):
    return sparse_case(4, 2, h_q, 200, seed=seed)


def sparse_with_everything(seed=0, h_q=64):
    return sparse_case(
        4, 2, h_q, 200, kv_format=KVCacheFormat.FP8_V4, lengths=[200, 64, 0, 1], extra_topk=65,
        extra_lengths=[1, 65, 9, 3], extra_page_size=2, strided=True, seed=seed,
    )  # fmt: skip


MODES = pytest.mark.parametrize("make", [dense, sparse, sparse_with_everything])


def fresh(arguments, **options):
    return flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=get_mla_metadata()[0], **options)


def assert_same(got, want):
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def checked(monkeypatch):
    """The arguments of every call that was not repeated from a record."""
    log = []
    decode = hopper.decode

    def noted(*arguments):
        log.append(arguments)
        return decode(*arguments)

    monkeypatch.setattr(hopper, "decode", noted)
    return log


@MODES
def test_calls_of_one_layout_are_repeated(make, checked):
    meta, _ = get_mla_metadata()
    for seed in range(3):
        arguments = make(seed)
        got = flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta, softmax_scale=0.1 + seed)
        assert len(checked) == 1
        assert_same(got, fresh(arguments, softmax_scale=0.1 + seed))
        checked.pop()


@MODES
def test_results_are_tensors_of_their_own(make, checked):
    arguments = make()
    meta, _ = get_mla_metadata()
    results = [flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta) for _ in range(3)]
    assert len(checked) == 1
    assert len({tensor.data_ptr() for pair in results for tensor in pair}) == 6
    for got in results:
        assert_same(got, results[0])
        assert all(tensor.is_contiguous() for tensor in got)


@MODES
def test_out_is_written_in_place(make, checked):
    arguments = make()
    want = fresh(arguments)
    meta, _ = get_mla_metadata()
    for strided in (False, False, True, True, False):
        room = torch.full((4, 2, 65, 576 if strided else 512), torch.nan, dtype=torch.bfloat16, device="cuda")
        out = room[:, :, 1:, :512] if strided else room[:, :, 1:].contiguous()
        got = flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta, out=out)
        assert got[0] is out
        assert_same(got, want)
        assert room[:, :, 0].isnan().all()


def changes(arguments):
    """(what changes, arguments of which one differs)."""
    apart = torch.empty(4, 3, 64, arguments["q"].shape[-1], dtype=torch.bfloat16, device="cuda")[:, :2]
    yield "strides", {"q": apart.copy_(arguments["q"])}
    odd = torch.empty(arguments["q"].numel() + 1, dtype=torch.bfloat16, device="cuda")[1:].view_as(arguments["q"])
    yield "alignment", {"q": odd.copy_(arguments["q"])}
    rows = torch.empty(*arguments["q"].shape[:-1], arguments["q"].shape[-1] + 1, dtype=torch.bfloat16, device="cuda")
    yield "alignment of rows", {"q": rows[..., 1:].copy_(arguments["q"])}
    yield "sign of the scale", {"softmax_scale": -0.25}
    yield "a scale of zero", {"softmax_scale": 0}
    cache = arguments["k_cache"]
    pages = torch.empty(cache.shape[0] + 3, *cache.shape[1:], dtype=cache.dtype, device="cuda")
    if cache.dtype == torch.bfloat16:
        pages[: len(cache)] = cache
        yield "pages", {"k_cache": pages}
        table = arguments["block_table"]
        yield "width of the table", {"block_table": torch.cat([table, table], 1)}
        yield "stride of the lengths", {"cache_seqlens": arguments["cache_seqlens"].clone()}
    else:
        yield "class of the bytes", {"k_cache": cache.view(torch.int8)}
        yield "class of the bytes", {"k_cache": cache.view(torch.float8_e4m3fn)}
        yield "a sink", {"attn_sink": torch.zeros_like(arguments["attn_sink"])}
        yield "no sink", {"attn_sink": None}


@MODES
def test_calls_that_look_different_are_not_repeated(make):
    arguments = make()
    meta, _ = get_mla_metadata()
    want = fresh(arguments)
    for what, change in changes(arguments):
        for _ in range(2):
            assert_same(flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta), want)
        for _ in range(2):
            got = flash_mla_with_kvcache(**(arguments | change), tile_scheduler_metadata=meta)
            assert_same(got, fresh(arguments | change)), what


@MODES
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: {"q": a["q"].half()}, (TypeError, ValueError), "float16"),
        (lambda a: {"q": a["q"].cpu()}, ValueError, "k_cache: got a tensor on cuda:0, need it on cpu"),
        (lambda a: {"q": a["q"].tolist()}, TypeError, "q: got list"),
        (lambda a: {"k_cache": a["k_cache"].to("meta")}, ValueError, "k_cache: got a tensor on meta"),
        (lambda a: {"q": a["q"][:3]}, ValueError, "b=3"),
        (lambda a: {"q": a["q"][:, :, :32]}, ValueError, "h_q=32"),
        (lambda a: {"head_dim_v": 576}, ValueError, "head_dim_v: got 576"),
        (lambda a: {"enable_batch_invariant": True}, ValueError, "planned for enable_batch_invariant=False"),
        (lambda a: {"out": torch.empty(4, 2, 64, 512, device="cuda")}, TypeError, "out: got dtype float32"),
    ],
)
def test_misuse_is_told_as_on_a_first_call(make, change, error, message):
    arguments = make()
    meta, _ = get_mla_metadata()
    for _ in range(2):
        want = flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta)
    with pytest.raises(error, match=message):
        flash_mla_with_kvcache(**(arguments | change(arguments)), tile_scheduler_metadata=meta)
    assert_same(flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta), want)


def test_a_tensor_that_changed_its_size_is_noticed():
    arguments = dense()
    meta, _ = get_mla_metadata()
    for _ in range(2):
        flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta)
    arguments["q"].set_(torch.zeros(4, 1, 64, 576, dtype=torch.bfloat16, device="cuda"))
    with pytest.raises(ValueError, match="planned for s_q=2, but this call has s_q=1"):
        flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta)


def test_a_new_plan_is_followed():
    arguments = dense()
    meta, _ = get_mla_metadata()
    for _ in range(2):
        flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta)
    arguments["cache_seqlens"] = torch.tensor([1, 300, 0, 64], dtype=torch.int32, device="cuda")
    arguments["block_table"] = arguments["block_table"].roll(1, 0)
    arguments["k_cache"].nan_to_num_()
    meta.tile_scheduler_metadata = None
    for _ in range(2):
        got = flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta)
        assert_same(got, fresh(arguments))


@MODES
def test_streams_do_not_disturb_each_other(make):
    arguments = make()
    meta, _ = get_mla_metadata()
    want = [flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta) for _ in range(2)][1]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for turn in range(30):
        with torch.cuda.stream(streams[turn % 3]):
            results.append(flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta))
    torch.cuda.synchronize()
    for got in results:
        assert_same(got, want)


@MODES
def test_repeated_calls_are_captured(make):
    arguments = make()
    meta, _ = get_mla_metadata()
    for _ in range(2):
        flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta)
    for seed in (1, 2):
        arguments["q"].copy_(make(seed)["q"])
        for tensor in got:
            tensor.fill_(torch.nan)
        graph.replay()
        assert_same(got, fresh(arguments))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_may_be_current():
    arguments = dense()
    meta, _ = get_mla_metadata()
    want = [flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta) for _ in range(2)][1]
    with torch.cuda.device(1):
        assert_same(flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta), want)


def prefill(seed=0, **options):
    torch.manual_seed(seed)
    return prefill_case(5, 300, 200, 20, **options)


def prefill_with_everything(seed=0):
    return prefill(seed, lengths=[200, 0, 1, 65, 128]) | {"attn_sink": torch.randn(20, device="cuda")}


PREFILLS = pytest.mark.parametrize("make", [prefill, prefill_with_everything])


def forget_prefills():
    sparse_prefill._served.cache_clear()
    sparse_prefill._latest = None


def fresh_prefill(arguments):
    forget_prefills()
    return flash_mla_sparse_fwd(**arguments)


@pytest.fixture
def checked_prefills(monkeypatch):
    """The arguments of every prefill that was not repeated from a record."""
    log = []
    run = hopper.sparse_prefill

    def noted(*arguments):
        log.append(arguments)
        return run(*arguments)

    monkeypatch.setattr(hopper, "sparse_prefill", noted)
    forget_prefills()
    return log


@PREFILLS
def test_prefills_of_one_layout_are_repeated(make, checked_prefills):
    inputs = [make(seed) | {"sm_scale": 0.1 + seed} for seed in range(3)]
    results = [flash_mla_sparse_fwd(**arguments) for arguments in inputs]
    assert len(checked_prefills) == 1
    assert len({tensor.data_ptr() for result in results for tensor in result}) == 9
    for arguments, got in zip(inputs, results, strict=True):
        assert_same(got, fresh_prefill(arguments))


@PREFILLS
def test_out_of_a_prefill_is_written_in_place(make, checked_prefills):
    arguments = make()
    want = fresh_prefill(arguments)
    for strided in (False, False, True, True, False):
        room = torch.full((5, 21, 576 if strided else 512), torch.nan, dtype=torch.bfloat16, device="cuda")
        out = room[:, 1:, :512] if strided else room[:, 1:].contiguous()
        got = flash_mla_sparse_fwd(**arguments, out=out)
        assert got[0] is out
        assert_same(got, want)
        assert room[:, 0].isnan().all()


@PREFILLS
@pytest.mark.parametrize(
    "change",
    [
        lambda a: {"q": torch.cat([a["q"], a["q"]], -1)[..., :576]},
        lambda a: {"q": torch.cat([a["q"][..., :1], a["q"]], -1)[..., 1:]},
        lambda a: {"kv": torch.cat([a["kv"], a["kv"]], 1)[:, :1]},
        lambda a: {"kv": torch.cat([a["kv"][..., :1], a["kv"]], -1)[..., 1:]},
        lambda a: {"indices": torch.cat([a["indices"][..., :1], a["indices"]], -1)[..., 1:]},
        lambda a: {"q": a["q"].half(), "kv": a["kv"].half()},
        lambda a: {"sm_scale": -0.25},
        lambda a: {"sm_scale": 0},
        lambda a: {"attn_sink": torch.zeros(20, device="cuda")},
        lambda a: {"topk_length": torch.zeros(5, dtype=torch.int32, device="cuda")},
    ],
)
def test_prefills_that_look_different_are_not_repeated(make, change):
    arguments = make()
    want, changed = fresh_prefill(arguments), arguments | change(arguments)
    other = fresh_prefill(changed)
    for _ in range(2):
        assert_same(flash_mla_sparse_fwd(**arguments), want)
        assert_same(flash_mla_sparse_fwd(**changed), other)
        assert_same(flash_mla_sparse_fwd(**changed), other)


@PREFILLS
def test_repeated_prefills_are_captured(make):
    arguments = make()
    for _ in range(2):
        flash_mla_sparse_fwd(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = flash_mla_sparse_fwd(**arguments)
    for seed in (1, 2):
        for name in ("q", "kv", "indices"):
            arguments[name].copy_(make(seed)[name])
        for tensor in got:
            tensor.fill_(torch.nan)
        graph.replay()
        assert_same(got, fresh_prefill(arguments))


@PREFILLS
def test_prefills_on_streams_do_not_disturb_each_other(make):
    arguments = make()
    want = fresh_prefill(arguments)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for turn in range(30):
        with torch.cuda.stream(streams[turn % 3]):
            results.append(flash_mla_sparse_fwd(**arguments))
    torch.cuda.synchronize()
    for got in results:
        assert_same(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_prefill_with_another_current_device():
    arguments = prefill()
    want = [flash_mla_sparse_fwd(**arguments) for _ in range(2)][1]
    with torch.cuda.device(1):
        assert_same(flash_mla_sparse_fwd(**arguments), want)
