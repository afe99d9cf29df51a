"""Small and ugly random calls of every mode on a device, against the reference: what `flash-mla check` runs.

Inputs are made on the CPU, where the reference computes, and copied to the device under test. Whatever a call must not
read is NaN (integers: far out of range), and so is the `out` it has to fill.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from flash_mla import (
    FlashMLASchedMeta,
    KVCacheFormat,
    backends,
    flash_attn_varlen_func,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    kernels,
    reference,
)
from flash_mla.backends import hopper
from flash_mla.backends.hopper import launch
from flash_mla.plan import SplitPlan, split_plan
from flash_mla.problem import DecodeProblem, MHAProblem, Problem, SparsePrefillProblem

__all__ = ["Row", "run_checks"]

FAR = 2**31 - 1  # a page, slot or row that no tensor here has
NAN_BYTE = 0xFF  # repeated, a NaN in every cache format


@dataclasses.dataclass(frozen=True)
class Row:
    """What `flash-mla check` prints of a mode.

    errors: the largest absolute error of each tensor that calls gave.
    verdict: "ok", "WRONG" or "not served: ...".
    """

    mode: str
    backend: str
    errors: dict[str, float]
    verdict: str


class Tolerance(NamedTuple):
    """An error may be below `absolute`, or below `relative` times the expected value; the cosine bounds their sum."""

    absolute: float
    relative: float
    cosine: float = math.inf


DECODE_OUT = Tolerance(8e-4, 2 / 128, 5e-6)
DECODE_LSE = Tolerance(1e-6, 8 / 65536)
PREFILL_OUT = Tolerance(8e-4, 2 / 128, 7e-6)
PREFILL_LSE = Tolerance(1e-6, 2 / 65536)
GRADIENT = Tolerance(1e-3, 8 / 128, 7e-6)
EXACT = Tolerance(0.0, 0.0)


class Result(NamedTuple):
    """One tensor that a call gave and what the reference gives for it."""

    name: str
    got: torch.Tensor
    expected: torch.Tensor
    tolerance: Tolerance

    @property
    def error(self) -> float:
        """The largest absolute error; NaN if a value is NaN or another infinity than expected."""
        got, expected = self.got.double().cpu(), self.expected.double()
        different = got != expected
        return float((got - expected)[different].abs().max()) if different.any() else 0.0

    @property
    def is_right(self) -> bool:
        if self.got.shape != self.expected.shape:
            return False
        got, expected = self.got.double().cpu(), self.expected.double()
        error = (got - expected).abs()
        close = (error < self.tolerance.absolute) | (error < self.tolerance.relative * expected.abs())
        if not bool((close & got.isfinite() | (got == expected)).all()):
            return False
        got, expected = got[got.isfinite()], expected[expected.isfinite()]
        norm = float((got * got + expected * expected).sum())
        return norm < 1e-12 or 1 - 2 * float((got * expected).sum()) / norm < self.tolerance.cosine


Run = Callable[[], list[Result]]
Case = tuple[Problem, Run]


def run_checks(device: torch.device, seed: int) -> list[Row]:
    """Check every mode and cache format on `device` with inputs that `seed` decides.

    FLASH_MLA_BACKEND chooses the backend as it does for any call. A mode that no backend serves on the device gets a
    row that says why; what a call raises is not caught.
    """
    rows = []
    for mode, cases in _modes(device, torch.Generator().manual_seed(seed)):
        used, unserved, results = [], [], []
        for problem, run in cases:
            try:
                used.append(backends.choose(problem).NAME)
            except RuntimeError as error:
                unserved.append(str(error))
                continue
            results += run()
        rows.append(_row(mode, used, unserved, results))
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        rows += _hopper_kernels(device, torch.Generator().manual_seed(seed))
    return rows


def _row(mode: str, used: list[str], unserved: list[str], results: list[Result]) -> Row:
    names = dict.fromkeys(result.name for result in results)
    errors = {name: max((r.error for r in results if r.name == name), key=_nan_is_largest) for name in names}
    verdict = "ok"
    if unserved:
        verdict = f"not served: {unserved[0]}"
        if used:
            verdict = f"ok where served; of {len(used) + len(unserved)} cases {len(unserved)} {verdict}"
    if not all(result.is_right for result in results):
        verdict = "WRONG"
    return Row(mode, ", ".join(dict.fromkeys(used)) or "none", errors, verdict)


def _nan_is_largest(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _modes(device: torch.device, gen: torch.Generator) -> Iterator[tuple[str, list[Case]]]:
    bf16 = KVCacheFormat.BF16
    for kv_format in (bf16, KVCacheFormat.FP16, KVCacheFormat.FP8_V32):
        yield (
            f"dense decode, {kv_format.name}",
            [
                _dense_decode(device, gen, kv_format, [0, 1, 64, 65, 333], h_q=128),
                _dense_decode(device, gen, kv_format, [2, 200], s_q=3, h_q=16, causal=True, scale=0.5),
                _dense_decode(device, gen, kv_format, [5000, 7], h_q=24, batch_invariant=True),
            ],
        )
    for kv_format in KVCacheFormat:
        if kv_format is not KVCacheFormat.FP4_V41:
            yield f"sparse decode, {kv_format.name}", list(_sparse_decodes(device, gen, kv_format, None))
    for pair in ((KVCacheFormat.FP8_V4, KVCacheFormat.FP8_V4), (KVCacheFormat.FP8_V41, KVCacheFormat.FP4_V41)):
        mode = f"sparse decode, {pair[0].name} and {pair[1].name}"
        yield mode, list(_sparse_decodes(device, gen, *pair))
    for d in (576, 512):
        yield (
            f"sparse prefill, d={d}",
            [
                _sparse_prefill(device, gen, d, h_q=128, dtype=torch.bfloat16),
                _sparse_prefill(device, gen, d, h_q=64, dtype=torch.float16),
            ],
        )
    for d_qk, d_v in ((192, 128), (128, 128)):
        yield (
            f"dense MHA {d_qk}/{d_v} and gradients",
            [
                _mha(device, gen, d_qk, d_v, 4, torch.bfloat16, causal=True),
                _mha(device, gen, d_qk, d_v, 1, torch.float16, causal=False),
            ],
        )


def _randn(gen: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers in steps of 1/8: fp32 dot products of them are exact in any order, so that lse may be near 0."""
    return (torch.randn(*shape, generator=gen) * 8).round().div(8).to(dtype)


