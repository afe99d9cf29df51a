"""The split-KV schedule: complete, balanced, deterministic, and batch-invariant where promised."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_mla.plan import (
    FEW_PIECES,
    INVARIANT_PIECE_TILES,
    MAX_INVARIANT_PIECES,
    PIECE_SIZES,
    max_slots,
    split_plan,
)

TILE = 64

lengths_lists = st.lists(
    st.one_of(st.just(0), st.integers(1, 64), st.integers(1, 5000), st.integers(1, 300_000)), min_size=1, max_size=40
)
schedules = st.fixed_dictionaries(
    {
        "fixed_cost": st.integers(1, 12),
        "num_workers": st.integers(1, 140),
        "units_per_request": st.integers(1, 4),
        "min_cost": st.integers(1, 8),
        "cut_cost": st.integers(0, 12),
        "slack": st.integers(0, 12),
    }
)


def tile_counts(lengths, units_per_request=1):
    return [-(-n // TILE) for n in lengths for _ in range(units_per_request)]


def make(lengths, **schedule):
    plan = split_plan(torch.tensor(lengths, dtype=torch.int32), tile=TILE, **schedule)
    tiles = tile_counts(lengths, schedule["units_per_request"])
    pieces = list(plan.pieces(tiles, batch_invariant=schedule.get("batch_invariant", False)))
    return plan, tiles, pieces


def used_workers(total, tiles, schedule):
    """How many get a range of the cost axis."""
    few = max(1, min(total, FEW_PIECES * len(tiles)))
    return min(schedule["num_workers"], max(total // schedule["min_cost"], few))


def counted_cost(tiles, schedule):
    """What starting a piece costs: it does not count where units are cut alike."""
    cut_alike = len(set(tiles)) == 1 and tiles[0] > 0 and schedule["num_workers"] % len(tiles) == 0
    return 0 if cut_alike else schedule["fixed_cost"]


@given(lengths_lists, schedules, st.booleans())
def test_every_tile_exactly_once_and_no_empty_work(lengths, schedule, batch_invariant):
    _, tiles, pieces = make(lengths, batch_invariant=batch_invariant, **schedule)
    covered = [0] * len(tiles)
    for piece in pieces:
        assert piece.begin == covered[piece.unit], "pieces come in order, without gap or overlap"
        assert piece.end > piece.begin or tiles[piece.unit] == 0
        covered[piece.unit] = piece.end
    assert covered == tiles
    assert {piece.unit for piece in pieces} == set(range(len(tiles))), "empty units are visited too"
    assert sum(tiles[piece.unit] == 0 for piece in pieces) == tiles.count(0), "and only once"


@given(lengths_lists, schedules, st.booleans())
def test_slots_are_dense_and_bounded(lengths, schedule, batch_invariant):
    plan, tiles, pieces = make(lengths, batch_invariant=batch_invariant, **schedule)
    slots = [piece.slot for piece in pieces if piece.slot >= 0]
    assert slots == list(range(plan.splits[-1].item()))
    for unit, count in enumerate(plan.splits.diff().tolist()):
        of_unit = [piece for piece in pieces if piece.unit == unit]
        assert count == (len(of_unit) if len(of_unit) > 1 else 0)
    bound = max_slots(
        len(tiles), schedule["num_workers"], batch_invariant=batch_invariant, max_tiles=max(1, max(tiles))
    )
    assert len(slots) <= bound
    for worker, (_, tile, split, slot) in enumerate(plan.work[:-1].tolist()):
        mine = [piece for piece in pieces if piece.worker == worker]
        assert (split > 0) == (tile > 0) == (slot >= 0)
        if mine and tile > 0:
            assert mine[0].slot == slot


@given(lengths_lists, schedules)
def test_loads_are_balanced(lengths, schedule):
    schedule["cut_cost"] = 0
    _, tiles, pieces = make(lengths, **schedule)
    fixed, load = counted_cost(tiles, schedule), [0] * schedule["num_workers"]
    for piece in pieces:
        load[piece.worker] += piece.end - piece.begin + fixed
    bounds, used = [], []
    for cost, spare in ((fixed, 1), (schedule["fixed_cost"], schedule["slack"] / 4)):
        total = sum(tiles) + cost * len(tiles)
        used.append(used_workers(total, tiles, schedule))
        bounds.append(total / used[-1] + fixed + spare)
    assert max(load) <= max(bounds)
    assert not any(load[max(used) :])


@given(lengths_lists, schedules)
def test_batch_invariant_pieces_depend_on_the_request_alone(lengths, schedule):
    _, _, pieces = make(lengths, batch_invariant=True, **schedule)
    alone = {**schedule, "num_workers": 7}
    units = schedule["units_per_request"]
    for request, length in enumerate(lengths[:6]):
        _, _, expected = make([length], batch_invariant=True, **alone)
        got = [(p.unit - request * units, p.begin, p.end) for p in pieces if p.unit // units == request]
        assert got == [(p.unit, p.begin, p.end) for p in expected]


@given(lengths_lists, schedules)
def test_batch_invariant_loads_differ_by_a_piece(lengths, schedule):
    _, tiles, pieces = make(lengths, batch_invariant=True, **schedule)
    fixed = counted_cost(tiles, schedule)
    largest = max(INVARIANT_PIECE_TILES, -(-max(tiles) // MAX_INVARIANT_PIECES)) + fixed
    total = sum(piece.end - piece.begin + fixed for piece in pieces)
    workers = used_workers(total, tiles, schedule)
    load = [0] * schedule["num_workers"]
    for piece in pieces:
        load[piece.worker] += piece.end - piece.begin + fixed
    assert all(one <= total / workers + largest for one in load)


@given(lengths_lists, lengths_lists, schedules)
def test_extra_lengths_add_their_tiles(lengths, extra, schedule):
    extra = (extra * len(lengths))[: len(lengths)]
    plan = split_plan(
        torch.tensor(lengths, dtype=torch.int32), extra_lengths=torch.tensor(extra, dtype=torch.int32), **schedule
    )
    whole = [(-(-n // TILE) + -(-x // TILE)) * TILE for n, x in zip(lengths, extra, strict=True)]
    same = split_plan(torch.tensor(whole, dtype=torch.int32), **schedule)
    assert torch.equal(plan.work, same.work)
    assert torch.equal(plan.splits, same.splits)


@given(st.integers(0, 5000), st.integers(1, 60), schedules)
def test_equal_units_have_workers_of_their_own_number(length, requests, schedule):
    lengths = [length] * requests
    schedule["slack"] = 0
    schedule["num_workers"] += (fewer := schedule["num_workers"])
    plan, tiles, _ = make(lengths, even_workers=fewer, **schedule)
    expected, _, _ = make(lengths, **{**schedule, "num_workers": fewer})
    assert torch.equal(plan.work[: fewer + 1], expected.work)
    assert torch.equal(plan.splits, expected.splits)
    assert not any(unit < len(tiles) for unit in plan.work[fewer:, 0].tolist()), "the others stay idle"


@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 30), st.integers(1, 12))
def test_equal_units_are_cut_alike(units, pieces_of_each, more_tiles, fixed_cost):
    tiles, workers = pieces_of_each + more_tiles, units * pieces_of_each
    plan = split_plan(
        torch.full((units,), tiles * TILE), fixed_cost=fixed_cost, num_workers=workers + 3, even_workers=workers
    )
    pieces = list(plan.pieces([tiles] * units))
    assert [piece.worker for piece in pieces] == list(range(workers))
    lengths = [piece.end - piece.begin for piece in pieces]
    assert max(lengths) - min(lengths) <= 1


@given(lengths_lists, schedules)
def test_units_that_differ_take_all_workers(lengths, schedule):
    tiles = tile_counts(lengths)
    lengths.append((max(tiles) + 1) * TILE)  # more than the average
    lengths = [lengths[-1], *lengths[:-1]]
    plan, _, _ = make(lengths, even_workers=1, **schedule)
    expected, _, _ = make(lengths, **schedule)
    assert torch.equal(plan.work, expected.work)


@given(st.lists(st.integers(0, 20), min_size=4, max_size=40), st.integers(1, 9), st.integers(0, 3))
def test_units_are_kept_whole_unless_cutting_them_gains_more_than_it_costs(tiles, fixed_cost, spare):
    lengths = torch.tensor(tiles, dtype=torch.int32) * TILE
    workers, total = len(tiles) + spare, sum(tiles) + fixed_cost * len(tiles)
    for cut_cost in (0, 1, 5, 30):
        plan = split_plan(lengths, fixed_cost=fixed_cost, num_workers=workers, cut_cost=cut_cost)
        used = min(total, workers)
        cut_alike = len(set(tiles)) == 1 and tiles[0] > 0 and workers == len(tiles)
        if not cut_alike and len(tiles) <= used and max(tiles) + fixed_cost < total / used + cut_cost:
            pieces = list(plan.pieces(tiles))
            assert [(piece.worker, piece.unit, piece.end) for piece in pieces] == list(
                zip(range(len(tiles)), range(len(tiles)), tiles, strict=True)
            )
        else:
            assert torch.equal(plan.work, split_plan(lengths, fixed_cost=fixed_cost, num_workers=workers).work)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=30), st.integers(1, 9), st.integers(0, 100), st.integers(1, 8))
def test_units_have_workers_of_their_own_where_pieces_are_hardly_more_than_a_share(tiles, fixed_cost, spare, slack):
    lengths = torch.tensor(tiles, dtype=torch.int32) * TILE
    workers, total = len(tiles) + spare, sum(tiles) + fixed_cost * len(tiles)
    schedule = {"fixed_cost": fixed_cost, "num_workers": workers, "cut_cost": 3}
    plan = split_plan(lengths, slack=slack, **schedule)
    share = total / min(total, workers)
    largest = next(size for size in range(total, 0, -1) if size < share + slack / 4)
    counts = {
        size: [max(1, -(-n // size)) for n in tiles] for size in range(max(1, largest - PIECE_SIZES + 1), largest + 1)
    }
    suffices = [size for size, pieces in counts.items() if sum(pieces) <= min(total, workers)]
    if not suffices:
        assert torch.equal(plan.work, split_plan(lengths, **schedule).work)
        return
    pieces = list(plan.pieces(tiles))
    assert [piece.worker for piece in pieces] == list(range(len(pieces)))
    for unit, (n, count) in enumerate(zip(tiles, counts[min(suffices)], strict=True)):
        sizes = [piece.end - piece.begin for piece in pieces if piece.unit == unit]
        assert len(sizes) == count
        assert sum(sizes) == n
        assert max(sizes) - min(sizes) <= 1


def test_few_short_units_are_cut_into_tiles():
    lengths = torch.tensor([2 * TILE, 1, 3 * TILE], dtype=torch.int32)
    plan = split_plan(lengths, fixed_cost=1, num_workers=66, cut_cost=3, slack=3)
    assert plan.splits.tolist() == [0, 2, 2, 5]


def test_plan_is_deterministic_int32():
    lengths = torch.randint(0, 50_000, (300,), dtype=torch.int32)
    plans = [split_plan(lengths, fixed_cost=5, num_workers=66) for _ in range(2)]
    assert torch.equal(plans[0].work, plans[1].work)
    assert torch.equal(plans[0].splits, plans[1].splits)
    assert plans[0].work.dtype == plans[0].splits.dtype == torch.int32
    assert plans[0].work.shape == (67, 4)
    assert plans[0].splits.shape == (301,)


def test_one_short_request_is_cut_into_tiles():
    plan = split_plan(torch.tensor([640], dtype=torch.int32), fixed_cost=3, num_workers=132)
    assert plan.splits.tolist() == [0, 10]


def test_a_lone_request_is_cut_into_short_pieces_while_they_are_few():
    for tiles, pieces in ((30, 30), (64, 64), (100, 64), (200, 100), (1000, 132)):
        plan = split_plan(torch.tensor([tiles * TILE], dtype=torch.int32), fixed_cost=2, num_workers=132, min_cost=2)
        assert plan.splits.tolist() == [0, pieces]


def test_one_long_request_uses_every_worker():
    plan = split_plan(torch.tensor([1 << 20], dtype=torch.int32), fixed_cost=5, num_workers=132)
    assert plan.splits.tolist() == [0, 132]
