from __future__ import annotations

import numpy as np
import pytest

from torchrec_hilomoe.data import order as order_module
from torchrec_hilomoe.data.order import EpochOrder, Shard


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "CHUNK_ROWS", 16)


def sequence(order: EpochOrder) -> list[int]:
    return np.concatenate(list(order.windows())).tolist()


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 100, 160])
@pytest.mark.parametrize("window", [1, 24, 1000])
def test_every_row_comes_once(rows: int, window: int) -> None:
    shuffled = EpochOrder(rows, 8, window, seed=(3, 0))
    assert sorted(sequence(shuffled)) == list(range(rows))
    assert sequence(EpochOrder(rows, 8, window)) == list(range(rows))


def test_windows_hold_whole_batches() -> None:
    sizes = [len(w) for w in EpochOrder(100, 8, window_rows=30, seed=(0, 0)).windows()]
    assert sizes == [24, 24, 24, 24, 4]


def test_the_order_is_of_seed_and_epoch() -> None:
    orders = {
        seed: tuple(sequence(EpochOrder(160, 8, 32, seed))) for seed in [(0, 0), (0, 1), (1, 0)]
    }
    assert len(set(orders.values())) == 3
    assert orders[0, 1] == tuple(sequence(EpochOrder(160, 8, 32, (0, 1))))


def test_windows_are_permuted_differently() -> None:
    windows = list(EpochOrder(160, 16, window_rows=16, seed=(0, 0)).windows())
    within = {tuple((window % 16).tolist()) for window in windows}
    assert len(within) == len(windows) == 10


def test_a_window_as_large_as_the_data_mixes_all_rows() -> None:
    places = np.mean([sequence(EpochOrder(160, 8, 160, (seed, 0))) for seed in range(400)], axis=0)
    # Every place sees every row alike: means of 400 uniform draws from 0..159.
    assert np.abs(places - 79.5).max() < 5 * 46.2 / np.sqrt(400)


def test_a_small_window_still_mixes_the_chunks() -> None:
    first = {sequence(EpochOrder(160, 8, 16, (seed, 0)))[0] // 16 for seed in range(60)}
    assert first == set(range(10))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", range(1, 13))
def test_parts_of_a_batch(world_size: int, rows: int) -> None:
    shards = [Shard(12, rank, world_size) for rank in range(world_size)]
    padded = [shard.part_of(rows, drop_rest=False) for shard in shards]
    assert len({len(part) for part in padded}) == 1
    assert [i for part in padded for i in part if i < rows] == list(range(rows))
    cut = [shard.part_of(rows, drop_rest=True) for shard in shards]
    assert len({len(part) for part in cut}) == 1
    kept = [i for part in cut for i in part]
    assert kept == list(range(rows // world_size * world_size if rows >= 2 * world_size else 0))
