"""Token-sparse decode beside another implementation of the same API, on the same inputs in one process.

flash-mla bench sparse_decode [--peer MODULE] [--out FOLDER]

MODULE is anything importable with FlashMLA's functions. Every request has its own tokens, of which each query token
attends to `topk` that are drawn anew, all different; together they are far larger than the L2. cold: L2 flushed before
each call, median; hot: back to back; graph: one call captured and replayed, for batches so small that the host would
be measured otherwise. FlashMLA needs 64 heads or more: with fewer, it is given 64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from flash_mla import KVCacheFormat
from flash_mla.bench import measure

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
    graph: bool = False

    @property
    def d(self) -> int:
        return KVCacheFormat[self.kv_format].head_dims[0]

    @property
    def attended(self) -> int:
        """Pairs of a query token and a token that it attends to."""
        return self.b * self.s_q * (self.topk + self.extra_topk)


CASES = [
    Case(2, 2, 128, 2048, graph=True),
    *(Case(b, 2, 128, 2048) for b in (64, 128)),
    *(Case(128, 1, h_q, 2048) for h_q in (8, 16, 32, 64)),
    *(Case(148, 2, h_q, 16384) for h_q in (64, 128)),
    *(Case(148, 2, h_q, 16384, "FP8_V4") for h_q in (64, 128)),
    Case(2, 2, 64, 128, "FP8_V4", 16384, 256, 512, graph=True),
    *(Case(b, 2, 64, 128, "FP8_V4", 16384, 256, 512) for b in (64, 128, 256)),
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


def caller(module: ModuleType, inputs: dict[str, torch.Tensor | None], graph: bool = False) -> Callable[[], object]:
    """A function that runs the case once, planned, and as a graph if told so."""
    meta, num_splits = module.get_mla_metadata()

    def call() -> None:
        module.flash_mla_with_kvcache(
            **inputs, head_dim_v=D_V, tile_scheduler_metadata=meta, num_splits=num_splits, is_fp8_kvcache=True
        )

    call()
    return measure.graph(call) if graph else call


def prepare(case: Case, modules: Mapping[str, ModuleType]) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    inputs = make(case)
    inputs_of = {"flash-mla": inputs, "peer": padded(inputs)}
    calls = {name: caller(module, inputs_of[name], case.graph) for name, module in modules.items()}
    token_bytes = KVCacheFormat[case.kv_format].bytes_per_token()
    amounts = {
        "flops": 2 * case.h_q * case.attended * (case.d + D_V),
        "bytes": case.attended * token_bytes + 2 * case.b * case.s_q * case.h_q * (case.d + D_V),
    }
    return calls, amounts


def main(arguments: Sequence[str] | None = None) -> None:
    measure.beside_a_peer("sparse_decode", __doc__, CASES, prepare, arguments)
