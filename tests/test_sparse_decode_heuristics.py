"""The layout of sparse decode on a GPU: plain functions of shapes, for GPUs of several sizes."""

import pytest
import torch

from flash_mla.backends.hopper.sparse_decode_heuristics import (
    FEW_HEADS,
    ROWS,
    TILE,
    few_heads,
    is_compute_bound,
    sparse_decode_config,
)
from flash_mla.backends.hopper.variants import VARIANTS
from flash_mla.kv_cache import KVCacheFormat
from flash_mla.plan import split_plan

H200, H800_PCIE, H20 = 132, 114, 78  # SMs
GPUS = pytest.mark.parametrize("num_sms", [H200, H800_PCIE, H20])


@GPUS
@pytest.mark.parametrize("tiles", [None, 0, 1, 16, 128])
def test_every_head_is_covered_and_no_sm_counted_twice(num_sms, tiles):
    for h_q in (1, 8, 16, 63, 64, 65, 127, 128, 129, 200, 256, 1000):
        for queries in (1, 2, 33, 127, 128, 132, 133, 256, 4096):
            config = sparse_decode_config(queries, h_q, tiles, num_sms)
            assert config.unit_rows * config.passes >= h_q, h_q
            assert config.unit_rows * (config.passes - 1) < h_q, f"{h_q} heads: a pass without rows"
            assert config.row_tiles in (1, 2), "a kernel is compiled for no other cluster"
            assert 1 <= config.num_workers * config.row_tiles <= num_sms
            assert tiles or config.fixed_cost >= 1, "a piece without cost, hence empty units without a worker"
            assert config.unit_rows == config.row_tiles * ROWS


@pytest.mark.parametrize(
    ("b", "s_q", "h_q", "tiles", "expected"),
    [
        (128, 2, 128, 16, True),
        (128, 2, 64, 16, False),  # each query token names rows of its own
        (128, 2, 64, None, True),
        (128, 1, 64, None, False),
        (128, 1, 128, None, True),
        (66, 1, 65, 16, True),
        (65, 1, 128, 16, False),  # units are cut
        (4, 1, 128, None, False),
        (128, 1, 128, 15, False),
    ],
)
def test_a_call_is_compute_bound_where_ctas_share_long_units(b, s_q, h_q, tiles, expected):
    assert is_compute_bound(b, s_q, h_q, tiles, H200) is expected


@GPUS
@pytest.mark.parametrize("kv_format", FEW_HEADS)
def test_few_heads_are_padded_to_the_next_kernel_s(num_sms, kv_format):
    counts = FEW_HEADS[kv_format]
    for h_q in range(1, max(counts) + 1):
        heads = few_heads(h_q, kv_format)
        assert h_q <= heads
        assert all(smaller < h_q for smaller in counts if smaller < heads), "the smallest kernel that serves"
        config = sparse_decode_config(3, h_q, 16, num_sms, heads)
        assert (config.row_tiles, config.passes, config.unit_rows) == (1, 1, heads)
        assert f"sparse_decode_bf16_{kv_format.value}_heads{heads}" in VARIANTS
    assert few_heads(max(counts) + 1, kv_format) is None
    assert few_heads(1, KVCacheFormat.BF16) is None


@GPUS
def test_equal_units_are_kept_whole_where_that_leaves_few_sms_idle(num_sms):
    queries, topk = num_sms - 4, 2048
    config = sparse_decode_config(queries, 64, topk // TILE, num_sms)
    plan = split_plan(
        torch.full((queries,), topk), tile=TILE, fixed_cost=config.fixed_cost, num_workers=config.num_workers
    )
    assert int(plan.splits[-1]) == 0, "no unit is split, so nothing is to be combined"
    assert config.unsplit
    assert config.num_workers == queries


@GPUS
@pytest.mark.parametrize(
    ("queries", "h_q", "tiles"),
    [(4, 128, 16), (4, 64, 5), (1, 16, 30), (7, 64, 9), (1, 64, 128), (1, 64, 2), (9, 128, 2), (25, 64, 3)],
)
@pytest.mark.parametrize("plain", [False, True])
def test_few_equal_units_are_cut_alike(num_sms, queries, h_q, tiles, plain):
    config = sparse_decode_config(queries, h_q, tiles, num_sms, plain=plain)
    plan = split_plan(
        torch.full((queries,), tiles * TILE),
        tile=TILE,
        fixed_cost=config.fixed_cost,
        num_workers=config.num_workers,
    )
    pieces = list(plan.pieces([tiles] * queries))
    assert len({piece.worker for piece in pieces}) == len(pieces), "a worker starts once"
    longest = max(piece.end - piece.begin for piece in pieces)
    assert longest == -(-tiles // min(tiles, num_sms // config.row_tiles // queries))
    assert not config.unsplit


@pytest.mark.parametrize(
    ("queries", "tiles", "rows", "whole"),
    [(4, 2, 64, False), (66, 2, 64, True), (4, 2, 16, False), (33, 2, 16, True), (44, 3, 16, True), (44, 4, 64, False)],
)
def test_short_units_are_kept_whole_unless_there_are_few(queries, tiles, rows, whole):
    config = sparse_decode_config(queries, rows, tiles, H200, rows)
    assert config.unsplit == whole
    assert (config.num_workers == queries) == whole


@GPUS
def test_few_units_are_spread_over_the_gpu(num_sms):
    for queries, h_q in ((1, 16), (2, 128), (num_sms // 4, 64)):
        config = sparse_decode_config(queries, h_q, 1000, num_sms)
        assert config.num_workers > num_sms // config.row_tiles * 0.9


@GPUS
def test_lengths_that_only_the_device_knows_may_be_equal(num_sms):
    config = sparse_decode_config(num_sms - 4, 64, None, num_sms)
    assert (config.num_workers, config.even_workers) == (num_sms, num_sms - 4)
    config = sparse_decode_config(num_sms // 9, 64, None, num_sms)
    assert config.even_workers == num_sms // 9 * 9, "cut alike into many pieces"


@GPUS
@pytest.mark.parametrize(("shortest", "longest", "whole"), [(1700, 2048, True), (300, 640, True), (1, 2048, False)])
def test_units_of_similar_length_are_kept_whole(num_sms, shortest, longest, whole):
    queries = num_sms - 4
    config = sparse_decode_config(queries, 64, None, num_sms)
    plan = split_plan(
        torch.linspace(shortest, longest, queries).int(),
        tile=TILE,
        fixed_cost=config.fixed_cost,
        num_workers=config.num_workers,
        even_workers=config.even_workers,
        cut_cost=config.cut_cost,
        slack=config.slack,
    )
    assert (int(plan.splits[-1]) == 0) == whole
