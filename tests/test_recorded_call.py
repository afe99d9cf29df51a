"""Calls that repeat one before: recorded_call.c, and its use by decode and sparse prefill.

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
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
    kernels,
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


@pytest.fixture
def calls(monkeypatch, record_call):
    """What runs on the Hopper backend, with its kernels replaced: (inputs that were checked, inputs of kernels)."""
    log = types.SimpleNamespace(checked=[], launched=[])
    decode, prefill = hopper.decode, hopper.sparse_prefill

    def noted(problem, inputs, work, splits):
        log.checked.append(inputs)
        return decode(problem, inputs, work, splits)

    def noted_prefill(problem, inputs):
        log.checked.append(inputs)
        return prefill(problem, inputs)

    def launching(function):
        def launch(*arguments):
            log.launched.append(arguments)
            function(*arguments)

        return tvm_ffi.convert(launch)

    functions = {
        "planner": tvm_ffi.convert(lambda *_: None),
        "sparse_prefill": launching(prefill_stand_in),
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
    monkeypatch.setattr(backends, "choose", lambda problem: hopper)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of the CPU
    h200 = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
    monkeypatch.setattr(sparse_prefill, "_latest", None)
    caches = [
        dense_decode_launch._dense_decode,
        sparse_decode_launch._sparse_decode,
        sparse_prefill_launch._call,
        sparse_prefill._served,
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
    assert len(calls.checked) == 2
    plans = [[value.data_ptr() for value in launched[4:6]] for launched in calls.launched]
    assert plans[0] == plans[1] != plans[2] == plans[3]
    assert plans[3] == [meta.tile_scheduler_metadata.data_ptr(), meta.num_splits.data_ptr()]


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
