"""Metrics of click predictions over all ranks."""

from __future__ import annotations

import logging
import math

import torch
from torch import distributed as dist
from torchmetrics.functional.classification import binary_auroc

from torchrec_hilomoe.data import NO_GROUP, PADDING_LABEL
from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.training.distributed import is_main_rank

logger = logging.getLogger(__name__)


class Predictions:
    """Collects logits and labels batch by batch, and computes the metrics over all ranks.

    Holds every prediction (8 bytes a sample, 16 with a group), for an exact AUC in which ties
    count half.

    Example:
        >>> predictions = Predictions()
        >>> predictions.add(torch.tensor([2.0, -2.0, 0.0]), torch.tensor([1.0, 0.0, 0.0]))
        >>> metrics = predictions.compute()
        >>> metrics["auc"], round(metrics["logloss"], 4), metrics["samples"]
        (1.0, 0.3157, 3)
    """

    def __init__(self) -> None:
        self._logits: list[torch.Tensor] = []
        self._labels: list[torch.Tensor] = []
        self._groups: list[torch.Tensor] = []

    def add(
        self, logits: torch.Tensor, labels: torch.Tensor, group: torch.Tensor | None = None
    ) -> None:
        """Adds one batch.

        Args:
            logits (torch.Tensor): [B].
            labels (torch.Tensor): [B]; rows whose label is -1 are padding and are dropped.
            group (torch.Tensor | None): [B] int64, for the grouped AUC; on any device. Rows with
                ``NO_GROUP`` are left out of it.
        """
        # One copy from the device, and one wait for it.
        logits, labels = torch.stack((logits.detach().float(), labels.float())).cpu()
        real = labels != PADDING_LABEL
        self._logits.append(logits[real])
        self._labels.append(labels[real])
        if group is not None:
            self._groups.append(group.cpu()[real])

    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's logits and labels, batch by batch, padding dropped."""
        return list(zip(self._logits, self._labels, strict=True))

    def compute(self) -> dict[str, float | int | None]:
        """Computes the metrics over all ranks. Every rank must call it and gets the same.

        Returns:
            dict: ``auc`` (None if only one class occurs), ``logloss`` (nats a sample), ``ne``
                (normalised entropy: log loss over that of always predicting the mean label),
                ``calibration`` (mean prediction over mean label), ``samples``, and ``gauc`` where
                groups were given: the AUC within each group that has both classes, weighted by
                its samples. All but ``samples`` are None if a logit is not finite or the labels are
                not known (NaN).
        """
        logits = _gather(torch.cat(self._logits) if self._logits else torch.empty(0))
        labels = _gather(torch.cat(self._labels) if self._labels else torch.empty(0))
        group = self._gathered_groups()
        names = ["auc", "logloss", "ne", "calibration"] + (["gauc"] if group is not None else [])
        metrics: dict[str, float | int | None] = {"samples": labels.numel(), **dict.fromkeys(names)}
        broken = int((~logits.isfinite()).sum())
        if broken and is_main_rank():
            logger.warning("%d of %d predictions are not finite", broken, labels.numel())
        if broken or labels.numel() == 0 or labels.isnan().any():
            return metrics
        mean = labels.double().mean().item()
        both = 0.0 < mean < 1.0
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits.double(), labels.double()
        ).item()
        entropy = -mean * math.log(mean) - (1 - mean) * math.log(1 - mean) if both else None
        scores = logits.double().sigmoid()
        metrics["auc"] = _auc(logits, labels) if both else None
        metrics["logloss"] = loss
        metrics["ne"] = loss / entropy if entropy else None
        metrics["calibration"] = scores.mean().item() / mean if mean > 0 else None
        if group is not None:
            known = group != NO_GROUP  # users that are not known are not one user
            metrics["gauc"] = grouped_auc(logits[known], labels[known], group[known])
        return metrics

    def _gathered_groups(self) -> torch.Tensor | None:
        """Groups of all ranks, if any rank saw some: one without samples must join the gather."""
        seen = torch.tensor([float(bool(self._groups))])
        if not _gather(seen).any():
            return None
        return _gather(torch.cat(self._groups or [torch.empty(0).long()]))


