"""Calls that repeat one before on Hopper: the same results at less host time, and never for another call."""

import pytest
import torch
from test_hopper_dense_decode import case as dense_case
from test_hopper_mha import make as mha_case
from test_hopper_sparse_decode import case as sparse_case
from test_hopper_sparse_prefill import case as prefill_case

from flash_mla import (
    KVCacheFormat,
    decode,
    flash_attn_varlen_func,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
    mha_served,
    sparse_prefill,
)
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
    decode._kept.cache_clear()
    return flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=get_mla_metadata()[0], **options)


def assert_same(got, want, what=""):
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other), what


@pytest.fixture
def checked(monkeypatch):
    """The arguments of every call that was not repeated from a record."""
    log = []
    run = hopper.decode

    def noted(*arguments):
        log.append(arguments)
        return run(*arguments)

    monkeypatch.setattr(hopper, "decode", noted)
    decode._kept.cache_clear()
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
def test_fresh_metadata_is_planned_and_followed(make, checked):
    """Calls that look alike are repeated whatever their metadata, but each by its own plan."""
    kept, results = [], []
    for seed in range(3):
        arguments = make(seed)
        if "cache_seqlens" in arguments and arguments["cache_seqlens"] is not None:
            arguments["cache_seqlens"] = arguments["cache_seqlens"].roll(seed)
            arguments["block_table"] = arguments["block_table"].roll(seed, 0)
        meta, _ = get_mla_metadata()
        kept.append((arguments, meta))
        results.append(flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta))
    results += [flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta) for arguments, meta in kept]
    assert len(checked) == 1
    for got, (arguments, _) in zip(results, kept * 2, strict=True):
        assert_same(got, fresh(arguments))


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
    else:
        yield "class of the bytes", {"k_cache": cache.view(torch.int8)}
        yield "class of the bytes", {"k_cache": cache.view(torch.float8_e4m3fn)}
        yield "a sink", {"attn_sink": torch.zeros_like(arguments["attn_sink"])}
        yield "no sink", {"attn_sink": None}


@MODES
def test_a_call_that_looks_different_gets_results_of_its_own(make):
    arguments = make()
    meta, _ = get_mla_metadata()
    want = fresh(arguments)
    for what, change in changes(arguments):
        for _ in range(2):
            assert_same(flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta), want, what)
        for _ in range(2):
            got = flash_mla_with_kvcache(**(arguments | change), tile_scheduler_metadata=meta)
            assert_same(got, fresh(arguments | change), what)


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


def mha(seed=0, d=192, **options):
    torch.manual_seed(seed)
    return mha_case([300, 0, 70, 129], [300, 40, 5, 700], h_q=8, h_kv=4, d=d, **options)


def many(seed=0, d=192):
    """More tiles than SMs."""
    torch.manual_seed(seed)
    return mha_case([300, 70, 129] * 9, [300, 5, 700] * 9, h_q=8, h_kv=4, d=d)


MHA = pytest.mark.parametrize(("make", "d"), [(mha, 192), (mha, 128), (many, 192), (many, 128)])


def fresh_mha(case):
    mha_served._like.cache_clear()
    mha_served._latest = None
    return case.run()


@pytest.fixture
def checked_mha(monkeypatch):
    """What was not repeated from a record."""
    log = []
    for name in ("mha_forward", "mha_backward"):
        run = getattr(hopper, name)
        monkeypatch.setattr(hopper, name, lambda *arguments, run=run, name=name: log.append(name) or run(*arguments))
    mha_served._like.cache_clear()
    mha_served._latest = None
    return log


@MHA
def test_mha_of_one_layout_is_repeated(make, d, checked_mha):
    cases = [make(seed, d)._replace(scale=0.1 + seed / 10) for seed in range(4)]
    results = [case.run() for case in cases]
    assert checked_mha == ["mha_forward"] * 2, "the second of a kind is recorded"
    assert len({tensor.data_ptr() for result in results for tensor in result}) == 8
    for case, got in zip(cases, results, strict=True):
        assert_same(got, fresh_mha(case))


@MHA
@pytest.mark.parametrize("of_lse", [False, True])
def test_gradients_of_one_layout_are_repeated(make, d, of_lse, checked_mha):
    """dk and dv to the bit; dq is summed in any order."""
    cases = [make(seed, d)._replace(scale=0.1 + seed / 10) for seed in range(6)]
    for case in cases:
        leaves = [x.requires_grad_() for x in case[:3]]
        given = [case.dout(), torch.randn_like(case.q[..., 0], dtype=torch.float32)][: 1 + of_lse]
        got = torch.autograd.grad(case.run()[: 1 + of_lse], leaves, given)
        checked = len(checked_mha)
        want = torch.autograd.grad(
            flash_attn_varlen_func(
                *leaves, *case.offsets, 1000, 1000, softmax_scale=case.scale, causal=True
            )[: 1 + of_lse], leaves, given,
        )  # fmt: skip
        del checked_mha[checked:]
        assert_same(got[1:], want[1:])
        torch.testing.assert_close(got[0], want[0], atol=1e-3, rtol=2**-7)
    assert checked_mha == [*["mha_forward", "mha_backward"] * 2, *["mha_backward"] * 2]


@pytest.mark.parametrize(
    "change",
    [
        lambda case: case._replace(q=torch.cat([case.q, case.q], 1)[:, :8]),
        lambda case: case._replace(q=torch.cat([case.q[..., :1], case.q], -1)[..., 1:]),
        lambda case: case._replace(k=torch.cat([case.k, case.k], -1)[..., :192]),
        lambda case: case._replace(v=torch.cat([case.v[..., :1], case.v], -1)[..., 1:]),
        lambda case: case._replace(scale=-0.25),
        lambda case: case._replace(scale=0.0),
        lambda case: case._replace(causal=not case.causal),
        lambda case: case._replace(lengths_q=[300, 1, 70, 128]),
        lambda case: case._replace(**{name: getattr(case, name).half() for name in "qkv"}),
    ],
)
def test_mha_that_looks_different_is_not_repeated(change):
    case = mha()
    other = change(case)
    want, wanted = fresh_mha(case), fresh_mha(other)
    for _ in range(3):
        assert_same(case.run(), want)
        assert_same(other.run(), wanted)
        assert_same(other.run(), wanted)


@MHA
def test_repeated_mha_is_captured(make, d):
    case = make(0, d)
    for _ in range(3):
        case.run()
    arguments = (*case[:3], *case.offsets, max(case.lengths_q), max(case.lengths_kv))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = flash_attn_varlen_func(*arguments, softmax_scale=case.scale, causal=True)
    for seed in (1, 2):
        for tensor, new in zip(case[:3], make(seed, d)[:3], strict=True):
            tensor.copy_(new)
        for tensor in got:
            tensor.fill_(torch.nan)
        graph.replay()
        assert_same(got, fresh_mha(case))


@MHA
def test_mha_on_streams_does_not_disturb_each_other(make, d):
    case = make(0, d)
    want = fresh_mha(case)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for turn in range(30):
        with torch.cuda.stream(streams[turn % 3]):
            results.append(case.run())
    torch.cuda.synchronize()
    for got in results:
        assert_same(got, want)


def test_mha_follows_what_was_launched_before_it():
    """A kernel that takes all tiles at once is launched alone: it must wait for whatever makes its inputs."""
    case = mha()
    want = fresh_mha(case)
    a = torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda")
    q = case.q.clone()
    for _ in range(20):
        case.q.fill_(torch.nan)
        a @ a
        case.q.copy_(q)
        assert_same(case.run(), want)
