"""The decode and sparse prefill kernels as they get compiled for DeepSeek's shapes; see `variants.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flash_mla.backends.triton.combine import combine_kernel
from flash_mla.backends.triton.dense_decode import dense_decode_kernel
from flash_mla.backends.triton.dequant import FORMAT_NUMBER
from flash_mla.backends.triton.heuristics import Gpu, Tiles, combine_tile, gpu_of_arch, tiles_for
from flash_mla.backends.triton.sparse_attention import sparse_attention_kernel
from flash_mla.backends.triton.variants import Capability, Variant
from flash_mla.kv_cache import KVCacheFormat
from flash_mla.plan import INVARIANT_PIECE_TILES, MAX_INVARIANT_PIECES

__all__ = ["variants"]

TYPES = {
    **{f"{x}_ptr": "*bf16" for x in ("q", "out")},
    **{f"{x}_ptr": "*fp32" for x in ("lse", "max_logits", "sink", "partial_o", "partial_lse", "partial_max")},
    **{f"{x}_ptr": "*i32" for x in ("block_table", "seqlens", "work", "splits", "indices", "extra_indices")},
    "lengths_ptr": "*i32",
    "extra_lengths_ptr": "*i32",
    "scale_log2": "fp32",
}
# Bytes that a thread may keep in local memory: around the loops over KV, where the output has to leave registers.
SPILL = 704


def variants(capability: Capability) -> Iterator[Variant]:
    """The kernels for 128 heads, and for 64 with a second cache."""
    gpu = gpu_of_arch(*capability, num_sms=132)
    yield _dense(gpu, KVCacheFormat.BF16)
    yield _sparse("sparse_prefill_bf16", gpu, 128, KVCacheFormat.BF16, None)
    yield _sparse("sparse_decode_fp8_v32", gpu, 128, KVCacheFormat.FP8_V32, None)
    yield _sparse("sparse_decode_fp8_v4_twice", gpu, 64, KVCacheFormat.FP8_V4, KVCacheFormat.FP8_V4)
    rows, slots = combine_tile(1 << 14)
    constants = {"partial_max_ptr": None, "max_logits_ptr": None, "sink_ptr": None, "ROWS": rows, "SLOTS": slots}
    yield Variant("combine", combine_kernel, TYPES, constants, num_warps=4, multiplies=False)


def _dense(gpu: Gpu, kv_format: KVCacheFormat) -> Variant:
    tiles = tiles_for(128, gpu, quantised=kv_format.is_quantised)
    constants = {
        "page_stride": 64 * 576, "token_stride": 576,
        "FORMAT": FORMAT_NUMBER[kv_format], "PAGE_SIZE": 64, "D_ROPE": 64, "CAUSAL": True, "BATCH_INVARIANT": False,
        "MIN_PIECE": INVARIANT_PIECE_TILES, "MAX_PIECES": MAX_INVARIANT_PIECES,
    }  # fmt: skip
    types = TYPES | {"cache_ptr": _pointer(kv_format)}
    return _variant(f"dense_decode_{kv_format.value}", dense_decode_kernel, types, constants, tiles, gpu)


def _sparse(name: str, gpu: Gpu, h_q: int, kv_format: KVCacheFormat, extra: KVCacheFormat | None) -> Variant:
    tiles = tiles_for(h_q, gpu, quantised=kv_format.is_quantised)
    split_v = kv_format is KVCacheFormat.FP8_V4
    constants: dict[str, Any] = {
        "page_stride": 576, "token_stride": 576, "extra_page_stride": 576, "extra_token_stride": 576,
        "FORMAT": FORMAT_NUMBER[kv_format], "PAGE_SIZE": 64 if split_v else 1,
        "EXTRA_FORMAT": FORMAT_NUMBER[extra or kv_format], "EXTRA_PAGE_SIZE": 64 if split_v else 1,
        "COLUMNS": 448 if split_v else 512, "D_ROPE": 64, "D_V_ROPE": 64 if split_v else 0,
        "partial_o_ptr": None, "partial_lse_ptr": None, "partial_max_ptr": None,
    }  # fmt: skip
    types = TYPES | {"cache_ptr": _pointer(kv_format)}
    if extra is None:
        constants |= {"extra_cache_ptr": None, "extra_indices_ptr": None, "extra_lengths_ptr": None}
    else:
        types |= {"extra_cache_ptr": _pointer(extra)}
    return _variant(name, sparse_attention_kernel, types, constants, tiles, gpu)


def _pointer(kv_format: KVCacheFormat) -> str:
    return "*u8" if kv_format.is_quantised else "*bf16"


def _variant(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], tiles: Tiles, gpu: Gpu
) -> Variant:
    constants = constants | {"HAS_FP8": gpu.has_fp8, "ROWS": tiles.rows, "TILE": tiles.tile}
    # Fewer than 64 rows are multiplied by mma.sync on every GPU, also on those with larger instructions.
    multiplies = tiles.rows == 64 or gpu.shared_memory < 227 << 10
    return Variant(name, kernel, types, constants, tiles.num_warps, tiles.num_stages, SPILL, multiplies)
