"""CSV files line by line, as Python's own reader sees them: the header, and the line of a row."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from torchrec_hilomoe.data.files import COMPRESSED, RawFormat, file_format
from torchrec_hilomoe.errors import DataError


def locate(path: Path, row: int, raw_format: RawFormat) -> str:
    """Names a row: file, 1-based data row and, for CSV, the line (header and blanks counted)."""
    if file_format(path, raw_format.format) != "csv":
        return f"{path}: row {row}"
    header = 0 if raw_format.column_names else 1
    with _open_text(path) as text:
        records = csv.reader(text, delimiter=raw_format.delimiter_of(path))
        lines = (records.line_num for record in records if record)
        line = next((line for n, line in enumerate(lines, start=1) if n == row + header), "?")
    return f"{path}: row {row} (line {line})"


def csv_header(path: Path, delimiter: str) -> tuple[str, ...]:
    """The names of the columns."""
    with _open_text(path) as text:
        header = next((record for record in csv.reader(text, delimiter=delimiter) if record), None)
    if header is None:
        raise DataError(f"{path}: the file is empty, not even a header line")
    return tuple(header)


@contextmanager
def _open_text(path: Path) -> Iterator[io.TextIOWrapper]:
    with (
        pa.OSFile(str(path)) as file,
        decompressed(path, file) as stream,
        io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text,
    ):
        yield text


def decompressed(path: Path, file: pa.NativeFile) -> pa.NativeFile:
    """The bytes of a file, decompressed if its suffix says so."""
    suffix = path.suffix.lower()
    return pa.CompressedInputStream(file, COMPRESSED[suffix]) if suffix in COMPRESSED else file
