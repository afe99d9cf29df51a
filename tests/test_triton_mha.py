"""Triton's dense multi-head attention against the fp32 reference: on a GPU, or without one in the interpreter."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from helpers import assert_close, assert_close_lse, assert_close_out, one_key_leads_, spread
from triton_device import DEVICE

from flash_mla import reference
from flash_mla.backends.triton import mha
from flash_mla.backends.triton.mha_heuristics import dkdv_tiles, dq_tiles, forward_tiles
from flash_mla.problem import MHAProblem

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that PyTorch hands out uninitialised is full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def cu_seqlens(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


class Case(NamedTuple):
    """One call, with the gradients that arrive at its results."""

    problem: MHAProblem
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor | None
    lengths_q: list[int]
    lengths_kv: list[int]
    scale: float
    magnitude: float
    slack: int = 0  # by how much the longest lengths are overstated

    @property
    def sequences(self) -> tuple[torch.Tensor, torch.Tensor, int, int, float]:
        lengths = self.lengths_q, self.lengths_kv
        return (*map(cu_seqlens, lengths), *(max(x) + self.slack for x in lengths), self.scale)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return mha.mha_forward(self.problem, self.q, self.k, self.v, *self.sequences)

    def backward(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return mha.mha_backward(
            self.problem, self.dout, self.dlse, self.q, self.k, self.v, out, lse, *self.sequences
        )  # fmt: skip

    def all_results(self) -> tuple[torch.Tensor, ...]:
        out, lse = self.forward()
        return out, lse, *self.backward(out, lse)

    def blind(self) -> torch.Tensor:
        """[total_q] bool: the queries that see no key."""
        blind = [
            (s_kv - s_q + i + 1 if self.problem.causal else s_kv) <= 0
            for s_q, s_kv in zip(self.lengths_q, self.lengths_kv, strict=True)
            for i in range(s_q)
        ]
        return torch.tensor(blind, dtype=torch.bool, device=DEVICE)


def make_case(
    lengths_q: list[int],
    lengths_kv: list[int],
    *,
    h_q: int = 2,
    h_kv: int = 1,
    d_qk: int = 192,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = True,
    with_dlse: bool = True,
    scale: float | None = None,
    magnitude: float = 1.0,
) -> Case:
    def normal(tokens: int, heads: int, d: int) -> torch.Tensor:
        return (torch.randn(tokens, heads, d, device=DEVICE) * magnitude).to(dtype)

    total_q, total_kv = sum(lengths_q), sum(lengths_kv)
    return Case(
        MHAProblem(torch.device(DEVICE), dtype, h_q, h_kv, d_qk, 128, causal),
        normal(total_q, h_q, d_qk),
        normal(total_kv, h_kv, d_qk),
        normal(total_kv, h_kv, 128),
        normal(total_q, h_q, 128),
        torch.randn(total_q, h_q, device=DEVICE) * magnitude**2 if with_dlse else None,
        lengths_q,
        lengths_kv,
        d_qk**-0.5 if scale is None else scale,
        magnitude,
    )


def check(case: Case) -> None:
    """All results against the reference and its autograd.

    With inputs as small as clients apply them to, clients' tolerances hold. Larger ones make the softmax sharp; then P,
    which is rounded to the dtype, is off by up to half its eps, and so is each product that it enters.
    """
    out, lse, *grads = case.all_results()
    leaves = [x.float().requires_grad_() for x in (case.q, case.k, case.v)]
    want_out, want_lse = reference.mha_forward(*leaves, *case.sequences[:2], case.scale, case.problem.causal)
    assert out.dtype == case.q.dtype
    assert out.is_contiguous()
    assert lse.T.is_contiguous()
    small = case.magnitude <= 0.1
    eps = torch.finfo(out.dtype).eps
    rounding = 0.0 if small or not case.v.numel() else eps * float(case.v.abs().max())
    assert_close("out", out, want_out.detach(), atol=max(8e-4, rounding), rtol=2 / 128, cos=7e-6)
    assert_close_lse(lse, want_lse.detach(), rtol=2 / 65536)
    blind = case.blind()
    assert (out[blind] == 0).all()
    assert (lse[blind] == -INF).all()

    loss = (want_out * case.dout.float()).sum()
    if case.dlse is not None:
        loss = loss + (want_lse * case.dlse)[~blind].sum()
    want_grads = torch.autograd.grad(loss, leaves)
    for name, got, leaf, want in zip(("dq", "dk", "dv"), grads, (case.q, case.k, case.v), want_grads, strict=True):
        assert got.dtype == leaf.dtype, name
        rounding = 0.0 if small or not want.numel() else eps * float(want.abs().max())
        assert_close(name, got, want, atol=max(1e-3, rounding), rtol=8 / 128, cos=1e-5)


LENGTHS = {
    "ragged": ([70, 1, 130, 5], [150, 1, 129, 77]),
    "empty": ([0, 9, 33, 0], [5, 0, 64, 0]),
    "more queries than keys": ([150, 40], [20, 39]),
    "one token against many": ([1, 1], [300, 128]),
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("d_qk", "dtype", "h_q", "h_kv", "magnitude"),
    [(192, torch.bfloat16, 2, 2, 1.0), (128, torch.float16, 3, 1, 0.1)],
    ids=["192 bf16 MHA", "128 fp16 MQA"],
)
def test_matches_reference(lengths, causal, d_qk, dtype, h_q, h_kv, magnitude):
    check(make_case(*lengths, causal=causal, d_qk=d_qk, dtype=dtype, h_q=h_q, h_kv=h_kv, magnitude=magnitude))


@pytest.mark.parametrize(("dtype", "magnitude"), [(torch.bfloat16, 0.1), (torch.float16, 1.0)])
def test_dtypes_at_the_other_magnitude(dtype, magnitude):
    check(make_case([70, 20], [70, 90], dtype=dtype, magnitude=magnitude))


def test_groups_of_query_heads_without_a_gradient_of_lse():
    check(make_case([65], [130], h_q=4, h_kv=2, with_dlse=False))


@pytest.mark.parametrize("scale", [0.3, -0.05, 0.0])
def test_any_scale(scale):
    check(make_case([40, 70], [90, 20], scale=scale, d_qk=128, magnitude=0.5))


def test_a_longest_length_may_be_promised_too_long():
    case = make_case([40, 0, 7], [90, 7, 20])
    for got, want in zip(case._replace(slack=500).all_results(), case.all_results(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_huge_logits(causal):
    case = make_case([40, 9], [40, 60], magnitude=300.0, causal=causal, with_dlse=False)
    one_key_leads_(case.q, case.k)
    case.v.div_(300)
    case.dout.div_(300)
    out, lse, *grads = case.all_results()
    want_out, want_lse = reference.mha_forward(case.q, case.k, case.v, *case.sequences[:2], case.scale, causal)
    assert_close_out(out, want_out)
    assert_close_lse(lse, want_lse, rtol=2 / 65536)
    assert not any(x.isnan().any() for x in grads)


def test_other_sequences_and_blind_queries_do_not_matter():
    """NaN in a sequence, or in the gradients of queries that see no key, stays there."""
    case = make_case([30, 50, 20], [40, 10, 70])
    out, lse, *grads = case.all_results()
    blind = case.blind()
    assert blind.sum() == 40
    case.dout[blind], case.dlse[blind] = NAN, NAN
    for x, lengths in ((case.q, [30, 50]), (case.k, [40, 10]), (case.v, [40, 10]), (case.dout, [30, 50])):
        x[: lengths[0]] = NAN
        x[sum(lengths) :] = NAN
    # Two sequences are lost; the one between them, whose first 40 queries are blind, keeps its bits.
    for got, want, (start, stop) in zip(
        case.all_results(), (out, lse, *grads), ((30, 80), (30, 80), (30, 80), (40, 50), (40, 50)), strict=True
    ):
        assert torch.equal(got[start:stop], want[start:stop])


def test_inputs_may_lie_apart():
    case = make_case([5, 70], [80, 11], h_q=4, h_kv=2)
    apart = case._replace(**{name: spread(getattr(case, name)) for name in ("q", "k", "v", "dout")})
    apart = apart._replace(dlse=case.dlse.T.contiguous().T)
    assert not apart.q.is_contiguous()
    for got, want in zip(apart.all_results(), case.all_results(), strict=True):
        assert torch.equal(got, want)


def test_results_repeat_bit_for_bit():
    case = make_case([70, 10], [90, 20], h_q=4, h_kv=2)
    first = case.all_results()
    assert all(torch.equal(x, y) for x, y in zip(case.all_results(), first, strict=True))


@pytest.mark.parametrize(("total_q", "total_kv"), [(0, 0), (0, 5), (5, 0)])
def test_nothing_on_one_side(total_q, total_kv):
    out, lse, *grads = make_case([total_q], [total_kv]).all_results()
    assert (out == 0).all()
    assert (lse == -INF).all()
    assert all((x == 0).all() for x in grads)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)], ids=str)
@pytest.mark.parametrize("d_qk", [192, 128])
def test_tiles_are_ones_that_triton_can_multiply(capability, d_qk):
    for tiles in (forward_tiles(capability, d_qk), dq_tiles(capability, d_qk), dkdv_tiles(capability, d_qk)):
        assert tiles.tile_q in (32, 64, 128)
        assert tiles.tile_kv in (32, 64, 128)
        assert tiles.num_warps in (4, 8)
        assert tiles.num_stages >= 2
