"""Kernel name -> compiled function: from a bundle, the disk cache, or compiled now.

A bundle is a folder of shared objects and a `manifest.json` that says what they were made from and with. `load` looks
for a kernel in the folder named by FLASH_MLA_KERNELS or else in the installed package and in the user's cache; if the
tools are installed, it compiles what it did not find, once, into the cache. A kernel made from other sources, for
another machine or for another tvm-ffi is refused with the reason.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flash_mla.backends.hopper.variants import ARCH, VARIANTS
from flash_mla.problem import Mendable

__all__ = [
    "DSL",
    "HOST_SOURCES",
    "MANIFEST",
    "MANIFEST_FORMAT",
    "PACKAGE",
    "KernelUnavailableError",
    "cache_dir",
    "find",
    "load",
    "package_dir",
    "read_manifest",
    "refusal",
    "source_hash",
    "this_platform",
    "tvm_ffi_abi",
    "unavailable",
]

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
DSL = "nvidia-cutlass-dsl"
PACKAGE = Path(__file__).parent
HOST_SOURCES = ("backends/hopper/raise_cuda_error.c", "backends/hopper/recorded_call.c")  # are part of every kernel

_loaded: set[str] = set()  # kernels whose files need no second look: reading and hashing one takes a millisecond


class KernelUnavailableError(RuntimeError):
    """A kernel is in no bundle and cannot be compiled here."""


def package_dir() -> Path:
    """Where a wheel carries its bundle."""
    return PACKAGE / "_kernels" / ARCH


def cache_dir(name: str) -> Path:
    """Where kernels compiled on first use are kept: a folder per source version, so that none is ever stale."""
    import platformdirs  # not needed where the package carries its bundle

    return Path(platformdirs.user_cache_dir("flash-mla")) / f"{ARCH}-{source_hash(name)[:16]}"


def this_platform() -> str:
    return f"{platform.system().lower()}-{platform.machine()}"


def tvm_ffi_abi() -> str:
    """The version up to the part within which tvm-ffi keeps its binary interface, or '' if it is not installed."""
    try:
        return ".".join(importlib.metadata.version("apache-tvm-ffi").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def source_hash(name: str) -> str:
    """Hash of all that decides a kernel's code: its module, every module of ours that it imports, its configuration."""
    variant = VARIANTS[name]
    digest = hashlib.sha256(json.dumps(dict(variant.config), sort_keys=True).encode())
    for module in sorted(_import_closure(variant.module)):
        digest.update(_module_file(module).read_bytes())
    for source in HOST_SOURCES:
        digest.update((PACKAGE / source).read_bytes())
    return digest.hexdigest()


def _module_file(module: str) -> Path:
    return (PACKAGE.parent / module.replace(".", "/")).with_suffix(".py")


def _import_closure(module: str) -> set[str]:
    """The module and those of ours that it imports; a package's __init__ is host code and does not count."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current in seen or not _module_file(current).is_file():
            continue
        seen.add(current)
        waiting += _own_imports(_module_file(current))
    return seen


def _own_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flash_mla"):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("flash_mla"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle; an empty one if the folder holds none.

    Raises:
        ValueError: the file is no JSON.
    """
    try:
        return json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}


def refusal(folder: Path, name: str) -> str | None:
    """Why the kernel cannot be taken from this folder, or None if it can."""
    try:
        manifest = read_manifest(folder)
    except ValueError:
        return f"{MANIFEST} is damaged"
    if not manifest:
        return "not there"
    for field, need in (("format", MANIFEST_FORMAT), ("arch", ARCH), ("platform", this_platform())):
        if manifest.get(field) != need:
            return f"made for {field} {manifest.get(field)}, need {need}"
    entry = manifest["kernels"].get(name)
    if entry is None:
        return "not there"
    if manifest["tvm_ffi"] != tvm_ffi_abi():
        return f"made for tvm-ffi {manifest['tvm_ffi']}, installed is {tvm_ffi_abi() or 'none'}"
    if entry["source"] != source_hash(name):
        return "made from other sources than the installed ones (rebuild it with `flash-mla build`)"
    path = folder / entry["file"]
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
        return f"{entry['file']} is missing or damaged"
    return None


def find(name: str) -> tuple[Path | None, list[str]]:
    """(shared object or None, why not for each place that was looked at before)."""
    refusals: list[str] = []
    for folder in _places(name):
        reason = refusal(folder, name)
        if reason is None:
            return folder / read_manifest(folder)["kernels"][name]["file"], refusals
        refusals.append(f"{folder}: {reason}")
    return None, refusals


def _places(name: str) -> Iterator[Path]:
    forced = os.environ.get("FLASH_MLA_KERNELS")
    if forced:
        yield Path(forced) / ARCH
        yield Path(forced)
    else:
        yield package_dir()
        yield cache_dir(name)


def unavailable(name: str) -> Mendable | None:
    """Why `load(name)` would fail, without loading or compiling; None if it would not."""
    if name in _loaded:
        return None
    from flash_mla import build

    path, refusals = find(name)
    if path is not None:
        return None
    missing = "FLASH_MLA_KERNELS is set" if os.environ.get("FLASH_MLA_KERNELS") else build.missing_tool()
    if missing is None:
        return None
    return Mendable(
        f"kernel {name} is in no bundle ({'; '.join(refusals)}) and is not compiled here: {missing}. Either install a "
        "wheel that carries the kernels (`make wheel` in a clone makes one), or compile them once: "
        "pip install 'flash-mla[build]' && flash-mla build"
    )


@functools.cache
def load(name: str, function: str | None = None) -> Callable[..., Any]:
    """The compiled function of a kernel; takes torch tensors and scalars, runs on torch's current stream.

    `function` names another one of its shared object, such as the `record_call` that each has.

    Raises:
        KernelUnavailableError: it is in no bundle and cannot be compiled; the message lists the places and the remedy.
    """
    path, _ = find(name)
    if path is None:
        reason = unavailable(name)
        if reason is not None:
            raise KernelUnavailableError(reason)
        from flash_mla import build

        build.build([name], cache_dir(name))
        path, refusals = find(name)
        if path is None:
            raise KernelUnavailableError(f"kernel {name} was compiled but is refused: {'; '.join(refusals)}")
    import tvm_ffi

    _loaded.add(name)
    return getattr(tvm_ffi.load_module(str(path)), function or name)
