"""TorchRec's batch with the group of each row, and how encoded rows become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_hilomoe.data.rows import EncodedRows


@dataclass
class CTRBatch(Batch):
    """A ``torchrec`` batch of B rows; the pipelines move it like any other.

    Rows with label -1 are padding (see :class:`~torchrec_hilomoe.data.BatchLoader`).

    Args:
        dense_features (torch.Tensor): float32, [B, number of dense features].
        sparse_features (KeyedJaggedTensor): int64 values and int32 lengths, stride B.
        labels (torch.Tensor): float32, [B].
        group (torch.Tensor | None): int64, [B]: a stable hash of the group column, for grouped
            AUC, ``NO_GROUP`` where it has no value; None for data without one.
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


def to_batch(rows: EncodedRows, keys: Sequence[str]) -> CTRBatch:
    """Makes a batch of encoded rows, in their order.

    Args:
        rows (EncodedRows): B rows; dense features, labels and groups are not copied.
        keys (Sequence[str]): names of the sparse features, single-valued ones first.

    Returns:
        CTRBatch: on the CPU.
    """
    size = len(rows.labels)
    ones = np.ones(rows.ids.size, np.int32)
    values = np.concatenate([rows.ids.T.reshape(-1), *(bags.values for bags in rows.bags)])
    lengths = np.concatenate([ones, *(bags.lengths for bags in rows.bags)])
    sparse = KeyedJaggedTensor(
        keys=list(keys),
        # FBGEMM looks up int64; fewer bits on disk are widened here once.
        values=torch.from_numpy(values.astype(np.int64)),
        lengths=torch.from_numpy(lengths),
        stride=size,
        length_per_key=[size] * rows.ids.shape[1] + [len(bags.values) for bags in rows.bags],
    )
    group = None if rows.group is None else torch.from_numpy(rows.group)
    return CTRBatch(torch.from_numpy(rows.dense), sparse, torch.from_numpy(rows.labels), group)
