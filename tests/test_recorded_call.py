"""Calls that repeat one before: recorded_call.c, and its use by decode, sparse prefill and dense MHA.

Python functions stand in for kernels, on the CPU.
"""

import contextlib
import ctypes
import shutil
import subprocess
import types

import pytest
import torch
import tvm_ffi
from tvm_ffi.libinfo import include_paths

from flash_mla import (
    backends,
    decode,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
    kernels,
    mha_served,
    sparse_prefill,
)
from flash_mla.backends import hopper
from flash_mla.backends.hopper import dense_decode_launch, sparse_decode_launch, sparse_prefill_launch
from flash_mla.backends.hopper.launch import LOG2_E

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
    pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="tvm-ffi cannot allocate"),
]

CONSTANT, WORKSPACE = -1, -2


@pytest.fixture(scope="module")
def record_call(tmp_path_factory):
    library = tmp_path_factory.mktemp("recorded_call") / "recorded_call.so"
    source = kernels.PACKAGE / "backends/hopper/recorded_call.c"
    warnings = ["-Wall", "-Wextra", "-Werror"]
    includes = [f"-I{folder}" for folder in include_paths()]
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", *warnings, *includes, source, "-o", library], check=True)
    return tvm_ffi.load_module(str(library)).record_call


class Kernel:
    """Notes what it is launched with."""

    def __init__(self):
        self.launches = []
        self.function = tvm_ffi.convert(lambda *arguments: self.launches.append(list(map(self.seen, arguments))))

    @staticmethod
    def seen(value):
        if isinstance(value, tvm_ffi.Tensor):
            return value.data_ptr(), tuple(value.shape), tuple(value.strides)
        return value

    @staticmethod
    def is_given(tensor):
        return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())


class TestReplay:
    def test_the_kernel_gets_views_of_later_tensors_and_the_same_constants(self, record_call):
        kernel = Kernel()
        x, constant = torch.rand(4, 3, 6), torch.rand(5)
        flat = x[:, :, :2].transpose(0, 1)
        replay = record_call(
            kernel.function, 3, x, None, 0.5, 0, flat, CONSTANT, constant, 2, 0.5, CONSTANT, 7, 0, x, CONSTANT, 2.5
        )
        address = constant.data_ptr()
        del x, flat, constant
        assert not kernel.launches, "recording launches nothing"
        for scale in (1.5, -3.0):
            y = torch.rand(4, 3, 6)
            assert replay(y, None, scale) is True
            view, given, same, *rest = kernel.launches.pop()
            assert view == Kernel.is_given(y[:, :, :2].transpose(0, 1))
            assert given == (address, (5,), (1,))
            assert [same, *rest] == [scale, 7, Kernel.is_given(y), 2.5]

    def test_each_launch_has_a_workspace_of_its_own(self, record_call):
        kernel = Kernel()
        x, workspace = torch.rand(4), torch.rand(3, 50)
        replay = record_call(kernel.function, 1, x, 0, x, WORKSPACE, workspace)
        for _ in range(2):
            assert replay(x) is True
        for _, (address, *layout) in kernel.launches:
            assert layout == [(3, 50), (50, 1)]
            assert address not in (0, x.data_ptr(), workspace.data_ptr())

    @pytest.mark.parametrize(
        "other",
        [
            None,
            1,
            [1.0],
            torch.rand(4, 3, 8),
            torch.rand(4, 18),
            torch.rand(4, 3, 6, 1),
            torch.rand(3, 4, 6).transpose(0, 1),
            torch.rand(4, 3, 12)[:, :, ::2],
            torch.rand(4, 3, 6).double(),
            torch.rand(4, 3, 6).view(torch.int32),
        ],
        ids=lambda value: f"{type(value).__name__}{list(value.stride()) if isinstance(value, torch.Tensor) else ''}",
    )
    def test_what_looks_different_is_left_alone(self, record_call, other):
        kernel = Kernel()
        x = torch.rand(4, 3, 6)
        replay = record_call(kernel.function, 2, x, None, 0, x)
        assert replay(other, None) is False
        assert replay(x, other if other is not None else x) is False
        assert replay(x) is False
        assert replay(x, None, None) is False
        assert not kernel.launches
        assert replay(x, None) is True

    @pytest.mark.parametrize(("dtype", "launched"), [(torch.uint8, 0), (torch.bfloat16, 0), (torch.int32, 1)])
    def test_rows_of_narrow_elements_stay_aligned(self, record_call, dtype, launched):
        kernel = Kernel()
        x = torch.zeros(80, dtype=dtype)
        x = x[(-x.data_ptr() % 16) // x.element_size() :][:65]
        replay = record_call(kernel.function, 1, x[:64], 0, x[:64])
        assert replay(x[1:]) is bool(launched)
        assert len(kernel.launches) == launched

    def test_what_a_kernel_raises_is_raised(self, record_call):
        def fail(*arguments):
            raise RuntimeError("CUDA error 1 at a kernel launch")

        replay = record_call(tvm_ffi.convert(fail), 1, 1.0, 0, 1.0)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="CUDA error 1 at a kernel launch"):
                replay(1.0)

    def test_more_than_fits_is_refused(self, record_call):
        kernel = Kernel().function
        with pytest.raises(ValueError, match="more dimensions than are recorded"):
            record_call(kernel, 1, torch.zeros(1, 1, 1, 1, 1, 1), 0, 0)
        with pytest.raises(ValueError, match="more arguments than are recorded"):
            record_call(kernel, 41, *[1] * 41)
        with pytest.raises(ValueError, match="more arguments than are recorded"):
            record_call(kernel, 0, *[1] * 82)


