"""Dense decode on Hopper against the fp32 reference: a seeded sweep of shapes, and the ugly corners."""

import random

import pytest
import torch
from helpers import assert_close_lse, assert_close_out

from flash_mla import flash_mla_with_kvcache, get_mla_metadata, reference
from flash_mla.backends.hopper.dense_decode_heuristics import gathers

pytestmark = pytest.mark.gpu


def case(b, s_q, h_q, h_kv, lengths, *, d=576, page=64, dtype=torch.bfloat16, q_scale=1.0, extra_pages=3):
    """Inputs whose unused rows are NaN and whose unused table entries are garbage."""
    lengths = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    pages = (lengths + page - 1) // page
    width = int(pages.max()) + 1
    total = int(pages.sum()) + extra_pages
    # Multiples of powers of two: fp32 scores are exact in any order, so that tolerances of lse hold near 0, too.
    k = torch.randn(total, page, h_kv, d, device="cuda").div_(10).clamp_(-1, 1).mul_(64).round_().div_(64).to(dtype)
    order = torch.randperm(total, device="cuda").int()
    table = torch.randint(-(2**31), 2**31 - 1, (b, width), dtype=torch.int64, device="cuda").int()
    used = torch.zeros(total, page, dtype=torch.bool, device="cuda")
    begin = 0
    for i, (n, count) in enumerate(zip(lengths.tolist(), pages.tolist(), strict=True)):
        mine = order[begin : begin + count]
        table[i, :count] = mine
        tokens = torch.arange(count * page, device="cuda").view(count, page) < n
        used[mine.long()] = tokens
        begin += count
    k[~used] = torch.nan
    q = torch.randn(b, s_q, h_q, d, device="cuda").mul_(q_scale).mul_(8).round_().div_(8).to(dtype)
    return q, k, table, lengths


def expected(q, k, table, lengths, **options):
    """The reference, given a cache without NaN and a table without garbage."""
    pages = (lengths + k.shape[1] - 1) // k.shape[1]
    clean = torch.where(torch.arange(table.shape[1], device="cuda") < pages[:, None], table, 0)
    return reference.decode(q, k.nan_to_num(0.0), clean, lengths, 512, **options)


def run(q, k, table, lengths, **options):
    return flash_mla_with_kvcache(q, k, table, lengths, 512, get_mla_metadata()[0], **options)


def check(inputs, **options):
    out, lse = run(*inputs, **options)
    again, lse_again = run(*inputs, **options)
    assert torch.equal(out, again), "results are deterministic"
    assert torch.equal(lse, lse_again)
    reference_options = {name: value for name, value in options.items() if name in ("softmax_scale", "causal")}
    want, want_lse = expected(*inputs, **reference_options)
    assert_close_out(out, want)
    assert_close_lse(lse, want_lse)


def random_lengths(rng, b):
    longest = rng.choice([1, 63, 64, 65, 200, 1000, 3000])
    kinds = [0, 1, 64, 128, longest]
    return [rng.choice([*kinds, rng.randint(0, longest), rng.randint(0, longest)]) for _ in range(b)]


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(50):
        h_kv = rng.choice([1, 1, 1, 2, 3])
        h_q = h_kv * rng.choice([1, 2, 8, 16, 20, 64, 128] if h_kv == 1 else [1, 4, 16, 33])
        b = rng.choice([1, 2, 3, 9, 40])
        s_q = rng.choice([1, 1, 2, 3, 5])
        dtype = rng.choice([torch.bfloat16, torch.bfloat16, torch.float16])
        page = rng.choice([64, 64, 128, 256, 8, 16, 24, 40, 72])
        if rng.random() < 0.2 and gathers(s_q, h_q, h_kv, 1):  # kernels for pages of any size
            page = rng.choice([1, 3, 13, 100])
        inputs = case(
            b, s_q, h_q, h_kv, random_lengths(rng, b), d=rng.choice([576, 576, 512]), page=page, dtype=dtype,
            q_scale=rng.choice([0.1, 1.0, 10.0]),
        )  # fmt: skip
        options = {"causal": rng.random() < 0.5, "enable_batch_invariant": rng.random() < 0.2}
        if rng.random() < 0.3:
            options["softmax_scale"] = rng.choice([0.5, 0.01, -0.04, 0.0])
        check(inputs, **options)


@pytest.mark.parametrize("h_q", [16, 128])
@pytest.mark.parametrize("page", [1, 8, 40, 64, 100])
def test_a_request_may_end_anywhere_in_a_page(page, h_q):
    check(case(200, 1, h_q, 1, list(range(200)), page=page))


@pytest.mark.parametrize("h_q", [16, 128])
@pytest.mark.parametrize(("page", "s_q"), [(8, 2), (16, 1), (72, 2), (1, 1), (9, 1)])
def test_long_requests_in_small_pages(page, s_q, h_q):
    check(case(2, s_q, h_q, 1, [100_001, 63], page=page), causal=True)


@pytest.mark.parametrize("s_q", [1, 2])
@pytest.mark.parametrize("h_q", [33, 64])
def test_rows_of_one_tile(h_q, s_q):
    check(case(9, s_q, h_q // s_q, 1, [100, 0, 64, 700, 1, 63, 65, 2000, 128]), causal=True)


def test_a_cache_whose_strides_tma_cannot_follow_is_left_to_triton():
    q, k, table, lengths = case(2, 1, 16, 1, [300, 5])
    odd = torch.zeros(k.shape[0], 64, 1, 577, dtype=k.dtype, device="cuda")[..., :576].copy_(k)
    with pytest.warns(UserWarning, match=r"dense decode runs on triton, slower than hopper: .* multiples of 16 bytes"):
        check((q, odd, table, lengths))


def test_a_cache_at_an_address_that_tma_cannot_read_is_refused():
    q, k, table, lengths = case(2, 1, 16, 1, [300, 5])
    odd = torch.zeros(k.numel() + 1, dtype=k.dtype, device="cuda")[1:].view_as(k)
    with pytest.raises(ValueError, match=r"k_cache: got strides .* multiples of 16 bytes"):
        run(q, odd, table, lengths)


@pytest.mark.parametrize("h_q", [16, 128])
def test_a_cache_without_pages(h_q):
    q, k, table, lengths = case(3, 2, h_q, 1, [0, 0, 0], extra_pages=0)
    assert len(k) == 0
    check((q, k, table, lengths), causal=True)
