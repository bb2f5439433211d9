"""One text for one value, whatever the type that it is stored in."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

_INT64_END = 2.0**63


def canonical_texts(column: pa.Array) -> pa.LargeStringArray:
    """Single values of any type as texts; null where missing.

    Text is taken as it is written; booleans are ``true`` and ``false``. Numbers are written without
    zeros at the end of a fraction, whole ones as digits. So are times, whatever their unit: those
    with a time zone in UTC, which is not named, and those without as they are. Durations are their
    nanoseconds.

    Args:
        column (pa.Array): [n].

    Returns:
        pa.LargeStringArray: [n].

    Raises:
        pa.ArrowException: a value, or any of its type, has no text.

    Example:
        >>> canonical_texts(pa.array([3.0, None, 2.5, float("nan")])).to_pylist()
        ['3', None, '2.5', None]
        >>> canonical_texts(pa.array([2e10, -0.0])).to_pylist()
        ['20000000000', '0']
        >>> canonical_texts(pa.array(["3", "", "x"])).to_pylist()
        ['3', None, 'x']
        >>> from datetime import datetime, timedelta, timezone
        >>> noon = datetime(2024, 5, 1, 12, 0, 0, 500_000)
        >>> canonical_texts(pa.array([noon, datetime(2024, 5, 1)])).to_pylist()
        ['2024-05-01 12:00:00.5', '2024-05-01 00:00:00']
        >>> there = noon.replace(tzinfo=timezone(timedelta(hours=2)))
        >>> canonical_texts(pa.array([there])).to_pylist()
        ['2024-05-01 10:00:00.5']
    """
    column = plain(column)
    if pa.types.is_floating(column.type):
        return _texts_of_floats(column)
    if pa.types.is_decimal(column.type):
        return _texts_of_decimals(column)
    if pa.types.is_temporal(column.type):
        return _texts_of_times(column)
    return empty_to_null(column.cast(pa.large_string()))


def plain(column: pa.Array) -> pa.Array:
    """Without dictionary encoding, and with one type for text."""
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_string_view(kind) or _is_binary(kind):
        return column.cast(pa.large_string())
    return column


def empty_to_null(texts: pa.LargeStringArray) -> pa.LargeStringArray:
    """Empty texts are missing."""
    return pc.if_else(pc.equal(texts, ""), None, texts)


def _texts_of_floats(column: pa.Array) -> pa.LargeStringArray:
    if pa.types.is_float16(column.type):
        column = column.cast(pa.float32())
    column = pc.if_else(pc.is_nan(column), None, column)
    is_whole = pc.and_(pc.equal(pc.trunc(column), column), pc.less(pc.abs(column), _INT64_END))
    # Arrow would write 1e+10 and -0.
    digits = pc.if_else(is_whole, column, None).cast(pa.int64()).cast(pa.large_string())
    if digits.null_count == column.null_count:
        return digits
    return pc.coalesce(digits, column.cast(pa.large_string()))


def _texts_of_decimals(column: pa.Array) -> pa.LargeStringArray:
    # The widest type: rounding 0.99 needs more digits than the column may have.
    wide = column.cast(pa.decimal256(76, max(column.type.scale, 0)))
    is_whole = pc.equal(pc.trunc(wide), wide)
    digits = pc.if_else(is_whole, wide, None).cast(pa.decimal256(76, 0)).cast(pa.large_string())
    if digits.null_count == column.null_count:
        return digits
    return pc.coalesce(digits, _texts_of_fractions(pc.if_else(is_whole, None, wide)))


def _texts_of_fractions(column: pa.Decimal256Array) -> pa.LargeStringArray:
    """Texts of decimals that are not whole: those of floats, unless they have too many digits."""
    written = column.cast(pa.large_string())
    floats = written.cast(pa.float64()).cast(pa.large_string())
    shortened = pc.replace_substring_regex(written, r"0+(E.*)?$", r"\1")
    return pc.if_else(pc.equal(floats.cast(column.type), column), floats, shortened)


def _texts_of_times(column: pa.Array) -> pa.LargeStringArray:
    kind = column.type
    if pa.types.is_duration(kind):
        return column.cast(pa.duration("ns")).cast(pa.int64()).cast(pa.large_string())
    if pa.types.is_timestamp(kind):
        column = column.cast(pa.timestamp(kind.unit))
    texts = column.cast(pa.large_string())
    # Arrow says so in the place of the value.
    wrong = texts.filter(pc.starts_with(texts, "<value out of range"))
    if len(wrong):
        raise pa.ArrowInvalid(wrong[0].as_py().strip("<>"))
    return pc.replace_substring_regex(texts, r"\.0+$|(\.[0-9]+?)0+$", r"\1")


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