def in_memory(tensor: tvm_ffi.Tensor) -> torch.Tensor:
    """The same memory; a replayed tensor has no owner that DLPack could name."""
    shape, strides, dtype = tensor.shape, tensor.strides, getattr(torch, str(tensor.dtype))
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * (elements * dtype.itemsize)).from_address(tensor.data_ptr())
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


def stand_in(*arguments):
    """As a kernel: out = 2 q, lse = scale."""
    q, *_, out, lse = [in_memory(value) for value in arguments if isinstance(value, tvm_ffi.Tensor)]
    (scale,) = [value for value in arguments if isinstance(value, float)]
    out.copy_(q[..., :512] * 2)
    lse.fill_(scale)


def prefill_stand_in(*arguments):
    """As a kernel: out = 2 q + first row of kv, max_logits = scale, lse = lengths + sink."""
    q, kv, indices, lengths, sink, out, max_logits, lse, _, _ = [in_memory(value) for value in arguments[:10]]
    out.copy_(q[..., :512] * 2 + kv[indices[:, :1].long(), :512])
    max_logits.fill_(arguments[10])
    lse.copy_(lengths[:, None] + sink)


def forward_stand_in(*arguments):
    """As a kernel: out = 2 q, lse = scale."""
    q, _, _, _, _, out, lse = [in_memory(value) for value in arguments[:7]]
    out.copy_(q[..., :128] * 2)
    lse.fill_(arguments[8])


def backward_stand_in(*arguments):
    """As a kernel: dq = 3 q, dk = k + dlse of the first row, dv = scale everywhere."""
    _, dlse, q, k, _, _, _, _, _, dq, dk, dv = [in_memory(value) for value in arguments[:12]]
    dq.copy_(q * 3)
    dk.copy_(k + dlse[0, 0])
    dv.fill_(arguments[16])


