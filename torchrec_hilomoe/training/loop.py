"""The training loop: stages, segments between evaluations, best weights."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from torchrec_hilomoe.data import CTRBatch, DataSource
from torchrec_hilomoe.errors import ConfigError, TrainingError
from torchrec_hilomoe.training.checkpoint import CheckpointFolder
from torchrec_hilomoe.training.config import OptimizerConfig, StageConfig, TrainingConfig
from torchrec_hilomoe.training.evaluation import predict
from torchrec_hilomoe.training.optimizers import StageOptimizer
from torchrec_hilomoe.training.recorder import Recorder
from torchrec_hilomoe.training.schedule import LearningRateSchedule
from torchrec_hilomoe.training.stages import enter_stage, has_experts, set_train_mode, unwrap

logger = logging.getLogger(__name__)

Metrics = dict[str, Any]


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step (int): global batches trained.
        samples (int): samples trained, over all ranks.
        seconds (float): time spent on training batches, evaluations excluded.
        best_auc (float): best valid AUC so far.
        stages (dict): per stage, its batches and its valid AUC before and after.
    """

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    best_auc: float = -math.inf
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)


class Trainer:
    """Trains a sharded model through the stages of a `TrainingConfig`.

    Args:
        model (DistributedModelParallel): around a `DLRM_HiLoMoETrain`, tables initialised.
        data (DataSource): with a train split; evaluated on valid where there is one.
        config (TrainingConfig): stages and schedule.
        optimizers (OptimizerConfig): one for each part.
        dense_tables (bool): the tables have whole-table gradients.
        checkpoints (CheckpointFolder): takes ``best`` and ``last``.
        recorder (Recorder): takes losses and metrics.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        data: DataSource,
        config: TrainingConfig,
        optimizers: OptimizerConfig,
        dense_tables: bool,
        checkpoints: CheckpointFolder,
        recorder: Recorder,
    ) -> None:
        self.progress = Progress()
        self._model = model
        self._data = data
        self._config = config
        self._optimizers = optimizers
        self._dense_tables = dense_tables
        self._checkpoints = checkpoints
        self._recorder = recorder
        self._stream = BatchStream(data)
        self._stages = self._runnable_stages()
        total = sum(self._stage_batches(stage) for stage in self._stages.values())
        self._schedule = LearningRateSchedule(config.schedule, total)

    def run(self) -> None:
        """Runs all stages, then loads the best weights where there is a valid split.

        Raises:
            TrainingError: the loss is not finite.
        """
        metrics = self._evaluate()
        for name, stage in self._stages.items():
            before = metrics.get("auc")
            start = self.progress.step
            metrics = self._run_stage(name, stage)
            self.progress.stages[name] = {
                "batches": self.progress.step - start,
                "valid_auc_before": before,
                "valid_auc_after": metrics.get("auc"),
            }
        links = ["last"] if self._data.has_split("valid") else ["last", "best"]
        self._checkpoints.save(self._model, self.progress.step, *links)
        self._checkpoints.load_weights(self._model, "best")

    def _run_stage(self, name: str, stage: StageConfig) -> Metrics:
        """Trains one stage, segment by segment; returns the last evaluation."""
        enter_stage(self._model, stage)
        optimizer = StageOptimizer(
            self._model,
            self._optimizers,
            stage,
            self._dense_tables,
            self._config.gradient_clip_norm,
        )
        remaining = self._stage_batches(stage)
        self._recorder.stage_begins(name, remaining)
        since_best, metrics = 0, Metrics()
        while remaining:
            batches = min(remaining, self._stream.until_evaluation(self._config))
            self._run_segment(batches, stage, optimizer)
            remaining -= batches
            metrics = self._evaluate()
            if not metrics:
                continue
            improved = self._keep_if_best(metrics)
            self._schedule.evaluated(improved)
            since_best = 0 if improved else since_best + 1
            if since_best == self._config.early_stopping_patience:
                logger.info("%s: stopped early after %d evaluations", name, since_best)
                break
        self._recorder.stage_ends()
        return metrics

    def _run_segment(self, batches: int, stage: StageConfig, optimizer: StageOptimizer) -> None:
        """Trains on the next batches through one pipeline, which it leaves empty."""
        set_train_mode(self._model, stage)
        device = self._model.device
        pipeline = TrainPipelineSparseDist(self._model, optimizer, device)
        iterator = itertools.islice(self._stream, batches)
        began = time.perf_counter()
        while True:
            optimizer.factor = self._schedule.factor(self.progress.step)
            try:
                output = pipeline.progress(iterator)
            except StopIteration:
                break
            self.progress.step += 1
            self.progress.samples += output.labels.numel() * dist.get_world_size()
            self._record(output, optimizer)
        pipeline.detach()
        self.progress.seconds += time.perf_counter() - began

    def _record(self, output: Any, optimizer: StageOptimizer) -> None:
        if self.progress.step % self._config.log_every:
            self._recorder.advance(None, None)
            return
        losses = torch.stack((output.loss, output.auxiliary)).double()
        dist.all_reduce(losses)
        loss, auxiliary = (losses / dist.get_world_size()).tolist()
        if not math.isfinite(loss + auxiliary):
            raise TrainingError(
                f"the loss is not finite at batch {self.progress.step} (task {loss}, auxiliary "
                f"{auxiliary}); lower the learning rates or set training.gradient_clip_norm"
            )
        self._recorder.advance(loss, auxiliary)
        self._recorder.scalars(
            "train",
            {"loss": loss, "auxiliary_loss": auxiliary}
            | {f"learning_rate/{part}": lr for part, lr in optimizer.learning_rates.items()},
            self.progress.step,
        )

    def _evaluate(self) -> Metrics:
        """Evaluates on valid; empty without a valid split."""
        if not self._data.has_split("valid"):
            return {}
        metrics = self.evaluate("valid")
        self._recorder.scalars("valid", metrics, self.progress.step)
        return metrics

    def evaluate(self, split: str) -> Metrics:
        """Evaluates the present weights.

        Args:
            split (str): ``valid`` or ``test``.

        Returns:
            dict: as `Predictions.compute`.
        """
        batches = itertools.islice(self._data.loader(split), self._config.max_eval_batches)
        return predict(self._model, batches, self._model.device).compute()

    def _keep_if_best(self, metrics: Metrics) -> bool:
        auc = metrics["auc"]
        if auc is None or auc <= self.progress.best_auc:
            return False
        self.progress.best_auc = auc
        self._checkpoints.save(self._model, self.progress.step, "best")
        return True

    def _runnable_stages(self) -> dict[str, StageConfig]:
        """Leaves out stages in which the model has nothing to learn."""
        if has_experts(unwrap(self._model)):
            return self._config.stages
        stages = {
            name: stage
            for name, stage in self._config.stages.items()
            if set(stage.train) - {"experts", "router"}
        }
        for name in self._config.stages.keys() - stages.keys():
            logger.info("stage %s is skipped: the model has no experts", name)
        if not stages:
            raise ConfigError("training.stages: every stage trains experts, the model has none")
        return stages

    def _stage_batches(self, stage: StageConfig) -> int:
        epochs = stage.epochs or 0.0  # exactly one of the two is given
        batches = stage.batches or max(1, round(epochs * self._stream.batches_per_epoch))
        return min(batches, self._config.max_train_batches or batches)


class BatchStream(Iterator[CTRBatch]):
    """The training batches of this rank, epoch after epoch without end.

    Args:
        data (DataSource): with a train split.

    Attributes:
        epoch (int): the epoch of the next batch.
        position (int): batches of that epoch already taken.
        batches_per_epoch (int): the same on every rank.
    """

    def __init__(self, data: DataSource) -> None:
        self._data = data
        self.epoch = 0
        self.position = 0
        self._loader = data.loader("train", epoch=0)
        self.batches_per_epoch = len(self._loader)
        self._iterator = iter(self._loader)

    def __next__(self) -> CTRBatch:
        if self.position == self.batches_per_epoch:
            self.epoch += 1
            self.position = 0
            self._iterator = iter(self._data.loader("train", epoch=self.epoch))
        self.position += 1
        return next(self._iterator)

    def until_evaluation(self, config: TrainingConfig) -> int:
        """Batches from here to the next evaluation point of the epoch."""
        position = self.position % self.batches_per_epoch
        marks = (
            math.ceil(self.batches_per_epoch * i / config.evaluations_per_epoch)
            for i in range(1, config.evaluations_per_epoch + 1)
        )
        return next(mark - position for mark in marks if mark > position)
