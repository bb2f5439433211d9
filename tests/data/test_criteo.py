from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchrec.datasets.criteo import InMemoryBinaryCriteoIterDataPipe

from torchrec_hilomoe.config import parse_config
from torchrec_hilomoe.data import (
    CTRBatch,
    DataConfig,
    DataSource,
    load_encoder,
    open_data,
    open_encoded,
)
from torchrec_hilomoe.data import criteo as criteo_module
from torchrec_hilomoe.data import order as order_module
from torchrec_hilomoe.data import rows as rows_module
from torchrec_hilomoe.errors import ConfigError, DataError

pytest.importorskip("iopath")

RowsOf = Callable[[CTRBatch], list[tuple[Any, ...]]]
SIZES = [7 + i for i in range(26)]


def write_day(folder: Path, day: int, rows: int) -> Path:
    rng = np.random.default_rng(day)
    np.save(folder / f"day_{day}_dense.npy", rng.normal(size=(rows, 13)).astype(np.float32))
    np.save(folder / f"day_{day}_sparse.npy", rng.integers(0, 10**6, (rows, 26), dtype=np.int32))
    np.save(folder / f"day_{day}_labels.npy", rng.integers(0, 2, (rows, 1), dtype=np.int32))
    return folder / f"day_{day}_dense.npy"


@pytest.fixture
def days(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (criteo_module, order_module, rows_module):
        monkeypatch.setattr(module, "CHUNK_ROWS", 16)
    for day, rows in enumerate([40, 25, 31]):
        write_day(tmp_path, day, rows)
    return tmp_path


def opened(days: Path, world_size: int = 1, rank: int = 0, **values: Any) -> DataSource:
    given = {
        "source": "criteo_1tb",
        "train": [str(days / "day_0_dense.npy"), str(days / "day_1_dense.npy")],
        "valid": str(days / "day_2_*.npy"),
        "test": str(days / "day_2_*.npy"),
        "hash_sizes": SIZES,
        "batch_size": 12,
        "cache_dir": str(days / "cache"),
        **values,
    }
    config = parse_config(DataConfig, given, "data")
    return open_data(config, rank=rank, world_size=world_size, seed=0)


def torchrec_reader(
    days: Path, stage: str, numbers: list[int], rank: int, world_size: int
) -> InMemoryBinaryCriteoIterDataPipe:
    paths = [
        [str(days / f"day_{d}_{kind}.npy") for d in numbers]
        for kind in ("dense", "sparse", "labels")
    ]
    return InMemoryBinaryCriteoIterDataPipe(
        stage,
        *paths,
        batch_size=12 // world_size,
        rank=rank,
        world_size=world_size,
        mmap_mode=True,
        hashes=SIZES,
    )


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("split", "stage", "numbers"),
    [("train", "train", [0, 1]), ("valid", "val", [2]), ("test", "test", [2])],
)
def test_full_batches_are_those_of_torchrecs_reader(
    days: Path, rows_of: RowsOf, rank: int, split: str, stage: str, numbers: list[int]
) -> None:
    ours = list(opened(days, 2, rank, shuffle=False).loader(split))
    theirs = list(torchrec_reader(days, stage, numbers, rank, 2))
    full = {"train": 5, "valid": 1, "test": 1}[split]
    for mine, other in zip(ours[:full], theirs[:full], strict=True):
        assert mine.sparse_features.keys() == other.sparse_features.keys()
        expected = CTRBatch(other.dense_features, other.sparse_features, other.labels.float())
        assert rows_of(mine) == rows_of(expected)


def test_every_rank_has_as_many_batches_and_valid_and_test_share_the_day(days: Path) -> None:
    sources = [opened(days, 3, rank) for rank in range(3)]
    assert {len(list(source.loader("train"))) for source in sources} == {
        len(sources[0].loader("train"))
    }
    assert sources[0].report["rows"] == {"train": 65, "valid": 16, "test": 15}
    assert opened(days, test=None).report["rows"] == {"train": 65, "valid": 31}