@pytest.fixture
def calls(monkeypatch, record_call):
    """What runs on the Hopper backend, with its kernels replaced.

    checked: inputs of calls that were not repeated; launched: inputs of kernels; addresses: of the tensors among these.
    """
    log = types.SimpleNamespace(checked=[], launched=[], addresses=[])
    run_decode, prefill = hopper.decode, hopper.sparse_prefill
    mha = {name: getattr(hopper, name) for name in ("mha_forward", "mha_backward")}

    def noted(problem, inputs, work, splits):
        log.checked.append(inputs)
        return run_decode(problem, inputs, work, splits)

    def noted_prefill(problem, inputs):
        log.checked.append(inputs)
        return prefill(problem, inputs)

    def noted_mha(name):
        def run(problem, *inputs):
            log.checked.append(name)
            return mha[name](problem, *inputs)

        return run

    def launching(function):
        def launch(*arguments):
            log.launched.append(arguments)
            log.addresses.append([value.data_ptr() for value in arguments if isinstance(value, tvm_ffi.Tensor)])
            function(*arguments)

        return tvm_ffi.convert(launch)

    functions = {
        "planner": tvm_ffi.convert(lambda *_: None),
        "sparse_prefill": launching(prefill_stand_in),
        "mha_forward": launching(forward_stand_in),
        "mha_backward": launching(backward_stand_in),
        "attention": launching(stand_in),
    }
    monkeypatch.setattr(
        kernels,
        "load",
        lambda name, function=None: (
            record_call
            if function
            else next((functions[mode] for mode in functions if name.startswith(mode)), functions["attention"])
        ),
    )
    monkeypatch.setattr(hopper, "decode", noted)
    monkeypatch.setattr(hopper, "sparse_prefill", noted_prefill)
    for name in mha:
        monkeypatch.setattr(hopper, name, noted_mha(name))
    monkeypatch.setattr(backends, "choose", lambda problem: hopper)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of the CPU
    h200 = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
    monkeypatch.setattr(sparse_prefill, "_latest", None)
    monkeypatch.setattr(mha_served, "_latest", None)
    caches = [
        dense_decode_launch._dense_decode,
        sparse_decode_launch._sparse_decode,
        sparse_prefill_launch._call,
        decode._kept,
        sparse_prefill._served,
        mha_served._like,
    ]
    for cache in caches:
        cache.cache_clear()
    yield log
    for cache in caches:
        cache.cache_clear()


def dense(**changed):
    arguments = {
        "q": torch.randn(4, 2, 16, 576).bfloat16(),
        "k_cache": torch.zeros(8, 64, 1, 576, dtype=torch.bfloat16),
        "block_table": torch.zeros(4, 2, dtype=torch.int32),
        "cache_seqlens": torch.zeros(4, dtype=torch.int32),
        "head_dim_v": 512,
        "softmax_scale": 0.5,
    }
    return arguments | changed


def sparse(**changed):
    arguments = dense(block_table=None, cache_seqlens=None, is_fp8_kvcache=True)
    arguments["k_cache"] = torch.zeros(8, 64, 1, 656, dtype=torch.uint8)
    arguments["indices"] = torch.zeros(4, 2, 100, dtype=torch.int32)
    return arguments | changed


def run(meta, arguments):
    out, lse = flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta)
    assert torch.equal(out, arguments["q"][..., :512] * 2)
    assert torch.equal(lse, torch.full((4, 16, 2), arguments["softmax_scale"] * LOG2_E))
    return out


MODES = pytest.mark.parametrize("make", [dense, sparse])


@MODES
def test_a_call_like_the_last_one_is_repeated_with_its_own_tensors(calls, make):
    meta, _ = get_mla_metadata()
    for scale in (0.5, 0.25, 2.0):
        run(meta, make(softmax_scale=scale))
    assert len(calls.checked) == 1
    assert len(calls.launched) == 3


@MODES
def test_out_may_be_given_or_not(calls, make):
    meta, _ = get_mla_metadata()
    for given in (False, True, True, False):
        out = torch.full((4, 2, 16, 512), torch.nan, dtype=torch.bfloat16) if given else None
        got = run(meta, make(out=out))
        assert not given or got is out
    assert len(calls.checked) == 1


