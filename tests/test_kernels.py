"""Where compiled kernels are looked for, which are refused and why; without the CuTe DSL, tvm-ffi's loader or a GPU."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flash_mla import build, kernels
from flash_mla.backends.hopper.variants import ARCH, VARIANTS

NAME = "planner_balanced"
OTHER = "planner_batch_invariant"
NO_DSL = "the CuTe DSL is not installed: pip install 'flash-mla[build]'"


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Empty folders in place of the package's bundle, the cache and FLASH_MLA_KERNELS (unset); nothing compiles."""
    monkeypatch.delenv("FLASH_MLA_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "package_dir", lambda: tmp_path / "package")
    monkeypatch.setattr(kernels, "cache_dir", lambda name: tmp_path / "cache" / name)
    monkeypatch.setattr(build, "missing_tool", lambda: NO_DSL)
    monkeypatch.setattr(kernels, "_loaded", set())
    kernels.load.cache_clear()
    yield SimpleNamespace(package=tmp_path / "package", cache=tmp_path / "cache" / NAME, forced=tmp_path / "forced")
    kernels.load.cache_clear()


def entry(name: str, library: bytes) -> dict[str, Any]:
    return {
        "file": f"{name}.so",
        "source": kernels.source_hash(name),
        "sha256": hashlib.sha256(library).hexdigest(),
        "registers": 40,
        "spill_bytes": 0,
        "stack_bytes": 0,
        "warnings": [],
    }


def make_bundle(folder: Path, *names: str, library: bytes = b"\x7fELF code", **changes: Any) -> Path:
    """A bundle as `flash-mla build` leaves it, but for `changes` of the manifest and what the objects hold."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {
        "format": kernels.MANIFEST_FORMAT,
        "arch": ARCH,
        "platform": kernels.this_platform(),
        "tvm_ffi": kernels.tvm_ffi_abi(),
        "kernels": {name: entry(name, library) for name in names},
    }
    for name in names:
        (folder / f"{name}.so").write_bytes(library)
    (folder / kernels.MANIFEST).write_text(json.dumps(manifest | changes))
    return folder


def change_entry(folder: Path, name: str, **changes: Any) -> None:
    manifest = json.loads((folder / kernels.MANIFEST).read_text())
    manifest["kernels"][name] |= changes
    (folder / kernels.MANIFEST).write_text(json.dumps(manifest))


class TestSearch:
    def test_a_kernel_of_the_package_is_found(self, places):
        make_bundle(places.package, NAME)
        assert kernels.find(NAME) == (places.package / f"{NAME}.so", [])
        assert kernels.unavailable(NAME) is None

    def test_the_package_comes_before_the_cache(self, places):
        make_bundle(places.cache, NAME)
        path, refusals = kernels.find(NAME)
        assert path == places.cache / f"{NAME}.so"
        assert refusals == [f"{places.package}: not there"]
        make_bundle(places.package, NAME)
        assert kernels.find(NAME)[0] == places.package / f"{NAME}.so"

    def test_a_refused_kernel_of_the_package_is_replaced_by_the_cached_one(self, places):
        make_bundle(places.package, NAME, arch="sm_100a")
        make_bundle(places.cache, NAME)
        path, refusals = kernels.find(NAME)
        assert path == places.cache / f"{NAME}.so"
        assert refusals == [f"{places.package}: made for arch sm_100a, need {ARCH}"]

    @pytest.mark.parametrize("below", ["", ARCH])
    def test_a_forced_folder_holds_the_bundle_or_a_bundle_for_each_arch(self, places, monkeypatch, below):
        make_bundle(places.package, NAME)
        make_bundle(places.forced / below, NAME)
        monkeypatch.setenv("FLASH_MLA_KERNELS", str(places.forced))
        assert kernels.find(NAME)[0] == places.forced / below / f"{NAME}.so"

    def test_a_forced_folder_is_the_only_one(self, places, monkeypatch):
        make_bundle(places.package, NAME)
        make_bundle(places.cache, NAME)
        monkeypatch.setenv("FLASH_MLA_KERNELS", str(places.forced))
        monkeypatch.setattr(build, "missing_tool", lambda: None)
        path, refusals = kernels.find(NAME)
        assert path is None
        assert refusals == [f"{places.forced / ARCH}: not there", f"{places.forced}: not there"]
        with pytest.raises(kernels.KernelUnavailableError, match="FLASH_MLA_KERNELS is set"):
            kernels.load(NAME)

    def test_an_empty_variable_forces_nothing(self, places, monkeypatch):
        make_bundle(places.package, NAME)
        monkeypatch.setenv("FLASH_MLA_KERNELS", "")
        assert kernels.find(NAME)[0] == places.package / f"{NAME}.so"

    def test_the_cache_has_a_folder_for_each_version_of_the_sources(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        folder = kernels.cache_dir(NAME)
        assert tmp_path in folder.parents
        assert folder.name == f"{ARCH}-{kernels.source_hash(NAME)[:16]}"
        assert folder != kernels.cache_dir(OTHER)


class TestRefusal:
    def test_a_good_one_is_taken(self, tmp_path):
        assert kernels.refusal(make_bundle(tmp_path, NAME), NAME) is None

    def test_not_there(self, tmp_path):
        make_bundle(tmp_path / "full", OTHER)
        (tmp_path / "file").touch()
        for folder in (tmp_path / "full", tmp_path, tmp_path / "nowhere", tmp_path / "file"):
            assert kernels.refusal(folder, NAME) == "not there"

    @pytest.mark.parametrize(
        ("field", "value", "reason"),
        [
            ("format", 2, "made for format 2, need 1"),
            ("arch", "sm_100a", f"made for arch sm_100a, need {ARCH}"),
            ("platform", "linux-riscv64", "made for platform linux-riscv64, need "),
            ("tvm_ffi", "0.9", "made for tvm-ffi 0.9, installed is "),
        ],
    )
    def test_made_for_something_else(self, tmp_path, field, value, reason):
        assert kernels.refusal(make_bundle(tmp_path, NAME, **{field: value}), NAME).startswith(reason)

    def test_a_manifest_of_a_later_format_need_not_list_kernels(self, tmp_path):
        (tmp_path / kernels.MANIFEST).write_text('{"format": 2}')
        assert kernels.refusal(tmp_path, NAME) == "made for format 2, need 1"

    def test_without_tvm_ffi(self, tmp_path, monkeypatch):
        make_bundle(tmp_path, NAME)
        monkeypatch.setattr(kernels, "tvm_ffi_abi", lambda: "")
        assert kernels.refusal(tmp_path, NAME).endswith("installed is none")

    def test_other_sources(self, tmp_path):
        make_bundle(tmp_path, NAME, OTHER)
        change_entry(tmp_path, NAME, source="0" * 64)
        assert kernels.refusal(tmp_path, NAME).startswith("made from other sources")
        assert kernels.refusal(tmp_path, OTHER) is None

    def test_a_missing_object(self, tmp_path):
        make_bundle(tmp_path, NAME)
        (tmp_path / f"{NAME}.so").unlink()
        assert kernels.refusal(tmp_path, NAME) == f"{NAME}.so is missing or damaged"

    @given(library=st.binary(min_size=1, max_size=64), data=st.data())
    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_an_object_with_one_changed_byte(self, tmp_path, library, data):
        make_bundle(tmp_path, NAME, library=library)
        damaged = bytearray(library)
        damaged[data.draw(st.integers(0, len(library) - 1))] ^= data.draw(st.integers(1, 255))
        (tmp_path / f"{NAME}.so").write_bytes(damaged)
        assert kernels.refusal(tmp_path, NAME) == f"{NAME}.so is missing or damaged"

    def test_a_manifest_cut_short(self, tmp_path):
        path = make_bundle(tmp_path, NAME) / kernels.MANIFEST
        path.write_text(path.read_text()[:-20])
        assert kernels.refusal(tmp_path, NAME) == "manifest.json is damaged"


class TestUnavailable:
    def test_the_message_names_places_reasons_and_remedies(self, places):
        make_bundle(places.package, NAME, arch="sm_100a")
        expected = (
            f"kernel {NAME} is in no bundle ({places.package}: made for arch sm_100a, need {ARCH}; {places.cache}: "
            f"not there) and is not compiled here: {NO_DSL}. Either install a wheel that carries the kernels "
            "(`make wheel` in a clone makes one), or compile them once: "
            "pip install 'flash-mla[build]' && flash-mla build"
        )
        assert kernels.unavailable(NAME) == expected
        with pytest.raises(kernels.KernelUnavailableError) as raised:
            kernels.load(NAME)
        assert str(raised.value) == expected

    def test_a_kernel_that_can_be_compiled_is_available(self, places, monkeypatch):
        monkeypatch.setattr(build, "missing_tool", lambda: None)
        assert kernels.unavailable(NAME) is None
        assert not places.cache.exists(), "asking compiles nothing"


class TestLoad:
    @pytest.fixture(autouse=True)
    def loader(self, monkeypatch) -> None:
        """A loader that gives a module whose functions are strings."""
        library = SimpleNamespace(load_module=lambda path: SimpleNamespace(**{NAME: f"function of {path}"}))
        monkeypatch.setitem(sys.modules, "tvm_ffi", library)

    def test_gives_the_function_of_the_kernel_s_name(self, places):
        make_bundle(places.package, NAME)
        assert kernels.load(NAME) == f"function of {places.package / NAME}.so"

    def test_compiles_into_the_cache_once(self, places, monkeypatch):
        calls = []

        def compile_it(names: list[str], folder: Path) -> None:
            calls.append((names, folder))
            make_bundle(folder, *names)

        monkeypatch.setattr(build, "missing_tool", lambda: None)
        monkeypatch.setattr(build, "build", compile_it)
        for _ in range(2):
            assert kernels.load(NAME) == f"function of {places.cache / NAME}.so"
        kernels.load.cache_clear()  # as a new process
        assert kernels.load(NAME) == f"function of {places.cache / NAME}.so"
        assert calls == [([NAME], places.cache)]

    def test_what_is_loaded_is_not_looked_for_again(self, places, monkeypatch):
        make_bundle(places.package, NAME)
        kernels.load(NAME)
        monkeypatch.setattr(kernels, "find", None)
        assert kernels.unavailable(NAME) is None

    def test_gives_other_functions_of_the_shared_object(self, places, monkeypatch):
        make_bundle(places.package, NAME)
        module = SimpleNamespace(**{NAME: "kernel", "record_call": "recorder"})
        monkeypatch.setitem(sys.modules, "tvm_ffi", SimpleNamespace(load_module=lambda path: module))
        assert kernels.load(NAME) == "kernel"
        assert kernels.load(NAME, "record_call") == "recorder"

    def test_says_why_what_it_compiled_is_refused(self, places, monkeypatch):
        monkeypatch.setattr(build, "missing_tool", lambda: None)
        monkeypatch.setattr(build, "build", lambda names, folder: make_bundle(folder, *names, tvm_ffi="0.9"))
        with pytest.raises(kernels.KernelUnavailableError, match=r"was compiled but is refused: .*tvm-ffi 0\.9"):
            kernels.load(NAME)


class TestSourceHash:
    @pytest.fixture
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A copy of the package that may be changed."""
        ignored = shutil.ignore_patterns("_kernels", "__pycache__")
        copy = Path(shutil.copytree(kernels.PACKAGE, tmp_path / "flash_mla", ignore=ignored))
        monkeypatch.setattr(kernels, "PACKAGE", copy)
        return copy

    @pytest.fixture
    def changes(self, package: Path) -> Callable[[str], bool]:
        """Whether a kernel's hash changes when something is added to a file of the package."""

        def hash_changes(file: str) -> bool:
            before = kernels.source_hash.__wrapped__(NAME)
            path = package / file
            path.write_text(path.read_text() + "\n")
            return kernels.source_hash.__wrapped__(NAME) != before

        return hash_changes

    def test_is_that_of_the_contents_wherever_they_lie(self, package):
        for name in VARIANTS:
            assert kernels.source_hash.__wrapped__(name) == kernels.source_hash(name)

    @pytest.mark.parametrize(
        "file",
        [
            "backends/hopper/planner.py",
            "backends/hopper/aot.py",
            "plan.py",
            "backends/hopper/raise_cuda_error.c",
            "backends/hopper/recorded_call.c",
        ],
    )
    def test_changes_with_the_module_and_what_it_imports(self, changes, file):
        assert changes(file)

    @pytest.mark.parametrize(
        "file",
        [
            "__init__.py",
            "cli.py",
            "backends/__init__.py",
            "backends/hopper/__init__.py",
            "backends/hopper/combine.py",
            "backends/hopper/launch.py",
            "backends/hopper/variants.py",
        ],
    )
    def test_stays_when_host_code_or_another_kernel_changes(self, changes, file):
        assert not changes(file)

    def test_follows_imports_of_imports(self, package, changes):
        (package / "deeper.py").write_text("X = 1\n")
        aot = package / "backends/hopper/aot.py"
        aot.write_text(aot.read_text() + "import flash_mla.deeper\n")
        assert changes("deeper.py")

    def test_differs_between_all_variants(self):
        assert len({kernels.source_hash(name) for name in VARIANTS}) == len(VARIANTS)

    def test_changes_with_the_configuration_but_not_with_the_register_budget(self, monkeypatch):
        before = kernels.source_hash.__wrapped__(NAME)
        variant = VARIANTS[NAME]
        monkeypatch.setitem(VARIANTS, NAME, dataclasses.replace(variant, registers=variant.registers + 8))
        assert kernels.source_hash.__wrapped__(NAME) == before
        monkeypatch.setitem(VARIANTS, NAME, dataclasses.replace(variant, config={**variant.config, "stages": 3}))
        assert kernels.source_hash.__wrapped__(NAME) != before
