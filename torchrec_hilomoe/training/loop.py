"""The training loop: stages, segments between evaluations and saves, best weights."""

from __future__ import annotations

import itertools
import logging
import time
from typing import Any, cast

import torch
from torch import distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.analysis import ExpertUsage
from torchrec_hilomoe.data import DataSource
from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.training.batch_norms import average_statistics
from torchrec_hilomoe.training.checkpoint import RunCheckpoints
from torchrec_hilomoe.training.config import OptimizerConfig, StageConfig, TrainingConfig
from torchrec_hilomoe.training.distributed import is_main_rank
from torchrec_hilomoe.training.evaluation import predict
from torchrec_hilomoe.training.guards import (
    GuardedPipeline,
    NonFiniteGuard,
    warn_if_not_learning,
)
from torchrec_hilomoe.training.interruption import TrainingInterrupted, Watch
from torchrec_hilomoe.training.metrics import Predictions, is_better, monitored
from torchrec_hilomoe.training.optimizers import StageOptimizer
from torchrec_hilomoe.training.progress import Progress
from torchrec_hilomoe.training.recorder import Recorder
from torchrec_hilomoe.training.schedule import LearningRateSchedule
from torchrec_hilomoe.training.stages import (
    core_model,
    enter_stage,
    runnable_stages,
    set_train_mode,
)
from torchrec_hilomoe.training.stream import BatchStream

logger = logging.getLogger(__name__)

Metrics = dict[str, Any]