@MODES
@pytest.mark.parametrize(
    "change",
    [
        {"q": torch.randn(4, 2, 16, 584).bfloat16()[..., :576]},
        {"q": torch.randn(4, 2, 16, 577).bfloat16()[..., 1:]},
        {"q": torch.randn(4 * 2 * 16 * 576 + 1).bfloat16()[1:].view(4, 2, 16, 576)},
        {"q": torch.randn(4, 2, 16, 576).bfloat16().requires_grad_()},
        {"out": torch.full((4, 2, 16, 520), torch.nan, dtype=torch.bfloat16)[..., :512]},
        {"out": torch.full((4, 2, 16, 513), torch.nan, dtype=torch.bfloat16)[..., :512]},
    ],
)
def test_other_layouts_are_served_too(calls, make, change):
    meta, _ = get_mla_metadata()
    for changed in ({}, change, change, {}, {}):
        run(meta, make(**changed))
    assert len(calls.launched) == 5


def test_copies_are_made_at_every_call(calls):
    """A kernel reads misaligned rows from a copy, which a record must not take for the call's own."""
    meta, _ = get_mla_metadata()
    for _ in range(3):
        run(meta, dense(q=torch.randn(4, 2, 16, 577).bfloat16()[..., 1:]))
    assert len(calls.checked) == 3


def test_a_cache_of_bytes_by_any_name_is_repeated(calls):
    meta, _ = get_mla_metadata()
    for dtype in (torch.uint8, torch.int8, torch.float8_e4m3fn):
        for _ in range(3):
            run(meta, sparse(k_cache=torch.zeros(8, 64, 1, 656, dtype=torch.uint8).view(dtype)))
    assert len(calls.checked) == 3


def test_each_scale_below_zero_is_checked(calls):
    meta, _ = get_mla_metadata()
    run(meta, dense())
    for _ in range(2):
        arguments = dense(softmax_scale=-0.5)
        out, lse = flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta)
        assert torch.equal(out, arguments["q"][..., :512] * -2), "q is negated for a kernel that wants a scale above 0"
        assert torch.equal(lse, torch.full((4, 16, 2), 0.5 * LOG2_E))


@MODES
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(4, 2, 16, 576)}, TypeError, "q: got dtype float32"),
        ({"q": [1.0]}, TypeError, "q: got list"),
        ({"q": torch.zeros(4, 2, 8, 576).bfloat16()}, ValueError, "planned for h_q=16, but this call has h_q=8"),
        ({"q": torch.zeros(4, 2, 16, 576, dtype=torch.bfloat16, device="meta")}, ValueError, "need it on meta"),
        ({"head_dim_v": 576}, ValueError, "head_dim_v: got 576"),
        ({"enable_batch_invariant": True}, ValueError, "planned for enable_batch_invariant=False"),
        ({"out": torch.zeros(4, 2, 16, 512)}, TypeError, "out: got dtype float32"),
        ({"out": "out"}, TypeError, "out: got str"),
    ],
)
def test_misuse_is_told_as_on_a_first_call(calls, make, change, error, message):
    meta, _ = get_mla_metadata()
    for _ in range(2):
        run(meta, make())
    with pytest.raises(error, match=message):
        flash_mla_with_kvcache(**make(**change), tile_scheduler_metadata=meta)
    run(meta, make())
    assert len(calls.launched) == 3


def test_a_tensor_that_changed_its_size_is_noticed(calls):
    meta, _ = get_mla_metadata()
    arguments = dense()
    for _ in range(2):
        run(meta, arguments)
    arguments["q"].set_(torch.zeros(4, 1, 16, 576, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="planned for s_q=2, but this call has s_q=1"):
        flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta)


def test_a_new_plan_is_followed(calls):
    meta, _ = get_mla_metadata()
    for _ in range(2):
        run(meta, dense())
    meta.tile_scheduler_metadata = None
    for _ in range(2):
        run(meta, dense())
    assert len(calls.checked) == 1
    plans = [addresses[4:6] for addresses in calls.addresses]
    assert plans[0] == plans[1] != plans[2] == plans[3]
    assert plans[3] == [meta.tile_scheduler_metadata.data_ptr(), meta.num_splits.data_ptr()]


