"""flash-mla info | check | demo | bench | build."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table

from flash_mla import __version__, backends, checks, kernels
from flash_mla.backends.hopper.variants import ARCH, VARIANTS
from flash_mla.bench import BENCHMARKS
from flash_mla.demo import DemoOptions, run_demo
from flash_mla.kv_cache import KVCacheFormat
from flash_mla.problem import DecodeProblem, MHAProblem, Problem, SparsePrefillProblem

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, RuntimeError, OSError) as error:
        Console(stderr=True).print(f"flash-mla {options.command}: {error}", style="red", markup=False, soft_wrap=True)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flash-mla", description="Multi-head latent attention for serving.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    info = commands.add_parser("info", help="this machine, and which backend serves which mode here")
    info.set_defaults(run=_info)

    check = commands.add_parser("check", help="compare every mode that runs here with the reference, in seconds")
    check.add_argument("--seed", type=int, default=0)
    check.set_defaults(run=_check)

    defaults = DemoOptions()
    formats = ",".join(kv_format.value for kv_format in KVCacheFormat if kv_format is not KVCacheFormat.FP4_V41)
    demo = commands.add_parser(
        "demo",
        help="serve requests through a paged cache with continuous batching",
        argument_default=argparse.SUPPRESS,  # what is not given is left to DemoOptions
    )
    demo.add_argument("--trace", type=Path, help="CSV with ContextTokens and GeneratedTokens columns, a row a request")
    demo.add_argument("--max-requests", type=int, help=f"serve only the first so many ({defaults.max_requests})")
    demo.add_argument("--batch", type=int, help=f"requests that decode side by side ({defaults.batch})")
    demo.add_argument(
        "--format",
        dest="kv_format",
        type=KVCacheFormat,
        metavar=f"{{{formats}}}",
        help=f"how the cache stores tokens ({defaults.kv_format.value})",
    )
    demo.add_argument("--steps", type=int, help="stop after so many decode steps")
    demo.add_argument("--page-size", type=int, help=f"tokens in a page ({defaults.page_size})")
    demo.add_argument("--device", help=f"cpu or cuda ({defaults.device})")
    demo.add_argument(
        "--verify", type=float, help=f"share of outputs to compare with a plain softmax ({defaults.verify})"
    )
    demo.add_argument("--seed", type=int, help=f"of the random tokens ({defaults.seed})")
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="measure a mode here, beside another implementation if told so")
    bench.add_argument("benchmark", choices=BENCHMARKS)
    bench.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="of the benchmark, such as --help")
    bench.set_defaults(run=_bench)

    build = commands.add_parser("build", help="compile the Hopper kernels; needs the build extra, no GPU")
    build.add_argument("--arch", choices=[ARCH], default=ARCH)
    build.add_argument("--out", type=Path, help="folder of the bundle (default: inside the package)")
    build.add_argument("--jobs", type=int, default=1, help="kernels compiled side by side")
    build.add_argument("--only", metavar="PREFIX", default="", help="only kernels whose name begins so")
    build.add_argument("--check", action="store_true", help="fail on spills, ptxas warnings or too many registers")
    build.set_defaults(run=_build)
    return parser


def _devices() -> list[torch.device]:
    return [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def _sample_problems(device: torch.device) -> list[tuple[str, Problem]]:
    """A DeepSeek-sized problem of each mode and cache format."""
    bf16, formats = torch.bfloat16, KVCacheFormat
    dense = DecodeProblem(
        device=device, dtype=bf16, b=1, s_q=1, h_q=128, h_kv=1, d_qk=576, d_v=512, kv_format=formats.BF16, page_size=64
    )
    sparse = dataclasses.replace(dense, topk=2048)
    rows: list[tuple[str, Problem]] = []
    for kv_format in (formats.BF16, formats.FP8_V32):
        rows.append((f"dense decode, {kv_format.name}", dataclasses.replace(dense, kv_format=kv_format)))
    for kv_format in formats:
        if kv_format not in (formats.FP16, formats.FP4_V41):
            problem = dataclasses.replace(sparse, kv_format=kv_format, d_qk=kv_format.head_dims[0])
            rows.append((f"sparse decode, {kv_format.name}", problem))
    both = dataclasses.replace(
        sparse, d_qk=512, kv_format=formats.FP8_V41, extra_format=formats.FP4_V41, extra_page_size=64, extra_topk=2048
    )
    rows.append(("sparse decode, FP8_V41 and FP4_V41", both))
    prefill = SparsePrefillProblem(
        device=device, dtype=bf16, s_q=4096, s_kv=32768, h_q=128, d_qk=576, d_v=512, topk=2048
    )
    rows.append(("sparse prefill", prefill))
    mha = MHAProblem(device=device, dtype=bf16, h_q=128, h_kv=128, d_qk=192, d_v=128, causal=True)
    rows.append(("dense MHA 192/128", mha))
    return rows


def _info(_: argparse.Namespace) -> int:
    console = Console()
    machine = Table("component", "version", title=f"flash-mla {__version__}")
    machine.add_row("python", platform.python_version())
    for package in ("torch", "triton", "apache-tvm-ffi", kernels.DSL):
        machine.add_row(package, _version(package))
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        machine.add_row(f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    if not torch.cuda.is_available():
        machine.add_row("CUDA device", "none")
    compiled = sum(kernels.find(name)[0] is not None for name in VARIANTS)
    lacking = next((reason for name in VARIANTS if (reason := kernels.unavailable(name))), None)
    on_first_use = ", the others on first use" if compiled < len(VARIANTS) and lacking is None else ""
    machine.add_row("Hopper kernels", f"{compiled} of {len(VARIANTS)} compiled{on_first_use}")
    console.print(machine)
    if lacking is not None:
        console.print(lacking, markup=False, soft_wrap=True)

    for device in _devices():
        table = Table("mode", "served by", "why not the others", title=str(device))
        for title, problem in _sample_problems(device):
            reasons = backends.explain(problem)
            serving = next((name for name, reason in reasons.items() if reason is None), "nothing")
            others = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
            table.add_row(title, serving, others)
        console.print(table)
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _check(options: argparse.Namespace) -> int:
    from flash_mla.selfcheck import run_checks

    console = Console()
    failed = 0
    for device in _devices():
        errors = Column("worst errors", no_wrap=True)
        table = Table("mode", "backend", errors, "verdict", title=f"{device} against the fp32 reference")
        for row in run_checks(device, options.seed):
            style = "red" if row.verdict == "WRONG" else None
            table.add_row(row.mode, row.backend, _two_a_line(row.errors), row.verdict, style=style)
            failed += row.verdict == "WRONG"
        console.print(table)
    return 1 if failed else 0


def _two_a_line(errors: Mapping[str, float]) -> str:
    texts = [f"{name} {error:.1e}" for name, error in errors.items()]
    return "\n".join("  ".join(pair) for pair in zip_longest(texts[::2], texts[1::2], fillvalue=""))


def _demo(options: argparse.Namespace) -> int:
    names = [field.name for field in dataclasses.fields(DemoOptions)]
    given = {name: value for name, value in vars(options).items() if name in names}
    return 0 if run_demo(DemoOptions(**given)).verified else 1


def _bench(options: argparse.Namespace) -> int:
    if (
        options.benchmark != "cpu_decode"
        and not {"-h", "--help"} & {*options.arguments}
        and not torch.cuda.is_available()
    ):
        raise RuntimeError(f"{options.benchmark} is measured on a CUDA GPU; cpu_decode is measured without")
    benchmark = importlib.import_module(f"flash_mla.bench.{options.benchmark}")
    try:
        benchmark.main(options.arguments)
    except ImportError as error:  # of the peer, or of Triton
        raise RuntimeError(f"{options.benchmark}: {error}") from error
    return 0


def _build(options: argparse.Namespace) -> int:
    from flash_mla.build import build, complaints

    names = [name for name in VARIANTS if name.startswith(options.only)]
    if not names:
        raise ValueError(f"--only: got {options.only!r}, need the beginning of one of {', '.join(VARIANTS)}")
    jobs = checks.positive_int("--jobs", options.jobs)
    folder = options.out or kernels.package_dir()
    manifest = build(names, folder, jobs)
    kernel = Column("kernel", overflow="fold")
    table = Table(kernel, "registers", "spilled", "warnings", title=f"{ARCH} kernels in {folder}")
    for name in names:
        entry = manifest["kernels"][name]
        warnings = "; ".join(entry["warnings"]) or "none"
        registers = f"{entry['registers']} of {VARIANTS[name].registers}"
        table.add_row(name, registers, f"{entry['spill_bytes']} bytes", warnings)
    console = Console()
    console.print(table)
    found = complaints(manifest)
    for line in found:
        console.print(line, style="red", markup=False, soft_wrap=True)
    return 1 if found and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
