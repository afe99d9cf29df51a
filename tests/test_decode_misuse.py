"""Arguments of flash_mla_with_kvcache that do not fit: told by name, what came and what is needed, on any call."""

from __future__ import annotations

import math
import re

import pytest
import torch
from helpers import dense_inputs, poisoned_out, randn, sparse_scope
from test_decode import F, call, generator, sparse_args

from flash_mla import flash_mla_with_kvcache, get_mla_metadata


def dense_args() -> dict:
    return dense_inputs(generator(15), F.BF16, [70, 5], s_q=2)


def fp8_args() -> dict:
    return dense_inputs(generator(16), F.FP8_V32, [70, 5], s_q=2) | {"is_fp8_kvcache": True}


def both_args() -> dict:
    gen = generator(17)
    scope = sparse_scope(gen, F.FP8_V41, 2, 2, 9, d=512, lengths=[3, 9])
    extra = sparse_scope(gen, F.FP4_V41, 2, 2, 7, d=512, page_size=2, lengths=[7, 2])
    return sparse_args(randn(gen, 2, 2, 4, 512), scope, extra) | {"attn_sink": torch.zeros(4)}


def of(name: str, change) -> object:
    """A change of one argument, made from its value."""
    return lambda args: {name: change(args[name])}


def to(**values) -> object:
    """Arguments replaced."""
    return lambda args: values


DENSE_MISUSE = [
    (of("q", lambda q: q.float()), TypeError, "q: got dtype float32, need bfloat16 or float16"),
    (of("q", lambda q: q.tolist()), TypeError, "q: got list, need a torch.Tensor"),
    (of("q", lambda q: q[0]), ValueError, "q: got shape [2, 4, 576], need [b, s_q, h_q, d]"),
    (of("q", lambda q: q[..., :500]), ValueError, "q: got head dim 500, need 576 or 512"),
    (of("q", lambda q: q[:, :, :0]), ValueError, "q: got 0 heads"),
    (of("q", lambda q: q.transpose(2, 3).contiguous().transpose(2, 3)), ValueError, "q: got stride 4 in the last"),
    (of("q", lambda q: q.half()), TypeError, "k_cache: got dtype bfloat16, need float16 like q"),
    (of("q", lambda q: q[..., :512]), ValueError, "k_cache: got shape"),
    (of("k_cache", lambda k: k[:, :, 0]), ValueError, "k_cache: got shape"),
    (of("k_cache", lambda k: k.float()), TypeError, "k_cache: got dtype float32"),
    (of("k_cache", lambda k: k.to("meta")), ValueError, "k_cache: got a tensor on meta, need it on cpu"),
    (of("k_cache", lambda k: k[:, :0]), ValueError, "k_cache: got shape [5, 0, 1, 576], need a page size"),
    (of("k_cache", lambda k: k.expand(-1, -1, 3, -1)), ValueError, "q: got 4 heads, need a multiple of the 3"),
    (to(is_fp8_kvcache=True), TypeError, "k_cache: got dtype bfloat16"),
    (of("block_table", lambda t: t.long()), TypeError, "block_table: got dtype int64, need int32"),
    (
        of("block_table", lambda t: t.repeat_interleave(2, 1)[:, ::2]),
        ValueError,
        "block_table: got stride 2 in the last",
    ),
    (of("block_table", lambda t: t[:1]), ValueError, "block_table: got shape [1, 3], need [b=2, max_pages]"),
    (to(block_table=None), TypeError, "block_table: got NoneType"),
    (of("cache_seqlens", lambda t: t.long()), TypeError, "cache_seqlens: got dtype int64, need int32"),
    (of("cache_seqlens", lambda t: t[:1]), ValueError, "cache_seqlens: got shape [1], need [b=2]"),
    (of("cache_seqlens", lambda t: t.to("meta")), ValueError, "cache_seqlens: got a tensor on meta"),
    (to(cache_seqlens=None), TypeError, "cache_seqlens: got NoneType"),
    (of("cache_seqlens", lambda t: t - 6), ValueError, "cache_seqlens: got -1 for request 1, need 0 to 192"),
    (of("cache_seqlens", lambda t: t + 123), ValueError, "cache_seqlens: got 193 for request 0, need 0 to 192"),
    (of("cache_seqlens", lambda t: t + 60), ValueError, "block_table: got page"),
    (to(causal=1), TypeError, "causal: got int, need a bool"),
    (to(is_fp8_kvcache=None), TypeError, "is_fp8_kvcache: got NoneType, need a bool"),
    (to(enable_batch_invariant="no"), TypeError, "enable_batch_invariant: got str, need a bool"),
    (to(softmax_scale=math.nan), ValueError, "softmax_scale: got nan, need a finite number"),
    (to(softmax_scale="1"), TypeError, "softmax_scale: got str, need a float"),
    (to(attn_sink=torch.zeros(4)), ValueError, "attn_sink: got Tensor, need None without indices"),
    (to(topk_length=torch.zeros(2)), ValueError, "topk_length: got Tensor, need None without indices"),
    (to(extra_k_cache=torch.zeros(2)), ValueError, "extra_k_cache: got Tensor, need None without indices"),
    (to(num_splits=torch.zeros(3)), TypeError, "num_splits: got Tensor, need None"),
    (to(tile_scheduler_metadata=None), TypeError, "need a FlashMLASchedMeta (make one with get_mla_metadata())"),
    (to(out=torch.zeros(2, 2, 4, 512)), TypeError, "out: got dtype float32, need bfloat16"),
    (to(out=torch.zeros(2, 2, 4, 576).bfloat16()), ValueError, "out: got shape [2, 2, 4, 576]"),
    (to(out=torch.zeros(512).bfloat16().expand(2, 2, 4, 512)), ValueError, "out: got strides [0, 0, 0, 1]"),
]

