"""Time dense multi-head attention beside cuDNN's, as PyTorch calls it: `python benchmarks/mha.py [--out FOLDER]`.

FLASH_MLA_BACKEND chooses the kernels; results of a forced backend are recorded under its name. FLOPs count the products
once: d_qk + d_v forward, 3 d_qk + 2 d_v backward, times 2 for every pair of a query and a key that it sees.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import measure
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_mla
from flash_mla import backends
from flash_mla.problem import MHAProblem

D_V = 128


@dataclass(frozen=True)
class Case:
    b: int
    s: int
    h: int
    d_qk: int
    causal: bool

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees, over all heads."""
        return self.b * self.h * (self.s * (self.s + 1) // 2 if self.causal else self.s**2)


CASES = [Case(1, 8192, 128, 192, False), Case(1, 8192, 128, 192, True), Case(4, 4096, 128, 128, True)]


def calls(case: Case) -> tuple[dict[str, Callable[[], object]], dict[str, Callable[[], object]]]:
    """Forward and backward calls of either side, on the same inputs."""
    total = case.b * case.s
    q, k, v, dout = (
        torch.randn(total, case.h, d, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for d in (case.d_qk, case.d_qk, D_V, D_V)
    )
    offsets = torch.arange(0, total + 1, case.s, dtype=torch.int32, device="cuda")
    by_head = [x.unflatten(0, (case.b, case.s)).transpose(1, 2) for x in (q, k, v, dout)]

    def ours() -> torch.Tensor:
        return flash_mla.flash_attn_varlen_func(q, k, v, offsets, offsets, case.s, case.s, causal=case.causal)[0]

    def cudnn() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(*by_head[:3], is_causal=case.causal)

    def without_graph(forward: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        return torch.no_grad()(forward)

    def gradients(forward: Callable[[], torch.Tensor], dout: torch.Tensor) -> Callable[[], object]:
        out = forward()
        return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    return (
        {"flash-mla": without_graph(ours), "cudnn": without_graph(cudnn)},
        {"flash-mla": gradients(ours, dout.detach()), "cudnn": gradients(cudnn, by_head[3].detach())},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    folder = parser.parse_args().out
    ceilings = dict(zip(("matmul_cold_flops", "matmul_hot_flops"), measure.matmul_rate(), strict=True))
    print({name: f"{value / 1e12:.0f}e12" for name, value in ceilings.items()}, flush=True)
    rows = []
    for case in CASES:
        problem = MHAProblem(
            torch.device("cuda", 0), torch.bfloat16, case.h, case.h, case.d_qk, D_V, case.causal
        )  # fmt: skip
        backend = backends.choose(problem).NAME
        for direction, functions, columns in zip(
            ("forward", "backward"), calls(case), (case.d_qk + D_V, 3 * case.d_qk + 2 * D_V), strict=True
        ):
            cold, hot = measure.cold(functions, 7), measure.back_to_back(functions)
            row = {
                **asdict(case),
                "direction": direction,
                "backend": backend,
                "flops": 2 * case.pairs * columns,
                "cold_us": {name: seconds * 1e6 for name, seconds in cold.items()},
                "hot_us": {name: seconds * 1e6 for name, seconds in hot.items()},
            }
            rows.append(row)
            print(
                f"{direction} {case.d_qk}/{D_V} b{case.b} s{case.s} h{case.h}{' causal' * case.causal} on {backend}: "
                f"{cold['flash-mla'] * 1e6:.0f} us {row['flops'] / cold['flash-mla'] / 1e12:.0f} TFLOP/s, "
                f"x{cold['cudnn'] / cold['flash-mla']:.3f} cold, x{hot['cudnn'] / hot['flash-mla']:.3f} hot",
                flush=True,
            )
    forced = os.environ.get("FLASH_MLA_BACKEND")
    print(measure.record(f"{forced}_mha" if forced else "mha", ceilings, rows, folder))


if __name__ == "__main__":
    main()
