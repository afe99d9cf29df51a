"""What the Hopper backend hands to its kernels: CPU tensors and recording kernels stand in for a GPU's."""

import dataclasses
import itertools
import types

import pytest
import torch

from flash_mla import KVCacheFormat, kernels
from flash_mla.backends import hopper, triton
from flash_mla.backends.hopper import dense_decode_launch, mha_launch, sparse_decode_launch, sparse_prefill_launch
from flash_mla.backends.hopper.dense_decode_heuristics import BLOCK
from flash_mla.backends.hopper.launch import LOG2_E, DecodeCall
from flash_mla.backends.hopper.mha_launch import FEW_QUERIES
from flash_mla.backends.hopper.sparse_prefill_heuristics import sparse_prefill_config
from flash_mla.backends.hopper.variants import VARIANTS
from flash_mla.decode_ops import Flags, problem_of
from flash_mla.problem import (
    DecodeInputs,
    DecodeProblem,
    Mendable,
    MHAProblem,
    SparsePrefillInputs,
    SparsePrefillProblem,
)

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


def sparse_plain(h_q, *, k_cache):
    problem = DecodeProblem(CPU, torch.bfloat16, 4, 2, h_q, 1, 576, 512, KVCacheFormat.BF16, 64, topk=100)
    q, indices = torch.ones(4, 2, h_q, 576, dtype=torch.bfloat16), torch.zeros(4, 2, 100, dtype=torch.int32)
    inputs = DecodeInputs(q, k_cache, None, None, indices, None, None, None, None, None, None, 0.1)
    plan = sparse_decode_launch.plan_decode(problem, inputs)
    return sparse_decode_launch.decode(problem, inputs, plan.work, plan.splits)


def dense_fp8(h_q, *, scale=0.1, causal=True):
    problem = DecodeProblem(CPU, torch.bfloat16, 4, 2, h_q, 1, 576, 512, KVCacheFormat.FP8_V32, 16, causal=causal)
    q = torch.ones(4, 2, h_q, 576, dtype=torch.bfloat16)
    k_cache = torch.zeros(8, 16, 1, 656, dtype=torch.uint8)
    table, seqlens = torch.arange(12, dtype=torch.int32).view(4, 3), torch.tensor([0, 1, 48, 17], dtype=torch.int32)
    inputs = DecodeInputs(q, k_cache, table, seqlens, None, None, None, None, None, None, None, scale)
    plan = hopper.plan_decode(problem, inputs)
    return hopper.decode(problem, inputs, plan.work, plan.splits)


def prefill(h_q, *, scale=0.1):
    problem = SparsePrefillProblem(CPU, torch.bfloat16, 10, 50, h_q, 576, 512, 100)
    q, kv = torch.ones(10, h_q, 576, dtype=torch.bfloat16), torch.zeros(50, 1, 576, dtype=torch.bfloat16)
    indices = torch.zeros(10, 1, 100, dtype=torch.int32)
    return sparse_prefill_launch.sparse_prefill(problem, SparsePrefillInputs(q, kv, indices, scale))


MODES = pytest.mark.parametrize("run", [dense, dense_fp8, sparse, prefill])


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


@pytest.mark.parametrize("causal", [False, True])
def test_to_kernels_of_sparse_decode_a_block_table_is_indices_that_name_pages(launched, causal):
    dense_fp8(16, causal=causal)
    (_, planned), (name, arguments) = launched
    assert name == "sparse_decode_bf16_fp8_v32_heads16"
    assert planned[0].tolist() == [0, 1, 48, 17], "the lengths of the plan"
    table, lengths = arguments[2:4]
    assert table.tolist() == [[[3 * i, 3 * i + 1, 3 * i + 2]] * 2 for i in range(4)], "the same for each query token"
    assert lengths.tolist() == [0, 1, 48, 17]
    page_size, _, run, passed, *_ = [value for value in arguments if isinstance(value, int)]
    assert (page_size, run, passed) == (16, 16, causal)


def test_an_index_of_sparse_decode_names_one_token(launched):
    sparse(16)
    _, arguments = launched[-1]
    page_size, _, run, causal, *_ = [value for value in arguments if isinstance(value, int)]
    assert (page_size, run, causal) == (64, 1, 0)


def sparse_problem(kv_format, extra_format, dtype, h_q, d, *, b=4, topk=100):
    return DecodeProblem(
        CPU, dtype, b, 2, h_q, 1, d, 512, kv_format, 64, topk=topk, extra_format=extra_format, extra_topk=50
    )


