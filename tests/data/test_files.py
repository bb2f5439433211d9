from __future__ import annotations

from pathlib import Path

import pytest

from torchrec_hilomoe.data.files import file_format, resolve_files
from torchrec_hilomoe.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.csv", "a.csv", "day=1/c.csv", "_SUCCESS", ".hidden", "_tmp/x.csv"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x\n")
    return tmp_path / "data"


def test_a_folder_means_its_data_files_in_order(folder: Path) -> None:
    found = [str(p.relative_to(folder)) for p in resolve_files([str(folder)], "data.train")]
    assert found == ["a.csv", "b.csv", "day=1/c.csv"]


def test_globs_and_lists(folder: Path) -> None:
    paths = [f"{folder}/b.*", f"{folder}/**/c.csv"]
    assert [p.name for p in resolve_files(paths, "data.train")] == ["b.csv", "c.csv"]


@pytest.mark.parametrize("path", ["missing.csv", "nothing*.csv"])
def test_a_path_that_names_nothing(tmp_path: Path, path: str) -> None:
    with pytest.raises(DataError, match=r"data\.valid: no .*file.*" + path.replace("*", r"\*")):
        resolve_files([str(tmp_path / path)], "data.valid")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.train: the folder .* holds no files"):
        resolve_files([str(tmp_path)], "data.train")


def test_formats_by_suffix() -> None:
    formats = {name: file_format(Path(name), "auto") for name in ("a.csv.gz", "b.TSV", "c.parquet")}
    assert formats == {"a.csv.gz": "csv", "b.TSV": "csv", "c.parquet": "parquet"}
    assert file_format(Path("part-0001"), "parquet") == "parquet"
    with pytest.raises(ConfigError, match=r"data\.format: the suffix of part-0001"):
        file_format(Path("part-0001"), "auto")
