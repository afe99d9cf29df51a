"""Token-sparse decode on Hopper, and dense decode by the same kernels, against the fp32 reference: a seeded sweep of
shapes, and the ugly corners."""

import math
import random

import pytest
import torch
from helpers import assert_close_lse, assert_close_out, dense_inputs, poisoned_out, randn, sparse_scope, spread

from flash_mla import KVCacheFormat, flash_mla_with_kvcache, get_mla_metadata, reference
from flash_mla.backends.hopper import sparse_decode_launch
from flash_mla.problem import DecodeProblem

pytestmark = pytest.mark.gpu


def on_gpu(tensor):
    """A copy with the same gaps between its elements, garbage included."""
    if tensor is None:
        return None
    raw = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    return raw.cuda().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


QUANTISED = (KVCacheFormat.FP8_V32, KVCacheFormat.FP8_V4, KVCacheFormat.FP8_V41, KVCacheFormat.NVFP4)
PLAIN = (KVCacheFormat.BF16, KVCacheFormat.FP16)
TWO_FORMATS = [(one, one) for one in QUANTISED] + [(KVCacheFormat.FP8_V41, KVCacheFormat.FP4_V41)]
# (format, head dim, format of the extra cache, dtype of q)
KINDS = [(one, d, one, one.dtype) for one in PLAIN for d in one.head_dims]
KINDS += [
    (main, main.head_dims[0], extra, dtype) for main, extra in TWO_FORMATS for dtype in (torch.bfloat16, torch.float16)
]


def scope_of(generator, kv_format, d, b, s_q, topk, *, lengths=None, **pages):
    """A cache and indices into it; latents so small that P in bf16 keeps the tolerance where few keys cancel."""
    scope = sparse_scope(generator, kv_format, b, s_q, topk, d=d, lengths=lengths, **pages)
    counted = scope.indices
    if lengths is not None:
        counted = counted.masked_fill(torch.arange(topk) >= torch.tensor(lengths)[:, None, None], -1)
    named = counted[counted >= 0].unique()
    kv_format.append(scope.cache, randn(generator, len(named), d) / 16, named)
    return scope


def as_stored(kv_format, cache):
    """The cache on the GPU, as vLLM passes it: the bytes of a quantised one."""
    return on_gpu(cache.view(torch.uint8) if kv_format.is_quantised else cache)


def case(
    b, s_q, h_q, topk, *, kv_format=KVCacheFormat.FP8_V32, d=None, lengths=None, page_size=64, num_pages=8, q_scale=1.0,
    sink=None, seed=0, strided=False, extra_topk=None, extra_lengths=None, extra_page_size=64, extra_format=None,
    dtype=None,
):  # fmt: skip
    """Keyword arguments of a call; every byte that no counting index names is NaN."""
    generator = torch.Generator().manual_seed(seed)
    pages = {"page_size": page_size, "num_pages": num_pages}
    d = d or kv_format.head_dims[0]
    dtype = dtype or (torch.bfloat16 if kv_format.is_quantised else kv_format.dtype)
    scope = scope_of(generator, kv_format, d, b, s_q, topk, lengths=lengths, **pages)
    q = randn(generator, b, s_q, h_q, d, dtype=dtype) * q_scale
    indices = scope.indices
    if strided:
        q, indices = spread(q), spread(indices)
    if sink is None:
        sink = torch.randn(h_q, generator=generator) * 3
        sink[0], sink[-1] = -math.inf, math.inf
    arguments = {
        "q": on_gpu(q),
        "k_cache": as_stored(kv_format, scope.cache),
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 512,
        "is_fp8_kvcache": kv_format.is_quantised,
        "indices": on_gpu(indices),
        "attn_sink": sink.cuda() if isinstance(sink, torch.Tensor) else None,
        "topk_length": on_gpu(scope.topk_length),
    }
    if extra_topk is not None:
        pages = {"page_size": extra_page_size, "num_pages": num_pages}
        extra_format = extra_format or kv_format
        extra = scope_of(generator, extra_format, d, b, s_q, extra_topk, lengths=extra_lengths, **pages)
        arguments |= {
            "extra_k_cache": as_stored(extra_format, extra.cache),
            "extra_indices_in_kvcache": on_gpu(extra.indices),
            "extra_topk_length": on_gpu(extra.topk_length),
        }
    return arguments


