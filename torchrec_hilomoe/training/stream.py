"""The training batches of a rank as one endless stream with a position."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torchrec_hilomoe.data import CTRBatch, DataSource


class BatchStream(Iterator[CTRBatch]):
    """The training batches of this rank, epoch after epoch without end.

    Args:
        data (DataSource): with a train split.
        epoch (int): the epoch of the first batch.
        position (int): batches of that epoch to leave out; all of them if it has fewer, as when
            other numbers of ranks drop another rest.

    Attributes:
        epoch (int): the epoch of the next batch.
        position (int): batches of that epoch already taken.
        batches_per_epoch (int): the same on every rank.
    """

    def __init__(self, data: DataSource, epoch: int = 0, position: int = 0) -> None:
        self._data = data
        self.epoch = epoch
        self.batches_per_epoch = len(data.loader("train"))
        self.position = min(position, self.batches_per_epoch)
        self._iterator = iter(data.loader("train", epoch=epoch, start=self.position))

    def __next__(self) -> CTRBatch:
        if self.position == self.batches_per_epoch:
            self.epoch += 1
            self.position = 0
            self._iterator = iter(self._data.loader("train", epoch=self.epoch))
        self.position += 1
        return next(self._iterator)

    def until_evaluation(self, evaluations_per_epoch: int) -> int:
        """Batches from here to the next evaluation point of the epoch.

        Args:
            evaluations_per_epoch (int): evenly spread over it, the last one at its end.

        Returns:
            int: at least 1.
        """
        position = self.position % self.batches_per_epoch
        marks = (
            math.ceil(self.batches_per_epoch * i / evaluations_per_epoch)
            for i in range(1, evaluations_per_epoch + 1)
        )
        return next(mark - position for mark in marks if mark > position)
