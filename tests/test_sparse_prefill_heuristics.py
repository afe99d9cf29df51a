"""The layout of sparse prefill on a GPU: plain functions of shapes, for GPUs of several sizes."""

import pytest

from flash_mla.backends.hopper.sparse_prefill_heuristics import ROWS, TILE, is_short, sparse_prefill_config

H200, H800_PCIE, H20 = 132, 114, 78  # SMs
GPUS = pytest.mark.parametrize("num_sms", [H200, H800_PCIE, H20])
SHAPES = [
    (s_q, h_q, topk)
    for s_q in (1, 2, 5, 64, 77, 78, 131, 132, 133, 264, 1000, 4096, 70_001)
    for h_q in (1, 16, 64, 65, 128, 200)
    for topk in (1, 128, 129, 512, 2048, 100_000)
]


@GPUS
def test_every_unit_is_taken_once(num_sms):
    for s_q, h_q, topk in SHAPES:
        config = sparse_prefill_config(s_q, h_q, topk, num_sms)
        head_tiles = -(-h_q // ROWS)
        assert 1 <= config.workers <= num_sms, (s_q, h_q, topk)
        assert 0 <= config.whole_tokens <= s_q, (s_q, h_q, topk)
        assert config.split_units == (s_q - config.whole_tokens) * head_tiles, (s_q, h_q, topk)
        assert 1 <= config.splits <= max(1, -(-topk // TILE)), (s_q, h_q, topk)
        assert (config.splits > 1) == (config.split_units > 0), f"{(s_q, h_q, topk)}: pieces are merged for nothing"
        assert config.slots == config.split_units * config.splits


@GPUS
def test_no_worker_is_without_work(num_sms):
    for s_q, h_q, topk in SHAPES:
        config = sparse_prefill_config(s_q, h_q, topk, num_sms)
        pieces = config.whole_tokens * -(-h_q // ROWS) + config.slots
        assert config.workers <= pieces, (s_q, h_q, topk)


@GPUS
def test_splits_shorten_the_longest_share(num_sms):
    for s_q, h_q, topk in SHAPES:
        config = sparse_prefill_config(s_q, h_q, topk, num_sms)
        tiles, head_tiles = -(-topk // TILE), -(-h_q // ROWS)
        unsplit = -(-s_q * head_tiles // num_sms) * tiles
        rounds = -(-config.slots // num_sms)
        split = config.whole_tokens * head_tiles // num_sms * tiles + rounds * -(-tiles // config.splits)
        assert config.splits == 1 or split < unsplit, (s_q, h_q, topk)


def test_few_tokens_use_the_whole_gpu():
    config = sparse_prefill_config(1, 128, 2048, H200)
    assert (config.whole_tokens, config.splits, config.workers) == (0, 16, 32)
    config = sparse_prefill_config(32, 16, 2048, H200)
    assert (config.whole_tokens, config.splits, config.workers) == (0, 4, 128)


def test_merging_many_short_pieces_does_not_pay():
    for s_q, h_q, topk, splits in (
        (32, 64, 512, 1), (64, 64, 512, 1), (64, 64, 256, 1),
        (16, 128, 1024, 3), (33, 128, 2048, 2), (64, 64, 2048, 2),
    ):  # fmt: skip
        assert sparse_prefill_config(s_q, h_q, topk, H200).splits == splits, (s_q, h_q, topk)


def test_combine_is_left_room():
    assert sparse_prefill_config(8, 16, 2048, H200).workers == 64


def test_a_full_gpu_is_not_split():
    config = sparse_prefill_config(128, 16, 2048, H200)
    assert (config.whole_tokens, config.splits, config.slots, config.workers) == (128, 1, 0, 128)


def test_what_is_left_over_is_split():
    config = sparse_prefill_config(4096, 128, 2048, H200)
    assert config.whole_tokens == 4096 * 2 // H200 * H200 // 2
    assert config.slots <= H200


def test_tokens_are_listed_where_lengths_differ_and_an_order_helps():
    for s_q, h_q, topk, has_lengths, listed in (
        (300, 64, 512, True, True),
        (150, 128, 300, True, True),
        (150, 64, 512, True, True),
        (132, 64, 2048, True, False),  # one round
        (66, 128, 2048, True, False),
        (300, 64, 128, True, False),  # one tile each
        (300, 64, 512, False, False),  # looking for lengths takes too long
        (4096, 64, 512, False, False),
        (4096, 64, 2048, False, True),
        (1024, 128, 2048, False, True),
    ):
        config = sparse_prefill_config(s_q, h_q, topk, H200, has_lengths=has_lengths)
        assert (config.length_bits > 0) == listed, (s_q, h_q, topk)
        assert config.finds_lengths == (listed and not has_lengths), (s_q, h_q, topk)


@GPUS
def test_words_of_a_list_hold_every_token_and_length(num_sms):
    for s_q, h_q, topk in [*SHAPES, (2**20, 8, 2047), (2**20, 8, 2048), (2**26, 8, 31), (2**27, 1, 2048)]:
        for has_lengths in (True, False):
            config = sparse_prefill_config(s_q, h_q, topk, num_sms, has_lengths=has_lengths)
            if config.length_bits:
                assert topk < 1 << config.length_bits
                assert ((s_q - 1) << config.length_bits) + topk < 1 << 31
                assert config.round_tokens * -(-h_q // ROWS) <= max(num_sms, -(-h_q // ROWS))


def test_a_list_changes_no_split():
    for s_q, h_q, topk in SHAPES:
        plain, listed = (sparse_prefill_config(s_q, h_q, topk, H200, has_lengths=has) for has in (False, True))
        assert (plain.workers, plain.whole_tokens, plain.splits) == (listed.workers, listed.whole_tokens, listed.splits)


def test_short_calls_take_less_code():
    for s_q, h_q, topk, short in (
        (1, 128, 2048, True), (16, 128, 2048, True), (132, 128, 512, True), (200, 128, 512, True), (300, 64, 512, True),
        (64, 128, 2048, False), (132, 64, 2048, False), (512, 64, 1024, False), (4096, 64, 512, False),
    ):  # fmt: skip
        assert is_short(s_q, h_q, topk, H200) == short, (s_q, h_q, topk)
