"""Several small models in one: members with their own embeddings, interaction and over arch.

Notation: S members, D the embedding dimension of one member. The tables have S * D columns, of
which each member reads its own.
"""

# Annotations stay evaluated: TorchScript cannot read the strings that
# `from __future__ import annotations` would leave in an FX-traced forward.

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class EnsembleInteractionArch(nn.Module):
    """Hands each member its columns of the embeddings and concatenates what the members make.

    Embeddings of their own keep the members different; wider embeddings in one interaction
    collapse to few dimensions (Guo et al., "On the Embedding Collapse When Scaling up
    Recommendation Models", ICML 2024).

    Args:
        members (Sequence[nn.Module]): S interaction architectures, each
            ``(dense_features [B, D], sparse_features [B, F, D]) → [B, width]``.

    Example:
        >>> from torchrec.models.dlrm import InteractionArch
        >>> arch = EnsembleInteractionArch([InteractionArch(3), InteractionArch(3)])
        >>> arch(dense_features=torch.rand(2, 8), sparse_features=torch.rand(2, 3, 8)).shape
        torch.Size([2, 20])
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, dense_features: torch.Tensor, sparse_features: torch.Tensor) -> torch.Tensor:
        """Computes the interactions of all members.

        Args:
            dense_features (torch.Tensor): [B, S * D].
            sparse_features (torch.Tensor): [B, F, S * D].

        Returns:
            torch.Tensor: [B, S * width], member by member.
        """
        dense = dense_features.chunk(len(self.members), dim=-1)
        sparse = sparse_features.chunk(len(self.members), dim=-1)
        outputs = [
            member(dense_features=dense[i], sparse_features=sparse[i])
            for i, member in enumerate(self.members)
        ]
        return torch.cat(outputs, dim=1)


class EnsembleOverArch(nn.Module):
    r"""The over archs of all members, and one logit from theirs.

    The logit is that of the mean of the members' probabilities,

    .. math:: z = \log \sum_s \sigma(z_s) - \log \sum_s \sigma(-z_s)

    In training mode the members' own logits stay in ``self.member_logits``, where
    :class:`TaskLoss` reads them. They are no part of the state dict, and evaluation leaves them
    alone; in copies and pickles they are those of no samples.

    Args:
        members (Sequence[nn.Module]): S over archs, each [B, width] → [B, 1].

    Example:
        >>> arch = EnsembleOverArch([nn.Linear(10, 1), nn.Linear(10, 1)])
        >>> arch(torch.rand(2, 20)).shape
        torch.Size([2, 1])
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.member_logits = torch.zeros((0, len(members)))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Computes the logits.

        Args:
            features (torch.Tensor): [B, S * width], member by member.

        Returns:
            torch.Tensor: [B, 1].
        """
        parts = features.chunk(len(self.members), dim=1)
        logits = torch.cat([member(parts[i]) for i, member in enumerate(self.members)], dim=1)
        if self.training and isinstance(logits, torch.Tensor):  # FX traces with proxies
            self.member_logits = logits
        clicks = torch.logsumexp(F.logsigmoid(logits), dim=1, keepdim=True)
        return clicks - torch.logsumexp(F.logsigmoid(-logits), dim=1, keepdim=True)

    def __getstate__(self) -> dict[str, Any]:
        # The logits belong to an autograd graph, which can be neither copied nor pickled.
        return super().__getstate__() | {"member_logits": self.member_logits.detach()[:0].clone()}


class TaskLoss(nn.Module):
    """Binary cross entropy of a model's logits, and the loss that it learns by.

    The members of an ensemble each learn by their own loss: on the loss of their mean they would
    only make up for each other's errors. So loss and gradients are those that each would have
    alone; dense arch, gradient clipping and row-wise optimizer states they share. A model without
    members learns by the loss of its logits.

    Reads what the over arch keeps: tracers have to take it for a leaf, as TorchRec's pipelines do.

    Args:
        model (nn.Module): its `EnsembleOverArch`, if any, is found once, here; it stays the
            model's own.

    Example:
        >>> loss = TaskLoss(nn.Linear(4, 1))
        >>> task, to_minimise = loss(torch.zeros(2), torch.ones(2))
        >>> torch.equal(task, to_minimise)
        True
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # A tuple, not a module list: a second registration would repeat names in the state dict.
        self._ensembles = tuple(m for m in model.modules() if isinstance(m, EnsembleOverArch))

    def forward(
        self, logits: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes both losses of the last forward.

        Args:
            logits (torch.Tensor): [B], of the model.
            labels (torch.Tensor): [B], float, in {0, 1}.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: the task loss (mean over samples), and the loss to
            minimise: in training mode, for an ensemble, the sum of the members' task losses; where
            its over arch is in evaluation mode, the task loss.

        Raises:
            RuntimeError: the logits have a gradient and those of the members have none.
        """
        task = F.binary_cross_entropy_with_logits(logits, labels)
        ensembles = [ensemble for ensemble in self._ensembles if ensemble.training]
        if not (self.training and ensembles):
            return task, task
        if logits.requires_grad and not all(e.member_logits.requires_grad for e in ensembles):
            raise RuntimeError(
                "the members' logits have no gradient: under activation checkpointing use "
                "use_reentrant=False, and run nothing else in training mode before the loss"
            )
        members = [
            F.binary_cross_entropy_with_logits(member, labels)
            for ensemble in ensembles
            for member in ensemble.member_logits.unbind(dim=1)
        ]
        # Nothing but a way to what the model returned: DDP with a static graph waits for it.
        return task, 0.0 * task + torch.stack(members).sum()
