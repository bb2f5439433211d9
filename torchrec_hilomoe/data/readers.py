"""Raw CSV, TSV and Parquet files as streams of Arrow record batches of bounded size."""

from __future__ import annotations

import csv
import difflib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from torchrec_hilomoe.data.bad_rows import BadRows
from torchrec_hilomoe.data.files import RawFormat, file_format
from torchrec_hilomoe.data.lines import (
    CsvHeader,
    check_quotes,
    decompressed,
    locate,
    read_header,
)
from torchrec_hilomoe.data.rows import Int64Array
from torchrec_hilomoe.errors import DataError

# Arrow reads up to 32 blocks ahead.
_CSV_BLOCK_BYTES = 1 << 21
_CHUNK_BYTES = 1 << 25
_CHUNK_ROWS = 1 << 17
_PARQUET_BUFFER_BYTES = 1 << 20
_PARQUET_BATCH_BYTES = 1 << 23
_PARQUET_BATCH_ROWS = 1 << 14
_DELIMITERS = frozenset(",;|\t")
_QUOTE_HINT = "is a quote not closed? If quotes mean nothing in this file, set data.quote_char=null"
_UTF8_HINT = "write the file as UTF-8, or leave the column (#0 is the first) out of data.schema"


@dataclass(frozen=True)
class RawChunk:
    """Consecutive rows of a raw file.

    Args:
        path (Path): the file.
        batch (pa.RecordBatch): the columns read; from CSV all of them are text.
        positions (Int64Array): their 0-based data rows in the file, malformed ones counted, [n].
        raw_format (RawFormat): how the file is written.
    """

    path: Path
    batch: pa.RecordBatch
    positions: Int64Array
    raw_format: RawFormat

    def locate(self, row: int) -> str:
        """Names the file, row and line of row ``row`` (0-based) of this chunk."""
        return locate(self.path, int(self.positions[row]) + 1, self.raw_format)


def read_chunks(
    path: Path,
    columns: Sequence[str],
    raw_format: RawFormat,
    bad_rows: BadRows,
    advance: Callable[[int], object],
    labelled: bool = True,
) -> Iterator[RawChunk]:
    """Streams some columns of a file.

    Args:
        path (Path): a CSV file (compressed or not, by suffix) or a Parquet file.
        columns (Sequence[str]): the columns to read, the label first if there is one.
        raw_format (RawFormat): how the file is written.
        bad_rows (BadRows): told of CSV rows with a wrong number of fields.
        advance (Callable[[int], object]): told of bytes of the file as they are read.
        labelled (bool): whether the first column is the label.

    Yields:
        RawChunk: at least one row each.

    Raises:
        DataError: the file cannot be read, lacks a column or has rows that a quote joins.
    """
    with named_errors(path, raw_format) as kind:
        if kind == "csv":
            label = columns[0] if labelled else None
            yield from _read_csv(path, columns, label, raw_format, bad_rows, advance)
        else:
            yield from _read_parquet(path, columns, raw_format, advance)


@contextmanager
def named_errors(path: Path, raw_format: RawFormat) -> Iterator[str]:
    """Tells whether a file is ``"csv"`` or ``"parquet"``; errors of reading it name it.

    Raises:
        DataError: the file cannot be read.
    """
    kind = file_format(path, raw_format.format)
    try:
        yield kind
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        reason = str(error).splitlines()[0]
        hint = f": {_QUOTE_HINT}" if "straddling" in reason else ""
        hint = f": {_UTF8_HINT}" if "invalid UTF8" in reason else hint
        raise DataError(f"{path}: cannot be read as {kind}: {reason}{hint}") from error


def _read_csv(
    path: Path,
    columns: Sequence[str],
    label: str | None,
    raw_format: RawFormat,
    bad_rows: BadRows,
    advance: Callable[[int], object],
) -> Iterator[RawChunk]:
    header = read_header(path, raw_format)
    _check_columns(path, header.names, columns, has_header=header.lines > 0)
    if not header.has_more:  # Arrow would fail to skip a header without a line end
        advance(path.stat().st_size)
        return
    malformed = _MalformedRows(path, raw_format, header.lines, bad_rows)
    parsing = pa_csv.ParseOptions(
        delimiter=raw_format.delimiter_of(path),
        quote_char=raw_format.quote_char or False,
        newlines_in_values=raw_format.quote_char is not None,
        invalid_row_handler=malformed,
    )
    with pa.OSFile(str(path)) as file, decompressed(path, file) as stream:
        rows, done = 0, 0
        for batch in _joined(_arrow_reader(stream, header, columns, parsing)):
            malformed.reject()
            if batch.num_rows:
                positions = malformed.positions_between(rows, rows + batch.num_rows)
                yield RawChunk(path, batch, positions, raw_format)
                rows += batch.num_rows
            advance(file.tell() - done)
            done = file.tell()
        malformed.reject()
        check_quotes(path, raw_format, header, label, rows + malformed.total)
        advance(file.size() - done)


def _arrow_reader(
    stream: pa.NativeFile, header: CsvHeader, columns: Sequence[str], parsing: pa_csv.ParseOptions
) -> pa_csv.CSVStreamingReader:
    return pa_csv.open_csv(
        stream,
        # Several threads would lose the numbers of malformed rows.
        pa_csv.ReadOptions(
            use_threads=False,
            block_size=_CSV_BLOCK_BYTES,
            column_names=list(header.names),
            skip_rows=header.lines,
        ),
        parsing,
        pa_csv.ConvertOptions(
            include_columns=list(columns),
            column_types={name: pa.large_string() for name in columns},
        ),
    )


