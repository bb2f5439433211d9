"""Saving and restoring one run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.data import DataSource
from torchrec_hilomoe.errors import CheckpointError, ConfigError
from torchrec_hilomoe.models import ModelConfig
from torchrec_hilomoe.modules import experts_enabled
from torchrec_hilomoe.training.checkpoint.description import (
    ENCODER,
    WEIGHTS,
    RunInfo,
    read_run,
    write_info,
    write_run,
)
from torchrec_hilomoe.training.checkpoint.folder import CheckpointFolder
from torchrec_hilomoe.training.checkpoint.resume import (
    check_same_run,
    launch_id,
    resume_point,
    verify_on_all_ranks,
)
from torchrec_hilomoe.training.checkpoint.state import load_model, load_training, save_tensors
from torchrec_hilomoe.training.config import CheckpointConfig
from torchrec_hilomoe.training.distributed import agree, broadcast, is_main_rank
from torchrec_hilomoe.training.optimizers import StageOptimizer
from torchrec_hilomoe.training.progress import Progress

logger = logging.getLogger(__name__)


class RunCheckpoints:
    """The checkpoints that a run writes, and the one that it continues.

    Every rank makes one, and calls its methods together with all others.

    Args:
        folder (Path): ``OUTPUT_DIR/checkpoints``.
        config (CheckpointConfig): what to resume and how many to keep.
        model_config (ModelConfig): saved with the weights.
        data (DataSource): its encoder is saved with the weights.
        run (Mapping[str, Any]): the whole configuration and the features, as JSON holds them.

    Raises:
        HiLoMoEError: the checkpoint to resume is damaged, or of another run.

    Attributes:
        config (CheckpointConfig): as given.
        resumed (RunInfo | None): the run that is continued.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        model_config: ModelConfig,
        data: DataSource,
        run: Mapping[str, Any],
    ) -> None:
        self.config = config
        self._model_config = model_config
        self._data = data
        self._run = dict(run)
        self.resumed: RunInfo | None = None
        self._launch = launch_id()
        self._source = source = resume_point(folder, run, self._launch)
        if source is not None:
            self.resumed = saved = agree(lambda: read_run(source))
            check_same_run(saved, run, explicit=config.resume != "auto")
            if is_main_rank():
                logger.info("resuming %s, at batch %d", source, saved.progress.step)
        self._folder = CheckpointFolder(folder, config.keep_last, source)
        self._best: Path | None = None
        if self.resumed is not None:
            progress = self.resumed.progress
            self._best = self._find_best(progress)
            if self._best is None:  # gone, or in another folder: the next one is the best here
                progress.best_here = None

    def relink(self) -> None:
        """Points ``last`` and ``best`` to the checkpoints that the run goes on from.

        Raises:
            CheckpointError: a link could not be moved; raised on every rank.
        """
        self._folder.relink(self._best)

    def save(
        self,
        model: DistributedModelParallel,
        optimizer: StageOptimizer | None,
        progress: Progress,
        best: bool = False,
    ) -> None:
        """Adds a checkpoint and points ``last`` to it.

        Args:
            model (DistributedModelParallel): no pipeline attached.
            optimizer (StageOptimizer | None): of the stage; None between two stages.
            progress (Progress): where the run stands.
            best (bool): point ``best`` to it too.

        Raises:
            CheckpointError: it could not be written.
        """

        def describe(folder: Path) -> None:
            self._data.save(folder / ENCODER)
            write_info(folder, self._model_config, self._data.features, experts_enabled(model))
            run = RunInfo(self._run, dist.get_world_size(), progress, best, self._launch)
            write_run(folder, run)

        def fill(folder: Path) -> None:
            save_tensors(folder / WEIGHTS, model, optimizer)
            self._folder.on_main_rank(lambda: describe(folder))

        self._folder.write(progress.step, fill, *(("last", "best") if best else ("last",)))

    def restore(self, model: DistributedModelParallel, optimizer: StageOptimizer) -> None:
        """Loads the state of the run that is continued.

        Args:
            model (DistributedModelParallel): under any sharding plan.
            optimizer (StageOptimizer): of the stage in which the run stood.

        Raises:
            CheckpointError: the state does not fit.
        """
        if self._source is None or self.resumed is None:
            return
        same_world = self.resumed.world_size == dist.get_world_size()
        load_training(model, optimizer, self._source / WEIGHTS, same_world)

    def _find_best(self, progress: Progress) -> Path | None:
        """The checkpoint in the run's folder whose weights are the best of a progress."""

        def is_best(checkpoint: Path) -> bool:
            try:
                saved = read_run(checkpoint)
            except ConfigError:
                return False  # damaged
            return saved.best and saved.progress.best_here == progress.best_here

        newest_first = reversed(self._folder.own)
        return broadcast(next(filter(is_best, newest_first), None) if is_main_rank() else None)

    def load_best(self, model: DistributedModelParallel) -> None:
        """Loads the best weights, with the experts on or off as they were there.

        The last ones, with a warning, if those are gone or damaged.

        Args:
            model (DistributedModelParallel): no pipeline attached.
        """
        for link in ("best", "last"):
            path = broadcast(self._folder.link(link) if is_main_rank() else None)
            if path is None:
                continue
            try:
                verify_on_all_ranks(path)
            except CheckpointError as error:
                if is_main_rank():
                    logger.warning("%s; taking the last weights instead", error)
                continue
            load_model(model, path)
            return
        if self._source is not None:  # a finished run, resumed into another folder
            load_model(model, self._source)
