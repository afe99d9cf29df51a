"""The ahead-of-time check of Triton's kernels: what it complains about, and that it compiles without a GPU."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton")

import triton

from flash_mla.backends.triton import check, mha
from flash_mla.backends.triton.check import ARCHITECTURES, Report, complaints
from flash_mla.backends.triton.variants import Variant, variants

GOOD = Report(registers=128, spill=0, shared_memory=64 << 10, tensor_cores=True, serialised=False)
VARIANT = Variant("a kernel", kernel=None, types={}, constants={}, num_warps=4)


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_a_good_kernel_passes(capability):
    assert complaints(VARIANT, capability, GOOD) == []


@pytest.mark.parametrize(
    ("report", "complaint"),
    [
        (replace(GOOD, shared_memory=100 << 10), "shared memory, a block has 101376"),
        (replace(GOOD, spill=8), "spills 8 bytes, may spill 0"),
        (replace(GOOD, tensor_cores=False), "has no mma.sync"),
        (replace(GOOD, serialised=True), "waits for every wgmma"),
    ],
)
def test_complaints(report, complaint):
    (got,) = complaints(VARIANT, (8, 9), report)
    assert complaint in got


def test_a_variant_may_spill_or_not_multiply():
    assert complaints(replace(VARIANT, spill=8), (9, 0), replace(GOOD, spill=8)) == []
    assert complaints(replace(VARIANT, multiplies=False), (9, 0), replace(GOOD, tensor_cores=False)) == []


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_every_argument_of_every_variant_is_known(capability):
    names = set()
    for variant in variants(capability):
        assert variant.constants.keys() <= set(variant.kernel.arg_names), variant.name
        for name, kind in variant.signature.items():
            known = kind == "constexpr" or kind[0] == "*" or not name.endswith("_ptr")
            assert known, f"{variant.name}: {name} is a pointer to what?"
        names.add(variant.name)
    assert len(names) == len(list(variants(capability))), "two variants of one name"


@pytest.mark.parametrize("d_qk", [128, 192])
def test_triton_3_4_is_given_no_tiles_of_dk_and_dv_for_tensor_memory(monkeypatch, d_qk):
    monkeypatch.setattr(triton, "__version__", "3.4.0")
    assert mha._dkdv_tiles((10, 0), d_qk).tile_kv == 32
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert mha._dkdv_tiles((10, 0), d_qk).tile_kv == 64


def test_triton_3_2_is_given_a_stage_less_where_two_programs_share_an_sm(monkeypatch):
    def stages(version, capability, d_qk):
        monkeypatch.setattr(triton, "__version__", version)
        return mha._forward_tiles(capability, d_qk).num_stages

    assert stages("3.2.0", (9, 0), 128) == stages("3.3.1", (9, 0), 128) - 1
    for capability, d_qk in (((9, 0), 192), ((8, 0), 128)):
        assert stages("3.2.0", capability, d_qk) == stages("3.3.1", capability, d_qk)


def check_in_process(*args: str) -> subprocess.CompletedProcess:
    """In a process that compiles: this one may interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", check.__name__, "--jobs", "1", *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(triton.__version__.startswith("3.2."), reason="the check needs Triton 3.3")
def test_compiles_without_a_gpu():
    result = check_in_process("--arch", "sm_80", "--only", "mha_forward_128")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "sm_80  mha_forward_128" in result.stdout
    assert "1 kernels, 0 wrong" in result.stdout


def test_nothing_to_compile_is_an_error():
    assert check_in_process("--only", "no such kernel").returncode != 0
