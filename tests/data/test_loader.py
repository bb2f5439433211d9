from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from torchrec_hilomoe.data import BatchLoader, CTRBatch, FeatureSpec, SparseFeature
from torchrec_hilomoe.data import order as order_module
from torchrec_hilomoe.data import rows as rows_module
from torchrec_hilomoe.data.loader import LoaderOptions
from torchrec_hilomoe.data.order import Shard
from torchrec_hilomoe.data.rows import EncodedRows, IdBags

RowsOf = Callable[[CTRBatch], list[tuple[Any, ...]]]

FEATURES = FeatureSpec(
    ("x",), (SparseFeature("row", 1000), SparseFeature("odd", 3), SparseFeature("bag", 7, "sum"))
)


class MemoryStore:
    """n rows; row i has label i % 2, the dense value i, the ids (i, i % 2) and i % 3 bag ids."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def chunk(self, index: int) -> EncodedRows:
        start = index * rows_module.CHUNK_ROWS
        i = np.arange(start, min(start + rows_module.CHUNK_ROWS, self.num_rows))
        lengths = (i % 3).astype(np.int32)
        return EncodedRows(
            (i % 2).astype(np.float32),
            i[:, None].astype(np.float32),
            np.stack([i, i % 2], axis=1).astype(np.int32),
            (IdBags.of_lengths(lengths, np.repeat(i % 7, lengths).astype(np.int32)),),
            i * 10,
        )


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (order_module, rows_module):
        monkeypatch.setattr(module, "CHUNK_ROWS", 16)


def loader(
    rows: int = 100, rank: int = 0, world_size: int = 1, batch_size: int = 12, **options: Any
) -> BatchLoader:
    shard = Shard(batch_size, rank, world_size)
    return BatchLoader(MemoryStore(rows), FEATURES, LoaderOptions(shard, **options))


def test_a_batch_is_what_torchrec_expects(rows_of: RowsOf) -> None:
    batch = next(iter(loader()))
    assert rows_of(batch)[4:6] == [
        (0.0, (4.0,), ((4,), (0,), (4,)), 40),
        (1.0, (5.0,), ((5,), (1,), (5, 5)), 50),
    ]
    sparse = batch.sparse_features
    assert sparse.keys() == ["row", "odd", "bag"]
    assert sparse.stride() == 12
    assert sparse.length_per_key() == [12, 12, 12]
    assert (sparse.values().dtype, sparse.lengths().dtype) == (torch.int64, torch.int32)
    assert (batch.dense_features.dtype, batch.labels.dtype) == (torch.float32, torch.float32)
    tables = [
        EmbeddingBagConfig(
            name=f.name, embedding_dim=4, num_embeddings=f.num_embeddings, feature_names=[f.name]
        )
        for f in FEATURES.sparse
    ]
    pooled = EmbeddingBagCollection(tables=tables)
    expected = pooled.embedding_bags["bag"].weight[5] * 2
    torch.testing.assert_close(pooled(sparse)["bag"][5], expected)


@pytest.mark.parametrize(
    "options", [{}, {"train": True, "shuffle_seed": (1, 2), "window_rows": 40}]
)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_the_batches_of_one(
    rows_of: RowsOf, options: dict[str, Any], world_size: int
) -> None:
    alone = [rows_of(batch) for batch in loader(103, **options)]
    ranks = [
        [rows_of(batch) for batch in loader(103, rank, world_size, **options)]
        for rank in range(world_size)
    ]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert len({len(part) for part in parts}) == 1
        joined = [row for part in parts for row in part if row[0] != -1]
        assert joined == whole[: len(joined)]
        assert len(whole) - len(joined) < world_size


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(rows_of: RowsOf, num_workers: int) -> None:
    options: dict[str, Any] = {
        "train": True,
        "shuffle_seed": (5, 0),
        "window_rows": 48,
        "world_size": 2,
        "rank": 1,
    }
    inline = [rows_of(batch) for batch in loader(**options)]
    before = torch.get_rng_state()
    workers = [rows_of(batch) for batch in loader(num_workers=num_workers, **options)]
    assert workers == inline
    assert torch.equal(torch.get_rng_state(), before)


def _load_through_signals() -> None:
    os.setsid()  # not the group of the tests
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: received.append(number))
    batches = iter(loader(num_workers=2))
    labels = [label for _ in range(2) for label in next(batches).labels.tolist()]  # of both workers
    for number in (signal.SIGINT, signal.SIGTERM):  # as from a terminal and torchrun
        os.killpg(0, number)
    labels += [label for batch in batches for label in batch.labels.tolist()]
    sys.exit(received != [signal.SIGINT, signal.SIGTERM] or len(labels) != 100)


def test_workers_outlive_signals_to_the_process_group() -> None:
    process = multiprocessing.get_context("fork").Process(target=_load_through_signals)
    process.start()
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_pinned_for_a_gpu(num_workers: int) -> None:
    for batch in loader(num_workers=num_workers):
        assert batch.labels.is_pinned()
        assert batch.sparse_features.values().is_pinned()


def test_epochs_differ_and_seeds_repeat(rows_of: RowsOf) -> None:
    def rows(*seed: int) -> list[tuple[Any, ...]]:
        return [row for batch in loader(train=True, shuffle_seed=seed) for row in rows_of(batch)]

    assert rows(0, 0) == rows(0, 0)
    assert rows(0, 0) != rows(0, 1)
    assert rows(0, 0) != rows(1, 0)
    assert {row[1][0] for row in rows(0, 1)} == set(range(100))


@pytest.mark.parametrize(
    ("rows", "world_size", "sizes", "dropped"),
    [
        (24, 2, [6, 6], 0),
        (28, 2, [6, 6, 2], 0),
        (29, 2, [6, 6, 2], 1),
        (27, 2, [6, 6], 3),
        (26, 1, [12, 12, 2], 0),
        (25, 1, [12, 12], 1),
        (5, 2, [2], 1),
        (3, 2, [], 3),
    ],
)
def test_the_last_training_batch(
    rows: int, world_size: int, sizes: list[int], dropped: int
) -> None:
    for rank in range(world_size):
        train = loader(rows, rank, world_size, train=True)
        assert [len(batch.labels) for batch in train] == sizes
        assert len(train) == len(sizes)
        assert train.dropped_rows == dropped


@pytest.mark.parametrize("rows", [1, 2, 12, 13, 23, 30])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_sees_every_row_once_and_knows_which(rows: int, world_size: int) -> None:
    seen: dict[int, float] = {}
    for rank in range(world_size):
        evaluation = loader(rows, rank, world_size)
        batches = list(evaluation)
        assert len(batches) == len(evaluation) == -(-rows // 12)
        for number, batch in enumerate(batches):
            real = batch.labels != -1
            places = evaluation.rows(number)
            assert real.tolist() == [i < len(places) for i in range(len(real))]
            seen |= dict(zip(places, batch.dense_features[real, 0].tolist(), strict=True))
    assert seen == {i: float(i) for i in range(rows)}


def test_places_of_shuffled_rows_are_those_of_the_global_sequence() -> None:
    train = loader(100, 1, 2, train=True, shuffle_seed=(0, 0))
    assert [train.rows(i) for i in (0, 7, 8)] == [range(6, 12), range(90, 96), range(98, 100)]


def test_batches_move_with_their_group() -> None:
    batch = next(iter(loader()))
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, CTRBatch)
    assert moved.group is not None
    assert {t.device.type for t in (moved.labels, moved.group, moved.sparse_features.values())} == {
        "meta"
    }
    assert replace(batch, group=None).to(torch.device("cpu")).group is None


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("start", [0, 1, 5, 8])
def test_a_start_leaves_out_the_batches_before_it(
    rows_of: RowsOf, start: int, num_workers: int
) -> None:
    options = {"train": True, "shuffle_seed": (3,), "window_rows": 24}
    whole = [rows_of(batch) for batch in loader(**options)]
    late = loader(**options, start=start, num_workers=num_workers)
    assert [rows_of(batch) for batch in late] == whole[start:]
    assert len(late) == len(whole) - start


def test_batches_before_the_start_are_not_read() -> None:
    late = loader(window_rows=16, start=5)
    read: list[int] = []
    chunk = late._store.chunk
    late._store.chunk = lambda index: read.append(index) or chunk(index)
    list(late)
    assert min(read) == 5 * 12 // 16