def monitored(metric: str, metrics: dict[str, float | int | None]) -> float | None:
    """The value by which weights are the best.

    Args:
        metric (str): ``training.monitor``.
        metrics (dict): of an evaluation, as `Predictions.compute`.

    Returns:
        float | None: None where predictions are not finite.

    Raises:
        ConfigError: the metric is not defined on these labels.
    """
    value = metrics[metric]
    if value is None and metrics["logloss"] is not None:
        reason = {
            "auc": "all labels of data.valid are the same",
            "gauc": "no group of data.schema.group has both classes in data.valid",
        }[metric]
        raise ConfigError(f"training.monitor: {metric} is not defined, {reason}; take logloss")
    return value


def is_better(metric: str, value: float, best: float | None) -> bool:
    """Whether a value of a metric is a new best.

    Args:
        metric (str): ``logloss``, of which less is better; of all others more is.
        value (float): the value.
        best (float | None): the best so far, if there is one.

    Returns:
        bool: False where they are equal.

    Example:
        >>> is_better("auc", 0.8, None), is_better("auc", 0.8, 0.7), is_better("logloss", 0.8, 0.7)
        (True, True, False)
    """
    if best is None:
        return True
    return value < best if metric == "logloss" else value > best


def _auc(logits: torch.Tensor, labels: torch.Tensor) -> float:
    # torchmetrics takes a sigmoid of values outside [0, 1], in which large logits would tie.
    ranks = torch.unique(logits, return_inverse=True)[1].double()
    return binary_auroc(ranks / max(1.0, ranks.max().item()), labels.long()).item()


def grouped_auc(logits: torch.Tensor, labels: torch.Tensor, group: torch.Tensor) -> float | None:
    """AUC within each group, weighted by the group's samples.

    Args:
        logits (torch.Tensor): [N].
        labels (torch.Tensor): [N], 0 or 1.
        group (torch.Tensor): [N] int64.

    Returns:
        float | None: None if no group has both classes.

    Example:
        >>> grouped_auc(
        ...     torch.tensor([0.1, 0.2, 5.0, 4.0]),
        ...     torch.tensor([0.0, 1.0, 0.0, 1.0]),
        ...     torch.tensor([7, 7, 8, 8]),
        ... )
        0.5
    """
    order = torch.argsort(logits, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    logits, labels, group = logits[order], labels[order].double(), group[order]
    _, group_of, sizes = torch.unique_consecutive(group, return_inverse=True, return_counts=True)
    starts = (sizes.cumsum(0) - sizes)[group_of]
    ranks = _mean_ranks(logits, group_of) - starts
    num_groups = sizes.numel()
    positives = torch.zeros(num_groups, dtype=torch.double).index_add_(0, group_of, labels)
    rank_sum = torch.zeros(num_groups, dtype=torch.double).index_add_(0, group_of, ranks * labels)
    negatives = sizes - positives
    valid = (positives > 0) & (negatives > 0)
    if not valid.any():
        return None
    auc = (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)
    return ((auc * sizes)[valid].sum() / sizes[valid].sum()).item()


def _mean_ranks(logits: torch.Tensor, group_of: torch.Tensor) -> torch.Tensor:
    """Ranks from 1 over the sorted rows; equal logits of one group share their mean rank."""
    changed = torch.ones_like(group_of, dtype=torch.bool)
    changed[1:] = (logits[1:] != logits[:-1]) | (group_of[1:] != group_of[:-1])
    tie = changed.cumsum(0) - 1
    counts = torch.bincount(tie).double()
    return (counts.cumsum(0) - (counts - 1) / 2)[tie]


def _gather(values: torch.Tensor) -> torch.Tensor:
    """Values of all ranks in rank order; ranks may hold different counts, also none."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    world_size = dist.get_world_size()
    size = torch.tensor([values.numel()])
    sizes = [torch.empty_like(size) for _ in range(world_size)]
    dist.all_gather(sizes, size)
    padded = values.new_zeros(max(int(s) for s in sizes))
    padded[: values.numel()] = values
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(s)] for part, s in zip(parts, sizes, strict=True)])
