"""The order of dense MHA's tiles on Hopper: its formulas, run on Python's integers instead of the device's."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest

pytest.importorskip("cutlass")

from flash_mla.backends.hopper import mha_schedule
from flash_mla.backends.hopper.mha_schedule import TILE_KV, TILE_Q, VISIT_Q, KeyTiles, QueryTiles


@pytest.fixture
def on_integers(monkeypatch):
    functions = SimpleNamespace(max=max, min=min, select_=lambda condition, a, b: a if condition else b)
    monkeypatch.setattr(mha_schedule, "cutlass", functions)
    monkeypatch.setattr(mha_schedule, "uniform", int)
    monkeypatch.setattr(mha_schedule, "Int32", int)


def query_tiles(s_q: int, s_kv: int, h_q: int, h_kv: int, causal: bool, tokens_in_l2: int) -> list:
    sequences = QueryTiles([7, 7 + s_q], [11, 11 + s_kv], h_q, h_kv, int(causal), tokens_in_l2)
    return [sequences.tile_of(0, number) for number in range(-(-s_q // TILE_Q) * h_q)]


def key_tiles(s_q: int, s_kv: int, h_q: int, h_kv: int, causal: bool, tokens_in_l2: int) -> list:
    sequences = KeyTiles([7, 7 + s_q], [11, 11 + s_kv], h_q, h_kv, int(causal), tokens_in_l2)
    return [sequences.tile_of(0, number) for number in range(-(-s_kv // TILE_KV) * h_kv)]


def random_call(seed: int) -> dict:
    rng = random.Random(seed)
    s_q, s_kv = (rng.choice([0, 1, 100, 128, 129, 384, 1000, rng.randrange(3000)]) for _ in range(2))
    h_kv = rng.choice([1, 2, 3, 8, 12])
    return {
        "s_q": s_q,
        "s_kv": s_kv,
        "h_q": h_kv * rng.choice([1, 2, 5]),
        "h_kv": h_kv,
        "causal": rng.random() < 0.5,
        "tokens_in_l2": rng.choice([1, 3000, 50_000]),
    }


@pytest.mark.usefixtures("on_integers")
@pytest.mark.parametrize("seed", range(200))
def test_every_row_of_every_head_once_with_the_keys_it_sees(seed):
    call = random_call(seed)
    s_q, s_kv, h_q, causal = call["s_q"], call["s_kv"], call["h_q"], call["causal"]
    tiles = query_tiles(**call)
    covered = sorted((tile.head, tile.q_row - 7 + i) for tile in tiles for i in range(tile.rows))
    assert covered == [(head, row) for head in range(h_q) for row in range(s_q)]
    for tile in tiles:
        first = tile.q_row - 7
        last = first + tile.rows - 1
        seen_by_last = s_kv - s_q + last + 1 if causal else s_kv
        assert first % TILE_Q == 0
        assert 0 < tile.rows <= TILE_Q
        assert (tile.kv_row, tile.seqlen_kv) == (11, s_kv)
        assert tile.seen == (s_kv - s_q + first + 1 if causal else s_kv)
        assert tile.tiles == -(-max(seen_by_last, 0) // TILE_KV)


@pytest.mark.usefixtures("on_integers")
@pytest.mark.parametrize("seed", range(200))
def test_every_key_of_every_kv_head_once_with_the_queries_that_see_it(seed):
    call = random_call(seed)
    s_q, s_kv, h_kv, causal = call["s_q"], call["s_kv"], call["h_kv"], call["causal"]
    tiles = key_tiles(**call)
    covered = sorted((tile.kv_head, tile.kv_row - 11 + i) for tile in tiles for i in range(tile.keys))
    assert covered == [(head, key) for head in range(h_kv) for key in range(s_kv)]
    for tile in tiles:
        first_key = tile.kv_row - 11
        assert first_key % TILE_KV == 0
        assert 0 < tile.keys <= TILE_KV
        assert (tile.q_row, tile.seqlen_qo) == (7, s_q)
        assert tile.blind == (max(0, s_q - s_kv) if causal else 0)
        visits = tile.tiles // (call["h_q"] // h_kv)
        visited = range(tile.first * VISIT_Q, min(s_q, (tile.first + visits) * VISIT_Q))
        for query in range(s_q):
            seen = s_kv - s_q + query + 1 if causal else s_kv
            assert (first_key < seen) == (query >= tile.sees_first)
            assert first_key >= seen or query in visited
        whole, end = tile.whole_visits()
        for visit in range(tile.first, tile.first + visits):
            last_row = visit * VISIT_Q + VISIT_Q - 1
            least_seen = s_kv - s_q + visit * VISIT_Q + 1 if causal else s_kv
            sees_all = last_row < s_q and tile.keys == TILE_KV and first_key + TILE_KV <= least_seen
            assert (whole <= visit < end) == sees_all


@pytest.mark.parametrize("seed", range(50))
def test_tiles_of_one_sequence_each_do_not_overlap(seed):
    rng = random.Random(seed)
    lengths = [rng.choice([0, 0, 1, 63, 64, 65, rng.randrange(500)]) for _ in range(rng.randrange(1, 20))]
    offsets = [0, *itertools.accumulate(lengths)]
    begins = [mha_schedule.first_tile(offset, i) for i, offset in enumerate(offsets)]
    for begin, end, length in zip(begins, begins[1:], lengths, strict=False):
        assert begin + -(-length // VISIT_Q) <= end
    assert begins[-1] == offsets[-1] // VISIT_Q + len(lengths), "as many as are allocated"


@pytest.mark.usefixtures("on_integers")
def test_heads_whose_keys_fit_l2_go_together_most_keys_first():
    tiles = query_tiles(1024, 1024, 24, 12, causal=True, tokens_in_l2=4 * 1024 + 100)
    groups = [tiles[i : i + 8 * 8] for i in range(0, len(tiles), 8 * 8)]  # 4 KV heads of 2 query heads, 8 row tiles
    for i, group in enumerate(groups):
        assert {tile.head for tile in group} == set(range(8 * i, 8 * i + 8))
        keys = [tile.tiles for tile in group]
        assert keys == sorted(keys, reverse=True)
