"""The demo serves every format, obeys its limits, counts right, and notices wrong outputs."""

import io
import math

import pytest
import torch
from rich.console import Console

from flash_mla import demo
from flash_mla.demo import BUILT_IN, DemoOptions, Request, read_trace, run_demo
from flash_mla.kv_cache import KVCacheFormat

SERVED = [one for one in KVCacheFormat if one is not KVCacheFormat.FP4_V41]


@pytest.fixture
def trace(tmp_path):
    """Writes a trace of (context, generated) rows and returns its path."""

    def write(*rows, header="TIMESTAMP,ContextTokens,GeneratedTokens"):
        path = tmp_path / "trace.csv"
        path.write_text(
            "\n".join([header, *(f"2023-11-16 18:15:{i:02},{c},{g}" for i, (c, g) in enumerate(rows))]) + "\n"
        )
        return path

    return write


def run(**options):
    text = io.StringIO()
    result = run_demo(DemoOptions(**options), Console(file=text, width=120))
    return result, text.getvalue()


@pytest.fixture
def calls(monkeypatch):
    """Records (batch, cache_seqlens or None, valid indices or None) of each decode call."""
    seen = []
    decode = demo.flash_mla_with_kvcache

    def spy(q, k_cache, block_table, cache_seqlens, *args, indices=None, **kwargs):
        seen.append(
            (
                q.shape[0],
                None if cache_seqlens is None else cache_seqlens.tolist(),
                None if indices is None else (indices >= 0).sum(-1).flatten().tolist(),
            )
        )
        return decode(q, k_cache, block_table, cache_seqlens, *args, indices=indices, **kwargs)

    monkeypatch.setattr(demo, "flash_mla_with_kvcache", spy)
    return seen


@pytest.mark.parametrize("kv_format", SERVED, ids=lambda one: one.name)
def test_every_format_is_served_and_verified(trace, calls, kv_format):
    path = trace((5, 3), (70, 1), (1, 2), (33, 2))
    result, text = run(trace=path, kv_format=kv_format, batch=2, page_size=128, verify=1.0, seed=3)
    assert result.verified, result.verification.failures
    assert result.verification.samples == result.generated_tokens == 8
    assert (result.requests, result.finished, result.prompt_tokens) == (4, 4, 109)
    # Two at a time in order of arrival: requests 1 and 2, then 1 and 3, then 4 alone.
    lengths = [[6, 71], [7, 2], [8, 3], [34], [35]]
    sparse = kv_format not in (KVCacheFormat.BF16, KVCacheFormat.FP16, KVCacheFormat.FP8_V32)
    assert [call[2 if sparse else 1] for call in calls] == lengths
    d = kv_format.head_dims[0]
    assert result.kv_bytes_read == sum(map(sum, lengths)) * kv_format.bytes_per_token(d)
    assert result.steps == 5
    assert result.peak_tokens == 77
    assert result.peak_kv_bytes == 2 * kv_format.page_bytes(128, d)
    for words in (kv_format.name, "4 of 4", "109", "8 in 5 steps", "8 outputs, 0 wrong"):
        assert words in text


def test_requests_wait_for_pages(trace, calls):
    """The pool holds the large request or the small ones, not both, though the batch has room."""
    result, _ = run(trace=trace((60, 2), (3, 2), (3, 2), (3, 2)), batch=2, page_size=8)
    assert (result.finished, result.verified) == (4, True)
    assert [call[0] for call in calls] == [1, 1, 2, 2, 1, 1]


def test_sparse_attends_to_topk_of_a_long_context(trace, calls):
    result, _ = run(trace=trace((2100, 1), (2046, 3)), kv_format=KVCacheFormat.NVFP4, verify=1.0)
    assert result.verified, result.verification.failures
    assert [call[2] for call in calls] == [[2048, 2047], [2048], [2048]]
    assert result.kv_bytes_read == (3 * 2048 + 2047) * 352


def test_limits(trace, calls):
    path = trace(*[(4, 9)] * 5)
    result, text = run(trace=path, steps=2, max_requests=3, batch=8)
    assert (result.requests, result.finished, result.generated_tokens) == (3, 0, 6)
    assert [call[0] for call in calls] == [3, 3]
    assert "0 of 3" in text


