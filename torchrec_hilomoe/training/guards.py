"""Guards of the numbers: losses and gradients that are not finite, a model that does not learn."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from torchrec_hilomoe.data import CTRBatch
from torchrec_hilomoe.errors import TrainingError
from torchrec_hilomoe.training.batch_norms import running_statistics
from torchrec_hilomoe.training.optimizers import StageOptimizer
from torchrec_hilomoe.training.progress import Progress
from torchrec_hilomoe.training.stages import core_model

logger = logging.getLogger(__name__)

_SAVED_BATCHES = 10
_RANDOM_AUC = 0.005


class NonFiniteGuard:
    """Decides what happens to a batch whose loss or gradients are not finite.

    Predictions that are not finite end the training under ``raise`` too; they are no batch to be
    left out.

    Args:
        policy (str): ``raise`` or ``skip`` (``training.on_non_finite``).
        folder (Path): for the first offending batches, as dicts of tensors that
            ``torch.load(weights_only=True)`` reads.
        progress (Progress): counts the skipped batches.

    Attributes:
        skips (bool): the policy is ``skip``.
    """

    def __init__(self, policy: Literal["raise", "skip"], folder: Path, progress: Progress) -> None:
        self.skips = policy == "skip"
        self._folder = folder
        self._progress = progress

    def accepts(self, loss: torch.Tensor, gradient_norm: torch.Tensor, batch: CTRBatch) -> bool:
        """Whether to learn from a batch.

        Args:
            loss (torch.Tensor): of this rank, scalar.
            gradient_norm (torch.Tensor): of this rank, scalar.
            batch (CTRBatch): of this rank.

        Returns:
            bool: False under ``skip`` if either is not finite on any rank; the same on every one.

        Raises:
            TrainingError: under ``raise``, if either is not finite.
        """
        finite = loss.detach().isfinite() & gradient_norm.isfinite()
        if self.skips:
            finite = finite.float()
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        if finite:
            return True
        if not self.skips:
            raise TrainingError(
                f"batch {self._progress.step}: the loss ({loss.item():g}) or a gradient is not "
                f"finite; the batch is in {self._save(batch)}. Lower the learning rates, set "
                "training.gradient_clip_norm, or leave such batches out with "
                "training.on_non_finite=skip"
            )
        self._progress.skipped += 1
        if self._progress.skipped <= _SAVED_BATCHES:
            logger.warning(
                "batch %d is skipped: its loss (%g on this rank) or a gradient is not finite; it "
                "is in %s", self._progress.step, loss.item(), self._save(batch),
            )  # fmt: skip
        return False

    def check_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Looks at what `Predictions.compute` gives, which is the same on every rank.

        Args:
            metrics (Mapping[str, Any]): of the valid split.

        Raises:
            TrainingError: under ``raise``, if predictions were not finite.
        """
        if not self.skips and metrics["samples"] and metrics["logloss"] is None:
            raise TrainingError(
                f"evaluation after batch {self._progress.step}: predictions on valid are not "
                "finite. Lower the learning rates, set training.gradient_clip_norm, or go on "
                "without the metrics with training.on_non_finite=skip"
            )

    def _save(self, batch: CTRBatch) -> Path:
        path = self._folder / f"batch-{self._progress.step:08d}-rank{dist.get_rank()}.pt"
        sparse = batch.sparse_features
        content = {
            "dense_features": batch.dense_features.cpu(),
            "labels": batch.labels.cpu(),
            "keys": sparse.keys(),
            "values": sparse.values().cpu(),
            "lengths": sparse.lengths().cpu(),
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            torch.save(content, path)
        except (OSError, RuntimeError) as error:
            logger.warning("cannot write %s: %s", path, error)
        return path


class GuardedPipeline(TrainPipelineSparseDist[CTRBatch, Any]):
    """TorchRec's pipeline, in which a guard decides whether a batch is learnt from.

    Under ``skip`` the backward pass comes in two parts, that of the dense model and that of the
    tables: fused tables learn in their backward pass, so that all gradients that are to be checked
    must be there before it. Under ``raise`` it is TorchRec's.

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
        self._accepted = True
        self._pooled: torch.Tensor | None = None
        self._watched: torch.Tensor | None = None
        self._hook = core_model(model).sparse_arch.register_forward_hook(self._watch_pooled)
        self._statistics = running_statistics(model) if guard.skips else {}
        self._known_good = {name: value.clone() for name, value in self._statistics.items()}

    def detach(self) -> torch.nn.Module:
        """Gives the model back as it was; see TorchRec."""
        self._hook.remove()
        return super().detach()

    def _watch_pooled(self, arch: torch.nn.Module, inputs: Any, pooled: Any) -> Any:
        """Keeps the gradient of the pooled embeddings, [B, F, D]; under ``skip`` it ends there."""
        if not isinstance(pooled, torch.Tensor) or not pooled.requires_grad:
            return None  # traced, or frozen
        self._pooled = self._watched = pooled
        if self._guard.skips:
            self._watched = pooled.detach().requires_grad_()
        else:
            pooled.retain_grad()
        return self._watched

    def _backward(self, losses: torch.Tensor) -> None:
        super()._backward(losses)
        pooled, watched, self._pooled, self._watched = self._pooled, self._watched, None, None
        gradient = None if watched is None else watched.grad
        norm = self._stage_optimizer.gradient_norm([] if gradient is None else [gradient])
        self._accepted = self._guard.accepts(losses, norm, self.batches[0])
        if self._accepted and pooled is not None and pooled is not watched:
            pooled.backward(gradient)
        self._keep_statistics()

    def _keep_statistics(self) -> None:
        """A skipped batch leaves nothing in batch norms, which have seen it in the forward pass."""
        for name, value in self._statistics.items():
            if self._accepted:
                self._known_good[name].copy_(value)
            else:
                value.copy_(self._known_good[name])

    def _optimizer_step(self) -> None:
        if self._accepted:
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
