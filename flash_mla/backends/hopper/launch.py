"""Torch-level launches of the Hopper kernels: choose the variant, allocate, hand over tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from flash_mla import kernels
from flash_mla.backends.hopper.heuristics import TILE, DenseDecodeConfig, dense_decode_config
from flash_mla.plan import SplitPlan, max_slots
from flash_mla.problem import DecodeInputs, DecodeProblem

__all__ = ["combine", "decode", "dense_decode_kernel", "plan", "plan_decode"]

Result = TypeVar("Result")

# From this many rows on, a warp each keeps every SM's memory pipeline full.
ROWS_TO_FILL_A_GPU = 4096
LOG2_E = math.log2(math.e)
TINY_SCALE = 1e-30  # stands for 0, which would turn the -inf of a masked score into NaN
SHORT_NAME = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@functools.cache
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One element on the device, made once; a broadcast view of it stands for an absent argument."""
    return torch.tensor([value], dtype=dtype, device=device)


def plan(
    lengths: torch.Tensor,
    *,
    extra_lengths: torch.Tensor | None = None,
    tile: int = 64,
    fixed_cost: int,
    num_workers: int,
    units_per_request: int = 1,
    min_cost: int = 1,
    batch_invariant: bool = False,
) -> SplitPlan:
    """`flash_mla.plan.split_plan` in one kernel launch, without synchronising; can be captured into a CUDA graph."""
    device = lengths.device
    (b,) = lengths.shape
    if extra_lengths is None:
        extra_lengths = _constant(0, torch.int32, device).expand(b)
    work = torch.empty(num_workers + 1, 4, dtype=torch.int32, device=device)
    splits = torch.empty(b * units_per_request + 1, dtype=torch.int32, device=device)
    kernel = kernels.load("planner_batch_invariant" if batch_invariant else "planner_balanced")
    kernel(lengths, extra_lengths, work, splits, tile, fixed_cost, min_cost, units_per_request)
    return SplitPlan(work, splits)


def combine(
    partial_o: torch.Tensor,
    partial_lse: torch.Tensor,
    split_plan: SplitPlan,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    sink: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> None:
    """Merge the partial results of every split unit into `out` and `lse`; rows of whole units are not touched.

    Args:
        partial_o: [slots, rows_per_unit, d_v] fp32, each normalised by its own softmax sum.
        partial_lse: [slots, rows_per_unit] fp32 in base 2, -inf where nothing was attended to.
        split_plan: which slots belong to which unit.
        out: [u0, u1, r0, r1, d_v] bf16 or fp16, any strides but a dense last dimension. A unit is (u0, u1), or one of
            its passes if its r0 * r1 rows are more than rows_per_unit.
        lse: [u0, u1, r0, r1] fp32, natural log, any strides.
        sink: [u1, r1] fp32, natural log, as `attn_sink`.
        batch_invariant: the plan is batch-invariant.
    """
    num_workers, num_units = split_plan.work.shape[0] - 1, split_plan.splits.shape[0] - 1
    if sink is None:
        sink = _constant(float("-inf"), torch.float32, out.device).expand(out.shape[1], out.shape[3])
    by_unit = batch_invariant or num_units <= num_workers
    candidates = num_units if by_unit else num_workers
    shape = "many_rows" if candidates * partial_o.shape[1] >= ROWS_TO_FILL_A_GPU else "many_splits"
    kernel = kernels.load(f"combine_{SHORT_NAME[out.dtype]}_{shape}")
    kernel(partial_o, partial_lse, split_plan.work, split_plan.splits, sink, out, lse, candidates, int(by_unit))


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=1024)
def _layout(problem: DecodeProblem) -> DenseDecodeConfig:
    rows = problem.s_q * problem.h_q // problem.h_kv
    return dense_decode_config(rows, problem.b * problem.h_kv, _num_sms(problem.device))


def dense_decode_kernel(dtype: torch.dtype, d: int, cluster: int) -> str:
    """Name of the dense decode variant."""
    return f"dense_decode_{SHORT_NAME[dtype]}_{d}_cluster{cluster}"


