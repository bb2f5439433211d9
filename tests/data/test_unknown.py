"""A split that is written otherwise than the training rows is told of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchrec_hilomoe.data import DataConfig, open_data, open_encoded

MakeConfig = Callable[..., DataConfig]

SCHEMA = {
    "categorical": ["user", "flag", {"name": "hashed", "hash_size": 5}],
    "multi_valued": ["tags"],
}


def write(path: Path, **columns: list[Any]) -> Path:
    size = len(columns["user"])
    given = {"label": [i % 2 for i in range(size)], "hashed": [*map(str, range(size))]}
    pq.write_table(pa.table({**given, **columns}), path)
    return path


def train_file(folder: Path) -> Path:
    tags = [["a", "b"]] * 200
    flags = ["true"] * 150 + ["false"] * 50
    return write(folder / "train.parquet", user=[*range(200)], flag=flags, tags=tags)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [r for r in caplog.records if r.levelno == logging.WARNING]
    return [record.getMessage() for record in records]


def test_a_column_without_known_values_is_told_of_once(
    tmp_path: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    valid = write(
        tmp_path / "valid.parquet",
        user=[*range(200)],
        flag=["True", "False", None, "true"] + ["True"] * 196,
        tags=[["A"]] * 60 + [["B", "A"]] * 140,
    )
    config = make_config(train_file(tmp_path), SCHEMA, valid=str(valid))
    for rank in range(2):
        open_data(config, rank=rank, world_size=2, seed=0)
    assert warnings(caplog) == [
        f"data.valid: nearly all values of {valid} are unknown to the model; are they written as "
        "in the training data? column 'flag': 99.5% of 199 values, such as 'True' (the "
        "vocabulary has 'true'); column 'tags': 100.0% of 340 values, such as 'A' (the vocabulary "
        "has 'a')"
    ]


@pytest.mark.parametrize(
    ("users", "flags"),
    [
        ([*range(3, 203)], ["true"] * 200),
        ([*range(197, 397)], ["true"] * 200),  # 98.5 %
        ([*range(1000, 1099), *[None] * 101], ["true"] * 200),  # too few to say
    ],
)
def test_new_values_among_known_ones_are_no_surprise(
    tmp_path: Path,
    make_config: MakeConfig,
    caplog: pytest.LogCaptureFixture,
    users: list[int | None],
    flags: list[str],
) -> None:
    valid = write(tmp_path / "valid.parquet", user=users, flag=flags, tags=[["a"]] * 200)
    config = make_config(train_file(tmp_path), SCHEMA, valid=str(valid))
    open_data(config, rank=0, world_size=1, seed=0)
    assert warnings(caplog) == []


def test_a_vocabulary_that_is_empty_and_the_training_rows_themselves(
    tmp_path: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    rare = {"categorical": [{"name": "user", "min_count": 2}]}
    train = train_file(tmp_path)
    source = open_data(make_config(train, rare), rank=0, world_size=1, seed=0)
    assert warnings(caplog) == []
    source.save(tmp_path / "model")
    test = write(tmp_path / "test.parquet", user=[*range(100, 300)])
    open_encoded(
        tmp_path / "model", str(test), batch_size=4, rank=0, world_size=1, cache_dir=str(tmp_path)
    )
    (warning,) = warnings(caplog)
    assert warning.startswith(f"data.test: nearly all values of {test} are unknown")
    assert warning.endswith(
        "column 'user': 100.0% of 200 values, such as '100' (the vocabulary is empty)"
    )
