"""The order of dense MHA's tiles on Hopper: its formulas, run on Python's integers instead of the device's."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

pytest.importorskip("cutlass")

from flash_mla.backends.hopper import mha_schedule
from flash_mla.backends.hopper.mha_schedule import TILE_KV, TILE_Q, Sequences


@pytest.fixture
def on_integers(monkeypatch):
    functions = SimpleNamespace(max=max, min=min, select_=lambda condition, a, b: a if condition else b)
    monkeypatch.setattr(mha_schedule, "cutlass", functions)
    monkeypatch.setattr(mha_schedule, "uniform", int)
    monkeypatch.setattr(mha_schedule, "Int32", int)


def tiles_of(s_q: int, s_kv: int, h_q: int, h_kv: int, causal: bool, kv_in_l2: int) -> list:
    offsets_q, offsets_kv = [7, 7 + s_q], [11, 11 + s_kv]
    sequences = Sequences(offsets_q, offsets_kv, h_q, h_kv, int(causal), kv_in_l2)
    return [mha_schedule.tile_of(sequences, 0, number) for number in range(-(-s_q // TILE_Q) * h_q)]


@pytest.mark.usefixtures("on_integers")
@pytest.mark.parametrize("seed", range(200))
def test_every_row_of_every_head_once_with_the_keys_it_sees(seed):
    rng = random.Random(seed)
    s_q, s_kv = (rng.choice([0, 1, 100, 128, 129, 384, 1000, rng.randrange(3000)]) for _ in range(2))
    h_kv = rng.choice([1, 2, 3, 8, 12])
    h_q = h_kv * rng.choice([1, 2, 5])
    causal = rng.random() < 0.5
    tiles = tiles_of(s_q, s_kv, h_q, h_kv, causal, kv_in_l2=rng.choice([1, 3000, 50_000]))
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
def test_heads_whose_keys_fit_l2_go_together_most_keys_first():
    tiles = tiles_of(1024, 1024, 24, 12, causal=True, kv_in_l2=4 * 1024 + 100)
    groups = [tiles[i : i + 8 * 8] for i in range(0, len(tiles), 8 * 8)]  # 4 KV heads of 2 query heads, 8 row tiles
    for i, group in enumerate(groups):
        assert {tile.head for tile in group} == set(range(8 * i, 8 * i + 8))
        keys = [tile.tiles for tile in group]
        assert keys == sorted(keys, reverse=True)
