"""`flash-mla check` must notice a backend that is wrong, in whatever way and mode."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_mla import backends, selfcheck
from flash_mla.backends import cpu

CPU = torch.device("cpu")
MODES = ("dense decode", "sparse decode", "sparse prefill", "dense MHA")


def check(monkeypatch: pytest.MonkeyPatch, mode: str, seed: int = 0) -> list[selfcheck.Row]:
    """The rows of one mode."""
    modes = selfcheck._modes
    monkeypatch.setattr(selfcheck, "_modes", lambda *where: (row for row in modes(*where) if row[0].startswith(mode)))
    return selfcheck.run_checks(CPU, seed)


def break_backend(
    monkeypatch: pytest.MonkeyPatch, function: str, output: int, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Have one result of a function of the CPU backend changed."""
    right = getattr(cpu, function)

    def wrong(*args: object, **kwargs: object) -> tuple[torch.Tensor, ...]:
        results = right(*args, **kwargs)
        results[output].copy_(change(results[output].clone()))
        return results

    monkeypatch.setattr(cpu, function, wrong)


def one_nan(x: torch.Tensor) -> torch.Tensor:
    x[(-1,) * x.dim()] = torch.nan
    return x


def one_value_off(x: torch.Tensor) -> torch.Tensor:
    x[tuple(x.isfinite().nonzero()[-1])] += 0.05
    return x


def all_three_percent_off(x: torch.Tensor) -> torch.Tensor:
    return x * 1.03


@pytest.mark.parametrize("mode", MODES)
def test_the_cpu_is_right(monkeypatch, mode):
    rows = check(monkeypatch, mode, seed=random.randrange(2**31))
    assert rows
    assert {(row.backend, row.verdict) for row in rows} == {("cpu", "ok")}


@pytest.mark.parametrize("change", [one_nan, one_value_off, all_three_percent_off])
@pytest.mark.parametrize(
    ("mode", "function", "outputs"),
    [
        ("dense decode", "decode", 2),
        ("sparse decode", "decode", 2),
        ("sparse prefill", "sparse_prefill", 3),
        ("dense MHA", "mha_forward", 2),
        ("dense MHA", "mha_backward", 3),
    ],
)
def test_every_output_of_every_mode_is_compared(monkeypatch, mode, function, outputs, change):
    for output in range(outputs):
        with monkeypatch.context() as patch:
            break_backend(patch, function, output, change)
            assert {row.verdict for row in check(patch, mode)} == {"WRONG"}, f"output {output}"


@given(
    values=st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=20),
    wrong=st.sampled_from([torch.nan, torch.inf, -torch.inf, 9.0]),
    data=st.data(),
)
def test_one_wrong_value_is_noticed(values, wrong, data):
    expected = torch.tensor(values)
    result = selfcheck.Result("out", expected.clone(), expected, selfcheck.DECODE_OUT)
    assert result.is_right
    assert result.error == 0
    result.got[data.draw(st.integers(0, len(values) - 1))] = wrong
    assert not result.is_right
    assert not result.error < 4


def test_equal_infinities_are_right_and_other_shapes_are_not():
    lse = torch.tensor([torch.inf, 1.0, -torch.inf])
    assert selfcheck.Result("lse", lse.clone(), lse, selfcheck.DECODE_LSE).is_right
    assert selfcheck.Result("lse", lse.clone(), lse, selfcheck.DECODE_LSE).error == 0
    assert not selfcheck.Result("lse", -lse, lse, selfcheck.DECODE_LSE).is_right
    assert not selfcheck.Result("lse", lse[None], lse, selfcheck.DECODE_LSE).is_right


def test_what_a_call_raises_is_not_hidden(monkeypatch):
    def fail(*args: object) -> None:
        raise RuntimeError("CUDA error 700")

    monkeypatch.setattr(cpu, "sparse_prefill", fail)
    with pytest.raises(RuntimeError, match="CUDA error 700"):
        check(monkeypatch, "sparse prefill")


def test_a_partly_served_mode_says_so(monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", (cpu,))
    monkeypatch.setattr(cpu, "why_not", lambda problem: "only float16" if problem.dtype != torch.float16 else None)
    (row, _) = check(monkeypatch, "sparse prefill")
    assert row.backend == "cpu"
    assert row.verdict.startswith("ok where served; of 2 cases 1 not served: no backend serves sparse prefill on cpu")
    assert "only float16" in row.verdict
