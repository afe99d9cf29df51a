"""Sparse prefill as an operator: what torch.compile and opcheck see of it."""

from __future__ import annotations

import math
import random
import re

import pytest
import torch
from compilation import BACKENDS, compiled
from helpers import poisoned_out
from test_sparse_prefill import inputs
from torch._dynamo.testing import CompileCounterWithBackend

from flash_mla import flash_mla_sparse_fwd

SINK = torch.tensor([-math.inf, 0.0, 1.5, math.inf])
OPTIONS = [{}, {"attn_sink": SINK}, {"attn_sink": SINK, "lengths": True}]


def arguments(s_q: int = 3, *, lengths: bool = False, **more) -> dict:
    """Fresh numbers; `lengths` has the entries beyond topk_length name rows of NaN."""
    topk_length = random.choices(range(21), k=s_q) if lengths else None
    return inputs(random.randrange(2**32), s_q=s_q, lengths=topk_length) | more


def attend(q: torch.Tensor, out: torch.Tensor | None, args: dict) -> tuple[torch.Tensor, ...]:
    """Sparse prefill between pointwise work, which compilation may fuse and lay out anew."""
    out, max_logits, lse = flash_mla_sparse_fwd(q * 2, out=out, **args)
    return out - 1, max_logits * 2, lse * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_compiles_without_a_graph_break_to_the_same_bits(backend, dynamic, options):
    function = compiled(attend, backend, dynamic=dynamic)
    for _ in range(2):
        args = arguments(**options)
        q = args.pop("q")
        for got, want in zip(function(q, None, args), attend(q, None, args), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_code_writes_into_out(backend, strided, dynamic):
    function = compiled(flash_mla_sparse_fwd, backend, dynamic=dynamic)
    args = arguments()
    out = poisoned_out(3, 4, 512, dtype=torch.bfloat16, strided=strided)
    around = out._base.clone() if strided else out
    got = function(**args, out=out)
    assert got[0] is out
    for one, want in zip(got, flash_mla_sparse_fwd(**args), strict=True):
        assert torch.equal(one, want)
    if strided:
        around[1:, 1:, 8:] = out
        assert torch.equal(out._base.view(torch.int16), around.view(torch.int16))


def test_one_dynamic_graph_serves_all_sizes():
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(attend, counter, dynamic=True)
    frames = []
    for s_q, s_kv, topk in ((3, 50, 20), (2, 40, 7), (9, 90, 64)):
        args = inputs(random.randrange(2**32), s_q=s_q, s_kv=s_kv, topk=topk)
        q = args.pop("q")
        for got, want in zip(function(q, None, args), attend(q, None, args), strict=True):
            assert torch.equal(got, want)
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3


def test_no_query_tokens_compile():
    out, max_logits, lse = compiled(flash_mla_sparse_fwd)(**arguments(s_q=0))
    assert out.shape == (0, 4, 512)
    assert max_logits.shape == lse.shape == (0, 4)


@pytest.mark.parametrize("backend", ["eager", *BACKENDS])
def test_compiled_code_records_no_gradients(backend):
    args = arguments()
    q = args.pop("q").requires_grad_()
    got = compiled(attend, backend)(q, None, args)
    assert not any(result.requires_grad for result in got)
    for one, want in zip(got, attend(q.detach(), None, args), strict=True):
        assert torch.equal(one, want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kv": torch.zeros(50, 1, 576)}, TypeError, "kv: got dtype float32, need bfloat16"),
        ({"sm_scale": math.inf}, ValueError, "sm_scale: got inf"),
        ({"d_v": 128}, ValueError, "d_v: got 128, need 512"),
        ({"attn_sink": torch.zeros(5)}, ValueError, "attn_sink: got shape [5], need [h_q=4]"),
        ({"out": torch.zeros(512).bfloat16().expand(3, 4, 512)}, ValueError, "out: got strides [0, 0, 1]"),
    ],
)
def test_misuse_in_compiled_code_is_told_as_elsewhere(change, error, message):
    function = torch.compile(flash_mla_sparse_fwd, backend="eager")
    with pytest.raises(error, match=re.escape(message)):
        function(**arguments() | change)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("strided", [False, True])
def test_operator_passes_opcheck(options, strided):
    args = arguments(**options)
    args["q"].requires_grad_()
    out = poisoned_out(3, 4, 512, dtype=torch.bfloat16, strided=strided)
    torch.library.opcheck(
        torch.ops.flash_mla.sparse_prefill.default,
        (args["q"], args["kv"], args["indices"], 0.1, args.get("attn_sink"), args.get("topk_length"), out),
    )
