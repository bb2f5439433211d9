"""Batches of encoded rows for one rank."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from torchrec_hilomoe.data.batch import CTRBatch, to_batch
from torchrec_hilomoe.data.features import FeatureSpec
from torchrec_hilomoe.data.order import EpochOrder, Shard
from torchrec_hilomoe.data.rows import CHUNK_ROWS, EncodedRows, Int64Array, RowStore, gather

#: The label of rows that only fill up the last batch of an evaluation.
PADDING_LABEL = -1.0


@dataclass(frozen=True)
class LoaderOptions:
    """How a :class:`BatchLoader` cuts an epoch into batches.

    Args:
        shard (Shard): the rank's share of each global batch.
        train (bool): cut the last batch to equal parts of at least two rows; otherwise pad it.
        shuffle_seed (tuple[int, ...] | None): what decides the order; None keeps file order.
        window_rows (int): rows of all ranks within which single rows are shuffled.
        num_workers (int): processes that prepare batches; 0 prepares them in line.
        start (int): the first batch of the epoch that is loaded; earlier ones are not read.
    """

    shard: Shard
    train: bool = False
    shuffle_seed: tuple[int, ...] | None = None
    window_rows: int = CHUNK_ROWS
    num_workers: int = 0
    start: int = 0


class BatchLoader(Iterable[CTRBatch]):
    """The batches of one rank in one epoch; the same number, of the same sizes, on every rank.

    The global sequence of rows does not depend on ranks and workers. Global batch i is the rows
    ``[i * batch_size, (i + 1) * batch_size)`` of it, and each rank takes a contiguous part.

    For training the last global batch is cut to equal parts, or left out if these would have
    fewer than two rows. For evaluation every row comes exactly once over all ranks, in file
    order; the last global batch is filled up with copies of its last row whose label is -1
    (``PADDING_LABEL``): **rows with label -1 are padding and must be left out of loss, metrics
    and predictions**. They are the last rows of a batch. :meth:`rows` tells which rows of the
    split a batch holds. Where there is a GPU, batches lie in page-locked memory.

    Args:
        store (RowStore): the encoded rows.
        features (FeatureSpec): their features.
        options (LoaderOptions): the rank's share and the order.
    """

    def __init__(self, store: RowStore, features: FeatureSpec, options: LoaderOptions) -> None:
        self._store = store
        self._features = features
        self._options = options

    def __len__(self) -> int:
        """Batches of each rank, from the start on."""
        full, rest = divmod(self._store.num_rows, self._options.shard.batch_size)
        return full + (1 if self._part_of(rest) else 0) - self._options.start

    def __iter__(self) -> Iterator[CTRBatch]:
        pin = torch.cuda.is_available()  # the pipelines copy to GPUs while these compute
        if not self._options.num_workers:
            batches = self._batches(0, 1)
            return (batch.pin_memory() for batch in batches) if pin else batches
        # An own generator: workers must not draw from the one that training draws from.
        return iter(
            DataLoader(
                _WorkerShare(self),
                batch_size=None,
                num_workers=self._options.num_workers,
                generator=torch.Generator(),
                pin_memory=pin,
                worker_init_fn=_leave_process_group,
            )
        )

    @property
    def dropped_rows(self) -> int:
        """Rows of the epoch that no rank gets."""
        rest = self._store.num_rows % self._options.shard.batch_size
        if not self._options.train:
            return 0
        return rest - len(self._part_of(rest)) * self._options.shard.world_size

    def rows(self, batch: int) -> range:
        """The places that the rows of a batch have in the global sequence, padding left out.

        Without shuffling these are row numbers of the split: position k of the batch is row
        ``rows(batch)[k]``, counted over all files of the split without the rows skipped as bad.

        Args:
            batch (int): number of a batch of this rank, from 0.

        Returns:
            range: at most as long as the batch.
        """
        start = batch * self._options.shard.batch_size
        size = min(self._options.shard.batch_size, self._store.num_rows - start)
        part = self._part_of(size)
        return range(start + min(part.start, size), start + min(part.stop, size))

    def _part_of(self, rows: int) -> range:
        return self._options.shard.part_of(rows, drop_rest=self._options.train)

    def _batches(self, worker: int, num_workers: int) -> Iterator[CTRBatch]:
        """From the start on, this rank's batches of numbers ``worker`` modulo ``num_workers``."""
        order = EpochOrder(
            self._store.num_rows,
            self._options.shard.batch_size,
            self._options.window_rows,
            self._options.shuffle_seed,
        )
        numbers = count(-self._options.start)
        for window in order.windows():
            numbered = zip(self._shares(window), numbers, strict=False)
            shares = [s for s, n in numbered if n >= 0 and n % num_workers == worker]
            if not shares:
                continue
            loaded, position = gather(self._store, np.concatenate([rows for rows, _ in shares]))
            stop = 0
            for rows, padding in shares:
                start, stop = stop, stop + len(rows)
                yield self._to_batch(loaded.take(position[start:stop]), padding)

    def _shares(self, window: Int64Array) -> Iterator[tuple[Int64Array, int]]:
        """The rows of this rank in each global batch of a window, and how many are padding."""
        size = self._options.shard.batch_size
        for begin in range(0, len(window), size):
            rows = window[begin : begin + size]
            part = self._part_of(len(rows))
            if part:
                padding = max(0, part.stop - max(len(rows), part.start))
                yield rows[np.minimum(part, len(rows) - 1)], padding

    def _to_batch(self, rows: EncodedRows, padding: int) -> CTRBatch:
        batch = to_batch(rows, [feature.name for feature in self._features.sparse])
        if padding:
            batch.labels[-padding:] = PADDING_LABEL
        return batch


def _leave_process_group(worker: int) -> None:
    """Signals that a terminal or torchrun sends to all of it are for the training to answer.

    It needs the workers until it has finished its batch, and ends them itself.
    """
    os.setsid()


class _WorkerShare(IterableDataset[CTRBatch]):
    """Deals the batches out to the workers of a ``DataLoader``, which collects them in order."""

    def __init__(self, loader: BatchLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[CTRBatch]:
        info = get_worker_info()
        if info is None:
            raise RuntimeError("a share of the batches exists only in a worker of a DataLoader")
        return self._loader._batches(info.id, info.num_workers)
