from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchrec_hilomoe.data import readers
from torchrec_hilomoe.data.bad_rows import BadRows
from torchrec_hilomoe.data.files import RawFormat
from torchrec_hilomoe.data.readers import RawChunk, read_chunks
from torchrec_hilomoe.errors import DataError

COLUMNS = ("label", "user")


def read(
    path: Path, columns: tuple[str, ...] = COLUMNS, mode: str = "raise", **raw_format: object
) -> list[RawChunk]:
    fmt = RawFormat(**raw_format)  # type: ignore[arg-type]
    return list(read_chunks(path, columns, fmt, BadRows(mode), lambda _: None))


def rows(chunks: list[RawChunk]) -> list[dict[str, object]]:
    return [row for chunk in chunks for row in chunk.batch.to_pylist()]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_csv_is_read_as_text_in_the_order_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '\ufeffuser,x,label\n007,1,0\n"a,b",2,1\n')
    expected = [{"label": "0", "user": "007"}, {"label": "1", "user": "a,b"}]
    assert rows(read(path)) == expected


def test_delimiters_and_headerless_files(tmp_path: Path) -> None:
    expected = [{"label": "1", "user": "u"}]
    assert rows(read(write(tmp_path / "a.tsv", "label\tuser\n1\tu\n"))) == expected
    assert rows(read(write(tmp_path / "a.csv", "label;user\n1;u\n"), delimiter=";")) == expected
    path = write(tmp_path / "a.txt", "u|1\n")
    assert rows(read(path, delimiter="|", column_names=("user", "label"))) == expected


def test_many_blocks_with_blank_lines_and_line_breaks_in_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_CSV_BLOCK_BYTES", 64)
    monkeypatch.setattr(readers, "_CHUNK_ROWS", 6)
    lines = [f'{i % 2},"user\n{i}"\n' + "\n" * (i % 3 == 0) for i in range(200)]
    chunks = read(write(tmp_path / "a.csv", "label,user\n" + "".join(lines)))
    assert len(chunks) > 20
    assert [row["user"] for row in rows(chunks)] == [f"user\n{i}" for i in range(200)]
    assert np.concatenate([chunk.positions for chunk in chunks]).tolist() == [*range(200)]


def test_malformed_rows_count_in_the_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_CSV_BLOCK_BYTES", 64)
    monkeypatch.setattr(readers, "_CHUNK_ROWS", 6)
    malformed = {0, 1, 17, 18, 19, 60, 199}
    lines = [f'{i % 2},"u\n{i}"' + ",x" * (i in malformed) + "\n\n" for i in range(200)]
    chunks = read(write(tmp_path / "a.csv", "\nlabel,user\n" + "".join(lines)), mode="skip")
    assert len(chunks) > 20
    users = [row["user"] for row in rows(chunks)]
    positions = np.concatenate([chunk.positions for chunk in chunks]).tolist()
    assert users == [f"u\n{i}" for i in positions]
    assert positions == [i for i in range(200) if i not in malformed]


def test_a_malformed_row_is_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = "".join(f"1,u{i}\n" for i in range(100))
    path = write(tmp_path / "a.csv", f"label,user\n{good}1,u,x\n{good}0\n")
    message = r"a\.csv: row 101 \(line 102\): 3 fields where 2 were expected: wrong number"
    with pytest.raises(DataError, match=message):
        read(path)
    monkeypatch.setattr(readers, "_CSV_BLOCK_BYTES", 256)
    bad_rows = BadRows("skip")
    chunks = list(read_chunks(path, COLUMNS, RawFormat(), bad_rows, lambda _: None))
    assert len(rows(chunks)) == 200
    assert dict(bad_rows.counts) == {"wrong number of fields": 2}


@pytest.mark.parametrize("header", ["\n\nlabel,user\n", '"label","user","no\nte"\n'])
def test_headers_over_several_lines_leave_the_rows_alone(tmp_path: Path, header: str) -> None:
    more = ",z" * ("te" in header)
    path = write(tmp_path / "a.csv", f"{header}1,u{more}\n\n0,v{more}\n0\n")
    bad_rows = BadRows("skip")
    chunks = list(read_chunks(path, COLUMNS, RawFormat(), bad_rows, lambda _: None))
    assert rows(chunks) == [{"label": "1", "user": "u"}, {"label": "0", "user": "v"}]
    assert dict(bad_rows.counts) == {"wrong number of fields": 1}
    lines = header.count("\n") + 4
    with pytest.raises(DataError, match=rf"row 3 \(line {lines}\): 1 fields where"):
        read(path)


