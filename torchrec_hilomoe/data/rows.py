"""Encoded rows in memory, and how they are gathered from a store by row number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

#: Rows of every chunk of a store but the last.
CHUNK_ROWS = 65_536

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class IdBags:
    """The ids of a multi-valued feature in n rows.

    Args:
        offsets (npt.NDArray[np.signedinteger]): where each row begins in ``values``, [n + 1].
        values (npt.NDArray[np.int32]): table rows, row after row.
    """

    offsets: npt.NDArray[np.signedinteger[Any]]
    values: Int32Array

    @classmethod
    def of_lengths(cls, lengths: Int32Array, values: Int32Array) -> IdBags:
        """Bags of the given lengths."""
        return cls(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), values)

    @property
    def lengths(self) -> Int32Array:
        """Ids of each row, [n]."""
        return np.diff(self.offsets).astype(np.int32)

    def take(self, rows: Int64Array) -> IdBags:
        """The bags of the given rows, in the given order."""
        starts = self.offsets[rows].astype(np.int64)
        lengths = self.offsets[rows + 1] - starts
        ends = np.cumsum(lengths)
        # Id k of the result lies at its bag's old start plus its rank within the bag.
        shift = np.repeat(starts - (ends - lengths), lengths)
        return IdBags.of_lengths(lengths, self.values[shift + np.arange(shift.size)])

    @classmethod
    def concatenate(cls, parts: Sequence[IdBags]) -> IdBags:
        """Joins bags of the same feature."""
        lengths = np.concatenate([part.lengths for part in parts])
        return cls.of_lengths(lengths, np.concatenate([part.values for part in parts]))


@dataclass(frozen=True)
class EncodedRows:
    """n encoded rows.

    Args:
        labels (npt.NDArray[np.float32]): [n]; NaN where they are not known.
        dense (npt.NDArray[np.float32]): [n, number of dense features].
        ids (npt.NDArray[np.int32]): table rows of the single-valued features, [n, number].
        bags (tuple[IdBags, ...]): per multi-valued feature.
        group (npt.NDArray[np.int64] | None): hash of the group column, [n].
    """

    labels: npt.NDArray[np.float32]
    dense: npt.NDArray[np.float32]
    ids: Int32Array
    bags: tuple[IdBags, ...]
    group: Int64Array | None

    def take(self, rows: Int64Array) -> EncodedRows:
        """The given rows, in the given order."""
        return EncodedRows(
            self.labels[rows],
            self.dense[rows],
            self.ids.take(rows, axis=0),
            tuple(bags.take(rows) for bags in self.bags),
            None if self.group is None else self.group[rows],
        )

    @classmethod
    def concatenate(cls, parts: Sequence[EncodedRows]) -> EncodedRows:
        """Joins rows of the same features."""
        groups = [part.group for part in parts if part.group is not None]
        return cls(
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.dense for part in parts]),
            np.concatenate([part.ids for part in parts]),
            tuple(
                IdBags.concatenate(bags)
                for bags in zip(*(part.bags for part in parts), strict=True)
            ),
            np.concatenate(groups) if groups else None,
        )


class RowStore(Protocol):
    """Encoded rows in chunks of ``CHUNK_ROWS`` rows, the last one shorter."""

    @property
    def num_rows(self) -> int:
        """Rows of all chunks."""

    def chunk(self, index: int) -> EncodedRows:
        """Rows ``index * CHUNK_ROWS`` and the following ones."""


def gather(store: RowStore, rows: Int64Array) -> tuple[EncodedRows, Int64Array]:
    """Copies rows out of a store, chunk by chunk.

    Args:
        store (RowStore): where the rows are.
        rows (Int64Array): n row numbers in any order.

    Returns:
        tuple[EncodedRows, Int64Array]: the rows in the order of their chunks, and where each of
        ``rows`` is among them: ``loaded.take(position[i:j])`` are ``rows[i:j]``.
    """
    chunks = rows // CHUNK_ROWS
    # NumPy sorts 16-bit keys by radix, several times faster.
    keys = chunks.astype(np.uint16 if store.num_rows <= CHUNK_ROWS << 16 else np.int64)
    order = np.argsort(keys, kind="stable")
    parts = []
    counts = np.bincount(chunks)
    for index, stop in zip(np.flatnonzero(counts), np.cumsum(counts[counts > 0]), strict=True):
        inside = rows[order[stop - counts[index] : stop]] - index * CHUNK_ROWS
        parts.append(store.chunk(int(index)).take(inside))
    position = np.empty_like(order)
    position[order] = np.arange(order.size)
    return EncodedRows.concatenate(parts), position
