from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from torchrec_hilomoe.data import DataConfig, open_data

#: Texts that Arrow would take for numbers, booleans and times, and write otherwise.
COLUMNS = {
    "zeros": lambda i: f"{i:04d}",
    "decimals": lambda i: f"{i}.0",
    "hashes": lambda i: str(2**63 + 1000 + i),
    "booleans": lambda i: str(i % 2 == 0),
    "times": lambda i: f"2024-05-01T12:{i % 60:02d}:00",
    "marks": lambda i: "NA" if i % 2 else "7",
}


def write_rows(path: Path, delimiter: str, rows: int = 40, header: bool = True) -> list[str]:
    names = ["label", *COLUMNS]
    lines = [delimiter.join(names)] if header else []
    lines += [
        delimiter.join([str(i % 3 % 2), *(write(i) for write in COLUMNS.values())])
        for i in range(rows)
    ]
    path.write_text("\n".join(lines) + "\n")
    return names


def test_carved_halves_are_the_valid_file(load, tmp_path: Path) -> None:
    valid = tmp_path / "valid.csv"
    valid.write_text("label,user\n" + "".join(f"{i % 2},{i}\n" for i in range(101)))
    carved, data = load("accuracy_splits").carved, DataConfig(valid=str(valid))
    paths = [carved(data, tmp_path / work, "shop") for work in ("a", "b")]
    first, second = ([parquet.read_table(path) for path in halves] for halves in paths)
    assert first == second
    users = [half["user"].to_pylist() for half in first]
    assert [len(half) for half in users] == [51, 50]
    assert sorted(map(int, users[0] + users[1])) == list(range(101))
    assert all(half == sorted(half, key=int) for half in users)


def test_a_carving_that_was_cut_off_leaves_no_half(load, tmp_path: Path, monkeypatch) -> None:
    splits = load("accuracy_splits")
    (tmp_path / "valid.csv").write_text("label\n1\n0\n")

    def cut_off(rows, path) -> None:
        path.write_bytes(b"PAR1")
        raise KeyboardInterrupt

    monkeypatch.setattr(splits.parquet, "write_table", cut_off)
    with pytest.raises(KeyboardInterrupt):
        splits.carved(DataConfig(valid=str(tmp_path / "valid.csv")), tmp_path / "work", "shop")
    assert not list(tmp_path.glob("work/*.parquet"))


def test_files_that_change_are_cut_anew(load, tmp_path: Path) -> None:
    splits, file = load("accuracy_splits"), tmp_path / "rows.csv"
    data, work = DataConfig(train=str(file), valid=str(file)), tmp_path / "work"

    def parts() -> list[Path]:
        return [*splits.carved(data, work, "shop"), splits.sampled(data, work, "shop", 1)]

    file.write_text("label,user\n1,a\n0,b\n")
    first = parts()
    written = [part.stat().st_mtime_ns for part in first]
    assert parts() == first
    assert [part.stat().st_mtime_ns for part in first] == written
    file.write_text("label,user\n1,c\n0,d\n")
    for part in parts():
        assert set(parquet.read_table(part)["user"].to_pylist()) <= {"c", "d"}


@pytest.mark.parametrize("form", ["csv", "tsv", "no header"])
def test_ids_are_those_of_the_file_that_was_cut(load, tmp_path: Path, form: str) -> None:
    delimiter = "," if form == "csv" else "\t"
    file = tmp_path / ("rows.csv" if form == "csv" else "rows.tsv")
    names = write_rows(file, delimiter, header=form != "no header")
    overrides = ["data=tabular", f"data.schema.categorical=[{','.join(COLUMNS)}]"]
    if form == "no header":
        overrides += ["data.format=csv", f"data.column_names=[{','.join(names)}]"]
    entry = load("accuracy_plan").Entry("shop", "m", {"train": file.name, "valid": file.name}, [])
    entry.overrides.extend(overrides)
    runs = load("accuracy_runs")
    runner = runs.Runner(runs.RunTable(tmp_path / "r.csv"), tmp_path, tmp_path, float("inf"))
    given = dict(o.replace("'", "").split("=") for o in runner._files(entry, with_test=True))
    data = load("accuracy_splits").data_of(
        entry, {key: given[f"data.{key}"] for key in ("train", "valid", "test")}
    )
    data.format, data.cache_dir = given["data.format"], str(tmp_path / "cache")
    source = open_data(data, rank=0, world_size=1, seed=0)
    for half in ("valid", "test"):
        batch = next(iter(source.loader(half)))
        assert batch.labels.numel() == 20
        assert (batch.sparse_features.values() > 0).all()  # known, all of them


def test_folders_of_parts_are_cut(load, tmp_path: Path) -> None:
    for day in (1, 2):
        part = tmp_path / "valid" / f"dt=2024-01-0{day}" / "part-0.parquet"
        part.parent.mkdir(parents=True)
        ids = pa.array(2**62 + np.arange(10) + 10 * day)
        parquet.write_table(pa.table({"label": [0, 1] * 5, "user": ids}), part)
    (tmp_path / "valid" / "_SUCCESS").touch()
    data = DataConfig(valid=str(tmp_path / "valid"))
    halves = load("accuracy_splits").carved(data, tmp_path / "work", "shop")
    users = [user for half in halves for user in parquet.read_table(half)["user"].to_pylist()]
    assert sorted(users) == [2**62 + i for i in range(10, 30)]


def test_files_that_cannot_be_cut_end_their_entry_alone(load, tmp_path: Path) -> None:
    runs = load("accuracy_runs")
    entry = load("accuracy_plan").Entry("shop", "m", {"train": "no.csv", "valid": "no.csv"}, [])
    runner = runs.Runner(runs.RunTable(tmp_path / "r.csv"), tmp_path, tmp_path, float("inf"))
    with pytest.raises(runs.RunError, match="no such file"):
        runner.run(entry, "seed", 0, [])
