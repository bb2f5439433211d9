from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from torchrec_hilomoe.config import parse_config
from torchrec_hilomoe.data import DataConfig, movielens, open_data
from torchrec_hilomoe.data.movielens import movielens_files
from torchrec_hilomoe.errors import DataError

CONF = Path(__file__).parents[2] / "conf" / "data" / "movielens100k.yaml"
GENRES = ["unknown", "Action", "Children's", "Comedy"]


def make_archive(path: Path) -> str:
    """An archive of the published layout; returns its SHA-256."""
    flags = {1: "0|1|0|1", 2: "0|0|1|0", 3: "1|0|0|0"}
    dates = {1: "01-Jan-1995", 2: "22-Mar-1996", 3: ""}
    titles = {1: 'Toy "Story" (1995)', 2: "Cité (1996)", 3: "unknown"}
    ratings = [
        (u, m, 1 + (u * m) % 5, 880000000 + 10 * u + m) for u in range(1, 11) for m in (1, 2, 3)
    ]
    files = {
        "u.data": "".join("\t".join(map(str, row)) + "\n" for row in ratings),
        "u.user": "".join(f"{u}|{20 + u}|{'MF'[u % 2]}|writer|{u:05d}\n" for u in range(1, 11)),
        "u.genre": "".join(f"{name}|{i}\n" for i, name in enumerate(GENRES)) + "\n",
        "u.item": "".join(f"{m}|{titles[m]}|{dates[m]}||http://x/{m}|{flags[m]}\n" for m in flags),
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(f"ml-100k/{name}", text.encode("latin-1"))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_archive_is_joined_and_split(tmp_path: Path) -> None:
    checksum = make_archive(tmp_path / "ml.zip")
    folder = movielens_files(tmp_path / "ml.zip", tmp_path / "cache", checksum)
    splits = [pq.read_table(folder / f"{s}.parquet") for s in ("train", "valid", "test")]
    assert [split.num_rows for split in splits] == [24, 3, 3]
    rows = {(r["user_id"], r["item_id"]): r for r in pa.concat_tables(splits).to_pylist()}
    assert set(rows) == {(u, m) for u in range(1, 11) for m in (1, 2, 3)}
    assert all(row["label"] == int(1 + (u * m) % 5 >= 4) for (u, m), row in rows.items())
    assert rows[3, 1] == {
        "label": 1,
        "user_id": 3,
        "item_id": 1,
        "timestamp": 880000031,
        "age": 23,
        "gender": "F",
        "occupation": "writer",
        "zip_code": "00003",
        "release_year": "1995",
        "genres": "Action|Comedy",
    }
    assert (rows[1, 2]["release_year"], rows[1, 2]["genres"]) == ("1996", "Children's")
    assert rows[1, 3]["release_year"] == ""
    order = [(row["user_id"], row["item_id"]) for row in splits[0].to_pylist()]
    assert order != sorted(order)


def test_the_split_is_the_same_every_time(tmp_path: Path) -> None:
    checksum = make_archive(tmp_path / "ml.zip")
    tables = [
        pq.read_table(movielens_files(tmp_path / "ml.zip", tmp_path / c, checksum) / "test.parquet")
        for c in "ab"
    ]
    assert tables[0] == tables[1]


def test_an_archive_in_the_cache_is_used_and_verified(tmp_path: Path) -> None:
    place = tmp_path / "cache" / "downloads" / "ml-100k.zip"
    place.parent.mkdir(parents=True)
    checksum = make_archive(place)
    assert (movielens_files(None, tmp_path / "cache", checksum) / "train.parquet").is_file()
    with pytest.raises(DataError, match=r"ml-100k\.zip: not the published archive: its SHA-256 is"):
        movielens_files(None, tmp_path / "cache")


def test_without_a_network_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Port 9 of this machine refuses connections, with a network and without.
    monkeypatch.setattr(movielens, "URL", "https://127.0.0.1:9/ml-100k.zip")
    with pytest.raises(DataError) as caught:
        movielens_files(None, tmp_path)
    message = str(caught.value)
    assert "Download https://127.0.0.1:9/ml-100k.zip by other means" in message
    assert f"put it at {tmp_path / 'downloads' / 'ml-100k.zip'}" in message
    assert list((tmp_path / "downloads").iterdir()) == []


def test_the_configured_schema_fits_the_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checksum = make_archive(tmp_path / "ml.zip")
    monkeypatch.setattr(movielens_files, "__defaults__", (checksum,))
    values = yaml.safe_load(CONF.read_text())
    del values["defaults"]  # Hydra's
    values |= {"train": str(tmp_path / "ml.zip"), "cache_dir": str(tmp_path / "cache")}
    source = open_data(parse_config(DataConfig, values), rank=0, world_size=1, seed=0)
    assert source.report["rows"] == {"train": 24, "valid": 3, "test": 3}
    assert len(source.features.sparse) == 8


def test_the_published_checksum_is_pinned() -> None:
    assert movielens.URL.startswith("https://files.grouplens.org/")
    assert len(movielens.SHA256) == 64
