"""Token-sparse decode beside another implementation of the same API, on the same inputs in one process.

python benchmarks/sparse_decode.py [--peer MODULE] [--out FOLDER]

MODULE is anything importable with FlashMLA's functions. Every request has its own tokens, of which each query token
attends to `topk` that are drawn anew, all different; together they are far larger than the L2. cold: L2 flushed before
each call, median; hot: back to back. FlashMLA needs 64 heads or more: with fewer, it is given 64.
"""

from __future__ import annotations

import argparse
import importlib
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import measure
import torch

import flash_mla
from flash_mla import KVCacheFormat

D_V = 512
PEER_HEADS = 64


@dataclass(frozen=True)
class Case:
    """One shape; with `extra_topk`, a second cache of the same format."""

    b: int
    s_q: int
    h_q: int
    topk: int
    kv_format: str = "FP8_V32"
    s_k: int = 32768
    page_size: int = 64
    extra_topk: int = 0
    extra_page_size: int = 64

    @property
    def d(self) -> int:
        return KVCacheFormat[self.kv_format].head_dims[0]

    @property
    def attended(self) -> int:
        """Pairs of a query token and a token that it attends to."""
        return self.b * self.s_q * (self.topk + self.extra_topk)


CASES = [
    *(Case(b, 2, 128, 2048) for b in (2, 64, 128)),
    *(Case(128, 1, h_q, 2048) for h_q in (8, 16, 32, 64)),
    *(Case(148, 2, h_q, 16384) for h_q in (64, 128)),
    *(Case(148, 2, h_q, 16384, "FP8_V4") for h_q in (64, 128)),
    *(Case(b, 2, 64, 128, "FP8_V4", 16384, 256, 512) for b in (2, 64, 128, 256)),
    Case(128, 2, 128, 128, "FP8_V4", 16384, 256, 1024),
]


def scope(case: Case, topk: int, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache, and indices [b, s_q, topk] into it."""
    kv_format = KVCacheFormat[case.kv_format]
    pages = case.s_k // page_size
    cache = kv_format.empty(case.b * pages, page_size, device="cuda").view(torch.uint8)
    for part in cache.split(max(1, 262144 // page_size)):
        latents = (torch.randn(*part.shape[:3], case.d, device="cuda") / 10).clamp(-1, 1)
        part.copy_(kv_format.pack(latents).view(torch.uint8))
    rows = [torch.rand(case.s_q, case.s_k, device="cuda").topk(topk).indices + i * case.s_k for i in range(case.b)]
    return cache.view(torch.float8_e4m3fn), torch.stack(rows).int()


def make(case: Case) -> dict[str, torch.Tensor | None]:
    inputs: dict[str, torch.Tensor | None] = {
        "q": torch.randn(case.b, case.s_q, case.h_q, case.d, dtype=torch.bfloat16, device="cuda"),
        "attn_sink": torch.randn(case.h_q, device="cuda"),
        "block_table": None,
        "cache_seqlens": None,
    }
    inputs["k_cache"], inputs["indices"] = scope(case, case.topk, case.page_size)
    if case.extra_topk:
        extra = scope(case, case.extra_topk, case.extra_page_size)
        inputs["extra_k_cache"], inputs["extra_indices_in_kvcache"] = extra
    return inputs


def padded(inputs: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    """The same call with as many heads as FlashMLA needs."""
    q, sink = inputs["q"], inputs["attn_sink"]
    assert q is not None
    assert sink is not None
    missing = max(0, PEER_HEADS - len(sink))
    pad = torch.nn.functional.pad
    return {**inputs, "q": pad(q, (0, 0, 0, missing)), "attn_sink": pad(sink, (0, missing))}


def caller(module: ModuleType, inputs: dict[str, torch.Tensor | None]):
    """A function that runs the case once, planned."""
    meta, num_splits = module.get_mla_metadata()

    def call() -> None:
        module.flash_mla_with_kvcache(
            **inputs, head_dim_v=D_V, tile_scheduler_metadata=meta, num_splits=num_splits, is_fp8_kvcache=True
        )

    call()
    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="module to compare with")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    options = parser.parse_args()
    ceilings = {"read_bytes_per_second": measure.read_bandwidth()}
    ceilings["matmul_cold_flops"], ceilings["matmul_hot_flops"] = measure.matmul_rate()
    print({name: f"{value / 1e12:.2f}e12" for name, value in ceilings.items()}, flush=True)
    rows = []
    for case in CASES:
        torch.cuda.empty_cache()
        inputs = make(case)
        calls = {"flash-mla": caller(flash_mla, inputs)}
        if options.peer:
            calls["peer"] = caller(importlib.import_module(options.peer), padded(inputs))
        cold = measure.cold(calls, 11)
        hot = measure.back_to_back(calls, 0.03)
        token_bytes = KVCacheFormat[case.kv_format].bytes_per_token()
        row = {
            **asdict(case),
            "flops": 2 * case.h_q * case.attended * (case.d + D_V),
            "bytes": case.attended * token_bytes + 2 * case.b * case.s_q * case.h_q * (case.d + D_V),
            "cold_us": {name: seconds * 1e6 for name, seconds in cold.items()},
            "hot_us": {name: seconds * 1e6 for name, seconds in hot.items()},
        }
        rows.append(row)
        ratios = [row[kind].get("peer", 0) / row[kind]["flash-mla"] for kind in ("cold_us", "hot_us")]
        ours = row["cold_us"]["flash-mla"]
        topk = f"{case.topk}+{case.extra_topk}" if case.extra_topk else case.topk
        print(
            f"{case.kv_format} b{case.b} s_q{case.s_q} h{case.h_q} topk {topk}: {ours:.1f} us "
            f"{row['flops'] / ours / 1e6:.0f} TFLOP/s, x{ratios[0]:.3f} cold, x{ratios[1]:.3f} hot",
            flush=True,
        )
    print(measure.record("sparse_decode", ceilings, rows, options.out))


if __name__ == "__main__":
    main()
