"""Dense multi-head attention: values, gradients, memory and misuse, on the CPU backend against the fp32 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import pytest
import torch
from helpers import assert_close, one_key_leads_
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from flash_mla import reference
from flash_mla.backends.cpu import mha as cpu_mha
from flash_mla.mha import flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = ((192, 128), (128, 128))
INF = float("inf")


class Case(NamedTuple):
    """The arguments of one call: tensors in the dtype under test, and everything needed to repeat it."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_q: torch.Tensor
    cu_kv: torch.Tensor
    lengths_q: list[int]
    lengths_kv: list[int]
    magnitude: float

    def run(self, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return flash_attn_varlen_func(
            self.q, self.k, self.v, self.cu_q, self.cu_kv, max(self.lengths_q), max(self.lengths_kv), **kwargs
        )

    def blind(self, causal: bool) -> torch.Tensor:
        """[total_q] bool: the queries that see no key, told from the definition token by token."""
        return torch.tensor(
            [
                (s_kv - s_q + i + 1 if causal else s_kv) <= 0
                for s_q, s_kv in zip(self.lengths_q, self.lengths_kv, strict=True)
                for i in range(s_q)
            ],
            dtype=torch.bool,
        )


def cu_seqlens(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def make_case(
    lengths_q: list[int],
    lengths_kv: list[int],
    h_q: int = 2,
    h_kv: int = 1,
    dims: tuple[int, int] = (192, 128),
    dtype: torch.dtype = torch.bfloat16,
    magnitude: float = 1.0,
) -> Case:
    d_qk, d_v = dims
    total_q, total_kv = sum(lengths_q), sum(lengths_kv)
    q, k, v = (
        (torch.randn(shape) * magnitude).to(dtype)
        for shape in ((total_q, h_q, d_qk), (total_kv, h_kv, d_qk), (total_kv, h_kv, d_v))
    )
    return Case(q, k, v, cu_seqlens(lengths_q), cu_seqlens(lengths_kv), lengths_q, lengths_kv, magnitude)


def leaves(*tensors: torch.Tensor, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    return [x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in tensors]


def assert_forward(case: Case, out: torch.Tensor, lse: torch.Tensor, causal: bool, scale: float | None = None) -> None:
    want_out, want_lse = reference.mha_forward(case.q, case.k, case.v, case.cu_q, case.cu_kv, scale, causal)
    assert out.dtype == case.q.dtype
    assert lse.dtype == torch.float32
    assert_close("out", out, want_out, atol=8e-4, rtol=2 / 128, cos=7e-6)
    # An lse near 0 keeps the fp32 rounding of the products that cancelled in its scores, which their norms bound.
    norms = [float(x.float().norm(dim=-1).max()) if x.numel() else 0.0 for x in (case.q, case.k)]
    rounding = 2**-22 * (case.q.shape[-1] ** -0.5 if scale is None else scale) * norms[0] * norms[1]
    assert_close("lse", lse, want_lse, atol=max(1e-6, rounding), rtol=2 / 65536, cos=1e-7)
    blind = case.blind(causal)
    assert (out[blind] == 0).all()
    assert (lse[blind] == -INF).all()
    assert lse[~blind].isfinite().all()


def assert_gradients(case: Case, causal: bool, *, with_out: bool = True, with_lse: bool = True) -> None:
    """Gradients of a random linear function of out and lse (where finite), against autograd through the reference."""
    d_out = (torch.randn(*case.q.shape[:2], case.v.shape[2]) * case.magnitude).to(case.q.dtype)
    d_lse = torch.randn(case.q.shape[:2]) * case.magnitude**2
    seen = ~case.blind(causal)

    def loss(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        terms = [(out.float() * d_out.float()).sum()] if with_out else []
        terms += [(lse * d_lse)[seen].sum()] if with_lse else []
        return torch.stack(terms).sum()

    ours = leaves(case.q, case.k, case.v)
    loss(*case._replace(q=ours[0], k=ours[1], v=ours[2]).run(causal=causal)).backward()
    theirs = leaves(case.q, case.k, case.v, dtype=torch.float32)
    loss(*reference.mha_forward(*theirs, case.cu_q, case.cu_kv, causal=causal)).backward()
    for name, x, y in zip(("dq", "dk", "dv"), ours, theirs, strict=True):
        assert x.grad is not None
        assert x.grad.dtype == case.q.dtype
        want = torch.zeros_like(y) if y.grad is None else y.grad
        if case.magnitude <= 0.1:  # the size of inputs that clients apply these tolerances to
            assert_close(name, x.grad, want, atol=1e-3, rtol=8 / 128, cos=7e-6)
        # At that size 1e-3 exceeds most gradients by q and k. This bound scales with the inputs: dq ~ dout * v * k.
        assert x.grad.isfinite().all()
        error = (x.grad.float() - want).norm()
        assert error <= 0.02 * want.norm() + 1e-3 * case.magnitude**3 * want.numel() ** 0.5, f"{name}: off by {error}"


@contextmanager
def chunk_sizes(q: int, k: int, tile: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_mha, "Q_CHUNK", q)
        patch.setattr(cpu_mha, "K_CHUNK", k)
        patch.setattr(cpu_mha, "TILE_SCORES", tile)
        yield


def cases(*magnitudes: float) -> st.SearchStrategy[Case]:
    """Cases of up to 4 sequences, empty ones among them, with fresh random tensors of the given magnitudes."""
    length = st.sampled_from([0, 1, 2, 33, 64]) | st.integers(0, 90)

    def build(seed: int, pairs: list[tuple[int, int]], h_kv: int, group: int, *rest: Any) -> Case:
        torch.manual_seed(seed)
        lengths_q, lengths_kv = ([pair[side] for pair in pairs] for side in (0, 1))
        return make_case(lengths_q, lengths_kv, h_kv * group, h_kv, *rest)

    return st.builds(
        build,
        st.integers(0, 2**31),
        st.lists(st.tuples(length, length), min_size=1, max_size=4),
        st.sampled_from([1, 2, 3]),
        st.sampled_from([1, 2, 5]),
        st.sampled_from(HEAD_DIMS),
        st.sampled_from(DTYPES),
        st.sampled_from(magnitudes),
    )


# From one token up, so that chunk edges fall everywhere in short sequences too.
chunkings = st.tuples(st.sampled_from([1, 8, 256]), st.sampled_from([5, 16, 512]), st.sampled_from([1, 200, 1 << 20]))


@settings(max_examples=150, deadline=None)
@given(cases(0.1, 1.0), chunkings, st.booleans(), st.sampled_from([None, 0.02, 0.1]))
def test_forward_matches_reference(
    case: Case, chunking: tuple[int, int, int], causal: bool, softmax_scale: float | None
) -> None:
    with chunk_sizes(*chunking):
        out, lse = case.run(causal=causal, softmax_scale=softmax_scale)
    assert_forward(case, out, lse, causal, softmax_scale)
    assert out.is_contiguous()
    assert lse.T.is_contiguous()


@settings(max_examples=100, deadline=None)
@given(cases(0.1, 1.0), chunkings, st.booleans(), st.sampled_from(["out", "lse", "out and lse"]))
def test_gradients_match_reference(case: Case, chunking: tuple[int, int, int], causal: bool, loss_reads: str) -> None:
    with chunk_sizes(*chunking):
        assert_gradients(case, causal, with_out="out" in loss_reads, with_lse="lse" in loss_reads)


@pytest.mark.parametrize("side", [-1, 0, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_around_the_real_chunk_sizes(side: int, causal: bool) -> None:
    case = make_case([cpu_mha.Q_CHUNK + side, 2 * cpu_mha.Q_CHUNK], [cpu_mha.K_CHUNK + side, cpu_mha.K_CHUNK])
    assert_forward(case, *case.run(causal=causal), causal)
    assert_gradients(case, causal)


def test_more_query_heads_than_a_tile_has_rows() -> None:
    case = make_case([3, 2], [4, 6], h_q=2 * cpu_mha.Q_CHUNK, h_kv=2, dims=(128, 128))
    assert_forward(case, *case.run(causal=True), causal=True)


def test_causal_is_aligned_to_the_bottom_right() -> None:
    """With equal scores, query i averages the values it sees: told by hand, without the reference."""
    s_q, s_kv = 3, 5
    case = make_case([s_q], [s_kv], h_q=1, h_kv=1, dims=(128, 128))
    case.q.zero_()
    case.v.copy_(torch.arange(s_kv)[:, None, None])
    out, lse = case.run(causal=True)
    assert torch.equal(out[:, 0, 0].float(), torch.tensor([1.0, 1.5, 2.0]))
    torch.testing.assert_close(lse[:, 0], torch.tensor([3.0, 4.0, 5.0]).log())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_huge_logits_stay_finite(dtype: torch.dtype, causal: bool) -> None:
    case = make_case([40, 9], [40, 60], dtype=dtype, magnitude=1000.0)
    one_key_leads_(case.q, case.k)
    case.v.div_(1000)
    q, k, v = leaves(case.q, case.k, case.v)
    with chunk_sizes(8, 16, 1):
        out, lse = case._replace(q=q, k=k, v=v).run(causal=causal)
        assert_forward(case, out, lse, causal)
        (out.float().sum() + lse.sum()).backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert not x.grad.isnan().any()


def test_gradients_into_blind_rows_stop_there() -> None:
    """A loss that is NaN at queries without a key (lse is -inf there) must not spoil the gradients of the others."""
    case = make_case([6, 4, 3], [2, 0, 5])
    q, k, v = leaves(case.q, case.k, case.v)
    out, lse = case._replace(q=q, k=k, v=v).run(causal=True)
    blind = case.blind(causal=True)
    assert blind.sum() == 8
    d_out, d_lse = torch.ones_like(out), torch.ones_like(lse)
    d_out[blind], d_lse[blind] = float("nan"), float("nan")
    grads = torch.autograd.grad((out, lse), (q, k, v), (d_out, d_lse))
    assert not any(x.isnan().any() for x in grads)
    assert (grads[0][blind] == 0).all()
    assert (grads[0][~blind] != 0).any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("total_q", "total_kv"), [(0, 0), (0, 5), (5, 0)])
def test_nothing_on_one_side(total_q: int, total_kv: int, causal: bool) -> None:
    case = make_case([total_q], [total_kv])
    q, k, v = leaves(case.q, case.k, case.v)
    out, lse = case._replace(q=q, k=k, v=v).run(causal=causal)
    assert_forward(case, out, lse, causal)
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert (x.grad == 0).all()


def test_non_contiguous_inputs_and_output_gradients() -> None:
    case = make_case([5, 20], [30, 11], h_q=4, h_kv=2)
    d_out = torch.randn(25, 4, 128, dtype=case.q.dtype)

    def apart(x: torch.Tensor) -> torch.Tensor:
        """The same values, strided apart in every dimension but the last."""
        wide = torch.full((2 * x.shape[0], 3 * x.shape[1], x.shape[2] + 8), float("nan"), dtype=x.dtype)
        view = wide[::2, 1::3, : x.shape[2]]
        view.copy_(x)
        return view

    def grads(case: Case, d_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
        out, lse = case._replace(q=inputs[0], k=inputs[1], v=inputs[2]).run(causal=True)
        return out, lse, *torch.autograd.grad(out, inputs, d_out)

    strided = case._replace(q=apart(case.q), k=apart(case.k), v=apart(case.v))
    assert not strided.q.is_contiguous()
    plain = grads(case, d_out)
    for d in (apart(d_out), d_out.mT.contiguous().mT):
        for got, want in zip(grads(strided, d), plain, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_results_repeat_bit_for_bit() -> None:
    case = make_case([70, 300], [90, 600], h_q=4, h_kv=2)
    q, k, v = leaves(case.q, case.k, case.v)

    def everything() -> tuple[torch.Tensor, ...]:
        out, lse = case._replace(q=q, k=k, v=v).run(causal=True, deterministic=True)
        return out, lse, *torch.autograd.grad(out.float().square().sum() + lse.sum(), (q, k, v))

    first = everything()
    for _ in range(2):
        assert all(torch.equal(x, y) for x, y in zip(everything(), first, strict=True))


@pytest.mark.parametrize("dims", HEAD_DIMS)
def test_packed_forms_equal_unpacked(dims: tuple[int, int]) -> None:
    case = make_case([5, 0, 20], [5, 0, 20], h_q=3, h_kv=3, dims=dims)
    options: dict[str, Any] = {"softmax_scale": 0.3, "causal": True, "deterministic": True}
    q, k, v = leaves(case.q, case.k, case.v)
    want = case._replace(q=q, k=k, v=v).run(**options)
    want_grads = torch.autograd.grad(want[0].float().square().sum(), (q, k, v))

    (qkv,) = leaves(torch.cat([case.q, case.k, case.v], -1))
    got = flash_attn_varlen_qkvpacked_func(qkv, case.cu_q, 20, dims[0], **options)
    (grad,) = torch.autograd.grad(got[0].float().square().sum(), qkv)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert torch.equal(grad, torch.cat(want_grads, -1))

    (kv,) = leaves(torch.cat([case.k, case.v], -1))
    got = flash_attn_varlen_kvpacked_func(q, kv, case.cu_q, case.cu_kv, 20, 20, dims[0], **options)
    grad_q, grad_kv = torch.autograd.grad(got[0].float().square().sum(), (q, kv))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert torch.equal(grad_q, want_grads[0])
    assert torch.equal(grad_kv, torch.cat(want_grads[1:], -1))


def test_equal_lengths_without_varlen() -> None:
    case = make_case([7] * 3, [11] * 3)
    for got, want in zip(case.run(is_varlen=False, causal=True), case.run(causal=True), strict=True):
        assert torch.equal(got, want)


def test_no_graph_when_no_input_requires_grad() -> None:
    case = make_case([7], [11])
    out, lse = case.run()
    assert not out.requires_grad
    assert not lse.requires_grad
    with torch.no_grad():
        out, _ = case._replace(q=case.q.clone().requires_grad_()).run()
    assert out.grad_fn is None


def test_gradient_of_one_input_alone() -> None:
    case = make_case([7], [11])
    v = case.v.clone().requires_grad_()
    case._replace(v=v).run()[0].sum().backward()
    assert v.grad is not None
    # Each query hands its whole weight of 1 to the values: over keys, the gradients of out.sum() add up to h_q * s_q.
    torch.testing.assert_close(v.grad.float().sum(0), torch.full((1, 128), 14.0), rtol=1e-2, atol=0)


class Watch(TorchDispatchMode):
    """Counts matrix products and remembers the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += "bmm" in str(func)
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return result


@pytest.mark.parametrize(
    ("s_q", "s_kv", "h_q", "h_kv"), [(2048, 2048, 1, 1), (2, 65536, 64, 1), (300, 1200, 16, 16), (8192, 600, 2, 1)]
)
def test_memory_is_bounded_by_the_tile(s_q: int, s_kv: int, h_q: int, h_kv: int) -> None:
    case = make_case([s_q], [s_kv], h_q, h_kv)
    q, k, v = leaves(case.q, case.k, case.v)
    with chunk_sizes(128, 256, 1 << 16), Watch() as watch:
        out, lse = case._replace(q=q, k=k, v=v).run(causal=True)
        (out.float().sum() + lse.clamp(min=0).sum()).backward()
    bound = max(1 << 16, q.numel(), k.numel())
    assert s_q * s_kv * h_q > bound or h_q == 64
    assert 0 < watch.largest <= bound


def test_chunks_hidden_by_the_causal_mask_are_skipped() -> None:
    case = make_case([64], [64], h_q=1, h_kv=1)

    def products(causal: bool) -> int:
        with chunk_sizes(16, 16, 1), Watch() as watch:
            case.run(causal=causal)
        return watch.products

    assert products(causal=False) == 2 * 16
    assert products(causal=True) == 2 * (1 + 2 + 3 + 4)


GOOD = make_case([3, 4], [5, 6], h_q=4, h_kv=2)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"q": None}, TypeError, "q: got NoneType"),
        ({"q": GOOD.q.float()}, TypeError, "q: got dtype float32, need bfloat16 or float16"),
        ({"q": GOOD.q[0]}, ValueError, "q: got shape"),
        ({"q": GOOD.q.mT.contiguous().mT}, ValueError, "q: got stride 4 in the last dimension"),
        ({"q": GOOD.q[:, :3]}, ValueError, "q: got h_q=3, need a positive multiple of k's h_kv=2"),
        ({"q": GOOD.q[:, :0]}, ValueError, "q: got h_q=0"),
        ({"k": GOOD.k.half()}, TypeError, "k: got dtype float16, need bfloat16"),
        ({"k": GOOD.k[..., :128]}, ValueError, r"k: got shape .* need \[total_kv, h_kv, d_qk=192\]"),
        ({"k": GOOD.k.to("meta")}, ValueError, "k: got a tensor on meta"),
        ({"k": GOOD.k[:, :0], "v": GOOD.v[:, :0]}, ValueError, "h_kv=0"),
        ({"v": [1.0]}, TypeError, "v: got list"),
        ({"v": GOOD.v[:, :1]}, ValueError, "v: got shape .* need .* h_kv=2"),
        ({"v": GOOD.v[:-1]}, ValueError, r"v: got shape .* \[total_kv=11, h_kv=2, d_v\]"),
        ({"v": GOOD.v[..., :64]}, ValueError, "got head dims d_qk=192 with d_v=64"),
        ({"q": GOOD.q[..., :64], "k": GOOD.k[..., :64]}, ValueError, "got head dims d_qk=64 with d_v=128"),
        ({"cu_seqlens_qo": [0, 3, 7]}, TypeError, "cu_seqlens_qo: got list"),
        ({"cu_seqlens_qo": GOOD.cu_q.long()}, TypeError, "cu_seqlens_qo: got dtype int64, need int32"),
        ({"cu_seqlens_qo": GOOD.cu_q[None]}, ValueError, "cu_seqlens_qo: got shape"),
        ({"cu_seqlens_qo": GOOD.cu_q[:1]}, ValueError, "cu_seqlens_qo: .* b >= 1"),
        ({"cu_seqlens_kv": GOOD.cu_kv[:2]}, ValueError, r"cu_seqlens_kv: .* \[b\+1=3\]"),
        ({"cu_seqlens_kv": GOOD.cu_kv.to("meta")}, ValueError, "cu_seqlens_kv: got a tensor on meta"),
        ({"cu_seqlens_qo": cu_seqlens([3, 5])}, ValueError, "cu_seqlens_qo: .* from 0 to 8, need .* to 7"),
        ({"cu_seqlens_kv": cu_seqlens([5, 5])}, ValueError, "cu_seqlens_kv: .* from 0 to 10, need .* to 11"),
        ({"cu_seqlens_kv": cu_seqlens([5, 6]) + 1}, ValueError, "cu_seqlens_kv: .* from 1 to 12"),
        ({"cu_seqlens_qo": cu_seqlens([9, -2]), "max_seqlen_qo": 9}, ValueError, "cu_seqlens_qo: got 9 then 7"),
        ({"max_seqlen_qo": 3}, ValueError, "max_seqlen_qo: got 3, need at least 4"),
        ({"cu_seqlens_kv": cu_seqlens([2, 9])}, ValueError, "max_seqlen_kv: got 6, need at least 9"),
        ({"max_seqlen_kv": 5}, ValueError, "max_seqlen_kv: got 5, need at least 6: 2 sequences hold 11 tokens"),
        ({"max_seqlen_kv": -1}, ValueError, "max_seqlen_kv: got -1"),
        ({"max_seqlen_qo": 4.0}, TypeError, "max_seqlen_qo: got float, need an int"),
        ({"max_seqlen_qo": True}, TypeError, "max_seqlen_qo: got bool, need an int"),
        ({"is_varlen": False}, ValueError, "max_seqlen_qo: got 4, need 7 tokens / 2 sequences"),
        ({"is_varlen": None}, TypeError, "is_varlen: got NoneType, need a bool"),
        ({"causal": (-1, 0)}, TypeError, "causal: got tuple, need a bool"),
        ({"deterministic": 0.0}, TypeError, "deterministic: got float, need a bool"),
        ({"dropout_p": 0.1}, ValueError, "dropout_p: got 0.1, need 0.0"),
        ({"dropout_p": None}, TypeError, "dropout_p: got NoneType"),
        ({"softmax_scale": "1"}, TypeError, "softmax_scale: got str"),
        ({"softmax_scale": INF}, ValueError, "softmax_scale: got inf"),
    ],
)
def test_misuse_names_the_argument(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": GOOD.q,
        "k": GOOD.k,
        "v": GOOD.v,
        "cu_seqlens_qo": GOOD.cu_q,
        "cu_seqlens_kv": GOOD.cu_kv,
        "max_seqlen_qo": 4,
        "max_seqlen_kv": 6,
    }
    with pytest.raises(error, match=message):
        flash_attn_varlen_func(**arguments | wrong)


@pytest.mark.parametrize(
    ("packed", "head_dim_qk", "error", "message"),
    [
        (None, 192, TypeError, "{name}: got NoneType"),
        (torch.zeros(7, 2, 512), 192, TypeError, "{name}: got dtype float32"),
        (torch.zeros(7, 512).half(), 192, ValueError, "{name}: got shape"),
        (torch.zeros(7, 2, 500).half(), 192, ValueError, "{name}: got shape .* need .* for d_qk=192"),
        (torch.zeros(7, 2, 512).half(), 64, ValueError, "head_dim_qk: got 64, need 192 or 128"),
        (torch.zeros(7, 2, 512).half(), 192.0, TypeError, "head_dim_qk: got float"),
    ],
)
def test_misuse_of_packed_forms(packed: Any, head_dim_qk: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.format(name="qkv")):
        flash_attn_varlen_qkvpacked_func(packed, GOOD.cu_q, 4, head_dim_qk)
    with pytest.raises(error, match=message.format(name="kv")):
        flash_attn_varlen_kvpacked_func(GOOD.q, packed, GOOD.cu_q, GOOD.cu_kv, 4, 6, head_dim_qk)


def test_errors_of_packed_forms_name_their_own_arguments() -> None:
    qkv, kv = torch.zeros(7, 2, 512).half(), torch.zeros(9, 3, 320).half()
    with pytest.raises(TypeError, match=r"^cu_seqlens: got dtype int64"):
        flash_attn_varlen_qkvpacked_func(qkv, torch.tensor([0, 7]), 7, 192)
    with pytest.raises(ValueError, match=r"^max_seqlen: got 6, need at least 7"):
        flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens([7]), 6, 192)
    with pytest.raises(ValueError, match=r"^cu_seqlens: got offsets from 0 to 6"):
        flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens([6]), 7, 192)
    q = torch.zeros(7, 2, 192)
    with pytest.raises(TypeError, match=r"^kv: got dtype float16, need bfloat16"):
        flash_attn_varlen_kvpacked_func(q.bfloat16(), kv, cu_seqlens([7]), cu_seqlens([9]), 7, 9, 192)
    with pytest.raises(ValueError, match=r"^q: got h_q=2, need a positive multiple of kv's h_kv=3"):
        flash_attn_varlen_kvpacked_func(q.half(), kv, cu_seqlens([7]), cu_seqlens([9]), 7, 9, 192)


def test_second_derivatives_are_refused() -> None:
    case = make_case([3], [4])
    q = case.q.clone().requires_grad_()
    (grad,) = torch.autograd.grad(case._replace(q=q).run()[0].float().square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.float().sum().backward()


def test_forward_mode_derivatives_are_refused() -> None:
    q, k, v = (torch.randn(4, 1, d).bfloat16() for d in (192, 192, 128))
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="forward mode"):
            flash_attn_varlen_func(dual, k, v, offsets, offsets, 4, 4)
