"""How every benchmark here measures: with the L2 flushed, back to back, and the card's ceilings in the same run."""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import flash_mla

_flush: torch.Tensor | None = None


def cold(functions: Mapping[str, Callable[[], object]], repeats: int = 15, warm_up: int = 3) -> dict[str, float]:
    """Median seconds a call of each function, taken in turns, with the L2 flushed before each call."""
    global _flush
    if _flush is None:
        _flush = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    events: dict[str, list] = {name: [] for name in functions}
    for repeat in range(repeats + warm_up):
        for name, function in functions.items():
            _flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            if repeat >= warm_up:
                events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(s.elapsed_time(e) for s, e in pairs) * 1e-3 for name, pairs in events.items()}


def back_to_back(
    functions: Mapping[str, Callable[[], object]], seconds: float = 0.05, rounds: int = 4
) -> dict[str, float]:
    """Median over rounds of the mean seconds a call, of runs of `seconds` without a pause.

    The functions take turns, in reversed order every other round: the card's power limit slows whoever comes later.
    """
    calls = {name: max(5, int(seconds / one)) for name, one in cold(functions, 3).items()}
    means: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds):
        for name in list(functions)[:: -1 if turn % 2 else 1]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls[name]):
                functions[name]()
            end.record()
            torch.cuda.synchronize()
            means[name].append(start.elapsed_time(end) * 1e-3 / calls[name])
    return {name: statistics.median(values) for name, values in means.items()}


def host(functions: Mapping[str, Callable[[], object]], calls: int = 100, rounds: int = 20) -> dict[str, float]:
    """Seconds until a call of each function returns, its kernels launched but not waited for.

    The GPU must be done with a call before the host is with the next, or the launch queue fills and the host waits. Of
    the means of `calls` calls the least counts: what else runs on the host only adds.
    """
    means: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            means[name].append((time.perf_counter() - start) / calls)
    torch.cuda.synchronize()
    return {name: min(values) for name, values in means.items()}


def read_bandwidth() -> float:
    """Bytes a second of a kernel that only reads 8 GiB."""
    from flash_mla.bench.read_kernel import read  # Triton is not everywhere

    source = torch.randn(1 << 31, device="cuda")
    sink = torch.zeros(1, device="cuda")
    block = 8192
    seconds = cold({"read": lambda: read[(source.numel() // block,)](source, sink, BLOCK=block, num_warps=8)}, 10)
    return source.numel() * 4 / seconds["read"]


def matmul_rate() -> tuple[float, float]:
    """FLOP/s of an 8192^3 bf16 cuBLAS product: (with pauses, back to back)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = {"matmul": lambda: a @ b}
    flops = 2 * 8192**3
    return flops / cold(matmul, 20)["matmul"], flops / back_to_back(matmul)["matmul"]


def environment(peer: ModuleType | None = None) -> dict[str, str]:
    """What a result must be read with."""
    named = {} if peer is None else {"peer": f"{peer.__name__} {getattr(peer, '__version__', '')}".strip()}
    return {
        "flash_mla": flash_mla.__version__,
        **named,
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
    }


def record(
    name: str, ceilings: dict[str, float], rows: list[dict], folder: Path | None, peer: ModuleType | None = None
) -> None:
    """Write one benchmark's results as data, if there is a folder for them."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**environment(peer), "ceilings": ceilings, "rows": rows}, indent=1) + "\n")
    print(path)


def graph(call: Callable[[], object]) -> Callable[[], object]:
    """A function that replays what `call`, which must have run before, launches."""
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        call()

    def replay(keep: object = call) -> None:  # the graph refers to tensors, such as a plan, that live in the call
        captured.replay()

    return replay


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark, so far."""
    line = argparse.ArgumentParser(
        f"flash-mla bench {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    line.add_argument("--out", type=Path, help="folder to record results in")
    return line


def command_line(
    name: str, description: str | None, arguments: Sequence[str] | None
) -> tuple[dict[str, ModuleType], Path | None]:
    """(what to measure: "flash-mla" and, if `--peer` names one, "peer"; the folder for results)."""
    line = parser(name, description)
    line.add_argument("--peer", metavar="MODULE", help="importable, with FlashMLA's functions, to measure beside")
    options = line.parse_args(arguments)
    modules = {"flash-mla": flash_mla}
    if options.peer:
        modules["peer"] = importlib.import_module(options.peer)
    return modules, options.out


def beside_a_peer(
    name: str,
    description: str | None,
    cases: Sequence[Any],
    prepare: Callable[[Any, Mapping[str, ModuleType]], tuple[dict[str, Callable[[], object]], dict[str, int]]],
    arguments: Sequence[str] | None,
) -> None:
    """The command line of a benchmark: flash-mla and, if `--peer` names one, another module on the same inputs.

    Args:
        name: of the recorded results.
        description: for `--help`.
        cases: dataclasses.
        prepare: makes a case's inputs and returns a call for each of the modules, which are named "flash-mla" and
            "peer", and what the case amounts to: "flops" at least.
        arguments: of the command line.
    """
    modules, folder = command_line(name, description, arguments)
    ceilings = {"read_bytes_per_second": read_bandwidth()}
    ceilings["matmul_cold_flops"], ceilings["matmul_hot_flops"] = matmul_rate()
    print({ceiling: f"{value / 1e12:.2f}e12" for ceiling, value in ceilings.items()}, flush=True)
    rows = []
    for case in cases:
        torch.cuda.empty_cache()
        calls, amounts = prepare(case, modules)
        row = {
            **asdict(case),
            **amounts,
            "cold_us": {one: seconds * 1e6 for one, seconds in cold(calls).items()},
            "hot_us": {one: seconds * 1e6 for one, seconds in back_to_back(calls).items()},
        }
        rows.append(row)
        ratios = [row[kind].get("peer", 0) / row[kind]["flash-mla"] for kind in ("cold_us", "hot_us")]
        ours = row["cold_us"]["flash-mla"]
        rates = ", ".join(f"{amount / ours / 1e6:.2f}e12 {unit}/s" for unit, amount in amounts.items())
        print(f"{case}: {ours:.1f} us, {rates}, x{ratios[0]:.3f} cold, x{ratios[1]:.3f} hot", flush=True)
    record(name, ceilings, rows, folder, modules.get("peer"))
