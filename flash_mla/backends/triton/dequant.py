"""Tiles of KV in the dtype of q, from any cache format: the device side of the layouts in flash_mla.kv_cache.

A token is cut into `nope`, 512 columns wide, and `rope`, 64 columns or none. Both are keys. V is nope; rope belongs to
it where nope holds 448 columns only (FP8_V4, and what is attended to beside it), its other columns being 0.

GPUs before SM89 convert no 8-bit floats. Without HAS_FP8 small floats are put together from their bits: sign, exponent
and mantissa, moved to their places in a wider float, are the value but for the exponent's bias.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_mla.kv_cache import KVCacheFormat

# Kernels take a format as a number: constexpr arguments of 3.2 have no attributes.
PLAIN = tl.constexpr(0)
FP8_V32 = tl.constexpr(1)
FP8_V4 = tl.constexpr(2)
FP8_V41 = tl.constexpr(3)
FP4_V41 = tl.constexpr(4)
NVFP4 = tl.constexpr(5)

FORMAT_NUMBER = {
    KVCacheFormat.BF16: PLAIN.value,
    KVCacheFormat.FP16: PLAIN.value,
    KVCacheFormat.FP8_V32: FP8_V32.value,
    KVCacheFormat.FP8_V4: FP8_V4.value,
    KVCacheFormat.FP8_V41: FP8_V41.value,
    KVCacheFormat.FP4_V41: FP4_V41.value,
    KVCacheFormat.NVFP4: NVFP4.value,
}

NOPE = tl.constexpr(512)  # width of a nope tile
V4_DATA = tl.constexpr(576)  # bytes of a data row and of a scale row of FP8_V4, whose pages keep them apart
V4_SCALES = tl.constexpr(8)


@triton.jit
def token_offsets(page, offset, page_stride, token_stride, FORMAT: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Where the tokens at `offset` [n] of `page` [n or scalar] begin in a cache, in elements, and where their scales do
    if those lie apart (FP8_V4): int64 [n]."""
    first = page.to(tl.int64) * page_stride
    if FORMAT == FP8_V4:
        token = first + offset * V4_DATA
        scales = first + (PAGE_SIZE * V4_DATA + offset * V4_SCALES)
    else:
        token = first + offset.to(tl.int64) * token_stride
        scales = token
    return token, scales


@triton.jit
def load_nope(
    cache_ptr,
    token,
    scales,
    seen,
    FORMAT: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_FP8: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """[n, 512] of DTYPE: the first COLUMNS values of each token, 0 in the columns beyond and where not `seen` [n].

    Of FP8_V32 and plain caches all tokens are seen if `seen` is None.
    """
    ptrs = cache_ptr + token[:, None]
    if FORMAT == PLAIN:
        nope = _load(ptrs, seen, COLUMNS, NOPE)
    elif FORMAT == FP4_V41 or FORMAT == NVFP4:  # noqa: SIM109 - no `in` in device code
        pairs = _load(ptrs, seen, NOPE // 2, NOPE // 2)
        factors = e4m3_to_float(_load(ptrs + (256 if FORMAT == FP4_V41 else 320), seen, 32, 32), HAS_FP8)
        nope = _scaled(e2m1_to_float(pairs), factors, DTYPE)
    else:
        codes = _load(ptrs, seen, COLUMNS, NOPE)
        if FORMAT == FP8_V32:
            factors = _load((ptrs + 512).to(tl.pointer_type(tl.float32)), seen, 4, 4)
        elif FORMAT == FP8_V4:
            factors = e8m0_to_float(_load(cache_ptr + scales[:, None], seen, 7, 8))
        else:
            factors = e8m0_to_float(_load(ptrs + 512, seen, COLUMNS // 32, 16))
        nope = _scaled(e4m3_to_float(codes, HAS_FP8), factors, DTYPE)
    return nope


@triton.jit
def load_rope(
    cache_ptr, token, seen, FORMAT: tl.constexpr, COLUMNS: tl.constexpr, D_ROPE: tl.constexpr, HAS_FP8: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """[n, D_ROPE] of DTYPE: the values of each token behind its first COLUMNS; `seen` as for `load_nope`."""
    ptrs = cache_ptr + token[:, None]
    if D_ROPE == 0:
        rope = 0.0  # a stand-in that nobody reads
    elif FORMAT == PLAIN:
        rope = _load(ptrs + COLUMNS, seen, D_ROPE, D_ROPE)
    elif FORMAT == FP8_V41:
        codes = _load(ptrs + COLUMNS, seen, D_ROPE, D_ROPE)
        factors = e8m0_to_float(_load(ptrs + 512 + COLUMNS // 32, seen, D_ROPE // 32, D_ROPE // 32))
        rope = _scaled(e4m3_to_float(codes, HAS_FP8), factors, DTYPE)
    elif FORMAT == NVFP4:
        rope = e4m3_to_float(_load(ptrs + 256, seen, D_ROPE, D_ROPE), HAS_FP8).to(DTYPE)
    else:
        ptrs = (ptrs + (528 if FORMAT == FP8_V32 else 448)).to(tl.pointer_type(tl.bfloat16))
        rope = _load(ptrs, seen, D_ROPE, D_ROPE).to(DTYPE)
    return rope


@triton.jit
def e4m3_to_float(code, HAS_FP8: tl.constexpr):
    """uint8 codes of e4m3 as fp32."""
    if HAS_FP8:
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        bits = code.to(tl.int16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        value = tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
    return value


@triton.jit
def e8m0_to_float(code):
    """uint8 codes of e8m0, which is the exponent of fp32, as fp32; 0 is the subnormal 2^-127 and 255 is NaN."""
    exponent = code.to(tl.int32)
    bits = tl.where(exponent == 0, 0x00400000, tl.where(exponent == 0xFF, 0x7FC00000, exponent << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def e2m1_to_float(pairs):
    """uint8 [n, m] with two codes of e2m1 a byte, the low nibble first, as fp32 [n, 2 * m]."""
    bits = pairs.to(tl.int16)
    low = ((bits & 0x8) << 12) | ((bits & 0x7) << 9)
    high = ((bits & 0x80) << 8) | ((bits & 0x70) << 5)
    return tl.interleave(low, high).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def _load(ptrs, seen, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """[n, WIDTH]: the COUNT elements from each of ptrs [n, 1] on, then zeros; all zeros where not `seen` [n]."""
    columns = tl.arange(0, WIDTH)[None, :]
    if COUNT < WIDTH:
        mask = columns < COUNT
        if seen is not None:
            mask = mask & seen[:, None]
        values = tl.load(ptrs + columns, mask=mask, other=0)
    elif seen is not None:
        values = tl.load(ptrs + columns, mask=seen[:, None], other=0)
    else:
        values = tl.load(ptrs + columns)
    return values


@triton.jit
def _scaled(codes, scales, DTYPE: tl.constexpr):
    """codes [n, d] times scales [n, groups], of equally many codes each."""
    GROUP: tl.constexpr = codes.shape[1] // scales.shape[1]
    groups = tl.reshape(codes, [codes.shape[0], scales.shape[1], GROUP]) * scales[:, :, None]
    return tl.reshape(groups.to(DTYPE), [codes.shape[0], codes.shape[1]])