SPARSE_MISUSE = [
    (to(causal=True), ValueError, "causal: got True, need False with indices"),
    (of("indices", lambda t: t.long()), TypeError, "indices: got dtype int64, need int32"),
    (of("indices", lambda t: t[:, 0]), ValueError, "indices: got shape [2, 9], need [b=2, s_q=2, topk]"),
    (of("indices", lambda t: t[:, :1]), ValueError, "indices: got shape [2, 1, 9], need [b=2, s_q=2, topk]"),
    (of("indices", lambda t: t.abs() + 256), ValueError, "indices: got slot"),
    (of("extra_indices_in_kvcache", lambda t: t.abs() + 8), ValueError, "extra_indices_in_kvcache: got slot"),
    (of("topk_length", lambda t: t.long()), TypeError, "topk_length: got dtype int64, need int32"),
    (of("topk_length", lambda t: t[:1]), ValueError, "topk_length: got shape [1], need [b=2]"),
    (of("extra_topk_length", lambda t: t[:1]), ValueError, "extra_topk_length: got shape [1], need [b=2]"),
    (of("attn_sink", lambda t: t.half()), TypeError, "attn_sink: got dtype float16, need float32"),
    (of("attn_sink", lambda t: t[:3]), ValueError, "attn_sink: got shape [3], need [h_q=4]"),
    (to(extra_k_cache=None), ValueError, "extra_indices_in_kvcache: got Tensor, need None without extra_k_cache"),
    (to(extra_indices_in_kvcache=None), ValueError, "extra_indices_in_kvcache: got None, need [b, s_q, extra_topk]"),
    (of("extra_k_cache", lambda t: t.view(torch.uint8)[..., :200]), ValueError, "extra_k_cache: got 200 bytes"),
    (of("extra_k_cache", lambda t: t.to("meta")), ValueError, "extra_k_cache: got a tensor on meta"),
    (lambda args: {"k_cache": args["extra_k_cache"]}, ValueError, "k_cache: got 288 bytes a token (FP4_V41)"),
    (to(is_fp8_kvcache=False), TypeError, "k_cache: got dtype float8_e4m3fn"),
    (of("indices", lambda t: None), ValueError, "need None without indices (dense decode)"),
]


