"""Token-sparse decode and prefill in Triton, in the interpreter or on a GPU, against the fp32 reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from helpers import assert_close, assert_close_lse, assert_close_out, poisoned_out, randn, sparse_scope, spread
from triton_device import DEVICE

from flash_mla import (
    FlashMLASchedMeta,
    KVCacheFormat,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    reference,
    selfcheck,
)
from flash_mla.backends.triton import launch
from flash_mla.backends.triton.heuristics import gpu_of_arch

V32, V4, V41, FP4 = KVCacheFormat.FP8_V32, KVCacheFormat.FP8_V4, KVCacheFormat.FP8_V41, KVCacheFormat.FP4_V41
FORMATS = [one for one in KVCacheFormat if one is not FP4]
PAIRS = [(V4, V4), (V4, V41), (V41, V4), (V41, FP4), (KVCacheFormat.FP16, V4), (V41, KVCacheFormat.FP16)]


@pytest.fixture(autouse=True)
def force_triton(monkeypatch):
    monkeypatch.setenv("FLASH_MLA_BACKEND", "triton")


def there(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A copy on the device, of the same strides."""
    if tensor is None:
        return None
    bytes_of = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    copy = torch.empty_strided(bytes_of.shape, bytes_of.stride(), dtype=bytes_of.dtype, device=DEVICE)
    return copy.copy_(bytes_of).view(tensor.dtype)


def decode_inputs(generator, kv_format, extra_format, *, s_q, h_q, topk, lengths, extra_lengths, page_size=64):
    """Arguments of a sparse call of three requests; q is float16, in which probabilities lose little."""
    d = kv_format.head_dims[-1] if extra_format else kv_format.head_dims[0]
    main = sparse_scope(generator, kv_format, 3, s_q, topk, page_size=page_size, d=d, lengths=lengths)
    inputs = {
        "q": randn(generator, 3, s_q, h_q, d, dtype=torch.float16),
        "k_cache": main.cache,
        "indices": main.indices,
        "topk_length": main.topk_length,
        "attn_sink": torch.randn(h_q, generator=generator) * 3,
    }
    if extra_format is not None:
        extra = sparse_scope(generator, extra_format, 3, s_q, 40, page_size=2, num_pages=30, d=d, lengths=extra_lengths)
        inputs["extra_k_cache"] = extra.cache
        inputs["extra_indices_in_kvcache"] = extra.indices
        inputs["extra_topk_length"] = extra.topk_length
    return inputs


def run(inputs, meta=None, **options):
    return flash_mla_with_kvcache(
        **{name: there(tensor) for name, tensor in inputs.items()}, block_table=None, cache_seqlens=None,
        head_dim_v=512, tile_scheduler_metadata=meta or FlashMLASchedMeta(),
        is_fp8_kvcache=inputs["k_cache"].element_size() == 1, **options,
    )  # fmt: skip


def expected(inputs):
    is_fp8 = inputs["k_cache"].element_size() == 1
    return reference.decode(**inputs, block_table=None, cache_seqlens=None, head_dim_v=512, is_fp8_kvcache=is_fp8)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_every_format_of_decode(generator, kv_format):
    for h_q, lengths in ((3, None), (36, [0, 128, 33])):
        _, check = selfcheck._sparse_decode(
            torch.device(DEVICE), generator, kv_format, None, kv_format.head_dims[0], h_q=h_q, s_q=2, lengths=lengths
        )
        for result in check():
            assert result.is_right, f"{result.name} is off by {result.error}"


def test_as_many_rows_at_a_time_as_hopper_multiplies(generator, monkeypatch):
    monkeypatch.setattr(launch, "gpu_of", lambda device: gpu_of_arch(9, 0, num_sms=2))
    _, check = selfcheck._sparse_decode(
        torch.device(DEVICE), generator, KVCacheFormat.FP16, None, 576, h_q=70, s_q=2, lengths=[0, 128, 33]
    )
    for result in check():
        assert result.is_right, f"{result.name} is off by {result.error}"


