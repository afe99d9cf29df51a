"""The bytes of every cache format against a scalar encoder and decoder written from the format's definition."""

import math
import struct
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_mla.kv_cache import KVCacheFormat

FORMATS = [(one, d) for one in KVCacheFormat for d in one.head_dims]
QUANTISED = [(one, d) for one, d in FORMATS if one.is_quantised]
ids = pytest.mark.parametrize(("kv_format", "d"), FORMATS, ids=lambda x: getattr(x, "name", x))
quantised_ids = pytest.mark.parametrize(("kv_format", "d"), QUANTISED, ids=lambda x: getattr(x, "name", x))

# What the definition says: (codes, group, scale number, plain values, plain number, scales last)
DEFINITION = {
    KVCacheFormat.FP8_V32: ("e4m3", 512, 128, "fp32", 64, "bf16", False),
    KVCacheFormat.FP8_V4: ("e4m3", 448, 64, "e8m0", 64, "bf16", True),
    KVCacheFormat.FP8_V41: ("e4m3", 512, 32, "e8m0", 0, "bf16", True),
    KVCacheFormat.FP4_V41: ("e2m1", 512, 16, "e4m3", 0, "bf16", True),
    KVCacheFormat.NVFP4: ("e2m1", 512, 16, "e4m3", 64, "e4m3", True),
}


def e4m3_value(code: int) -> float:
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 0xF, code & 7
    if code & 0x7F == 0x7F:
        return math.nan
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def e8m0_value(code: int) -> float:
    return math.nan if code == 255 else 2.0 ** (code - 127)


E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3_VALUES = [e4m3_value(code) for code in range(0x7F)]


def nearest_code(x: float, values: list[float]) -> int:
    return min(range(len(values)), key=lambda code: (abs(values[code] - abs(x)), code & 1))


def encode_number(x: float, number: str) -> int:
    sign = math.copysign(1.0, x) < 0
    if number == "e2m1":
        return nearest_code(x, E2M1_VALUES) | sign << 3
    if number == "e4m3":
        return nearest_code(x, E4M3_VALUES) | sign << 7
    if number == "e8m0":
        return int(math.log2(x)) + 127
    raise AssertionError(number)


def encode_bytes(values: list[float], number: str) -> bytes:
    if number == "fp32":
        return struct.pack(f"<{len(values)}f", *values)
    if number == "bf16":
        bits = struct.unpack(f"<{len(values)}I", struct.pack(f"<{len(values)}f", *values))
        return struct.pack(f"<{len(values)}H", *((one + 0x7FFF + (one >> 16 & 1)) >> 16 for one in bits))
    codes = [encode_number(x, number) for x in values]
    if number == "e2m1":
        return bytes(low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True))
    return bytes(codes)


def decode_bytes(data: bytes, number: str) -> list[float]:
    if number == "fp32":
        return list(struct.unpack(f"<{len(data) // 4}f", data))
    if number == "bf16":
        return list(
            struct.unpack(f"<{len(data) // 2}f", b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2)))
        )
    if number == "e2m1":
        codes = [code for byte in data for code in (byte & 15, byte >> 4)]
        return [math.copysign(E2M1_VALUES[code & 7], -1.0 if code & 8 else 1.0) for code in codes]
    return [{"e4m3": e4m3_value, "e8m0": e8m0_value}[number](code) for code in data]


def our_scale(group: list[float], code: str, scale: str) -> float:
    x = max(abs(one) for one in group) / {"e4m3": 448, "e2m1": 6}[code]
    x = min(max(x, 2.0**-9), 2.0**8) if scale == "e4m3" else max(x, 1e-4)
    mantissa, exponent = math.frexp(x)
    return 2.0 ** (exponent - 1 if mantissa == 0.5 else exponent)