def dense_case(seqlens, *, s_q=1, h_q=64, page_size=64, seed=0, q_scale=1.0, dtype=torch.bfloat16):
    """The same of dense decode over FP8_V32."""
    kv_format, generator = KVCacheFormat.FP8_V32, torch.Generator().manual_seed(seed)
    arguments = dense_inputs(generator, kv_format, seqlens, page_size=page_size, s_q=s_q, h_q=h_q, dtype=dtype)
    arguments["q"] *= q_scale
    for pages, seqlen in zip(arguments["block_table"].long(), seqlens, strict=True):
        token = torch.arange(seqlen)
        named = pages[token // page_size] * page_size + token % page_size
        kv_format.append(arguments["k_cache"], randn(generator, seqlen, 576) / 8, named)
    arguments["k_cache"] = arguments["k_cache"].view(torch.uint8)
    return {name: on_gpu(value) for name, value in arguments.items()} | {"head_dim_v": 512, "is_fp8_kvcache": True}


def run(arguments, **options):
    return flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=get_mla_metadata()[0], **options)


def check(arguments, **options):
    out, lse = run(arguments, **options)
    again, lse_again = run(arguments, **options)
    assert torch.equal(out, again), "results are deterministic"
    assert torch.equal(lse, lse_again)
    meaning = {name: value for name, value in options.items() if name in ("softmax_scale", "causal")}
    want, want_lse = reference.decode(**arguments, **meaning)
    assert_close_out(out, want)
    assert_close_lse(lse, want_lse)


def one_random_shape(rng, seed):
    def random_lengths(b, topk):
        if topk is None or rng.random() < 0.5:
            return None
        return [rng.choice([-3, 0, 1, 64, 65, topk, topk + 7, rng.randint(0, topk)]) for _ in range(b)]

    b = rng.choice([1, 2, 3, 9, 40])
    topk = rng.choice([1, 5, 63, 64, 65, 128, 129, 200, 512, 1000, 2048])
    extra_topk = rng.choice([None, 1, 64, 65, 300, 1024])
    kv_format, d, extra_format, dtype = rng.choice(KINDS)
    arguments = case(
        b, rng.choice([1, 2, 3]), rng.choice([1, 2, 8, 16, 33, 64, 65, 100, 128, 200]), topk,
        kv_format=kv_format, d=d, extra_format=extra_format, dtype=dtype, lengths=random_lengths(b, topk),
        extra_topk=extra_topk, extra_lengths=random_lengths(b, extra_topk), extra_page_size=rng.choice([1, 2, 64]),
        page_size=rng.choice([1, 2, 16, 64, 100]), num_pages=rng.choice([1, 8, 40]),
        q_scale=rng.choice([0.125, 1.0, 8.0]), sink=rng.choice([None, False]), seed=seed,
        strided=rng.random() < 0.3,
    )  # fmt: skip
    options = {"enable_batch_invariant": rng.random() < 0.3}
    if rng.random() < 0.3:
        options["softmax_scale"] = rng.choice([0.5, 0.01, -0.04, 0.0])
    check(arguments, **options)


@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(seed):
    rng = random.Random(seed)
    for turn in range(10):
        one_random_shape(rng, 100 * seed + turn)


