"""Files without labels are read where predictions alone are wanted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchrec_hilomoe.data import CTRBatch, DataConfig, DataSource, open_data, open_encoded
from torchrec_hilomoe.errors import DataError

RowsOf = Callable[[CTRBatch], list[tuple[Any, ...]]]
MakeConfig = Callable[..., DataConfig]

SCHEMA = {"label": "bought", "dense": ["x"], "categorical": ["user"], "group": "session"}
COLUMNS = {
    "bought": [1, 0, 1, 0, 1],
    "x": [1.0, 2.0, 3.0, 4.0, 5.0],
    "user": ["a", "b", "a", "c", "b"],
    "session": [1, 1, 1, 2, 2],
}


def write(path: Path, names: list[str], header: bool = True) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table(COLUMNS).select(names), path)
        return path
    lines = [",".join(map(str, row)) for row in zip(*(COLUMNS[n] for n in names), strict=True)]
    path.write_text("\n".join([",".join(names)] * header + lines) + "\n")
    return path


@pytest.fixture
def model(tmp_path: Path, make_config: MakeConfig) -> Path:
    config = make_config(write(tmp_path / "train.csv", [*COLUMNS]), SCHEMA)
    open_data(config, rank=0, world_size=1, seed=0).save(tmp_path / "model")
    return tmp_path / "model"


def scored(model: Path, *files: Path, **options: Any) -> DataSource:
    return open_encoded(
        model,
        [str(file) for file in files],
        batch_size=4,
        rank=0,
        world_size=1,
        cache_dir=str(model.parent / "cache"),
        **options,
    )


def encoded(source: DataSource, rows_of: RowsOf) -> list[tuple[Any, ...]]:
    rows = [row for batch in source.loader("test") for row in rows_of(batch)]
    return rows[: source.report["rows"]["test"]]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_features_are_those_of_the_labelled_file(
    tmp_path: Path, model: Path, rows_of: RowsOf, suffix: str
) -> None:
    labelled = scored(model, write(tmp_path / f"with.{suffix}", [*COLUMNS]))
    source = scored(model, write(tmp_path / f"without.{suffix}", ["user", "x"]))
    assert (labelled.has_labels("test"), source.has_labels("test")) == (True, False)
    rows = encoded(source, rows_of)
    assert np.isnan([row[0] for row in rows]).all()
    assert [row[1:3] for row in rows] == [row[1:3] for row in encoded(labelled, rows_of)]


def test_bad_features_are_left_out_all_the_same(tmp_path: Path, model: Path) -> None:
    (tmp_path / "t.csv").write_text("user,x\na,1\nb,oops\nc\na,2\n")
    source = scored(model, tmp_path / "t.csv", on_bad_row="skip")
    assert source.positions("test").tolist() == [0, 3]
    with pytest.raises(DataError, match=r"t\.csv: row 3 \(line 4\): 1 fields where 2 were"):
        scored(model, tmp_path / "t.csv")


def test_files_without_a_header_have_labels_unless_they_are_said_to_have_none(
    tmp_path: Path, make_config: MakeConfig, rows_of: RowsOf
) -> None:
    labelled = write(tmp_path / "with.csv", [*COLUMNS], header=False)
    config = make_config(labelled, SCHEMA, column_names=[*COLUMNS])
    open_data(config, rank=0, world_size=1, seed=0).save(tmp_path / "model")
    without = write(tmp_path / "without.csv", [*COLUMNS][1:], header=False)
    with pytest.raises(DataError, match=r"without\.csv: row 1 \(line 1\): 3 fields where 4 were"):
        scored(tmp_path / "model", without)
    sources = [
        scored(tmp_path / "model", labelled),
        scored(tmp_path / "model", without, labels=False),
    ]
    assert [source.has_labels("test") for source in sources] == [True, False]
    features = [[row[1:3] for row in encoded(source, rows_of)] for source in sources]
    assert features[0] == features[1]


def test_what_is_said_of_labels_counts_for_files_with_a_header(tmp_path: Path, model: Path) -> None:
    assert not scored(model, tmp_path / "train.csv", labels=False).has_labels("test")
    with pytest.raises(DataError, match=r"t\.csv: no column 'bought'"):
        scored(model, write(tmp_path / "t.csv", ["user", "x"]), labels=True)


def test_quotes_that_join_rows_are_found_without_labels(tmp_path: Path, model: Path) -> None:
    (tmp_path / "t.csv").write_text('user,x\n"a,1\nb,2\nc,3\n",4\n')
    with pytest.raises(DataError, match=r"t\.csv: row 1 \(lines 2 to 5\): a quote joins lines"):
        scored(model, tmp_path / "t.csv")


def test_files_with_and_without_labels_are_not_mixed(tmp_path: Path, model: Path) -> None:
    files = [write(tmp_path / "a.csv", [*COLUMNS]), write(tmp_path / "b.csv", ["user", "x"])]
    with pytest.raises(
        DataError, match=r"b\.csv: no column 'bought', the label, which .*a\.csv has"
    ):
        scored(model, *files)


def test_a_feature_is_never_optional(tmp_path: Path, model: Path) -> None:
    with pytest.raises(DataError, match=r"t\.csv: no column 'x'; it has 'user'"):
        scored(model, write(tmp_path / "t.csv", ["user"]))


def test_a_scored_file_without_labels_is_no_valid_file(
    tmp_path: Path, model: Path, make_config: MakeConfig
) -> None:
    """Though its rows are in the cache."""
    file = write(tmp_path / "t.csv", ["user", "x", "session"])
    scored(model, file)
    config = make_config(tmp_path / "train.csv", SCHEMA, valid=str(file))
    with pytest.raises(DataError, match=r"t\.csv: no column 'bought'"):
        open_data(config, rank=0, world_size=1, seed=0)


@pytest.mark.parametrize("name", ["t.csv.gz", "t.parquet"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, model: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"neither")
    with pytest.raises(DataError, match=rf"{name}: cannot be read as"):
        scored(model, tmp_path / name)


def test_training_needs_labels(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(write(tmp_path / "t.csv", ["user", "x", "session"]), SCHEMA)
    with pytest.raises(
        DataError, match=r"t\.csv: no column 'bought'; it has .* Correct data\.schema"
    ):
        open_data(config, rank=0, world_size=1, seed=0)
