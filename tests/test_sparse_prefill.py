"""flash_mla_sparse_fwd on CPU tensors against the reference, on inputs whose unused parts are poisoned."""

from __future__ import annotations

import math
import re

import pytest
import torch
from helpers import SKIPPED, assert_close, assert_close_lse, assert_close_out, poisoned_out, randn, spread
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_mla import flash_mla_sparse_fwd, reference
from flash_mla.backends.cpu import attention

SINKS = [-math.inf, math.inf, -100.0, 100.0, 0.0, 1.5]


def inputs(
    seed: int,
    s_q: int = 3,
    s_kv: int = 50,
    topk: int = 20,
    h_q: int = 4,
    d: int = 576,
    dtype: torch.dtype = torch.bfloat16,
    lengths: list[int] | None = None,
) -> dict:
    """A third of the rows of kv are NaN: no index names them, but for the entries beyond `lengths`."""
    gen = torch.Generator().manual_seed(seed)
    kv = randn(gen, s_kv, 1, d, dtype=dtype)
    unused = torch.arange(s_kv) % 3 == 1
    kv[unused] = math.nan
    skipped = torch.tensor([*SKIPPED, s_kv, s_kv + 1, 2**31 - 1])
    names = torch.cat([torch.nonzero(~unused)[:, 0].repeat(len(skipped)), skipped.repeat(1 + s_kv // 8)])
    indices = names[torch.randint(len(names), (s_q, 1, topk), generator=gen)]
    args = {"q": randn(gen, s_q, h_q, d, dtype=dtype), "kv": kv, "sm_scale": d**-0.5}
    if lengths is not None:
        args["topk_length"] = torch.tensor(lengths, dtype=torch.int32)
        ignored = torch.arange(topk) >= args["topk_length"][:, None, None]
        indices[ignored] = torch.randint(s_kv + 1, (int(ignored.sum()),), generator=gen) // 3 * 3 + 1
    return args | {"indices": indices.int()}


def check(args: dict, out: torch.Tensor | None = None) -> None:
    got, max_logits, lse = flash_mla_sparse_fwd(**args, out=out)
    assert out is None or got is out
    assert got.dtype == args["q"].dtype
    assert max_logits.dtype == torch.float32
    ref, ref_max_logits, ref_lse = reference.sparse_prefill(**args)
    assert_close_out(got, ref, cos=7e-6)
    assert_close("max_logits", max_logits, ref_max_logits, atol=1e-6, rtol=2 / 65536, cos=1e-7)
    assert_close_lse(lse, ref_lse, rtol=2 / 65536)


@st.composite
def cases(draw):
    s_q, topk = draw(st.integers(1, 5)), draw(st.sampled_from([0, 1, 7, 64, 130]))
    args = inputs(
        draw(st.integers(0, 2**32)),
        s_q=s_q,
        s_kv=draw(st.sampled_from([0, 1, 2, 33, 200])),
        topk=topk,
        h_q=draw(st.sampled_from([1, 3, 16])),
        d=draw(st.sampled_from([576, 512])),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16])),
        lengths=draw(st.none() | st.lists(st.integers(0, topk + 3), min_size=s_q, max_size=s_q)),
    )
    if draw(st.booleans()):
        args |= {name: spread(args[name]) for name in ("q", "kv", "indices")}
    if draw(st.booleans()):
        args["attn_sink"] = torch.tensor([draw(st.sampled_from(SINKS)) for _ in range(args["q"].shape[1])])
    if draw(st.booleans()):
        args["sm_scale"] = draw(st.sampled_from([0.5, 1, -0.1]))
    return args, draw(st.sampled_from(["new", "given", "strided"]))


@settings(max_examples=250, deadline=None)
@given(cases())
def test_sparse_prefill(case):
    args, out = case
    shape = (*args["q"].shape[:2], 512)
    check(args, None if out == "new" else poisoned_out(*shape, dtype=args["q"].dtype, strided=out == "strided"))


@pytest.mark.parametrize("keys", [1, 8, 61])
def test_any_chunk_of_keys_gives_the_same(monkeypatch, keys):
    monkeypatch.setattr(attention, "MAX_KEYS_PER_CHUNK", keys)
    monkeypatch.setattr(attention, "MIN_KEYS_PER_CHUNK", 1)
    check(inputs(keys, s_kv=300, topk=190, lengths=[190, 61, 0]))


