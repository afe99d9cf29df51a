"""What tests of different backends share: tolerances, and inputs whose every unused byte is poisoned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from flash_mla import KVCacheFormat

NAN_BYTE = 0xFF  # a NaN in bfloat16, float16, float32, e4m3 and e8m0 when repeated
GARBAGE_PAGES = (2**31 - 1, -5, -(2**31), 1 << 20)
SKIPPED = (-1, -7, -(2**31))


def assert_close(name: str, got: torch.Tensor, want: torch.Tensor, *, atol: float, rtol: float, cos: float) -> None:
    """No NaN, the same infinities, each error < atol or relatively < rtol, and a cosine difference < cos."""
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert not want.isnan().any(), f"{name}: the reference has {int(want.isnan().sum())} NaNs"
    assert not got.isnan().any(), f"{name}: {int(got.isnan().sum())} of {got.numel()} values are NaN"
    assert torch.equal(got.isinf() * got.sign(), want.isinf() * want.sign()), f"{name}: infinities differ"
    got, want = got[got.isfinite()], want[want.isfinite()]
    error = (got - want).abs()
    wrong = (error >= atol) & (error >= rtol * want.abs())
    assert not wrong.any(), (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} values are off, by up to {float(error.max()):.3g} "
        f"(tolerance {atol:.3g} absolute or {rtol:.3g} relative)"
    )
    norm = float((got * got + want * want).sum())
    if norm > 1e-12:
        difference = 1 - 2 * float((got * want).sum()) / norm
        assert difference < cos, f"{name}: cosine difference {difference:.3g}, tolerance {cos:.3g}"


def assert_close_out(out: torch.Tensor, ref: torch.Tensor, *, cos: float = 5e-6) -> None:
    assert_close("out", out, ref, atol=8e-4, rtol=2 / 128, cos=cos)


def assert_close_lse(lse: torch.Tensor, ref: torch.Tensor, *, rtol: float = 8 / 65536) -> None:
    assert lse.dtype == torch.float32
    assert_close("lse", lse, ref, atol=1e-6, rtol=rtol, cos=1e-7)


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normal numbers, rounded to multiples of 1/8 so that fp32 dot products are exact in any order of summation.

    Absolute tolerances of lse and max_logits then hold for large scores that happen to cancel, too.
    """
    return (torch.randn(*shape, generator=generator).clamp(-4, 4) * 8).round().div(8).to(dtype)


