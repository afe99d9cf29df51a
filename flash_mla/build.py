"""Compile kernels into a bundle. Needs the `build` extra and a C compiler, no GPU.

Each kernel compiles in a process of its own (`python -m flash_mla.build NAME FOLDER`): the DSL stays out of the
caller's process, and several compile side by side. ptxas then assembles the kernel's PTX once more, because the DSL
hides its warnings, and serialised wgmma or spills are only visible there.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flash_mla import kernels
from flash_mla.backends.hopper.variants import ARCH, VARIANTS

__all__ = ["BuildError", "build", "complaints", "missing_tool"]


class BuildError(RuntimeError):
    """A kernel did not compile; the message ends with the compiler's output."""


def build(names: Sequence[str], folder: Path, jobs: int = 1) -> dict[str, Any]:
    """Compile kernels into the bundle `folder`, `jobs` at a time, and return its manifest.

    Kernels that the folder already holds in their current version, made with the tools installed now, are kept; what
    else its manifest lists is dropped. The folder may be shared: processes take turns, and a reader sees the manifest
    from before a kernel was added or after.

    Raises:
        BuildError: a kernel failed to compile, or a tool is missing. Kernels compiled before it are in the bundle.
    """
    missing = missing_tool()
    if missing is not None:
        raise BuildError(missing)
    folder = folder.resolve()  # the compiling processes work in directories of their own
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / ".lock"):
        manifest = _up_to_date(folder)
        stale = [name for name in dict.fromkeys(names) if name not in manifest["kernels"]]
        _write(manifest, folder)
        for name, entry in _compile_all(stale, folder, jobs):
            manifest["kernels"][name] = entry
            _write(manifest, folder)
    return manifest


def missing_tool() -> str | None:
    """The tool without which nothing compiles here and how to get it, or None if all are installed."""
    if importlib.util.find_spec("cutlass") is None:
        return "the CuTe DSL is not installed: pip install 'flash-mla[build]'"
    if _ptxas() is None:
        return "nvidia-cuda-nvcc, which holds ptxas, is not installed: pip install 'flash-mla[build]'"
    if shutil.which("cc") is None:
        return "no C compiler (cc) on PATH, which links the kernels: install gcc or clang"
    return None


def _up_to_date(folder: Path) -> dict[str, Any]:
    """The folder's manifest, for the tools installed now, without the kernels that others or other sources made."""
    header = {
        "format": kernels.MANIFEST_FORMAT,
        "arch": ARCH,
        "platform": kernels.this_platform(),
        "dsl": importlib.metadata.version(kernels.DSL),
        "ptxas": importlib.metadata.version("nvidia-cuda-nvcc"),
        "tvm_ffi": kernels.tvm_ffi_abi(),
    }
    names = [name for name in VARIANTS if kernels.refusal(folder, name) is None]
    old = kernels.read_manifest(folder) if names else {}
    same_tools = header.items() <= old.items()
    return {**header, "kernels": {name: old["kernels"][name] for name in names} if same_tools else {}}


def _write(manifest: dict[str, Any], folder: Path) -> None:
    manifest["kernels"] = dict(sorted(manifest["kernels"].items()))
    draft = folder / f"{kernels.MANIFEST}.new"
    draft.write_text(json.dumps(manifest, indent=1) + "\n")
    draft.replace(folder / kernels.MANIFEST)


