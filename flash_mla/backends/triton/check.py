"""Compile every Triton kernel ahead of time, without a GPU: `python -m flash_mla.backends.triton.check`.

Fails where a kernel does not compile for an architecture, needs more shared memory than a block has there, spills more
than it may, multiplies without the tensor cores, or has Hopper's products wait for each other, which ptxas does to code
that it cannot prove to leave their accumulators alone. Needs Triton 3.3 or newer; what may spill holds for the newest.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from flash_mla.backends.triton.heuristics import gpu_of_arch
from flash_mla.backends.triton.variants import COMPILE_OPTIONS, Capability, Variant, variants

__all__ = ["ARCHITECTURES", "Report", "compile_variant", "complaints"]

ARCHITECTURES: tuple[Capability, ...] = ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
# The PTX instruction that multiplies matrices best.
TENSOR_CORES = {8: "mma.sync", 9: "wgmma.mma_async", 10: "tcgen05.mma", 12: "mma.sync"}


@dataclass(frozen=True)
class Report:
    """What came out of compiling one variant for one architecture."""

    registers: int
    spill: int  # bytes of local memory a thread uses
    shared_memory: int
    tensor_cores: bool
    serialised: bool


def complaints(variant: Variant, capability: Capability, report: Report) -> list[str]:
    """What is wrong with a compiled kernel."""
    found = []
    room = gpu_of_arch(*capability, num_sms=1).shared_memory
    if report.shared_memory > room:
        found.append(f"needs {report.shared_memory} bytes of shared memory, a block has {room}")
    if report.spill > variant.spill:
        found.append(f"spills {report.spill} bytes, may spill {variant.spill}")
    if variant.multiplies and not report.tensor_cores:
        found.append(f"has no {TENSOR_CORES[capability[0]]}")
    if report.serialised:
        found.append("waits for every wgmma before the next")
    return found


def compile_variant(variant: Variant, capability: Capability) -> Report:
    """Compile down to machine code and read what it needs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    major, minor = capability
    attrs = {(i,): [["tt.divisibility", 16]] for i in variant.aligned}
    compiled = triton.compile(
        ASTSource(variant.kernel, variant.signature, dict(variant.constants), attrs),
        target=GPUTarget("cuda", 10 * major + minor, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages, **COMPILE_OPTIONS},
    )
    usage, sass = _dump("-res-usage", compiled.asm["cubin"]), _dump("-sass", compiled.asm["cubin"])
    registers, stack, local = (int(re.findall(rf"\b{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK", "LOCAL"))
    products = sass.count("HGMMA")
    return Report(
        registers=registers,
        spill=max(stack, local),
        shared_memory=compiled.metadata.shared,
        tensor_cores=TENSOR_CORES[major] in compiled.asm["ptx"],
        serialised=0 < products <= sass.count("WARPGROUP.DEPBAR"),
    )


def _dump(option: str, cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def _compile(name: str, capability: Capability) -> Report:
    """In a process of its own, to which kernels cannot be sent."""
    return compile_variant(next(v for v in variants(capability) if v.name == name), capability)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", help="such as sm_90; all by default")
    parser.add_argument("--only", default="", help="the variants whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    jobs = [
        (variant, capability)
        for capability in ARCHITECTURES
        if not options.arch or "sm_{}{}".format(*capability) in options.arch
        for variant in variants(capability)
        if options.only in variant.name
    ]
    if not jobs:
        parser.error("no kernel of that name and architecture")
    failed = 0
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool:
        futures = [pool.submit(_compile, variant.name, capability) for variant, capability in jobs]
        for (variant, capability), future in zip(jobs, futures, strict=True):
            arch = "sm_{}{}".format(*capability)
            try:
                report = future.result()
            except Exception as error:
                failed += 1
                print(f"{arch} {variant.name}: does not compile: {error}", flush=True)
                continue
            wrong = complaints(variant, capability, report)
            failed += bool(wrong)
            print(
                f"{arch:6} {variant.name:32} {report.registers:3} registers {report.spill:4} bytes spilled "
                f"{report.shared_memory / 1024:6.1f} KB shared {'  WRONG: ' * bool(wrong)}{'; '.join(wrong)}",
                flush=True,
            )
    print(f"{len(jobs)} kernels, {failed} wrong")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
