"""Launches of the Triton kernels of dense multi-head attention, with the interface of the CPU backend's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton

from flash_mla.backends.triton.mha_backward import delta_kernel, dkdv_kernel, dq_kernel
from flash_mla.backends.triton.mha_forward import forward_kernel
from flash_mla.backends.triton.mha_heuristics import (
    DATACENTER_BLACKWELL,
    HOPPER,
    Tiles,
    dkdv_tiles,
    dq_tiles,
    forward_tiles,
)
from flash_mla.backends.triton.specialised import launch
from flash_mla.backends.triton.variants import Capability, Variant
from flash_mla.problem import MHAProblem

__all__ = ["mha_backward", "mha_forward", "variants"]

DELTA_TILE = 32  # tokens


def mha_forward(
    problem: MHAProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_qo: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query over the keys of its sequence that it sees.

    Args:
        q: [total_q, h_q, d_qk]; k: [total_kv, h_kv, d_qk]; v: [total_kv, h_kv, d_v].
        cu_seqlens_qo, cu_seqlens_kv: [b + 1] int32 offsets of the sequences, read on the device alone.

    Returns:
        out [total_q, h_q, d_v] in q's dtype; lse [total_q, h_q] fp32, contiguous along the tokens.
    """
    total_q, h_q, d_qk = q.shape
    out = q.new_empty(total_q, h_q, problem.d_v)
    lse = q.new_empty(h_q, total_q, dtype=torch.float32).T
    tile_q, tile_kv, num_warps, num_stages = _forward_tiles(_capability(q), d_qk)
    tiles = triton.cdiv(max_seqlen_qo, tile_q)
    programs = tiles * h_q * (len(cu_seqlens_qo) - 1)
    if programs:
        q_strides, k_strides, v_strides, out_strides = q.stride(), k.stride(), v.stride(), out.stride()
        launch(
            forward_kernel,
            programs,
            (
                q, k, v, out, lse, cu_seqlens_qo, cu_seqlens_kv,
                q_strides[1], k_strides[1], v_strides[1], out_strides[1], total_q,
                softmax_scale, h_q, h_q // problem.h_kv, tiles,
            ),
            {
                "q_stride_t": q_strides[0], "k_stride_t": k_strides[0], "v_stride_t": v_strides[0],
                "out_stride_t": out_strides[0], "REST": d_qk - 128, "D_V": problem.d_v, "CAUSAL": problem.causal,
                "NEGATIVE_SCALE": softmax_scale < 0, "TILE_Q": tile_q, "TILE_KV": tile_kv,
            },
            num_warps,
            num_stages,
        )  # fmt: skip
    return out, lse


