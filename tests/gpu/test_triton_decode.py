"""The Triton backend where its kernels are compiled: sizes and graphs that an interpreter cannot have."""

import pytest
import torch
from helpers import assert_close_lse, assert_close_out

from flash_mla import KVCacheFormat, flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata, reference
from flash_mla.selfcheck import run_checks

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def force_triton(monkeypatch):
    monkeypatch.setenv("FLASH_MLA_BACKEND", "triton")


def latents(*shape, dtype=torch.bfloat16):
    """Of deviation 0.1, in steps of 1/64: fp32 dot products of them are exact in any order."""
    return torch.randn(*shape, device="cuda").div_(10).clamp_(-1, 1).mul_(64).round_().div_(64).to(dtype)


def test_no_mode_is_wrong():
    rows = [row for row in run_checks(torch.device("cuda"), 7) if "kernel" not in row.mode]
    assert [row for row in rows if row.verdict != "ok"] == []
    assert {row.backend for row in rows} == {"triton"}


def test_sparse_graph_replay_reads_lengths_and_indices_again():
    cache = KVCacheFormat.FP8_V32.pack(latents(64, 64, 1, 576))
    q = latents(3, 2, 128, 576) * 8
    indices = torch.randint(64 * 64, (3, 2, 300), dtype=torch.int32, device="cuda")
    lengths = torch.tensor([300, 0, 7], dtype=torch.int32, device="cuda")
    inputs = {"q": q, "k_cache": cache, "indices": indices, "topk_length": lengths, "is_fp8_kvcache": True}
    rest = {"block_table": None, "cache_seqlens": None, "head_dim_v": 512}
    flash_mla_with_kvcache(**inputs, **rest, tile_scheduler_metadata=get_mla_metadata()[0])
    meta = get_mla_metadata()[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flash_mla_with_kvcache(**inputs, **rest, tile_scheduler_metadata=meta)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        lengths.copy_(torch.randint(0, 301, (3,), generator=generator))
        indices.copy_(torch.randint(-20, 64 * 64, indices.shape, generator=generator))
        out.fill_(torch.nan)
        graph.replay()
        want, want_lse = reference.decode(**inputs, **rest)
        assert_close_out(out, want)
        assert_close_lse(lse, want_lse)


@pytest.mark.parametrize("kv_format", [KVCacheFormat.BF16, KVCacheFormat.FP8_V32])
def test_a_cache_beyond_the_reach_of_32_bits(kv_format):
    num_pages, used = (1 << 31) // (64 * 576) + 100, 40
    shape, stride = (num_pages, 64, 1), kv_format.empty(1, 64, 576).stride()
    cache = torch.empty((*shape, kv_format.empty(0, 64, 576).shape[-1]), dtype=kv_format.dtype, device="cuda")
    assert cache.stride() == stride
    cache[-used:] = kv_format.pack(latents(used, 64, 1, 576))
    slots = torch.arange((num_pages - used) * 64, num_pages * 64, dtype=torch.int32, device="cuda")
    indices = slots[torch.randperm(len(slots), device="cuda")[:400]].view(2, 1, 200)
    q = latents(2, 1, 16, 576) * 8
    options = {"head_dim_v": 512, "is_fp8_kvcache": kv_format.is_quantised}
    out, lse = flash_mla_with_kvcache(q, cache, None, None, 512, get_mla_metadata()[0], indices=indices,
                                      is_fp8_kvcache=kv_format.is_quantised)  # fmt: skip
    local = indices - (num_pages - used) * 64
    want, want_lse = reference.decode(q, cache[-used:], None, None, indices=local, **options)
    assert_close_out(out, want)
    assert_close_lse(lse, want_lse)
    table = torch.arange(num_pages - used, num_pages, dtype=torch.int32, device="cuda").view(2, -1)
    lengths = torch.tensor([900, 1280], dtype=torch.int32, device="cuda")
    out, lse = flash_mla_with_kvcache(
        q, cache, table, lengths, 512, get_mla_metadata()[0], is_fp8_kvcache=kv_format.is_quantised
    )
    want, want_lse = reference.decode(q, cache[-used:], table - (num_pages - used), lengths, **options)
    assert_close_out(out, want)
    assert_close_lse(lse, want_lse)


@pytest.mark.parametrize("s_q", [1, 200])
def test_prefill_beside_the_reference_on_the_gpu(s_q):
    q, kv = latents(s_q, 128, 576) * 8, latents(5000, 1, 576)
    indices = torch.randint(-300, 5000, (s_q, 1, 2048), dtype=torch.int32, device="cuda")
    out, max_logits, lse = flash_mla_sparse_fwd(q, kv, indices, 0.05)
    want = reference.sparse_prefill(q, kv, indices, 0.05)
    assert_close_out(out, want[0], cos=7e-6)
    assert_close_lse(max_logits, want[1], rtol=2 / 65536)
    assert_close_lse(lse, want[2], rtol=2 / 65536)
