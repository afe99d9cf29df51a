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
    f"combine_{short}": Variant("flash_mla.backends.hopper.combine", 80, {"dtype": dtype, "d_v": 512})
    for short, dtype in (("bf16", "BFloat16"), ("fp16", "Float16"))
}

PLANNER = {
    "planner_balanced": Variant("flash_mla.backends.hopper.planner", 72, {"batch_invariant": False}),
    "planner_batch_invariant": Variant("flash_mla.backends.hopper.planner", 64, {"batch_invariant": True}),
}

# 168 registers a thread at launch, which the roles redistribute.
DENSE_DECODE = {
    f"dense_decode_{short}_{d}_cluster{cluster}_pages{box}": Variant(
        "flash_mla.backends.hopper.dense_decode", 168, {"dtype": dtype, "d": d, "cluster": cluster, "box": box}
    )
    for short, dtype in (("bf16", "BFloat16"), ("fp16", "Float16"))
    for d in (576, 512)
    for cluster in (1, 2)
    for box in (64, 8)
}

DENSE_DECODE |= {
    f"dense_decode_{short}_{d}_rows{rows}": Variant(
        "flash_mla.backends.hopper.dense_decode_few_rows", 168, {"dtype": dtype, "d": d, "rows": rows}
    )
    for short, dtype in (("bf16", "BFloat16"), ("fp16", "Float16"))
    for d in (576, 512)
    for rows in (16, 32)
}

SPARSE_PREFILL = {
    f"sparse_prefill_{short}_{name}": Variant(
        "flash_mla.backends.hopper.sparse_prefill", 168, {"dtype": dtype, **config}
    )
    for short, dtype in (("bf16", "BFloat16"), ("fp16", "Float16"))
    for name, config in (("576", {"d": 576}), ("576_short", {"d": 576, "short": True}), ("512", {"d": 512}))
}

# What quantised caches hold: of one format, or of another one in the extra cache.
QUANTISED = {
    "fp8_v32": {"kv_format": "Fp8V32"},
    "fp8_v4": {"kv_format": "Fp8V4"},
    "fp8_v41": {"kv_format": "Fp8V41"},
    "fp8_v41_fp4_v41": {"kv_format": "Fp8V41", "extra_format": "Fp4V41"},
    "nvfp4": {"kv_format": "Nvfp4"},
}

SPARSE_DECODE = {
    f"sparse_decode_{short}_{formats}_cluster{cluster}": Variant(
        "flash_mla.backends.hopper.quantised_sparse_decode", 168, {"dtype": dtype, **config, "cluster": cluster}
    )
    for short, dtype in (("bf16", "BFloat16"), ("fp16", "Float16"))
    for formats, config in QUANTISED.items()
    for cluster in ((1, 2) if short == "bf16" and formats != "nvfp4" else (1,))
}

PLAIN_SPARSE_DECODE = {
    f"sparse_decode_{short}_{d}{suffix}": Variant(
        "flash_mla.backends.hopper.plain_sparse_decode", 168, {"dtype": dtype, "d": d, "compute_bound": compute_bound}
    )
    for short, dtype in (("bf16", "BFloat16"), ("fp16", "Float16"))
    for d in (576, 512)
    for suffix, compute_bound in (("", False), ("_compute_bound", True))
}

SPARSE_DECODE_FEW_HEADS = {
    f"sparse_decode_bf16_{short}_heads{heads}": Variant(
        "flash_mla.backends.hopper.sparse_decode_few_heads",
        168,
        {"dtype": "BFloat16", "kv_format": kv_format, "heads": heads},
    )
    for short, kv_format, counts in (
        ("fp8_v32", "Fp8V32", (8, 16, 32)),
        ("fp8_v4", "Fp8V4", (8, 16)),
        ("fp8_v41", "Fp8V41", (8, 16)),
    )
    for heads in counts
}

MHA = {
    f"mha_{direction}_{short}_{d}": Variant(f"flash_mla.backends.hopper.mha_{direction}", 168, {"dtype": dtype, "d": d})
    for direction in ("forward", "backward")
    for short, dtype in (("bf16", "BFloat16"), ("fp16", "Float16"))
    for d in (192, 128)
}

VARIANTS: dict[str, Variant] = {
    **COMBINE,
    **PLANNER,
    **DENSE_DECODE,
    **SPARSE_DECODE,
    **PLAIN_SPARSE_DECODE,
    **SPARSE_DECODE_FEW_HEADS,
    **SPARSE_PREFILL,
    **MHA,
}