@pytest.mark.parametrize("warm", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize(
    ("make", "change", "error", "message"),
    [(dense_args, *row) for row in DENSE_MISUSE] + [(both_args, *row) for row in SPARSE_MISUSE],
)
def test_misuse(warm, make, change, error, message):
    args = make()
    args.setdefault("tile_scheduler_metadata", get_mla_metadata()[0])
    if warm:
        call(args)
    with pytest.raises(error, match=re.escape(message)):
        call(args | change(args))
    call(make())


def test_dense_decode_reads_no_other_quantised_format():
    gen = generator(18)
    args = dense_inputs(gen, F.NVFP4, [3]) | {"is_fp8_kvcache": True}
    with pytest.raises(ValueError, match="k_cache: got format NVFP4 without indices"):
        call(args)


def test_sparse_decode_has_one_kv_head():
    args = dense_inputs(generator(19), F.BF16, [3], h_kv=2) | {"indices": torch.zeros(1, 1, 4, dtype=torch.int32)}
    with pytest.raises(ValueError, match="k_cache: got 2 heads, need 1 with indices"):
        call(args)


def test_fp4_needs_v41_beside_it():
    args = both_args()
    args |= {"k_cache": F.BF16.pack(torch.zeros(4, 64, 1, 512)), "is_fp8_kvcache": False}
    with pytest.raises(ValueError, match="extra_k_cache: got format FP4_V41 beside a BF16 k_cache"):
        call(args)


def test_numbers_may_be_numpy_s():
    numpy = pytest.importorskip("numpy")
    args = dense_inputs(generator(22), F.BF16, [30])
    want = call(args, softmax_scale=0.125)
    named = args | {"head_dim_v": numpy.int64(512), "softmax_scale": numpy.float32(0.125)}
    got = flash_mla_with_kvcache(**named, tile_scheduler_metadata=get_mla_metadata()[0])
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    with pytest.raises(TypeError, match=r"causal: got numpy\.bool_?, need a bool"):
        call(args, causal=numpy.bool_(True))


def test_head_dim_v():
    args = dense_args()
    for bad, error in ((576, ValueError), (None, TypeError)):
        with pytest.raises(error, match="head_dim_v: got"):
            flash_mla_with_kvcache(
                args["q"], args["k_cache"], args["block_table"], args["cache_seqlens"], bad, get_mla_metadata()[0]
            )


def test_a_wild_call_leaves_out_untouched():
    args = dense_args()
    out = poisoned_out(2, 2, 4, 512, dtype=torch.bfloat16, strided=False)
    with pytest.raises(ValueError, match="cache_seqlens"):
        call(args | {"cache_seqlens": args["cache_seqlens"] + 1000}, out=out)
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("make", "other", "message"),
    [
        (dense_args, lambda: dense_inputs(generator(0), F.BF16, [70], s_q=2), "planned for b=2, but this call has b=1"),
        (dense_args, lambda: dense_inputs(generator(0), F.BF16, [70, 5], s_q=1), "s_q=2, but this call has s_q=1"),
        (dense_args, lambda: dense_inputs(generator(0), F.BF16, [70, 5], s_q=2, h_q=8), "h_q=4"),
        (dense_args, lambda: dense_inputs(generator(0), F.BF16, [9, 5], s_q=2, page_size=3), "page_block_size=64"),
        (dense_args, lambda: dense_inputs(generator(0), F.BF16, [70, 5], s_q=2, h_kv=2), "h_k=1"),
        (dense_args, lambda: dense_inputs(generator(0), F.BF16, [70, 5], s_q=2, d=512), "head_dim=576"),
        (dense_args, lambda: dense_args() | {"causal": True}, "causal=False, but this call has causal=True"),
        (dense_args, lambda: dense_args() | {"enable_batch_invariant": True}, "enable_batch_invariant=False"),
        (dense_args, fp8_args, "is_fp8_kvcache=False, but this call has is_fp8_kvcache=True"),
        (
            dense_args,
            lambda: dense_inputs(generator(0), F.FP16, [70, 5], s_q=2, dtype=torch.float16),
            "dtype=torch.bfloat16, but this call has dtype=torch.float16",
        ),
        (
            both_args,
            lambda: both_args() | {"indices": torch.zeros(2, 2, 5, dtype=torch.int32)},
            "topk=9, but this call has topk=5",
        ),
        (
            both_args,
            lambda: both_args() | {"extra_indices_in_kvcache": torch.zeros(2, 2, 5, dtype=torch.int32)},
            "extra_topk=7",
        ),
        (
            both_args,
            lambda: both_args() | {"extra_k_cache": F.FP4_V41.empty(9, 7)},
            "extra_page_block_size=2, but this call has extra_page_block_size=7",
        ),
        (
            both_args,
            lambda: both_args() | {"extra_k_cache": F.FP8_V4.empty(9, 2)},
            "extra_kv_format=",
        ),
        (both_args, lambda: both_args() | {"k_cache": F.FP8_V4.empty(4, 64)}, "FP4_V41 beside a FP8_V4"),
        (both_args, lambda: both_args() | {"topk_length": None}, "has_topk_length=True"),
        (both_args, lambda: both_args() | {"extra_topk_length": None}, "has_extra_topk_length=True"),
    ],
)
def test_metadata_of_another_configuration(make, other, message):
    meta, _ = get_mla_metadata()
    call(make(), tile_scheduler_metadata=meta)
    with pytest.raises(ValueError, match=re.escape(message)):
        call(other(), tile_scheduler_metadata=meta)
    call(make(), tile_scheduler_metadata=meta)
