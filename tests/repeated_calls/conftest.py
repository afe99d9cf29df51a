"""What tests of repeated calls share: recorded_call.c compiled, and Python functions that stand in for kernels."""

import ctypes
import shutil
import subprocess
import types

import pytest
import torch
import tvm_ffi
from tvm_ffi.libinfo import include_paths

from flash_mla import backends, decode, kernels, mha_served, sparse_prefill
from flash_mla.backends import hopper
from flash_mla.backends.hopper import dense_decode_launch, sparse_decode_launch, sparse_prefill_launch


@pytest.fixture(scope="session")
def record_call(tmp_path_factory):
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("tvm-ffi cannot allocate")
    library = tmp_path_factory.mktemp("recorded_call") / "recorded_call.so"
    source = kernels.PACKAGE / "backends/hopper/recorded_call.c"
    warnings = ["-Wall", "-Wextra", "-Werror"]
    includes = [f"-I{folder}" for folder in include_paths()]
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", *warnings, *includes, source, "-o", library], check=True)
    return tvm_ffi.load_module(str(library)).record_call


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
