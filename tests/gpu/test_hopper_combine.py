"""The combine kernel against the definition of a merged softmax, in fp64."""

import math
import random

import pytest
import torch

from flash_mla.backends.hopper import launch
from flash_mla.plan import split_plan

pytestmark = pytest.mark.gpu
LN2 = math.log(2.0)


def merged(partial_o, partial_lse, plan, u0, u1, r0, r1, sink):
    """Expected (out, lse) of the split units in fp64, and which rows they are: [u0, u1, r0, r1]."""
    rows_per_unit = partial_o.shape[1]
    passes = -(-r0 * r1 // rows_per_unit)
    out = torch.zeros(u0 * u1, passes * rows_per_unit, partial_o.shape[-1], dtype=torch.float64)
    lse = torch.zeros(out.shape[:2], dtype=torch.float64)
    split = torch.zeros(out.shape[:2], dtype=torch.bool)
    slots = plan.splits.tolist()
    for unit in range(u0 * u1 * passes):
        begin, end = slots[unit], slots[unit + 1]
        if begin == end:
            continue
        where = unit // passes, slice(unit % passes * rows_per_unit, (unit % passes + 1) * rows_per_unit)
        parts_lse = partial_lse[begin:end].double() * LN2
        lse[where] = parts_lse.logsumexp(0)
        weights = (parts_lse - lse[where]).exp().nan_to_num(0.0)
        out[where] = (weights[..., None] * partial_o[begin:end].double()).sum(0)
        split[where] = True
    lse[lse == -torch.inf] = torch.inf
    out, lse, split = (x[:, : r0 * r1].unflatten(1, (r0, r1)).unflatten(0, (u0, u1)) for x in (out, lse, split))
    if sink is not None:
        kept = torch.sigmoid(lse - sink.double()[None, :, None, :])
        out = out * torch.where(lse == torch.inf, 0.0, kept)[..., None]
    return out, lse, split


def case(rng, device="cuda"):
    dtype = rng.choice([torch.bfloat16, torch.float16])
    u0, u1 = rng.choice([(1, 1), (1, 2), (3, 1), (40, 1), (5, 4)])
    r0, r1 = rng.choice([(1, 1), (1, 16), (1, 128), (2, 128), (3, 33)])
    rows_per_unit = rng.choice([r0 * r1, 64, 128])
    passes = -(-r0 * r1 // rows_per_unit)
    lengths = torch.randint(0, rng.choice([100, 3000, 100_000]), (u0,), dtype=torch.int32)
    batch_invariant = rng.random() < 0.3
    plan = split_plan(
        lengths,
        fixed_cost=3,
        num_workers=rng.choice([2, 33, 132]),
        units_per_request=u1 * passes,
        batch_invariant=batch_invariant,
    )
    slots = int(plan.splits[-1])
    partial_o = torch.randn(slots + 1, rows_per_unit, 512)
    partial_lse = torch.randn(slots + 1, rows_per_unit) * rng.choice([1, 30])
    partial_lse[torch.rand_like(partial_lse) < 0.2] = -torch.inf
    partial_lse[:, 0] = -torch.inf  # a row with nothing to attend to in any piece
    sink = torch.randn(u1, r1) * 5 if rng.random() < 0.5 else None
    if sink is not None:
        sink[..., 0], sink[..., -1] = -torch.inf, torch.inf
    return dtype, (u0, u1, r0, r1), plan, partial_o, partial_lse, sink, batch_invariant


def test_matches_the_definition():
    rng = random.Random(1)
    torch.manual_seed(1)
    merged_units = 0
    for _ in range(120):
        dtype, extents, plan, partial_o, partial_lse, sink, batch_invariant = case(rng)
        expected, expected_lse, split = merged(partial_o, partial_lse, plan, *extents, sink)
        merged_units += int(split.any())
        # out: a slice of a wider buffer with another order of dimensions; lse: as [b, h, s] is laid out.
        u0, u1, r0, r1 = extents
        buffer = torch.full((u0, r0, u1, r1, 1024), torch.nan, dtype=dtype, device="cuda")
        out = buffer[..., 256:768].permute(0, 2, 1, 3, 4)
        lse = torch.full((u0, u1, r1, r0), torch.nan, device="cuda").transpose(2, 3)
        device_plan = type(plan)(plan.work.cuda(), plan.splits.cuda())
        launch.combine(
            partial_o.cuda(), partial_lse.cuda(), device_plan, out, lse,
            sink=None if sink is None else sink.cuda(), batch_invariant=batch_invariant,
        )  # fmt: skip
        got, got_lse = out.double().cpu(), lse.double().cpu()
        assert got[~split].isnan().all(), "rows of whole units are not touched"
        assert got_lse[~split].isnan().all()
        # The result is rounded to nearest; the rest is for the sums.
        torch.testing.assert_close(got[split], expected[split], atol=1e-4, rtol=torch.finfo(dtype).eps / 2)
        torch.testing.assert_close(got_lse[split], expected_lse[split], atol=2e-5, rtol=1e-6)
        outside = torch.cat([buffer[..., :256], buffer[..., 768:]], -1)
        assert outside.isnan().all(), "nothing is written outside the outputs"
    assert merged_units > 40


def test_replay_and_repeats_give_the_same_bits():
    plan = split_plan(torch.tensor([50_000, 0, 20, 9000], dtype=torch.int32), fixed_cost=5, num_workers=66)
    plan = type(plan)(plan.work.cuda(), plan.splits.cuda())
    slots = int(plan.splits[-1])
    partial_o = torch.randn(slots, 128, 512, device="cuda")
    partial_lse = torch.randn(slots, 128, device="cuda")
    out = torch.full((4, 1, 1, 128, 512), torch.nan, dtype=torch.bfloat16, device="cuda")
    lse = torch.full((4, 1, 1, 128), torch.nan, device="cuda")
    launch.combine(partial_o, partial_lse, plan, out, lse)
    first = out.clone()
    out.fill_(torch.nan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch.combine(partial_o, partial_lse, plan, out, lse)
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out.view(torch.int16), first.view(torch.int16))
