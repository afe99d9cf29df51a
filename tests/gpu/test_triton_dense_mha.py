"""What only a GPU shows of Triton's dense multi-head attention: graphs, and offsets beyond 32 bits.

tests/test_triton_mha.py runs there too, and compares values.
"""

import pytest
import torch

pytest.importorskip("triton")

from flash_mla import reference
from flash_mla.backends.triton import mha
from flash_mla.problem import MHAProblem

pytestmark = pytest.mark.gpu

H, D_QK, D_V = 2, 192, 128
SCALE = D_QK**-0.5


def problem(h: int = H, causal: bool = True) -> MHAProblem:
    return MHAProblem(torch.device("cuda", 0), torch.bfloat16, h, h, D_QK, D_V, causal)


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def normal(tokens: int, heads: int, d: int) -> torch.Tensor:
    return torch.randn(tokens, heads, d, dtype=torch.bfloat16, device="cuda") / 10


def test_a_captured_call_reads_the_offsets_of_its_replay():
    q, k, v, dout = (normal(300, H, d) for d in (D_QK, D_QK, D_V, D_V))
    cu_seqlens = offsets(0, 100, 200, 300)

    def call() -> tuple[torch.Tensor, ...]:
        sequences = (cu_seqlens, cu_seqlens, 300, 300, SCALE)
        out, lse = mha.mha_forward(problem(), q, k, v, *sequences)
        return out, lse, *mha.mha_backward(problem(), dout, None, q, k, v, out, lse, *sequences)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for lengths in ((0, 1, 290, 300), (0, 0, 0, 300)):
        cu_seqlens.copy_(offsets(*lengths))
        for x in captured:
            x.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(got, want) for got, want in zip(captured, call(), strict=True))
        want, _ = reference.mha_forward(q, k, v, cu_seqlens, cu_seqlens, SCALE, causal=True)
        assert (captured[0].float() - want).norm() < 5e-3 * want.norm()


def test_elements_beyond_2_to_the_31():
    """The last of many tokens, each as wide as 128 heads, has the results that it has alone."""
    heads, tokens, tail = 128, 100_000, 200
    assert (tokens - tail) * heads * D_QK > 2**31
    q, k, v, dout = (normal(tokens, heads, d) for d in (D_QK, D_QK, D_V, D_V))
    # Short sequences keep it quick.
    cu_seqlens = torch.arange(0, tokens + 1, tail, dtype=torch.int32, device="cuda")

    def call(q, k, v, dout, cu_seqlens):
        sequences = (cu_seqlens, cu_seqlens, tail, tail, SCALE)
        out, lse = mha.mha_forward(problem(heads), q, k, v, *sequences)
        return out, lse, *mha.mha_backward(problem(heads), dout, None, q, k, v, out, lse, *sequences)

    everything = call(q, k, v, dout, cu_seqlens)
    alone = call(*(x[-tail:].contiguous() for x in (q, k, v, dout)), offsets(0, tail))
    assert all(torch.equal(got[-tail:], want) for got, want in zip(everything, alone, strict=True))
