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


def names_of(folder: Path, *paths: str) -> list[str]:
    found = resolve_files([f"{folder}/{path}" for path in paths], "data.train")
    return [str(path.relative_to(folder)) for path in found]


def test_a_glob_of_files_and_folders_means_all_of_them(folder: Path) -> None:
    part = folder / "b-2.csv" / "day=2" / "part-0.csv"
    part.parent.mkdir(parents=True)
    part.write_text("x\n")
    (folder / "b-3.csv").mkdir()
    assert names_of(folder, "b*") == ["b-2.csv/day=2/part-0.csv", "b.csv"]
    assert names_of(folder, "b-*") == ["b-2.csv/day=2/part-0.csv"]
    with pytest.raises(DataError, match=r"data\.train: no file matches .*b-3\*"):
        names_of(folder, "b-3*")


def test_a_glob_searches_hidden_folders_only_by_their_initial(folder: Path) -> None:
    (folder / "_SUCCESS").unlink()
    assert names_of(folder, "*") == ["a.csv", "b.csv", "day=1/c.csv"]
    assert names_of(folder, "_*") == ["_tmp/x.csv"]


def test_two_stars_name_no_file_twice(folder: Path) -> None:
    assert names_of(folder, "day*/**") == ["day=1/c.csv"]


def test_an_empty_path_does_not_mean_the_current_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=r"data\.test: an empty path"):
        resolve_files([""], "data.test")
    assert len(resolve_files(["."], "data.test")) == 3


@pytest.mark.parametrize("paths", [("a.csv", "a.csv"), ("*.csv", "a.csv"), ("day=1/../a.csv", "")])
def test_a_file_that_is_named_twice_is_refused(folder: Path, paths: tuple[str, str]) -> None:
    message = rf"data\.train: the file {folder}/a\.csv is named twice, by {folder}/.* and by "
    with pytest.raises(ConfigError, match=message):
        names_of(folder, *paths)


def test_a_link_to_a_file_of_the_same_folder_is_refused(folder: Path) -> None:
    (folder / "latest.csv").symlink_to(folder / "b.csv")
    with pytest.raises(ConfigError, match=r"by .*/b\.csv and by .*/latest\.csv; its rows"):
        resolve_files([str(folder)], "data.train")


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
    with pytest.raises(ConfigError, match=r"suffix of part-0001 .*\.pq, and \.csv, .*these also"):
        file_format(Path("part-0001"), "auto")