class Trainer:
    """Trains a sharded model through the stages of a `TrainingConfig`.

    Goes on where the checkpoint stands that ``checkpoints`` resumes.

    Args:
        model (DistributedModelParallel): around a `DLRM_HiLoMoETrain`, tables initialised.
        data (DataSource): with a train split; evaluated on valid where there is one.
        config (TrainingConfig): stages and schedule.
        optimizers (OptimizerConfig): one for each part.
        checkpoints (RunCheckpoints): takes ``best`` and ``last``.
        recorder (Recorder): takes losses and metrics.

    Attributes:
        progress (Progress): where the run stands.
        watch (Watch): to be entered around `run` and `evaluate`, which signals then end.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        data: DataSource,
        config: TrainingConfig,
        optimizers: OptimizerConfig,
        checkpoints: RunCheckpoints,
        recorder: Recorder,
    ) -> None:
        resumed = checkpoints.resumed
        self.progress = resumed.progress if resumed else Progress()
        self._model = model
        self._data = data
        self._config = config
        self._optimizers = optimizers
        self._checkpoints = checkpoints
        self._recorder = recorder
        self._guard = NonFiniteGuard(
            config.on_non_finite, recorder.folder / "non_finite", self.progress
        )
        self.watch = Watch(checkpoints.config.every_minutes)
        self._stream = BatchStream(data, self.progress.epoch, self.progress.position)
        self._stages = runnable_stages(model, config.stages)
        total = sum(self._stage_batches(stage) for stage in self._stages.values())
        self._schedule = LearningRateSchedule(config.schedule, total, self.progress.plateau)
        self._left_out = 0  # planned batches of stages that stopped early
        self._to_restore = resumed is not None
        self._saved_step = self.progress.step

    def run(self) -> None:
        """Runs all stages that are left, then loads the best weights.

        Raises:
            TrainingInterrupted: SIGTERM or SIGINT came, and a checkpoint was written.
            HiLoMoEError: the loss is not finite, or a checkpoint cannot be written.
        """
        names = list(self._stages)
        present = self.progress.stage or names[0]
        if present not in names:
            raise ConfigError(
                f"training.stages: the checkpoint to resume is in the stage {present!r}, which is "
                f"not among {', '.join(names)}; begin a new run with checkpoint.warm_start"
            )
        first = names.index(present)
        self._checkpoints.relink()
        if not self.progress.finished:  # else it only reports
            for name, following in zip(names[first:], [*names[first + 1 :], None], strict=True):
                self._run_stage(name, following)
        self._checkpoints.load_best(self._model)

    def _run_stage(self, name: str, following: str | None) -> None:
        """Trains one stage, or what is left of it; between segments it evaluates and saves."""
        stage = self._stages[name]
        planned = self._stage_batches(stage)
        optimizer = self._enter(name, stage)
        self._recorder.stage_begins(name, planned, self.progress.stage_step)
        while True:
            due = self.progress.evaluation_due and not self.watch.signal
            best = self._evaluate() if due else False
            over = self._is_over(planned)
            if over:
                self._end_stage(name, following)
            if over or best or self._save_due():
                self._save(None if over else optimizer, best)
            if self.watch.signal:
                raise TrainingInterrupted(self.watch.signal)
            if over:
                break
            self._run_segment(name, planned, optimizer)
        self._recorder.stage_ends()

    def _enter(self, name: str, stage: StageConfig) -> StageOptimizer:
        """Freezes and thaws, and restores the state of the run that is continued."""
        self.progress.stage = name
        before = itertools.takewhile(lambda earlier: earlier != name, self._stages)
        planned = sum(self._stage_batches(self._stages[earlier]) for earlier in before)
        self._left_out = planned - (self.progress.step - self.progress.stage_step)
        enter_stage(self._model, stage)
        optimizer = StageOptimizer(
            self._model,
            self._optimizers,
            stage,
            gradient_clip_norm=self._config.gradient_clip_norm,
        )
        if self._to_restore:
            self._checkpoints.restore(self._model, optimizer)
            self._to_restore = False
        return optimizer

    def _is_over(self, planned: int) -> bool:
        if self.progress.evaluation_due:
            return False
        if self.progress.stage_step >= planned:
            return True
        patience = self._config.early_stopping_patience
        stopped = patience is not None and self.progress.since_best >= patience
        if stopped and is_main_rank():
            logger.info("stopped early after %d evaluations", self.progress.since_best)
        return stopped

    def _end_stage(self, name: str, following: str | None) -> None:
        progress = self.progress
        progress.stages[name]["valid_auc_after"] = progress.valid_auc
        progress.stage = following
        progress.stage_step = progress.since_best = 0
        progress.finished = following is None

    def _run_segment(self, name: str, planned: int, optimizer: StageOptimizer) -> None:
        """Trains to the next evaluation, save or pause, through a pipeline that it leaves empty."""
        progress, stage = self.progress, self._stages[name]
        report = progress.stages.setdefault(
            name,
            {"batches": 0, "valid_auc_before": progress.valid_auc, "valid_auc_after": None},
        )
        to_evaluation = min(
            planned - progress.stage_step,
            self._stream.until_evaluation(self._config.evaluations_per_epoch),
        )
        every = self._checkpoints.config.every_batches
        batches = min(to_evaluation, every - progress.step % every) if every else to_evaluation
        trained = self._train(batches, stage, optimizer)
        progress.stage_step += trained
        report["batches"] = progress.stage_step
        progress.evaluation_due = trained == to_evaluation
        progress.epoch, progress.position = self._stream.epoch, self._stream.position

    def _train(self, batches: int, stage: StageConfig, optimizer: StageOptimizer) -> int:
        """Trains on so many batches, fewer if a pause interrupts them; returns how many."""
        set_train_mode(self._model, stage)
        pipeline = GuardedPipeline(self._model, optimizer, self._guard)
        iterator = itertools.islice(self.watch.until_pause(self._stream), batches)
        began, first = time.perf_counter(), self.progress.step
        while True:
            optimizer.factor = self._schedule.factor(self.progress.step, self._left_out)
            try:
                output = pipeline.progress(iterator)
            except StopIteration:
                break
            self.progress.step += 1
            self.progress.samples += output.labels.numel() * dist.get_world_size()
            self._record(output, optimizer)
        pipeline.detach()
        self.progress.seconds += time.perf_counter() - began
        return self.progress.step - first

    def _record(self, output: Any, optimizer: StageOptimizer) -> None:
        if self.progress.step % self._config.log_every:
            self._recorder.advance(None, None)
            return
        losses = torch.stack((output.loss, output.auxiliary)).double()
        dist.all_reduce(losses)
        loss, auxiliary = (losses / dist.get_world_size()).tolist()
        self._recorder.advance(loss, auxiliary)
        self._recorder.scalars(
            "train",
            {"loss": loss, "auxiliary_loss": auxiliary}
            | {f"learning_rate/{part}": lr for part, lr in optimizer.learning_rates.items()},
            self.progress.step,
        )

    def _evaluate(self) -> bool:
        """Evaluates on valid, unless a signal interrupts it; tells if it is the folder's best."""
        progress = self.progress
        average_statistics(self._model)
        if not self._data.has_split("valid"):
            progress.evaluation_due = False
            return False
        with ExpertUsage(core_model(self._model)) as usage:
            predictions = self._predict("valid", usage)
        if self.watch.signal:
            return False
        progress.evaluation_due = False
        metrics = predictions.compute()
        self._guard.check_evaluation(metrics)
        value = monitored(self._config.monitor, metrics)
        self._recorder.scalars("valid", metrics, progress.step)
        progress.valid_auc = metrics["auc"]
        if not progress.step:
            return False
        health = {name: value._asdict() for name, value in usage.compute().items()}
        progress.stages[cast(str, progress.stage)]["experts"] = health
        if is_main_rank() and progress.step > self._config.schedule.warmup_batches:
            warn_if_not_learning(progress.valid_auc, progress.step)
        improved = value is not None and is_better(self._config.monitor, value, progress.best)
        if improved:
            progress.best = value
        self._schedule.evaluated(improved)
        progress.plateau = self._schedule.plateau
        progress.since_best = 0 if improved else progress.since_best + 1
        best_here = value is not None and is_better(self._config.monitor, value, progress.best_here)
        if best_here:
            progress.best_here = value
        return best_here

    def evaluate(self, split: str) -> Metrics:
        """Evaluates the present weights.

        Args:
            split (str): ``valid`` or ``test``.

        Returns:
            dict: as `Predictions.compute`.

        Raises:
            TrainingInterrupted: SIGTERM or SIGINT came.
        """
        predictions = self._predict(split)
        if self.watch.signal:
            raise TrainingInterrupted(self.watch.signal)
        return predictions.compute()

    def _predict(self, split: str, usage: ExpertUsage | None = None) -> Predictions:
        """Scores a split, or what a signal leaves of it."""
        batches = itertools.islice(self._data.loader(split), self._config.max_eval_batches)
        return predict(self._model, batches, self._model.device, self.watch.signal_check(), usage)

    def _save_due(self) -> bool:
        if self.watch.save_due or self.watch.signal:
            return True
        every = self._checkpoints.config.every_batches
        step = self.progress.step
        return every is not None and step % every == 0 and step != self._saved_step

    def _save(self, optimizer: StageOptimizer | None, best: bool) -> None:
        # Without metrics on valid the last weights are the best known.
        best = best or (self.progress.finished and self.progress.best_here is None)
        self._checkpoints.save(self._model, optimizer, self.progress, best)
        self._saved_step = self.progress.step
        self.watch.saved()

    def _stage_batches(self, stage: StageConfig) -> int:
        epochs = stage.epochs or 0.0  # exactly one of the two is given
        batches = stage.batches or max(1, round(epochs * self._stream.batches_per_epoch))
        return min(batches, self._config.max_train_batches or batches)
