"""What the library is for, in small: requests served by continuous batching from a paged KV cache.

The geometry is that of one layer of DeepSeek-V3: 128 query heads over one latent of 576 a token (512 in FP8_V4 and
FP8_V41), of which 512 are V. There is no model: latents and queries are random, which changes nothing for attention's
work, and lets outputs be compared with a plain softmax over what the cache holds.
"""

from __future__ import annotations

import csv
import re
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from flash_mla import checks
from flash_mla.decode import flash_mla_with_kvcache, get_mla_metadata
from flash_mla.kv_cache import KVCacheFormat
from flash_mla.paged_kv_cache import PagedKVCache

__all__ = ["BUILT_IN", "DemoOptions", "DemoResult", "Request", "read_trace", "run_demo"]

NUM_HEADS = 128
D_V = 512
TOPK = 2048
"""Tokens that a query attends to in sparse decode, as in DeepSeek-V3.2."""

PER_HEAD_BYTES = NUM_HEADS * (192 + 128) * 2
"""What a token's keys and values would take as 128 heads of bf16, without MLA's shared latent."""

DENSE_FORMATS = (KVCacheFormat.BF16, KVCacheFormat.FP16, KVCacheFormat.FP8_V32)


@dataclass(frozen=True)
class Request:
    """Tokens of context that a request comes with, and tokens that it generates."""

    context: int
    generated: int

    @property
    def total(self) -> int:
        return self.context + self.generated


# Chat, questions about documents, code completion: most are short, most tokens belong to the few long ones.
BUILT_IN = tuple(
    Request(context, generated)
    for context, generated in (
        *((374, 44), (396, 90), (879, 55), (91, 75), (38, 96), (1187, 48), (24, 8), (2048, 35)),
        *((640, 80), (4096, 40), (129, 57), (1024, 64), (311, 24), (57, 80), (3180, 12), (746, 56)),
        *((200, 44), (6000, 20), (15, 90), (502, 52), (1500, 38), (110, 27), (2310, 16), (63, 63)),
    )
)


@dataclass(frozen=True)
class DemoOptions:
    """What to serve, and how.

    trace: CSV file with the columns ContextTokens and GeneratedTokens, a row a request, in order of arrival; without
        one, `BUILT_IN`.
    max_requests: how many requests of it to serve, from the first.
    batch: requests that decode side by side at most.
    steps: decode steps after which to stop; None to serve everybody to the end.
    verify: share of outputs to compare with a plain softmax. The first output is always among them, unless it is 0.
    """

    trace: Path | None = None
    max_requests: int = 32
    batch: int = 16
    kv_format: KVCacheFormat = KVCacheFormat.BF16
    steps: int | None = None
    page_size: int = 64
    device: str = "cpu"
    verify: float = 0.02
    seed: int = 0


