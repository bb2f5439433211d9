"""CSV files line by line, as Python's own reader sees them: the header, and the line of a row."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from torchrec_hilomoe.data.files import COMPRESSED, RawFormat, file_format
from torchrec_hilomoe.errors import DataError

_LONGEST_FIELD = 2**31 - 1


class CsvHeader(NamedTuple):
    """What stands before the rows of a CSV file.

    Args:
        names (tuple[str, ...]): of the columns.
        lines (int): lines to skip, blank ones and those of line breaks in names included.
        has_more (bool): whether the file goes on.
    """

    names: tuple[str, ...]
    lines: int
    has_more: bool


def read_header(path: Path, raw_format: RawFormat) -> CsvHeader:
    """Reads the header of a CSV file, or takes it from the format.

    Raises:
        DataError: the file is empty.
    """
    if raw_format.column_names:
        return CsvHeader(raw_format.column_names, lines=0, has_more=True)
    with _opened(path, raw_format) as (text, records):
        names = next((record for record in records if record), None)
        if names is None:
            raise DataError(f"{path}: the file is empty, not even a header line")
        return CsvHeader(tuple(names), records.line_num, has_more=bool(text.read(1)))


def locate(path: Path, row: int, raw_format: RawFormat) -> str:
    """Names a row: file, 1-based data row and, for CSV, the line (header and blanks counted)."""
    if file_format(path, raw_format.format) != "csv":
        return f"{path}: row {row}"
    header = 0 if raw_format.column_names else 1
    # Bytes that are no text may stand in columns that nobody asked for.
    with _opened(path, raw_format, errors="replace") as (_, records):
        lines = (records.line_num for record in records if record)
        line = next((line for n, line in enumerate(lines, start=1) if n == row + header), "?")
    return f"{path}: row {row} (line {line})"


@contextmanager
def _opened(
    path: Path, raw_format: RawFormat, errors: str = "strict"
) -> Iterator[tuple[io.TextIOWrapper, Any]]:
    """The text of a CSV file and a ``csv.reader`` of it, which takes fields as long as Arrow's."""
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with (
            pa.OSFile(str(path)) as file,
            decompressed(path, file) as stream,
            io.TextIOWrapper(stream, encoding="utf-8-sig", errors=errors, newline="") as text,
        ):
            yield text, csv.reader(text, delimiter=raw_format.delimiter_of(path))
    finally:
        csv.field_size_limit(limit)


def decompressed(path: Path, file: pa.NativeFile) -> pa.NativeFile:
    """The bytes of a file, decompressed if its suffix says so."""
    suffix = path.suffix.lower()
    return pa.CompressedInputStream(file, COMPRESSED[suffix]) if suffix in COMPRESSED else file
