"""Dense multi-head attention on Hopper, both ways, against the fp32 reference: a seeded sweep, and the ugly corners."""

from __future__ import annotations

import itertools
import math
import random
from typing import NamedTuple

import pytest
import torch
from helpers import assert_close, assert_close_lse, spread

from flash_mla import backends, flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func, reference
from flash_mla.backends import hopper
from flash_mla.problem import MHAProblem

pytestmark = pytest.mark.gpu

INF, NAN = math.inf, math.nan
D_V = 128


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that PyTorch hands out uninitialised is full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


class Case(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lengths_q: list[int]
    lengths_kv: list[int]
    scale: float
    causal: bool

    @property
    def offsets(self) -> tuple[torch.Tensor, torch.Tensor]:
        q, kv = (
            torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
            for lengths in (self.lengths_q, self.lengths_kv)
        )
        return q, kv

    def run(self, slack: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        longest = (max(lengths) + slack for lengths in (self.lengths_q, self.lengths_kv))
        return flash_attn_varlen_func(
            self.q, self.k, self.v, *self.offsets, *longest, softmax_scale=self.scale, causal=self.causal,
            is_varlen=True,
        )  # fmt: skip

    def blind(self) -> torch.Tensor:
        """[total_q] bool: the queries that see no key."""
        blind = [
            (s_kv - s_q + i + 1 if self.causal else s_kv) <= 0
            for s_q, s_kv in zip(self.lengths_q, self.lengths_kv, strict=True)
            for i in range(s_q)
        ]
        return torch.tensor(blind, dtype=torch.bool, device="cuda")

    def dout(self) -> torch.Tensor:
        """A gradient of out: the smaller, the more queries a key has, as that of a mean is.

        dv sums up P dout, of which P is rounded to the dtype: with few keys and many queries of like size those errors
        exceed what is left of sums that cancel.
        """
        group = self.q.shape[1] // self.k.shape[1]
        sizes = [
            min(1.0, math.sqrt(s_kv / (s_q * group)))
            for s_q, s_kv in zip(self.lengths_q, self.lengths_kv, strict=True)
            for _ in range(s_q)
        ]
        shape = (*self.q.shape[:2], D_V)
        sizes = torch.tensor(sizes, device=self.q.device)[:, None, None]
        return (torch.randn(shape, device=self.q.device) / 10 * sizes).to(self.q.dtype)


def normal(tokens: int, heads: int, d: int, dtype: torch.dtype, magnitude: float) -> torch.Tensor:
    """Multiples of a power of two: fp32 scores are exact in any order, so that tolerances of lse hold near 0, too."""
    step = 2.0 ** (math.floor(math.log2(magnitude)) - 3)
    x = torch.randn(tokens, heads, d, device="cuda").clamp_(-4, 4) * magnitude
    return x.div_(step).round_().mul_(step).to(dtype)


def make(lengths_q, lengths_kv, *, h_q=2, h_kv=1, d=192, dtype=torch.bfloat16, causal=True, scale=None, magnitude=0.1):
    total_q, total_kv = sum(lengths_q), sum(lengths_kv)
    return Case(
        normal(total_q, h_q, d, dtype, magnitude),
        normal(total_kv, h_kv, d, dtype, magnitude),
        normal(total_kv, h_kv, D_V, dtype, magnitude),
        lengths_q,
        lengths_kv,
        d**-0.5 if scale is None else scale,
        causal,
    )


def check(case: Case, slack: int = 0) -> None:
    problem = MHAProblem(
        case.q.device, case.q.dtype, case.q.shape[1], case.k.shape[1], case.q.shape[2], D_V, case.causal
    )
    assert backends.choose(problem).NAME == "hopper"
    out, lse = case.run(slack)
    again = case.run(slack)
    want_out, want_lse = reference.mha_forward(case.q, case.k, case.v, *case.offsets, case.scale, case.causal)
    assert out.dtype == case.q.dtype
    assert out.is_contiguous()
    assert lse.T.is_contiguous()
    # P is rounded to the dtype, so with values beyond those that clients' tolerances are for, so is out.
    largest = float(case.v.abs().max()) if case.v.numel() else 0.0
    atol = max(8e-4, torch.finfo(out.dtype).eps * largest) if largest > 0.5 else 8e-4
    assert_close("out", out, want_out, atol=atol, rtol=2 / 128, cos=7e-6)
    assert_close_lse(lse, want_lse, rtol=2 / 65536)
    blind = case.blind()
    assert (out[blind] == 0).all()
    assert (lse[blind] == -INF).all()
    assert torch.equal(out, again[0]), "deterministic"
    assert torch.equal(lse, again[1]), "deterministic"


def check_gradients(case: Case, *, of_lse: bool = True) -> None:
    """dq, dk, dv of random dout and dlse; whatever queries that see no key have there must not matter."""
    leaves = [x.detach().requires_grad_() for x in case[:3]]
    results = Case(*leaves, *case[3:]).run()
    given = [case.dout(), torch.randn_like(results[1]) / 100][: 1 + of_lse]
    blind = case.blind()
    got = torch.autograd.grad(results[: 1 + of_lse], leaves, [poisoned(x, blind) for x in given], retain_graph=True)
    again = torch.autograd.grad(results[: 1 + of_lse], leaves, given)
    wide = [x.detach().float().requires_grad_() for x in case[:3]]
    want = reference.mha_forward(*wide, *case.offsets, case.scale, case.causal)[: 1 + of_lse]
    want = torch.autograd.grad(want, wide, [x.float() for x in given])
    for name, x, a, b in zip(("dq", "dk", "dv"), leaves, got, want, strict=True):
        assert a.dtype == x.dtype
        assert a.is_contiguous()
        assert_close(name, a, b, atol=1e-3, rtol=8 / 128, cos=2e-5)
    assert (got[0][blind] == 0).all()
    assert torch.equal(got[1], again[1]), "deterministic"
    assert torch.equal(got[2], again[2]), "deterministic"


def poisoned(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[rows] = NAN
    return x


LENGTHS = [0, 1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 255, 256, 257, 300, 385, 640, 1000, 2049]


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(6):
        b = rng.choice([1, 1, 2, 3, 5, 33, 70])
        lengths = LENGTHS if b < 10 else LENGTHS[:10]
        h_kv = rng.choice([1, 1, 2, 3, 8, 24])
        case = make(
            [rng.choice(lengths) for _ in range(b)], [rng.choice(lengths) for _ in range(b)],
            h_q=h_kv * rng.choice([1, 1, 2, 7]), h_kv=h_kv, d=rng.choice([192, 128]),
            dtype=rng.choice([torch.bfloat16, torch.bfloat16, torch.float16]), causal=rng.random() < 0.6,
            scale=rng.choice([None, None, 0.0, -0.05, 1.0]), magnitude=rng.choice([0.1, 0.1, 1.0]),
        )  # fmt: skip
        if sum(case.lengths_q):
            check(case, slack=rng.choice([0, 0, 500]))


@pytest.mark.parametrize("seed", range(30))
def test_gradients_of_random_shapes(seed):
    rng = random.Random(1000 + seed)
    torch.manual_seed(seed)
    for _ in range(4):
        b = rng.choice([1, 1, 2, 3, 5, 33, 70])
        lengths = LENGTHS if b < 10 else LENGTHS[:10]
        h_kv = rng.choice([1, 1, 2, 3, 8])
        case = make(
            [rng.choice(lengths) for _ in range(b)], [rng.choice(lengths) for _ in range(b)],
            h_q=h_kv * rng.choice([1, 1, 2, 7]), h_kv=h_kv, d=rng.choice([192, 128]),
            dtype=rng.choice([torch.bfloat16, torch.bfloat16, torch.float16]), causal=rng.random() < 0.6,
            scale=rng.choice([None, None, 0.0, -0.05, 0.2]),
        )  # fmt: skip
        if sum(case.lengths_q):
            check_gradients(case, of_lse=rng.random() < 0.7)


@pytest.mark.parametrize("d", [192, 128])
def test_gradients_of_some_of_a_warps_keys(d):
    """A warp writes dK and dV of 16 keys: some of them may be the next sequence's."""
    lengths = [16 * i + more for i in range(1, 10) for more in (-1, 0, 1)]
    torch.manual_seed(d)
    check_gradients(make([n + 7 for n in lengths], lengths, h_q=4, h_kv=2, d=d, causal=True))


@pytest.mark.parametrize("d", [192, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_more_tiles_than_workers(d, causal):
    """Each CTA takes several tiles; heads come in groups, the last of which is smaller."""
    case = make([700, 1100, 5, 900], [900, 1100, 700, 400], h_q=36, h_kv=36, d=d, causal=causal)
    check(case)
    check_gradients(case)


@pytest.mark.parametrize("d", [192, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_of_few_rows_among_others(d, causal):
    """One consumer has rows without keys, the other none at all, both some: in any order, several tiles a CTA."""
    lengths = list(itertools.product((1, 64, 65, 128, 192, 300), (0, 1, 64, 129, 300)))
    random.shuffle(lengths)
    check(make(*map(list, zip(*lengths, strict=True)), h_q=12, h_kv=4, d=d, causal=causal))


@pytest.mark.parametrize("d", [192, 128])
def test_many_ctas_add_to_the_same_rows_at_once(d):
    """Each CTA visits the same few rows: whoever is first stores its part of dq, and all others must wait for that."""
    for s_q in (1, 60, 130, 300):
        check_gradients(make([s_q], [20_000], d=d, causal=False))


@pytest.mark.parametrize("causal", [False, True])
def test_nan_beyond_a_sequence_stays_there(causal):
    """Each sequence's neighbours are NaN, in q, k and v: tiles of keys run over a sequence's end."""
    for s_q, s_kv in ((1, 1), (100, 77), (200, 128), (129, 130), (500, 1000), (300, 17)):
        case = make([200, s_q, 200], [200, s_kv, 200], causal=causal, h_q=4, h_kv=2)
        for x, length in ((case.q, s_q), (case.k, s_kv), (case.v, s_kv)):
            x[:200] = NAN
            x[200 + length :] = NAN
        out, lse = case.run()
        alone = Case(
            *(x[200 : 200 + n].contiguous() for x, n in ((case.q, s_q), (case.k, s_kv), (case.v, s_kv))),
            [s_q], [s_kv], case.scale, causal,
        )  # fmt: skip
        want_out, want_lse = alone.run()
        check(alone)
        assert torch.equal(out[200 : 200 + s_q], want_out)
        assert torch.equal(lse[200 : 200 + s_q], want_lse)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [192, 128])
def test_gradients_of_a_sequence_among_nan(d, causal):
    for s_q, s_kv in ((1, 1), (100, 77), (200, 128), (129, 130), (70, 1000), (300, 17)):
        case = make([200, s_q, 200], [200, s_kv, 200], causal=causal, h_q=4, h_kv=2, d=d)
        dout = normal(400 + s_q, 4, D_V, torch.bfloat16, 0.1)
        for x, length in ((case.q, s_q), (case.k, s_kv), (case.v, s_kv), (dout, s_q)):
            x[:200] = NAN
            x[200 + length :] = NAN
        queries, keys = slice(200, 200 + s_q), slice(200, 200 + s_kv)
        leaves = [x.requires_grad_() for x in case[:3]]
        got = torch.autograd.grad(case.run()[0], leaves, dout)
        alone = Case(
            *(x.detach()[rows].requires_grad_() for x, rows in zip(leaves, (queries, keys, keys), strict=True)),
            [s_q], [s_kv], case.scale, causal,
        )  # fmt: skip
        want = torch.autograd.grad(alone.run()[0], alone[:3], dout[queries])
        check_gradients(alone)
        assert torch.equal(got[1][keys], want[1])
        assert torch.equal(got[2][keys], want[2])
        assert_close("dq", got[0][queries], want[0], atol=1e-6, rtol=1 / 64, cos=1e-6)


@pytest.mark.parametrize("d", [192, 128])
def test_scores_that_grow_and_shrink_along_the_keys(d):
    """The reference of the softmax must move, by little and by more than exp2 can hold, at any tile of keys."""
    for causal, profile in itertools.product(
        (False, True), ([1.0, 2.0, 4.0, 8.0, 60.0], [60.0, 8.0, 4.0, 2.0, 1.0], [0.0, 60.0, 0.0, 1.0, 30.0])
    ):
        case = make([640], [640], d=d, causal=causal, magnitude=1.0)
        case.k.view(5, 128, 1, d).mul_(torch.tensor(profile, device="cuda").view(5, 1, 1, 1))
        check(case)


def test_inputs_of_any_strides():
    case = make([300, 5, 140], [130, 300, 64], h_q=4, h_kv=2)
    strided = case._replace(q=spread(case.q), k=spread(case.k), v=spread(case.v))
    check(strided)
    assert torch.equal(strided.run()[0], case.run()[0])
    unaligned = [torch.full((*x.shape[:2], x.shape[2] + 3), NAN, dtype=x.dtype, device="cuda") for x in case[:3]]
    views = [room[..., 3:].copy_(x) for room, x in zip(unaligned, case[:3], strict=True)]
    assert torch.equal(Case(*views, *case[3:]).run()[0], case.run()[0])
    expanded = case._replace(k=case.k[:, :1].expand(-1, 2, -1))
    check(expanded)
    check_gradients(strided)
    check_gradients(Case(*views, *case[3:]))


@pytest.mark.parametrize("d", [192, 128])
def test_deterministic_gradients(d):
    case = make([700, 300], [900, 300], h_q=8, h_kv=4, d=d)
    leaves = [x.requires_grad_() for x in case[:3]]
    out, _ = flash_attn_varlen_func(
        *leaves, *case.offsets, 700, 900, softmax_scale=case.scale, causal=True, deterministic=True
    )
    dout = torch.randn_like(out) / 10
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    for _ in range(5):
        again = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_gradients_through_the_packed_forms():
    qkv = normal(300, 4, 2 * 192 + D_V, torch.bfloat16, 0.1).requires_grad_()
    offsets = torch.tensor([0, 130, 300], dtype=torch.int32, device="cuda")
    out, _ = flash_attn_varlen_qkvpacked_func(qkv, offsets, 170, 192, causal=True)
    dout = torch.randn_like(out) / 10
    (got,) = torch.autograd.grad(out, qkv, dout)
    wide = qkv.detach().float().requires_grad_()
    want_out, _ = reference.mha_forward(*wide.split([192, 192, D_V], -1), offsets, offsets, None, causal=True)
    (want,) = torch.autograd.grad(want_out, wide, dout.float())
    assert_close("dqkv", got, want, atol=1e-3, rtol=8 / 128, cos=2e-5)


def test_a_captured_call_reads_the_offsets_of_its_replay():
    case = make([100, 100, 100], [100, 100, 100])
    cu_seqlens = case.offsets[0]

    dout = torch.randn(300, 2, D_V, dtype=torch.bfloat16, device="cuda") / 10
    problem = MHAProblem(case.q.device, case.q.dtype, 2, 1, 192, D_V, causal=True)

    def call():
        arguments = (*case[:3], cu_seqlens, cu_seqlens, 300, 300, case.scale)
        out, lse = hopper.mha_forward(problem, *arguments)
        _, dk, dv = hopper.mha_backward(problem, dout, None, *case[:3], out, lse, *arguments[3:])
        return out, lse, dk, dv

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for lengths in ((0, 1, 290, 300), (0, 0, 0, 300), (0, 128, 128, 300)):
        cu_seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        for x in captured:
            x.fill_(NAN)
        graph.replay()
        assert all(torch.equal(got, want) for got, want in zip(captured, call(), strict=True))
        want, _ = reference.mha_forward(case.q, case.k, case.v, cu_seqlens, cu_seqlens, None, causal=True)
        assert (captured[0].float() - want).norm() < 5e-3 * want.norm()


def test_calls_on_two_streams_at_once():
    cases = [make([2000], [2000], h_q=16, h_kv=16) for _ in range(2)]
    want = [case.run() for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(20):
        got = []
        for case, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(case.run())
        torch.cuda.synchronize()
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])


def test_elements_beyond_2_to_the_31():
    """The last of many tokens, each as wide as 128 heads, has the results that it has alone."""
    heads, tokens, tail, d = 128, 100_000, 200, 192
    assert (tokens - tail) * heads * d > 2**31
    leaves = [
        torch.randn(tokens, heads, x, dtype=torch.bfloat16, device="cuda", requires_grad=True) for x in (d, d, D_V)
    ]
    cu_seqlens = torch.arange(0, tokens + 1, tail, dtype=torch.int32, device="cuda")
    out, lse = flash_attn_varlen_func(*leaves, cu_seqlens, cu_seqlens, tail, tail, causal=True)
    alone = [x.detach()[-tail:].clone().requires_grad_() for x in leaves]
    want_out, want_lse = flash_attn_varlen_func(*alone, cu_seqlens[:2], cu_seqlens[:2], tail, tail, causal=True)
    assert torch.equal(out[-tail:], want_out)
    assert torch.equal(lse[-tail:], want_lse)
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, dout)
    want = torch.autograd.grad(want_out, alone, dout[-tail:])
    assert_close("dq", got[0][-tail:], want[0], atol=1e-6, rtol=1 / 64, cos=1e-6)
    assert torch.equal(got[1][-tail:], want[1])
    assert torch.equal(got[2][-tail:], want[2])
