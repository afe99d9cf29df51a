"""flash_mla_with_kvcache on CPU tensors against the reference, on inputs whose unused parts are poisoned."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from helpers import (
    Scope,
    assert_close_lse,
    assert_close_out,
    dense_inputs,
    poisoned_out,
    randn,
    sparse_scope,
    spread,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from flash_mla import (
    FlashMLASchedMeta,
    KVCacheFormat,
    backends,
    checks,
    flash_mla_with_kvcache,
    get_mla_metadata,
    reference,
)
from flash_mla.backends.cpu import attention

F = KVCacheFormat
PAGE_SIZES = st.sampled_from([1, 2, 3, 16, 64, 256])
HALVES = [torch.bfloat16, torch.float16]
SINKS = [-math.inf, math.inf, -100.0, 100.0, 0.0, 1.5]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def call(args: dict, **more) -> tuple[torch.Tensor, torch.Tensor]:
    """With fresh metadata, unless given, and head_dim_v."""
    args = {"block_table": None, "cache_seqlens": None, **args, **more}
    args.setdefault("tile_scheduler_metadata", get_mla_metadata()[0])
    return flash_mla_with_kvcache(head_dim_v=512, **args)


def check(args: dict, out: torch.Tensor | None = None, **more) -> None:
    args = {"block_table": None, "cache_seqlens": None, **args}
    got, lse = call(args, out=out, **more)
    assert out is None or got is out
    assert got.dtype == args["q"].dtype
    more.pop("tile_scheduler_metadata", None)
    ref, ref_lse = reference.decode(head_dim_v=512, **args, **more)
    assert_close_out(got, ref)
    assert_close_lse(lse, ref_lse)


def sparse_args(q: torch.Tensor, scope: Scope, extra: Scope | None = None) -> dict:
    args = {"q": q, "k_cache": scope.cache, "indices": scope.indices, "topk_length": scope.topk_length}
    if extra is not None:
        args |= {
            "extra_k_cache": extra.cache,
            "extra_indices_in_kvcache": extra.indices,
            "extra_topk_length": extra.topk_length,
        }
    return args | {"is_fp8_kvcache": scope.cache.element_size() == 1}


@st.composite
def dense_cases(draw):
    page_size = draw(PAGE_SIZES)
    edges = [0, 1, page_size - 1, page_size, page_size + 1, 2 * page_size]
    kv_format = draw(st.sampled_from([F.BF16, F.FP16, F.FP8_V32]))
    h_kv = 1 if kv_format is F.FP8_V32 else draw(st.sampled_from([1, 1, 2]))
    args = dense_inputs(
        generator(draw(st.integers(0, 2**32))),
        kv_format,
        draw(st.lists(st.one_of(st.sampled_from(edges), st.integers(0, 150)), min_size=1, max_size=4)),
        page_size=page_size,
        s_q=draw(st.sampled_from([1, 1, 2, 5])),
        h_q=h_kv * draw(st.sampled_from([1, 3, 8, 17])),
        h_kv=h_kv,
        d=576 if kv_format is F.FP8_V32 else draw(st.sampled_from([576, 512])),
        dtype=draw(st.sampled_from(HALVES)) if kv_format.is_quantised else kv_format.dtype,
    )
    if draw(st.booleans()):
        args |= {"q": spread(args["q"]), "block_table": spread(args["block_table"])}
    flags = {
        "causal": draw(st.booleans()),
        "is_fp8_kvcache": kv_format is F.FP8_V32,
        "softmax_scale": draw(st.sampled_from([None, 0.1, 0.5, 1])),
    }
    return args, flags, draw(st.sampled_from(["new", "given", "strided"]))


@settings(max_examples=200, deadline=None)
@given(dense_cases())
def test_dense(case):
    args, flags, out = case
    shape = (*args["q"].shape[:3], 512)
    check(
        args,
        None if out == "new" else poisoned_out(*shape, dtype=args["q"].dtype, strided=out == "strided"),
        **flags,
    )


def scopes(draw, b: int, s_q: int, d: int, kv_format: KVCacheFormat) -> Scope:
    topk = draw(st.sampled_from([0, 1, 7, 64, 130]))
    lengths = draw(st.none() | st.lists(st.integers(0, topk + 3), min_size=b, max_size=b))
    page_size = draw(PAGE_SIZES)
    gen = generator(draw(st.integers(0, 2**32)))
    return sparse_scope(gen, kv_format, b, s_q, topk, page_size=page_size, d=d, lengths=lengths)


@st.composite
def sparse_cases(draw):
    b, s_q, h_q = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 5, 16]))
    d = draw(st.sampled_from([576, 512]))
    formats = [one for one in F if d in one.head_dims and one not in (F.FP16, F.FP4_V41)]
    kv_format = draw(st.sampled_from(formats))
    gen = generator(draw(st.integers(0, 2**32)))
    scope, extra = scopes(draw, b, s_q, d, kv_format), None
    if draw(st.booleans()):
        extra_formats = [*formats, F.FP4_V41] if kv_format is F.FP8_V41 else formats
        extra = scopes(draw, b, s_q, d, draw(st.sampled_from(extra_formats)))
    # A plain cache among them has q's dtype, bf16.
    plain = not kv_format.is_quantised or (extra is not None and extra.cache.dtype == torch.bfloat16)
    dtype = torch.bfloat16 if plain else draw(st.sampled_from(HALVES))
    args = sparse_args(randn(gen, b, s_q, h_q, d, dtype=dtype), scope, extra)
    if draw(st.booleans()):
        args |= {"q": spread(args["q"]), "indices": spread(args["indices"])}
    if kv_format.is_quantised and draw(st.booleans()):
        args["k_cache"] = args["k_cache"].view(torch.uint8)
    if draw(st.booleans()):
        args["attn_sink"] = torch.tensor([SINKS[draw(st.integers(0, len(SINKS) - 1))] for _ in range(h_q)])
    return args, draw(st.sampled_from(["new", "given", "strided"]))


@settings(max_examples=250, deadline=None)
@given(sparse_cases())
def test_sparse(case):
    args, out = case
    shape = (*args["q"].shape[:3], 512)
    check(args, None if out == "new" else poisoned_out(*shape, dtype=args["q"].dtype, strided=out == "strided"))


def test_reference_is_scaled_dot_product_attention():
    """The oracle against PyTorch's, in double precision, where that has the same meaning."""
    gen = generator(0)
    args = dense_inputs(gen, F.BF16, [37], page_size=1, s_q=5, h_q=6, h_kv=2)
    out, lse = reference.decode(**args, head_dim_v=512, causal=True)
    keys = args["k_cache"][args["block_table"][0, :37].long(), 0].double().transpose(0, 1)
    q = args["q"][0].double().transpose(0, 1)
    mask = torch.arange(37) < 33 + torch.arange(5)[:, None]
    want = torch.nn.functional.scaled_dot_product_attention(
        q, keys.repeat_interleave(3, 0), keys[..., :512].repeat_interleave(3, 0), attn_mask=mask
    )
    torch.testing.assert_close(out[0].transpose(0, 1), want.float(), atol=1e-5, rtol=1e-5)
    scores = (q @ keys.repeat_interleave(3, 0).transpose(1, 2) * 576**-0.5).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(lse[0], scores.logsumexp(-1).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keys", [1, 8, 61])
def test_any_chunk_of_keys_gives_the_same(monkeypatch, keys):
    monkeypatch.setattr(attention, "MAX_KEYS_PER_CHUNK", keys)
    monkeypatch.setattr(attention, "MIN_KEYS_PER_CHUNK", 1)
    gen = generator(keys)
    check(dense_inputs(gen, F.BF16, [0, 1, 60, 61, 62, 122, 200], s_q=3, page_size=16), causal=True)
    scope = sparse_scope(gen, F.FP8_V4, 2, 2, 130, d=512, lengths=[130, 61])
    extra = sparse_scope(gen, F.FP8_V4, 2, 2, 62, d=512, page_size=2)
    check(sparse_args(randn(gen, 2, 2, 3, 512), scope, extra))


def test_many_query_rows_take_short_chunks(monkeypatch):
    monkeypatch.setattr(attention, "MAX_SCORES", 1 << 10)
    assert attention.keys_per_chunk(8) == 128
    assert attention.keys_per_chunk(1 << 20) == attention.MIN_KEYS_PER_CHUNK
    check(dense_inputs(generator(1), F.BF16, [300, 5], s_q=4, h_q=8), causal=True)


def test_causal_rows_before_the_first_key_see_nothing():
    args = dense_inputs(generator(2), F.BF16, [2, 0], s_q=5)
    out, lse = call(args, causal=True)
    assert torch.equal(out[0, :3], torch.zeros_like(out[0, :3]))
    assert torch.equal(lse[0, :, :3], torch.full_like(lse[0, :, :3], math.inf))
    assert lse[0, :, 3:].isfinite().all()
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert torch.equal(lse[1], torch.full_like(lse[1], math.inf))
    check(args, causal=True)


@pytest.mark.parametrize("keys", [3, 1024])
@pytest.mark.parametrize("seqlen", [2, 7, 64, 90])
def test_a_nan_key_reaches_only_the_causal_rows_that_see_it(monkeypatch, keys, seqlen):
    monkeypatch.setattr(attention, "MAX_KEYS_PER_CHUNK", keys)
    monkeypatch.setattr(attention, "MIN_KEYS_PER_CHUNK", 1)
    s_q, page_size = 5, 16
    args = dense_inputs(generator(seqlen), F.BF16, [seqlen, 30], s_q=s_q, h_q=6, h_kv=2, page_size=page_size)
    clean_out, clean_lse = call(args, causal=True)
    for token in range(max(0, seqlen - s_q), seqlen):
        cache = args["k_cache"].clone()
        cache[args["block_table"][0, token // page_size], token % page_size] = math.nan
        out, lse = call(args | {"k_cache": cache}, causal=True)
        first = token - (seqlen - s_q)  # the first query token that sees the key
        assert out[0, first:].isnan().all()
        assert lse[0, :, first:].isnan().all()
        assert torch.equal(out[0, :first], clean_out[0, :first])
        assert torch.equal(lse[0, :, :first], clean_lse[0, :, :first])
        assert torch.equal(out[1], clean_out[1])


@pytest.mark.parametrize("topk_length", [None, 0])
def test_rows_without_a_valid_index_see_nothing(topk_length):
    gen = generator(3)
    scope = sparse_scope(gen, F.FP8_V32, 1, 2, 9)
    if topk_length is None:
        scope.indices[:] = -1
    else:
        scope.topk_length = torch.tensor([0], dtype=torch.int32)
    args = sparse_args(randn(gen, 1, 2, 4, 576), scope)
    sink = torch.tensor([-math.inf, 0.0, 5.0, math.inf])
    out, lse = call(args, attn_sink=sink, out=poisoned_out(1, 2, 4, 512, dtype=torch.bfloat16, strided=True))
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, math.inf))


def test_infinite_sinks():
    gen = generator(4)
    args = sparse_args(randn(gen, 1, 1, 3, 576), sparse_scope(gen, F.BF16, 1, 1, 20))
    plain, plain_lse = call(args)
    out, lse = call(args, attn_sink=torch.tensor([-math.inf, math.inf, -math.inf]))
    assert torch.equal(out[:, :, ::2], plain[:, :, ::2])
    assert torch.equal(out[:, :, 1], torch.zeros_like(out[:, :, 1]))
    assert torch.equal(lse, plain_lse)


@pytest.mark.parametrize("scale", [30.0, -30.0])
def test_huge_logits(scale):
    args = dense_inputs(generator(5), F.BF16, [1, 100, 200], s_q=2)
    args["q"] *= 40
    _, lse = call(args, softmax_scale=scale)
    assert lse.abs().max() > 20_000
    check(args, softmax_scale=scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plain_sparse_caches_of_either_dtype(dtype):
    gen = generator(6)
    kv_format = F.BF16 if dtype == torch.bfloat16 else F.FP16
    args = sparse_args(randn(gen, 2, 1, 4, 512, dtype=dtype), sparse_scope(gen, kv_format, 2, 1, 30, d=512))
    check(args)


def test_the_order_of_indices_carries_no_meaning():
    gen = generator(7)
    args = sparse_args(randn(gen, 1, 1, 4, 576), sparse_scope(gen, F.NVFP4, 1, 1, 50))
    out, lse = call(args)
    args["indices"] = args["indices"][..., torch.randperm(50, generator=gen)]
    shuffled, shuffled_lse = call(args)
    assert_close_out(shuffled, out.float())
    assert_close_lse(shuffled_lse, lse)


def test_the_bits_of_a_request_do_not_depend_on_the_batch():
    gen = generator(8)
    seqlens = [1, 1500, 64, 0, 333]
    args = dense_inputs(gen, F.BF16, seqlens, s_q=2, h_q=16)
    args["enable_batch_invariant"] = True
    out, lse = call(args)
    order = [4, 1, 2]
    part = args | {name: args[name][order] for name in ("q", "block_table", "cache_seqlens")}
    part_out, part_lse = call(part)
    assert torch.equal(part_out, out[order])
    assert torch.equal(part_lse, lse[order])
    for i in range(len(seqlens)):
        alone = args | {name: args[name][i : i + 1] for name in ("q", "block_table", "cache_seqlens")}
        assert torch.equal(call(alone)[0][0], out[i])

    scope = sparse_scope(gen, F.FP8_V32, 4, 2, 90, lengths=[90, 3, 0, 41])
    args = sparse_args(randn(gen, 4, 2, 16, 576), scope) | {"enable_batch_invariant": True}
    out, lse = call(args)
    alone_out, alone_lse = call(args | {name: args[name][3:] for name in ("q", "indices", "topk_length")})
    assert torch.equal(alone_out[0], out[3])
    assert torch.equal(alone_lse[0], lse[3])


def test_repeated_calls_on_one_metadata_object():
    gen = generator(9)
    args = dense_inputs(gen, F.BF16, [100, 7, 64], s_q=2)
    meta, none = get_mla_metadata(args["cache_seqlens"], 2 * 4, 1)
    assert none is None
    assert meta == FlashMLASchedMeta()
    assert not meta.have_initialized
    first = call(args, tile_scheduler_metadata=meta, num_splits=none)
    assert meta.have_initialized
    assert (meta.config.b, meta.config.s_q, meta.config.h_q) == (3, 2, 4)
    assert (meta.config.page_block_size, meta.config.h_k, meta.config.topk) == (64, 1, None)
    assert meta.tile_scheduler_metadata.dtype == meta.num_splits.dtype == torch.int32
    again = call(args, tile_scheduler_metadata=meta)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))

    # Other scales, strides, outputs and contents are the same configuration.
    check(args, softmax_scale=0.3, tile_scheduler_metadata=meta)
    check(args | {"q": spread(args["q"])}, tile_scheduler_metadata=meta)
    check(args, poisoned_out(3, 2, 4, 512, dtype=torch.bfloat16, strided=False), tile_scheduler_metadata=meta)
    check(args | {"cache_seqlens": torch.tensor([0, 3, 12], dtype=torch.int32)}, tile_scheduler_metadata=meta)


