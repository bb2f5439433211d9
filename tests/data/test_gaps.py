from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from torchrec_hilomoe.data import DataConfig, open_data, readers


@pytest.mark.parametrize("chunk_rows", [2, 1 << 17])
def test_rows_that_are_left_out_count_over_all_files(
    tmp_path: Path,
    make_config: Callable[..., DataConfig],
    monkeypatch: pytest.MonkeyPatch,
    chunk_rows: int,
) -> None:
    monkeypatch.setattr(readers, "_CHUNK_ROWS", chunk_rows)
    monkeypatch.setattr(readers, "_CSV_BLOCK_BYTES", 32)
    (tmp_path / "train").mkdir()
    parts = [
        ["7,0,a", "1,0,b", "0", "1,oops,c", "1,0,d", "0,0,e,x"],
        ["0,0,f", ",0,g", "1,0,h"],
        ["1,0,i"],
    ]
    for number, lines in enumerate(parts):
        text = "\n\n".join(["label,x,user", *lines]) + "\n"
        (tmp_path / "train" / f"{number}.csv").write_text(text)
    schema = {"dense": ["x"], "categorical": ["user"]}
    config = make_config(tmp_path / "train", schema, on_bad_row="skip")
    for _ in ("encoded", "from the cache"):
        source = open_data(config, rank=0, world_size=1, seed=0)
        assert source.positions("train").tolist() == [1, 4, 6, 8, 9]


def test_without_bad_rows_positions_are_those_of_the_rows(
    tmp_path: Path, make_config: Callable[..., DataConfig]
) -> None:
    (tmp_path / "train.csv").write_text("label,user\n1,a\n0,b\n")
    config = make_config(tmp_path / "train.csv", {"categorical": ["user"]})
    source = open_data(config, rank=0, world_size=1, seed=0)
    assert source.positions("train").tolist() == [0, 1]