@pytest.mark.parametrize("text", ["label,user", "label,user\n", "\nlabel,user\n\n"])
def test_a_file_of_a_header_alone_has_no_rows(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "a.csv", text)
    steps: list[int] = []
    assert not list(read_chunks(path, COLUMNS, RawFormat(), BadRows("raise"), steps.append))
    assert sum(steps) == len(text)
    with pytest.raises(DataError, match=r"a\.csv: no column 'item'"):
        read(path, ("label", "item"))


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "parquet"])
def test_progress_adds_up_to_the_size_of_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    text = b"label,user\n" + b"1,u\n" * 300_000
    if suffix == "parquet":
        pq.write_table(pa.table({"label": [1] * 300_000, "user": ["u"] * 300_000}), path)
    else:
        path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    steps: list[int] = []
    for _ in read_chunks(path, COLUMNS, RawFormat(), BadRows("raise"), steps.append):
        pass
    assert sum(steps) == path.stat().st_size


def test_long_lists_of_parquet_come_in_chunks_of_few_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(readers, "_PARQUET_BATCH_BYTES", 1 << 18)
    path = tmp_path / "a.parquet"
    lists = [[i] * 300 for i in range(5000)]  # encoded they take next to nothing
    table = pa.table({"label": range(5000), "a.b": pa.array(lists, pa.list_(pa.int32()))})
    pq.write_table(table, path)
    chunks = read(path, ("label", "a.b"))
    assert 5 <= len(chunks) <= 8
    assert max(chunk.batch.nbytes for chunk in chunks) < (1 << 20) + (1 << 18)
    assert rows(chunks) == table.to_pylist()
    assert np.concatenate([chunk.positions for chunk in chunks]).tolist() == [*range(5000)]


