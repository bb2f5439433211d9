from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from torchrec_hilomoe.config import parse_config
from torchrec_hilomoe.data import DataConfig, DataSource, open_data
from torchrec_hilomoe.training.stream import BatchStream


@pytest.fixture
def open_rank(tmp_path) -> Callable[[int], DataSource]:
    """50 rows in batches of 8: six full ones and one of two rows an epoch; for rank 0 of some."""
    rows = "".join(f"{i % 2},u{i}\n" for i in range(50))
    (tmp_path / "train.csv").write_text("label,user\n" + rows)
    values = {
        "train": str(tmp_path / "train.csv"),
        "schema": {"categorical": ["user"]},
        "batch_size": 8,
        "cache_dir": str(tmp_path / "cache"),
    }
    config = parse_config(DataConfig, values)
    return lambda ranks: open_data(config, rank=0, world_size=ranks, seed=0)


@pytest.fixture
def data(open_rank) -> DataSource:
    return open_rank(1)


def _ids(batch) -> torch.Tensor:
    return batch.sparse_features.values()


@pytest.mark.parametrize("taken", [0, 1, 6, 7, 8, 20])
def test_a_stream_from_a_position_is_the_rest_of_the_whole_one(data, taken):
    whole, expected = BatchStream(data), BatchStream(data)
    for _ in range(taken):
        next(whole)
        next(expected)
    resumed = BatchStream(data, whole.epoch, whole.position)
    for actual, wanted in zip(
        itertools.islice(resumed, 16), itertools.islice(expected, 16), strict=True
    ):
        assert torch.equal(_ids(actual), _ids(wanted))
    assert (resumed.epoch, resumed.position) == (expected.epoch, expected.position)


def test_an_epoch_that_ended_on_more_batches_goes_on_with_the_next(open_rank):
    """The last batch has two rows: enough for one rank, dropped on two."""
    ended = BatchStream(open_rank(1))
    for _ in range(7):
        next(ended)
    resumed, expected = BatchStream(open_rank(2), ended.epoch, ended.position), open_rank(2)
    assert resumed.batches_per_epoch == 6
    assert resumed.until_evaluation(1) == 6
    for actual, wanted in zip(resumed, expected.loader("train", epoch=1), strict=False):
        assert torch.equal(_ids(actual), _ids(wanted))
        if resumed.position == 6:
            break
    assert (resumed.epoch, resumed.position) == (1, 6)


def test_evaluation_points_are_spread_over_the_epoch(data):
    stream = BatchStream(data)
    assert stream.batches_per_epoch == 7
    distances = []
    for _ in range(14):
        distances.append(stream.until_evaluation(2))
        next(stream)
    assert distances == [4, 3, 2, 1, 3, 2, 1] * 2
