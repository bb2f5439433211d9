"""Raw rows of a request are encoded as the rows of a file are."""

from __future__ import annotations

import json
import shutil
from datetime import datetime, timedelta, timezone
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

from torchrec_hilomoe.config import parse_config
from torchrec_hilomoe.data import DataConfig, open_data
from torchrec_hilomoe.data.encoder import FORMAT_VERSION
from torchrec_hilomoe.errors import ConfigError, DataError
from torchrec_hilomoe.inference import RequestEncoder, flat_tensors

ROW = {"price": 1.5, "user": "u3", "item": 7, "tags": ["t1", "t2"]}
MODEL = {"model": {"name": "dlrm"}, "features": {"dense": [], "sparse": []}, "experts": True}


@pytest.fixture(scope="module")
def encoder(trained) -> RequestEncoder:
    return RequestEncoder(str(trained.checkpoint))


def one_row(**changes: Any) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([{**ROW, **changes}])


def test_rows_of_a_file(encoder, trained):
    table = pa.csv.read_csv(trained.file).drop_columns(["clicked"])
    (batch,) = table.combine_chunks().to_batches()
    halves = pa.concat_tables([table.slice(0, 5), table.slice(5)])
    for rows in (batch, table, halves):
        for ours, loaders in zip(encoder.encode(rows), flat_tensors(trained.batch()), strict=True):
            torch.testing.assert_close(ours, loaders, rtol=0, atol=0)


def test_text_numbers_and_lists_mean_the_same(encoder):
    as_text = one_row(price="1.5", item="7", tags="t1|t2")
    for one, other in zip(encoder.encode(one_row()), encoder.encode(as_text), strict=True):
        assert torch.equal(one, other)


def test_missing_and_unknown_values(encoder):
    dense, values, lengths = encoder.encode(
        one_row(price=None, user="nobody", item=None, tags=None)
    )
    assert values.tolist() == [0, 0]
    assert lengths.tolist() == [1, 1, 0]
    assert dense.isfinite().all()


def test_label_and_group_are_not_read(encoder):
    with_label = one_row(clicked="what is not known yet")
    for one, other in zip(encoder.encode(one_row()), encoder.encode(with_label), strict=True):
        assert torch.equal(one, other)
    assert encoder.columns == ["price", "user", "item", "tags"]


def test_a_group_that_is_no_feature_is_not_read(trained, encoder, tmp_path):
    checkpoint = shutil.copytree(trained.checkpoint, tmp_path / "checkpoint")
    path = checkpoint / "encoder" / "encoder.json"
    settings = json.loads(path.read_text())
    settings["schema"]["group"] = "session"
    path.write_text(json.dumps(settings))
    assert RequestEncoder(checkpoint).columns == encoder.columns


def test_columns_that_are_missing_or_there_twice_are_named(encoder):
    with pytest.raises(DataError, match="missing or there twice: 'item', 'tags'; the model reads"):
        encoder.encode(pa.RecordBatch.from_pylist([{"price": 1.0, "user": "u3"}]))
    columns = [*one_row().columns, pa.array([7])]
    twice = pa.RecordBatch.from_arrays(columns, names=[*ROW, "item"])
    with pytest.raises(DataError, match="there twice: 'item'; the model reads"):
        encoder.encode(twice)


def test_a_value_that_is_no_number_is_named(encoder):
    with pytest.raises(DataError, match="row 1, column 'price', value 'cheap'.*float32 holds$"):
        encoder.encode(one_row(price="cheap"))


def test_a_request_without_rows_is_refused(encoder):
    with pytest.raises(DataError, match="has no rows"):
        encoder.encode(one_row().slice(1))


@pytest.mark.parametrize("rows", [ROW, [ROW]], ids=["a dict", "dicts"])
def test_rows_of_other_types_are_refused_with_a_way_to_make_them(encoder, rows):
    with pytest.raises(DataError, match="no Arrow RecordBatch.*from_pylist"):
        encoder.encode(rows)


def test_times_of_python_are_those_of_a_file(tmp_path):
    def times(kind):
        return pa.array([1577934290, 1577934291], pa.timestamp("s")).cast(kind)

    for kind in (pa.timestamp("ns"), pa.timestamp("ms", "UTC")):
        folder = tmp_path / str(kind)
        folder.mkdir()
        pq.write_table(pa.table({"label": [0, 1], "at": times(kind)}), folder / "train.parquet")
        values = {
            "train": str(folder / "train.parquet"),
            "schema": {"categorical": ["at"]},
            "batch_size": 2,
            "cache_dir": str(tmp_path / "cache"),
        }
        source = open_data(parse_config(DataConfig, values), rank=0, world_size=1, seed=0)
        source.save(folder / "encoder")
        (folder / "model.json").write_text(json.dumps(MODEL))
        at = datetime(2020, 1, 2, 3, 4, 51)
        there = at.replace(hour=5, tzinfo=timezone(timedelta(hours=2)))
        for moment in (at, at.replace(tzinfo=timezone.utc), there):
            row = pa.RecordBatch.from_pylist([{"at": moment}])
            assert RequestEncoder(folder).encode(row)[1].tolist() == [2]


def test_ids_that_were_encoded_before_need_no_encoder(tmp_path, monkeypatch):
    encoder = {"kind": "criteo_1tb", "format_version": FORMAT_VERSION, "hash_sizes": [9] * 26}
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "encoder.json").write_text(json.dumps(encoder))
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    with pytest.raises(ConfigError, match="the ids of data=criteo_1tb"):
        RequestEncoder(tmp_path)
