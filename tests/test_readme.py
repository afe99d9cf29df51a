"""The README's examples run as they stand, and what it says of the library is true."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import types

import pytest
import torch

import flash_mla
from flash_mla import KVCacheFormat, backends, cli, kernels
from flash_mla.backends import hopper, triton
from flash_mla.problem import DecodeProblem

README = (kernels.PACKAGE.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_python_example_runs(block, tmp_path):
    paths = f"import sys; sys.path.insert(0, {str(kernels.PACKAGE.parent)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", paths + block], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_there_is_an_example():
    assert BLOCKS


def test_every_public_name_is_mentioned():
    missing = [name for name in flash_mla.__all__ if f"`{name}`" not in README]
    assert missing == []


def support_table() -> dict[str, tuple[str, str, str, str]]:
    """Mode -> its formats, and where it runs: on the CPU, on Hopper, in Triton."""
    rows = [line.strip("|").split("|") for line in README.splitlines() if line.count("|") == 6]
    return {
        mode.split(",")[0].strip(): (formats, cpu.strip(), hopper, triton.strip())
        for mode, formats, cpu, hopper, triton in rows[2:]
    }


def test_the_support_table_has_a_row_for_each_mode_and_names_each_format():
    rows = support_table()
    problems = [problem for _, problem in cli._sample_problems(torch.device("cpu"))]
    assert rows.keys() == {problem.mode for problem in problems}
    assert all(backends.explain(problem)["cpu"] is None for problem in problems)
    assert {cpu for _, cpu, _, _ in rows.values()} == {"yes"}
    assert all(kv_format.name in rows["sparse decode"][0] for kv_format in KVCacheFormat)


def test_the_support_table_is_right_about_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    h200 = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
    monkeypatch.setattr(kernels, "unavailable", lambda name: None)
    device = torch.device("cuda", 99)  # for which no other test asks, as the backend keeps its answers
    served: dict[str, set[str]] = {mode: set() for mode in support_table()}
    problems = [problem for _, problem in cli._sample_problems(device)]
    for problem in problems:
        formats = [problem.kv_format] if isinstance(problem, DecodeProblem) else [None]
        if formats == [KVCacheFormat.BF16]:
            formats.append(KVCacheFormat.FP16)
        for kv_format in formats:
            if kv_format is KVCacheFormat.FP16:
                problem = dataclasses.replace(problem, kv_format=kv_format, dtype=torch.float16)
            if hopper.why_not(problem) is None:
                served[problem.mode].add("yes" if kv_format is None else kv_format.name)
    promised = {
        mode: {word for word in re.findall(r"\w+", cell) if word == "yes" or word in KVCacheFormat.__members__}
        for mode, (_, _, cell, _) in support_table().items()
    }
    assert served == promised
    dense = problems[0]
    for page_size in (1, 4, 8, 40, 100, 192):
        problem = dataclasses.replace(dense, page_size=page_size, s_q=1, h_q=16)
        assert hopper.why_not(problem) is None
        reason = hopper.why_not(dataclasses.replace(problem, s_q=2))
        assert (reason is not None and "a multiple of 8" in reason) == (page_size % 8 != 0)


@pytest.mark.parametrize(("capability", "served"), [((8, 0), True), ((12, 0), True), ((7, 5), False)])
def test_the_support_table_is_right_about_triton(monkeypatch, capability, served):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda", 50 + capability[0])  # for which no other test asks
    problems = [problem for _, problem in cli._sample_problems(device)]
    assert {triton.why_not(problem) is None for problem in problems} == {served}
    assert {cell for _, _, _, cell in support_table().values()} == {"yes"}


@pytest.mark.parametrize("flags", re.findall(r"flash-mla (.*?)(?:  |`|$)", README, re.MULTILINE))
def test_the_commands_exist(flags):
    options = cli._parser().parse_args(flags.replace(" DIR", " .").split())
    assert callable(options.run)


def test_the_performance_table_is_what_was_recorded():
    report = kernels.PACKAGE.parent / "benchmarks" / "report.py"
    assert subprocess.run([sys.executable, report, "--check"], check=False).returncode == 0
