"""The Triton backend's decode and sparse prefill beside another implementation, on the same inputs in one process.

python benchmarks/triton_decode.py [--peer MODULE] [--out FOLDER]

MODULE is anything importable with FlashMLA's functions. cold: L2 flushed before each call, median; hot: back to back.
"""

from __future__ import annotations

import argparse
import importlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import dense_decode
import measure
import torch

import flash_mla
from flash_mla import KVCacheFormat

D, D_V, PAGE = 576, 512, 64


@dataclass(frozen=True)
class SparseDecode:
    """Over FP8_V32, each query token with `topk` tokens of its request's s_k."""

    b: int
    s_q: int
    s_k: int
    topk: int
    h_q: int

    def caller(self, module: ModuleType, inputs: dict[str, torch.Tensor]):
        meta, num_splits = module.get_mla_metadata()
        return lambda: module.flash_mla_with_kvcache(
            **inputs, block_table=None, cache_seqlens=None, head_dim_v=D_V, tile_scheduler_metadata=meta,
            num_splits=num_splits, softmax_scale=D**-0.5, is_fp8_kvcache=True,
        )[0]  # fmt: skip

    def make(self) -> dict[str, torch.Tensor]:
        pages = self.b * self.s_k // PAGE
        parts = [_latents(min(1024, pages - begin), PAGE, 1, D) for begin in range(0, pages, 1024)]
        cache = torch.cat([KVCacheFormat.FP8_V32.pack(part).view(torch.uint8) for part in parts])
        order = torch.rand(self.b, self.s_q, self.s_k, device="cuda").topk(self.topk).indices
        slots = order + torch.arange(self.b, device="cuda").view(-1, 1, 1) * self.s_k
        q = torch.randn(self.b, self.s_q, self.h_q, D, dtype=torch.bfloat16, device="cuda")
        return {"q": q, "k_cache": cache.view(torch.float8_e4m3fn), "indices": slots.int()}

    @property
    def flops(self) -> int:
        return 2 * self.b * self.s_q * self.topk * self.h_q * (D + D_V)


@dataclass(frozen=True)
class SparsePrefill:
    """Over bf16, each query token with `topk` of s_kv rows."""

    s_q: int
    s_kv: int
    topk: int
    h_q: int

    def caller(self, module: ModuleType, inputs: dict[str, torch.Tensor]):
        return lambda: module.flash_mla_sparse_fwd(**inputs, sm_scale=D**-0.5)[0]

    def make(self) -> dict[str, torch.Tensor]:
        indices = torch.rand(self.s_q, 1, self.s_kv, device="cuda").topk(self.topk).indices.int()
        q = torch.randn(self.s_q, self.h_q, D, dtype=torch.bfloat16, device="cuda")
        return {"q": q, "kv": _latents(self.s_kv, 1, D), "indices": indices}

    @property
    def flops(self) -> int:
        return 2 * self.s_q * self.topk * self.h_q * (D + D_V)


@dataclass(frozen=True)
class DenseDecode:
    """As benchmarks/dense_decode.py has it."""

    b: int
    s_q: int
    s_k: int
    h_q: int

    def caller(self, module: ModuleType, inputs: dict[str, torch.Tensor]):
        return dense_decode.caller(module, dense_decode.Case(self.b, self.s_q, self.s_k, self.h_q), inputs)

    def make(self) -> dict[str, torch.Tensor]:
        return dense_decode.make(dense_decode.Case(self.b, self.s_q, self.s_k, self.h_q))[0]


Case = DenseDecode | SparseDecode | SparsePrefill

CASES: list[Case] = [
    *(DenseDecode(128, 1, 8192, h_q) for h_q in (16, 32, 64, 128)),
    SparseDecode(128, 2, 8192, 2048, 128),
    SparseDecode(128, 1, 8192, 2048, 64),
    SparsePrefill(4096, 8192, 2048, 128),
]


def _latents(*shape: int) -> torch.Tensor:
    return (torch.randn(shape, device="cuda") / 10).clamp(-1, 1).bfloat16()


def _flops(case: Case, inputs: dict[str, torch.Tensor]) -> int:
    if isinstance(case, DenseDecode):
        return 2 * case.h_q * case.s_q * int(inputs["cache_seqlens"].sum()) * (D + D_V)
    return case.flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="module to compare with")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    options = parser.parse_args()
    os.environ["FLASH_MLA_BACKEND"] = "triton"
    modules = {"flash-mla": flash_mla}
    if options.peer:
        modules["peer"] = importlib.import_module(options.peer)
    ceilings = {"read_bytes_per_second": measure.read_bandwidth()}
    ceilings["matmul_cold_flops"], ceilings["matmul_hot_flops"] = measure.matmul_rate()
    print({name: f"{value / 1e12:.2f}e12" for name, value in ceilings.items()}, flush=True)
    rows = []
    for case in CASES:
        inputs = case.make()
        calls = {name: case.caller(module, inputs) for name, module in modules.items()}
        cold = measure.cold(calls, 15)
        hot = measure.back_to_back(calls)
        row = {
            "mode": type(case).__name__,
            **asdict(case),
            "flops": _flops(case, inputs),
            "cold_us": {name: seconds * 1e6 for name, seconds in cold.items()},
            "hot_us": {name: seconds * 1e6 for name, seconds in hot.items()},
        }
        rows.append(row)
        ratios = [row[kind].get("peer", 0) / row[kind]["flash-mla"] for kind in ("cold_us", "hot_us")]
        ours = row["cold_us"]["flash-mla"]
        print(
            f"{case}: {ours:.1f} us {row['flops'] / ours / 1e6:.0f} TFLOP/s, "
            f"x{ratios[0]:.3f} cold, x{ratios[1]:.3f} hot",
            flush=True,
        )
    print(measure.record("triton_decode", ceilings, rows, options.out))


if __name__ == "__main__":
    main()
