from __future__ import annotations

import datetime
import decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from torchrec_hilomoe.config import parse_config
from torchrec_hilomoe.data import SchemaConfig
from torchrec_hilomoe.data.bad_rows import BadRows
from torchrec_hilomoe.data.files import RawFormat
from torchrec_hilomoe.data.parse import ParsedRows, parse_rows
from torchrec_hilomoe.data.readers import RawChunk
from torchrec_hilomoe.errors import DataError


def parse(columns: dict[str, Any], bad_rows: BadRows | None = None, **schema: Any) -> ParsedRows:
    size = len(next(iter(columns.values())))
    batch = pa.RecordBatch.from_pydict({"label": [1] * size, **columns})
    chunk = RawChunk(Path("raw.parquet"), batch, np.arange(10, 10 + size), RawFormat())
    return parse_rows(chunk, parse_config(SchemaConfig, schema), bad_rows or BadRows("raise"))


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([1, None, -3], pa.int8()), [1, None, -3]),
        (pa.array([1.5, float("nan"), None], pa.float32()), [1.5, None, None]),
        (pa.array([True, False, None]), [1, 0, None]),
        (pa.array([decimal.Decimal("1.25")]), [1.25]),
        (pa.array([None, None]), [None, None]),
        (
            pa.array(["1", " 2.5 ", "-1e-3", ".5", "4.", "", "nan", "NaN", None]),
            [1, 2.5, -0.001, 0.5, 4, None, None, None, None],
        ),
        (pa.array(["3", "4", "3"]).dictionary_encode(), [3, 4, 3]),
        (pa.array(["7"], pa.string_view()), [7]),
    ],
)
def test_numbers_of_all_types(column: pa.Array, expected: list[float | None]) -> None:
    values = parse({"x": column}, dense=["x"]).dense[0]
    np.testing.assert_allclose(values, [np.nan if e is None else e for e in expected], rtol=1e-7)


@pytest.mark.parametrize("bad", ["abc", "1,5", "0x10", "1_000", "inf", "-Infinity", "1e39", "1 2"])
def test_what_is_not_a_number_is_located(bad: str) -> None:
    columns = {"x": ["1", "", bad, "2"]}
    message = rf"raw\.parquet: row 13, column 'x', value '{bad}': column 'x' is not a number"
    with pytest.raises(DataError, match=message):
        parse(columns, dense=["x"])
    bad_rows = BadRows("skip")
    rows = parse({**columns, "u": list("abcd")}, bad_rows, dense=["x"], categorical=["u"])
    np.testing.assert_equal(rows.dense[0], [1, np.nan, 2])
    assert rows.categorical[0].to_pylist() == ["a", "b", "d"]
    assert sum(bad_rows.counts.values()) == 1


def test_numbers_too_large_for_float32_are_bad() -> None:
    with pytest.raises(DataError, match="row 12, column 'x', value 1e"):
        parse({"x": [3e38, 1e40]}, dense=["x"])


def test_a_row_that_is_bad_twice_counts_once() -> None:
    bad_rows = BadRows("skip")
    columns = {"label": ["2", "1", "0"], "x": ["a", "b", "3"]}
    assert parse(columns, bad_rows, dense=["x"]).labels.tolist() == [0]
    assert dict(bad_rows.counts) == {
        "the label is not 0 or 1 (data.schema.positive_threshold takes other numbers)": 1,
        "column 'x' is not a number that float32 holds": 1,
    }


@pytest.mark.parametrize(
    "labels",
    [
        ["0", "1.0", "1"],
        ["False", "true", " TRUE"],
        [0, 1, 1],
        [False, True, True],
        [0.0, 1.0, 1.0],
    ],
)
def test_labels_of_all_types(labels: list[Any]) -> None:
    result = parse({"label": labels}).labels
    assert result.dtype == np.float32
    assert result.tolist() == [0, 1, 1]


@pytest.mark.parametrize("bad", ["2", "-1", "yes", "", None, "0.5"])
def test_a_label_that_is_not_0_or_1_is_located(bad: str | None) -> None:
    with pytest.raises(DataError, match=r"row 12, column 'label', value .*: the label is not 0"):
        parse({"label": ["0", bad, "1"]})


def test_labels_by_threshold() -> None:
    rows = parse({"label": [1, 4, 5, 3.9]}, positive_threshold=4)
    assert rows.labels.tolist() == [0, 1, 1, 0]
    with pytest.raises(DataError, match="row 12.*the label is not a number"):
        parse({"label": ["5", ""]}, positive_threshold=4)


