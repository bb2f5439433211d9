"""CSV files line by line, as Python's own reader sees them, which is slower than Arrow's.

The header, the line of a row, and quotes that join rows.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from torchrec_hilomoe.data.files import COMPRESSED, RawFormat, file_format
from torchrec_hilomoe.errors import DataError

_LONGEST_FIELD = 2**31 - 1
_BLOCK_BYTES = 1 << 20


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

    Args:
        path (Path): the file.
        raw_format (RawFormat): how it is written.

    Returns:
        CsvHeader: the names of its columns.

    Raises:
        DataError: the file is empty.
    """
    if raw_format.column_names:
        return CsvHeader(raw_format.column_names, lines=0, has_more=True)
    with _opened(path) as text:
        records = _records(text, path, raw_format)
        names = next((record for record in records if record), None)
        if names is None:
            raise DataError(f"{path}: the file is empty, not even a header line")
        return CsvHeader(tuple(names), records.line_num, has_more=bool(text.read(1)))


def locate(path: Path, row: int, raw_format: RawFormat) -> str:
    """Names a row: file, 1-based data row and, for CSV, the line (header and blanks counted)."""
    if file_format(path, raw_format.format) != "csv":
        return f"{path}: row {row}"
    header = 0 if raw_format.column_names else 1
    with _opened(path) as text:
        records = _records(text, path, raw_format)
        lines = (records.line_num for record in records if record)
        line = next((line for n, line in enumerate(lines, start=1) if n == row + header), "?")
    return f"{path}: row {row} (line {line})"


def check_quotes(
    path: Path, raw_format: RawFormat, header: CsvHeader, label: str | None, rows: int
) -> None:
    """Looks for a quoted value that joins rows, if a file has quotes and more lines than rows.

    A value may have line breaks, but not so that the first line and most of the others are rows by
    themselves: as many fields as columns, and a number in the column of the label.

    Args:
        path (Path): a CSV file.
        raw_format (RawFormat): how it is written.
        header (CsvHeader): its header.
        label (str | None): the column of the label, if there is one.
        rows (int): rows that were read, malformed ones included.

    Raises:
        DataError: there is such a value.
    """
    if raw_format.quote_char is None:
        return
    if _lines_with_quotes(path, raw_format.quote_char) <= header.lines + rows:
        return
    header_records = 0 if raw_format.column_names else 1
    delimiter = raw_format.delimiter_of(path)
    numbers = [] if label is None else [header.names.index(label)]

    def is_row(line: str) -> bool:
        fields = line.rstrip("\r\n").split(delimiter)
        return len(fields) == len(header.names) and all(_is_number(fields[i]) for i in numbers)

    for row, first, lines in _rows_with_lines(path, raw_format):
        others = len(lines) - 1
        if others and is_row(lines[0]) and sum(map(is_row, lines[1:])) > others / 2:
            raise DataError(
                f"{path}: row {row - header_records} (lines {first} to {first + len(lines) - 1}): "
                "a quote joins lines that are rows by themselves. If quotes mean nothing in this "
                "file, set data.quote_char=null; otherwise close the quote, or write the file as "
                "Parquet"
            )


def _lines_with_quotes(path: Path, quote_char: str) -> int:
    """The number of lines, blank ones included, of a file with quotes; 0 for one without."""
    quote, quoted, line_ends, last = quote_char.encode(), False, 0, b"\n"
    with pa.OSFile(str(path)) as file, decompressed(path, file) as stream:
        while block := stream.read(_BLOCK_BYTES):
            quoted = quoted or quote in block
            line_ends += block.count(b"\n")
            last = block[-1:]
    return quoted * (line_ends + (last != b"\n"))


def _rows_with_lines(path: Path, raw_format: RawFormat) -> Iterator[tuple[int, int, list[str]]]:
    """Each row that is not blank: its number from 1, that of its first line, and its lines."""
    lines: list[str] = []

    def kept(text: io.TextIOWrapper) -> Iterator[str]:
        for line in text:
            lines.append(line)
            yield line

    with _opened(path) as text:
        records = _records(kept(text), path, raw_format)
        row = 0
        for record in records:
            if record:
                row += 1
                yield row, records.line_num - len(lines) + 1, lines
            lines.clear()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _records(lines: Iterable[str], path: Path, raw_format: RawFormat) -> Any:
    """A ``csv.reader``, which knows the number of its last line."""
    return csv.reader(
        lines,
        delimiter=raw_format.delimiter_of(path),
        quotechar=raw_format.quote_char,
        quoting=csv.QUOTE_MINIMAL if raw_format.quote_char else csv.QUOTE_NONE,
    )


@contextmanager
def _opened(path: Path) -> Iterator[io.TextIOWrapper]:
    """The text of a CSV file, for a ``csv.reader`` that takes fields as long as Arrow's.

    Bytes that are no text may stand in columns that nobody asked for.
    """
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with (
            pa.OSFile(str(path)) as file,
            decompressed(path, file) as stream,
            io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="") as text,
        ):
            yield text
    finally:
        csv.field_size_limit(limit)


def decompressed(path: Path, file: pa.NativeFile) -> pa.NativeFile:
    """The bytes of a file, decompressed if its suffix says so."""
    suffix = path.suffix.lower()
    return pa.CompressedInputStream(file, COMPRESSED[suffix]) if suffix in COMPRESSED else file