def kinds():
    """(format, extra format, dtype of q, d) of sparse decode's kernels."""
    for kv_format in KVCacheFormat:
        if kv_format == KVCacheFormat.FP4_V41:
            continue
        extras = [None, kv_format] + [KVCacheFormat.FP4_V41] * (kv_format == KVCacheFormat.FP8_V41)
        dtypes = [torch.bfloat16, torch.float16] if kv_format.is_quantised else [kv_format.dtype]
        yield from ((kv_format, *kind) for kind in itertools.product(extras, dtypes, kv_format.head_dims))


@pytest.mark.parametrize(("kv_format", "extra_format", "dtype", "d"), list(kinds()))
def test_there_is_a_kernel_for_every_format(monkeypatch, kv_format, extra_format, dtype, d):
    monkeypatch.setattr(kernels, "unavailable", lambda name: None if name in VARIANTS else f"no {name}")
    monkeypatch.setattr(sparse_decode_launch, "num_sms", lambda device: 132)
    used = set()
    for h_q, (b, topk) in itertools.product((1, 16, 32, 64, 65, 128, 300), ((4, 100), (128, 2048))):
        problem = sparse_problem(kv_format, extra_format, dtype, h_q, d, b=b, topk=topk)
        assert sparse_decode_launch.why_not(problem) is None
        used.add(sparse_decode_launch.sparse_decode_kernel(problem))
    for name in used:
        config = VARIANTS[name].config
        assert config.get("dtype", "BFloat16") == {torch.bfloat16: "BFloat16", torch.float16: "Float16"}[dtype]
        assert config.get("d", d) == d
        assert ("extra_format" in config) == (extra_format not in (None, kv_format))
    if not kv_format.is_quantised:
        assert {VARIANTS[name].config["compute_bound"] for name in used} == {False, True}
    clusters = {VARIANTS[name].config.get("cluster", 1) for name in used}
    shared = kv_format.is_quantised and kv_format is not KVCacheFormat.NVFP4 and dtype == torch.bfloat16
    assert clusters == ({1, 2} if shared else {1})


@pytest.mark.parametrize("kv_format", [KVCacheFormat.BF16, KVCacheFormat.FP8_V32, KVCacheFormat.FP8_V4])
@pytest.mark.parametrize("topk", [100, 2048, None])
@pytest.mark.parametrize("h_q", [8, 64, 128])
def test_how_many_requests_there_are_chooses_no_batch_invariant_kernel(monkeypatch, kv_format, topk, h_q):
    monkeypatch.setattr(sparse_decode_launch, "num_sms", lambda device: 132)
    used = {
        sparse_decode_launch.sparse_decode_kernel(
            DecodeProblem(
                CPU, torch.bfloat16, b, 2, h_q, 1, kv_format.head_dims[0], 512, kv_format, 1, topk=topk,
                batch_invariant=True,
            )
        )
        for b in (1, 2, 66, 132, 500)
    }  # fmt: skip
    assert len(used) == 1


@pytest.mark.parametrize(
    ("kv_format", "extra_format"),
    [
        (KVCacheFormat.FP8_V4, KVCacheFormat.FP8_V41),
        (KVCacheFormat.FP8_V41, KVCacheFormat.FP8_V4),
        (KVCacheFormat.BF16, KVCacheFormat.FP8_V4),
    ],
)
def test_two_formats_that_no_kernel_reads_are_named(kv_format, extra_format):
    problem = sparse_problem(kv_format, extra_format, torch.bfloat16, 64, 512)
    reason = sparse_decode_launch.why_not(problem)
    assert reason == f"no Hopper kernel for {extra_format.name} beside {kv_format.name} yet"


@pytest.mark.parametrize("name", ["k_cache", "extra_k_cache"])
def test_rows_of_a_plain_cache_that_copies_cannot_read_are_refused(launched, name):
    problem = sparse_problem(KVCacheFormat.BF16, KVCacheFormat.BF16, torch.bfloat16, 16, 576)
    problem = dataclasses.replace(problem, extra_page_size=64)
    caches = {key: torch.zeros(8, 64, 1, 576, dtype=torch.bfloat16) for key in ("k_cache", "extra_k_cache")}
    caches[name] = torch.zeros(8, 64, 1, 577, dtype=torch.bfloat16)[..., :576]
    q, indices = torch.ones(4, 2, 16, 576, dtype=torch.bfloat16), torch.zeros(4, 2, 100, dtype=torch.int32)
    named = (indices, None, caches["extra_k_cache"], indices[..., :50])
    inputs = DecodeInputs(q, caches["k_cache"], None, None, *named, None, None, None, 0.1)
    plan = sparse_decode_launch.plan_decode(problem, inputs)
    with pytest.raises(ValueError, match=rf"^{name}: got strides \[36928, 577, 577, 1\] .* multiples of 16 bytes"):
        sparse_decode_launch.decode(problem, inputs, plan.work, plan.splits)