def test_same_seed_same_outputs(trace):
    results = [run(trace=trace((9, 2)), seed=seed, verify=1.0)[0].verification.worst_error for seed in (1, 1, 2)]
    assert results[0] == results[1] != results[2]


def test_built_in_lengths_fit_a_small_machine():
    assert all(request.context > 0 and request.generated > 0 for request in BUILT_IN)
    # 2 * 128 heads * 1088 columns FLOPs for each token read: seconds at 0.1 TFLOP/s.
    assert sum(r.generated * r.total for r in BUILT_IN) * 2 * 128 * 1088 / 0.1e12 < 10


def test_verification_can_be_turned_off(trace):
    result, text = run(trace=trace((5, 2)), verify=0.0)
    assert (result.verification.samples, result.verified) == (0, True)
    assert "none" in text


@pytest.mark.parametrize("what", ["out", "out NaN", "lse", "one value", "other tokens"])
def test_wrong_outputs_are_noticed(trace, monkeypatch, what):
    decode = demo.flash_mla_with_kvcache

    def broken(q, k_cache, block_table, cache_seqlens, *args, **kwargs):
        if what == "other tokens":
            cache_seqlens = cache_seqlens - 1
        out, lse = decode(q, k_cache, block_table, cache_seqlens, *args, **kwargs)
        if what == "out":
            out = out * 1.02
        elif what == "out NaN":
            out[..., 7] = math.nan
        elif what == "lse":
            lse = lse + 1e-3 * lse.abs()
        elif what == "one value":
            out[0, 0, 100, 300] += 0.1
        return out, lse

    monkeypatch.setattr(demo, "flash_mla_with_kvcache", broken)
    result, text = run(trace=trace((40, 2)), verify=0.001)
    assert not result.verified
    assert result.verification.samples >= 1
    assert "wrong: request 1, step 1: out is off by" in text


def test_read_trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("\ufeffGeneratedTokens,extra,ContextTokens\n3,x, 70 \n\n010,,9\n", encoding="utf-8")
    assert read_trace(path) == (Request(70, 3), Request(9, 10))
    assert read_trace(path, 1) == (Request(70, 3),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: column ContextTokens: missing among no columns"),
        ("TIMESTAMP,ContextTokens\n", "line 1: column GeneratedTokens: missing among .*TIMESTAMP"),
        ("ContextTokens,GeneratedTokens\n", "line 2: no requests"),
        ("ContextTokens,GeneratedTokens\n1,2\n3,0\n", "line 3: column GeneratedTokens: got '0'"),
        ("ContextTokens,GeneratedTokens\n1.5,2\n", "line 2: column ContextTokens: got '1.5'"),
        ("ContextTokens,GeneratedTokens\n-1,2\n", "line 2: column ContextTokens: got '-1'"),
        ("ContextTokens,GeneratedTokens\n7\n", "line 2: column GeneratedTokens: got ''"),
        (f"ContextTokens,GeneratedTokens\n{'9' * 5000},1\n", "line 2: column ContextTokens: got '999"),
        (b"ContextTokens,GeneratedTokens\n\xff\xfe,1\n", "not CSV"),
    ],
)
def test_bad_traces_are_named(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"bad\.csv: .*{message}"):
        run(trace=path)


def test_missing_trace(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.csv: cannot be read: No such file"):
        run(trace=tmp_path / "nowhere.csv")


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"max_requests": 0}, ValueError, "max_requests: got 0"),
        ({"batch": -1}, ValueError, "batch: got -1"),
        ({"page_size": 1.5}, TypeError, "page_size: got float"),
        ({"steps": 0}, ValueError, "steps: got 0"),
        ({"verify": 1.5}, ValueError, "verify: got 1.5"),
        ({"kv_format": KVCacheFormat.FP4_V41}, ValueError, "kv_format: got FP4_V41"),
        ({"device": "tpu"}, ValueError, "device: got 'tpu', need cpu or cuda"),
    ],
)
def test_bad_options_are_named(option, error, message):
    with pytest.raises(error, match=message):
        run(**option)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_device_is_named():
    with pytest.raises(ValueError, match="device: got 'cuda', but torch sees no CUDA device"):
        run(device="cuda")
