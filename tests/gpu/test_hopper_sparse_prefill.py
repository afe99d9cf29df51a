"""Sparse prefill on Hopper against the fp32 reference: a seeded sweep of shapes, and the ugly corners."""

import math
import random

import pytest
import torch
from helpers import SKIPPED, assert_close, assert_close_lse, assert_close_out, poisoned_out, spread

from flash_mla import flash_mla_sparse_fwd, reference, sparse_prefill
from flash_mla.backends.hopper import sparse_prefill_launch

pytestmark = pytest.mark.gpu

SINKS = [-math.inf, math.inf, -100.0, 100.0, 0.0, 1.5]


def case(s_q, s_kv, topk, h_q, *, d=576, dtype=torch.bfloat16, lengths=None, skipped=0.2, q_scale=1.0):
    """A third of the rows of kv are NaN: no index names them, but for the entries beyond `lengths`."""
    # Multiples of powers of two: fp32 scores are exact in any order, so that tolerances of lse hold near 0, too.
    kv = torch.randn(s_kv, 1, d, device="cuda").div_(10).clamp_(-1, 1).mul_(64).round_().div_(64).to(dtype)
    rows = torch.arange(s_kv, device="cuda")
    kv[rows % 3 == 1] = math.nan
    used = rows[rows % 3 != 1]
    indices = used[torch.randint(len(used), (s_q, 1, topk), device="cuda")]
    skip = torch.rand(indices.shape, device="cuda") < skipped
    never = torch.tensor([*SKIPPED, s_kv, s_kv + 1, 2**31 - 1], device="cuda")
    indices[skip] = never[torch.randint(len(never), (int(skip.sum()),), device="cuda")]
    q = torch.randn(s_q, h_q, d, device="cuda").mul_(q_scale).mul_(8).round_().div_(8).to(dtype)
    args = {"q": q, "kv": kv, "sm_scale": d**-0.5}
    if lengths is not None:
        args["topk_length"] = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        ignored = torch.arange(topk, device="cuda") >= args["topk_length"][:, None, None]
        indices[ignored] = torch.randint(s_kv + 1, (int(ignored.sum()),), device="cuda") // 3 * 3 + 1
    return args | {"indices": indices.int()}


def check(args, out=None):
    got, max_logits, lse = flash_mla_sparse_fwd(**args, out=out)
    assert out is None or got is out
    again = flash_mla_sparse_fwd(**args)
    assert all(torch.equal(a, b) for a, b in zip((got, max_logits, lse), again, strict=True)), "deterministic"
    ref, ref_max_logits, ref_lse = reference.sparse_prefill(**args)
    assert_close_out(got, ref, cos=7e-6)
    assert_close("max_logits", max_logits, ref_max_logits, atol=1e-6, rtol=2 / 65536, cos=1e-7)
    assert_close_lse(lse, ref_lse, rtol=2 / 65536)