def test_a_call_like_the_last_one_is_not_checked_again(monkeypatch):
    seen = []
    for module, name in ((checks, "decode"), (backends, "choose")):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, name=name, original=original: (seen.append(name), original(*args))[1]
        )
    args = dense_inputs(generator(21), F.BF16, [100, 3])
    meta, _ = get_mla_metadata()
    for scale in (None, 0.1, None):
        check(args, softmax_scale=scale, tile_scheduler_metadata=meta)
    assert seen == ["decode", "choose"]
    # The same tensor object, of another layout.
    args["q"].transpose_(0, 1)
    with pytest.raises(ValueError, match="block_table: got shape"):
        call(args, tile_scheduler_metadata=meta)


@pytest.mark.parametrize("copy", [copy.copy, copy.deepcopy, lambda meta: pickle.loads(pickle.dumps(meta))])
def test_copies_of_metadata_serve_the_same_configuration(copy):
    args = dense_inputs(generator(20), F.BF16, [100, 3])
    meta, _ = get_mla_metadata()
    call(args, tile_scheduler_metadata=meta)
    other = copy(meta)
    assert other.config == meta.config
    check(args, tile_scheduler_metadata=other)
    with pytest.raises(ValueError, match="planned for causal=False"):
        call(args, causal=True, tile_scheduler_metadata=copy(meta))
    assert dataclasses.asdict(meta).keys() == {"have_initialized", "config", "tile_scheduler_metadata", "num_splits"}


