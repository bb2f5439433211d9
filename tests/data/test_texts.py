"""One value has one text, whatever the type that it is stored in."""

from __future__ import annotations

import datetime
import decimal

import numpy as np
import pyarrow as pa
import pytest

from torchrec_hilomoe.data.texts import canonical_texts


def test_texts_of_ids_do_not_depend_on_their_type() -> None:
    as_text = canonical_texts(pa.array(["1", "20", ""])).to_pylist()
    for kind in (pa.int8(), pa.uint64(), pa.float64(), pa.int32()):
        assert canonical_texts(pa.array([1, 20, None], kind)).to_pylist() == as_text
    assert canonical_texts(pa.array([b"x", b""])).to_pylist() == ["x", None]
    assert canonical_texts(pa.array([True, False])).to_pylist() == ["true", "false"]
    assert canonical_texts(pa.array([datetime.date(2020, 1, 2)])).to_pylist() == ["2020-01-02"]
    assert canonical_texts(pa.array(["007", " a"])).to_pylist() == ["007", " a"]


@pytest.mark.parametrize(
    "kind", [pa.int64(), pa.float64(), pa.decimal128(20, 2), pa.decimal256(60, 9), pa.string()]
)
def test_large_whole_numbers_are_written_as_digits_in_every_type(kind: pa.DataType) -> None:
    ids = [0, -7, 10**10, 20_000_000_001, 2**53 - 1, None]
    column = pa.array([None if i is None else str(i) for i in ids])
    if pa.types.is_floating(kind):
        column = pa.array(ids, pa.int64())
    expected = [None if i is None else str(i) for i in ids]
    assert canonical_texts(column.cast(kind)).to_pylist() == expected


def test_fractions_keep_their_text_beside_whole_numbers() -> None:
    floats = [1.5, 3e9, None, float("nan"), -0.0, 1e10, float("inf"), 2.0**63]
    texts = ["1.5", "3000000000", None, None, "0", "10000000000", "inf", "9.223372036854776e+18"]
    assert canonical_texts(pa.array(floats)).to_pylist() == texts
    singles = pa.array([123456784.0, 0.1, 16777216.0], pa.float32())
    assert canonical_texts(singles).to_pylist() == ["123456784", "0.1", "16777216"]
    halves = pa.array([np.float16(2.0), np.float16(0.5), None], pa.float16())
    assert canonical_texts(halves).to_pylist() == ["2", "0.5", None]
    decimals = pa.array([decimal.Decimal("-0.99"), decimal.Decimal("0.00"), None])
    assert canonical_texts(decimals).to_pylist() == ["-0.99", "0", None]


def test_text_is_taken_as_written() -> None:
    assert canonical_texts(pa.array(["3.0", "1e10", "-0"])).to_pylist() == ["3.0", "1e10", "-0"]


@pytest.mark.parametrize("scale", [10, 20, 37])
def test_fractions_are_written_alike_in_floats_and_decimals(scale: int) -> None:
    floats = [2.5, -0.375, 3.0, 0.1, 0.0, None, 2.0**-7, -7.25e-5, 1e-7, 9.5]
    exact = [None if x is None else decimal.Decimal(repr(x)) for x in floats]
    expected = canonical_texts(pa.array(floats)).to_pylist()
    assert expected[:6] == ["2.5", "-0.375", "3", "0.1", "0", None]
    assert canonical_texts(pa.array(exact, pa.decimal128(38, scale))).to_pylist() == expected
    assert canonical_texts(pa.array(exact, pa.decimal256(76, scale))).to_pylist() == expected
    large = [12345678901.5, 2.0**40 + 0.25]
    decimals = pa.array(map(decimal.Decimal, large), pa.decimal128(38, 2))
    assert canonical_texts(decimals).to_pylist() == canonical_texts(pa.array(large)).to_pylist()


def test_decimals_of_more_digits_than_a_float_has_keep_all_but_zeros() -> None:
    texts = ["1234567890123456789.1", "0.12345678901234567891", "1.2345678901234567891E-9"]
    for kind in (pa.decimal256(60, 30), pa.decimal256(70, 32)):
        column = pa.array(map(decimal.Decimal, texts), kind)
        assert canonical_texts(column).to_pylist() == texts
    nearly = ["9007199254740993.5", "9007199254740994", "9007199254740993"]
    column = pa.array(map(decimal.Decimal, nearly), pa.decimal128(30, 3))
    assert canonical_texts(column).to_pylist() == nearly


def test_timestamps_are_written_alike_in_every_unit_and_zone() -> None:
    seconds = pa.array([0, 1577934290, -1, None], pa.timestamp("s"))
    texts = ["1970-01-01 00:00:00", "2020-01-02 03:04:50", "1969-12-31 23:59:59", None]
    for unit in ("s", "ms", "us", "ns"):
        for zone in (None, "UTC", "+02:00", "America/New_York"):
            column = seconds.cast(pa.timestamp(unit)).cast(pa.timestamp(unit, zone))
            assert canonical_texts(column).to_pylist() == texts
    halves = pa.array([1500, 1050, 60_000], pa.timestamp("ms"))
    for unit in ("ms", "us", "ns"):
        assert canonical_texts(halves.cast(pa.timestamp(unit))).to_pylist() == [
            "1970-01-01 00:00:01.5",
            "1970-01-01 00:00:01.05",
            "1970-01-01 00:01:00",
        ]
    assert canonical_texts(pa.array([7], pa.timestamp("ns"))).to_pylist() == [
        "1970-01-01 00:00:00.000000007"
    ]


def test_dates_times_and_durations_are_written_alike_in_every_unit() -> None:
    day = pa.array([datetime.date(2020, 10, 20)])
    for kind in (pa.date32(), pa.date64()):
        assert canonical_texts(day.cast(kind)).to_pylist() == ["2020-10-20"]
    times = pa.array([10, 0], pa.time32("s"))
    for kind in (pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns")):
        assert canonical_texts(times.cast(kind)).to_pylist() == ["00:00:10", "00:00:00"]
    durations = pa.array([2, None], pa.duration("s"))
    for unit in ("s", "ms", "us", "ns"):
        texts = canonical_texts(durations.cast(pa.duration(unit))).to_pylist()
        assert texts == ["2000000000", None]


@pytest.mark.parametrize(
    ("value", "kind"),
    [(2**62, pa.timestamp("us", "UTC")), (-(2**62), pa.timestamp("s")), (2**60, pa.time64("ns"))],
)
def test_times_that_have_no_text(value: int, kind: pa.DataType) -> None:
    column = pa.array([0, value], pa.int64()).view(kind)
    with pytest.raises(pa.ArrowInvalid, match=rf"^value out of range: {value}$"):
        canonical_texts(column)