def mha_backward(
    problem: MHAProblem,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_qo: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a loss by q, k and v, given those by `out` and `lse` (None: the loss does not read lse).

    Returns:
        dq, dk, dv: shaped and typed like q, k, v, contiguous; the same bits on every run.
    """
    total_q, h_q, d_qk = q.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty(h_q, total_q, dtype=torch.float32, device=q.device)
    b = len(cu_seqlens_qo) - 1
    group = h_q // problem.h_kv
    inputs = (q, k, v, dout, lse, delta)
    head_strides = (*(x.stride(1) for x in (q, k, v, dout, lse)), delta.stride(0))
    dims = {"REST": d_qk - 128, "D_V": problem.d_v, "CAUSAL": problem.causal}
    strides = {f"{name}_stride_t": x.stride(0) for name, x in (("q", q), ("k", k), ("v", v), ("dout", dout))}
    if total_q:
        launch(
            delta_kernel,
            triton.cdiv(total_q, DELTA_TILE) * h_q,
            (dout, out, dlse, delta, *_strides(dout), *_strides(out), *_strides(dlse), total_q, h_q),
            {"D_V": problem.d_v, "HAS_DLSE": dlse is not None, "TILE": DELTA_TILE},
            num_warps=4,
            num_stages=3,
        )
    tile_q, tile_kv, num_warps, num_stages = dq_tiles(_capability(q), d_qk)
    tiles = triton.cdiv(max_seqlen_qo, tile_q)
    if tiles * b:
        launch(
            dq_kernel,
            tiles * h_q * b,
            (
                *inputs, dq, cu_seqlens_qo, cu_seqlens_kv, *head_strides, dq.stride(1),
                softmax_scale, h_q, group, tiles,
            ),
            {**strides, "dq_stride_t": dq.stride(0), **dims, "TILE_Q": tile_q, "TILE_KV": tile_kv},
            num_warps,
            num_stages,
        )  # fmt: skip
    tile_q, tile_kv, num_warps, num_stages = _dkdv_tiles(_capability(q), d_qk)
    tiles = triton.cdiv(max_seqlen_kv, tile_kv)
    if tiles * b:
        launch(
            dkdv_kernel,
            tiles * problem.h_kv * b,
            (
                *inputs, dk, dv, cu_seqlens_qo, cu_seqlens_kv, *head_strides, dk.stride(1), dv.stride(1),
                softmax_scale, problem.h_kv, group, tiles,
            ),
            {
                **strides, "dk_stride_t": dk.stride(0), "dv_stride_t": dv.stride(0),
                **dims, "TILE_Q": tile_q, "TILE_KV": tile_kv,
            },
            num_warps,
            num_stages,
        )  # fmt: skip
    return dq, dk, dv


def _strides(x: torch.Tensor | None) -> tuple[int, int]:
    """Of a token and of a head."""
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _capability(q: torch.Tensor) -> Capability:
    """Of q's GPU; the interpreter's tensors are on the CPU, where any tiles will do."""
    return torch.cuda.get_device_capability(q.device) if q.is_cuda else (8, 0)


def _forward_tiles(capability: Capability, d_qk: int) -> Tiles:
    tiles = forward_tiles(capability, d_qk)
    # Triton 3.2 reduces parts of rows through shared memory: with the last stage, an SM has room for one program only.
    if capability[0] == HOPPER and d_qk == 128 and triton.__version__.startswith("3.2."):
        return tiles._replace(num_stages=tiles.num_stages - 1)
    return tiles


def _dkdv_tiles(capability: Capability, d_qk: int) -> Tiles:
    # Triton 3.4 fails to move accumulators in tensor memory out of two loops; 32 rows are not kept there.
    if capability[0] == DATACENTER_BLACKWELL and triton.__version__.startswith("3.4."):
        return Tiles(32, 32, 4, 2)
    return dkdv_tiles(capability, d_qk)


# Bytes that a thread may keep in local memory, by kernel, d_qk and major version of the architecture.
SPILL = {
    ("dkdv", 192, 8): 24, ("dkdv", 192, 9): 128, ("dkdv", 192, 10): 64, ("dkdv", 192, 12): 24, ("dq", 192, 12): 64,
}  # fmt: skip


def variants(capability: Capability) -> Iterator[Variant]:
    """The kernels for 128 heads: of either head dim, either dtype, causal or not."""
    pointers = {f"{x}_ptr": "*fp32" for x in ("lse", "dlse", "delta")}
    pointers |= {"cu_seqlens_qo_ptr": "*i32", "cu_seqlens_kv_ptr": "*i32", "softmax_scale": "fp32"}
    for d_qk, dtype, causal in ((192, "bf16", True), (128, "fp16", False)):
        types = pointers | {f"{x}_ptr": f"*{dtype}" for x in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")}
        strides = {f"{x}_stride_t": 128 * d_qk for x in ("q", "k", "dq", "dk")}
        strides |= {f"{x}_stride_t": 128 * 128 for x in ("v", "out", "dout", "dv")}
        for name, kernel, tiles in (
            ("forward", forward_kernel, _forward_tiles(capability, d_qk)),
            ("dq", dq_kernel, dq_tiles(capability, d_qk)),
            ("dkdv", dkdv_kernel, _dkdv_tiles(capability, d_qk)),
        ):
            known = strides | {"REST": d_qk - 128, "D_V": 128, "CAUSAL": causal, "NEGATIVE_SCALE": False}
            known |= {"TILE_Q": tiles.tile_q, "TILE_KV": tiles.tile_kv}
            yield Variant(
                name=f"mha_{name}_{d_qk}_{dtype}{'_causal' * causal}",
                kernel=kernel,
                types=types,
                constants={name: value for name, value in known.items() if name in kernel.arg_names},
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
                spill=SPILL.get((name, d_qk, capability[0]), 0),
            )
    constants = {"D_V": 128, "HAS_DLSE": True, "TILE": DELTA_TILE}
    yield Variant("mha_delta", delta_kernel, types, constants, num_warps=4, multiplies=False)
