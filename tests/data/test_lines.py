from __future__ import annotations

import gzip
from pathlib import Path

from torchrec_hilomoe.data.files import RawFormat
from torchrec_hilomoe.data.lines import locate


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