@pytest.mark.parametrize("field", ["tile_scheduler_metadata", "num_splits"])
def test_metadata_whose_plan_was_dropped_plans_again(field):
    args = dense_inputs(generator(10), F.BF16, [100])
    meta, _ = get_mla_metadata()
    call(args, tile_scheduler_metadata=meta)
    setattr(meta, field, None)
    call(args, tile_scheduler_metadata=meta)
    assert meta.tile_scheduler_metadata is not None
    assert meta.num_splits is not None


def test_a_failed_first_call_leaves_metadata_empty():
    args = dense_inputs(generator(11), F.BF16, [100])
    meta, _ = get_mla_metadata()
    with pytest.raises(TypeError):
        call(args | {"cache_seqlens": args["cache_seqlens"].long()}, tile_scheduler_metadata=meta)
    assert meta == FlashMLASchedMeta()
    check(args, tile_scheduler_metadata=meta)


@pytest.mark.parametrize("lengths", [[-64], [-130], [129]])
def test_a_first_call_that_fails_on_contents_leaves_metadata_empty(lengths):
    args = dense_inputs(generator(11), F.BF16, [100])
    wrong = {"cache_seqlens": torch.tensor(lengths, dtype=torch.int32), "block_table": args["block_table"][:, :2]}
    meta, _ = get_mla_metadata()
    with pytest.raises(ValueError, match=rf"cache_seqlens: got {lengths[0]} for request 0, need 0 to"):
        call(args | wrong, tile_scheduler_metadata=meta)
    assert meta == FlashMLASchedMeta()
    check(dense_inputs(generator(11), F.BF16, [100, 3]), tile_scheduler_metadata=meta)


