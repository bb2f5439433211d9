from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchrec_hilomoe.data import rows as rows_module
from torchrec_hilomoe.data import store as store_module
from torchrec_hilomoe.data.rows import EncodedRows, IdBags, gather
from torchrec_hilomoe.data.store import ArrowStore, to_record_batch, write_store


def random_rows(count: int, dense: int = 2, ids: int = 3, bags: int = 2) -> EncodedRows:
    rng = np.random.default_rng(count)
    lengths = [rng.integers(0, 4, count).astype(np.int32) for _ in range(bags)]
    return EncodedRows(
        rng.integers(0, 2, count).astype(np.float32),
        rng.normal(size=(count, dense)).astype(np.float32),
        rng.integers(0, 99, (count, ids)).astype(np.int32),
        tuple(IdBags.of_lengths(n, rng.integers(0, 99, n.sum()).astype(np.int32)) for n in lengths),
        rng.integers(-9, 9, count),
    )


def as_tuples(rows: EncodedRows) -> list[tuple[Any, ...]]:
    bags = [
        [tuple(part.tolist()) for part in np.split(bag.values, bag.offsets[1:-1])]
        for bag in rows.bags
    ]
    groups = [None] * len(rows.labels) if rows.group is None else rows.group.tolist()
    plain = zip(rows.labels.tolist(), rows.dense.tolist(), rows.ids.tolist(), groups, strict=True)
    return [(*row, *(bag[i] for bag in bags)) for i, row in enumerate(plain)]


def write(path: Path, rows: EncodedRows, pieces: int) -> ArrowStore:
    parts = np.array_split(np.arange(len(rows.labels)), pieces)
    names = [f"b{i}" for i in range(len(rows.bags))]
    assert write_store(path, (to_record_batch(rows.take(p), names) for p in parts)) == len(
        rows.labels
    )
    return ArrowStore(path)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    for module in (rows_module, store_module):
        monkeypatch.setattr(module, "CHUNK_ROWS", 16)
    return 16


@pytest.mark.parametrize("pieces", [1, 3, 40])
@pytest.mark.parametrize("shape", [(2, 3, 2), (0, 1, 0), (0, 0, 1), (1, 2, 0)])
def test_a_store_gives_back_what_was_written(
    tmp_path: Path, small_chunks: int, pieces: int, shape: tuple[int, int, int]
) -> None:
    rows = random_rows(100, *shape)
    store = write(tmp_path / "rows.arrow", rows, pieces)
    assert store.num_rows == 100
    chunks = [store.chunk(i) for i in range(7)]
    assert [len(chunk.labels) for chunk in chunks] == [16] * 6 + [4]
    assert as_tuples(EncodedRows.concatenate(chunks)) == as_tuples(rows)


def test_gather_takes_any_rows_in_any_order(tmp_path: Path, small_chunks: int) -> None:
    rows = random_rows(100)
    store = write(tmp_path / "rows.arrow", rows, 5)
    wanted = np.array([99, 3, 3, 47, 0, 98, 16, 15])
    loaded, position = gather(store, wanted)
    everything = as_tuples(rows)
    assert as_tuples(loaded.take(position)) == [everything[i] for i in wanted]
    assert as_tuples(loaded.take(position[2:5])) == [everything[i] for i in wanted[2:5]]


def test_a_store_travels_to_other_processes(tmp_path: Path) -> None:
    store = write(tmp_path / "rows.arrow", random_rows(10), 1)
    copy = pickle.loads(pickle.dumps(store))
    assert as_tuples(copy.chunk(0)) == as_tuples(store.chunk(0))


def test_nothing_is_written_without_rows(tmp_path: Path) -> None:
    empty = to_record_batch(random_rows(0), ["a", "b"])
    assert write_store(tmp_path / "rows.arrow", [empty]) == 0
    assert write_store(tmp_path / "rows.arrow", []) == 0
