"""Dense decode by either backend for GPUs: layouts, outputs, graphs and streams that serving engines use."""

import pytest
import torch
from helpers import assert_close_lse, assert_close_out
from test_hopper_dense_decode import case, check, expected, run

from flash_mla import flash_mla_with_kvcache, get_mla_metadata

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, params=["hopper", "triton"])
def force_backend(monkeypatch, request):
    monkeypatch.setenv("FLASH_MLA_BACKEND", request.param)


def test_long_request():
    check(case(1, 1, 16, 1, [200_000]))
    check(case(2, 2, 128, 1, [100_001, 63]), causal=True)


@pytest.mark.parametrize("h_q", [16, 128])
def test_many_requests(h_q):
    check(case(4096, 1, h_q, 1, [i % 7 * 20 for i in range(4096)]))


@pytest.mark.parametrize(("s_q", "h_q"), [(13, 64), (17, 64), (9, 128), (50, 100)])
def test_more_rows_than_fit_into_one_pass(s_q, h_q):
    check(case(3, s_q, h_q, 1, [300, 0, 1000]), causal=True)


@pytest.mark.parametrize("h_q", [16, 128])
def test_no_tokens_and_no_pages(h_q):
    q, k, table, lengths = case(2, 1, h_q, 1, [0, 0])
    check((q, k, table[:, :0].contiguous(), lengths))


def test_huge_scores():
    check(case(3, 1, 64, 1, [500, 77, 129], q_scale=300.0))


@pytest.mark.parametrize(("columns", "power"), [(4, 20), (512, 110), (512, -60)])
@pytest.mark.parametrize("h_q", [16, 64, 128])
def test_values_of_any_magnitude(h_q, columns, power):
    q, k, table, lengths = case(2, 1, h_q, 1, [9000, 500])
    q[..., :columns] = 0
    k[..., :columns] *= 2.0**power
    out, lse = run(q, k, table, lengths)
    want, want_lse = expected(q, k, table, lengths)
    back = torch.ones(512, device="cuda")
    back[:columns] = 2.0**-power
    assert_close_out(out * back, want * back)
    assert_close_lse(lse, want_lse)


def test_causal_with_more_queries_than_keys():
    check(case(3, 8, 16, 1, [3, 8, 0]), causal=True)


@pytest.mark.parametrize(("page", "s_q"), [(64, 2), (192, 1), (8, 2), (24, 1), (5, 1)])
def test_strided_inputs_and_out(page, s_q):
    q, k, table, lengths = case(5, s_q, 32, 1, [100, 0, 64, 700, 1], page=page)
    wide_q = torch.full((5, s_q, 40, 640), torch.nan, dtype=q.dtype, device="cuda")
    wide_q[:, :, 4:36, 64:] = q
    apart = torch.full((k.shape[0], page + 3, 1, 592), torch.nan, dtype=k.dtype, device="cuda")
    apart[:, :page, :, :576] = k
    wide_table = torch.full((5, table.shape[1] + 9), 2**31 - 1, dtype=torch.int32, device="cuda")
    wide_table[:, : table.shape[1]] = table
    buffer = torch.full((5, s_q, 32, 1024), torch.nan, dtype=q.dtype, device="cuda")
    out = buffer[..., 512:]
    got, lse = run(wide_q[:, :, 4:36, 64:], apart[:, :page, :, :576], wide_table[:, : table.shape[1]], lengths, out=out)
    assert got is out
    want, want_lse = expected(q, k, table, lengths)
    assert_close_out(out, want)
    assert_close_lse(lse, want_lse)
    assert buffer[..., :512].isnan().all(), "nothing is written outside the output"


def test_misaligned_tensors():
    q, k, table, lengths = case(2, 1, 16, 1, [300, 5])
    odd = torch.full((2, 1, 16, 579), torch.nan, dtype=q.dtype, device="cuda")
    odd[..., 3:] = q
    buffer = torch.full((2, 1, 16, 515), torch.nan, dtype=q.dtype, device="cuda")
    out, lse = run(odd[..., 3:], k, table, lengths, out=buffer[..., 1:513])
    want, want_lse = expected(q, k, table, lengths)
    assert_close_out(out, want)
    assert_close_lse(lse, want_lse)
    assert buffer[..., :1].isnan().all()
    assert buffer[..., 513:].isnan().all()


@pytest.mark.parametrize("h_q", [16, 128])
def test_graph_replay_plans_again(h_q):
    q, k, table, lengths = case(16, 1, h_q, 1, [1000] * 16)
    run(q, k, table, lengths)
    meta = get_mla_metadata()[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flash_mla_with_kvcache(q, k, table, lengths, 512, meta)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        lengths.copy_(torch.randint(0, 1001, (16,), generator=generator))
        q.copy_(torch.randn(q.shape, generator=generator).mul(8).round().div(8))
        table.copy_(table[torch.randperm(16, generator=generator).cuda()])
        out.fill_(torch.nan)
        graph.replay()
        want, want_lse = expected(q, k, table, lengths)
        assert_close_out(out, want)
        assert_close_lse(lse, want_lse)


def test_streams_side_by_side():
    inputs = [case(20, 1, 128, 1, [50 * i for i in range(20)]), case(3, 2, 64, 1, [5000, 10, 900])]
    wanted = [expected(*one) for one in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(10):
        got = []
        for one, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(run(*one))
        torch.cuda.synchronize()
        for (out, lse), (want, want_lse) in zip(got, wanted, strict=True):
            assert_close_out(out, want)
            assert_close_lse(lse, want_lse)


@pytest.mark.parametrize("h_q", [16, 128])
def test_batch_invariance(h_q):
    q, k, table, lengths = case(6, 1, h_q, 1, [9000, 100, 5000, 0, 4097, 8192])
    together, lse = run(q, k, table, lengths, enable_batch_invariant=True)
    for i in range(6):
        alone, lse_alone = run(q[i : i + 1], k, table[i : i + 1], lengths[i : i + 1], enable_batch_invariant=True)
        assert torch.equal(alone[0], together[i])
        assert torch.equal(lse_alone[0], lse[i])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_current():
    with torch.cuda.device(1):
        inputs = case(5, 1, 128, 1, [1000, 0, 70, 3000, 64])
        want, want_lse = expected(*inputs)
    out, lse = run(*inputs)
    assert out.device == lse.device == inputs[0].device
    assert_close_out(out, want)
    assert_close_lse(lse, want_lse)
