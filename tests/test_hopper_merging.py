"""Who merges partial results on Hopper: a plain function of a plan's extents."""

import pytest

from flash_mla.backends.hopper.launch import who_merges


@pytest.mark.parametrize(
    ("units", "workers", "unit_rows", "warps"),
    [
        (128, 66, 128, 1),
        (16, 64, 128, 1),
        (8, 64, 128, 1),
        (4, 64, 128, 2),
        (1, 66, 128, 8),
        (32, 132, 16, 1),  # few rows, but no more than five splits of each
        (16, 128, 16, 2),
        (4, 132, 16, 8),
        (1, 132, 16, 8),
        (3, 132, 64, 4),
    ],
)
def test_several_warps_merge_few_rows_of_many_splits(units, workers, unit_rows, warps):
    assert who_merges(units, workers, unit_rows, batch_invariant=False) == (units <= workers, warps)


@pytest.mark.parametrize(("most_splits", "warps"), [(2, 1), (5, 1), (6, 2), (100, 2), (None, 2)])
def test_one_warp_merges_splits_that_are_always_few(most_splits, warps):
    assert who_merges(6, 66, 128, batch_invariant=False, most_splits=most_splits) == (True, warps)


def test_the_order_of_summation_does_not_depend_on_the_batch():
    for unit_rows in (16, 64, 128):
        merging = {who_merges(units, 132, unit_rows, batch_invariant=True) for units in (1, 7, 132, 4000)}
        assert len(merging) == 1
