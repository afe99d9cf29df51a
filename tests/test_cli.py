"""The flash-mla command, run in this process: what it prints and its exit status."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from test_kernels import NAME, NO_DSL, make_bundle

from flash_mla import KVCacheFormat, __version__, backends, build, cli, demo, kernels, selfcheck
from flash_mla.backends.hopper.variants import ARCH, VARIANTS
from flash_mla.bench import BENCHMARKS, cpu_decode


class Ran(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Runs the command on a machine without a GPU, with output wide enough for its tables and spaces collapsed."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.delenv("FLASH_MLA_KERNELS", raising=False)
    monkeypatch.delenv("FLASH_MLA_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def run_command(*arguments: str) -> Ran:
        try:
            status = cli.main(arguments)
        except SystemExit as exit:
            status = int(exit.code or 0)
        out, err = capsys.readouterr()
        return Ran(status, re.sub(r" +", " ", out), re.sub(r" +", " ", err))

    return run_command


class TestParser:
    def test_version_is_the_project_s(self, run):
        project = (kernels.PACKAGE.parent / "pyproject.toml").read_text()
        assert re.search(r'^version = "(.*)"$', project, re.MULTILINE)[1] == __version__
        assert run("--version") == (0, f"{__version__}\n", "")

    def test_a_subcommand_is_needed(self, run):
        ran = run()
        assert ran.status == 2
        assert "usage: flash-mla" in ran.err

    @pytest.mark.parametrize("command", ["info", "check", "demo", "bench", "build"])
    def test_each_subcommand_explains_itself(self, run, command):
        ran = run(command, "--help")
        assert ran.status == 0
        assert f"usage: flash-mla {command}" in ran.out


class TestBench:
    @pytest.mark.parametrize("name", BENCHMARKS)
    def test_each_explains_itself(self, run, name):
        ran = run("bench", name, "--help")
        assert ran.status == 0
        assert f"usage: flash-mla bench {name}" in ran.out
        assert f"flash-mla bench {name}" in ran.out.split("options:")[0].split("\n\n", 1)[1], "in its description"
        assert "--out" in ran.out

    def test_without_a_gpu_it_says_what_is_measured_there(self, run):
        ran = run("bench", "dense_decode", "--peer", "nothing")
        assert (ran.status, ran.out) == (1, "")
        assert "dense_decode is measured on a CUDA GPU; cpu_decode is measured without" in ran.err

    def test_a_peer_that_is_not_there_is_told(self, run, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        ran = run("bench", "dense_decode", "--peer", "no_such_peer")
        assert (ran.status, ran.err) == (1, "flash-mla bench: dense_decode: No module named 'no_such_peer'\n")

    def test_cpu_decode_records_what_it_prints(self, run, monkeypatch, tmp_path):
        monkeypatch.setattr(cpu_decode, "CASES", [cpu_decode.Dense(1, 1, 64, 1), cpu_decode.SparsePrefill(1, 64, 8, 1)])
        ran = run("bench", "cpu_decode", "--repeats", "1", "--out", str(tmp_path))
        assert ran.status == 0
        result = json.loads((tmp_path / "cpu_decode.json").read_text())
        assert [row["mode"] for row in result["rows"]] == ["Dense", "SparsePrefill"]
        assert ran.out.count("of a matmul") == 4


class TestInfo:
    def test_without_a_gpu_the_cpu_serves_every_mode_and_the_others_say_why_not(self, run):
        ran = run("info")
        assert ran.status == 0
        assert f"torch │ {importlib.metadata.version('torch')} " in ran.out
        assert "CUDA device │ none " in ran.out
        modes = re.findall(r"│ (\w+ (?:decode|prefill|MHA).*?) │ (\w+) │ (.*?) │", ran.out)
        assert len(modes) >= 10
        assert {served_by for _, served_by, _ in modes} == {"cpu"}
        assert all("hopper: the tensors are on cpu, not on a CUDA device" in others for _, _, others in modes)

    def test_says_which_kernels_there_are(self, run, tmp_path, monkeypatch):
        make_bundle(tmp_path, NAME)
        monkeypatch.setenv("FLASH_MLA_KERNELS", str(tmp_path))
        ran = run("info")
        assert f"Hopper kernels │ 1 of {len(VARIANTS)} compiled │" in ran.out
        assert f"{tmp_path}: not there" in ran.out
        assert "pip install 'flash-mla[build]' && flash-mla build" in ran.out

    def test_says_what_compiles_on_first_use(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr(kernels, "package_dir", lambda: tmp_path)
        monkeypatch.setattr(kernels, "cache_dir", lambda name: tmp_path)
        monkeypatch.setattr(build, "missing_tool", lambda: None)
        assert f"0 of {len(VARIANTS)} compiled, the others on first use" in run("info").out


class TestCheck:
    def test_passes_on_the_cpu(self, run):
        ran = run("check", "--seed", "17")
        assert ran.status == 0, ran.out
        assert ran.out.count("│ ok │") == len(re.findall(r"│ cpu │ out ", ran.out)) >= 15

    def test_fails_if_a_mode_is_wrong(self, run, monkeypatch):
        rows = [selfcheck.Row("good", "cpu", {}, "ok"), selfcheck.Row("bad", "cpu", {"out": 1.0}, "WRONG")]
        monkeypatch.setattr(selfcheck, "run_checks", lambda device, seed: rows)
        assert run("check").status == 1
        rows.pop()
        assert run("check").status == 0

    def test_what_is_not_served_is_no_failure(self, run, monkeypatch):
        monkeypatch.setattr(backends, "BACKENDS", ())
        ran = run("check")
        assert ran.status == 0
        assert "│ ok │" not in ran.out
        assert "│ none │ │ not served: no backend serves dense MHA on cpu" in ran.out


class TestDemo:
    @pytest.fixture
    def chosen(self, monkeypatch: pytest.MonkeyPatch) -> list[demo.DemoOptions]:
        """The options of each demo that was run, instead of running it."""
        options: list[demo.DemoOptions] = []

        def note(given: demo.DemoOptions) -> demo.DemoResult:
            options.append(given)
            return demo.DemoResult()

        monkeypatch.setattr(cli, "run_demo", note)
        return options

    def test_without_flags_the_defaults_are_those_of_the_demo(self, run, chosen):
        assert run("demo").status == 0
        assert chosen == [demo.DemoOptions()]

    def test_every_option_has_a_flag(self, run, chosen):
        flags = "--trace t.csv --max-requests 3 --batch 2 --format fp8_v32 --steps 5 --page-size 32 --device cuda:1"
        assert run("demo", *flags.split(), "--verify", "0.5", "--seed", "9").status == 0
        expected = demo.DemoOptions(Path("t.csv"), 3, 2, KVCacheFormat.FP8_V32, 5, 32, "cuda:1", 0.5, 9)
        assert chosen == [expected]
        untouched = [f.name for f in dataclasses.fields(expected) if getattr(expected, f.name) == f.default]
        assert untouched == [], "give every option another value than its default here"

    def test_fails_if_an_output_is_wrong(self, run, monkeypatch):
        wrong = demo.DemoResult(verification=demo.Verification(failures=["request 1, step 1: out is off"]))
        monkeypatch.setattr(cli, "run_demo", lambda options: wrong)
        assert run("demo").status == 1

    def test_serves_a_trace(self, run, tmp_path):
        trace = tmp_path / "trace.csv"
        trace.write_text("ContextTokens,GeneratedTokens\n70,2\n1,3\n")
        ran = run("demo", "--trace", str(trace), "--page-size", "16", "--verify", "1")
        assert ran.status == 0, ran.out + ran.err
        assert "requests finished │ 2 of 2" in ran.out
        assert "0 wrong" in ran.out

    def test_an_unknown_trace_is_named(self, run, tmp_path):
        path = tmp_path / "no.csv"
        ran = run("demo", "--trace", str(path))
        assert ran.status == 1
        assert ran.err == f"flash-mla demo: {path}: cannot be read: No such file or directory\n"

    def test_an_unknown_format_is_refused_beside_those_there_are(self, run):
        ran = run("demo", "--format", "int3")
        assert ran.status == 2
        assert "'int3'" in ran.err
        assert "fp8_v32" in ran.err


class TestBuild:
    def test_only_must_name_a_kernel(self, run):
        ran = run("build", "--only", "plannner")
        assert ran.status == 1
        assert "--only: got 'plannner', need the beginning of one of combine_bf16" in ran.err

    def test_jobs_must_be_positive(self, run):
        ran = run("build", "--jobs", "0")
        assert (ran.status, ran.err) == (1, "flash-mla build: --jobs: got 0, need at least 1\n")

    def test_says_what_to_install(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr(build, "missing_tool", lambda: NO_DSL)
        ran = run("build", "--out", str(tmp_path / "bundle"))
        assert (ran.status, ran.err) == (1, f"flash-mla build: {NO_DSL}\n")

    @pytest.fixture
    def manifest(self, tmp_path, monkeypatch) -> dict:
        """What building planner_balanced alone gives; it expects to be asked for that in tmp_path."""
        manifest = json.loads((make_bundle(tmp_path, NAME) / kernels.MANIFEST).read_text())

        def pretend(names: list[str], folder: Path, jobs: int) -> dict:
            assert (names, folder, jobs) == ([NAME], tmp_path, 3)
            return manifest

        monkeypatch.setattr(build, "build", pretend)
        return manifest

    def test_shows_what_ptxas_said(self, run, tmp_path, manifest):
        ran = run("build", "--only", NAME, "--out", str(tmp_path), "--jobs", "3", "--arch", ARCH, "--check")
        assert ran.status == 0
        assert f"│ {NAME} │ 40 of {VARIANTS[NAME].registers} │ 0 bytes │ none │" in ran.out

    @pytest.mark.parametrize(("flags", "status"), [((), 0), (("--check",), 1)])
    def test_complaints_fail_a_check(self, run, tmp_path, manifest, flags, status):
        manifest["kernels"][NAME] |= {"registers": 255, "spill_bytes": 64}
        ran = run("build", "--only", NAME, "--out", str(tmp_path), "--jobs", "3", *flags)
        assert ran.status == status
        assert f"{NAME}: 255 registers, budget {VARIANTS[NAME].registers}" in ran.out
        assert f"{NAME}: 64 bytes spilled" in ran.out

    def test_the_bundle_goes_into_the_package_by_default(self, run, tmp_path, monkeypatch):
        folders = []

        def fail(names: list[str], folder: Path, jobs: int) -> None:
            folders.append(folder)
            raise build.BuildError("kernel x does not compile (exit status 1):\n[red]ptxas output")

        monkeypatch.setattr(build, "build", fail)
        ran = run("build")
        assert ran.status == 1
        assert "[red]ptxas output" in ran.err, "compiler output is no markup"
        assert folders == [kernels.PACKAGE / "_kernels" / ARCH]