def test_rows_without_a_valid_index_see_nothing():
    args = inputs(1, s_q=2, s_kv=9, topk=3)
    args["indices"][0] = torch.tensor([-1, 9, 2**31 - 1])
    args["attn_sink"] = torch.tensor([-math.inf, 0.0, 5.0, math.inf])
    out = poisoned_out(2, 4, 512, dtype=torch.bfloat16, strided=True)
    out, max_logits, lse = flash_mla_sparse_fwd(**args, out=out)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert torch.equal(max_logits[0], torch.full_like(lse[0], -math.inf))
    assert torch.equal(lse[0], torch.full_like(lse[0], math.inf))


def test_huge_logits():
    args = inputs(2, s_kv=200, topk=90) | {"sm_scale": 30.0}
    args["q"] *= 40
    _, max_logits, _ = flash_mla_sparse_fwd(**args)
    assert max_logits.max() > 20_000
    check(args)


def test_repeats_count_and_bits_repeat():
    args = inputs(3, s_q=1, topk=8)
    args["indices"][:] = 3
    out, max_logits, lse = flash_mla_sparse_fwd(**args)
    torch.testing.assert_close(lse, max_logits + math.log(8))
    assert all(torch.equal(a, b) for a, b in zip((out, max_logits, lse), flash_mla_sparse_fwd(**args), strict=True))


def test_no_query_tokens():
    out, max_logits, lse = flash_mla_sparse_fwd(**inputs(4, s_q=0))
    assert out.shape == (0, 4, 512)
    assert max_logits.shape == lse.shape == (0, 4)


def to(**values):
    """Arguments replaced."""
    return lambda args: values


def of(name, change):
    """A change of one argument, made from its value."""
    return lambda args: {name: change(args[name])}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (of("q", lambda q: q.float()), TypeError, "q: got dtype float32, need bfloat16 or float16"),
        (of("q", lambda q: q[None]), ValueError, "q: got shape [1, 3, 4, 576], need [s_q, h_q, d]"),
        (of("q", lambda q: q[..., :192]), ValueError, "q: got head dim 192, need 576 or 512"),
        (of("q", lambda q: q[:, :0]), ValueError, "q: got 0 heads"),
        (of("kv", lambda kv: kv.half()), TypeError, "kv: got dtype float16, need bfloat16"),
        (of("kv", lambda kv: kv[:, 0]), ValueError, "kv: got shape [50, 576], need [s_kv, h_kv=1, d=576]"),
        (of("kv", lambda kv: kv.expand(-1, 2, -1)), ValueError, "kv: got shape [50, 2, 576]"),
        (of("kv", lambda kv: kv.to("meta")), ValueError, "kv: got a tensor on meta, need it on cpu"),
        (of("indices", lambda t: t.long()), TypeError, "indices: got dtype int64, need int32"),
        (of("indices", lambda t: t[:, 0]), ValueError, "indices: got shape [3, 20], need [s_q=3, h_kv=1, topk]"),
        (to(indices=None), TypeError, "indices: got NoneType, need a torch.Tensor"),
        (to(sm_scale=None), TypeError, "sm_scale: got NoneType, need a float"),
        (to(sm_scale=math.inf), ValueError, "sm_scale: got inf"),
        (to(d_v=128), ValueError, "d_v: got 128, need 512"),
        (to(attn_sink=torch.zeros(5)), ValueError, "attn_sink: got shape [5], need [h_q=4]"),
        (to(attn_sink=torch.zeros(4).half()), TypeError, "attn_sink: got dtype float16, need float32"),
        (to(topk_length=torch.zeros(3)), TypeError, "topk_length: got dtype float32, need int32"),
        (to(topk_length=torch.zeros(2).int()), ValueError, "topk_length: got shape [2], need [s_q=3]"),
        (to(out=torch.zeros(3, 4, 512)), TypeError, "out: got dtype float32, need bfloat16"),
        (to(out=torch.zeros(3, 4, 576).bfloat16()), ValueError, "out: got shape [3, 4, 576]"),
        (to(out=torch.zeros(512).bfloat16().expand(3, 4, 512)), ValueError, "out: got strides [0, 0, 1]"),
    ],
)
def test_misuse(change, error, message):
    args = inputs(5)
    with pytest.raises(error, match=re.escape(message)):
        flash_mla_sparse_fwd(**args | change(args))