def test_the_day_is_halved_however_its_path_is_spelled(
    days: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(days)
    for spelling in ("day_2_dense.npy", "./day_2_*.npy"):
        rows = opened(days, test=spelling).report["rows"]
        assert rows == {"train": 65, "valid": 16, "test": 15}


def test_copies_map_the_files_anew(days: Path) -> None:
    store = criteo_module.CriteoStore([days / f"day_{i}_dense.npy" for i in (0, 1)], SIZES)
    pickled = pickle.dumps(store)
    assert len(pickled) < 2000  # the rows are some 10,000 bytes
    copy = pickle.loads(pickled)
    assert copy.num_rows == 65
    for chunk in range(5):
        rows, expected = copy.chunk(chunk), store.chunk(chunk)
        for part in ("labels", "dense", "ids"):
            np.testing.assert_array_equal(getattr(rows, part), getattr(expected, part))


def test_training_rows_are_shuffled_over_files(days: Path, rows_of: RowsOf) -> None:
    def rows(epoch: int) -> list[tuple[Any, ...]]:
        return [r for b in opened(days).loader("train", epoch=epoch) for r in rows_of(b)]

    plain = [r for b in opened(days, shuffle=False).loader("train") for r in rows_of(b)]
    assert rows(0) == rows(0) != rows(1)
    assert sorted(rows(0)) == sorted(rows(1)) == sorted(plain)


def test_what_is_saved_opens_other_files(days: Path, rows_of: RowsOf) -> None:
    source = opened(days, test=None)
    source.save(days / "model")
    encoder = load_encoder(days / "model")
    assert encoder.features == source.features
    other = opened(days, hash_sizes=9)
    assert encoder.digest() == source.encoder.digest() != other.encoder.digest()
    assert [f.num_embeddings for f in source.features.sparse] == SIZES
    scored = open_encoded(
        days / "model", str(days / "day_2_dense.npy"), batch_size=12, rank=0, world_size=1
    )
    for mine, other in zip(scored.loader("test"), source.loader("valid"), strict=True):
        assert rows_of(mine) == rows_of(other)


def test_the_global_random_state_is_left_alone(days: Path) -> None:
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    opened(days)
    assert np.random.random() == expected


def test_one_size_serves_all_tables(days: Path) -> None:
    features = opened(days, hash_sizes=9).features.sparse
    assert {(f.num_embeddings, f.pooling) for f in features} == {(9, "sum")}


def test_missing_iopath_names_the_remedy(days: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "iopath", None)
    with pytest.raises(ConfigError, match=r'pip install "torchrec-hilomoe\[criteo\]"'):
        opened(days)


def test_bad_files_are_named(days: Path) -> None:
    (days / "day_1_labels.npy").unlink()
    with pytest.raises(DataError, match=r"day_1_labels\.npy: cannot be read as npy"):
        opened(days)
    np.save(days / "day_1_labels.npy", np.zeros((24, 1), np.int32))
    with pytest.raises(
        DataError, match=r"day_1_labels\.npy: .* shape \(24, 1\), expected \(25, 1\)"
    ):
        opened(days)
    (days / "day_1_labels.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match=r"day_1_labels\.npy: cannot be read as npy"):
        opened(days)
    np.save(days / "day_1_labels.npy", np.full((25, 1), 2, np.int32))
    with pytest.raises(DataError, match=r"day_1_labels\.npy: \d+ labels are not 0 or 1, such as 2"):
        list(opened(days).loader("train"))
    with pytest.raises(DataError, match=r"data\.train: no \*_dense\.npy file among"):
        opened(days, train=str(days / "*_sparse.npy"))


def test_only_one_file_can_be_halved(days: Path) -> None:
    both = str(days / "day_*_dense.npy")
    with pytest.raises(ConfigError, match="only a single file can be halved"):
        opened(days, valid=both, test=both)
