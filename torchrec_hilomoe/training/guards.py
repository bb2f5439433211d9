"""Guards of the numbers: losses and gradients that are not finite, a model that does not learn."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from torchrec_hilomoe.data import CTRBatch
from torchrec_hilomoe.errors import TrainingError
from torchrec_hilomoe.training.optimizers import StageOptimizer
from torchrec_hilomoe.training.progress import Progress

logger = logging.getLogger(__name__)

_SAVED_BATCHES = 10
_RANDOM_AUC = 0.005


class NonFiniteGuard:
    """Decides what happens to a batch whose loss or gradients are not finite.

    DDP averages the gradients of the dense part over the ranks, so that all ranks see one that
    is not finite. A fused table has learnt from a batch before its gradients can be checked,
    so that ``skip`` agrees on the loss before the backward pass, by one small all-reduce.

    Args:
        policy (str): ``raise`` or ``skip`` (``training.on_non_finite``).
        folder (Path): for the first offending batches, as dicts of tensors that
            ``torch.load(weights_only=True)`` reads.
        progress (Progress): counts the skipped batches.
    """

    def __init__(self, policy: Literal["raise", "skip"], folder: Path, progress: Progress) -> None:
        self._policy = policy
        self._folder = folder
        self._progress = progress

    def accepts_loss(self, loss: torch.Tensor, batch: CTRBatch) -> bool:
        """Whether to learn from a batch; the same on every rank.

        Args:
            loss (torch.Tensor): of this rank, scalar.
            batch (CTRBatch): of this rank.

        Returns:
            bool: False under ``skip`` if the loss is not finite on any rank.
        """
        if self._policy == "raise":
            return True
        good = loss.detach().isfinite().float()
        dist.all_reduce(good, dist.ReduceOp.MIN)
        if not good:
            self._skip("loss", loss, batch)
        return bool(good)

    def accepts_gradients(
        self, loss: torch.Tensor, batch: CTRBatch, optimizer: StageOptimizer
    ) -> bool:
        """Whether to step; the same on every rank where the dense part learns.

        Args:
            loss (torch.Tensor): of this rank, scalar.
            batch (CTRBatch): of this rank.
            optimizer (StageOptimizer): with the gradients of the batch.

        Returns:
            bool: False under ``skip`` if a gradient is not finite.

        Raises:
            TrainingError: under ``raise``, if loss or gradients are not finite; also under
                ``skip``, if fused tables have learnt from them already.
        """
        if bool(loss.detach().isfinite()) and optimizer.has_finite_gradients():
            return True
        if self._policy == "skip" and not optimizer.steps_in_backward:
            self._skip("gradient", loss, batch)
            return False
        path = self._save(batch)
        advice = (
            "the fused tables have learnt from it already: resume from the last checkpoint"
            if self._policy == "skip"
            else "or leave such batches out with training.on_non_finite=skip"
        )
        raise TrainingError(
            f"batch {self._progress.step}: the loss ({loss.item():g}) or a gradient is not finite; "
            f"the batch is in {path}. Lower the learning rates, set training.gradient_clip_norm, "
            f"{advice}"
        )

    def _skip(self, what: str, loss: torch.Tensor, batch: CTRBatch) -> None:
        self._progress.skipped += 1
        if self._progress.skipped <= _SAVED_BATCHES:
            logger.warning(
                "batch %d is skipped, its %s is not finite (loss %g here); it is in %s",
                self._progress.step, what, loss.item(), self._save(batch),
            )  # fmt: skip

    def _save(self, batch: CTRBatch) -> Path:
        path = self._folder / f"batch-{self._progress.step:08d}-rank{dist.get_rank()}.pt"
        sparse = batch.sparse_features
        content = {
            "dense_features": batch.dense_features,
            "labels": batch.labels,
            "keys": sparse.keys(),
            "values": sparse.values(),
            "lengths": sparse.lengths(),
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            torch.save(content, path)
        except (OSError, RuntimeError) as error:
            logger.warning("cannot write %s: %s", path, error)
        return path


class GuardedPipeline(TrainPipelineSparseDist[CTRBatch, Any]):
    """TorchRec's pipeline, in which a guard decides before the backward pass and before the step.

    Args:
        model (DistributedModelParallel): around a `DLRM_HiLoMoETrain`.
        optimizer (StageOptimizer): of the stage.
        guard (NonFiniteGuard): decides.
    """

    def __init__(
        self, model: DistributedModelParallel, optimizer: StageOptimizer, guard: NonFiniteGuard
    ) -> None:
        super().__init__(model, optimizer, model.device)
        self._stage_optimizer = optimizer
        self._guard = guard
        self._loss: torch.Tensor | None = None

    def _backward(self, losses: torch.Tensor) -> None:
        batch = self.batches[0]
        self._loss = losses if self._guard.accepts_loss(losses, batch) else None
        if self._loss is not None:
            super()._backward(losses)

    def _optimizer_step(self) -> None:
        batch = self.batches[0]
        if self._loss is not None and self._guard.accepts_gradients(
            self._loss, batch, self._stage_optimizer
        ):
            super()._optimizer_step()


def warn_if_not_learning(auc: float | None, step: int) -> None:
    """Warns of predictions that are constant or random.

    Args:
        auc (float | None): valid AUC after the warm-up of the learning rate.
        step (int): global batches trained.
    """
    if auc is None or math.fabs(auc - 0.5) > _RANDOM_AUC:
        return
    what = "all predictions are equal" if auc == 0.5 else "no better than random"
    logger.warning(
        "valid AUC %.4f after %d batches: %s; check labels, features and learning rates",
        auc, step, what,
    )  # fmt: skip
