"""From raw columns of any type to numbers and texts; the rows that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_hilomoe.data.bad_rows import BadRows
from torchrec_hilomoe.data.config import FLOAT32_MAX, MultiValuedColumn, SchemaConfig
from torchrec_hilomoe.data.readers import RawChunk
from torchrec_hilomoe.data.rows import Int64Array
from torchrec_hilomoe.data.texts import canonical_texts, empty_to_null, plain
from torchrec_hilomoe.errors import DataError

_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$|^(?i:nan)$"


@dataclass(frozen=True)
class Bags:
    """The ids of a multi-valued column, row after row.

    Args:
        lengths (npt.NDArray[np.int32]): ids of each row, [n].
        values (pa.LargeStringArray): all ids, [sum of lengths].
    """

    lengths: npt.NDArray[np.int32]
    values: pa.LargeStringArray


@dataclass(frozen=True)
class ParsedRows:
    """n usable rows before encoding, in the order of the schema.

    Args:
        labels (npt.NDArray[np.float32]): 0 or 1, [n]; NaN in a file without labels.
        dense (list[npt.NDArray[np.float64]]): per dense column [n]; NaN is missing.
        categorical (list[pa.LargeStringArray]): per categorical column [n]; null is missing.
        multi_valued (list[Bags]): per multi-valued column.
        group (pa.LargeStringArray | None): the group column, [n].
        positions (Int64Array): their 0-based data rows in the file, [n].
    """

    labels: npt.NDArray[np.float32]
    dense: list[npt.NDArray[np.float64]]
    categorical: list[pa.LargeStringArray]
    multi_valued: list[Bags]
    group: pa.LargeStringArray | None
    positions: Int64Array


def parse_rows(chunk: RawChunk, schema: SchemaConfig, bad_rows: BadRows) -> ParsedRows:
    """Types the columns of a chunk and leaves out its bad rows.

    A row is bad if its label is missing or not 0/1 (any number with ``positive_threshold``), or
    if a dense value is neither missing nor a number that float32 can hold.

    Args:
        chunk (RawChunk): raw rows.
        schema (SchemaConfig): the columns.
        bad_rows (BadRows): raises at bad rows or counts them.

    Returns:
        ParsedRows: the good rows, in order.

    Raises:
        DataError: a column has a type that its role does not allow, or bytes that are no text.
    """
    n = chunk.batch.num_rows
    labels, good = np.full(n, np.nan), np.ones(n, dtype=bool)
    if schema.label in chunk.batch.schema.names:  # read unless the file has none
        labels, good = _parse_label(chunk, schema, bad_rows)
    dense = []
    for column in schema.dense:
        values, is_number = parse_numbers(chunk, column.name)
        reason = f"column {column.name!r} is not a number that float32 holds"
        _reject(chunk, column.name, good & ~is_number, reason, bad_rows)
        good &= is_number
        dense.append(values)
    if not good.all():
        labels, dense = labels[good], [values[good] for values in dense]
        batch = chunk.batch.filter(pa.array(good))
        chunk = RawChunk(chunk.path, batch, chunk.positions[good], chunk.raw_format)
    return ParsedRows(
        labels.astype(np.float32),
        dense,
        [parse_texts(chunk, column.name) for column in schema.categorical],
        [_parse_bags(chunk, column) for column in schema.multi_valued],
        parse_texts(chunk, schema.group) if schema.group else None,
        chunk.positions,
    )


def _parse_label(
    chunk: RawChunk, schema: SchemaConfig, bad_rows: BadRows
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Labels, and which of them are usable."""
    values, is_number = parse_numbers(chunk, schema.label)
    present = is_number & ~np.isnan(values)
    if schema.positive_threshold is None:
        good = present & ((values == 0) | (values == 1))
        reason = "the label is not 0 or 1 (data.schema.positive_threshold takes other numbers)"
    else:
        good, reason = present, "the label is not a number"
        values = (values >= schema.positive_threshold).astype(np.float64)
    _reject(chunk, schema.label, ~good, reason, bad_rows)
    return values, good


def _reject(
    chunk: RawChunk, name: str, bad: npt.NDArray[np.bool_], reason: str, bad_rows: BadRows
) -> None:
    rows = np.flatnonzero(bad)
    if rows.size:
        value = chunk.batch.column(name)[int(rows[0])].as_py()
        bad_rows.reject(
            reason,
            rows.size,
            lambda: f"{chunk.locate(int(rows[0]))}, column {name!r}, value {value!r}",
        )


