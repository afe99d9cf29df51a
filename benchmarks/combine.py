"""Bandwidth of the combine kernel, beside a kernel that only reads: `python benchmarks/combine.py [--out FOLDER]`."""

from __future__ import annotations

import argparse
from pathlib import Path

import measure
import torch

from flash_mla.backends.hopper import launch
from flash_mla.plan import split_plan

# (requests, tokens each, rows a unit, workers)
CASES = [
    (512, 20_000, 128, 2000),
    (64, 64_000, 128, 512),
    (66, 8192, 128, 132),
    (8, 65_536, 64, 132),
    (1, 65_536, 128, 66),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    folder = parser.parse_args().out
    ceiling = measure.read_bandwidth()
    print(f"read-only {ceiling / 1e9:.0f} GB/s")
    rows = []
    for requests, tokens, unit_rows, workers in CASES:
        lengths = torch.full((requests,), tokens, dtype=torch.int32, device="cuda")
        plan = split_plan(lengths, fixed_cost=5, num_workers=workers)
        slots = int(plan.splits[-1])
        partial_o = torch.randn(slots, unit_rows, 512, device="cuda")
        partial_lse = torch.randn(slots, unit_rows, device="cuda")
        out = torch.empty(requests, 1, 1, unit_rows, 512, dtype=torch.bfloat16, device="cuda")
        lse = torch.empty(requests, 1, 1, unit_rows, device="cuda")

        def run(args=(partial_o, partial_lse, plan, out, lse)):
            launch.combine(*args)

        merged_units = int((plan.splits.diff() > 0).sum())
        moved = partial_o.numel() * 4 + partial_lse.numel() * 4 + merged_units * unit_rows * (512 * 2 + 4)
        seconds = measure.cold({"combine": run})["combine"]
        hot = measure.back_to_back({"combine": run})["combine"]
        rows.append(
            {
                "requests": requests, "slots": slots, "rows": unit_rows, "megabytes": moved / 1e6,
                "cold_us": seconds * 1e6, "hot_us": hot * 1e6, "of_read_bandwidth": moved / seconds / ceiling,
            }
        )  # fmt: skip
        print(" ".join(f"{key} {value:.5g}" for key, value in rows[-1].items()), flush=True)
    print(measure.record("combine", {"read_bytes_per_second": ceiling}, rows, folder))


if __name__ == "__main__":
    main()
