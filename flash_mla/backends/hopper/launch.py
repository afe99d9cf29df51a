"""What torch-level launches of Hopper kernels share: the plan, who merges, and how tensors are handed over.

`combine` launches by itself what each mode's kernel has built in, for tests.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from flash_mla import kernels
from flash_mla.plan import SplitPlan, max_slots
from flash_mla.problem import DecodeProblem, Problem

__all__ = [
    "LOG2_E",
    "SHORT_NAME",
    "Argument",
    "DecodeCall",
    "Results",
    "combine",
    "constant",
    "num_sms",
    "on_its_device",
    "out_with_aligned_rows",
    "plan",
    "positive_scale",
    "rows_aligned",
    "template",
    "who_merges",
    "with_aligned_rows",
    "with_aligned_strides",
]

Result = TypeVar("Result")
Results = tuple[torch.Tensor, torch.Tensor]

# What a warp merges alone as fast as several could: rows that fill a GPU, or units of few splits.
MANY_ROWS = 1024
FEW_SPLITS = 6
SPLITS_OF_A_WARP = 4  # at least, where several merge a row: more CTAs take longer to start than they save
LOG2_E = math.log2(math.e)
TINY_SCALE = 1e-30  # stands for 0, which would turn the -inf of a masked score into NaN
INT32_RANGE = 2**31  # kernels count elements of partial results in it
MOST_UNITS = 65535  # of a batch-invariant plan, of which each has CTAs of combine in a grid's second dimension
SHORT_NAME = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@functools.cache
def constant(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One element on the device, made once; a broadcast view of it stands for an absent argument."""
    return torch.tensor([value], dtype=dtype, device=device)


def plan(
    lengths: torch.Tensor,
    *,
    extra_lengths: torch.Tensor | None = None,
    tile: int = 64,
    fixed_cost: int,
    num_workers: int,
    even_workers: int | None = None,
    units_per_request: int = 1,
    min_cost: int = 1,
    cut_cost: int = 0,
    slack: int = 0,
    batch_invariant: bool = False,
) -> SplitPlan:
    """`flash_mla.plan.split_plan` in one kernel launch, without synchronising; can be captured into a CUDA graph."""
    device = lengths.device
    (b,) = lengths.shape
    if extra_lengths is None:
        extra_lengths = constant(0, torch.int32, device).expand(b)
    work = torch.empty(num_workers + 1, 4, dtype=torch.int32, device=device)
    splits = torch.empty(b * units_per_request + 1, dtype=torch.int32, device=device)
    kernel = kernels.load("planner_batch_invariant" if batch_invariant else "planner_balanced")
    even_workers = num_workers if even_workers is None else even_workers
    costs = (fixed_cost, min_cost, cut_cost, slack)
    kernel(lengths, extra_lengths, work, splits, tile, *costs, even_workers, units_per_request)
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
        sink = constant(float("-inf"), torch.float32, out.device).expand(out.shape[1], out.shape[3])
    by_unit, warps = who_merges(num_units, num_workers, partial_o.shape[1], batch_invariant)
    kernel = kernels.load(f"combine_{SHORT_NAME[out.dtype]}")
    tensors = (partial_o, partial_lse, None, split_plan.work, split_plan.splits, sink, out, lse)  # not scaled
    kernel(*tensors, int(by_unit), warps, None)  # and no maxima