@pytest.mark.parametrize("seed", range(24))
def test_random_shapes(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(6):
        s_q = rng.choice([1, 2, 3, 17, 132, 200, 300])
        topk = rng.choice([1, 7, 63, 64, 65, 127, 128, 129, 250, 640, 2048])
        h_q = rng.choice([1, 2, 8, 16, 20, 33, 64, 65, 128, 128, 192, 200])
        args = case(
            s_q, rng.choice([1, 2, 50, 1000, 5000]), topk, h_q, d=rng.choice([576, 576, 512]),
            dtype=rng.choice([torch.bfloat16, torch.bfloat16, torch.float16]),
            lengths=rng.choice([None, [rng.choice([0, 1, topk, rng.randint(0, topk + 3)]) for _ in range(s_q)]]),
            skipped=rng.choice([0.0, 0.0, 0.01, 0.2, 0.95]), q_scale=rng.choice([0.1, 1.0, 10.0]),
        )  # fmt: skip
        if rng.random() < 0.5:
            args["attn_sink"] = torch.tensor([rng.choice(SINKS) for _ in range(h_q)], device="cuda")
        if rng.random() < 0.3:
            args["sm_scale"] = rng.choice([0.5, 0.01, -0.04, 0.0])
        check(args)


def test_rows_without_a_valid_index_see_nothing():
    args = case(9, 50, 200, 20, lengths=[0, 200, 200, 5, 200, 0, 1, 200, 200])
    args["indices"][1] = -1
    args["indices"][2] = 50
    args["indices"][4, 0, :150] = -3
    args["attn_sink"] = torch.tensor(SINKS + [0.0] * 14, device="cuda")
    out, max_logits, lse = flash_mla_sparse_fwd(**args, out=torch.full_like(args["q"][..., :512], math.nan))
    for token in (0, 1, 2, 5):
        assert torch.equal(out[token], torch.zeros_like(out[token]))
        assert torch.equal(max_logits[token], torch.full_like(lse[token], -math.inf))
        assert torch.equal(lse[token], torch.full_like(lse[token], math.inf))
    check(args)


@pytest.mark.parametrize("h_q", [16, 128])
def test_all_nan_but_one_row(h_q):
    args = case(3, 300, 500, h_q, skipped=0.0)
    args["kv"].fill_(math.nan)
    args["kv"][77] = 0.5
    args["indices"][:] = -1
    args["indices"][..., 499] = 77
    check(args)


@pytest.mark.parametrize("s_q", [1, 5, 132, 140])
def test_repeats_count(s_q):
    args = case(s_q, 64, 512, 128, skipped=0.0)
    args["indices"][:] = 3
    out, max_logits, lse = flash_mla_sparse_fwd(**args)
    torch.testing.assert_close(lse, max_logits + math.log(512))
    assert_close_out(out, args["kv"][3, :, :512].expand_as(out))


def test_huge_scores():
    args = case(40, 700, 600, 64, q_scale=300.0) | {"sm_scale": 1.0}
    _, max_logits, _ = flash_mla_sparse_fwd(**args)
    assert max_logits.max() > 2000
    check(args)


def test_the_maximum_is_exact_however_the_reference_lags():
    args = case(4, 4096, 2048, 64, skipped=0.0)
    order = torch.arange(2048, device="cuda").int() * 2
    args["kv"] = torch.zeros_like(args["kv"])
    # Scores that grow by less than the threshold of a rescale from block to block.
    args["kv"][order.long(), 0, 0] = (torch.arange(2048, device="cuda") / 16).bfloat16()
    args["q"] = torch.zeros_like(args["q"])
    args["q"][..., 0] = torch.arange(1, 65, device="cuda").bfloat16()
    args["indices"][:] = order
    check(args)
    args["indices"] = args["indices"].flip(-1).contiguous()
    check(args)


@pytest.mark.parametrize("h_q", [7, 128])
@pytest.mark.parametrize("d", [576, 512])
def test_strided_inputs_and_out(h_q, d):
    args = case(20, 333, 200, h_q, d=d, lengths=[i * 10 for i in range(20)])
    wanted = flash_mla_sparse_fwd(**args)
    args |= {name: spread(args[name]) for name in ("q", "kv", "indices")}
    out = poisoned_out(20, h_q, 1024, dtype=torch.bfloat16, strided=True).cuda()
    check(args, out[..., 512:])
    assert out[..., :512].isnan().all(), "nothing is written outside the output"
    assert torch.equal(out[..., 512:], wanted[0])


@pytest.mark.parametrize("d", [576, 512])
@pytest.mark.parametrize("h_q", [1, 65, 96])
def test_pieces_that_follow_each_other_on_an_sm(h_q, d):
    lengths = [random.choice([0, 1, 64, 128, 129, 300]) for _ in range(400)]
    args = case(400, 500, 300, h_q, d=d, lengths=lengths)
    out = poisoned_out(400, h_q, 1024, dtype=torch.bfloat16, strided=True).cuda()
    check(args, out[..., 512:])
    assert out[..., :512].isnan().all(), "nothing is written outside the output"


def test_misaligned_tensors():
    args = case(5, 90, 70, 16)
    for name in ("q", "kv"):
        odd = torch.full((*args[name].shape[:-1], 579), math.nan, dtype=torch.bfloat16, device="cuda")
        odd[..., 3:] = args[name]
        args[name] = odd[..., 3:]
    out = torch.full((5, 16, 515), math.nan, dtype=torch.bfloat16, device="cuda")
    check(args, out[..., 1:513])
    assert out[..., :1].isnan().all()
    assert out[..., 513:].isnan().all()


def test_one_query_for_all_tokens_and_no_keys():
    args = case(6, 90, 70, 16)
    args["q"] = args["q"][:1].expand(6, -1, -1)
    check(args)
    check(args | {"indices": args["indices"][..., :0]})
    check(args | {"kv": args["kv"][:0]})


def test_more_rows_than_32_bits_address():
    s_kv = 2_000_000
    args = case(3, 999, 256, 16, skipped=0.1)
    kv = torch.empty(s_kv, 1, 576, dtype=torch.bfloat16, device="cuda")
    kv[-999:] = args["kv"]
    args["kv"] = kv
    named = (args["indices"] >= 0) & (args["indices"] < 999)
    args["indices"] = torch.where(named, args["indices"] + (s_kv - 999), -1)
    check(args)


def check_some(args, some):
    """Check some query tokens of many."""
    out, max_logits, lse = flash_mla_sparse_fwd(**args)
    some = torch.tensor(some, device="cuda")
    ref, ref_max_logits, ref_lse = reference.sparse_prefill(
        **args | {name: args[name][some] for name in ("q", "indices", "topk_length") if name in args}
    )
    assert_close_out(out[some], ref, cos=7e-6)
    assert_close("max_logits", max_logits[some], ref_max_logits, atol=1e-6, rtol=2 / 65536, cos=1e-7)
    assert_close_lse(lse[some], ref_lse, rtol=2 / 65536)
    assert not out.isnan().any()
    assert not lse.isnan().any()


def test_many_query_tokens():
    check_some(case(70_001, 100, 5, 8), [0, 1, 131, 132, 35_000, 65_535, 65_536, 69_999, 70_000])


@pytest.mark.parametrize("s_q", [133, 1000, 5000])
@pytest.mark.parametrize("h_q", [8, 128, 200])
@pytest.mark.parametrize("d", [576, 512])
def test_tokens_of_all_lengths(d, h_q, s_q):
    lengths = [random.choice([0, 1, 127, 128, 129, 511, 512, 600, random.randint(0, 512)]) for _ in range(s_q)]
    args = case(s_q, 300, 512, h_q, d=d, lengths=lengths)
    check_some(args, sorted(random.sample(range(s_q), 130)))
    again = [flash_mla_sparse_fwd(**args) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True)), "deterministic"


