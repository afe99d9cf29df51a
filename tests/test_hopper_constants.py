"""What host code and kernels must agree on, each of which says it for itself: one imports no torch, one no compiler."""

import pytest

pytest.importorskip("cutlass")

from flash_mla.backends.hopper import (
    dense_decode_heuristics,
    fragments,
    mha_gradient_rows,
    mha_launch,
    mha_schedule,
    seesaw,
    sparse_decode_heuristics,
    sparse_decode_walk,
    sparse_prefill_heuristics,
    wgmma,
)


def test_units_of_work_are_of_one_size_on_the_host_and_in_kernels():
    for heuristics in (dense_decode_heuristics, sparse_decode_heuristics, sparse_prefill_heuristics):
        assert heuristics.ROWS == wgmma.ROWS
    assert dense_decode_heuristics.BLOCK == fragments.BLOCK
    assert dense_decode_heuristics.TILE == sparse_prefill_heuristics.TILE == seesaw.TILE
    assert sparse_decode_heuristics.TILE == sparse_decode_walk.TILE


def test_workspaces_of_mha_are_as_large_as_its_kernels_take_them_for():
    assert mha_launch.TILE == mha_schedule.TILE_Q == mha_schedule.TILE_KV
    assert mha_launch.VISIT_Q == mha_schedule.VISIT_Q
    assert mha_launch.SIDES == mha_gradient_rows.SIDES