def _on_its_device(run: Callable[..., Result]) -> Callable[..., Result]:
    """Launch on the problem's GPU, whichever is current."""

    @functools.wraps(run)
    def guarded(problem: DecodeProblem, *arguments: object) -> Result:
        if problem.device.index == torch.cuda.current_device():
            return run(problem, *arguments)
        with torch.cuda.device(problem.device):
            return run(problem, *arguments)

    return guarded


@_on_its_device
def plan_decode(problem: DecodeProblem, inputs: DecodeInputs) -> SplitPlan:
    """Plan a decode call on the device."""
    config = _layout(problem)
    assert inputs.cache_seqlens is not None
    return plan(
        inputs.cache_seqlens,
        tile=TILE,
        fixed_cost=config.fixed_cost,
        num_workers=config.num_workers,
        units_per_request=problem.h_kv * config.passes,
        min_cost=config.min_cost,
        batch_invariant=problem.batch_invariant,
    )


class _DenseDecode(NamedTuple):
    """What a planned dense decode call needs apart from its tensors."""

    kernel: Callable[..., None]
    out_shape: tuple[int, int, int, int]
    lse_shape: tuple[int, int, int]
    workspace_size: int
    flags: tuple[int, ...]  # the kernel's integer arguments


@functools.lru_cache(maxsize=1024)
def _dense_decode(problem: DecodeProblem, num_units: int, num_workers: int, max_pages: int) -> _DenseDecode:
    config = _layout(problem)
    max_tiles = -(-max_pages * problem.page_size // TILE)
    slots = max_slots(num_units, num_workers, batch_invariant=problem.batch_invariant, max_tiles=max_tiles)
    by_unit = problem.batch_invariant or num_units <= num_workers
    many_rows = (num_units if by_unit else num_workers) * config.unit_rows >= ROWS_TO_FILL_A_GPU
    flags = (problem.causal, config.row_tiles, slots, problem.batch_invariant, by_unit, many_rows)
    return _DenseDecode(
        kernel=kernels.load(dense_decode_kernel(problem.dtype, problem.d_qk, config.cluster)),
        out_shape=(problem.b, problem.s_q, problem.h_q, problem.d_v),
        lse_shape=(problem.b, problem.h_q, problem.s_q),
        workspace_size=slots * config.unit_rows * (problem.d_v + 1),
        flags=tuple(map(int, flags)),
    )


@_on_its_device
def decode(
    problem: DecodeProblem, inputs: DecodeInputs, work: torch.Tensor, splits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a planned dense decode call: the attention kernel and, behind it, combine."""
    q, k_cache, block_table, scale = inputs.q, inputs.k_cache, inputs.block_table, inputs.softmax_scale
    assert block_table is not None
    call = _dense_decode(problem, splits.shape[0] - 1, work.shape[0] - 1, block_table.shape[1])
    if scale <= 0.0:
        # The kernel takes maxima of unscaled scores, so the scale must be positive; negating q is exact.
        q, scale = (-q, -scale) if scale < 0.0 else (q, TINY_SCALE)
    if not _rows_aligned(q):
        q = q.contiguous()
    if not _rows_aligned(k_cache):
        raise ValueError(
            f"k_cache: got strides {list(k_cache.stride())} at address {k_cache.data_ptr():#x}, "
            "need rows that begin at multiples of 16 bytes"
        )
    given = inputs.out
    out = given
    if out is None or not _rows_aligned(out):
        out = torch.empty(call.out_shape, dtype=problem.dtype, device=problem.device)
    lse = torch.empty(call.lse_shape, dtype=torch.float32, device=problem.device)
    workspace = torch.empty(call.workspace_size, dtype=torch.float32, device=problem.device)
    call.kernel(
        q, k_cache, block_table, inputs.cache_seqlens, work, splits, workspace, out, lse, scale * LOG2_E, *call.flags
    )
    if given is not None and given is not out:
        given.copy_(out)
        out = given
    return out, lse


def _rows_aligned(tensor: torch.Tensor) -> bool:
    """Whether every row of a 16-bit tensor begins at a multiple of 16 bytes, as TMA and vector copies need."""
    return tensor.data_ptr() % 16 == 0 and _strides_aligned(tensor.stride())


@functools.cache
def _strides_aligned(strides: tuple[int, ...]) -> bool:
    return all(stride % 8 == 0 for stride in strides[:-1])
