"""The Triton backend's choice of tiles and splits, by shapes alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_mla.backends.triton.heuristics import (
    INVARIANT_SHARE,
    Gpu,
    combine_tile,
    dense_decode_config,
    gpu_of_arch,
    sparse_config,
    tiles_for,
)

H200 = gpu_of_arch(9, 0, num_sms=132)
GPUS = [H200] + [gpu_of_arch(*arch, num_sms=100) for arch in ((8, 0), (8, 6), (8, 9), (10, 0), (12, 0))]
gpus = st.sampled_from(GPUS)


def test_gpus_differ_in_shared_memory_and_fp8():
    assert [gpu.shared_memory >> 10 for gpu in GPUS] == [227, 163, 99, 99, 227, 99]
    assert [gpu.has_fp8 for gpu in GPUS] == [True, False, False, True, True, True]
    assert [gpu.has_wgmma for gpu in GPUS] == [True, False, False, False, False, False]


@given(st.integers(1, 2000), gpus, st.booleans())
def test_the_programs_of_an_sm_fit(rows, gpu, quantised):
    tiles = tiles_for(rows, gpu, quantised=quantised)
    # One stage of loads is under way in registers or, where matrix products read shared memory by themselves, in use.
    buffers = tiles.num_stages - (0 if gpu.has_wgmma and tiles.rows == 64 else 1)
    assert tiles.programs_per_sm * (tiles.rows + buffers * tiles.tile) * 576 * 2 <= gpu.shared_memory
    assert tiles.rows * 512 * 4 <= gpu.shared_memory, "the output passes through it on its way out"
    assert tiles.rows * 512 <= tiles.num_warps * 32 * 128, "at most half of a thread's registers hold the output"


@given(st.integers(1, 2000), gpus, st.booleans())
def test_every_row_is_in_one_tile(rows, gpu, quantised):
    config = dense_decode_config(rows, gpu, quantised=quantised)
    assert config.unit_rows * config.passes >= rows
    assert config.unit_rows * (config.passes - 1) < rows
    assert config.num_workers >= 1
    assert config.num_workers * config.row_tiles <= gpu.num_sms * config.tiles.programs_per_sm


def test_128_heads_share_kv_in_l2_and_fill_an_h200():
    config = dense_decode_config(128, H200, quantised=False)
    assert (config.tiles.rows, config.row_tiles, config.passes, config.num_workers) == (64, 2, 1, 66)


@given(
    h_q=st.integers(1, 200),
    num_units=st.integers(1, 5000),
    topk=st.integers(0, 20_000),
    extra_topk=st.integers(0, 2000),
    gpu=gpus,
)
def test_no_range_of_indices_is_empty_when_all_count(h_q, num_units, topk, extra_topk, gpu):
    config = sparse_config(h_q, num_units, topk, extra_topk, gpu, quantised=True)
    assert config.unit_rows >= h_q
    num_tiles = -(-topk // config.tiles.tile) - (-extra_topk // config.tiles.tile)
    assert 1 <= config.splits <= max(1, num_tiles)


@pytest.mark.parametrize("gpu", GPUS)
def test_many_query_tokens_are_not_split_and_few_are(gpu):
    assert sparse_config(128, 4096, 2048, 0, gpu, quantised=False).splits == 1
    config = sparse_config(16, 1, 2048, 0, gpu, quantised=False)
    assert config.splits > 10


@given(st.integers(1, 200), st.integers(0, 20_000), st.integers(0, 2000), st.lists(st.integers(1, 5000), min_size=2))
def test_a_batch_invariant_split_depends_on_the_query_token_alone(h_q, topk, extra_topk, batches):
    configs = [sparse_config(h_q, n, topk, extra_topk, H200, quantised=True, batch_invariant=True) for n in batches]
    assert len(set(configs)) == 1
    tiles = -(-topk // configs[0].tiles.tile) - (-extra_topk // configs[0].tiles.tile)
    assert configs[0].splits == max(1, -(-tiles // INVARIANT_SHARE))


@given(st.integers(1, 1 << 20), st.booleans())
def test_combine_reads_some_slots_of_some_rows(num_rows, batch_invariant):
    rows, slots = combine_tile(num_rows, batch_invariant=batch_invariant)
    assert rows * slots <= 16
    if batch_invariant:
        assert (rows, slots) == combine_tile(1, batch_invariant=True), "sums in an order of their own"


def test_an_unknown_gpu_gets_the_least_shared_memory():
    assert gpu_of_arch(13, 0, num_sms=10) == Gpu(10, 99 << 10, has_fp8=True, has_wgmma=False)
