from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from torchrec_hilomoe.config import parse_config
from torchrec_hilomoe.data import CTRBatch, DataConfig

Rows = Sequence[dict[str, Any]]


@pytest.fixture
def write_csv(tmp_path: Path) -> Callable[[str, Rows], Path]:
    def write(name: str, rows: Rows) -> Path:
        path = tmp_path / name
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return path

    return write


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., DataConfig]:
    """A validated configuration with a cache of its own."""

    def make(train: Path | str | None, schema: dict[str, Any], **values: Any) -> DataConfig:
        given = {"cache_dir": str(tmp_path / "cache"), "batch_size": 4, "schema": schema, **values}
        given["train"] = None if train is None else str(train)
        return parse_config(DataConfig, given, "data")

    return make


@pytest.fixture
def shared_data() -> Path:
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}")
    return folder


@pytest.fixture
def rows_of() -> Callable[[CTRBatch], list[tuple[Any, ...]]]:
    """A batch as one tuple per row: label, dense values, one tuple of ids per key, group."""

    def rows(batch: CTRBatch) -> list[tuple[Any, ...]]:
        bags = [
            [tuple(ids.tolist()) for ids in jagged.to_dense()]
            for jagged in batch.sparse_features.to_dict().values()
        ]
        group = [None] * len(batch.labels) if batch.group is None else batch.group.tolist()
        dense = [tuple(row) for row in batch.dense_features.tolist()]
        return list(zip(batch.labels.tolist(), dense, zip(*bags, strict=True), group, strict=True))

    return rows