@pytest.mark.parametrize("seed", range(10))
def test_dense_random_shapes(seed):
    rng = random.Random(seed)
    for turn in range(5):
        longest = rng.choice([1, 64, 200, 1000, 3000])
        kinds = [0, 1, 63, 64, 65, 128, longest]
        seqlens = [rng.choice([*kinds, rng.randint(0, longest)]) for _ in range(rng.choice([1, 2, 9, 40]))]
        arguments = dense_case(
            seqlens, s_q=rng.choice([1, 2, 3, 5]), h_q=rng.choice([1, 16, 33, 64, 65, 128, 200]),
            page_size=rng.choice([1, 16, 64, 100]), seed=100 * seed + turn, q_scale=rng.choice([0.125, 1.0, 8.0]),
            dtype=rng.choice([torch.bfloat16, torch.float16]),
        )  # fmt: skip
        check(arguments, causal=rng.random() < 0.7, enable_batch_invariant=rng.random() < 0.3)


def test_dense_causal_with_more_queries_than_keys():
    check(dense_case([3, 129, 8, 0, 1], s_q=8, h_q=16), causal=True)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_dense_long_and_short_requests(batch_invariant):
    arguments = dense_case([30_000, 1, 0, 5000, 129], s_q=2, h_q=128, page_size=16)
    check(arguments, causal=True, enable_batch_invariant=batch_invariant)


def test_dense_graph_replay_plans_again():
    arguments = dense_case([1000] * 8, s_q=2)
    run(arguments, causal=True)
    meta = get_mla_metadata()[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta, causal=True)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        arguments["cache_seqlens"].copy_(torch.randint(0, 1001, (8,), generator=generator))
        arguments["block_table"].copy_(arguments["block_table"][torch.randperm(8, generator=generator).cuda()])
        out.fill_(math.nan)
        graph.replay()
        want, want_lse = reference.decode(**arguments, causal=True)
        assert_close_out(out, want)
        assert_close_lse(lse, want_lse)


def test_nothing_to_attend_to():
    arguments = case(3, 2, 64, 300)
    arguments["indices"].fill_(-1)
    out, lse = run(arguments)
    assert (out == 0).all()
    assert (lse == math.inf).all()


@pytest.mark.parametrize(
    ("b", "s_q", "h_q", "topk"), [(132, 2, 64, 300), (64, 2, 128, 260), (2, 2, 128, 2048), (4, 1, 64, 640)]
)
def test_equal_units_whole_or_cut_alike(b, s_q, h_q, topk):
    check(case(b, s_q, h_q, topk))
    check(case(b, s_q, h_q, topk, kv_format=KVCacheFormat.FP8_V4, extra_topk=100))


def test_long_and_short_requests():
    check(case(5, 1, 128, 16384, lengths=[16384, 1, 0, 5000, 129]))
    check(case(1, 1, 16, 20_000))


@pytest.mark.parametrize("h_q", [64, 128])
@pytest.mark.parametrize("kind", ["odd", "negative", "zero for some groups", "zero for some rows", "tiny"])
def test_scales_that_are_no_powers_of_two(kind, h_q):
    arguments = case(4, 1, h_q, 256)
    scales = arguments["k_cache"][..., 512:528]
    written = scales.ne(255).any(-1, keepdim=True)
    values = torch.rand((*scales.shape[:-1], 4), device="cuda") * 2e-3 + 1e-4
    if kind == "negative":
        values *= torch.randint(2, values.shape, device="cuda") * 2 - 1
    elif kind == "zero for some groups":
        values *= torch.rand_like(values) < 0.7
    elif kind == "zero for some rows":
        values *= torch.rand_like(values[..., :1]) < 0.5
    elif kind == "tiny":
        values *= 1e-30
    arguments["k_cache"][..., 512:528] = torch.where(written, values.view(torch.uint8), scales)
    check(arguments)


@pytest.mark.parametrize("large", [0, 256])
def test_merged_columns_of_very_different_size(large):
    """Partial outputs beyond fp16's range in one half of the columns cost the other half nothing."""
    arguments = case(1, 1, 64, 2048, kv_format=KVCacheFormat.BF16, d=512, q_scale=2.0**-17)
    arguments["k_cache"][..., large : large + 256] *= 2.0**20
    out, _ = run(arguments)
    want, _ = reference.decode(**arguments)
    for first, size in ((large, 2.0**20), (256 - large, 1.0)):
        columns = slice(first, first + 256)
        assert_close_out(out[..., columns] / size, want[..., columns] / size)


