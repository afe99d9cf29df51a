"""Host time of a steady-state call: until Python goes on, its kernels launched but not waited for.

flash-mla bench host_time [--peer MODULE] [--out FOLDER]

MODULE is anything importable with FlashMLA's functions; dense MHA is beside cuDNN, as PyTorch calls it. Shapes are so
small that the GPU is done with a call before the host is with the next. `launch` is a kernel launch of PyTorch's, in
place and without allocation, for scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from flash_mla.bench import dense_decode, measure, mha, sparse_decode, sparse_prefill

CASES: dict[str, tuple[Any, Any]] = {
    "dense decode": (dense_decode, dense_decode.Case(4, 1, 128, 128)),
    "sparse decode": (sparse_decode, sparse_decode.Case(4, 1, 64, 128, s_k=1024)),
    "sparse decode, two caches": (sparse_decode, sparse_decode.Case(4, 1, 64, 128, "FP8_V4", 1024, 64, 128)),
    "sparse prefill": (sparse_prefill, sparse_prefill.Case(4, 1024, 128, 64)),
}
MHA = mha.Case((128,), 8, 192, True)


def main(arguments: Sequence[str] | None = None) -> None:
    modules, folder = measure.command_line("host_time", __doc__, arguments)
    counter = torch.zeros(1, device="cuda")
    launch = measure.host({"launch": lambda: counter.add_(1)})["launch"]
    print(f"launch: {launch * 1e6:.1f} us", flush=True)
    rows = []
    for mode, (benchmark, case) in CASES.items():
        calls, _ = benchmark.prepare(case, modules)
        row = {
            "mode": mode,
            **asdict(case),
            "host_us": {name: seconds * 1e6 for name, seconds in measure.host(calls).items()},
        }
        rows.append(row)
    for direction, calls in mha.calls(MHA).items():
        host_us = {name: seconds * 1e6 for name, seconds in measure.host(calls).items()}
        rows.append({"mode": f"dense MHA {direction}", **asdict(MHA), "host_us": host_us})
    for row in rows:
        print(row["mode"], {name: f"{us:.1f} us" for name, us in row["host_us"].items()}, flush=True)
    measure.record("host_time", {"launch_seconds": launch}, rows, folder, modules.get("peer"))
