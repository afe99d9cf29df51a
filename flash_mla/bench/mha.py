"""Time dense multi-head attention beside cuDNN's, as PyTorch calls it: `flash-mla bench mha [--out FOLDER]`.

Then sequences as long as prompts that were sent to two services, beside sequences that are all 4096 tokens long.

FLASH_MLA_BACKEND chooses the kernels; results of a forced backend are recorded under its name. FLOPs count the products
once: d_qk + d_v forward, 3 d_qk + 2 d_v backward, times 2 for every pair of a query and a key that it sees.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_mla
from flash_mla import backends
from flash_mla.bench import measure
from flash_mla.bench.prompts import PROMPTS, shuffled
from flash_mla.problem import MHAProblem

D_V = 128


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]  # of queries as of keys
    h: int
    d_qk: int
    causal: bool

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees, over all heads."""
        return self.h * sum(s * (s + 1) // 2 if self.causal else s**2 for s in self.lengths)

    def flops(self, direction: str) -> int:
        columns = {"forward": self.d_qk + D_V, "backward": 3 * self.d_qk + 2 * D_V}
        return 2 * self.pairs * columns[direction]

    @property
    def backend(self) -> str:
        device = torch.device("cuda", 0)
        problem = MHAProblem(device, torch.bfloat16, self.h, self.h, self.d_qk, D_V, self.causal)
        return backends.choose(problem).NAME


CASES = [Case((8192,), 128, 192, False), Case((8192,), 128, 192, True), Case((4096,) * 4, 128, 128, True)]


def calls(case: Case) -> dict[str, dict[str, Callable[[], object]]]:
    """By direction, the calls of either side on the same inputs; cuDNN's needs sequences of one length."""
    total, longest = sum(case.lengths), max(case.lengths)
    q, k, v, dout = (
        torch.randn(total, case.h, d, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for d in (case.d_qk, case.d_qk, D_V, D_V)
    )
    offsets = torch.tensor([0, *case.lengths], dtype=torch.int32, device="cuda").cumsum(0, dtype=torch.int32)

    def ours() -> torch.Tensor:
        return flash_mla.flash_attn_varlen_func(q, k, v, offsets, offsets, longest, longest, causal=case.causal)[0]

    def gradients(forward: Callable[[], torch.Tensor], dout: torch.Tensor) -> Callable[[], object]:
        for _ in range(3):  # calls are repeated, at less host time, from the third of a kind on
            out = forward()
        return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    forward: dict[str, Callable[[], object]] = {"flash-mla": torch.no_grad()(ours)}
    backward = {"flash-mla": gradients(ours, dout.detach())}
    if total == len(case.lengths) * longest:
        q_heads, k_heads, v_heads, dout_heads = (x.unflatten(0, (-1, longest)).transpose(1, 2) for x in (q, k, v, dout))

        def cudnn() -> torch.Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(
                    q_heads, k_heads, v_heads, is_causal=case.causal
                )

        forward["cudnn"] = torch.no_grad()(cudnn)
        backward["cudnn"] = gradients(cudnn, dout_heads.detach())
    return {"forward": forward, "backward": backward}


def timed(functions: Mapping[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """Microseconds a call of each function."""
    measured = {"cold_us": measure.cold(functions, 7), "hot_us": measure.back_to_back(functions)}
    return {kind: {name: seconds * 1e6 for name, seconds in times.items()} for kind, times in measured.items()}


def beside_cudnn(case: Case) -> list[dict]:
    """A row for each direction."""
    shape = {"b": len(case.lengths), "s": case.lengths[0], "h": case.h, "d_qk": case.d_qk, "causal": case.causal}
    rows = []
    for direction, functions in calls(case).items():
        flops = case.flops(direction)
        row: dict[str, Any] = {
            **shape,
            "direction": direction,
            "backend": case.backend,
            "flops": flops,
            **timed(functions),
        }
        rows.append(row)
        cold, hot = row["cold_us"], row["hot_us"]
        print(
            f"{direction} {shape} on {case.backend}: {cold['flash-mla']:.0f} us, "
            f"{flops / cold['flash-mla'] / 1e6:.0f} TFLOP/s, x{cold['cudnn'] / cold['flash-mla']:.3f} cold, "
            f"x{hot['cudnn'] / hot['flash-mla']:.3f} hot",
            flush=True,
        )
    return rows


def beside_one_length(d_qk: int) -> list[dict]:
    """A row for each trace and direction: causal attention of its prompts, and of as many tokens in equal lengths."""
    one_length = Case((4096,) * 8, 128, d_qk, True)
    cases = {"one length": one_length} | {
        trace: Case(shuffled(lengths), 128, d_qk, True) for trace, lengths in PROMPTS.items()
    }
    functions = {name: calls(case) for name, case in cases.items()}
    rows = []
    for direction in ("forward", "backward"):
        times = timed({name: calls[direction]["flash-mla"] for name, calls in functions.items()})
        rates = {
            kind: {name: case.flops(direction) / us[name] * 1e6 for name, case in cases.items()}
            for kind, us in times.items()
        }
        for trace in PROMPTS:
            case = cases[trace]
            row: dict[str, Any] = {
                "trace": trace, **asdict(case), "direction": direction, "backend": case.backend,
                "flops": case.flops(direction), **{kind: us[trace] for kind, us in times.items()},
                "rate_of_one_length": {kind: rate[trace] / rate["one length"] for kind, rate in rates.items()},
            }  # fmt: skip
            rows.append(row)
            share = row["rate_of_one_length"]
            print(
                f"{direction} {d_qk}/{D_V} causal, {trace} prompts on {case.backend}: {row['cold_us']:.0f} us, "
                f"{rates['cold_us'][trace] / 1e12:.0f} TFLOP/s, {share['cold_us']:.3f} cold, {share['hot_us']:.3f} hot "
                "of the rate at one length",
                flush=True,
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = measure.parser("mha", __doc__)
    parser.add_argument("--no-prompts", action="store_true", help="leave out the sequences as long as prompts")
    options = parser.parse_args(arguments)
    ceilings = dict(zip(("matmul_cold_flops", "matmul_hot_flops"), measure.matmul_rate(), strict=True))
    print({name: f"{value / 1e12:.0f}e12" for name, value in ceilings.items()}, flush=True)
    rows = [row for case in CASES for row in beside_cudnn(case)]
    if not options.no_prompts:
        rows += [row for d_qk in (192, 128) for row in beside_one_length(d_qk)]
    forced = os.environ.get("FLASH_MLA_BACKEND")
    measure.record(f"{forced}_mha" if forced else "mha", ceilings, rows, options.out)
