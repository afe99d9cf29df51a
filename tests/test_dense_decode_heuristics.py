"""The layout of dense decode on a GPU: plain functions of shapes, for GPUs of several sizes."""

import pytest

from flash_mla.backends.hopper.dense_decode_heuristics import (
    BLOCK,
    BOXES,
    FEW_ROWS,
    LEAST_BUSY,
    ROWS,
    TILE,
    box_of_pages,
    dense_decode_config,
    even_workers,
    gathers,
)

H200, H800_PCIE, H20 = 132, 114, 78  # SMs
GPUS = pytest.mark.parametrize("num_sms", [H200, H800_PCIE, H20])


@GPUS
def test_every_row_is_covered_and_no_sm_counted_twice(num_sms):
    for rows in range(1, 2001):
        config = dense_decode_config(rows, rows % 300 + 1, num_sms)
        assert config.unit_rows * config.passes >= rows, rows
        assert config.unit_rows * (config.passes - 1) < rows, f"{rows} rows: a pass without rows"
        assert config.num_workers >= 1, rows
        assert config.num_workers * config.row_tiles <= num_sms, rows
        assert config.cluster in (1, 2), f"{rows} rows: a kernel is compiled for no other cluster"
        assert config.row_tiles % config.cluster == 0, rows
        assert config.unit_rows == config.row_tiles * config.rows, rows
        assert config.min_cost >= 1, rows
        assert 1 <= config.even_workers <= config.num_workers, rows