def _latents(gen: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """K of the size for which the absolute tolerance of `out` is meant, of deviation 0.1, in steps of 1/64.

    Kernels that keep probabilities in half precision, as FlashMLA's do, are off by a share of V's size.
    """
    return (torch.randn(*shape, generator=gen) / 10).clamp(-1, 1).mul(64).round().div(64).to(dtype)


def _strided(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on `device`, dense in its last dimension alone, among NaNs or garbage."""
    filler = math.nan if tensor.is_floating_point() else FAR
    room = torch.full([2 * n for n in tensor.shape], filler, dtype=tensor.dtype, device=device)
    return room[tuple(slice(n) for n in tensor.shape)].copy_(tensor)


def _cache(
    gen: torch.Generator, kv_format: KVCacheFormat, d: int, num_pages: int, page_size: int, slots: torch.Tensor
) -> torch.Tensor:
    """A cache with random tokens at `slots` and NaN everywhere else."""
    cache = kv_format.empty(num_pages, page_size, d)
    cache.view(torch.uint8).fill_(NAN_BYTE)
    kv_format.append(cache, _latents(gen, len(slots), d), slots)
    return cache


def _on(device: torch.device, cache: torch.Tensor) -> torch.Tensor:
    """A copy of a cache with the same gaps between its pages."""
    copy = torch.empty_strided(cache.shape, cache.stride(), dtype=cache.dtype, device=device)
    copy.view(torch.uint8).copy_(cache.view(torch.uint8))
    return copy


def _dense_decode(
    device: torch.device,
    gen: torch.Generator,
    kv_format: KVCacheFormat,
    seqlens: list[int],
    *,
    h_q: int,
    s_q: int = 1,
    causal: bool = False,
    scale: float | None = None,
    batch_invariant: bool = False,
    page_size: int = 64,
    d: int = 576,
) -> Case:
    b = len(seqlens)
    dtype = torch.float16 if kv_format is KVCacheFormat.FP16 else torch.bfloat16
    counts = [-(-seqlen // page_size) for seqlen in seqlens]
    pages = torch.randperm(sum(counts) + 1, generator=gen)
    table = torch.full((b, max(counts) + 1), FAR, dtype=torch.int32)
    slots = []
    for i, own in enumerate(pages[:-1].split(counts)):
        table[i, : counts[i]] = own
        token = torch.arange(seqlens[i])
        slots.append(own[token // page_size] * page_size + token % page_size)
    q = _randn(gen, b, s_q, h_q, d, dtype=dtype)
    cache = _cache(gen, kv_format, d, len(pages), page_size, torch.cat(slots))
    lengths = torch.tensor(seqlens, dtype=torch.int32)
    is_fp8 = kv_format.is_quantised

    def run() -> list[Result]:
        expected = reference.decode(q, cache, table, lengths, 512, scale, causal, is_fp8)
        out = torch.full((b, s_q, h_q, 512), math.nan, dtype=dtype, device=device)
        _, lse = flash_mla_with_kvcache(
            _strided(q, device), _on(device, cache), _strided(table, device), lengths.to(device), 512,
            FlashMLASchedMeta(), softmax_scale=scale, causal=causal, is_fp8_kvcache=is_fp8, out=out,
            enable_batch_invariant=batch_invariant,
        )  # fmt: skip
        return _decode_results((out, lse), expected)

    problem = DecodeProblem(
        device, dtype, b, s_q, h_q, 1, d, 512, kv_format, page_size, causal=causal, batch_invariant=batch_invariant
    )
    return problem, run


def _decode_results(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> list[Result]:
    return [Result("out", got[0], expected[0], DECODE_OUT), Result("lse", got[1], expected[1], DECODE_LSE)]


def _sparse_decodes(
    device: torch.device, gen: torch.Generator, kv_format: KVCacheFormat, extra: KVCacheFormat | None
) -> Iterator[Case]:
    for d in kv_format.head_dims:
        yield _sparse_decode(device, gen, kv_format, extra, d, h_q=128, s_q=1, lengths=[0, 1, 128])
        yield _sparse_decode(device, gen, kv_format, extra, d, h_q=64, s_q=2, lengths=None)


@dataclasses.dataclass(frozen=True)
class _Scope:
    """A cache of a sparse call, and which of its tokens each query token attends to."""

    cache: torch.Tensor
    indices: torch.Tensor
    lengths: torch.Tensor | None


def _scope(
    gen: torch.Generator, kv_format: KVCacheFormat, d: int, page_size: int, shape: tuple[int, ...], lengths: object
) -> _Scope:
    """Indices [b, s_q, topk] that repeat and skip; those beyond `lengths` name nothing that exists."""
    num_pages = 5
    slots = torch.randperm(num_pages * page_size, generator=gen)[: 2 * page_size]
    indices = slots[torch.randint(len(slots), shape, generator=gen)].int()
    indices[torch.rand(shape, generator=gen) < 0.2] = -1
    cache = _cache(gen, kv_format, d, num_pages, page_size, slots)
    if lengths is None:
        return _Scope(cache, indices, None)
    limits = torch.tensor(lengths, dtype=torch.int32)
    return _Scope(cache, indices.masked_fill(torch.arange(shape[-1]) >= limits[:, None, None], FAR), limits)


def _sinks(gen: torch.Generator, h_q: int) -> torch.Tensor:
    sink = torch.randn(h_q, generator=gen) * 3
    sink[0], sink[1] = -math.inf, math.inf
    return sink


def _sparse_decode(
    device: torch.device,
    gen: torch.Generator,
    kv_format: KVCacheFormat,
    extra_format: KVCacheFormat | None,
    d: int,
    *,
    h_q: int,
    s_q: int,
    lengths: list[int] | None,
) -> Case:
    b, topk, extra_topk = 3, 128, 64
    dtype = torch.float16 if kv_format is KVCacheFormat.FP16 else torch.bfloat16
    q = _randn(gen, b, s_q, h_q, d, dtype=dtype)
    main = _scope(gen, kv_format, d, 64, (b, s_q, topk), lengths)
    extra = None
    if extra_format is not None:
        extra_lengths = None if lengths is None else [0, 40, 64]
        extra = _scope(gen, extra_format, d, 32, (b, s_q, extra_topk), extra_lengths)
    sink = _sinks(gen, h_q)

    def call(function: Callable[..., tuple[torch.Tensor, ...]], where: torch.device) -> tuple[torch.Tensor, ...]:
        def there(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(where)

        return function(
            q=_strided(q, where),
            k_cache=_on(where, main.cache),
            block_table=None,
            cache_seqlens=None,
            head_dim_v=512,
            is_fp8_kvcache=kv_format.is_quantised,
            indices=_strided(main.indices, where),
            attn_sink=there(sink),
            topk_length=there(main.lengths),
            extra_k_cache=None if extra is None else _on(where, extra.cache),
            extra_indices_in_kvcache=None if extra is None else there(extra.indices),
            extra_topk_length=None if extra is None else there(extra.lengths),
        )

    def run() -> list[Result]:
        out = torch.full((b, s_q, h_q, 512), math.nan, dtype=dtype, device=device)
        decode = partial(flash_mla_with_kvcache, tile_scheduler_metadata=FlashMLASchedMeta(), out=out)
        _, lse = call(decode, device)
        return _decode_results((out, lse), call(reference.decode, torch.device("cpu")))

    problem = DecodeProblem(
        device, dtype, b, s_q, h_q, 1, d, 512, kv_format, 64, topk=topk, extra_format=extra_format,
        extra_page_size=None if extra is None else 32, extra_topk=None if extra is None else extra_topk,
        has_topk_length=lengths is not None, has_extra_topk_length=extra is not None and lengths is not None,
    )  # fmt: skip
    return problem, run


def _sparse_prefill(device: torch.device, gen: torch.Generator, d: int, *, h_q: int, dtype: torch.dtype) -> Case:
    s_q, s_kv, topk, scale = 5, 300, 128, d**-0.5
    q = _randn(gen, s_q, h_q, d, dtype=dtype)
    kv = _latents(gen, s_kv, 1, d, dtype=dtype)
    kv[::3] = math.nan
    indices = torch.randint(s_kv // 3, (s_q, 1, topk), generator=gen, dtype=torch.int32) * 3 + 1
    indices[torch.rand(indices.shape, generator=gen) < 0.2] = -1
    indices[0, 0, 7] = s_kv
    indices[1] = FAR  # a query token with nothing to attend to
    lengths = torch.tensor([topk, topk, 0, 1, 77], dtype=torch.int32)
    indices.masked_fill_(torch.arange(topk) >= lengths[:, None, None], 3)
    sink = _sinks(gen, h_q)

    def run() -> list[Result]:
        expected = reference.sparse_prefill(q, kv, indices, scale, 512, sink, lengths)
        out = torch.full((s_q, h_q, 512), math.nan, dtype=dtype, device=device)
        _, max_logits, lse = flash_mla_sparse_fwd(
            _strided(q, device), _strided(kv, device), _strided(indices, device), scale,
            attn_sink=sink.to(device), topk_length=lengths.to(device), out=out,
        )  # fmt: skip
        return [
            Result("out", out, expected[0], PREFILL_OUT),
            Result("max_logits", max_logits, expected[1], PREFILL_LSE),
            Result("lse", lse, expected[2], PREFILL_LSE),
        ]

    return SparsePrefillProblem(device, dtype, s_q, s_kv, h_q, d, 512, topk), run


def _mha(
    device: torch.device, gen: torch.Generator, d_qk: int, d_v: int, group: int, dtype: torch.dtype, *, causal: bool
) -> Case:
    lengths_qo, lengths_kv, h_kv = [70, 1, 0, 5, 9, 130], [70, 200, 3, 0, 4, 131], 2
    h_q = group * h_kv
    cu_seqlens_qo = torch.tensor([0, *lengths_qo]).cumsum(0).int()
    cu_seqlens_kv = torch.tensor([0, *lengths_kv]).cumsum(0).int()
    # Of the size for which the tolerances of gradients are meant; still exact in half precision.
    q, k, v, dout = (
        _randn(gen, tokens, heads, d, dtype=dtype) / 8
        for tokens, heads, d in (
            (sum(lengths_qo), h_q, d_qk), (sum(lengths_kv), h_kv, d_qk), (sum(lengths_kv), h_kv, d_v),
            (sum(lengths_qo), h_q, d_v),
        )
    )  # fmt: skip
    # dv sums up P dout, of which P is rounded: with few keys and many queries of like size those errors would exceed
    # what is left of sums that cancel. Hence the smaller, the more queries a key has, as the gradient of a mean is.
    sizes = [
        min(1.0, math.sqrt(keys / (queries * group)))
        for queries, keys in zip(lengths_qo, lengths_kv, strict=True)
        for _ in range(queries)
    ]
    dout = (dout * torch.tensor(sizes)[:, None, None]).to(dtype)

    def run() -> list[Result]:
        leaves = q.float().requires_grad_(), k.float().requires_grad_(), v.float().requires_grad_()
        expected_out, expected_lse = reference.mha_forward(*leaves, cu_seqlens_qo, cu_seqlens_kv, None, causal)
        expected_grads = torch.autograd.grad(expected_out, leaves, dout.float())
        inputs = tuple(_strided(x, device).requires_grad_() for x in (q, k, v))
        out, lse = flash_attn_varlen_func(
            inputs[0], inputs[1], inputs[2], cu_seqlens_qo.to(device), cu_seqlens_kv.to(device),
            max(lengths_qo), max(lengths_kv), causal=causal,
        )  # fmt: skip
        grads = torch.autograd.grad(out, inputs, dout.to(device))
        return [
            Result("out", out.detach(), expected_out.detach(), PREFILL_OUT),
            Result("lse", lse.detach(), expected_lse.detach(), PREFILL_LSE),
            *(Result(*both, GRADIENT) for both in zip(("dq", "dk", "dv"), grads, expected_grads, strict=True)),
        ]

    return MHAProblem(device, dtype, h_q, h_kv, d_qk, d_v, causal), run


def _hopper_kernels(device: torch.device, gen: torch.Generator) -> Iterator[Row]:
    """What split-KV modes share, by itself: the planner, and combine, which the modes' own kernels have built in."""
    for mode, names, run in (
        ("planner kernel", ("planner_balanced", "planner_batch_invariant"), _planner),
        ("combine kernel", ("combine_bf16",), _combine),
    ):
        missing: list[str] = [reason for name in names if (reason := kernels.unavailable(name))]
        results = [] if missing else run(device, gen)
        yield _row(mode, [] if missing else [hopper.NAME], missing[:1], results)


def _planner(device: torch.device, gen: torch.Generator) -> list[Result]:
    results = []
    lengths = torch.randint(0, 9000, (600,), generator=gen, dtype=torch.int32)
    lengths[::7] = 0
    for batch_invariant in (False, True):
        with torch.cuda.device(device):
            got = launch.plan(lengths.to(device), fixed_cost=5, num_workers=132, batch_invariant=batch_invariant)
        expected = split_plan(lengths, fixed_cost=5, num_workers=132, batch_invariant=batch_invariant)
        results += [
            Result("work", got.work, expected.work, EXACT),
            Result("splits", got.splits, expected.splits, EXACT),
        ]
    return results


def _combine(device: torch.device, gen: torch.Generator) -> list[Result]:
    results = []
    for rows in (1, 128):
        lengths = torch.tensor([9000, 0, 20, 5000], dtype=torch.int32)
        plan = split_plan(lengths, fixed_cost=5, num_workers=66)
        slots = plan.splits.tolist()
        partial_o = torch.randn(slots[-1], rows, 512, generator=gen)
        partial_lse = torch.randn(slots[-1], rows, generator=gen) * 10
        partial_lse[::4] = -math.inf
        out = torch.zeros(len(lengths), 1, 1, rows, 512, dtype=torch.bfloat16, device=device)
        lse = torch.zeros(len(lengths), 1, 1, rows, device=device)
        with torch.cuda.device(device):
            device_plan = SplitPlan(plan.work.to(device), plan.splits.to(device))
            launch.combine(partial_o.to(device), partial_lse.to(device), device_plan, out, lse)
        expected_out, expected_lse = torch.zeros(out.shape), torch.zeros(lse.shape)
        for unit in range(len(lengths)):
            parts = slice(slots[unit], slots[unit + 1])
            if parts.start < parts.stop:
                logits = partial_lse[parts] * math.log(2)
                expected_out[unit, 0, 0] = (logits.softmax(0)[..., None] * partial_o[parts]).sum(0)
                expected_lse[unit, 0, 0] = logits.logsumexp(0)
        results += _decode_results((out, lse), (expected_out, expected_lse))
    return results