@MODES
def test_fresh_metadata_is_planned_and_followed(calls, make):
    """Calls that look alike are repeated whatever their metadata, but each by its own plan."""
    metas = [get_mla_metadata()[0] for _ in range(3)]
    for _ in range(2):
        for meta in metas:
            run(meta, make())
    assert len(calls.checked) == 1
    plan = slice(4, 6) if make is dense else slice(8, 10)
    for meta, addresses in zip(metas * 2, calls.addresses, strict=True):
        assert addresses[plan] == [meta.tile_scheduler_metadata.data_ptr(), meta.num_splits.data_ptr()]
    assert len({meta.tile_scheduler_metadata.data_ptr() for meta in metas}) == 3
    assert metas[0].config == metas[1].config
    assert metas[0].config is not metas[1].config


@MODES
def test_metadata_of_another_configuration_refuses_a_call_that_was_served(calls, make):
    metas = [get_mla_metadata()[0] for _ in range(2)]
    other = make(q=torch.randn(4, 2, 32, 576).bfloat16())
    run(metas[0], make())
    flash_mla_with_kvcache(**other, tile_scheduler_metadata=metas[1])
    for meta, arguments in zip(metas, (other, make()), strict=True):
        with pytest.raises(ValueError, match="planned for h_q"):
            flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta)


def test_another_current_device_is_left_to_the_checked_call(calls, monkeypatch):
    meta, _ = get_mla_metadata()
    run(meta, dense())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    run(meta, dense())
    assert len(calls.checked) == 2


def prefill(**changed):
    arguments = {
        "q": torch.randn(3, 16, 576).bfloat16(),
        "kv": torch.randn(40, 1, 576).bfloat16(),
        "indices": torch.randint(40, (3, 1, 100), dtype=torch.int32),
        "sm_scale": 0.5,
    }
    return arguments | changed


def run_prefill(arguments):
    out, max_logits, lse = flash_mla_sparse_fwd(**arguments)
    rows = arguments["kv"][arguments["indices"][:, :, 0].long(), 0, :512]
    assert torch.equal(out, arguments["q"][..., :512] * 2 + rows)
    assert torch.equal(max_logits, torch.full((3, 16), arguments["sm_scale"] * LOG2_E))
    lengths = arguments.get("topk_length", torch.full((3,), 100, dtype=torch.int32))
    assert torch.equal(lse, lengths[:, None] + arguments.get("attn_sink", torch.full((16,), -torch.inf)))
    return out


@pytest.mark.parametrize("optional", [(), ("attn_sink",), ("topk_length",), ("attn_sink", "topk_length")])
def test_a_prefill_like_an_earlier_one_is_repeated_with_its_own_tensors(calls, optional):
    for scale in (0.5, 0.25, 2):
        more = {"attn_sink": torch.randn(16), "topk_length": torch.randint(101, (3,), dtype=torch.int32)}
        run_prefill(prefill(sm_scale=scale, **{name: more[name] for name in optional}))
    assert len(calls.checked) == 1
    assert len(calls.launched) == 3


def test_prefills_of_several_shapes_take_turns(calls):
    kinds = [{}, {"kv": torch.randn(41, 1, 576).bfloat16()}, {"attn_sink": torch.randn(16)}]
    for _ in range(3):
        for kind in kinds:
            run_prefill(prefill(**kind))
    assert len(calls.checked) == 3
    assert len(calls.launched) == 9


