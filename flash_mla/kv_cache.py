"""Paged KV caches of MLA latents: where every byte of a token lies, and how values get in and out.

A cache is a tensor [num_pages, page_size, 1, bytes] (BF16 and FP16: [num_pages, page_size, 1, d]). A token's place in
it is its slot: page * page_size + offset. Nothing here synchronises a device, so all of it can be captured in a CUDA
graph.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Literal

import torch

from flash_mla import checks
from flash_mla.small_floats import Number, power_of_two_at_least

__all__ = ["Field", "KVCacheFormat", "Layout"]

QUANTISED_DTYPES = (torch.uint8, torch.float8_e4m3fn, torch.int8)
KV_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SLOT_DTYPES = (torch.int32, torch.int64)

Role = Literal["code", "scale", "plain", "pad"]


@dataclass(frozen=True)
class Field:
    """`count` numbers of one kind, side by side in a row.

    A token's values are its codes, each times its group's scale, followed by its plain numbers.
    """

    role: Role
    number: Number
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.number.bits // 8


@dataclass(frozen=True)
class Layout:
    """The bytes of one token.

    rows: the fields of each row that a token has. A page holds the first row of all its tokens, then the second row of
        all its tokens; only FP8_V4 has a second.
    group: codes that share a scale; 0 without scales.
    page_multiple: bytes, a multiple of which `empty` makes the page stride.
    """

    rows: tuple[tuple[Field, ...], ...]
    group: int = 0
    page_multiple: int = 1

    @property
    def row_bytes(self) -> tuple[int, ...]:
        return tuple(sum(field.nbytes for field in row) for row in self.rows)

    @property
    def bytes_per_token(self) -> int:
        return sum(self.row_bytes)

    def field(self, role: Role) -> Field | None:
        return next((field for row in self.rows for field in row if field.role == role), None)

    @property
    def d(self) -> int:
        return sum(field.count for row in self.rows for field in row if field.role in ("code", "plain"))


class KVCacheFormat(enum.Enum):
    """How a cache stores tokens; the bytes are those that FlashMLA's kernels, vLLM and SGLang read and write."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP8_V32 = "fp8_v32"
    FP8_V4 = "fp8_v4"
    FP8_V41 = "fp8_v41"
    FP4_V41 = "fp4_v41"
    NVFP4 = "nvfp4"

    @property
    def head_dims(self) -> tuple[int, ...]:
        """The head dims d that the format exists for."""
        return tuple(_LAYOUTS[self])

    def layout(self, d: int | None = None) -> Layout:
        """The bytes of a token of head dim `d` (default: the format's first).

        Raises:
            ValueError: the format does not exist for `d`.
        """
        layouts = _LAYOUTS[self]
        d = self.head_dims[0] if d is None else d
        if d not in layouts:
            raise ValueError(f"d: got {d}, need {' or '.join(map(str, layouts))} for {self.name}")
        return layouts[d]

    @property
    def is_quantised(self) -> bool:
        """Whether values are codes with scales, so that the cache's last dimension counts bytes instead of values."""
        return self not in _PLAIN

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the caches that `empty` makes."""
        return _PLAIN.get(self, torch.float8_e4m3fn)

    def bytes_per_token(self, d: int | None = None) -> int:
        return self.layout(d).bytes_per_token

    def page_bytes(self, page_size: int, d: int | None = None) -> int:
        """Bytes from one page to the next in the caches that `empty` makes."""
        layout = self.layout(d)
        return -(-page_size * layout.bytes_per_token // layout.page_multiple) * layout.page_multiple

    @classmethod
    def detect(
        cls, k_cache: torch.Tensor, d: int, *, is_fp8: bool, name: str = "k_cache", extra: bool = False
    ) -> KVCacheFormat:
        """The format of `k_cache`, told from the head dim `d` and the cache's dtype and last dimension.

        Args:
            k_cache: [num_pages, page_size, h_kv, d] bfloat16 or float16, or with `is_fp8`
                [num_pages, page_size, 1, bytes a token] uint8, int8 or float8_e4m3fn.
            is_fp8: whether the cache is quantised, to 8 or 4 bits.
            name: what errors call the cache.
            extra: whether it is the second cache of a sparse call, the only place for FP4_V41.

        Raises:
            TypeError: not a tensor, or of a dtype that does not go with `is_fp8`.
            ValueError: no format stores this `d` in that many bytes, or a page's bytes are not contiguous.
        """
        if not is_fp8:
            k_cache = checks.tensor(name, k_cache, "num_pages page_size h_kv d", tuple(_PLAIN.values()), d=d)
            fit = next(one for one, dtype in _PLAIN.items() if dtype == k_cache.dtype)
            if d not in fit.head_dims:
                raise ValueError(f"{name}: got d={d}, need {' or '.join(map(str, fit.head_dims))} for {fit.name}")
            return fit
        k_cache = checks.tensor(name, k_cache, "num_pages page_size h_kv bytes", QUANTISED_DTYPES, h_kv=1)
        nbytes = k_cache.shape[-1]
        fits = [one for one in _QUANTISED if d in one.head_dims and (extra or one is not cls.FP4_V41)]
        for fit in fits:
            if fit.bytes_per_token(d) == nbytes:
                fit._require_dense_pages(name, k_cache)
                return fit
        if nbytes == cls.FP4_V41.bytes_per_token() and d in cls.FP4_V41.head_dims:
            raise ValueError(f"{name}: got {nbytes} bytes a token (FP4_V41), which only extra_k_cache may have")
        need = " or ".join(f"{fit.bytes_per_token(d)} ({fit.name})" for fit in fits) or "d=576 or d=512"
        raise ValueError(f"{name}: got {nbytes} bytes a token with d={d}, need {need}")

    def empty(
        self, num_pages: int, page_size: int, d: int | None = None, *, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """A zeroed cache [num_pages, page_size, 1, bytes] float8_e4m3fn, or [num_pages, page_size, 1, d] for BF16/FP16.

        Pages lie `page_bytes(page_size, d)` bytes apart, which for FP8_V4 leaves a gap between them.
        """
        checks.integer("num_pages", num_pages, least=0)
        checks.positive_int("page_size", page_size)
        data = torch.zeros((num_pages, self.page_bytes(page_size, d)), dtype=torch.uint8, device=device)
        nbytes = self.bytes_per_token(d)
        return data[:, : page_size * nbytes].unflatten(1, (page_size, 1, nbytes)).view(self.dtype)

    @torch.no_grad()
    def pack(self, kv: torch.Tensor) -> torch.Tensor:
        """A new cache that holds `kv` [num_pages, page_size, 1, d] fp32, bf16 or fp16.

        Scales are powers of two: a group's largest magnitude over the largest code, at least 1e-4 (e4m3 scales: within
        2^-9 and 2^8), rounded up. Codes round to nearest even and saturate. A NaN or infinity spoils its group only.

        Raises:
            TypeError, ValueError: `kv` is not such a tensor, or the format does not exist for its d.
        """
        kv = checks.tensor("kv", kv, "num_pages page_size h_kv d", KV_DTYPES, h_kv=1)
        num_pages, page_size, _, d = kv.shape
        layout = self.layout(d)
        cache = self.empty(num_pages, page_size, d, device=kv.device)
        for row, data in zip(self._rows(cache, layout), _encode(kv.reshape(-1, d), layout), strict=True):
            row.pages().copy_(data.view(num_pages, page_size, row.nbytes))
        return cache

    @torch.no_grad()
    def unpack(self, cache: torch.Tensor, d: int | None = None) -> torch.Tensor:
        """All values of `cache`, code times scale: [num_pages, page_size, 1, d] fp32. What was never written comes too.

        Raises:
            TypeError, ValueError: `cache` is not of this format (and head dim `d`, if given).
        """
        layout = self._require_cache(cache, d)
        copies = [row.pages().clone(memory_format=torch.contiguous_format) for row in self._rows(cache, layout)]
        return _decode([rows.flatten(0, 1) for rows in copies], layout).view(*cache.shape[:2], 1, layout.d)

    @torch.no_grad()
    def append(self, cache: torch.Tensor, kv: torch.Tensor, slots: torch.Tensor) -> None:
        """Write `kv` into `cache`, in place.

        Rows of negative slots are skipped, without asking the device whether there are any: they repeat the write of a
        row that is not skipped. If all are skipped, slot 0 is written with the bytes that it holds, so another stream
        must not write it meanwhile.

        Args:
            kv: [n, d] or [n, 1, d] fp32, bf16 or fp16; encoded as by `pack`.
            slots: [n] int32 or int64; distinct, apart from negative ones.

        Raises:
            TypeError, ValueError: a tensor's kind, shape or device is wrong.
            IndexError: a slot beyond the cache, on the CPU (on CUDA: a device-side assertion).
        """
        layout = self._require_cache(cache, None)
        if isinstance(kv, torch.Tensor) and kv.dim() == 3:
            kv = checks.tensor("kv", kv, "n h_kv d", KV_DTYPES, h_kv=1, d=layout.d).flatten(1)
        kv = checks.tensor("kv", kv, "n d", KV_DTYPES, d=layout.d)
        checks.same_device("kv", kv, cache.device, like="cache")
        n = kv.shape[0]
        slots = checks.tensor("slots", slots, "n", SLOT_DTYPES, n=n)
        checks.same_device("slots", slots, cache.device, like="cache")
        if n == 0:
            return
        if cache.shape[0] == 0:
            if cache.device.type == "cpu" and bool((slots >= 0).any()):
                raise IndexError(f"slots: got {int(slots.max())} for a cache without pages, need negative ones")
            return
        written = slots >= 0
        stand_in = written.to(torch.int32).argmax().view(1)
        stand_in_slot = slots.index_select(0, stand_in).clamp_min(0)
        slots = torch.where(written, slots, stand_in_slot)
        for row, data in zip(self._rows(cache, layout), _encode(kv, layout), strict=True):
            stand_in_data = torch.where(written.any(), data.index_select(0, stand_in), row.read(stand_in_slot))
            row.write(slots, torch.where(written.view(n, 1), data, stand_in_data))

    @torch.no_grad()
    def gather(self, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """The values of the tokens at `slots` [n] int32 or int64: [n, d] fp32. No other token is read.

        Raises:
            TypeError, ValueError: `cache` is not of this format, or `slots` not such a tensor.
            IndexError: a slot outside the cache, on the CPU (on CUDA: a device-side assertion).
        """
        layout = self._require_cache(cache, None)
        slots = checks.tensor("slots", slots, "n", SLOT_DTYPES)
        checks.same_device("slots", slots, cache.device, like="cache")
        return _decode([row.read(slots) for row in self._rows(cache, layout)], layout)

    def _require_cache(self, cache: torch.Tensor, d: int | None) -> Layout:
        """Require `cache` to be of this format, and of head dim `d` if given; returns its layout."""
        dtypes = QUANTISED_DTYPES if self.is_quantised else self.dtype
        last = "bytes" if self.is_quantised else "d"
        cache = checks.tensor("cache", cache, f"num_pages page_size h_kv {last}", dtypes, h_kv=1)
        widths = {one: self.bytes_per_token(one) // self.dtype.itemsize for one in self.head_dims}
        if d is not None:
            widths = {d: self.layout(d).bytes_per_token // self.dtype.itemsize}
        for one, width in widths.items():
            if cache.shape[-1] == width:
                self._require_dense_pages("cache", cache)
                return self.layout(one)
        need = " or ".join(map(str, widths.values()))
        raise ValueError(
            f"cache: got shape {list(cache.shape)}, need [num_pages, page_size, 1, {need}] for {self.name}"
        )

    def _require_dense_pages(self, name: str, cache: torch.Tensor) -> None:
        _, page_size, _, width = cache.shape
        if self.is_quantised and page_size > 1 and cache.stride(1) != width:
            raise ValueError(
                f"{name}: got token stride {cache.stride(1)}, need {width}: a page's bytes must be contiguous in "
                f"{self.name}"
            )

    def _rows(self, cache: torch.Tensor, layout: Layout) -> list[_Rows]:
        num_pages, page_size = cache.shape[:2]
        data = cache.view(torch.uint8)
        first, page_stride, token_stride = int(data.storage_offset()), data.stride(0), data.stride(1)
        rows = []
        for nbytes in layout.row_bytes:
            # With one row a token, its stride may be any; with more, the rows of each kind are dense.
            stride = token_stride if len(layout.rows) == 1 else nbytes
            rows.append(_Rows(data, first, num_pages, page_size, page_stride, stride, nbytes))
            first += page_size * stride
        return rows


@dataclass(frozen=True)
class _Rows:
    """One row of every token of a cache: `nbytes` bytes at `first` + page * page_stride + offset * stride."""

    data: torch.Tensor
    first: int
    num_pages: int
    page_size: int
    page_stride: int
    stride: int
    nbytes: int

    def pages(self) -> torch.Tensor:
        """[num_pages, page_size, nbytes] uint8, a view."""
        size = (self.num_pages, self.page_size, self.nbytes)
        return self.data.as_strided(size, (self.page_stride, self.stride, 1), self.first)

    def read(self, slots: torch.Tensor) -> torch.Tensor:
        """[n, nbytes] uint8."""
        return self._everywhere().index_select(0, self._places(slots))

    def write(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        self._everywhere().index_copy_(0, self._places(slots), rows)

    @property
    def _step(self) -> int:
        """The largest step by which every row can be reached from the first."""
        return math.gcd(self.page_stride, self.stride) or 1

    def _everywhere(self) -> torch.Tensor:
        """The `nbytes` bytes after each step: a view whose rows overlap. Copying whole rows from and to one dimension
        is many times faster than indexing pages and offsets, and pages may have any stride."""
        span = (self.num_pages - 1) * self.page_stride + (self.page_size - 1) * self.stride
        count = span // self._step + 1 if self.num_pages else 0
        return self.data.as_strided((count, self.nbytes), (self._step, 1), self.first)

    def _places(self, slots: torch.Tensor) -> torch.Tensor:
        slots = slots.to(torch.int64)
        page = slots.div(self.page_size, rounding_mode="floor")
        offset = slots - page * self.page_size
        return page * (self.page_stride // self._step) + offset * (self.stride // self._step)


def _encode(kv: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """[n, d] -> the tokens' bytes, a uint8 tensor [n, row_bytes] for each of the layout's rows."""
    kv = kv.to(torch.float32).contiguous()
    code, scale, pad = layout.field("code"), layout.field("scale"), layout.field("pad")
    d_code = code.count if code else 0
    parts: dict[Role, torch.Tensor] = {"plain": kv[:, d_code:]}
    if code and scale:
        groups = kv[:, :d_code].unflatten(1, (scale.count, layout.group))
        low, high = _SCALE_RANGES[scale.number]
        scales = power_of_two_at_least((groups.abs().amax(-1) / code.number.largest).clamp(low, high))
        parts |= {"code": (groups / scales.unsqueeze(-1)).flatten(1), "scale": scales}
    if pad:
        parts["pad"] = kv.new_zeros(kv.shape[0], pad.count)
    return [torch.cat([field.number.to_bytes(parts[field.role]) for field in row], -1) for row in layout.rows]


def _decode(rows: list[torch.Tensor], layout: Layout) -> torch.Tensor:
    """The reverse of `_encode`: [n, d] fp32. Takes copies, in which fields are aligned; in a cache they need not be."""
    parts: dict[Role, torch.Tensor] = {}
    for data, fields in zip(rows, layout.rows, strict=True):
        for field, part in zip(fields, data.split([field.nbytes for field in fields], -1), strict=True):
            parts[field.role] = field.number.from_bytes(part)
    values = []
    if "code" in parts:
        groups = parts["code"].unflatten(1, (-1, layout.group))
        values.append((groups * parts["scale"].unsqueeze(-1)).flatten(1))
    if "plain" in parts:
        values.append(parts["plain"])
    return values[0] if len(values) == 1 else torch.cat(values, -1)


# The scales that we write: powers of two of at least 1e-4, as far as e4m3 can hold them.
_SCALE_RANGES = {
    Number.FP32: (1e-4, math.inf),
    Number.E8M0: (1e-4, math.inf),
    Number.E4M3: (2.0**-9, 2.0**8),
}

_PLAIN = {KVCacheFormat.BF16: torch.bfloat16, KVCacheFormat.FP16: torch.float16}
_QUANTISED = tuple(one for one in KVCacheFormat if one not in _PLAIN)

_LAYOUTS: dict[KVCacheFormat, dict[int, Layout]] = {
    KVCacheFormat.BF16: {d: Layout(((Field("plain", Number.BF16, d),),)) for d in (576, 512)},
    KVCacheFormat.FP16: {d: Layout(((Field("plain", Number.FP16, d),),)) for d in (576, 512)},
    KVCacheFormat.FP8_V32: {
        576: Layout(
            ((Field("code", Number.E4M3, 512), Field("scale", Number.FP32, 4), Field("plain", Number.BF16, 64)),),
            group=128,
        )
    },
    KVCacheFormat.FP8_V4: {
        512: Layout(
            (
                (Field("code", Number.E4M3, 448), Field("plain", Number.BF16, 64)),
                (Field("scale", Number.E8M0, 7), Field("pad", Number.E4M3, 1)),
            ),
            group=64,
            page_multiple=576,
        )
    },
    KVCacheFormat.FP8_V41: {
        512: Layout(((Field("code", Number.E4M3, 512), Field("scale", Number.E8M0, 16)),), group=32)
    },
    KVCacheFormat.FP4_V41: {
        512: Layout(((Field("code", Number.E2M1, 512), Field("scale", Number.E4M3, 32)),), group=16)
    },
    KVCacheFormat.NVFP4: {
        576: Layout(
            ((Field("code", Number.E2M1, 512), Field("plain", Number.E4M3, 64), Field("scale", Number.E4M3, 32)),),
            group=16,
        )
    },
}
