"""Sparse prefill beside another implementation of the same API, on the same inputs in one process.

python benchmarks/sparse_prefill.py [--peer MODULE] [--out FOLDER]

MODULE is anything importable with FlashMLA's functions. Each query token names `topk` different rows at random. cold:
L2 flushed before each call, median; hot: back to back; graph: one call captured and replayed, for calls so small that
the host would be measured otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import measure
import torch

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
    return measure.graph(call) if case.graph else call


def prepare(case: Case, modules: Mapping[str, ModuleType]) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    inputs = make(case)
    amounts = {
        "flops": 2 * case.h_q * case.s_q * case.topk * (case.d + D_V),
        "gathered_bytes": 2 * case.s_q * case.topk * case.d * -(-case.h_q // 64),
    }
    return {name: caller(module, case, inputs) for name, module in modules.items()}, amounts


if __name__ == "__main__":
    measure.beside_a_peer("sparse_prefill", __doc__, CASES, prepare)