def test_out_of_a_prefill_may_be_given_or_not(calls):
    for given in (False, True, True, False):
        out = torch.full((3, 16, 512), torch.nan, dtype=torch.bfloat16) if given else None
        got = run_prefill(prefill(out=out))
        assert not given or got is out
    assert len(calls.checked) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"q": torch.randn(3, 16, 584).bfloat16()[..., :576]},
        {"q": torch.randn(3, 16, 577).bfloat16()[..., 1:]},
        {"q": torch.randn(3 * 16 * 576 + 1).bfloat16()[1:].view(3, 16, 576)},
        {"q": torch.randn(3, 16, 576).half(), "kv": torch.randn(40, 1, 576).half()},
        {"kv": torch.randn(40, 2, 576).bfloat16()[:, :1]},
        {"kv": torch.randn(40, 1, 577).bfloat16()[..., 1:]},
        {"indices": torch.randint(40, (3, 1, 101), dtype=torch.int32)[..., 1:]},
    ],
)
def test_other_layouts_of_a_prefill_are_served_too(calls, change):
    for changed in ({}, change, change, {}, {}):
        run_prefill(prefill(**changed))
    assert len(calls.launched) == 5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(3, 16, 576)}, TypeError, "q: got dtype float32"),
        ({"q": [1.0]}, TypeError, "q: got list"),
        ({"kv": None}, TypeError, "kv: got NoneType"),
        ({"kv": torch.zeros(40, 1, 576, dtype=torch.bfloat16, device="meta")}, ValueError, "kv: got a tensor on meta"),
        ({"indices": torch.zeros(3, 1, 100)}, TypeError, "indices: got dtype float32"),
        ({"attn_sink": torch.zeros(15)}, ValueError, "attn_sink: got shape"),
        ({"d_v": 576}, ValueError, "d_v: got 576"),
        ({"sm_scale": "1"}, TypeError, "sm_scale: got str"),
        ({"out": torch.zeros(3, 16, 512)}, TypeError, "out: got dtype float32"),
        ({"out": torch.zeros(1, 16, 512).bfloat16().expand(3, -1, -1)}, ValueError, "out: got strides"),
        ({"out": "out"}, TypeError, "out: got str"),
    ],
)
def test_misuse_of_a_prefill_is_told_as_on_a_first_call(calls, change, error, message):
    for _ in range(2):
        run_prefill(prefill())
    with pytest.raises(error, match=message):
        flash_mla_sparse_fwd(**prefill(**change))
    run_prefill(prefill())
    assert len(calls.launched) == 3


def test_a_scale_below_zero_is_checked_at_every_prefill(calls):
    run_prefill(prefill())
    for _ in range(2):
        arguments = prefill(sm_scale=-0.5)
        _, max_logits, _ = flash_mla_sparse_fwd(**arguments)
        assert torch.equal(max_logits, torch.full((3, 16), 0.5 * LOG2_E)), "q is negated, so that the scale is above 0"
    assert len(calls.checked) == 3


def test_a_prefill_on_another_current_device_is_checked(calls, monkeypatch):
    run_prefill(prefill())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    run_prefill(prefill())
    assert len(calls.checked) == 2


def test_another_forced_backend_is_heeded(calls, monkeypatch):
    run_prefill(prefill())
    monkeypatch.setenv("FLASH_MLA_BACKEND", "hopper")
    run_prefill(prefill())
    assert len(calls.checked) == 2


def mha(s_q=40, **changed):
    arguments = {
        "q": torch.randn(s_q, 4, 192).bfloat16(),
        "k": torch.randn(50, 2, 192).bfloat16(),
        "v": torch.randn(50, 2, 128).bfloat16(),
        "cu_seqlens_qo": torch.tensor([0, s_q], dtype=torch.int32),
        "cu_seqlens_kv": torch.tensor([0, 50], dtype=torch.int32),
        "max_seqlen_qo": s_q,
        "max_seqlen_kv": 50,
        "softmax_scale": 0.5,
    }
    return arguments | changed


def run_mha(arguments):
    out, lse = flash_attn_varlen_func(**arguments)
    assert torch.equal(out, arguments["q"][..., :128] * 2)
    assert torch.equal(lse, torch.full(out.shape[:2], arguments["softmax_scale"] * LOG2_E))
    assert lse.T.is_contiguous()
    return out, lse


