"""The KV cache of a small server: requests come, grow and go; their tokens lie in pages that they need not share."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from flash_mla import checks
from flash_mla.kv_cache import KVCacheFormat

__all__ = ["OutOfPages", "PagedKVCache"]


class OutOfPages(RuntimeError):
    """The cache has too few free pages for what was asked; nothing was changed."""


@dataclass
class _Request:
    pages: list[int] = field(default_factory=list)
    length: int = 0


class PagedKVCache:
    """A pool of pages, and which request holds which of them. Page numbers and lengths live on the host.

    Args:
        num_pages: pages in the pool.
        page_size: tokens in a page.
        kv_format: how tokens are stored.
        d: head dim, by default the format's first: 576, or 512 for FP8_V4 and FP8_V41.
        device: where the cache lies and the tensors that describe it are put.

    Attributes:
        cache: [num_pages, page_size, 1, bytes or d], the k_cache of `flash_mla_with_kvcache`.

    Raises:
        TypeError, ValueError: a size is no positive int, or the format does not exist for `d`; or the slots do not fit
            in int32, in which indices name them.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int = 64,
        kv_format: KVCacheFormat = KVCacheFormat.BF16,
        d: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_pages = checks.positive_int("num_pages", num_pages)
        self.page_size = checks.positive_int("page_size", page_size)
        if num_pages * page_size > torch.iinfo(torch.int32).max:
            raise ValueError(f"num_pages: got {num_pages} pages of {page_size} tokens, need fewer than 2^31 tokens")
        checks.instance("kv_format", kv_format, KVCacheFormat, "such as KVCacheFormat.BF16")
        self.kv_format = kv_format
        self.d = kv_format.layout(d).d
        self.cache = kv_format.empty(num_pages, page_size, self.d, device=device)
        self.device = self.cache.device
        # A stack, so that taking and giving back a page costs the same however many there are.
        self._free = list(reversed(range(num_pages)))
        self._requests: dict[Hashable, _Request] = {}

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens of one request take."""
        return -(-num_tokens // self.page_size)

    def __contains__(self, request: Hashable) -> bool:
        return request in self._requests

    def length(self, request: Hashable) -> int:
        """Tokens appended to `request`."""
        return self._get(request).length

    def allocate(self, request: Hashable, num_tokens: int = 0) -> None:
        """Admit `request`, still without tokens, and set pages aside for its first `num_tokens`.

        Raises:
            TypeError, ValueError: `num_tokens` is no int of at least 0, or the request is in the cache already.
            OutOfPages: fewer pages are free than `num_tokens` take.
        """
        if request in self._requests:
            raise ValueError(f"request: {request!r} is in the cache already")
        pages = self._peek(self.pages_for(checks.integer("num_tokens", num_tokens, least=0)))
        self._requests[request] = _Request(pages)
        self._take(len(pages))

    def append(self, requests: Sequence[Hashable], kv: torch.Tensor, counts: Sequence[int] | None = None) -> None:
        """Add tokens to the ends of `requests`, taking pages as they are needed.

        Args:
            requests: who gets tokens, each named once.
            kv: [n, d] or [n, 1, d] fp32, bf16 or fp16: the tokens of the first request, then those of the second...
            counts: how many tokens each request gets, one by default; n is their sum.

        Raises:
            KeyError: a request is not in the cache.
            TypeError, ValueError: a request comes twice, or `kv` or `counts` does not fit.
            OutOfPages: too few pages are free. No request has got anything then.
        """
        counts = [1] * len(requests) if counts is None else counts
        if len(counts) != len(requests):
            raise ValueError(f"counts: got {len(counts)} of them, need {len(requests)}, one for each request")
        counts = [checks.integer("counts", count, least=0) for count in counts]
        if isinstance(kv, torch.Tensor) and kv.dim() and len(kv) != sum(counts):
            raise ValueError(f"kv: got {len(kv)} tokens, need {sum(counts)}, the sum of counts")
        if len(set(requests)) != len(requests):
            raise ValueError("requests: got a request twice, need each once (counts says how many tokens it gets)")
        holders = [self._get(request) for request in requests]
        missing = [
            max(0, self.pages_for(holder.length + count) - len(holder.pages))
            for holder, count in zip(holders, counts, strict=True)
        ]
        fresh = self._peek(sum(missing))
        grown, first = [], 0
        for holder, count in zip(holders, missing, strict=True):
            grown.append(holder.pages + fresh[first : first + count] if count else holder.pages)
            first += count
        slots = [
            self._slot(pages, position)
            for holder, pages, count in zip(holders, grown, counts, strict=True)
            for position in range(holder.length, holder.length + count)
        ]
        # Only a write that went well changes who holds what.
        self.kv_format.append(self.cache, kv, torch.tensor(slots, dtype=torch.int64, device=self.device))
        self._take(len(fresh))
        for holder, pages, count in zip(holders, grown, counts, strict=True):
            holder.pages = pages
            holder.length += count

    def free(self, request: Hashable) -> None:
        """Forget `request` and give its pages back.

        Raises:
            KeyError: it is not in the cache.
        """
        self._free.extend(reversed(self._get(request).pages))
        del self._requests[request]

    def block_table(self, requests: Sequence[Hashable]) -> torch.Tensor:
        """[b, max_pages] int32: the pages of each request in the order of its tokens, then -1.

        Raises:
            KeyError: a request is not in the cache.
        """
        pages = [self._get(request).pages for request in requests]
        width = max(map(len, pages), default=0)
        table = [row + [-1] * (width - len(row)) for row in pages]
        return torch.tensor(table, dtype=torch.int32, device=self.device).view(len(pages), width)

    def seqlens(self, requests: Sequence[Hashable]) -> torch.Tensor:
        """[b] int32: the tokens of each request.

        Raises:
            KeyError: a request is not in the cache.
        """
        lengths = [self._get(request).length for request in requests]
        return torch.tensor(lengths, dtype=torch.int32, device=self.device)

    def slots(self, request: Hashable, positions: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """[n] int32: where the tokens at `positions` [n] of `request` lie, as the `indices` of sparse decode name them.

        `positions` comes from the host; a tensor on another device is waited for.

        Raises:
            KeyError: the request is not in the cache.
            TypeError: positions that are no whole numbers.
            ValueError: a position beyond its tokens, or negative.
        """
        holder = self._get(request)
        wanted = torch.as_tensor(positions, device="cpu")
        if wanted.is_floating_point() and wanted.numel():
            raise TypeError(f"positions: got {checks.dtype_name(wanted.dtype)}, need whole numbers")
        wanted = wanted.to(torch.int64)
        wrong = wanted[(wanted < 0) | (wanted >= holder.length)]
        if len(wrong):
            raise ValueError(f"positions: got {int(wrong[0])}, need 0 to {holder.length - 1}, tokens of {request!r}")
        pages = torch.tensor(holder.pages, dtype=torch.int64, device="cpu")
        slots = pages[wanted // self.page_size] * self.page_size + wanted % self.page_size
        return slots.to(self.device, torch.int32)

    def _slot(self, pages: list[int], position: int) -> int:
        return pages[position // self.page_size] * self.page_size + position % self.page_size

    def _get(self, request: Hashable) -> _Request:
        if request not in self._requests:
            raise KeyError(f"request: {request!r} is not in the cache")
        return self._requests[request]

    def _peek(self, count: int) -> list[int]:
        """The `count` pages to be taken next."""
        if count > len(self._free):
            raise OutOfPages(f"{count} more pages of {self.page_size} tokens are needed, {len(self._free)} are free")
        return self._free[len(self._free) - count :][::-1]

    def _take(self, count: int) -> None:
        del self._free[len(self._free) - count :]
