"""Compiling kernels into bundles, for real where the CuTe DSL is installed, and the wheel that carries a bundle."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flash_mla import build, kernels
from flash_mla.backends.hopper.variants import ARCH, VARIANTS

NAME = "planner_balanced"
OTHER = "planner_batch_invariant"
ROOT = kernels.PACKAGE.parent

needs_dsl = pytest.mark.skipif(build.missing_tool() is not None, reason=f"compiles: {build.missing_tool()}")


def copy_package(folder: Path) -> Path:
    """The package without any bundle, in `folder`."""
    ignored = shutil.ignore_patterns("_kernels", "__pycache__")
    return Path(shutil.copytree(kernels.PACKAGE, folder / "flash_mla", ignore=ignored))


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / kernels.MANIFEST).read_text())


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder after two processes at once loaded a kernel that was in no bundle."""
    tmp = tmp_path_factory.mktemp("first_use")
    copy_package(tmp)
    env = {k: v for k, v in os.environ.items() if k != "FLASH_MLA_KERNELS"}
    env |= {"PYTHONPATH": str(tmp), "XDG_CACHE_HOME": str(tmp / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", f"from flash_mla import kernels; print(callable(kernels.load({NAME!r})))"]
    both = [
        subprocess.Popen(command, cwd=tmp, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        out, err = process.communicate(timeout=300)
        assert (process.returncode, out) == (0, "True\n"), err
    (folder,) = (tmp / "cache" / "flash-mla").iterdir()
    return folder


@pytest.fixture
def bundle(cached: Path, tmp_path: Path) -> Path:
    """A copy of that bundle."""
    return Path(shutil.copytree(cached, tmp_path / "bundle"))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that a build compiles, by now; they are only pretended to be."""
    names: list[str] = []

    def pretend(name: str, folder: Path) -> dict[str, Any]:
        names.append(name)
        (folder / f"{name}.so").write_bytes(b"code")
        sha256 = hashlib.sha256(b"code").hexdigest()
        return {"file": f"{name}.so", "source": kernels.source_hash(name), "sha256": sha256}

    monkeypatch.setattr(build, "_compile_in_process", pretend)
    return names


@needs_dsl
class TestRealBuild:
    def test_first_use_compiles_once_for_all_processes(self, cached):
        manifest = manifest_of(cached)
        assert cached.name == f"{ARCH}-{kernels.source_hash(NAME)[:16]}"
        assert manifest.pop("kernels").keys() == {NAME}
        assert manifest == {
            "format": 1,
            "arch": ARCH,
            "platform": kernels.this_platform(),
            "dsl": importlib.metadata.version("nvidia-cutlass-dsl"),
            "ptxas": importlib.metadata.version("nvidia-cuda-nvcc"),
            "tvm_ffi": kernels.tvm_ffi_abi(),
        }
        assert {path.name for path in cached.iterdir()} <= {".lock", "manifest.json", f"{NAME}.so"}

    def test_ptxas_is_content_with_the_kernel(self, cached):
        entry = manifest_of(cached)["kernels"][NAME]
        assert 16 <= entry["registers"] <= VARIANTS[NAME].registers
        assert (entry["spill_bytes"], entry["stack_bytes"], entry["warnings"]) == (0, 0, [])
        assert build.complaints(manifest_of(cached)) == []

    def test_the_object_loads_without_a_gpu_and_exports_the_kernel_alone(self, cached):
        import tvm_ffi

        module = tvm_ffi.load_module(str(cached / f"{NAME}.so"))
        assert isinstance(getattr(module, NAME), tvm_ffi.Function)
        with pytest.raises(AttributeError):
            getattr(module, OTHER)

    def test_the_object_needs_no_libc_newer_than_the_wheel_s_tag_says(self, cached):
        versions = re.findall(rb"GLIBC_(\d+)\.(\d+)", (cached / f"{NAME}.so").read_bytes())
        assert versions
        assert max((int(major), int(minor)) for major, minor in versions) <= (2, 28)

    def test_a_second_build_keeps_what_is_there(self, bundle, compiled):
        before = manifest_of(bundle)
        assert build.build([NAME], bundle) == before == manifest_of(bundle)
        assert compiled == []

    def test_a_build_adds_to_what_is_there(self, bundle, compiled, monkeypatch):
        before = manifest_of(bundle)["kernels"][NAME]
        monkeypatch.chdir(bundle.parent)
        manifest = build.build([OTHER, NAME, OTHER], Path(bundle.name), jobs=2)
        assert compiled == [OTHER]
        assert list(manifest["kernels"]) == [NAME, OTHER]
        assert manifest["kernels"][NAME] == before
        assert manifest == manifest_of(bundle)

    @pytest.mark.parametrize("what", ["source", "object", "dsl", "arch", "manifest"])
    def test_what_is_out_of_date_is_compiled_again(self, bundle, compiled, what):
        manifest = manifest_of(bundle)
        if what == "source":
            manifest["kernels"][NAME]["source"] = "0" * 64
        elif what == "object":
            (bundle / f"{NAME}.so").write_bytes(b"")
        else:
            manifest[what] = "other"
        text = "{" if what == "manifest" else json.dumps(manifest)
        (bundle / kernels.MANIFEST).write_text(text)
        rebuilt = build.build([NAME], bundle)
        assert compiled == [NAME]
        assert rebuilt == manifest_of(bundle)
        assert kernels.refusal(bundle, NAME) is None
        assert build.build([NAME], bundle) == rebuilt
        assert compiled == [NAME], "and then it is up to date"

    def test_a_kernel_that_is_no_more_is_dropped(self, bundle, compiled):
        manifest = manifest_of(bundle)
        manifest["kernels"]["gone"] = manifest["kernels"][NAME]
        (bundle / kernels.MANIFEST).write_text(json.dumps(manifest))
        assert build.build([], bundle)["kernels"].keys() == {NAME}

    def test_what_compiled_before_a_failure_is_kept(self, tmp_path, compiled, monkeypatch):
        pretend = build._compile_in_process

        def fail_on_other(name: str, folder: Path) -> dict[str, Any]:
            if name == OTHER:
                raise build.BuildError("no")
            return pretend(name, folder)

        monkeypatch.setattr(build, "_compile_in_process", fail_on_other)
        with pytest.raises(build.BuildError, match="no"):
            build.build([NAME, OTHER, "combine_bf16"], tmp_path)
        assert manifest_of(tmp_path)["kernels"].keys() == {NAME}
        assert kernels.refusal(tmp_path, NAME) is None

    def test_a_kernel_that_does_not_compile(self, tmp_path, monkeypatch):
        package = copy_package(tmp_path)
        planner = package / "backends/hopper/planner.py"
        source = planner.read_text()
        broken = source.replace("thread, _, _ = cute.arch.thread_idx()", "thread, _, _ = cute.arch.no_such_register()")
        assert broken != source
        planner.write_text(broken)
        monkeypatch.setattr(kernels, "PACKAGE", package)
        with pytest.raises(build.BuildError) as raised:
            build.build([NAME], tmp_path / "bundle")
        assert f"kernel {NAME} does not compile (exit status 1):" in str(raised.value)
        assert "no_such_register" in str(raised.value)
        assert manifest_of(tmp_path / "bundle")["kernels"] == {}


class TestMissingTools:
    @pytest.mark.parametrize(
        ("module", "function", "result", "message"),
        [
            (build.importlib.util, "find_spec", None, "the CuTe DSL is not installed: pip install 'flash-mla[build]'"),
            (build, "_ptxas", None, "nvidia-cuda-nvcc, which holds ptxas, is not installed"),
            (build.shutil, "which", None, "no C compiler (cc) on PATH"),
        ],
    )
    def test_each_is_named_before_anything_is_written(self, tmp_path, monkeypatch, module, function, result, message):
        monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(build, "_ptxas", lambda: Path("ptxas"))
        monkeypatch.setattr(build.shutil, "which", lambda name: "/bin/cc")
        assert build.missing_tool() is None
        monkeypatch.setattr(module, function, lambda name=None: result)
        with pytest.raises(build.BuildError, match=re.escape(message)):
            build.build([NAME], tmp_path / "bundle")
        assert list(tmp_path.iterdir()) == []


GOOD = {"registers": 40, "spill_bytes": 0, "stack_bytes": 0, "warnings": []}
WGMMA = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"


class TestComplaints:
    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({}, None),
            ({"registers": VARIANTS[NAME].registers}, None),
            ({"registers": 255}, f"{NAME}: 255 registers, budget {VARIANTS[NAME].registers}"),
            ({"spill_bytes": 8}, f"{NAME}: 8 bytes spilled, 0 bytes of stack"),
            ({"stack_bytes": 16}, f"{NAME}: 0 bytes spilled, 16 bytes of stack"),
            ({"warnings": [WGMMA]}, f"{NAME}: {WGMMA}"),
        ],
    )
    def test_names_the_kernel_and_what_is_wrong(self, change, complaint):
        manifest = {"kernels": {NAME: GOOD | change, OTHER: GOOD}}
        assert build.complaints(manifest) == ([complaint] if complaint else [])

    def test_tells_all(self):
        bad = {"registers": 256, "spill_bytes": 4, "stack_bytes": 8, "warnings": ["a", "b"]}
        assert len(build.complaints({"kernels": {NAME: bad, OTHER: bad}})) == 8


class TestWheel:
    @pytest.fixture
    def wheel(self, tmp_path: Path) -> Callable[[bool], Path]:
        """Builds a wheel from a copy of the sources, with or without a bundle in it."""
        pytest.importorskip("setuptools", minversion="77")

        def make(with_kernels: bool) -> Path:
            package = copy_package(tmp_path)
            for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
                shutil.copy(ROOT / name, tmp_path)
            if with_kernels:
                folder = package / "_kernels" / ARCH
                folder.mkdir(parents=True)
                (folder / kernels.MANIFEST).write_text("{}")
                (folder / f"{NAME}.so").write_bytes(b"code")
                (folder / ".lock").touch()
            pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", "dist", "."]
            done = subprocess.run(pip, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            (path,) = (tmp_path / "dist").iterdir()
            return path

        return make

    def test_without_kernels_it_is_for_any_platform(self, wheel):
        path = wheel(False)
        assert path.name.endswith("-py3-none-any.whl")
        names = zipfile.ZipFile(path).namelist()
        assert "flash_mla/py.typed" in names
        assert all(f"flash_mla/{source}" in names for source in kernels.HOST_SOURCES)
        assert not any(name.startswith(("tests", "benchmarks", "setup")) for name in names)

    def test_with_kernels_it_carries_them_and_is_for_this_platform(self, wheel):
        path = wheel(True)
        assert path.name.endswith(f"-py3-none-manylinux_2_28_{platform.machine()}.whl")
        names = zipfile.ZipFile(path).namelist()
        bundle = f"flash_mla/_kernels/{ARCH}"
        assert {name for name in names if "_kernels" in name} == {f"{bundle}/manifest.json", f"{bundle}/{NAME}.so"}
