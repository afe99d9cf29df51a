"""KV tiles in Triton hold exactly what `KVCacheFormat.unpack` says, for any bytes a cache may hold."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton_device import DEVICE

from flash_mla import KVCacheFormat
from flash_mla.backends.triton.dequant import FORMAT_NUMBER, NOPE, load_nope, load_rope, token_offsets

TOKENS = 32


@triton.jit
def _unpack_kernel(
    cache_ptr, slots_ptr, out_ptr, page_stride, token_stride,
    FORMAT: tl.constexpr, PAGE_SIZE: tl.constexpr, COLUMNS: tl.constexpr, D_ROPE: tl.constexpr, HAS_FP8: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """out [TOKENS, 512 + D_ROPE] fp32: nope, then rope."""
    token = tl.arange(0, TOKENS)
    slots = tl.load(slots_ptr + token)
    seen = slots >= 0
    first, scales = token_offsets(slots // PAGE_SIZE, slots % PAGE_SIZE, page_stride, token_stride, FORMAT, PAGE_SIZE)
    nope = load_nope(cache_ptr, first, scales, seen, FORMAT, COLUMNS, HAS_FP8, tl.float32)
    rows = out_ptr + token[:, None] * (NOPE + D_ROPE)
    tl.store(rows + tl.arange(0, NOPE)[None, :], nope)
    rope = load_rope(cache_ptr, first, seen, FORMAT, COLUMNS, D_ROPE, HAS_FP8, tl.float32)
    if D_ROPE > 0:
        tl.store(rows + NOPE + tl.arange(0, D_ROPE)[None, :], rope)


def random_bytes(kv_format: KVCacheFormat, num_pages: int, page_size: int) -> torch.Tensor:
    """A cache of random bytes, NaN codes and scales included."""
    cache = kv_format.empty(num_pages, page_size)
    raw = cache.view(torch.uint8)
    raw.as_strided((raw.untyped_storage().nbytes(),), (1,), 0).random_(256)
    return cache


# The interpreter does not know the NaN of e4m3.
@pytest.mark.parametrize("has_fp8", [False] if DEVICE == "cpu" else [False, True])
@pytest.mark.parametrize("page_size", [1, 5, 64])
@pytest.mark.parametrize("kv_format", [one for one in KVCacheFormat if one.is_quantised])
def test_every_value_is_exact(kv_format, page_size, has_fp8):
    cache = random_bytes(kv_format, 7, page_size)
    slots = torch.randint(7 * page_size, (TOKENS,), dtype=torch.int32)
    slots[::5] = -1
    d = kv_format.head_dims[0]
    splits = [(512, d - 512)] if kv_format is not KVCacheFormat.FP8_V4 else [(448, 64)]
    if kv_format is KVCacheFormat.FP8_V41:
        splits.append((448, 64))  # as it is read beside FP8_V4
    want = kv_format.unpack(cache).flatten(0, 2)[slots.clamp(min=0).long()].masked_fill((slots < 0)[:, None], 0.0)
    on_device = torch.empty_strided(cache.shape, cache.stride(), dtype=torch.uint8, device=DEVICE)
    on_device.copy_(cache.view(torch.uint8))
    for columns, d_rope in splits:
        got = torch.full((TOKENS, 512 + d_rope), torch.nan, device=DEVICE)
        _unpack_kernel[(1,)](
            on_device, slots.to(DEVICE), got, cache.stride(0), cache.stride(1), FORMAT=FORMAT_NUMBER[kv_format],
            PAGE_SIZE=page_size, COLUMNS=columns, D_ROPE=d_rope, HAS_FP8=has_fp8, TOKENS=TOKENS,
        )  # fmt: skip
        got = got.cpu()
        assert (got[:, columns:512] == 0).all()
        values = torch.cat([got[:, :columns], got[:, 512:]], 1)
        torch.testing.assert_close(values, want, rtol=0, atol=0, equal_nan=True)
