"""The train wrapper: task loss plus auxiliary losses, for TorchRec's train pipelines."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import distributed as dist
from torch import nn
from torchrec.datasets.utils import Batch

from torchrec_hilomoe.models.ensemble import TaskLoss
from torchrec_hilomoe.modules import AuxiliaryLoss, AuxiliaryLossConfig


class TrainOutput(NamedTuple):
    """What the train wrapper returns beside the loss to minimise; all detached.

    Attributes:
        loss (torch.Tensor): task loss alone (mean binary cross entropy), scalar.
        logits (torch.Tensor): [B].
        labels (torch.Tensor): [B].
        auxiliary (torch.Tensor): weighted sum of the auxiliary losses, scalar.
    """

    loss: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor
    auxiliary: torch.Tensor


class DLRM_HiLoMoETrain(nn.Module):  # noqa: N801 (named as the model it wraps)
    """Wraps a CTR model for TorchRec's pipelines, as `torchrec.models.dlrm.DLRMTrain` does.

    Adds the auxiliary losses of every `HierarchicalRouter` inside the model to the task loss.
    Models without one (TorchRec's own DLRMs too) train on the task loss alone. Routers are found
    once, here: layers with experts that take the place of others later train without these losses.

    Args:
        model (nn.Module): ``(dense_features, sparse_features) → logits [B, 1]``.
        auxiliary (AuxiliaryLossConfig | None): weights of the auxiliary losses; None for the
            defaults.
        process_group (dist.ProcessGroup | None): the ranks that share a batch, over which the
            auxiliary losses are taken; None for all.

    Example:
        >>> from torchrec.datasets.random import RandomRecDataset
        >>> from torchrec.modules.embedding_configs import EmbeddingBagConfig
        >>> from torchrec.modules.embedding_modules import EmbeddingBagCollection
        >>> from torchrec_hilomoe.models.dlrm import DLRM_HiLoMoE
        >>> from torchrec_hilomoe.modules import HiLoMoEConfig, TwoStreamConfig
        >>> table = EmbeddingBagConfig(
        ...     name="t", embedding_dim=8, num_embeddings=100, feature_names=["user", "item"]
        ... )
        >>> model = DLRM_HiLoMoETrain(DLRM_HiLoMoE(
        ...     EmbeddingBagCollection(tables=[table]), 13, [8], [1],
        ...     TwoStreamConfig(), HiLoMoEConfig(),
        ... ))
        >>> batch = next(iter(RandomRecDataset(
        ...     keys=["user", "item"], batch_size=4, hash_size=100, ids_per_feature=2, num_dense=13
        ... )))
        >>> loss, output = model(batch)
        >>> bool(loss > output.loss)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        auxiliary: AuxiliaryLossConfig | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.task_loss = TaskLoss(model)
        self.auxiliary_loss = AuxiliaryLoss(
            model, auxiliary or AuxiliaryLossConfig(), process_group
        )

    def forward(self, batch: Batch) -> tuple[torch.Tensor, TrainOutput]:
        """Computes the loss to minimise.

        Args:
            batch (Batch): dense_features [B, num_features], sparse_features, labels [B] in {0, 1}.

        Returns:
            tuple[torch.Tensor, TrainOutput]: task loss (of an ensemble the sum of its members') +
            auxiliary losses, and the parts.
        """
        logits = self.model(batch.dense_features, batch.sparse_features).squeeze(-1)
        task, to_minimise = self.task_loss(logits, batch.labels.float())
        # On CPU where nothing routes.
        auxiliary = self.auxiliary_loss().total.to(task.device)
        output = TrainOutput(
            task.detach(), logits.detach(), batch.labels.detach(), auxiliary.detach()
        )
        return to_minimise + auxiliary, output
