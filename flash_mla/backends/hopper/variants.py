"""Every Hopper kernel that gets compiled: one table per family, importable without the CuTe DSL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ARCH", "VARIANTS", "Variant"]

ARCH = "sm_90a"


@dataclass(frozen=True)
class Variant:
    """`module.compile_variant(**config)`, which may use at most `registers` a thread (before setmaxnreg)."""

    module: str
    registers: int
    config: Mapping[str, Any] = field(default_factory=dict)


COMBINE = {
    f"combine_{short}_{shape}": Variant(
        "flash_mla.backends.hopper.combine", 80, {"dtype": dtype, "d_v": 512, "warps_per_row": warps}
    )
    for short, dtype in (("bf16", "BFloat16"), ("fp16", "Float16"))
    for shape, warps in (("many_rows", 1), ("many_splits", 8))
}

PLANNER = {
    "planner_balanced": Variant("flash_mla.backends.hopper.planner", 64, {"batch_invariant": False}),
    "planner_batch_invariant": Variant("flash_mla.backends.hopper.planner", 64, {"batch_invariant": True}),
}

# 168 registers a thread at launch, which the roles redistribute.
DENSE_DECODE = {
    f"dense_decode_{short}_{d}_cluster{cluster}": Variant(
        "flash_mla.backends.hopper.dense_decode", 168, {"dtype": dtype, "d": d, "cluster": cluster}
    )
    for short, dtype in (("bf16", "BFloat16"), ("fp16", "Float16"))
    for d in (576, 512)
    for cluster in (1, 2)
}

SPARSE_PREFILL = {
    f"sparse_prefill_{short}_{d}": Variant("flash_mla.backends.hopper.sparse_prefill", 168, {"dtype": dtype, "d": d})
    for short, dtype in (("bf16", "BFloat16"), ("fp16", "Float16"))
    for d in (576, 512)
}

SPARSE_DECODE = {
    f"sparse_decode_bf16_{short}_cluster{cluster}": Variant(
        "flash_mla.backends.hopper.sparse_decode",
        168,
        {"dtype": "BFloat16", "kv_format": kv_format, "cluster": cluster},
    )
    for short, kv_format in (("fp8_v32", "Fp8V32"), ("fp8_v4", "Fp8V4"), ("fp8_v41", "Fp8V41"), ("nvfp4", "Nvfp4"))
    for cluster in (1, 2)
}

MHA = {
    f"mha_{direction}_{short}_{d}": Variant(f"flash_mla.backends.hopper.mha_{direction}", 168, {"dtype": dtype, "d": d})
    for direction in ("forward", "backward")
    for short, dtype in (("bf16", "BFloat16"), ("fp16", "Float16"))
    for d in (192, 128)
}

VARIANTS: dict[str, Variant] = {**COMBINE, **PLANNER, **DENSE_DECODE, **SPARSE_DECODE, **SPARSE_PREFILL, **MHA}