@pytest.mark.parametrize(("s_q", "h_q"), [(1, 16), (3, 64), (16, 128), (70, 128), (1, 1024), (17, 1024)])
def test_slots_of_split_prefill_are_numbered_in_memory_that_outlives_a_forgotten_call(monkeypatch, launched, s_q, h_q):
    """A CUDA graph refers to it, and nothing tells how long."""
    problem = SparsePrefillProblem(CPU, torch.bfloat16, s_q, 50, h_q, 576, 512, 2048)
    config = sparse_prefill_config(s_q, h_q, 2048, 132)
    assert config.splits > 1
    addresses = set()
    for _ in range(2):
        slots = sparse_prefill_launch._call(problem, has_lengths=False).unit_slots
        assert slots.tolist() == [unit * config.splits for unit in range(config.split_units + 1)]
        addresses.add(slots.data_ptr())
        del slots
        sparse_prefill_launch._call.cache_clear()
    assert len(addresses) == 1


def invariant_call(b, h_kv, topk, max_tiles):
    kv_format = KVCacheFormat.BF16 if topk is None else KVCacheFormat.FP8_V32
    problem = DecodeProblem(
        CPU, torch.bfloat16, b, 1, 128, h_kv, 576, 512, kv_format, 64, topk=topk, batch_invariant=True
    )
    return DecodeCall.of(
        problem, "kernel", b * h_kv, 132, unit_rows=128 // h_kv, max_tiles=max_tiles, flags=(), scaled=True
    )  # fmt: skip


# Of a unit with so many tiles that it is cut at all, there may be 32 pieces.
@pytest.mark.parametrize(
    ("b", "h_kv", "topk", "max_tiles"),
    [(1024, 1, None, 1000), (4096, 1, None, 32), (4095, 16, None, 1), (70000, 1, 9, 1)],
)
def test_a_batch_invariant_call_may_be_large(launched, b, h_kv, topk, max_tiles):
    assert invariant_call(b, h_kv, topk, max_tiles)


@pytest.mark.parametrize(
    ("b", "h_kv", "topk", "max_tiles", "tokens"),
    [(1025, 1, None, 1000, "block_table"), (4096, 16, None, 1, "block_table"), (70000, 1, 9999, 79, "indices")],
)
def test_more_partial_results_than_kernels_can_count_are_refused(launched, b, h_kv, topk, max_tiles, tokens):
    with pytest.raises(ValueError, match=rf"enable_batch_invariant: got b={b}, .* width of {tokens}, .* need at most"):
        invariant_call(b, h_kv, topk, max_tiles)


@pytest.mark.parametrize("strides", [(64 * 576, 576, 1, 1), (7, 576, 576, 1)])
@pytest.mark.parametrize("run", [dense, sparse_plain])
def test_strides_of_dimensions_of_one_element_do_not_matter(launched, run, strides):
    pages = 1 if strides[0] == 7 else 8
    cache = torch.zeros(8, 64, 576, dtype=torch.bfloat16).as_strided((pages, 64, 1, 576), strides)
    run(16, k_cache=cache)
    _, (_, passed, *_) = launched[-1]
    assert passed.data_ptr() == cache.data_ptr()
    assert passed.shape[0] == pages
    assert all(stride % 8 == 0 for stride in passed.stride()[:-1])


