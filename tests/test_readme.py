"""The README's examples run as they stand, and what it says of the library is true."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

import flash_mla
from flash_mla import KVCacheFormat, backends, cli, kernels

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


def test_the_support_table_has_a_row_for_each_mode_and_names_each_format():
    cells = [line.strip("|").split("|") for line in README.splitlines() if line.count("|") == 5]
    rows = {mode.split(",")[0].strip(): (formats, cpu.strip()) for mode, formats, cpu, _ in cells[2:]}
    problems = [problem for _, problem in cli._sample_problems(torch.device("cpu"))]
    assert rows.keys() == {problem.mode for problem in problems}
    assert all(backends.explain(problem)["cpu"] is None for problem in problems)
    assert {cpu for _, cpu in rows.values()} == {"yes"}
    assert all(kv_format.name in rows["sparse decode"][0] for kv_format in KVCacheFormat)


@pytest.mark.parametrize("flags", re.findall(r"flash-mla (.*?)(?:  |`|$)", README, re.MULTILINE))
def test_the_commands_exist(flags):
    options = cli._parser().parse_args(flags.replace(" DIR", " .").split())
    assert callable(options.run)