def one_key_leads_(q: torch.Tensor, k: torch.Tensor) -> None:
    """Change [tokens, heads, d] in place, so that of any keys one's score leads by far, the same one for every query.

    In scores of a million, fp32 keeps no fraction to tell which share of the softmax each of two close keys gets.
    """
    q.abs_()
    lengths = torch.linspace(0.5, 1, len(k))[torch.randperm(len(k))]
    k.copy_(k[:1].abs() * lengths.to(k.device)[:, None, None])


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, dense in the last dimension alone, with NaN (integers: garbage) in between."""
    sizes = [size + 1 for size in tensor.shape[:-1]] + [tensor.shape[-1] + 8]
    filler = math.nan if tensor.is_floating_point() else GARBAGE_PAGES[0]
    room = torch.full(sizes, filler, dtype=tensor.dtype, device=tensor.device)
    for dim in range(tensor.dim() - 1):
        room = room.narrow(dim, 1, tensor.shape[dim])
    return room[..., 8:].copy_(tensor)


def poisoned_out(*shape: int, dtype: torch.dtype, strided: bool) -> torch.Tensor:
    out = torch.full(shape, math.nan, dtype=dtype)
    return spread(out) if strided else out


def poisoned_cache(kv_format: KVCacheFormat, num_pages: int, page_size: int, d: int, *, h_kv: int = 1) -> torch.Tensor:
    """A cache of NaNs in every byte, in every second page of a larger one so that its pages lie apart."""
    if h_kv > 1:
        return torch.full((2 * num_pages, page_size, h_kv, d), math.nan, dtype=kv_format.dtype)[::2]
    cache = kv_format.empty(2 * num_pages, page_size, d)
    raw = cache.view(torch.uint8)
    raw.as_strided((raw.untyped_storage().nbytes(),), (1,), 0).fill_(NAN_BYTE)
    return cache[::2]


def write(kv_format: KVCacheFormat, cache: torch.Tensor, slots: torch.Tensor, generator: torch.Generator) -> None:
    """Random tokens at `slots`."""
    _, page_size, h_kv, last = cache.shape
    if h_kv > 1:
        cache[slots // page_size, slots % page_size] = randn(generator, len(slots), h_kv, last, dtype=cache.dtype)
        return
    d = last if not kv_format.is_quantised else kv_format.head_dims[0]
    kv_format.append(cache, randn(generator, len(slots), d), slots)


def dense_inputs(
    generator: torch.Generator,
    kv_format: KVCacheFormat,
    seqlens: list[int],
    *,
    page_size: int = 64,
    s_q: int = 1,
    h_q: int = 4,
    h_kv: int = 1,
    d: int = 576,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, torch.Tensor]:
    """q, k_cache, block_table and cache_seqlens of requests whose pages lie scattered among NaNs.

    The block table has garbage beyond each request's pages, the last page of a request NaNs beyond its length.
    """
    counts = [-(-seqlen // page_size) for seqlen in seqlens]
    num_pages = sum(counts) + 2
    cache = poisoned_cache(kv_format, num_pages, page_size, d, h_kv=h_kv)
    order = torch.randperm(num_pages, generator=generator)
    table = torch.empty(len(seqlens), max(counts, default=0) + 1, dtype=torch.int32)
    for i in range(table.numel()):
        table.view(-1)[i] = GARBAGE_PAGES[i % len(GARBAGE_PAGES)]
    first = 0
    for i, (seqlen, count) in enumerate(zip(seqlens, counts, strict=True)):
        pages = order[first : first + count]
        table[i, :count] = pages
        token = torch.arange(seqlen)
        write(kv_format, cache, pages[token // page_size] * page_size + token % page_size, generator)
        first += count
    return {
        "q": randn(generator, len(seqlens), s_q, h_q, d, dtype=dtype),
        "k_cache": cache,
        "block_table": table,
        "cache_seqlens": torch.tensor(seqlens, dtype=torch.int32),
    }


@dataclass
class Scope:
    """A cache and indices into it, as sparse calls take them."""

    cache: torch.Tensor
    indices: torch.Tensor
    topk_length: torch.Tensor | None


def sparse_scope(
    generator: torch.Generator,
    kv_format: KVCacheFormat,
    b: int,
    s_q: int,
    topk: int,
    *,
    page_size: int = 64,
    num_pages: int = 4,
    d: int = 576,
    lengths: list[int] | None = None,
) -> Scope:
    """Indices that name some slots of the cache, repeatedly, or are to be skipped.

    The other slots, which the entries beyond `lengths` name, hold NaNs.
    """
    cache = poisoned_cache(kv_format, num_pages, page_size, d)
    slots = torch.randperm(num_pages * page_size, generator=generator)
    written, unwritten = slots[: max(1, len(slots) * 3 // 4)], slots[max(1, len(slots) * 3 // 4) :]
    write(kv_format, cache, written, generator)
    indices = written[torch.randint(len(written), (b, s_q, topk), generator=generator)]
    skipped = torch.rand(indices.shape, generator=generator) < 0.2
    indices[skipped] = torch.tensor(SKIPPED)[torch.randint(len(SKIPPED), (int(skipped.sum()),), generator=generator)]
    if lengths is None:
        return Scope(cache, indices.int(), None)
    never = torch.cat([unwritten, torch.tensor([2**31 - 1])])
    ignored = (torch.arange(topk) >= torch.tensor(lengths)[:, None, None]).expand_as(indices)
    indices[ignored] = never[torch.randint(len(never), (int(ignored.sum()),), generator=generator)]
    return Scope(cache, indices.int(), torch.tensor(lengths, dtype=torch.int32))
