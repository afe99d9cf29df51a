"""Sparse prefill beside another implementation of the same API, on the same inputs in one process.

flash-mla bench sparse_prefill [--peer MODULE] [--out FOLDER]

MODULE is anything importable with FlashMLA's functions. Each query token names `topk` different rows at random; or, as
when prompts are read that were sent to a service, those of its prompt that are not behind it, if there are more than
`topk`, so many of them: then topk_length says how many, or -1 fills up the rest. cold: L2 flushed before each call,
median; hot: back to back; graph: one call captured and replayed, for calls so small that the host would be measured
otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from flash_mla.bench import measure
from flash_mla.bench.prompts import PROMPTS, shuffled

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
    prompts: str | None = None  # of which service
    padded: bool = False  # with -1


def prompts_case(service: str, *, padded: bool) -> Case:
    tokens = sum(PROMPTS[service])
    return Case(tokens, tokens, 2048, 128, prompts=service, padded=padded)


CASES = [
    *(Case(4096, s_kv, 2048, 128) for s_kv in (8192, 32768, 131072)),
    Case(4096, 32768, 512, 64, d=512),
    Case(4096, 32768, 1024, 128, d=512),
    *(Case(4096, 32768, 2048, h_q) for h_q in (8, 16)),
    Case(128, 32768, 2048, 16),
    Case(1, 32768, 2048, 16, graph=True),
    Case(1, 32768, 2048, 128, graph=True),
    *(prompts_case(service, padded=padded) for service in PROMPTS for padded in (False, True)),
]


def make(case: Case) -> dict[str, torch.Tensor]:
    kv = torch.randn(case.s_kv, 1, case.d, dtype=torch.bfloat16, device="cuda") / 10
    indices = torch.full((case.s_q, 1, case.topk), -1, dtype=torch.int32, device="cuda")
    first, seen = seen_rows(case)
    lengths = [min(rows, case.topk) for rows in seen]
    for token, length in enumerate(lengths):
        indices[token, 0, :length] = torch.randperm(seen[token], device="cuda")[:length] + first[token]
    q = torch.randn(case.s_q, case.h_q, case.d, dtype=torch.bfloat16, device="cuda") / 10
    inputs = {"q": q, "kv": kv, "indices": indices, "attn_sink": torch.randn(case.h_q, device="cuda")}
    if case.prompts is not None and not case.padded:
        inputs["topk_length"] = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    return inputs


def seen_rows(case: Case) -> tuple[list[int], list[int]]:
    """Of each query token, the first row of kv that it may name, and how many there are."""
    if case.prompts is None:
        return [0] * case.s_q, [case.s_kv] * case.s_q
    lengths = shuffled(PROMPTS[case.prompts])
    begins = [sum(lengths[:i]) for i in range(len(lengths))]
    first = [begin for begin, length in zip(begins, lengths, strict=True) for _ in range(length)]
    return first, [position + 1 for length in lengths for position in range(length)]


def caller(module: ModuleType, case: Case, inputs: dict[str, torch.Tensor]) -> Callable[[], object]:
    """A function that runs the case once, as a graph if the case says so."""

    def call() -> torch.Tensor:
        return module.flash_mla_sparse_fwd(**inputs, sm_scale=case.d**-0.5)[0]

    call()
    return measure.graph(call) if case.graph else call


def prepare(case: Case, modules: Mapping[str, ModuleType]) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    inputs = make(case)
    named = sum(min(rows, case.topk) for rows in seen_rows(case)[1])
    amounts = {
        "flops": 2 * case.h_q * named * (case.d + D_V),
        "gathered_bytes": 2 * named * case.d * -(-case.h_q // 64),
    }
    return {name: caller(module, case, inputs) for name, module in modules.items()}, amounts


def main(arguments: Sequence[str] | None = None) -> None:
    measure.beside_a_peer("sparse_prefill", __doc__, CASES, prepare, arguments)