def test_out_is_written_in_place():
    arguments = case(3, 2, 40, 200)
    want, want_lse = reference.decode(**arguments)
    out = on_gpu(poisoned_out(3, 2, 40, 512, dtype=torch.bfloat16, strided=True))
    got, lse = run(arguments, out=out)
    assert got is out
    assert_close_out(out, want)
    assert_close_lse(lse, want_lse)


def test_cache_of_more_than_four_gigabytes():
    num_pages, topk = 120_000, 256
    cache = torch.full((num_pages, 64, 1, 656), 0xFF, dtype=torch.uint8, device="cuda")
    slots = torch.randint(num_pages * 64, (2 * topk,), device="cuda").unique()
    KVCacheFormat.FP8_V32.append(cache, torch.randn(len(slots), 576, device="cuda") / 8, slots)
    indices = slots[torch.randint(len(slots), (2, 1, topk), device="cuda")].int()
    q = torch.randn(2, 1, 64, 576, device="cuda").bfloat16()
    out, lse = flash_mla_with_kvcache(
        q, cache, None, None, 512, get_mla_metadata()[0], is_fp8_kvcache=True, indices=indices
    )
    dense = KVCacheFormat.FP8_V32.gather(cache, indices.flatten()).view(2, topk, 576)
    scores = q[:, 0].float() @ dense.mT * 576**-0.5
    assert_close_out(out[:, 0], scores.softmax(-1) @ dense[..., :512])
    assert_close_lse(lse[..., 0], scores.logsumexp(-1))


@pytest.mark.parametrize("lengths", [None, [2048, 100, 700, 0]])
def test_graph_replay_plans_again(lengths):
    arguments = case(4, 2, 64, 2048, lengths=lengths)
    run(arguments)
    meta = get_mla_metadata()[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta)
    for seed in range(1, 4):
        changed = case(4, 2, 64, 2048, lengths=lengths and lengths[seed:] + lengths[:seed], seed=seed)
        for name in ("q", "k_cache", "indices", "topk_length", "attn_sink"):
            if changed[name] is not None:
                arguments[name].copy_(changed[name])
        out.fill_(math.nan)
        graph.replay()
        want, want_lse = reference.decode(**arguments)
        assert_close_out(out, want)
        assert_close_lse(lse, want_lse)


OF_REQUESTS = {
    "q", "block_table", "cache_seqlens", "indices", "topk_length", "extra_indices_in_kvcache", "extra_topk_length"
}  # fmt: skip


@pytest.mark.parametrize("h_q", [16, 64, 128])
@pytest.mark.parametrize(
    "make",
    [
        lambda h_q: case(6, 2, h_q, 9000, lengths=[9000, 100, 5000, 0, 4097, 8192]),
        lambda h_q: case(6, 2, h_q, 9000, kv_format=KVCacheFormat.BF16, lengths=[9000, 100, 5000, 0, 4097, 8192]),
        lambda h_q: case(6, 2, h_q, 9000, kv_format=KVCacheFormat.NVFP4, lengths=[9000, 100, 5000, 0, 4097, 8192]),
        lambda h_q: case(
            6, 2, h_q, 128, kv_format=KVCacheFormat.FP8_V4, extra_topk=9000,
            extra_lengths=[9000, 100, 5000, 0, 4097, 8192],
        ),
        lambda h_q: dense_case([9000, 100, 5000, 0, 4097, 8192], s_q=2, h_q=h_q),
    ],
    ids=["FP8_V32", "BF16", "NVFP4", "two caches", "dense FP8_V32"],
)  # fmt: skip
def test_batch_invariance(make, h_q):
    arguments = make(h_q)
    together, lse = run(arguments, enable_batch_invariant=True)
    for i in range(6):
        alone = {
            name: value[i : i + 1] if name in OF_REQUESTS and value is not None else value
            for name, value in arguments.items()
        }
        out, lse_alone = run(alone, enable_batch_invariant=True)
        assert torch.equal(out[0], together[i])
        assert torch.equal(lse_alone[0], lse[i])