@GPUS
def test_few_sms_are_left_idle(num_sms):
    for rows in range(1, 2001):
        config = dense_decode_config(rows, rows % 300 + 1, num_sms)
        tiles = -(-rows // config.rows)
        sms_at_work = tiles / (config.passes * config.row_tiles) * config.num_workers * config.row_tiles
        # Reading KV once for two tiles of rows takes an SM less than half the time, which pays for idle ones.
        assert sms_at_work > num_sms / 2, rows


@GPUS
@pytest.mark.parametrize(
    ("rows", "row_tiles", "cluster"),
    [
        (16, 1, 1),  # 128 heads over 8 GPUs
        (64, 1, 1),
        (128, 2, 2),  # all heads of DeepSeek-V3
    ],
)
def test_typical_calls(num_sms, rows, row_tiles, cluster):
    config = dense_decode_config(rows, 1, num_sms)
    assert (config.row_tiles, config.cluster, config.passes) == (row_tiles, cluster, 1)
    assert config.num_workers == num_sms // row_tiles


@pytest.mark.parametrize(
    ("rows", "padded", "tile"),
    [(1, 16, BLOCK), (16, 16, BLOCK), (17, 32, BLOCK), (32, 32, BLOCK), (33, ROWS, TILE), (64, ROWS, TILE)],
)
def test_few_rows_are_not_padded_to_a_whole_tile(rows, padded, tile):
    config = dense_decode_config(rows, 1, H200)
    assert (config.rows, config.tile, config.passes) == (padded, tile, 1)
    assert config.swapped == (padded in FEW_ROWS), "a kernel is compiled for no other number"


@pytest.mark.parametrize("rows", [1, 16, 32, 64, 128])
def test_small_boxes_are_loaded_by_the_kernel_of_whole_tiles(rows):
    for box in BOXES[1:]:
        config = dense_decode_config(rows, 1, H200, box)
        assert (config.swapped, config.rows, config.tile, config.box) == (False, ROWS, TILE, box)
        assert config.cluster == (2 if rows == 128 else 1)


@pytest.mark.parametrize(
    ("s_q", "h_q", "h_kv", "page_size", "expected"),
    [
        (1, 16, 1, 64, False),  # few rows have a kernel of their own
        (1, 64, 1, 64, True),
        (1, 128, 1, 64, False),  # a cluster shares K
        (2, 32, 1, 64, False),  # rows of two query tokens are packed
        (1, 16, 1, 16, True),
        (1, 128, 1, 16, False),
        (2, 16, 1, 16, False),
        (1, 2, 2, 16, False),
        (1, 16, 1, 1, True),
        (3, 128, 1, 7, True),
        (2, 16, 1, 7, False),
        (1, 2, 2, 7, False),
    ],
)
def test_kv_is_gathered_where_rows_need_no_packing(s_q, h_q, h_kv, page_size, expected):
    assert gathers(s_q, h_q, h_kv, page_size) is expected


def test_two_tokens_of_all_heads_share_a_read_of_kv_where_sms_divide_by_four():
    config = dense_decode_config(256, 1, H200)
    assert (config.row_tiles, config.cluster, config.passes, config.num_workers) == (4, 2, 1, 33)
    # Elsewhere four side by side would leave two SMs idle: two, taking two turns, are as fast at compute.
    for num_sms in (H800_PCIE, H20):
        config = dense_decode_config(256, 100, num_sms)
        assert (config.row_tiles, config.cluster, config.passes, config.num_workers) == (2, 2, 2, num_sms // 2)


@pytest.mark.parametrize(("requests", "workers"), [(1, 66), (4, 64), (16, 64), (17, 66), (66, 66), (128, 66)])
def test_all_heads_of_few_requests_are_cut_alike(requests, workers):
    assert dense_decode_config(128, requests, H200).num_workers == workers


def test_more_rows_than_a_gpu_holds_take_more_passes():
    config = dense_decode_config(ROWS * 1000, 1, H20)
    assert config.passes > 1
    assert config.row_tiles * config.passes >= 1000


@pytest.mark.parametrize(
    ("units", "workers"), [(1, 132), (2, 132), (4, 132), (32, 128), (64, 128), (66, 132), (128, 128), (131, 131)]
)
def test_workers_share_few_equal_units_evenly(units, workers):
    assert even_workers(units, H200) == workers
    assert workers % units == 0


@pytest.mark.parametrize(("units", "workers"), [(256, 128), (264, 132), (500, 125), (1000, 125)])
def test_many_equal_units_are_cut_between_them(units, workers):
    assert even_workers(units, H200) == workers
    assert units % workers == 0


@pytest.mark.parametrize("units", [70, 80, 100, 133, 150])
def test_no_sm_is_left_idle_for_evenness_beyond_what_hbm_forgives(units):
    assert even_workers(units, H200) == H200


def test_even_workers_are_never_too_few_nor_too_many():
    for num_workers in (1, 78, 114, 132):
        for units in range(1, 1000):
            assert LEAST_BUSY * num_workers <= even_workers(units, num_workers) <= num_workers


@pytest.mark.parametrize(
    ("rows", "requests", "workers", "even"),
    [(64, 128, 128, 128), (64, 256, 132, 128), (16, 256, 132, 128), (128, 128, 66, 64), (128, 120, 66, 66)],
)
def test_of_many_units_equal_ones_alone_leave_sms_idle(rows, requests, workers, even):
    config = dense_decode_config(rows, requests, H200)
    assert (config.num_workers, config.even_workers) == (workers, even)


def test_few_units_of_few_rows_leave_fewer_sms_idle():
    for rows, workers in ((16, 132), (64, 120)):
        config = dense_decode_config(rows, 20, H200)
        assert (config.num_workers, config.even_workers) == (workers, workers)


def test_boxes_fit_into_pages_and_tiles():
    for page_size in range(1, 1000):
        box = box_of_pages(page_size)
        fitting = [size for size in BOXES if page_size % size == 0]
        assert box == (max(fitting) if fitting else None), page_size
        assert (box is None) == (page_size % 8 != 0), page_size
    for box in BOXES:
        assert TILE // 2 % box == 0, "a block of a tile is whole boxes"
        assert box % 8 == 0, "a box begins where the pattern of its swizzle does"
        assert TILE // box <= 32, "a lane of the warp that loads K for each box of a tile"