@pytest.mark.parametrize(
    ("cache", "aligned"),
    [
        (torch.zeros(4, 64, 1, 576, dtype=torch.bfloat16), True),
        (torch.zeros(4, 64, 1, 640, dtype=torch.bfloat16)[..., :576], True),
        (torch.zeros(4, 64, 1, 577, dtype=torch.bfloat16)[..., :576], False),
        (torch.zeros(4, 64, 576, dtype=torch.bfloat16).as_strided((4, 64, 1, 576), (36864, 576, 1, 1)), True),
        (torch.zeros(64, 576, dtype=torch.bfloat16).as_strided((1, 64, 1, 576), (7, 576, 576, 1)), True),
        (torch.zeros(1, 64, 1, 576, dtype=torch.bfloat16).expand(4, -1, -1, -1), True),  # though not for TMA
        (torch.zeros(4, 64, 1, 656, dtype=torch.uint8), True),
        (torch.zeros(4 * 42000, dtype=torch.uint8).as_strided((4, 64, 1, 656), (42000, 656, 656, 1)), True),
        (torch.zeros(4 * 42000, dtype=torch.uint8).as_strided((4, 64, 1, 656), (41992, 656, 656, 1)), False),
        (torch.zeros(42000, dtype=torch.uint8).as_strided((1, 64, 1, 656), (7, 656, 656, 1)), True),
    ],
)
def test_caches_whose_strides_kernels_cannot_follow_are_left_to_others(monkeypatch, cache, aligned):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: types.SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(kernels, "unavailable", lambda name: None)
    hopper.why_not.cache_clear()
    q, indices = torch.ones(4, 1, 16, 576, dtype=torch.bfloat16), torch.zeros(4, 1, 9, dtype=torch.int32)
    inputs = DecodeInputs(q, cache, None, None, indices, None, None, None, None, None, None, 0.1)
    problem = problem_of(inputs, Flags(512, False, cache.element_size() == 1, False))
    reason = hopper.why_not(dataclasses.replace(problem, device=torch.device("cuda", 98)))
    assert reason is None if aligned else "multiples of 16 bytes" in reason
    assert isinstance(reason, Mendable) == (not aligned)


@pytest.mark.parametrize(
    ("queries", "deterministic", "triton_reason", "taken"),
    [
        (FEW_QUERIES, False, None, "hopper"),
        (FEW_QUERIES, True, None, "triton"),
        (FEW_QUERIES - 1, False, None, "triton"),
        (FEW_QUERIES - 1, False, "not installed", "hopper"),
    ],
)
def test_gradients_go_to_triton_where_sums_of_dq_would_not_do(
    launched, monkeypatch, queries, deterministic, triton_reason, taken
):
    monkeypatch.setattr(triton, "why_not", lambda problem: triton_reason)

    def triton_takes(*arguments):
        launched.append(("triton", arguments))

    monkeypatch.setattr(triton, "mha_backward", triton_takes, raising=False)  # an attribute that is made when asked for
    b, h, d = 5, 2, 192
    problem = MHAProblem(CPU, torch.bfloat16, h, h, d, 128, causal=True, deterministic=deterministic)
    q, k, v, out = (torch.zeros(b * queries, h, x, dtype=torch.bfloat16) for x in (d, d, 128, 128))
    lse = torch.zeros(h, b * queries).T
    offsets = torch.arange(0, b * queries + 1, queries, dtype=torch.int32)
    mha_launch.mha_backward(problem, out, None, q, k, v, out, lse, offsets, offsets, queries, queries, 0.1)
    assert [name for name, _ in launched] == [{"hopper": "mha_backward_bf16_192"}.get(taken, taken)]


def test_deterministic_gradients_without_triton_are_refused(monkeypatch):
    monkeypatch.setattr(triton, "why_not", lambda problem: "not installed")
    problem = MHAProblem(CPU, torch.bfloat16, 1, 1, 192, 128, causal=True, deterministic=True)
    with pytest.raises(RuntimeError, match="deterministic gradients on cpu: triton: not installed"):
        mha_launch.mha_backward(problem)


def test_tiles_of_mha_are_bounded_whatever_the_lengths(launched):
    """Where CTAs are told that they take all tiles at once, there must not be one more."""
    problem = MHAProblem(CPU, torch.bfloat16, 4, 4, 192, 128, causal=True)
    assert mha_launch._forward_flags(problem, 0, 3) is None
    for lengths in (
        (1,),
        (128,),
        (129,),
        (4096,),
        (5000,),
        (1, 1, 1),
        (129, 1),
        (128, 127, 1),
        (300,) * 4,
        (0, 64) * 9,
    ):
        tiles = 4 * sum(-(-length // 128) for length in lengths)
        causal, workers, all_taken = mha_launch._forward_flags(problem, sum(lengths), len(lengths))
        assert causal == 1
        assert workers == 132 if tiles > 132 else tiles <= workers <= 132
        assert not all_taken or tiles <= workers
    for length in (1, 100, 128, 1000, 4096):
        assert mha_launch._forward_flags(problem, length, 1) == (1, 4 * -(-length // 128), 1), "exact for one sequence"
