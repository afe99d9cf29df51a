"""Sparse decode of at most 32 heads, which swaps its operands: what it alone can get wrong.

The sweeps beside this file include such calls; here are the ranges of fp16, references that move, sides without tokens.
"""

import math

import pytest
import torch
from helpers import assert_close_lse, assert_close_out
from test_hopper_sparse_decode import case, check, run

from flash_mla import KVCacheFormat, flash_mla_with_kvcache, get_mla_metadata, reference
from flash_mla.backends.hopper.sparse_decode_heuristics import FEW_HEADS

pytestmark = pytest.mark.gpu

HEADS = FEW_HEADS[KVCacheFormat.FP8_V32]
OTHER_FORMATS = [kv_format for kv_format in FEW_HEADS if kv_format is not KVCacheFormat.FP8_V32]


@pytest.mark.parametrize("h_q", [1, 2, 7, 8, 9, 16, 17, 32])
@pytest.mark.parametrize("topk", [1, 64, 65, 129, 2048])
def test_head_counts(h_q, topk):
    check(case(3, 2, h_q, topk, seed=100 * h_q + topk))


@pytest.mark.parametrize("h_q", HEADS)
def test_many_split_units(h_q):
    check(case(1, 1, h_q, 20_000))
    check(case(5, 3, h_q, 4096, lengths=[4096, 1, 0, 3000, 64], extra_topk=500, extra_lengths=[0, 500, 0, 129, 64]))


@pytest.mark.parametrize("kv_format", OTHER_FORMATS)
@pytest.mark.parametrize("h_q", [1, 8, 9, 16])
def test_formats(kv_format, h_q):
    for seed, topk in enumerate((1, 64, 65, 700)):
        check(case(3, 2, h_q, topk, kv_format=kv_format, page_size=7, seed=seed))
    lengths = {"lengths": [300, 0, 129], "extra_topk": 200, "extra_lengths": [0, 5, 200]}
    check(case(3, 1, h_q, 300, kv_format=kv_format, extra_page_size=2, **lengths))
    check(case(1, 1, h_q, 20_000, kv_format=kv_format))


def exponents(cache, kv_format):
    """A view of the e8m0 scales of every token of a cache, [pages, page_size, scales]."""
    page_size = cache.shape[1]
    if kv_format is KVCacheFormat.FP8_V41:
        return cache[:, :, 0, 512:528]
    return cache.as_strided(
        (len(cache), page_size, 7), (cache.stride(0), 8, 1), cache.storage_offset() + page_size * 576
    )


@pytest.mark.parametrize("kv_format", OTHER_FORMATS)
@pytest.mark.parametrize("spread", [3, 12, 30])
def test_powers_of_two_far_apart(kv_format, spread):
    """Scales of a token, and of tokens, that are up to 2^spread apart; 0, which is 2^-127, among them."""
    arguments = case(3, 1, 16, 300, kv_format=kv_format, seed=spread, sink=False)
    scales = exponents(arguments["k_cache"], kv_format)
    generator = torch.Generator("cuda").manual_seed(spread)
    lower = torch.randint(0, spread + 1, scales.shape, device="cuda", generator=generator, dtype=torch.uint8)
    changed = torch.where(lower == spread, 0, scales - lower)
    scales.copy_(torch.where(scales == 255, scales, changed))
    check(arguments)


def scaled(arguments, factors):
    """The arguments with every scale of the main cache's tokens times a factor of its own."""
    scales = arguments["k_cache"][..., 512:528].clone()
    written = scales.ne(255).any(-1, keepdim=True)
    values = scales.view(torch.float32) * factors
    arguments["k_cache"][..., 512:528] = torch.where(written, values.view(torch.uint8), scales)
    return arguments


@pytest.mark.parametrize("h_q", HEADS)
@pytest.mark.parametrize("spread", [0.0, 4.0, 20.0])
def test_scales_of_tokens_far_apart(h_q, spread):
    """Some tokens' latents are 2^spread times as large as others', in no power of two."""
    arguments = case(4, 1, h_q, 300, seed=int(spread) + h_q, sink=False)
    shape = (*arguments["k_cache"].shape[:-1], 1)
    generator = torch.Generator("cuda").manual_seed(h_q)
    factors = torch.exp2((torch.rand(shape, device="cuda", generator=generator) - 1) * spread)
    check(scaled(arguments, factors))


