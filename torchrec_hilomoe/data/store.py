"""Encoded rows on disk: a memory-mapped Arrow IPC file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from torchrec_hilomoe.data.rows import CHUNK_ROWS, EncodedRows, IdBags

_BAG = "bag:"


class ArrowStore:
    """A memory-mapped Arrow IPC file, as :func:`write_store` makes it.

    Copies of the store in other processes map the file anew.

    Args:
        path (Path): the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrowStore, (self.path,)

    @property
    def num_rows(self) -> int:
        """Rows of the file."""
        last = self._reader.num_record_batches - 1
        return last * CHUNK_ROWS + self._reader.get_batch(last).num_rows

    def chunk(self, index: int) -> EncodedRows:
        """Views on a record batch of the file; no bytes are copied."""
        batch = self._reader.get_batch(index)
        names = batch.schema.names
        return EncodedRows(
            batch["label"].to_numpy(),
            _matrix(batch, "dense", np.float32),
            _matrix(batch, "ids", np.int32),
            tuple(
                IdBags(bags.offsets.to_numpy(), bags.values.to_numpy())
                for bags in (batch[name] for name in names if name.startswith(_BAG))
            ),
            batch["group"].to_numpy() if "group" in names else None,
        )


def _matrix(batch: pa.RecordBatch, name: str, dtype: Any) -> npt.NDArray[Any]:
    if name not in batch.schema.names:
        return np.empty((batch.num_rows, 0), dtype)
    return batch[name].flatten().to_numpy().reshape(batch.num_rows, -1)


def to_record_batch(rows: EncodedRows, bag_names: Sequence[str]) -> pa.RecordBatch:
    """The columns of the file: label, dense, ids, one list column per bag, group."""
    columns: dict[str, pa.Array] = {"label": pa.array(rows.labels)}
    for name, matrix in (("dense", rows.dense), ("ids", rows.ids)):
        if matrix.shape[1]:
            flat = pa.array(matrix.reshape(-1))
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])
    for name, bags in zip(bag_names, rows.bags, strict=True):
        offsets = pa.array(bags.offsets.astype(np.int32))
        columns[_BAG + name] = pa.ListArray.from_arrays(offsets, pa.array(bags.values))
    if rows.group is not None:
        columns["group"] = pa.array(rows.group)
    return pa.RecordBatch.from_pydict(columns)


def write_store(path: Path, batches: Iterable[pa.RecordBatch]) -> int:
    """Writes record batches of any size as chunks of ``CHUNK_ROWS`` rows.

    Args:
        path (Path): the file to write; none is written if there are no rows.
        batches (Iterable[pa.RecordBatch]): from :func:`to_record_batch`.

    Returns:
        int: rows written.
    """
    writer, rows = None, 0
    try:
        for chunk in _rechunk(batches):
            writer = writer or pa.ipc.new_file(str(path), chunk.schema)
            writer.write_batch(chunk)
            rows += chunk.num_rows
    finally:
        if writer is not None:
            writer.close()
    return rows


def _rechunk(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Cuts and joins batches to ``CHUNK_ROWS`` rows each; the last one holds the rest."""
    pending: list[pa.RecordBatch] = []
    for batch in batches:
        pending.append(batch)
        if sum(b.num_rows for b in pending) >= CHUNK_ROWS:
            whole = pa.concat_batches(pending)
            stop = whole.num_rows - whole.num_rows % CHUNK_ROWS
            for start in range(0, stop, CHUNK_ROWS):
                yield whole.slice(start, CHUNK_ROWS)
            pending = [whole.slice(stop)]
    rest = pa.concat_batches(pending) if pending else None
    if rest is not None and rest.num_rows:
        yield rest