def test_a_forward_like_an_earlier_one_is_repeated_with_its_own_tensors(calls):
    kept = [run_mha(mha(softmax_scale=scale)) for scale in (0.5, 0.25, 2, 3)]
    assert calls.checked == ["mha_forward"] * 2, "the second of a kind is recorded"
    assert len(calls.launched) == 4
    assert len({tensor.data_ptr() for results in kept for tensor in results}) == 8
    for _ in range(2):
        _, lse = flash_attn_varlen_func(**mha(softmax_scale=None))
        assert torch.equal(lse, torch.full((40, 4), 192**-0.5 * LOG2_E))
    assert len(calls.checked) == 2


def test_forwards_of_several_kinds_take_turns(calls):
    kinds = [{}, {"s_q": 41}, {"causal": True}, {"max_seqlen_kv": 60}, {"v": torch.randn(50, 3, 128).bfloat16()[:, :2]}]
    for _ in range(4):
        for kind in kinds:
            run_mha(mha(**kind))
    assert len(calls.checked) == 10
    assert [arguments[9] for arguments in calls.launched] == [0, 0, 1, 0, 0] * 4


def test_forwards_of_ever_new_sizes_are_not_recorded(calls, monkeypatch):
    monkeypatch.setattr(hopper, "record_mha_forward", lambda *_: pytest.fail("recorded"))
    for s_q in range(1, 20):
        run_mha(mha(s_q))


def test_memory_that_is_short_keeps_calls_from_being_recorded_alone(calls, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(hopper, "record_mha_forward", fail)
    for _ in range(4):
        run_mha(mha())
    assert len(calls.checked) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"q": torch.randn(40, 4, 193).bfloat16()[..., 1:]},
        {"k": torch.randn(50 * 2 * 192 + 1).bfloat16()[1:].view(50, 2, 192)},
        {"softmax_scale": torch.finfo(torch.float32).tiny},
        {"max_seqlen_qo": torch.tensor(40)},
    ],
    ids=["rows", "start", "scale", "length"],
)
def test_other_forwards_are_served_too(calls, change):
    for changed in ({}, {}, {}, change, change, change, {}, {}):
        run_mha(mha(**changed))
    assert len(calls.launched) == 8


def test_a_length_in_a_tensor_is_read_at_every_call(calls):
    length = torch.tensor(40)
    arguments = mha(max_seqlen_qo=length)
    for _ in range(4):
        run_mha(arguments)
    length.fill_(4)
    with pytest.raises(ValueError, match="max_seqlen_qo: got 4, need at least 40"):
        flash_attn_varlen_func(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(40, 4, 192)}, TypeError, "q: got dtype float32"),
        ({"q": [1.0]}, TypeError, "q: got list"),
        (
            {"k": torch.zeros(50, 3, 192).bfloat16(), "v": torch.zeros(50, 3, 128).bfloat16()},
            ValueError,
            "q: got h_q=4",
        ),
        ({"cu_seqlens_kv": torch.zeros(2)}, TypeError, "cu_seqlens_kv: got dtype float32"),
        ({"max_seqlen_qo": 39}, ValueError, "max_seqlen_qo: got 39"),
        ({"dropout_p": 0.5}, ValueError, "dropout"),
        ({"softmax_scale": "1"}, TypeError, "softmax_scale: got str"),
    ],
)
def test_misuse_of_a_forward_is_told_as_on_a_first_call(calls, change, error, message):
    for _ in range(3):
        run_mha(mha())
    with pytest.raises(error, match=message):
        flash_attn_varlen_func(**mha(**change))
    run_mha(mha())
    assert len(calls.checked) == 2