def encode_token(kv_format: KVCacheFormat, token: list[float]) -> tuple[bytes, bytes]:
    """The token's row, and what it keeps in the page's scale rows."""
    code, d_code, group, scale, _, plain, scales_last = DEFINITION[kv_format]
    groups = [token[i : i + group] for i in range(0, d_code, group)]
    scales = [our_scale(one, code, scale) for one in groups]
    codes = encode_bytes([x / by for one, by in zip(groups, scales, strict=True) for x in one], code)
    scale_bytes, plain_bytes = encode_bytes(scales, scale), encode_bytes(token[d_code:], plain)
    if kv_format is KVCacheFormat.FP8_V4:
        return codes + plain_bytes, scale_bytes + b"\0"
    return (codes + plain_bytes + scale_bytes if scales_last else codes + scale_bytes + plain_bytes), b""


def decode_token(kv_format: KVCacheFormat, row: bytes) -> list[float]:
    """The reverse, of both rows one after the other."""
    code, d_code, group, scale, d_plain, plain, scales_last = DEFINITION[kv_format]
    code_bytes = d_code // 2 if code == "e2m1" else d_code
    scale_bytes = d_code // group * {"fp32": 4}.get(scale, 1)
    plain_bytes = d_plain * {"bf16": 2}.get(plain, 1)
    codes, rest = row[:code_bytes], row[code_bytes:]
    at = (plain_bytes, 0) if scales_last else (0, scale_bytes)
    scales = decode_bytes(rest[at[0] : at[0] + scale_bytes], scale)
    values = [x * scales[i // group] for i, x in enumerate(decode_bytes(codes, code))]
    return values + decode_bytes(rest[at[1] : at[1] + plain_bytes], plain)


def as_bytes(cache: torch.Tensor) -> torch.Tensor:
    return cache.contiguous().view(torch.uint8)


def page_bytes(cache: torch.Tensor, page: int) -> bytes:
    return bytes(as_bytes(cache[page]).flatten().tolist())


@dataclass(frozen=True)
class Hole:
    """A cache full of NaN, cut out of a larger buffer."""

    kv_format: KVCacheFormat
    d: int
    num_pages: int
    page_size: int
    dtype: torch.dtype
    before: int
    after: int
    token_gap: int
    """Elements between what belongs to the cache."""

    def make(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The cache and its buffer."""
        itemsize = self.dtype.itemsize
        width = self.kv_format.bytes_per_token(self.d) // itemsize
        page = self.page_size * (width + self.token_gap)
        shape = (self.num_pages, (self.before + page + self.after) * itemsize)
        buffer = torch.full(shape, 0xFF, dtype=torch.uint8)
        data = buffer.view(self.dtype)[:, self.before : self.before + page]
        return data.unflatten(1, (self.page_size, 1, width + self.token_gap))[..., :width], buffer


@st.composite
def holes(draw):
    kv_format, d = draw(st.sampled_from(FORMATS))
    return Hole(
        kv_format,
        d,
        num_pages=draw(st.integers(1, 4)),
        page_size=draw(st.sampled_from([1, 2, 3, 5, 16, 64])),
        dtype=draw(st.sampled_from([torch.uint8, torch.float8_e4m3fn])) if kv_format.is_quantised else kv_format.dtype,
        before=draw(st.integers(0, 9)),
        after=draw(st.integers(0, 900)),
        token_gap=0 if kv_format.is_quantised else draw(st.sampled_from([0, 1, 64])),
    )


seeds = st.integers(0, 2**32)
kv_dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def random_values(n: int, d: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """[n, d], with rows of very different magnitude and some zeros."""
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(n, d, generator=generator) * 10.0 ** torch.empty(n, 1).uniform_(-4, 2, generator=generator)
    kv[torch.rand(n, d, generator=generator) < 0.05] = 0
    return kv.to(dtype)


ONES = {
    (KVCacheFormat.BF16, 576): "803f" * 576,
    (KVCacheFormat.BF16, 512): "803f" * 512,
    (KVCacheFormat.FP16, 576): "003c" * 576,
    (KVCacheFormat.FP16, 512): "003c" * 512,
    # 1 / 448 rounds up to 2^-8: codes 256, scales 2^-8
    (KVCacheFormat.FP8_V32, 576): "78" * 512 + "0000803b" * 4 + "803f" * 64,
    (KVCacheFormat.FP8_V4, 512): "78" * 448 + "803f" * 64 + "77" * 7 + "00",
    (KVCacheFormat.FP8_V41, 512): "78" * 512 + "77" * 16,
    # 1 / 6 rounds up to 1/4: codes 4
    (KVCacheFormat.FP4_V41, 512): "66" * 256 + "28" * 32,
    (KVCacheFormat.NVFP4, 576): "66" * 256 + "38" * 64 + "28" * 32,
}


@ids
def test_bytes_of_ones(kv_format, d):
    cache = kv_format.pack(torch.ones(1, 1, 1, d))
    assert page_bytes(cache, 0).hex() == ONES[kv_format, d]
    assert torch.equal(kv_format.unpack(cache, d), torch.ones(1, 1, 1, d))


@quantised_ids
def test_bytes_written(kv_format, d):
    page_size = 2
    kv = torch.randn(2, page_size, 1, d) * torch.tensor([1e-6, 0.3, 1.0, 300.0]).view(2, 2, 1, 1)
    kv[0, 1, 0, :64] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(
        8
    )  # ties, of e2m1 with scale 1
    kv[1, 0, 0, :128] = -0.0
    cache = kv_format.pack(kv)
    for page in range(2):
        rows, scale_rows = zip(*(encode_token(kv_format, token) for token in kv[page, :, 0].tolist()), strict=True)
        assert page_bytes(cache, page) == b"".join(rows) + b"".join(scale_rows)


@quantised_ids
def test_any_bytes_are_read(kv_format, d):
    """Every code, and scales that are no powers of two."""
    page_size, nbytes = 3, kv_format.bytes_per_token()
    cache = torch.randint(0, 256, (2, page_size, 1, nbytes), dtype=torch.uint8)
    if kv_format is KVCacheFormat.FP8_V32:
        cache[..., 512:528] = torch.rand(2, page_size, 1, 4).mul(3).view(torch.uint8)
    split = 576 if kv_format is KVCacheFormat.FP8_V4 else nbytes
    expected = []
    for page in range(2):
        data = page_bytes(cache, page)
        rows, scale_rows = data[: page_size * split], data[page_size * split :]
        scale_width = nbytes - split
        for i in range(page_size):
            token = rows[i * split : (i + 1) * split] + scale_rows[i * scale_width : (i + 1) * scale_width]
            expected.append(decode_token(kv_format, token))
    expected = torch.tensor(expected, dtype=torch.float64).to(torch.float32).view(2, page_size, 1, d)
    got = kv_format.unpack(cache)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert not expected.isnan().all()


@pytest.mark.parametrize("page_size", [1, 3, 64, 256])
@ids
def test_empty(kv_format, d, page_size):
    cache = kv_format.empty(3, page_size, d)
    itemsize = cache.element_size()
    assert cache.shape == (3, page_size, 1, kv_format.bytes_per_token(d) // itemsize)
    assert cache.dtype == kv_format.dtype
    assert cache.stride(0) * itemsize == kv_format.page_bytes(page_size, d)
    if kv_format is KVCacheFormat.FP8_V4:
        assert cache.stride(0) == math.ceil(page_size * 584 / 576) * 576
    assert torch.equal(kv_format.unpack(cache, d), torch.zeros(3, page_size, 1, d))
    assert kv_format.empty(0, page_size, d).shape[0] == 0


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(0, 3), st.sampled_from([1, 2, 3, 64]), seeds, kv_dtypes)
def test_round_trip(case, num_pages, page_size, seed, dtype):
    kv_format, d = case
    kv = random_values(num_pages * page_size, d, seed, dtype).view(num_pages, page_size, 1, d)
    cache = kv_format.pack(kv)
    got, want = kv_format.unpack(cache, d), kv.float()
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    magnitude = want.abs()
    # Half a step of the mantissa, and half a step of the subnormals.
    bound = {KVCacheFormat.BF16: magnitude * 2**-8, KVCacheFormat.FP16: magnitude * 2**-11 + 2**-25}.get(kv_format)
    if bound is None:
        code, d_code, group, scale, _, plain, _ = DEFINITION[kv_format]
        largest = {"e4m3": 448, "e2m1": 6}[code]
        amax = magnitude[..., :d_code].unflatten(-1, (-1, group)).amax(-1, keepdim=True)
        low = 2**-9 if scale == "e4m3" else 1e-4
        upper_scale = (2 * (amax / largest).clamp_min(low)).expand(-1, -1, -1, -1, group).flatten(-2)
        relative, subnormal = {"e4m3": (2**-4, 2**-10), "e2m1": (0.25, 0.25)}[code]
        bound = torch.maximum(magnitude[..., :d_code] * relative, upper_scale * subnormal)
        if scale == "e4m3":
            bound = torch.where(magnitude[..., :d_code] > 6 * 256, math.inf, bound)  # saturates
        plain_magnitude = magnitude[..., d_code:]
        plain_bound = plain_magnitude * 2**-8
        if plain == "e4m3":
            plain_bound = (plain_magnitude * 2**-4).clamp_min(2**-10)
            plain_bound = torch.where(plain_magnitude > 448, plain_magnitude - 448, plain_bound)
        bound = torch.cat([bound, plain_bound], -1)
    assert ((got - want).abs() <= bound).all()
    assert torch.equal(kv_format.unpack(kv_format.pack(got), d), got)


@settings(max_examples=80, deadline=None)
@given(st.data(), holes(), seeds, kv_dtypes)
def test_append_touches_its_slots_alone(data, hole, seed, dtype):
    kv_format, d = hole.kv_format, hole.d
    cache, buffer = hole.make()
    num_slots = cache.shape[0] * cache.shape[1]
    slots = data.draw(st.lists(st.integers(0, num_slots - 1), unique=True, max_size=8))
    slots += [-1 - one for one in data.draw(st.lists(st.integers(0, 99), max_size=4))]
    slots = data.draw(st.permutations(slots))
    kv = random_values(len(slots), d, seed, dtype)
    untouched = buffer.clone()
    index = torch.tensor(slots, dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))
    kv_format.append(cache, kv.unsqueeze(1) if data.draw(st.booleans()) else kv, index)

    packed = kv_format.pack(kv.view(len(kv), 1, 1, d))
    real = [i for i, slot in enumerate(slots) if slot >= 0]
    expected = kv_format.unpack(packed, d).view(len(kv), d)[real]
    assert torch.equal(kv_format.gather(cache, index[real]), expected)
    # The bytes that changed are the tokens' own: undo them by the definition of where they lie.
    width, split = kv_format.bytes_per_token(d), 576 if kv_format is KVCacheFormat.FP8_V4 else None
    whole = buffer.flatten().clone()
    for slot in index[real].tolist():
        page, offset = divmod(slot, cache.shape[1])
        start = (cache.storage_offset() + page * cache.stride(0)) * cache.element_size()
        if split:
            spans = [(start + offset * split, split), (start + cache.shape[1] * split + offset * 8, 8)]
        else:
            spans = [(start + offset * cache.stride(1) * cache.element_size(), width)]
        for first, length in spans:
            whole[first : first + length] = 0xFF
    assert torch.equal(whole, untouched.flatten())


@ids
def test_append_writes_what_pack_writes(kv_format, d):
    kv = torch.randn(3, 4, 1, d)
    cache = kv_format.empty(3, 4, d)
    order = torch.randperm(12)
    kv_format.append(cache, kv.view(12, d)[order], order)
    assert torch.equal(as_bytes(cache), as_bytes(kv_format.pack(kv)))


@settings(max_examples=60, deadline=None)
@given(st.data(), holes(), seeds)
def test_gather_reads_its_slots_alone(data, hole, seed):
    kv_format, d = hole.kv_format, hole.d
    cache, _ = hole.make()
    num_slots = cache.shape[0] * cache.shape[1]
    slots = torch.tensor(data.draw(st.lists(st.integers(0, num_slots - 1), max_size=9)), dtype=torch.int64)
    kv_format.append(cache, random_values(len(slots.unique()), d, seed, torch.float32), slots.unique())
    got = kv_format.gather(cache, slots.to(torch.int32))
    assert got.shape == (len(slots), d)
    assert got.isfinite().all()
    assert torch.equal(got, kv_format.unpack(cache, d).view(num_slots, d)[slots])


@ids
def test_all_slots_skipped(kv_format, d):
    cache = kv_format.pack(torch.randn(2, 3, 1, d))
    before = as_bytes(cache).clone()
    kv_format.append(cache, torch.full((2, d), math.nan), torch.tensor([-1, -7]))
    kv_format.append(cache, torch.empty(0, d), torch.empty(0, dtype=torch.int32))
    assert torch.equal(as_bytes(cache), before)


@ids
def test_slots_outside_raise_and_write_nothing(kv_format, d):
    cache = kv_format.pack(torch.randn(2, 3, 1, d))
    before = as_bytes(cache).clone()
    for slot in (6, 1 << 40):
        with pytest.raises((IndexError, RuntimeError)):
            kv_format.append(cache, torch.randn(1, d), torch.tensor([slot]))
        with pytest.raises((IndexError, RuntimeError)):
            kv_format.gather(cache, torch.tensor([slot]))
    with pytest.raises((IndexError, RuntimeError)):
        kv_format.gather(cache, torch.tensor([-1]))
    assert torch.equal(as_bytes(cache), before)


@quantised_ids
def test_overflow_saturates_and_nan_stays_in_its_group(kv_format, d):
    _, d_code, group, scale, _, plain, _ = DEFINITION[kv_format]
    kv = torch.ones(1, 1, 1, d)
    kv[..., 0] = -3e38
    kv[..., group] = math.nan
    kv[..., -1] = 1e4
    got = kv_format.unpack(kv_format.pack(kv)).flatten()
    assert got[0] == (-6 * 256 if scale == "e4m3" else pytest.approx(-3e38, rel=2**-4))
    assert got[group : 2 * group].isnan().all()
    rest = got[2 * group : -group]
    assert torch.equal(rest, torch.ones_like(rest))
    if d_code < d:
        assert got[-1] == (448 if plain == "e4m3" else torch.tensor(1e4, dtype=torch.bfloat16).float())


@ids
@pytest.mark.parametrize("page_size", [1, 64])
def test_detect(kv_format, d, page_size):
    cache = kv_format.empty(2, page_size, d)
    extra = kv_format is KVCacheFormat.FP4_V41
    dtypes = (torch.uint8, torch.int8, torch.float8_e4m3fn) if kv_format.is_quantised else (kv_format.dtype,)
    for dtype in dtypes:
        found = KVCacheFormat.detect(cache.view(dtype), d, is_fp8=kv_format.is_quantised, extra=extra)
        assert found is kv_format


@pytest.mark.parametrize(
    ("cache", "d", "is_fp8", "error", "message"),
    [
        (torch.zeros(1, 2, 1, 288, dtype=torch.uint8), 512, True, ValueError, "FP4_V41.*only extra_k_cache"),
        (torch.zeros(1, 2, 1, 655, dtype=torch.uint8), 576, True, ValueError, r"655 bytes.*656 \(FP8_V32\) or 352"),
        (torch.zeros(1, 2, 1, 656, dtype=torch.uint8), 512, True, ValueError, r"584 \(FP8_V4\) or 528 \(FP8_V41\)$"),
        (torch.zeros(1, 2, 1, 656, dtype=torch.uint8), 128, True, ValueError, "d=576 or d=512"),
        (torch.zeros(1, 2, 2, 656, dtype=torch.uint8), 576, True, ValueError, "h_kv=1"),
        (torch.zeros(1, 2, 656, dtype=torch.uint8), 576, True, ValueError, "num_pages, page_size"),
        (torch.zeros(1, 2, 1, 656), 576, True, TypeError, "got dtype float32, need uint8"),
        (torch.zeros(1, 2, 1, 576, dtype=torch.bfloat16), 576, True, TypeError, "need uint8"),
        (torch.zeros(1, 2, 1, 656, dtype=torch.uint8), 576, False, TypeError, "need bfloat16 or float16"),
        (torch.zeros(1, 2, 1, 512, dtype=torch.bfloat16), 576, False, ValueError, "d=576"),
        (torch.zeros(1, 2, 1, 128, dtype=torch.bfloat16), 128, False, ValueError, "d=128, need 576 or 512"),
        (torch.zeros(1, 3, 1, 656, dtype=torch.uint8)[:, ::2], 576, True, ValueError, "must be contiguous in FP8_V32"),
        (torch.zeros(1, 2, 1, 600, dtype=torch.uint8)[..., :584], 512, True, ValueError, "token stride 600, need 584"),
        ([1], 576, True, TypeError, "got list"),
    ],
)
def test_detect_errors(cache, d, is_fp8, error, message):
    with pytest.raises(error, match=f"^the_cache: .*{message}"):
        KVCacheFormat.detect(cache, d, is_fp8=is_fp8, name="the_cache")


@pytest.mark.parametrize("kv_format", list(KVCacheFormat))
def test_nothing_is_appended_to_a_cache_without_pages(kv_format):
    cache, kv = kv_format.empty(0, 4), torch.zeros(2, kv_format.head_dims[0])
    kv_format.append(cache, kv, torch.tensor([-1, -5]))
    with pytest.raises(IndexError, match="slots: got 3 for a cache without pages"):
        kv_format.append(cache, kv, torch.tensor([-1, 3]))


def test_misuse_is_named():
    v32, cache = KVCacheFormat.FP8_V32, KVCacheFormat.FP8_V32.empty(2, 4)
    with pytest.raises(ValueError, match=r"cache: got shape .*need .*584.* for FP8_V4"):
        KVCacheFormat.FP8_V4.unpack(cache)
    with pytest.raises(ValueError, match="d: got 512, need 576 for FP8_V32"):
        v32.unpack(cache, 512)
    with pytest.raises(ValueError, match=r"cache: .*need \[num_pages, page_size, 1, 512\] for BF16"):
        KVCacheFormat.BF16.unpack(KVCacheFormat.BF16.empty(1, 1, 576), 512)
    with pytest.raises(ValueError, match="cache: got token stride"):
        v32.gather(cache[:, ::2], torch.tensor([0]))
    with pytest.raises(TypeError, match="slots: got dtype int16"):
        v32.gather(cache, torch.zeros(1, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"kv: got shape \[2, 512\], need \[n, d=576\]"):
        v32.append(cache, torch.zeros(2, 512), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"slots: got shape \[1\], need \[n=2\]"):
        v32.append(cache, torch.zeros(2, 576), torch.tensor([0]))
    with pytest.raises(ValueError, match="slots: got a tensor on meta, need it on cpu like cache"):
        v32.gather(cache, torch.tensor([0], device="meta"))
    with pytest.raises(TypeError, match="kv: got dtype int32"):
        v32.pack(torch.zeros(1, 1, 1, 576, dtype=torch.int32))
    with pytest.raises(ValueError, match="d: got 512, need 576 for FP8_V32"):
        v32.pack(torch.zeros(1, 1, 1, 512))
    with pytest.raises(ValueError, match="page_size: got 0"):
        v32.empty(1, 0)
    with pytest.raises(ValueError, match="num_pages: got -1"):
        v32.empty(-1, 1)