@dataclass
class Verification:
    """Outputs compared with a plain fp32 softmax over the same tokens, and how far off the worst was."""

    samples: int = 0
    worst_error: float = 0.0
    worst_cosine_difference: float = 0.0
    failures: list[str] = field(default_factory=list)

    def compare(self, who: str, q: torch.Tensor, kv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Check out [h_q, d_v] and lse [h_q] of the query q [h_q, d] over kv [n, d] fp32.

        An output is right within 8e-4 or 2/128 of its value and a cosine difference of 5e-6, an lse within 8/65536 of
        its value; so do FlashMLA's own tests judge decode.
        """
        scores = q.float() @ kv.T * q.shape[-1] ** -0.5
        want_lse = scores.logsumexp(-1)
        want = scores.softmax(-1) @ kv[:, :D_V]
        error = (out.float() - want).abs()
        x, y = out.double(), want.double()
        cosine_difference = float(1 - 2 * (x * y).sum() / (x * x + y * y).sum())
        lse_error = (lse - want_lse).abs()
        self.samples += 1
        self.worst_error = max(self.worst_error, float(error.max()))
        self.worst_cosine_difference = max(self.worst_cosine_difference, cosine_difference)
        # Negated, so that NaN fails.
        out_ok = bool(((error < 8e-4) | (error < want.abs() * (2 / 128))).all()) and cosine_difference < 5e-6
        lse_ok = bool(((lse_error < 1e-6) | (lse_error < want_lse.abs() * (8 / 65536))).all())
        if not out_ok or not lse_ok:
            self.failures.append(
                f"{who}: out is off by {float(error.max()):.3g} (cosine difference {cosine_difference:.3g}), "
                f"lse by {float(lse_error.max()):.3g}"
            )


@dataclass
class DemoResult:
    """What was served, at what cost, and whether the verified outputs were right."""

    requests: int = 0
    finished: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    step_seconds: list[float] = field(default_factory=list)
    kv_bytes_read: int = 0
    peak_tokens: int = 0
    peak_kv_bytes: int = 0
    verification: Verification = field(default_factory=Verification)

    @property
    def verified(self) -> bool:
        """Whether no compared output was wrong."""
        return not self.verification.failures

    @property
    def steps(self) -> int:
        return len(self.step_seconds)


def run_demo(options: DemoOptions, console: Console | None = None) -> DemoResult:
    """Serve the requests, show progress and a closing table on `console`, and return what the table says.

    Raises:
        TypeError, ValueError: an option is out of range, the device is not here, or the trace cannot be read; the
            message names it.
    """
    _check(options)
    console = console or Console()
    requests = BUILT_IN if options.trace is None else read_trace(options.trace, options.max_requests)
    server = Server(requests[: options.max_requests], options)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        total = sum(request.generated for request in server.waiting)
        task = progress.add_task("tokens", total=total)
        for generated in server.serve(options.steps):
            state = (
                f"{len(server.running)} running, {len(server.waiting)} waiting, {server.pool.num_free_pages} free pages"
            )
            progress.update(task, advance=generated, description=state)
    console.print(_table(server.result, options))
    for failure in server.result.verification.failures:
        console.print(f"wrong: {failure}", style="red", markup=False)
    return server.result


def read_trace(path: Path, max_requests: int | None = None) -> tuple[Request, ...]:
    """The first requests of a CSV file with a header and at least the columns ContextTokens and GeneratedTokens.

    Raises:
        ValueError: the file cannot be read, a column is missing, a value is no positive integer, or there is no row;
            the message names file, line and column.
    """
    requests: list[Request] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            for column in ("ContextTokens", "GeneratedTokens"):
                if column not in (rows.fieldnames or ()):
                    raise ValueError(
                        f"{path}: line 1: column {column}: missing among {rows.fieldnames or 'no columns'}"
                    )
            for row in rows:
                if max_requests is not None and len(requests) == max_requests:
                    break
                numbers = [_count(path, rows.line_num, column, row) for column in ("ContextTokens", "GeneratedTokens")]
                requests.append(Request(*numbers))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: line {rows.line_num + 1}: not CSV: {error}") from error
    if not requests:
        raise ValueError(f"{path}: line 2: no requests, need a row for each")
    return tuple(requests)


def _count(path: Path, line: int, column: str, row: dict[str, str | None]) -> int:
    text = row[column] or ""
    if not re.fullmatch(r"\s*0*[1-9][0-9]{0,8}\s*", text):
        raise ValueError(f"{path}: line {line}: column {column}: got {text!r}, need an integer from 1 to 999999999")
    return int(text)


def _check(options: DemoOptions) -> None:
    for name in ("max_requests", "batch", "page_size"):
        checks.positive_int(name, getattr(options, name))
    if options.steps is not None:
        checks.positive_int("steps", options.steps)
    if not 0 <= checks.real_number("verify", options.verify) <= 1:
        raise ValueError(f"verify: got {options.verify}, need a share from 0 to 1")
    if options.kv_format is KVCacheFormat.FP4_V41:
        raise ValueError("kv_format: got FP4_V41, which only a second cache beside FP8_V41 may have")
    if options.device.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device: got {options.device!r}, need cpu or cuda")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device: got {options.device!r}, but torch sees no CUDA device here")


class Server:
    """A queue of requests, the batch that is running, and the cache they share.

    A request enters, in order of arrival, once the batch has room and the pool has pages for all it will ever hold; so
    none runs out of pages halfway.
    """

    def __init__(self, requests: tuple[Request, ...], options: DemoOptions) -> None:
        self.waiting = deque(requests)
        self.running: dict[int, int] = {}  # the number of each running request -> tokens that it has yet to generate
        self.options = options
        self.device = torch.device(options.device)
        self.dtype = torch.float16 if options.kv_format is KVCacheFormat.FP16 else torch.bfloat16
        self.generator = torch.Generator(self.device).manual_seed(options.seed)
        self.choices = torch.Generator().manual_seed(options.seed)
        self.pool = PagedKVCache(
            _pool_pages(requests, options), options.page_size, options.kv_format, device=self.device
        )
        self.result = DemoResult(requests=len(requests))

    def serve(self, max_steps: int | None) -> Iterator[int]:
        """Decode until everybody is served or `max_steps` are done; yields the tokens of each step."""
        while (self.waiting or self.running) and (max_steps is None or self.result.steps < max_steps):
            self._admit()
            yield self._step()

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.options.batch:
            request = self.waiting[0]
            if self.pool.pages_for(request.total) > self.pool.num_free_pages:
                return
            self.waiting.popleft()
            number = self.result.requests - len(self.waiting)
            self.pool.allocate(number, request.total)
            self.pool.append([number], self._latents(request.context), [request.context])
            self.running[number] = request.generated
            self.result.prompt_tokens += request.context

    def _step(self) -> int:
        """One token for everybody in the batch."""
        batch = list(self.running)
        latents = self._latents(len(batch))
        q = self._random(len(batch), 1, NUM_HEADS, self.pool.d)
        if self.options.kv_format in DENSE_FORMATS:
            positions = None
        else:
            positions = [self._topk(self.pool.length(number) + 1) for number in batch]

        start = self._clock()
        self.pool.append(batch, latents)
        out, lse = self._attend(batch, q, positions)
        self.result.step_seconds.append(self._clock() - start)

        self._count(batch, positions)
        for i, number in enumerate(batch):
            if self._is_sampled():
                seen = torch.arange(self.pool.length(number)) if positions is None else positions[i]
                kv = self.pool.kv_format.gather(self.pool.cache, self.pool.slots(number, seen))
                who = f"request {number}, step {self.result.steps}"
                self.result.verification.compare(who, q[i, 0], kv, out[i, 0], lse[i, :, 0])
            self.running[number] -= 1
            if self.running[number] == 0:
                del self.running[number]
                self.pool.free(number)
                self.result.finished += 1
        return len(batch)

    def _attend(
        self, batch: list[int], q: torch.Tensor, positions: list[torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The library's part of a step: (out [b, 1, h_q, d_v], lse [b, h_q, 1])."""
        schedule, _ = get_mla_metadata()
        is_fp8 = self.options.kv_format.is_quantised
        if positions is None:
            table, seqlens = self.pool.block_table(batch), self.pool.seqlens(batch)
            return flash_mla_with_kvcache(q, self.pool.cache, table, seqlens, D_V, schedule, is_fp8_kvcache=is_fp8)
        indices = torch.full((len(batch), 1, TOPK), -1, dtype=torch.int32, device=self.device)
        for i, (number, chosen) in enumerate(zip(batch, positions, strict=True)):
            indices[i, 0, : len(chosen)] = self.pool.slots(number, chosen)
        return flash_mla_with_kvcache(
            q, self.pool.cache, None, None, D_V, schedule, is_fp8_kvcache=is_fp8, indices=indices
        )

    def _topk(self, length: int) -> torch.Tensor:
        """Random tokens of a context; a model's indexer would choose the ones that matter."""
        return torch.randperm(length, generator=self.choices)[:TOPK]

    def _count(self, batch: list[int], positions: list[torch.Tensor] | None) -> None:
        result, pool = self.result, self.pool
        lengths = [pool.length(number) for number in batch]
        read = sum(lengths) if positions is None else sum(map(len, positions))
        result.generated_tokens += len(batch)
        result.kv_bytes_read += read * pool.kv_format.bytes_per_token(pool.d)
        if sum(lengths) > result.peak_tokens:
            pages = pool.num_pages - pool.num_free_pages
            result.peak_tokens = sum(lengths)
            result.peak_kv_bytes = pages * pool.kv_format.page_bytes(pool.page_size, pool.d)

    def _is_sampled(self) -> bool:
        if self.result.verification.samples == 0:
            return self.options.verify > 0
        return bool(torch.rand((), generator=self.choices) < self.options.verify)

    def _latents(self, count: int) -> torch.Tensor:
        """[count, d] of the size for which `Verification`'s absolute tolerance is meant."""
        return self._random(count, self.pool.d) / 10

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device, generator=self.generator)

    def _clock(self) -> float:
        """Seconds, after what was launched has run."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _pool_pages(requests: tuple[Request, ...], options: DemoOptions) -> int:
    """Pages for a batch of average requests, and for the largest: with the long ones in, some have to wait."""
    pages = [-(-request.total // options.page_size) for request in requests]
    return max(*pages, -(-sum(pages) * min(options.batch, len(pages)) // len(pages)))


def _table(result: DemoResult, options: DemoOptions) -> Table:
    seconds = sum(result.step_seconds)
    p95 = statistics.quantiles(result.step_seconds, n=20, method="inclusive")[-1] if result.steps > 1 else seconds
    mode = "dense" if options.kv_format in DENSE_FORMATS else f"sparse, topk {TOPK}"
    per_head = result.peak_tokens * PER_HEAD_BYTES
    checked = result.verification
    verdict = "none"
    if checked.samples:
        verdict = f"{checked.samples} outputs, {len(checked.failures)} wrong; worst error {checked.worst_error:.1e}"
        verdict += f", worst cosine difference {checked.worst_cosine_difference:.1e}"
    table = Table(
        "", "", title=f"flash-mla demo: {options.kv_format.name}, {mode}, {options.device}", show_header=False
    )
    d = options.kv_format.head_dims[0]
    table.add_row("geometry", f"{NUM_HEADS} query heads over latents of {d}, of which {D_V} are V")
    table.add_row("requests finished", f"{result.finished} of {result.requests}")
    table.add_row("prompt tokens", f"{result.prompt_tokens:,}")
    table.add_row("generated tokens", f"{result.generated_tokens:,} in {result.steps:,} steps")
    table.add_row(
        "time per step", f"{statistics.median(result.step_seconds) * 1e3:.2f} ms median, {p95 * 1e3:.2f} ms p95"
    )
    table.add_row("throughput", f"{result.generated_tokens / seconds:,.1f} tokens/s of one layer")
    table.add_row("KV read", f"{result.kv_bytes_read / seconds / 1e9:.2f} GB/s")
    table.add_row("KV memory at the peak", f"{result.peak_kv_bytes / 1e6:,.1f} MB for {result.peak_tokens:,} tokens")
    table.add_row("the same as per-head K/V", f"{per_head / 1e6:,.1f} MB ({per_head / result.peak_kv_bytes:.0f}x)")
    table.add_row("verified", verdict)
    return table