def who_merges(
    num_units: int, num_workers: int, unit_rows: int, batch_invariant: bool, most_splits: int | None = None
) -> tuple[bool, int]:
    """(whether combine looks at units rather than workers to find splits, warps that share the splits of a row).

    One warp takes a whole row. From two on each takes some of its columns, in ever more CTAs: that pays for few
    rows of many splits.

    most_splits: of any unit, if they are bounded.
    """
    if batch_invariant:
        return True, 1  # the order of summation must not depend on the batch
    by_unit = num_units <= num_workers
    candidates = num_units if by_unit else num_workers
    rows, splits = candidates * unit_rows, num_workers // num_units
    few_splits = num_workers <= FEW_SPLITS * num_units or (most_splits is not None and most_splits < FEW_SPLITS)
    if rows >= MANY_ROWS or few_splits:
        return by_unit, 1
    side_by_side = max(2, min(8, MANY_ROWS // rows, splits // SPLITS_OF_A_WARP))
    return by_unit, 1 << (side_by_side.bit_length() - 1)


class Argument(NamedTuple):
    """A tensor that a kernel reads, and which of DecodeInputs it is or is a view of, if any."""

    source: str | None
    tensor: torch.Tensor


class DecodeCall(NamedTuple):
    """What a planned decode call needs apart from its tensors."""

    name: str
    kernel: Callable[..., None]
    out: torch.Tensor  # these three are templates
    lse: torch.Tensor
    workspace: torch.Tensor
    flags: tuple[int, ...]  # the kernel's integer arguments

    @staticmethod
    def of(
        problem: DecodeProblem, kernel: str, num_units: int, num_workers: int, *, unit_rows: int, max_tiles: int,
        flags: tuple[int, ...], scaled: bool, unsplit: bool = False, most_splits: int | None = None,
    ) -> DecodeCall:  # fmt: skip
        """The call of a kernel over a plan.

        scaled: partial outputs are fp16, with a scale for each half of a row; else fp32.
        flags: those that the kernel's mode alone has.
        unsplit: no unit is ever cut.
        most_splits: of any unit, if they are bounded.

        Raises:
            ValueError: a batch-invariant call with more partial results than kernels can tell apart.
        """
        slots = 0
        if not unsplit:
            slots = max_slots(num_units, num_workers, batch_invariant=problem.batch_invariant, max_tiles=max_tiles)
        if problem.batch_invariant:
            _check_partial_results(problem, num_units, slots * unit_rows, max_tiles, scaled)
        row_words = problem.d_v // 2 + 2 if scaled else problem.d_v
        by_unit, warps = who_merges(num_units, num_workers, unit_rows, problem.batch_invariant, most_splits)
        device = problem.device
        return DecodeCall(
            name=kernel,
            kernel=kernels.load(kernel),
            out=template((problem.b, problem.s_q, problem.h_q, problem.d_v), problem.dtype, device),
            lse=template((problem.b, problem.h_q, problem.s_q), torch.float32, device),
            workspace=template((slots * unit_rows * (row_words + 1),), torch.float32, device),
            flags=tuple(map(int, (*flags, slots, problem.batch_invariant, by_unit, warps))),
        )

    def launch(
        self, out: torch.Tensor | None, scale: float, work: torch.Tensor, splits: torch.Tensor, *arguments: Argument
    ) -> Results:
        """(out, lse) of the kernel over a plan, given the tensors that it reads before."""
        written = out_with_aligned_rows(out, self.out)
        lse = torch.empty_like(self.lse)
        tensors = (*(argument.tensor for argument in arguments), work, splits, torch.empty_like(self.workspace))
        self.kernel(*tensors, written, lse, scale * LOG2_E, *self.flags)
        return (written if out is None or out is written else out.copy_(written)), lse


def _check_partial_results(problem: DecodeProblem, num_units: int, rows: int, max_tiles: int, scaled: bool) -> None:
    """Raise a ValueError if kernels could not tell partial results apart, or combine could not look at all units."""
    # Elements of partial outputs count, or, where these are fp32, words of the workspace.
    most_rows = INT32_RANGE // problem.d_v if scaled else (INT32_RANGE - 1) // (problem.d_v + 1)
    merges = rows > 0 or problem.topk is None
    if rows <= most_rows and (num_units <= MOST_UNITS or not merges):
        return
    tokens = "block_table" if problem.topk is None else "indices"
    raise ValueError(
        f"enable_batch_invariant: got b={problem.b}, s_q={problem.s_q}, h_q={problem.h_q} and, by the width of "
        f"{tokens}, up to {max_tiles} tiles of tokens each: {num_units} units of work with {rows} rows of partial "
        f"results; need at most {MOST_UNITS} units and {most_rows} rows, so fewer requests in a call, or {tokens} no "
        "wider than what is attended to"
    )


def template(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor without memory for `torch.empty_like`, which takes half the host time of `torch.empty`."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    tensor.untyped_storage().resize_(0)
    return tensor


@functools.cache
def num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_its_device(run: Callable[..., Result]) -> Callable[..., Result]:
    """Launch on the problem's GPU, whichever is current."""

    @functools.wraps(run)
    def guarded(problem: Problem, *arguments: object) -> Result:
        if problem.device.index == torch.cuda.current_device():
            return run(problem, *arguments)
        with torch.cuda.device(problem.device):
            return run(problem, *arguments)

    return guarded


def positive_scale(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """(q, scale) of the same scores with a scale above 0: kernels take maxima of unscaled scores."""
    if scale > 0.0:
        return q, scale
    return (-q, -scale) if scale < 0.0 else (q, TINY_SCALE)  # negating q is exact


def with_aligned_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or a copy whose rows are aligned."""
    return tensor if rows_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def with_aligned_strides(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory; in dimensions of one element, where any stride will do, one that kernels take."""
    if 1 not in tensor.shape[:-1] or _strides_aligned(tensor.stride()):
        return tensor
    width = -(-tensor.shape[-1] // 8) * 8
    strides = [stride if size > 1 else width for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.as_strided(tensor.shape, (*strides[:-1], 1))


def out_with_aligned_rows(out: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """`out` if a kernel can write it, else a new tensor of the template."""
    return out if out is not None and rows_aligned(out) else torch.empty_like(like)


def rows_aligned(tensor: torch.Tensor) -> bool:
    """Whether every row of a 16-bit tensor begins at a multiple of 16 bytes of its own, as TMA and wide copies need."""
    return tensor.data_ptr() % 16 == 0 and _strides_aligned(tensor.stride())


@functools.cache
def _strides_aligned(strides: tuple[int, ...]) -> bool:
    """A TMA descriptor takes no stride of 0, such as an expanded tensor has."""
    return all(stride % 8 == 0 and stride > 0 for stride in strides[:-1])
