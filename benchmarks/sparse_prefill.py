"""Sparse prefill beside another implementation of the same API, on the same inputs in one process.

python benchmarks/sparse_prefill.py [--peer MODULE] [--out FOLDER]

MODULE is anything importable with FlashMLA's functions. Each query token names `topk` different rows at random. cold:
L2 flushed before each call, median; hot: back to back; graph: one call captured and replayed, for calls so small that
the host would be measured otherwise.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import measure
import torch

import flash_mla

D_V = 512


@dataclass(frozen=True)
class Case:
    """One shape."""

    s_q: int
    s_kv: int
    topk: int
    h_q: int
    d: int = 576
    graph: bool = False


CASES = [
    *(Case(4096, s_kv, 2048, 128) for s_kv in (8192, 32768, 131072)),
    Case(4096, 32768, 512, 64, d=512),
    Case(4096, 32768, 1024, 128, d=512),
    *(Case(4096, 32768, 2048, h_q) for h_q in (8, 16)),
    Case(128, 32768, 2048, 16),
    Case(1, 32768, 2048, 16, graph=True),
    Case(1, 32768, 2048, 128, graph=True),
]


def make(case: Case) -> dict[str, torch.Tensor]:
    kv = torch.randn(case.s_kv, 1, case.d, dtype=torch.bfloat16, device="cuda") / 10
    indices = torch.empty(case.s_q, 1, case.topk, dtype=torch.int32, device="cuda")
    for token in range(case.s_q):
        indices[token, 0] = torch.randperm(case.s_kv, device="cuda")[: case.topk]
    q = torch.randn(case.s_q, case.h_q, case.d, dtype=torch.bfloat16, device="cuda") / 10
    return {"q": q, "kv": kv, "indices": indices, "attn_sink": torch.randn(case.h_q, device="cuda")}


def caller(module: ModuleType, case: Case, inputs: dict[str, torch.Tensor]) -> Callable[[], object]:
    """A function that runs the case once, as a graph if the case says so."""

    def call() -> torch.Tensor:
        return module.flash_mla_sparse_fwd(**inputs, sm_scale=case.d**-0.5)[0]

    call()
    if not case.graph:
        return call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="module to compare with")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    options = parser.parse_args()
    modules = {"flash-mla": flash_mla}
    if options.peer:
        modules["peer"] = importlib.import_module(options.peer)
    ceilings = {"read_bytes_per_second": measure.read_bandwidth()}
    ceilings["matmul_cold_flops"], ceilings["matmul_hot_flops"] = measure.matmul_rate()
    print({name: f"{value / 1e12:.2f}e12" for name, value in ceilings.items()}, flush=True)
    rows = []
    for case in CASES:
        inputs = make(case)
        calls = {name: caller(module, case, inputs) for name, module in modules.items()}
        cold = measure.cold(calls, 15)
        hot = measure.back_to_back(calls)
        row = {
            **asdict(case),
            "flops": 2 * case.h_q * case.s_q * case.topk * (case.d + D_V),
            "gathered_bytes": 2 * case.s_q * case.topk * case.d * -(-case.h_q // 64),
            "cold_us": {name: seconds * 1e6 for name, seconds in cold.items()},
            "hot_us": {name: seconds * 1e6 for name, seconds in hot.items()},
        }
        rows.append(row)
        ratios = [row[kind].get("peer", 0) / row[kind]["flash-mla"] for kind in ("cold_us", "hot_us")]
        ours = row["cold_us"]["flash-mla"]
        print(
            f"s_q{case.s_q} s_kv{case.s_kv} topk{case.topk} h{case.h_q} d{case.d}{' graph' * case.graph}: "
            f"{ours:.1f} us {row['flops'] / ours / 1e6:.0f} TFLOP/s, "
            f"{row['gathered_bytes'] / ours / 1e6:.2f} TB/s gathered, "
            f"x{ratios[0]:.3f} cold, x{ratios[1]:.3f} hot",
            flush=True,
        )
    print(measure.record("sparse_prefill", ceilings, rows, options.out))


if __name__ == "__main__":
    main()
