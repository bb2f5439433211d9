"""What cannot be opened, and what the error says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchrec_hilomoe.data import DataConfig, DataSource, open_data, open_encoded
from torchrec_hilomoe.data.criteo import CriteoEncoder
from torchrec_hilomoe.errors import ConfigError, DataError

MakeConfig = Callable[..., DataConfig]

SCHEMA = {"dense": ["price"], "categorical": ["user"]}
EIGHT_ROWS = "label,price,user\n" + "".join(f"{i % 2},{i},{i % 3}\n" for i in range(8))


def opened(config: DataConfig, **ranks: int) -> DataSource:
    return open_data(config, **{"rank": 0, "world_size": 1, "seed": 0, **ranks})


def test_a_folder_without_an_encoder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"encoder\.json: cannot be read"):
        open_encoded(tmp_path, "x.csv", batch_size=4, rank=0, world_size=1)
    (tmp_path / "encoder.json").write_text('{"kind": "tabular", "format_version": 0}')
    with pytest.raises(DataError, match=r"encoder\.json: has the format version 0.*train again"):
        open_encoded(tmp_path, "x.csv", batch_size=4, rank=0, world_size=1)


def test_what_is_neither_raise_nor_skip(tmp_path: Path) -> None:
    """It left bad rows out."""
    with pytest.raises(ConfigError, match=r"data\.on_bad_row: .* got 'Raise'"):
        open_encoded(tmp_path, "x.csv", batch_size=4, rank=0, world_size=1, on_bad_row="Raise")


def test_vocabularies_from_elsewhere(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "t.csv").write_text(EIGHT_ROWS)
    config = make_config(tmp_path / "t.csv", SCHEMA, vocabularies_from=str(tmp_path))
    key = rf"^data\.vocabularies_from={tmp_path}: "
    with pytest.raises(
        DataError, match=key + r"name the folder encoder of a checkpoint; .*cannot be"
    ):
        opened(config)
    CriteoEncoder([5] * 26).save(tmp_path)
    with pytest.raises(ConfigError, match=key + r"data of criteo_1tb have no vocabularies"):
        opened(config)
    plain = make_config(tmp_path / "t.csv", SCHEMA)
    opened(plain).save(tmp_path)
    (tmp_path / "vocabularies.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=key + r".*\(A run that is resumed may take its own, "):
        opened(config)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([{"name": "user", "hash_size": 3}], "user: hashed there and not here, or here and not"),
        (["price"], "has no vocabulary of a column of data.schema"),
    ],
)
def test_vocabularies_of_other_columns(
    tmp_path: Path, make_config: MakeConfig, columns: list[Any], message: str
) -> None:
    (tmp_path / "t.csv").write_text(EIGHT_ROWS)
    opened(make_config(tmp_path / "t.csv", {"categorical": columns})).save(tmp_path)
    schema = {"categorical": ["user"]}
    config = make_config(tmp_path / "t.csv", schema, vocabularies_from=str(tmp_path))
    with pytest.raises(ConfigError, match=rf"^data\.vocabularies_from={tmp_path}: {message}"):
        opened(config)


BAD_FILES = [
    ("label,user\n1,a\n2,b\n", r"t\.csv: row 2 \(line 3\), column 'label', value '2': the label"),
    ("label,user\n", r"data\.train: no usable row in .*t\.csv"),
    ("label,user", r"data\.train: no usable row in .*t\.csv"),
    (
        f"label,user\n1,{'x' * 200_000}\n7,b\n",
        r"t\.csv: row 2 \(line 3\), column 'label', value '7': the label is not 0 or 1",
    ),
    ("", r"t\.csv: the file is empty"),
    ("label,usr\n1,a\n", r"t\.csv: no column 'user'; it has 'label', 'usr'\. Did you mean 'usr'"),
    ("label,user\n1,a,b\n", r"t\.csv: row 1 \(line 2\): 3 fields where 2 were expected"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_bad_files(tmp_path: Path, make_config: MakeConfig, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    config = make_config(tmp_path / "t.csv", {"categorical": ["user"]})
    for _ in range(2):  # nothing of the failure is cached
        with pytest.raises(DataError, match=message):
            opened(config)


def test_nothing_left_after_skipping(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "t.csv").write_text("label,user\n3,a\n4,b\n")
    config = make_config(tmp_path / "t.csv", {"categorical": ["user"]}, on_bad_row="skip")
    with pytest.raises(DataError, match=r"no usable row in .*t\.csv \(2 because the label is not"):
        opened(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": None}, r"data\.train: required for data\.source=tabular"),
        ({"source": "synthetic"}, r"data\.train: data\.source=synthetic makes its own files"),
        ({"source": "movielens100k", "valid": "v"}, r"data\.valid: data\.source=movielens100k"),
        ({"schema": {"dense": ["price"]}}, r"data\.schema: names no categorical and no multi"),
        ({"source": "criteo_1tb"}, r"data\.hash_sizes: required"),
        (
            {"source": "criteo_1tb", "vocabularies_from": "v"},
            r"data\.vocabularies_from: the ids of data\.source=criteo_1tb are taken modulo",
        ),
    ],
)
def test_configurations_that_do_not_fit(
    tmp_path: Path, make_config: MakeConfig, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "t.csv").write_text(EIGHT_ROWS)
    values = {"train": tmp_path / "t.csv", "schema": SCHEMA, **change}
    config = make_config(values.pop("train"), values.pop("schema"), **values)
    with pytest.raises(ConfigError, match=message):
        opened(config)


def test_batch_sizes_that_ranks_cannot_fill(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "t.csv").write_text(EIGHT_ROWS)
    for batch_size, world_size in ((5, 2), (2, 4)):
        config = make_config(tmp_path / "t.csv", SCHEMA, batch_size=batch_size)
        for rank in range(world_size):
            with pytest.raises(
                ConfigError, match=rf"data\.batch_size: {batch_size} rows .*multiple"
            ):
                opened(config, rank=rank, world_size=world_size)
    config = make_config(tmp_path / "t.csv", SCHEMA, batch_size=50)
    for rank in range(5):
        with pytest.raises(ConfigError, match=r"data\.batch_size: the 8 rows of data\.train"):
            opened(config, rank=rank, world_size=5)
    assert len(opened(config, world_size=2).loader("train")) == 1