@pytest.mark.parametrize("d", [576, 512])
@pytest.mark.parametrize(("h_q", "extra_topk"), [(128, None), (65, 300), (200, None)])
def test_plain_caches_of_many_long_queries(h_q, extra_topk, d):
    """Where multiplying takes longest, plain caches have a kernel of their own."""
    kv_format, topk = KVCacheFormat.BF16, 2048
    lengths = [0, 1, 64, 65, 128, topk] * 11 + [topk - 1]
    arguments = case(
        len(lengths), 1, h_q, topk, kv_format=kv_format, d=d, lengths=lengths, num_pages=40, extra_topk=extra_topk
    )
    dtype, device = arguments["q"].dtype, arguments["q"].device
    shape = (len(lengths), 1, h_q, 1, d, 512)
    problem = DecodeProblem(device, dtype, *shape, kv_format, 64, topk=topk, extra_topk=extra_topk)
    assert sparse_decode_launch.sparse_decode_kernel(problem).endswith("compute_bound")
    check(arguments)


@pytest.mark.parametrize("apart", [1, 8])
def test_plain_caches_of_any_strides(apart):
    arguments = case(3, 2, 40, 300, kv_format=KVCacheFormat.BF16, page_size=48)
    want, want_lse = reference.decode(**arguments)
    cache = arguments["k_cache"]
    room = torch.full((len(cache) * apart, 50, 3, 592), math.nan, dtype=cache.dtype, device="cuda")
    arguments["k_cache"] = room[::apart, 1:49, 1:2, 16:].copy_(cache)
    out, lse = run(arguments)
    assert_close_out(out, want)
    assert_close_lse(lse, want_lse)


def test_misaligned_rows_of_a_plain_cache_are_left_to_triton():
    arguments = case(1, 1, 64, 64, kv_format=KVCacheFormat.FP16)
    odd = torch.zeros(8, 64, 1, 577, dtype=torch.float16, device="cuda")[..., :576].copy_(arguments["k_cache"])
    with pytest.warns(UserWarning, match=r"sparse decode runs on triton, slower than hopper: .* multiples of 16 bytes"):
        check(arguments | {"k_cache": odd})


def test_misaligned_pages_are_left_to_triton():
    arguments = case(1, 1, 64, 64)
    cache = arguments["k_cache"]
    apart = torch.zeros(len(cache), 64 * 656 + 8, dtype=torch.uint8, device="cuda")
    odd = apart[:, : 64 * 656].view(len(cache), 64, 1, 656).copy_(cache)
    with pytest.warns(UserWarning, match=r"sparse decode runs on triton, slower than hopper: .* multiples of 16 bytes"):
        check(arguments | {"k_cache": odd})


def test_pages_at_a_misaligned_address_are_named():
    arguments = case(1, 1, 64, 64)
    cache = arguments["k_cache"]
    odd = torch.zeros(cache.numel() + 8, dtype=torch.uint8, device="cuda")[8:].view_as(cache)
    with pytest.raises(ValueError, match=r"k_cache: got a page stride of 41984 bytes at address .* multiples of 16"):
        run(arguments | {"k_cache": odd})


@pytest.mark.parametrize("h_q", [8, 64, 128])
@pytest.mark.parametrize("kv_format", [KVCacheFormat.BF16, KVCacheFormat.FP8_V32, KVCacheFormat.FP8_V4])
def test_caches_without_pages(kv_format, h_q):
    arguments = case(2, 1, h_q, 100, kv_format=kv_format, extra_topk=70)
    for name, indices in (("k_cache", "indices"), ("extra_k_cache", "extra_indices_in_kvcache")):
        arguments |= {name: arguments[name][:0], indices: arguments[indices].clamp(max=-1)}
        check(arguments)