LISTS = [["a", "b"], [], ["b"], None, ["", "c", None]]
TEXTS = ["a|b", "", "b", None, "|c|"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS),
        pa.array(LISTS, pa.list_(pa.string())),
        pa.array(LISTS, pa.large_list(pa.string())),
        pa.array(LISTS, pa.list_view(pa.string())),
        pa.array(LISTS, pa.large_list_view(pa.string())),
        pa.array([["z"], *LISTS], pa.list_(pa.string())).slice(1),
    ],
)
def test_lists_and_separated_texts_are_the_same_bags(column: pa.Array) -> None:
    bags = parse({"tags": column}, multi_valued=["tags"]).multi_valued[0]
    assert bags.lengths.tolist() == [2, 0, 1, 0, 1]
    assert bags.values.to_pylist() == ["a", "b", "b", "c"]


def test_lists_of_numbers() -> None:
    bags = parse({"tags": [[3, 1], [], [1]]}, multi_valued=["tags"]).multi_valued[0]
    assert bags.values.to_pylist() == ["3", "1", "1"]
    lists = pa.array([[*range(4)], []], pa.list_(pa.int64())).cast(pa.list_(pa.float64()))
    bags = parse({"t": lists}, multi_valued=["t"]).multi_valued[0]
    assert bags.values.to_pylist() == ["0", "1", "2", "3"]
    fixed = pa.array([[1, 2], [3, 4]], pa.list_(pa.int64(), 2))
    assert parse({"t": fixed}, multi_valued=["t"]).multi_valued[0].lengths.tolist() == [2, 2]


def test_list_views_need_not_lie_in_order() -> None:
    views = pa.ListViewArray.from_arrays([2, 0, 1], [1, 2, 2], pa.array(["a", "b", "c"]))
    bags = parse({"t": views}, multi_valued=["t"]).multi_valued[0]
    assert bags.lengths.tolist() == [1, 2, 2]
    assert bags.values.to_pylist() == ["c", "a", "b", "b", "c"]


@pytest.mark.parametrize("column", [pa.nulls(3), pa.array([[], None, [None]])])
def test_columns_without_any_value_are_missing_in_every_role(column: pa.Array) -> None:
    bags = parse({"c": column}, multi_valued=[{"name": "c", "separator": None}]).multi_valued[0]
    assert (bags.lengths.tolist(), bags.values.to_pylist()) == ([0, 0, 0], [])
    assert bags.lengths.dtype == np.int32
    if pa.types.is_null(column.type):
        rows = parse({"c": column}, dense=["c"], group="c")
        assert np.isnan(rows.dense[0]).all()
        assert parse({"c": column}, categorical=["c"]).categorical[0].null_count == 3


@pytest.mark.parametrize(
    ("column", "schema", "message"),
    [
        ([3, 4], {"multi_valued": ["c"]}, "type int64, expected lists of single values, or text"),
        ([[[3]], []], {"multi_valued": ["c"]}, "expected lists of single values"),
        (["a"], {"multi_valued": [{"name": "c", "separator": None}]}, "text needs a separator"),
        ([["a"]], {"categorical": ["c"]}, "single values .list it under multi_valued"),
        ([["1"]], {"dense": ["c"]}, "expected numbers"),
        ([datetime.date(2020, 1, 2)], {"dense": ["c"]}, "type date32.*expected numbers"),
        ([["a"]], {"group": "c"}, "expected single values"),
    ],
)
def test_columns_of_the_wrong_type(column: list[Any], schema: dict[str, Any], message: str) -> None:
    with pytest.raises(
        DataError, match=rf"raw\.parquet: column 'c' has the type .*{message}|{message}"
    ):
        parse({"c": column}, **schema)


LATIN_1 = [b"a", "caf\u00e9".encode("latin-1")]


@pytest.mark.parametrize(
    ("column", "schema", "kind"),
    [
        (pa.array(LATIN_1), {"categorical": ["c"]}, "binary"),
        (pa.array(LATIN_1).dictionary_encode(), {"dense": ["c"]}, "dictionary<.*"),
        (pa.array(LATIN_1, pa.large_binary()), {"multi_valued": ["c"]}, "large_binary"),
        (pa.array([LATIN_1, []]), {"multi_valued": ["c"]}, "list<.*"),
        (pa.array([2**62, 0], pa.timestamp("s")), {"categorical": ["c"]}, "timestamp.s."),
        (pa.array([None] * 2, pa.month_day_nano_interval()), {"group": "c"}, "month_day_nano.*"),
    ],
)
def test_bytes_and_types_that_are_no_text_are_named(
    column: pa.Array, schema: dict[str, Any], kind: str
) -> None:
    message = rf"raw\.parquet: column 'c' of the type {kind} cannot be read: .*; write it as UTF-8"
    with pytest.raises(DataError, match=message):
        parse({"c": column}, **schema)