def test_the_largest_latents_may_be_the_least_attended():
    """Tokens whose latents are 2^24 times the others', and whose scores are far below theirs."""
    arguments = case(2, 1, 16, 256, seed=3, sink=False)
    cache, q = arguments["k_cache"], arguments["q"]
    codes, scales = cache[..., :512], cache[..., 512:528]
    written = scales.ne(255).any(-1)
    codes[written] = torch.where(codes[written] == 0x80, 0, codes[written]) & 0x7F  # latents above 0
    q.copy_(-q.abs() * 2.0**-20)
    cache[..., 528:] = torch.where(written[..., None], torch.zeros_like(cache[..., 528:]), cache[..., 528:])
    large = torch.arange(cache.shape[1], device="cuda") % 2 == 0
    factors = torch.where(large, 2.0**24, 1.0)[:, None, None].expand(*cache.shape[:-1], 1)
    check(scaled(arguments, factors), softmax_scale=1.0)


@pytest.mark.parametrize("exponent", [-60, -20, 20, 60])
def test_queries_beyond_the_range_of_fp16(exponent):
    arguments = case(3, 1, 16, 200, seed=abs(exponent))
    arguments["q"] *= 2.0 ** torch.linspace(exponent, 0, 16, device="cuda").round().bfloat16()[:, None]
    check(arguments, softmax_scale=576**-0.5 * 2.0 ** -max(0, exponent))


def test_scores_that_keep_rising():
    """Each block's scores exceed those of the blocks before it: references move in every block."""
    arguments = case(2, 1, 16, 1024, num_pages=16, seed=5)
    for request in range(2):
        slots = arguments["indices"][request, 0].clone()
        slots = slots[slots >= 0]
        cache = arguments["k_cache"].view(torch.float8_e4m3fn)
        latents = KVCacheFormat.FP8_V32.gather(cache, slots).view(len(slots), 576)
        order = (latents @ arguments["q"][request, 0].float().sum(0)).argsort()
        arguments["indices"][request, 0] = -1
        arguments["indices"][request, 0, : len(slots)] = slots[order]
    check(arguments, softmax_scale=2.0)
    check(arguments, softmax_scale=-2.0)


def test_blocks_that_overtake_each_other():
    """Rows come from memory, now and then very late: a block arrives after the next one. Rare, hence so many calls."""
    kv_format, b, calls = KVCacheFormat.FP8_V32, 128, 10_000
    cache = kv_format.pack(torch.randn(4096, 64, 1, kv_format.head_dims[0], device="cuda", dtype=torch.bfloat16))
    arguments = {
        "q": torch.randn(b, 1, HEADS[-1], kv_format.head_dims[0], device="cuda", dtype=torch.bfloat16) / 8,
        "k_cache": cache,
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 512,
        "tile_scheduler_metadata": get_mla_metadata()[0],
        "is_fp8_kvcache": True,
        "indices": torch.randint(4096 * 64, (b, 1, 2048), device="cuda", dtype=torch.int32),
    }
    larger_than_l2 = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    want, _ = flash_mla_with_kvcache(**arguments)
    differ = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(calls):
        larger_than_l2.zero_()
        out, _ = flash_mla_with_kvcache(**arguments)
        differ |= (out != want).any()
    assert not differ


def test_blocks_without_tokens():
    """Sides, or first blocks, in which nothing is attended to."""
    for blocks in ([0], [1], [2], [3], [1, 2], [15], []):
        arguments = case(2, 1, 16, 1024, seed=len(blocks), num_pages=40)
        kept = torch.zeros(16, 1, dtype=torch.bool, device="cuda")
        kept[blocks] = True
        arguments["indices"].masked_fill_(~kept.expand(16, 64).flatten(), -1)
        check(arguments)


@pytest.mark.parametrize("h_q", HEADS)
def test_batch_invariance(h_q):
    arguments = case(6, 2, h_q, 9000, lengths=[9000, 100, 5000, 0, 4097, 8192])
    together, lse = run(arguments, enable_batch_invariant=True)
    for i in range(6):
        alone = {
            name: value[i : i + 1] if name in ("q", "indices", "topk_length") else value
            for name, value in arguments.items()
        }
        out, lse_alone = run(alone, enable_batch_invariant=True)
        assert torch.equal(out[0], together[i])
        assert torch.equal(lse_alone[0], lse[i])


def test_a_nan_query_head_stays_alone():
    arguments = case(2, 1, 16, 300, sink=False)
    want, want_lse = reference.decode(**arguments)
    arguments["q"][:, :, 5, 100] = math.nan
    arguments["q"][:, :, 9, 570] = math.inf
    out, lse = run(arguments)
    others = [head for head in range(16) if head not in (5, 9)]
    assert_close_out(out[:, :, others], want[:, :, others])
    assert_close_lse(lse[:, others], want_lse[:, others])