@pytest.mark.parametrize(("kv_format", "extra_format"), PAIRS)
@pytest.mark.parametrize("lengths", [None, [0, 1, 70]])
def test_a_second_cache(generator, kv_format, extra_format, lengths):
    extra_lengths = None if lengths is None else [0, 40, 9]
    inputs = decode_inputs(
        generator, kv_format, extra_format, s_q=1, h_q=2, topk=70, lengths=lengths, extra_lengths=extra_lengths
    )
    out, lse = run(inputs)
    want, want_lse = expected(inputs)
    assert_close_out(out, want)
    assert_close_lse(lse, want_lse)


@pytest.mark.parametrize("page_size", [1, 2, 17])
@pytest.mark.parametrize("kv_format", [V32, V4])
def test_pages_of_any_size_and_slots_beyond_the_cache(generator, kv_format, page_size):
    inputs = decode_inputs(
        generator, kv_format, None, s_q=1, h_q=2, topk=5, lengths=None, extra_lengths=None, page_size=page_size
    )
    want, want_lse = expected(inputs)
    beyond = inputs["k_cache"].shape[0] * page_size
    wrong = torch.tensor([beyond, 2**31 - 1, -(2**31)], dtype=torch.int32).expand(3, 1, 3)
    inputs["indices"] = torch.cat([inputs["indices"], wrong], -1)  # names nothing: skipped, not read
    out, lse = run(inputs)
    assert_close_out(out, want)
    assert_close_lse(lse, want_lse)


def test_split_indices_and_batch_invariance(generator):
    inputs = decode_inputs(
        generator, V32, None, s_q=1, h_q=2, topk=1500, lengths=[1500, 3, 700], extra_lengths=None, page_size=16
    )
    meta = FlashMLASchedMeta()
    out, lse = run(inputs, meta, enable_batch_invariant=True)
    assert int(meta.num_splits[-1]) > 3
    want, want_lse = expected(inputs)
    assert_close_out(out, want)
    assert_close_lse(lse, want_lse)
    shared = ("k_cache", "attn_sink")
    for i in range(3):
        part = {name: tensor if name in shared else tensor[i : i + 1] for name, tensor in inputs.items()}
        alone, lse_alone = run(part, enable_batch_invariant=True)
        assert torch.equal(alone[0], out[i])
        assert torch.equal(lse_alone[0], lse[i])


def test_no_indices_at_all(generator):
    inputs = decode_inputs(generator, V41, None, s_q=2, h_q=3, topk=0, lengths=None, extra_lengths=None)
    out, lse = run(inputs)
    assert (out == 0).all()
    assert (lse == torch.inf).all()


@pytest.mark.parametrize(("d", "h_q", "dtype"), [(576, 5, torch.bfloat16), (512, 40, torch.float16)])
def test_prefill(generator, d, h_q, dtype):
    _, check = selfcheck._sparse_prefill(torch.device(DEVICE), generator, d, h_q=h_q, dtype=dtype)
    for result in check():
        assert result.is_right, f"{result.name} is off by {result.error}"


@pytest.mark.parametrize("topk", [0, 1, 33, 900])
def test_prefill_of_one_token_splits_its_indices(generator, topk):
    q = randn(generator, 1, 2, 576, dtype=torch.float16)
    kv = randn(generator, 77, 1, 576, dtype=torch.float16)
    kv[50:] = torch.nan
    indices = torch.randint(-5, 50, (1, 1, topk), generator=generator, dtype=torch.int32)
    sink = torch.tensor([-torch.inf, 2.0])
    out = poisoned_out(1, 2, 512, dtype=torch.float16, strided=True).to(DEVICE)
    got = flash_mla_sparse_fwd(
        spread(q).to(DEVICE), kv.to(DEVICE), indices.to(DEVICE), 0.05, attn_sink=sink.to(DEVICE), out=out
    )
    want = reference.sparse_prefill(q, kv, indices, 0.05, 512, sink)
    assert got[0] is out
    assert_close_out(out, want[0], cos=7e-6)
    assert_close("max_logits", got[1], want[1], atol=1e-6, rtol=2 / 65536, cos=1e-7)
    assert_close_lse(got[2], want[2], rtol=2 / 65536)