def _joined(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Joins small batches: every step of encoding costs something for each batch."""
    pending: list[pa.RecordBatch] = []
    for batch in batches:
        pending.append(batch)
        rows, size = sum(b.num_rows for b in pending), sum(b.nbytes for b in pending)
        if rows >= _CHUNK_ROWS or size >= _CHUNK_BYTES:
            yield pa.concat_batches(pending)
            pending = []
    if pending:
        yield pa.concat_batches(pending)


class _MalformedRows:
    """Collects the rows whose number of fields is wrong, as Arrow's parser meets them."""

    def __init__(
        self, path: Path, raw_format: RawFormat, skipped_lines: int, bad_rows: BadRows
    ) -> None:
        self._path, self._raw_format, self._bad_rows = path, raw_format, bad_rows
        self._skipped_lines = skipped_lines
        self._first: pa_csv.InvalidRow | None = None
        self._count = 0
        self._positions = array("q")

    def __call__(self, row: pa_csv.InvalidRow) -> str:
        self._first = self._first or row
        self._count += 1
        self._positions.append(self._row(row) - 1)
        return "skip"

    @property
    def total(self) -> int:
        """How many there are so far."""
        return len(self._positions)

    def positions_between(self, start: int, stop: int) -> Int64Array:
        """The 0-based data rows that well-formed rows ``start`` to ``stop`` are in the file."""
        well_formed, malformed = np.arange(start, stop), np.array(self._positions)
        # So many well-formed rows stand before each malformed one.
        before = malformed - np.arange(malformed.size)
        return well_formed + np.searchsorted(before, well_formed, side="right")

    def reject(self) -> None:
        """Hands the rows met since the last call to ``BadRows``."""
        first = self._first
        if first is not None:
            self._bad_rows.reject(
                "wrong number of fields", self._count, lambda: self._describe(first)
            )
        self._first, self._count = None, 0

    def _describe(self, row: pa_csv.InvalidRow) -> str:
        place = locate(self._path, self._row(row), self._raw_format)
        hint = f" ({_QUOTE_HINT})" if "\n" in (row.text or "") else ""
        return (
            f"{place}: {row.actual_columns} fields where {row.expected_columns} were expected{hint}"
        )

    def _row(self, row: pa_csv.InvalidRow) -> int:
        """The 1-based data row; Arrow counts the skipped lines as rows."""
        return row.number - self._skipped_lines


def _read_parquet(
    path: Path,
    columns: Sequence[str],
    raw_format: RawFormat,
    advance: Callable[[int], object],
) -> Iterator[RawChunk]:
    # Buffered reading: a row group may be larger than memory.
    with pq.ParquetFile(path, buffer_size=_PARQUET_BUFFER_BYTES, pre_buffer=False) as file:
        _check_columns(path, file.schema_arrow.names, columns)
        total, rows, done = file.metadata.num_rows, 0, 0
        size = path.stat().st_size
        batches = file.iter_batches(_batch_rows(file.metadata, columns), columns=list(columns))
        for batch in _joined(batches):
            if batch.num_rows:
                positions = np.arange(rows, rows + batch.num_rows)
                yield RawChunk(path, batch, positions, raw_format)
                rows += batch.num_rows
            advance(size * rows // total - done)
            done = size * rows // total


def _batch_rows(metadata: pq.FileMetaData, columns: Sequence[str]) -> int:
    """So many rows that a batch of them takes little memory, whatever the length of their lists."""
    sizes, wanted = [1.0], tuple(f"{name}." for name in columns)
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        parts = [group.column(i) for i in range(group.num_columns)]
        # Encoded, values that repeat take next to nothing.
        size = sum(
            max(part.total_uncompressed_size, 8 * part.num_values)
            for part in parts
            if f"{part.path_in_schema}.".startswith(wanted)
        )
        sizes.append(size / max(group.num_rows, 1))
    return max(1, min(_PARQUET_BATCH_ROWS, int(_PARQUET_BATCH_BYTES / max(sizes))))


def _check_columns(
    path: Path, names: Sequence[str], wanted: Sequence[str], has_header: bool = False
) -> None:
    """Raises unless every wanted column is there exactly once."""
    missing = [name for name in wanted if name not in names]
    if missing:
        close = [m for name in missing for m in difflib.get_close_matches(name, names, n=1)]
        hint = f" Did you mean {', '.join(map(repr, close))}?" if close else ""
        if any("\N{REPLACEMENT CHARACTER}" in name for name in names):
            hint += " Its header is not UTF-8 text."
        if has_header and len(names) == 1 and not _DELIMITERS.isdisjoint(names[0]):
            hint += " Is the delimiter another one? Then set data.delimiter."
        elif has_header and len(missing) == len(wanted):
            hint += " A file without a header line needs data.column_names."
        raise DataError(
            f"{path}: no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, names))}.{hint} Correct data.schema or the file"
        )
    repeated = [name for name, count in Counter(names).items() if count > 1 and name in wanted]
    if repeated:
        raise DataError(f"{path}: more than one column is named {', '.join(map(repr, repeated))}")
