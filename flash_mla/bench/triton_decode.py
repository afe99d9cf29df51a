"""The Triton backend's decode and sparse prefill beside another implementation, on the same inputs in one process.

flash-mla bench triton_decode [--peer MODULE] [--out FOLDER]

The cases are of the benchmarks of each mode, which say how their inputs are drawn.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

from flash_mla.bench import dense_decode, measure, sparse_decode, sparse_prefill

PREPARE = {module.Case: module.prepare for module in (dense_decode, sparse_decode, sparse_prefill)}
CASES = [
    *(dense_decode.Case(128, 1, 8192, h_q) for h_q in (16, 32, 64, 128)),
    sparse_decode.Case(128, 2, 128, 2048, s_k=8192),
    sparse_decode.Case(128, 1, 64, 2048, s_k=8192),
    sparse_prefill.Case(4096, 8192, 2048, 128),
]


def prepare(case: object, modules: Mapping[str, ModuleType]) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    os.environ["FLASH_MLA_BACKEND"] = "triton"
    return PREPARE[type(case)](case, modules)


def main(arguments: Sequence[str] | None = None) -> None:
    measure.beside_a_peer("triton_decode", __doc__, CASES, prepare, arguments)
