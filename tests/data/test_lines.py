from __future__ import annotations

import csv
import gzip
from pathlib import Path

import pytest

from torchrec_hilomoe.data.files import RawFormat
from torchrec_hilomoe.data.lines import CsvHeader, locate, read_header


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_lines_are_counted_with_header_blanks_and_line_breaks(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'label,user\n\n1,"a\nb"\n0,c\n')
    assert locate(path, 1, RawFormat()).endswith("row 1 (line 4)")
    assert locate(path, 2, RawFormat()).endswith("row 2 (line 5)")
    zipped = tmp_path / "b.csv.gz"
    zipped.write_bytes(gzip.compress(b"1,a\n0,b\n"))
    assert locate(zipped, 2, RawFormat(column_names=("label", "user"))).endswith("row 2 (line 2)")


@pytest.mark.parametrize(
    ("text", "names", "lines", "has_more"),
    [
        ("a,b\n1,2\n", ("a", "b"), 1, True),
        ("\r\n\r\na,b\r\n1,2\r\n", ("a", "b"), 3, True),
        ('a,"b\nc"\n1,2\n', ("a", "b\nc"), 2, True),
        ("\ufeffa,b\r1,2\r", ("a", "b"), 1, True),
        ("a,b\n", ("a", "b"), 1, False),
        ("a,b", ("a", "b"), 1, False),
    ],
)
def test_headers_over_several_lines(
    tmp_path: Path, text: str, names: tuple[str, ...], lines: int, has_more: bool
) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode())
    assert read_header(path, RawFormat()) == CsvHeader(names, lines, has_more)


def test_configured_names_skip_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "1,2\n")
    assert read_header(path, RawFormat(column_names=("a", "b"))) == CsvHeader(("a", "b"), 0, True)


def test_a_row_behind_long_fields_and_other_encodings_is_located(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"label,user\n1," + b"x" * 200_000 + b"\n1,caf\xe9\n2,b\n")
    former = csv.field_size_limit(1000)
    try:
        assert locate(path, 3, RawFormat()).endswith("row 3 (line 4)")
    finally:
        limit = csv.field_size_limit(former)
    assert limit == 1000


def test_rows_are_located_by_the_quotes_of_the_format(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "label,user\n1,'a\nb'\n0,\"c\n1,d\n")
    assert locate(path, 2, RawFormat(quote_char="'")).endswith("row 2 (line 4)")
    assert locate(path, 2, RawFormat(quote_char=None)).endswith("row 2 (line 3)")
    header = write(tmp_path / "b.csv", '"label,user\n')
    assert read_header(header, RawFormat(quote_char=None)).names == ('"label', "user")
