"""Dense decode beside another implementation of the same API, on the same inputs in one process.

flash-mla bench dense_decode [--peer MODULE] [--out FOLDER]

MODULE is anything importable with FlashMLA's functions. Lengths are drawn as DeepSeek's own benchmark draws them:
normal with a standard deviation of half the mean; or they are those of prompts that were sent to a service. cold: L2
flushed before each call, median; hot: back to back; graph: one call captured and replayed, for batches so small that
the host would be measured otherwise. The peer gets pages of 64 tokens, the only ones that FlashMLA takes, whatever the
case says.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from flash_mla.bench import measure
from flash_mla.bench.prompts import PROMPTS, shuffled

D, D_V = 576, 512
PEER_PAGE_SIZE = 64


@dataclass(frozen=True)
class Case:
    """One shape; requests of `s_k` tokens on average."""

    b: int
    s_q: int
    s_k: int
    h_q: int
    causal: bool = False
    graph: bool = False
    page_size: int = 64  # a divisor of 64
    prompts: str | None = None  # of which service, if lengths are not drawn


def prompts_case(service: str, h_q: int) -> Case:
    lengths = PROMPTS[service]
    return Case(128, 1, sum(lengths) // len(lengths), h_q, prompts=service)


CASES = [
    *(Case(128, s_q, s_k, 128) for s_k in (4096, 8192, 32768) for s_q in (1, 2)),
    Case(128, 2, 8192, 128, causal=True),
    *(Case(128, 1, 8192, h_q) for h_q in (16, 32, 64)),
    Case(32, 1, 16384, 16),
    Case(1, 1, 8192, 16, graph=True),
    Case(4, 1, 8192, 128, graph=True),
    Case(1, 1, 65536, 128, graph=True),
    *(Case(128, 1, 8192, h_q, page_size=page_size) for page_size in (16, 1) for h_q in (16, 128)),
    *(prompts_case(service, h_q) for service in PROMPTS for h_q in (16, 128)),
    *(Case(16, 1, 8192, h_q, graph=True) for h_q in (16, 64, 128)),
]


def make(case: Case) -> tuple[dict[str, torch.Tensor], int]:
    """Inputs, and the tokens of all requests together."""
    rng = random.Random(0)
    lengths = [case.s_k]
    if case.prompts is not None:
        lengths = list(shuffled(PROMPTS[case.prompts]))
    elif case.b > 4:
        lengths = [max(case.s_q, int(rng.normalvariate(case.s_k, case.s_k / 2))) for _ in range(case.b)]
    seqlens = torch.tensor(lengths * (case.b // len(lengths)), dtype=torch.int32, device="cuda")
    slots = -(-int(seqlens.max()) // PEER_PAGE_SIZE) * PEER_PAGE_SIZE  # of a request
    cache = torch.empty(case.b * slots, D, dtype=torch.bfloat16, device="cuda")
    for part in cache.split(1 << 18):
        part.copy_((torch.randn(part.shape, device="cuda") / 10).clamp(-1, 1))
    q = torch.randn(case.b, case.s_q, case.h_q, D, dtype=torch.bfloat16, device="cuda")
    return {"q": q, "cache_seqlens": seqlens, **paged(cache, case.b, case.page_size)}, int(seqlens.sum())


def paged(cache: torch.Tensor, b: int, page_size: int) -> dict[str, torch.Tensor]:
    """All tokens of a cache, handed out to `b` requests in pages at random."""
    k_cache = cache.view(-1, page_size, 1, D)
    return {"k_cache": k_cache, "block_table": torch.randperm(len(k_cache), device="cuda").int().view(b, -1)}


def caller(module: ModuleType, case: Case, inputs: dict[str, torch.Tensor]) -> Callable[[], object]:
    """A function that runs the case once, planned, and as a graph if the case says so."""
    meta, num_splits = module.get_mla_metadata()

    def call() -> torch.Tensor:
        return module.flash_mla_with_kvcache(
            **inputs, head_dim_v=D_V, tile_scheduler_metadata=meta, num_splits=num_splits, causal=case.causal
        )[0]

    call()
    return measure.graph(call) if case.graph else call


def prepare(case: Case, modules: Mapping[str, ModuleType]) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    inputs, tokens = make(case)
    amounts = {
        "flops": 2 * case.h_q * case.s_q * tokens * (D + D_V),
        "bytes": 2 * (tokens * D + case.b * case.s_q * case.h_q * (D + D_V)),
    }
    inputs_of = {"flash-mla": inputs, "peer": inputs}
    if case.page_size != PEER_PAGE_SIZE:
        inputs_of["peer"] = {**inputs, **paged(inputs["k_cache"], case.b, PEER_PAGE_SIZE)}
    return {name: caller(module, case, inputs_of[name]) for name, module in modules.items()}, amounts


def main(arguments: Sequence[str] | None = None) -> None:
    measure.beside_a_peer("dense_decode", __doc__, CASES, prepare, arguments)
