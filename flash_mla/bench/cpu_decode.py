"""Decode and sparse prefill on the CPU beside one matmul of as many FLOPs: `flash-mla bench cpu_decode`.

FLOPs = 2 * h_q * attended tokens * (d + d_v), d + d_v being 576 + 512. The ceiling is a square matmul in fp32 or bf16,
whichever is faster here, in turns with the call it is held against. Other programs slow a call of many operations far
more than one matmul, as every operation waits for its slowest thread: measure on an idle machine, or with --threads 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import flash_mla
from flash_mla import KVCacheFormat

D, D_V, PAGE = 576, 512, 64


@dataclass(frozen=True)
class Dense:
    """Decode of `b` requests of `s_k` tokens."""

    b: int
    s_q: int
    s_k: int
    h_q: int
    kv_format: KVCacheFormat = KVCacheFormat.BF16
    causal: bool = False

    @property
    def flops(self) -> int:
        return 2 * self.b * self.s_q * self.s_k * self.h_q * (D + D_V)

    def call(self) -> Callable[[], object]:
        pages = -(-self.s_k // PAGE)
        args: dict[str, Any] = {
            "q": torch.randn(self.b, self.s_q, self.h_q, D).bfloat16(),
            "k_cache": make_cache(self.kv_format, self.b * pages),
            "block_table": torch.randperm(self.b * pages).int().view(self.b, pages),
            "cache_seqlens": torch.full((self.b,), self.s_k, dtype=torch.int32),
            "tile_scheduler_metadata": flash_mla.get_mla_metadata()[0],
        }
        flags: dict[str, Any] = {"causal": self.causal, "is_fp8_kvcache": self.kv_format.is_quantised}
        return lambda: flash_mla.flash_mla_with_kvcache(head_dim_v=D_V, **args, **flags)


@dataclass(frozen=True)
class Sparse:
    """Decode of `b` requests, whose query tokens name `topk` of `s_kv` slots."""

    b: int
    s_q: int
    s_kv: int
    topk: int
    h_q: int
    kv_format: KVCacheFormat

    @property
    def flops(self) -> int:
        return 2 * self.b * self.s_q * self.topk * self.h_q * (D + D_V)

    def call(self) -> Callable[[], object]:
        args: dict[str, Any] = {
            "q": torch.randn(self.b, self.s_q, self.h_q, D).bfloat16(),
            "k_cache": make_cache(self.kv_format, self.s_kv // PAGE),
            "block_table": None,
            "cache_seqlens": None,
            "indices": torch.randint(self.s_kv, (self.b, self.s_q, self.topk), dtype=torch.int32),
            "tile_scheduler_metadata": flash_mla.get_mla_metadata()[0],
        }
        return lambda: flash_mla.flash_mla_with_kvcache(
            head_dim_v=D_V, is_fp8_kvcache=self.kv_format.is_quantised, **args
        )


@dataclass(frozen=True)
class SparsePrefill:
    """Prefill of `s_q` query tokens, which name `topk` of `s_kv` rows."""

    s_q: int
    s_kv: int
    topk: int
    h_q: int

    @property
    def flops(self) -> int:
        return 2 * self.s_q * self.topk * self.h_q * (D + D_V)

    def call(self) -> Callable[[], object]:
        q = torch.randn(self.s_q, self.h_q, D).bfloat16()
        kv = (torch.randn(self.s_kv, 1, D) / 10).bfloat16()
        indices = torch.randint(self.s_kv, (self.s_q, 1, self.topk), dtype=torch.int32)
        return lambda: flash_mla.flash_mla_sparse_fwd(q, kv, indices, D**-0.5)


CASES: list[Dense | Sparse | SparsePrefill] = [
    Dense(8, 1, 4096, 128),
    Dense(8, 2, 4096, 128, causal=True),
    Dense(8, 1, 4096, 16),
    Dense(8, 1, 4096, 128, KVCacheFormat.FP8_V32),
    Sparse(8, 1, 32768, 2048, 128, KVCacheFormat.FP8_V32),
    Sparse(8, 1, 32768, 2048, 16, KVCacheFormat.FP8_V32),
    SparsePrefill(32, 8192, 2048, 128),
    SparsePrefill(32, 8192, 2048, 16),
]


def make_cache(kv_format: KVCacheFormat, num_pages: int) -> torch.Tensor:
    return kv_format.pack((torch.randn(num_pages, PAGE, 1, D) / 10).clamp(-1, 1))


def square_matmul(flops: int, dtype: torch.dtype) -> Callable[[], object]:
    """A product of square matrices that takes about as many FLOPs."""
    side = round((flops / 2) ** (1 / 3))
    a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
    return lambda: a @ b


def in_turns(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call of each function, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def faster_dtype() -> torch.dtype:
    """In which of fp32 and bf16 a matmul is faster here."""
    matmuls = {str(dtype): square_matmul(2 * 1024**3, dtype) for dtype in (torch.float32, torch.bfloat16)}
    seconds = in_turns(matmuls, 5)
    return torch.float32 if min(seconds["torch.float32"]) <= min(seconds["torch.bfloat16"]) else torch.bfloat16


def measure(case: Dense | Sparse | SparsePrefill, dtype: torch.dtype, repeats: int) -> dict:
    """One row of the result: milliseconds of ours and of a matmul in `dtype`, the shortest and the median."""
    seconds = in_turns({"flash-mla": case.call(), "matmul": square_matmul(case.flops, dtype)}, repeats)
    shape = asdict(case)
    if "kv_format" in shape:
        shape["kv_format"] = shape["kv_format"].name
    return {
        "mode": type(case).__name__,
        **shape,
        "flops": case.flops,
        "min_ms": {name: min(values) * 1e3 for name, values in seconds.items()},
        "median_ms": {name: statistics.median(values) * 1e3 for name, values in seconds.items()},
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "flash-mla bench cpu_decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="folder to record results in")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = faster_dtype()
    rows = []
    for case in CASES:
        row = measure(case, dtype, options.repeats)
        rows.append(row)
        for kind in ("min_ms", "median_ms"):
            ours, matmul = row[kind]["flash-mla"], row[kind]["matmul"]
            print(
                f"{case} {kind}: {ours:.1f}, {case.flops / ours / 1e6:.1f} GFLOP/s, {matmul / ours:.0%} of a matmul",
                flush=True,
            )
    result = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": options.threads,
        "matmul_dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rows": rows,
    }
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / "cpu_decode.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(path)
