"""Dense decode in Triton, in the interpreter or on a GPU, against the fp32 reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from helpers import assert_close_lse, assert_close_out, dense_inputs, poisoned_out, spread
from triton_device import DEVICE

from flash_mla import FlashMLASchedMeta, KVCacheFormat, flash_mla_with_kvcache, reference, selfcheck
from flash_mla.backends.triton import launch
from flash_mla.backends.triton.heuristics import gpu_of_arch

BF16, FP16, FP8 = KVCacheFormat.BF16, KVCacheFormat.FP16, KVCacheFormat.FP8_V32


@pytest.fixture(autouse=True)
def force_triton(monkeypatch):
    monkeypatch.setenv("FLASH_MLA_BACKEND", "triton")


def there(tensor: torch.Tensor) -> torch.Tensor:
    """On the device, of the same strides."""
    if tensor.device.type == DEVICE:
        return tensor
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
    return copy.copy_(tensor)


def run(inputs, meta=None, **options):
    return flash_mla_with_kvcache(
        **{name: there(tensor) for name, tensor in inputs.items()},
        head_dim_v=512,
        tile_scheduler_metadata=meta or FlashMLASchedMeta(),
        **options,
    )


@pytest.mark.parametrize(
    ("kv_format", "seqlens", "shape"),
    [
        (BF16, [0, 1, 33, 64, 65, 0], {"h_q": 5, "page_size": 64}),
        (FP16, [70, 3], {"h_q": 40, "s_q": 2, "page_size": 1, "causal": True}),
        (FP16, [37, 200], {"h_q": 3, "s_q": 3, "page_size": 2, "d": 512}),
        (BF16, [100, 17, 2], {"h_q": 16, "s_q": 5, "page_size": 17, "causal": True, "scale": 0.3}),
        (BF16, [300], {"h_q": 8, "page_size": 96, "scale": -0.02}),
        (BF16, [40, 9], {"h_q": 8, "page_size": 16, "scale": 0.0}),
        (FP8, [0, 129, 64], {"h_q": 17, "s_q": 2, "page_size": 64, "causal": True}),
        (FP8, [90, 40], {"h_q": 1, "page_size": 3}),
    ],
)
def test_against_the_reference(generator, kv_format, seqlens, shape):
    _, check = selfcheck._dense_decode(torch.device(DEVICE), generator, kv_format, seqlens, **shape)
    for result in check():
        assert result.is_right, f"{result.name} is off by {result.error}"


def test_as_many_rows_at_a_time_as_hopper_multiplies(generator, monkeypatch):
    monkeypatch.setattr(launch, "gpu_of", lambda device: gpu_of_arch(9, 0, num_sms=4))
    _, check = selfcheck._dense_decode(torch.device(DEVICE), generator, FP16, [130, 0, 64, 7], h_q=70, page_size=32)
    for result in check():
        assert result.is_right, f"{result.name} is off by {result.error}"


@pytest.mark.skipif(DEVICE != "cpu", reason="two backends serve the CPU")
def test_the_plan_of_another_backend_is_refused(generator, monkeypatch):
    inputs, meta = dense_inputs(generator, FP16, [700, 64], dtype=torch.float16), FlashMLASchedMeta()
    want = run(inputs, meta)
    monkeypatch.setenv("FLASH_MLA_BACKEND", "cpu")
    with pytest.raises(ValueError, match="planned by the backend triton, but cpu serves this call"):
        run(inputs | {"q": spread(inputs["q"])}, meta)  # other strides: who serves the call is asked anew
    monkeypatch.setenv("FLASH_MLA_BACKEND", "triton")
    assert all(torch.equal(one, other) for one, other in zip(run(inputs, meta), want, strict=True))


@pytest.mark.parametrize("group", [1, 3])
def test_several_kv_heads_into_a_strided_out(generator, group):
    inputs = dense_inputs(generator, FP16, [70, 0, 5], s_q=2, h_q=2 * group, h_kv=2, dtype=torch.float16)
    buffer = poisoned_out(3, 2, 2 * group, 1024, dtype=torch.float16, strided=False).to(DEVICE)
    out, lse = run(inputs, causal=True, out=buffer[..., 512:])
    assert out.data_ptr() == buffer[..., 512:].data_ptr()
    assert buffer[..., :512].isnan().all(), "nothing is written outside the output"
    want, want_lse = reference.decode(**inputs, head_dim_v=512, causal=True)
    assert_close_out(out, want)
    assert_close_lse(lse, want_lse)


@pytest.mark.parametrize(("columns", "power"), [(4, 20), (512, 110), (512, -60)])
def test_values_of_any_magnitude(generator, columns, power):
    inputs = dense_inputs(generator, BF16, [900, 50], h_q=2)
    inputs["q"][..., :columns] = 0
    inputs["k_cache"][..., :columns] *= 2.0**power
    out, lse = run(inputs)
    want, want_lse = reference.decode(**inputs, head_dim_v=512)
    back = torch.ones(512)
    back[:columns] = 2.0**-power
    assert_close_out(out.cpu() * back / 8, want.cpu() * back / 8)  # latents of the size that the tolerance is meant for
    assert_close_lse(lse, want_lse)


def test_requests_that_are_split_and_merged(generator):
    inputs = dense_inputs(generator, FP16, [1500, 3, 700], page_size=64, h_q=2, dtype=torch.float16)
    meta = FlashMLASchedMeta()
    out, lse = run(inputs, meta)
    if DEVICE == "cpu":  # which passes for a GPU of few SMs
        assert int(meta.num_splits[-1]) > 0
    want, want_lse = reference.decode(**inputs, head_dim_v=512)
    assert_close_out(out, want)
    assert_close_lse(lse, want_lse)
    again, lse_again = run(inputs, meta)
    assert torch.equal(again, out)
    assert torch.equal(lse_again, lse)


def test_batch_invariance(generator):
    inputs = dense_inputs(generator, FP16, [40, 1500, 0], page_size=64, h_q=2, dtype=torch.float16)
    together, lse = run(inputs, enable_batch_invariant=True)
    for i in range(3):
        part = {name: tensor if name == "k_cache" else tensor[i : i + 1] for name, tensor in inputs.items()}
        alone, lse_alone = run(part, enable_batch_invariant=True)
        assert torch.equal(alone[0], together[i])
        assert torch.equal(lse_alone[0], lse[i])


def test_huge_scores(generator):
    inputs = dense_inputs(generator, FP16, [50, 7], h_q=2, dtype=torch.float16)
    inputs["q"] *= 300
    out, lse = run(inputs)
    want, want_lse = reference.decode(**inputs, head_dim_v=512)
    assert_close_out(out, want)
    assert_close_lse(lse, want_lse)


def test_a_misaligned_cache_is_refused(generator):
    inputs = dense_inputs(generator, FP8, [5], h_q=2)
    cache = inputs["k_cache"]
    inputs["k_cache"] = torch.zeros(cache.numel() + 2, dtype=torch.uint8, device=DEVICE)[2:].view(cache.shape)
    with pytest.raises(ValueError, match=r"k_cache: got page stride .* need multiples of 4 bytes for FP8_V32"):
        run(inputs, is_fp8_kvcache=True)