def test_metadata_that_is_said_to_be_empty_is():
    args = dense_inputs(generator(11), F.BF16, [100])
    more = dense_inputs(generator(12), F.BF16, [100, 3])
    meta, _ = get_mla_metadata()
    for now, other in ((args, more), (more, args), (args, more)):
        meta.have_initialized = False
        check(now, tile_scheduler_metadata=meta)
        assert meta.have_initialized
        assert meta.config.b == len(now["q"])
        assert meta.num_splits.shape == (len(now["q"]) + 1,)
        with pytest.raises(ValueError, match="planned for b="):
            call(other, tile_scheduler_metadata=meta)


@pytest.mark.parametrize(("b", "s_q"), [(0, 1), (2, 0)])
def test_batches_without_query_tokens(b, s_q):
    args = dense_inputs(generator(12), F.BF16, [3] * b, s_q=s_q)
    out, lse = call(args)
    assert out.shape == (b, s_q, 4, 512)
    assert lse.shape == (b, 4, s_q)


def test_no_gradients_are_recorded():
    args = dense_inputs(generator(13), F.BF16, [10])
    out, lse = call(args | {"q": args["q"].requires_grad_()})
    assert not out.requires_grad
    assert not lse.requires_grad


class LargestIntermediate(TorchDispatchMode):
    """Bytes of the largest tensor made, apart from views of tensors that existed before."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.nbytes = max(self.nbytes, tensor.numel() * tensor.element_size())
        return result


def test_a_long_request_takes_little_memory():
    seqlen, h_q, page_size = 128 * 1024, 16, 64
    gen = generator(14)
    cache = randn(gen, 64, page_size, 1, 576)
    table = torch.randint(64, (1, seqlen // page_size), generator=gen, dtype=torch.int32)
    q, seqlens = randn(gen, 1, 2, h_q, 576), torch.tensor([seqlen], dtype=torch.int32)
    with LargestIntermediate(cache) as largest:
        out, _ = flash_mla_with_kvcache(q, cache, table, seqlens, 512, get_mla_metadata()[0], causal=True)
    assert out.isfinite().all()
    assert largest.nbytes <= attention.MAX_KEYS_PER_CHUNK * 576 * 4


def test_tensors_of_a_subclass_plan_as_others_do():
    class Named(torch.Tensor):
        pass

    args = dense_inputs(generator(23), F.BF16, [30, 5])
    meta, _ = get_mla_metadata()
    want = call(args)
    for kind in (Named, lambda q: torch.nn.Parameter(q, requires_grad=False)):
        got = call(args | {"q": args["q"].as_subclass(Named) if kind is Named else kind(args["q"])})
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    call(args | {"q": args["q"].as_subclass(Named)}, tile_scheduler_metadata=meta)
    assert meta.num_splits is not None
    with pytest.raises(ValueError, match="planned for b=2"):
        call(dense_inputs(generator(23), F.BF16, [30]), tile_scheduler_metadata=meta)