def with_gradients(dlse=None, dout=None, **changed):
    """The gradients of a call, which must be what the stand-in makes of it."""
    arguments = mha(**changed)
    leaves = [arguments[name].requires_grad_() for name in ("q", "k", "v")]
    out, lse = run_mha(arguments)
    results, given = [out], [torch.randn_like(out) if dout is None else dout]
    if dlse is not None:
        results, given = [out, lse], [*given, torch.full_like(lse, dlse)]
    dq, dk, dv = torch.autograd.grad(results, leaves, given, retain_graph=True)
    assert torch.equal(dq, leaves[0] * 3)
    assert torch.equal(dk, (leaves[1] + (dlse or 0.0)).bfloat16())
    assert torch.equal(dv, torch.full_like(dv, arguments["softmax_scale"]))
    assert all(x.is_contiguous() for x in (dq, dk, dv))
    return results, leaves


def test_gradients_are_repeated_too(calls):
    for scale in (0.5, 0.25, 1.0, 2.0, 3.0, 4.0):
        with_gradients(softmax_scale=scale)
    assert calls.checked == [*["mha_forward", "mha_backward"] * 2, *["mha_backward"] * 2], "of two repeated forwards"
    assert len(calls.launched) == 12


def test_gradients_of_lse_and_of_expanded_sums(calls):
    ones = torch.ones((), dtype=torch.bfloat16).expand(40, 4, 128)
    kinds = ((None, None), (2.0, None), (None, ones))
    for dlse, dout in (*kinds, *kinds, *kinds[::-1], *(kind for kind in kinds for _ in range(3))):
        with_gradients(dlse, dout)
    assert len(calls.launched) == 36


def test_gradients_of_lse_alone(calls):
    for _ in range(6):
        arguments = mha()
        k = arguments["k"].requires_grad_()
        _, lse = flash_attn_varlen_func(**arguments)
        (dk,) = torch.autograd.grad(lse, k, torch.full_like(lse, 3.0))
        assert torch.equal(dk, k + 3)


def test_second_derivatives_of_a_repeated_call_are_refused(calls):
    for _ in range(6):
        results, leaves = with_gradients()
        (dq, *_) = torch.autograd.grad(results[0].float().square().sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dq.sum().backward()


def test_packed_tensors_are_repeated(calls):
    offsets = torch.tensor([0, 30], dtype=torch.int32)
    for _ in range(6):
        qkv = torch.randn(30, 4, 512).bfloat16().requires_grad_()
        out, _ = flash_attn_varlen_qkvpacked_func(qkv, offsets, 30, 192, softmax_scale=0.5)
        (gradient,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
        q, k, _ = qkv.split([192, 192, 128], -1)
        assert torch.equal(gradient, torch.cat([q * 3, k, torch.full_like(out, 0.5)], -1))
    assert calls.checked.count("mha_forward") == 2
    assert calls.checked.count("mha_backward") == 4


def test_deterministic_gradients_are_not_repeated(calls, monkeypatch):
    seen = []
    monkeypatch.setattr(hopper, "mha_backward", lambda problem, *inputs: seen.append(problem) or inputs[2:5])
    for _ in range(6):
        arguments = mha(deterministic=True)
        q = arguments["q"].requires_grad_()
        out, _ = flash_attn_varlen_func(**arguments)
        torch.autograd.grad(out, q, torch.ones_like(out))
    assert [problem.deterministic for problem in seen] == [True] * 6


def test_transforms_of_functions_are_not_repeated(calls):
    arguments = mha()
    q = arguments.pop("q")
    for _ in range(3):
        run_mha(arguments | {"q": q})
    dq = torch.func.grad(lambda q: flash_attn_varlen_func(q=q, **arguments)[0].float().sum())(q)
    assert torch.equal(dq, q * 3)

    for captured in (q, q.clone().requires_grad_()):
        arguments["q"] = captured
        dx = torch.func.grad(lambda x: (flash_attn_varlen_func(**arguments)[0].float() * x).sum())(torch.ones(()))
        assert torch.equal(dx, (q[..., :128] * 2).float().sum())
