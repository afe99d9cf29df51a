"""The planner kernel computes exactly the integers of flash_mla.plan.split_plan."""

import random

import pytest
import torch

from flash_mla.backends.hopper import launch
from flash_mla.plan import split_plan

pytestmark = pytest.mark.gpu


def random_schedule(rng):
    b = rng.choice([1, 2, 7, 128, 511, 512, 513, 4096])
    longest = rng.choice([1, 64, 4096, 1 << 17])
    lengths = torch.tensor([rng.choice([0, 1, rng.randint(0, longest)]) for _ in range(b)], dtype=torch.int32)
    if rng.random() < 0.3:
        lengths = torch.full_like(lengths, rng.randint(0, longest))
        if rng.random() < 0.3:
            lengths[rng.randrange(b)] = 0
    elif rng.random() < 0.3:
        longest = min(longest, 1 << 15)
        lengths = torch.randint(longest - longest // 9, longest + 1, (b,), dtype=torch.int32)
    extra = torch.randint(0, 2048, (b,), dtype=torch.int32) if rng.random() < 0.4 else None
    num_workers = rng.choice([1, 2, 33, 66, 132, 600])
    return lengths, {
        "extra_lengths": extra,
        "tile": rng.choice([1, 32, 64, 100]),
        "fixed_cost": rng.randint(1, 9),
        "num_workers": num_workers,
        "even_workers": rng.choice([None, rng.randint(1, num_workers)]),
        "units_per_request": rng.choice([1, 1, 2, 5]),
        "min_cost": rng.randint(1, 8),
        "cut_cost": rng.choice([0, 1, 3, 50]),
        "slack": rng.choice([0, 1, 3, 5, 40]),
        "batch_invariant": rng.random() < 0.4,
    }


def on_gpu(schedule):
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in schedule.items()}


def test_same_plan_as_the_reference():
    rng = random.Random(0)
    for _ in range(300):
        lengths, schedule = random_schedule(rng)
        expected = split_plan(lengths, **schedule)
        plan = launch.plan(lengths.cuda(), **on_gpu(schedule))
        assert torch.equal(plan.work.cpu(), expected.work), schedule
        assert torch.equal(plan.splits.cpu(), expected.splits), schedule


def test_strided_lengths():
    lengths = torch.randint(0, 9000, (50, 3), dtype=torch.int32)
    expected = split_plan(lengths[:, 1], fixed_cost=5, num_workers=66)
    assert torch.equal(launch.plan(lengths.cuda()[:, 1], fixed_cost=5, num_workers=66).work.cpu(), expected.work)


def test_replay_plans_again():
    lengths = torch.randint(0, 9000, (64,), dtype=torch.int32, device="cuda")
    launch.plan(lengths, fixed_cost=5, num_workers=132)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = launch.plan(lengths, fixed_cost=5, num_workers=132)
    for _ in range(3):
        lengths.copy_(torch.randint(0, 90_000, (64,), dtype=torch.int32))
        graph.replay()
        expected = split_plan(lengths.cpu(), fixed_cost=5, num_workers=132)
        assert torch.equal(plan.work.cpu(), expected.work)
        assert torch.equal(plan.splits.cpu(), expected.splits)
