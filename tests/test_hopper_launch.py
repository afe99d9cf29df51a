"""What the Hopper backend hands to its kernels: CPU tensors and recording kernels stand in for a GPU's."""

import types

import pytest
import torch

from flash_mla import KVCacheFormat, kernels
from flash_mla.backends.hopper import dense_decode_launch, sparse_decode_launch, sparse_prefill_launch
from flash_mla.backends.hopper.dense_decode_heuristics import BLOCK
from flash_mla.backends.hopper.launch import LOG2_E
from flash_mla.backends.hopper.variants import VARIANTS
from flash_mla.problem import DecodeInputs, DecodeProblem, SparsePrefillInputs, SparsePrefillProblem

CPU = torch.device("cpu")


@pytest.fixture
def launched(monkeypatch):
    """(kernel, arguments) of each launch."""
    log: list[tuple[str, tuple]] = []
    h200 = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of the CPU
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
    monkeypatch.setattr(kernels, "load", lambda name: lambda *arguments: log.append((name, arguments)))
    caches = [dense_decode_launch._dense_decode, sparse_decode_launch._sparse_decode, sparse_prefill_launch._call]
    for cache in caches:
        cache.cache_clear()
    yield log
    for cache in caches:
        cache.cache_clear()


def dense(h_q, *, scale=0.1, dtype=torch.bfloat16, d=576, page_size=64, out=None, q=None, k_cache=None):
    kv_format = KVCacheFormat.BF16 if dtype == torch.bfloat16 else KVCacheFormat.FP16
    problem = DecodeProblem(CPU, dtype, 4, 2, h_q, 1, d, 512, kv_format, page_size)
    q = torch.ones(4, 2, h_q, d, dtype=dtype) if q is None else q
    k_cache = torch.zeros(8, page_size, 1, d, dtype=dtype) if k_cache is None else k_cache
    table, seqlens = torch.zeros(4, 2, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    inputs = DecodeInputs(q, k_cache, table, seqlens, None, None, None, None, None, None, out, scale)
    plan = dense_decode_launch.plan_decode(problem, inputs)
    return dense_decode_launch.decode(problem, inputs, plan.work, plan.splits)


def sparse(h_q, *, scale=0.1, k_cache=None):
    problem = DecodeProblem(CPU, torch.bfloat16, 4, 2, h_q, 1, 576, 512, KVCacheFormat.FP8_V32, 64, topk=100)
    q = torch.ones(4, 2, h_q, 576, dtype=torch.bfloat16)
    k_cache = torch.zeros(8, 64, 1, 656, dtype=torch.uint8) if k_cache is None else k_cache
    indices = torch.zeros(4, 2, 100, dtype=torch.int32)
    inputs = DecodeInputs(q, k_cache, None, None, indices, None, None, None, None, None, None, scale)
    plan = sparse_decode_launch.plan_decode(problem, inputs)
    return sparse_decode_launch.decode(problem, inputs, plan.work, plan.splits)


def prefill(h_q, *, scale=0.1):
    problem = SparsePrefillProblem(CPU, torch.bfloat16, 10, 50, h_q, 576, 512, 100)
    q, kv = torch.ones(10, h_q, 576, dtype=torch.bfloat16), torch.zeros(50, 1, 576, dtype=torch.bfloat16)
    indices = torch.zeros(10, 1, 100, dtype=torch.int32)
    return sparse_prefill_launch.sparse_prefill(problem, SparsePrefillInputs(q, kv, indices, scale))


MODES = pytest.mark.parametrize("run", [dense, sparse, prefill])


@MODES
@pytest.mark.parametrize("h_q", [1, 16, 64, 96, 128])
def test_only_kernels_that_are_compiled_are_launched(launched, run, h_q):
    run(h_q)
    assert launched
    assert {name for name, _ in launched} <= VARIANTS.keys()


@pytest.mark.parametrize(("page_size", "box"), [(8, 8), (16, 8), (72, 8), (64, 64), (192, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [576, 512])
@pytest.mark.parametrize("h_q", [1, 20, 128])
def test_dense_kernels_load_boxes_that_pages_consist_of(launched, h_q, d, dtype, page_size, box):
    dense(h_q, dtype=dtype, d=d, page_size=page_size)
    variant = VARIANTS[launched[-1][0]]
    assert variant.config.get("box", BLOCK) == box, "those for few rows load whole blocks"
    assert variant.config["d"] == d
    assert variant.config["dtype"] == {torch.bfloat16: "BFloat16", torch.float16: "Float16"}[dtype]


@MODES
@pytest.mark.parametrize(("scale", "sign"), [(0.25, 1.0), (-0.25, -1.0), (0.0, 1.0)])
def test_kernels_get_a_scale_above_zero_for_the_same_scores(launched, run, scale, sign):
    run(64, scale=scale)
    _, arguments = launched[-1]
    (passed,) = [value for value in arguments if isinstance(value, float)]
    assert passed > 0.0
    assert passed == pytest.approx(abs(scale) * LOG2_E, abs=1e-20)
    assert arguments[0].unique().tolist() == [sign], "q"


@MODES
def test_outputs_have_the_shapes_of_the_contract(launched, run):
    out, *others = run(16)
    assert out.shape == ((10, 16, 512) if run is prefill else (4, 2, 16, 512))
    assert out.dtype == torch.bfloat16
    assert {other.dtype for other in others} == {torch.float32}
    assert {tuple(other.shape) for other in others} == {(10, 16) if run is prefill else (4, 16, 2)}


def test_misaligned_rows_of_q_are_copied_and_those_of_out_written_behind(launched):
    q = torch.ones(4, 2, 16, 579, dtype=torch.float16)[..., 3:]
    out = torch.full((4, 2, 16, 515), torch.nan, dtype=torch.float16)[..., 1:513]
    got, _ = dense(16, dtype=torch.float16, q=q, out=out)
    assert got is out
    _, arguments = launched[-1]
    halves = [value for value in arguments if isinstance(value, torch.Tensor) and value.dtype == torch.float16]
    assert all(value.data_ptr() % 16 == 0 for value in halves)
    assert all(stride % 8 == 0 for value in halves for stride in value.stride()[:-1])


@pytest.mark.parametrize(
    "k_cache",
    [
        torch.zeros(8, 64, 1, 577, dtype=torch.bfloat16)[..., :576],
        torch.zeros(1, 64, 1, 576, dtype=torch.bfloat16).expand(8, -1, -1, -1),
    ],
)
def test_a_cache_that_tma_cannot_read_is_refused(launched, k_cache):
    with pytest.raises(ValueError, match=r"k_cache: got strides .* multiples of 16 bytes"):
        dense(16, k_cache=k_cache)


def test_pages_that_copies_cannot_read_are_refused(launched):
    apart = torch.zeros(8 * 64 * 656 + 8 * 8, dtype=torch.uint8)
    k_cache = apart.as_strided((8, 64, 1, 656), (64 * 656 + 8, 656, 656, 1))
    with pytest.raises(ValueError, match=r"k_cache: got a page stride of 41992 bytes .* multiples of 16 bytes"):
        sparse(16, k_cache=k_cache)