def parse_numbers(
    chunk: RawChunk, name: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """A column as numbers; NaN where missing.

    Args:
        chunk (RawChunk): n raw rows.
        name (str): a column of numbers, booleans or text; true is 1 and false 0.

    Returns:
        tuple: values as float64 [n], and whether each is missing or a finite float32.

    Raises:
        DataError: the column has another type, or bytes that are no text.
    """
    with _named_errors(chunk, name):
        column = plain(chunk.batch.column(name))
    kind = column.type
    if pa.types.is_large_string(kind):
        values, is_number = _numbers_of_texts(column)
    elif _is_numeric(kind):
        numbers = column.cast(pa.float64(), safe=False)
        values = numbers.to_numpy(zero_copy_only=False)
        is_number = np.ones(len(values), dtype=bool)
    else:
        raise _wrong_type(chunk, name, "numbers")
    return values, is_number & ~(np.abs(values) > FLOAT32_MAX)


def _numbers_of_texts(
    texts: pa.LargeStringArray,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    texts = empty_to_null(pc.utf8_trim_whitespace(texts))
    is_number = np.ones(len(texts), dtype=bool)
    try:
        numbers = texts.cast(pa.float64())
    except pa.ArrowInvalid:
        for boolean, digit in (("true", "1"), ("false", "0")):  # as other files write a boolean
            texts = pc.if_else(pc.equal(pc.utf8_lower(texts), boolean), digit, texts)
        matches = pc.match_substring_regex(texts, _NUMBER)
        is_number = matches.fill_null(True).to_numpy(zero_copy_only=False)
        numbers = pc.if_else(matches, texts, None).cast(pa.float64())
    return numbers.to_numpy(zero_copy_only=False), is_number


def parse_texts(chunk: RawChunk, name: str) -> pa.LargeStringArray:
    """A column as canonical texts; null where missing (null, empty or NaN).

    Text is taken as it is written, and so is all of a CSV file. Whole numbers become their digits
    whatever their type (floating point below 2**63), so that ids are encoded alike by a CSV file
    that writes them without decimals and by Parquet files of integers, floats or decimals. Booleans
    of Parquet are ``true`` and ``false``: a CSV file that says ``True`` has other ids. Of times see
    :func:`~torchrec_hilomoe.data.texts.canonical_texts`.

    Args:
        chunk (RawChunk): n raw rows.
        name (str): a column of single values.

    Returns:
        pa.LargeStringArray: [n].

    Raises:
        DataError: the column has values of several parts, bytes that are no text, or times that
            are out of range.
    """
    column = chunk.batch.column(name)
    if pa.types.is_nested(column.type):
        raise _wrong_type(chunk, name, "single values (list it under multi_valued?)")
    with _named_errors(chunk, name):
        return canonical_texts(column)


def _parse_bags(chunk: RawChunk, column: MultiValuedColumn) -> Bags:
    with _named_errors(chunk, column.name):
        lists = plain(chunk.batch.column(column.name))
    if pa.types.is_null(lists.type):  # a Parquet part without any value
        return Bags(np.zeros(len(lists), np.int32), pa.array([], pa.large_string()))
    if pa.types.is_large_string(lists.type):
        if column.separator is None:
            raise _wrong_type(chunk, column.name, "lists; text needs a separator in data.schema")
        lists = pc.split_pattern(lists, column.separator)
    elif not _is_list(lists.type) or pa.types.is_nested(lists.type.value_type):
        raise _wrong_type(chunk, column.name, "lists of single values, or text with a separator")
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
    with _named_errors(chunk, column.name):
        values = canonical_texts(pc.list_flatten(lists))
    if values.null_count:
        present = values.is_valid().to_numpy(zero_copy_only=False)
        before = np.concatenate([[0], np.cumsum(present)])
        lengths = np.diff(before[np.concatenate([[0], np.cumsum(lengths)])])
        values = values.drop_null()
    return Bags(lengths.astype(np.int32), values)


def _is_numeric(kind: pa.DataType) -> bool:
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
    return any(test(kind) for test in (*tests, pa.types.is_null))


def _is_list(kind: pa.DataType) -> bool:
    views = pa.types.is_list_view, pa.types.is_large_list_view
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, *views)
    return any(test(kind) for test in tests)


@contextmanager
def _named_errors(chunk: RawChunk, name: str) -> Iterator[None]:
    """Arrow's errors know neither file nor column."""
    try:
        yield
    except pa.ArrowException as error:
        kind, reason = chunk.batch.schema.field(name).type, str(error).splitlines()[0]
        raise DataError(
            f"{chunk.path}: column {name!r} of the type {kind} cannot be read: {reason}; write it "
            "as UTF-8 text or numbers, or leave it out of data.schema"
        ) from error


def _wrong_type(chunk: RawChunk, name: str, expected: str) -> DataError:
    kind = chunk.batch.schema.field(name).type
    return DataError(f"{chunk.path}: column {name!r} has the type {kind}, expected {expected}")