def test_batches_are_as_small_as_the_widest_row_group_of_the_columns_wants(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    wide = [["x"] * 1000] * 90 + [["x"]] * 10
    cells = [f"{i:050000d}" for i in range(100)]
    table = pa.table({"n": range(100), "a": wide, "ab": cells})
    pq.write_table(table, path, row_group_size=20, compression="none")
    metadata, size = pq.read_metadata(path), readers._PARQUET_BATCH_BYTES
    assert readers._batch_rows(metadata, ["n"]) == readers._PARQUET_BATCH_ROWS
    assert 0.9 < readers._batch_rows(metadata, ["n", "a"]) * 8000 / size <= 1
    assert 0.9 < readers._batch_rows(metadata, ["ab"]) * 50_000 / size <= 1
    pq.write_table(pa.table({"x": ["x" * (size + 1)]}), path, compression="none")
    assert readers._batch_rows(pq.read_metadata(path), ["x"]) == 1


def test_missing_columns_are_named_with_those_that_exist(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "label,users,item\n1,u,i\n")
    message = r"a\.csv: no column 'user'; it has 'label', 'users', 'item'\. Did you mean 'users'\?"
    with pytest.raises(DataError, match=message):
        read(path)
    pq.write_table(pa.table({"label": [1], "item": [2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no column 'user'; it has 'label', 'item'"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("label;user;item\n1;u;i\n", r"Is the delimiter another one\? Then set data\.delimiter\."),
        ("1,u,i\n0,v,i\n", r"A file without a header line needs data\.column_names\."),
    ],
)
def test_what_explains_that_no_column_is_found_is_named(tmp_path: Path, text: str, advice) -> None:
    with pytest.raises(DataError, match=advice):
        read(write(tmp_path / "a.csv", text))
    pq.write_table(pa.table({"a;b": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError) as caught:
        read(tmp_path / "a.parquet")
    assert "data.delimiter" not in str(caught.value)


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "label,user,user\n1,u,i\n")
    with pytest.raises(DataError, match=r"a\.csv: more than one column is named 'user'"):
        read(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"label": [1] * 1000, "user": ["u"] * 1000}), whole)
    broken = {
        "empty.csv": b"",
        "notgzip.csv.gz": b"label,user\n1,u\n",
        "cut.csv.gz": gzip.compress(b"label,user\n" + bytes(range(32, 127)) * 5000)[:-300],
        "latin1.csv": "label,user\n1,caf\u00e9\n".encode("latin-1"),
        "text.parquet": b"label,user\n1,u\n",
        "cut.parquet": whole.read_bytes()[:-50],
        "torn.parquet": b"PAR1" + b"\0" * 40 + whole.read_bytes()[44:],
        "nothing.parquet": b"",
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            read(tmp_path / name)


SEARCHES = ["a", "b", '"5 inch screen', "c", "d", "e", "f", '"best" tv', "g", "h"]


def searches(path: Path, texts: list[str]) -> Path:
    lines = [f"{i % 2}\t{text}\tu{i}\n" for i, text in enumerate(texts)]
    return write(path, "label\tsearch\tuser\n" + "".join(lines))


@pytest.mark.parametrize("mode", ["raise", "skip"])
@pytest.mark.parametrize(
    ("texts", "lines"),
    [
        (SEARCHES, "4 to 9"),
        ([*SEARCHES[:7], 'tv of 27"', "g", "h"], "4 to 9"),
        ([*SEARCHES[:4], "too\tmany", *SEARCHES[5:]], "4 to 9"),
        ([*SEARCHES[:3], 'tv of 27"', *SEARCHES[4:7], "g", "h"], "4 to 5"),
    ],
)
def test_quotes_that_join_rows_are_refused(
    tmp_path: Path, mode: str, texts: list[str], lines: str
) -> None:
    path = searches(tmp_path / "a.tsv", texts)
    message = rf"a\.tsv: row 3 \(lines {lines}\): a quote joins lines .*data\.quote_char=null"
    with pytest.raises(DataError, match=message):
        read(path, mode=mode)
    plain = rows(read(path, ("label", "search"), mode="skip", quote_char=None))
    assert [row["search"] for row in plain] == [text for text in texts if text != "too\tmany"]


def test_joined_rows_are_found_between_blank_lines_and_long_values(tmp_path: Path) -> None:
    text = f'\nlabel,user\n\n1,{"x" * 200_000}\n1,"a\nb"\n\n1,"c\n0,d"\n\n'
    with pytest.raises(DataError, match=r"a\.csv: row 3 \(lines 8 to 9\): a quote joins lines"):
        read(write(tmp_path / "a.csv", text))


def test_rows_that_are_joined_and_malformed_are_refused_even_where_such_rows_are_left_out(
    tmp_path: Path,
) -> None:
    path = searches(tmp_path / "a.tsv", SEARCHES[:7])
    with pytest.raises(DataError, match=r"row 3 \(line 8\): 2 fields .*data\.quote_char=null\)"):
        read(path)
    with pytest.raises(DataError, match=r"row 3 \(lines 4 to 8\): a quote joins lines"):
        read(path, mode="skip")


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_joined_rows_at_the_end_of_files_without_header_or_last_line_end(
    tmp_path: Path, line_end: str
) -> None:
    text = line_end.join(["1,u", '0,"v', "1,w"])
    (tmp_path / "a.csv").write_bytes(text.encode())
    with pytest.raises(DataError, match=r"a\.csv: row 2 \(lines 2 to 3\): a quote joins"):
        read(tmp_path / "a.csv", column_names=COLUMNS)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(text.encode()))
    assert len(rows(read(tmp_path / "a.csv.gz", column_names=COLUMNS, quote_char=None))) == 3


def test_a_quote_that_is_open_over_blocks_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_CSV_BLOCK_BYTES", 64)
    path = searches(tmp_path / "a.tsv", [*SEARCHES[:7] * 3, *"abcdefgh" * 20])
    with pytest.raises(DataError, match=r"a\.tsv: .*data\.quote_char=null"):
        read(path)


@pytest.mark.parametrize(("name", "delimiter"), [("a.tsv", "\t"), ("a.csv", ",")])
def test_quoted_values_are_kept_whole(tmp_path: Path, name: str, delimiter: str) -> None:
    listed = "to buy:\n1, eggs\n2 or 3 apples\nmilk"
    values = [listed, "a\tb,c", 'say "hi"', "two\nlines", "1,x\n\n0,y", "1\tx\n0\ty", '"', "", "'"]
    with (tmp_path / name).open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([COLUMNS, *((i % 2, value) for i, value in enumerate(values))])
    assert [row["user"] for row in rows(read(tmp_path / name))] == values


def test_another_quote_character(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "label,user\n1,'a,b'\n0,c\"\n")
    assert [row["user"] for row in rows(read(path, quote_char="'"))] == ["a,b", 'c"']


@pytest.mark.parametrize("row", [1, 1500])
def test_bytes_that_are_no_text_in_a_column_that_is_not_read(tmp_path: Path, row: int) -> None:
    lines = [b"label,title,user\n", *[b"1,a,u\n"] * 2000]
    lines[row] = b"1,caf\xe9,u\n"
    path = tmp_path / "latin1.csv"
    path.write_bytes(b"".join(lines))
    assert len(rows(read(path))) == 2000
    with pytest.raises(DataError, match=r"latin1.csv: .* #1.*: write the file as UTF-8, or leave"):
        read(path, columns=("label", "title"))


def test_a_header_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "utf16.csv"
    path.write_bytes("label,user\n1,a\n".encode("utf-16"))
    with pytest.raises(DataError, match="no column 'label', 'user'.* Its header is not UTF-8 text"):
        read(path)
