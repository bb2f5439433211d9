"""TorchRec's batch with the group of each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchrec.datasets.utils import Batch


@dataclass
class CTRBatch(Batch):
    """A ``torchrec`` batch of B rows; the pipelines move and pin it like any other.

    Rows with label -1 are padding (see :class:`~torchrec_hilomoe.data.BatchLoader`).

    Args:
        dense_features (torch.Tensor): float32, [B, number of dense features].
        sparse_features (KeyedJaggedTensor): int64 values and int32 lengths, stride B.
        labels (torch.Tensor): float32, [B].
        group (torch.Tensor | None): int64, [B]: a stable hash of the group column, for grouped
            AUC; None for data without one.
    """

    group: torch.Tensor | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> CTRBatch:
        """Copies the batch to ``device``."""
        return CTRBatch(
            dense_features=self.dense_features.to(device=device, non_blocking=non_blocking),
            sparse_features=self.sparse_features.to(device=device, non_blocking=non_blocking),
            labels=self.labels.to(device=device, non_blocking=non_blocking),
            group=None
            if self.group is None
            else self.group.to(device=device, non_blocking=non_blocking),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the memory of the batch until the work queued on ``stream`` is done."""
        super().record_stream(stream)
        if self.group is not None:
            self.group.record_stream(stream)

    def pin_memory(self) -> CTRBatch:
        """Copies the batch to page-locked memory."""
        return CTRBatch(
            dense_features=self.dense_features.pin_memory(),
            sparse_features=self.sparse_features.pin_memory(),
            labels=self.labels.pin_memory(),
            group=None if self.group is None else self.group.pin_memory(),
        )
