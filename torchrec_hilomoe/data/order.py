"""Which rows are in which batch of an epoch, and which of them belong to a rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from torchrec_hilomoe.data.rows import CHUNK_ROWS, Int64Array

#: Batch norm needs two rows on each rank.
_FEWEST_ROWS_PER_RANK = 2


@dataclass(frozen=True)
class Shard:
    """The share of a rank: of each global batch the ``rank``-th of equal contiguous parts.

    Args:
        batch_size (int): rows of a global batch, a multiple of ``world_size``.
        rank (int): this rank.
        world_size (int): number of ranks.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1

    def part_of(self, rows: int, drop_rest: bool) -> range:
        """The positions that this rank has in a global batch of ``rows`` rows.

        Args:
            rows (int): rows of the global batch.
            drop_rest (bool): cut the batch to equal parts of at least two rows (training).
                Otherwise parts are rounded up: positions from ``rows`` on stand for padding.

        Returns:
            range: as long on every rank; empty on all if the batch is dropped.

        Example:
            >>> Shard(batch_size=8, rank=1, world_size=2).part_of(5, drop_rest=True)
            range(2, 4)
            >>> Shard(batch_size=8, rank=1, world_size=2).part_of(5, drop_rest=False)
            range(3, 6)
        """
        part = rows // self.world_size if drop_rest else -(-rows // self.world_size)
        if drop_rest and part < _FEWEST_ROWS_PER_RANK and rows < self.batch_size:
            part = 0
        return range(self.rank * part, (self.rank + 1) * part)


@dataclass(frozen=True)
class EpochOrder:
    """The order of the rows of one epoch; independent of ranks and workers.

    Shuffling permutes the chunks of the store, cuts the sequence into windows of whole batches
    and permutes the rows within each window.

    Args:
        num_rows (int): rows of the store.
        batch_size (int): rows of a global batch.
        window_rows (int): rows of a window, rounded to whole batches.
        seed (tuple[int, ...] | None): what decides the permutations; None leaves file order.
    """

    num_rows: int
    batch_size: int
    window_rows: int
    seed: tuple[int, ...] | None = None

    def windows(self) -> Iterator[Int64Array]:
        """Yields row numbers: whole batches, but for the end of the last window."""
        chunks = np.arange(-(-self.num_rows // CHUNK_ROWS))
        if self.seed is not None:
            chunks = np.random.default_rng(self.seed).permutation(chunks)
        starts = chunks * CHUNK_ROWS
        sizes = np.minimum(self.num_rows - starts, CHUNK_ROWS)
        ends = np.cumsum(sizes)
        shifts = starts - (ends - sizes)
        window = max(1, self.window_rows // self.batch_size) * self.batch_size
        for index, begin in enumerate(range(0, self.num_rows, window), start=1):
            places = np.arange(begin, min(begin + window, self.num_rows))
            rows = places + shifts[np.searchsorted(ends, places, side="right")]
            if self.seed is not None:
                np.random.default_rng([*self.seed, index]).shuffle(rows)
            yield rows