def _ptxas() -> Path | None:
    """The ptxas of the release that the DSL embeds, so that its report holds for the shipped code."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvcc") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == "ptxas"), None)


def _compile_all(names: Sequence[str], folder: Path, jobs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each kernel and its manifest entry, in order; the first that fails stops those that wait."""
    columns = TextColumn("compiling kernels"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    pool = ThreadPoolExecutor(jobs)
    with Progress(*columns, console=Console(stderr=True), disable=not names) as progress:
        task = progress.add_task("", total=len(names))
        futures = {name: pool.submit(_compile_in_process, name, folder) for name in names}
        try:
            for name, future in futures.items():
                yield name, future.result()
                progress.advance(task)
        finally:
            pool.shutdown(cancel_futures=True)


def _compile_in_process(name: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "flash_mla.build", name, str(folder)]
    # The child must import this very package, however it was found; the DSL's file cache would hide the PTX.
    paths = [str(kernels.PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "CUTE_DSL_ARCH": ARCH,
        "CUTE_DSL_KEEP": "ptx",
        "CUTE_DSL_DISABLE_FILE_CACHING": "1",
    }
    with tempfile.TemporaryDirectory() as scratch:
        env["CUTE_DSL_DUMP_DIR"] = scratch
        done = subprocess.run(command, env=env, cwd=scratch, capture_output=True, text=True, check=False)
    if done.returncode:
        output = f"{done.stdout[-4000:]}{done.stderr[-8000:]}"
        raise BuildError(f"kernel {name} does not compile (exit status {done.returncode}):\n{output}")
    return json.loads(done.stdout.splitlines()[-1])


def _compile_here(name: str, folder: Path) -> dict[str, Any]:
    """Compile one kernel in this process (the child's side) and describe it for the manifest."""
    variant = VARIANTS[name]
    scratch = Path(os.environ["CUTE_DSL_DUMP_DIR"])
    compiled = importlib.import_module(variant.module).compile_variant(**variant.config)
    compiled.export_to_c(str(scratch / "kernel.o"), function_name=name)
    library = _link(scratch / "kernel.o", scratch / f"{name}.so")
    target = folder / f"{name}.so"
    draft = target.with_suffix(".so.new")
    shutil.copyfile(library, draft)
    draft.replace(target)
    return {
        "file": target.name,
        "source": kernels.source_hash(name),
        "sha256": hashlib.sha256(target.read_bytes()).hexdigest(),
        **_assembly_report(scratch),
    }


def _link(obj: Path, library: Path) -> Path:
    import cutlass.cute as cute
    from tvm_ffi.libinfo import include_paths

    runtime = Path(cute.runtime.find_runtime_libraries(enable_tvm_ffi=True)[0]).parent
    sources = [kernels.PACKAGE / source for source in kernels.HOST_SOURCES]
    includes = [f"-I{folder}" for folder in include_paths()]
    static = runtime / "libcuda_dialect_runtime_static.a"
    libraries = [static, "-lstdc++", "-ldl", "-lpthread"]
    command = ["cc", "-shared", "-fPIC", "-O2", "-s", *includes, "-o", library, obj, *sources, *libraries]
    subprocess.run(list(map(str, command)), check=True)
    return library


def _assembly_report(scratch: Path) -> dict[str, Any]:
    """What ptxas says of the kernel: registers a thread, bytes spilled, bytes of stack, warnings."""
    (ptx,) = scratch.glob("*.ptx")
    command = [_ptxas(), f"-arch={ARCH}", "-v", ptx, "-o", scratch / "checked.cubin"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if done.returncode:
        raise BuildError(f"ptxas refuses the PTX:\n{output}")

    def largest(pattern: str) -> int:
        return max((int(n) for n in re.findall(pattern, output)), default=0)

    return {
        "registers": largest(r"Used (\d+) registers"),
        "spill_bytes": largest(r"(\d+) bytes spill stores") + largest(r"(\d+) bytes spill loads"),
        "stack_bytes": largest(r"(\d+) bytes stack frame"),
        "warnings": sorted(
            {
                line.split(" in function")[0].strip()
                for line in output.splitlines()
                if re.search(r"warning|C75\d\d", line)
            }
        ),
    }


def complaints(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with the compiled kernels: spills, local memory, ptxas warnings, registers above the budget."""
    found = []
    for name, entry in manifest["kernels"].items():
        budget = VARIANTS[name].registers
        if entry["registers"] > budget:
            found.append(f"{name}: {entry['registers']} registers, budget {budget}")
        if entry["spill_bytes"] or entry["stack_bytes"]:
            found.append(f"{name}: {entry['spill_bytes']} bytes spilled, {entry['stack_bytes']} bytes of stack")
        found += [f"{name}: {warning}" for warning in entry["warnings"]]
    return found


if __name__ == "__main__":
    print(json.dumps(_compile_here(sys.argv[1], Path(sys.argv[2]))))