@pytest.mark.parametrize("h_q", [8, 128])
def test_indices_that_are_filled_up(h_q):
    """Enough of them that their ends are looked for."""
    s_q, topk, s_kv = 8600, 257, 300
    args = case(s_q, s_kv, topk, h_q, skipped=0.3)
    ends = torch.randint(topk + 1, (s_q,), device="cuda")
    ends[:300] = torch.arange(300, device="cuda").clamp(max=topk)
    filling = torch.tensor([-1, s_kv, 2**31 - 1, -(2**31)], dtype=torch.int32, device="cuda")
    behind = torch.arange(topk, device="cuda") >= ends[:, None, None]
    args["indices"][behind] = filling[torch.randint(4, (int(behind.sum()),), device="cuda")]
    check_some(args, [*range(0, 300, 3), *random.sample(range(300, s_q), 60), s_q - 1])
    check_some(args | {"indices": spread(args["indices"])}, [0, 1, 2, 255, 256, 257, 258, 8599])


def test_a_graph_may_be_replayed_after_calls_of_many_other_shapes():
    args = case(3, 800, 2048, 128)
    flash_mla_sparse_fwd(**args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = flash_mla_sparse_fwd(**args)
    graph.replay()
    want = [result.clone() for result in results]
    sparse_prefill_launch._call.cache_clear()
    sparse_prefill._served.cache_clear()
    sparse_prefill._latest = None
    junk = [torch.full((n,), -1, dtype=torch.int32, device="cuda") for n in (1, 64, 128, 1000) for _ in range(500)]
    for result in results:
        result.fill_(math.nan)
    graph.replay()
    for result, one in zip(results, want, strict=True):
        assert torch.equal(result, one)
    del junk


@pytest.mark.parametrize("s_q", [2, 150])
def test_graph_replay(s_q):
    args = case(s_q, 800, 300, 128, lengths=[300] * s_q)
    flash_mla_sparse_fwd(**args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, max_logits, lse = flash_mla_sparse_fwd(**args)
    for seed in range(3):
        torch.manual_seed(seed)
        fresh = case(s_q, 800, 300, 128, lengths=[(seed * 100 + i) % 301 for i in range(s_q)])
        for name in ("q", "kv", "indices", "topk_length"):
            args[name].copy_(fresh[name])
        for result in (out, max_logits, lse):
            result.fill_(math.nan)
        graph.replay()
        ref, ref_max_logits, ref_lse = reference.sparse_prefill(**args)
        assert_close_out(out, ref, cos=7e-6)
        assert_close("max_logits", max_logits, ref_max_logits, atol=1e-6, rtol=2 / 65536, cos=1e-7)
        assert_close_lse(lse, ref_lse, rtol=2 / 65536)
