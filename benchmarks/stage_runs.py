"""Stages of whole models, trained as the trainer does it, in short blocks that take turns."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from profiles import peak_bytes, time_split
from timing import Times
from torch import distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.data import CTRBatch, DataConfig, DataSource, prepare_data
from torchrec_hilomoe.data.cache import cache_root
from torchrec_hilomoe.data.synthetic import synthetic_files
from torchrec_hilomoe.training import RunConfig, StageOptimizer, build_sharded, enter_stage
from torchrec_hilomoe.training.guards import GuardedPipeline, NonFiniteGuard
from torchrec_hilomoe.training.progress import Progress
from torchrec_hilomoe.training.stages import runnable_stages
from torchrec_hilomoe.training.stream import BatchStream

# A pipeline fills up at its start and empties at its end; the steps between are like each other.
_FIRST, _LAST = 3, 2
# Of an epoch, where the loader runs alone.
_LOADED = 500


class Clock(NamedTuple):
    """Seconds on the wall and of this process's CPU time."""

    wall: float
    cpu: float

    @classmethod
    def now(cls, device: torch.device) -> Clock:
        """The time once all queued work is done."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return cls(time.perf_counter(), time.process_time())


class StageRun:
    """One stage of one model.

    Args:
        model (DistributedModelParallel): shared by the stages of a model.
        config (RunConfig): of the run.
        stage (str): one of ``config.training.stages``.
        batches (Iterator[CTRBatch]): where training batches come from.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        config: RunConfig,
        stage: str,
        batches: Iterator[CTRBatch],
    ) -> None:
        self.model, self.config, self._batches = model, config, batches
        self._stage = config.training.stages[stage]
        self._optimizer: StageOptimizer | None = None

    def enter(self) -> None:
        """Freezes, thaws and wraps the model; to be called when another stage was entered."""
        enter_stage(self.model, self._stage)
        self._optimizer = StageOptimizer(
            self.model,
            self.config.optimizer,
            self._stage,
            gradient_clip_norm=self.config.training.gradient_clip_norm,
        )

    def train(self, steps: int) -> list[Clock]:
        """Times of so many steps, each the whole of data, forward, backward and update."""
        guard = NonFiniteGuard("raise", Path(tempfile.gettempdir()), Progress())
        pipeline = GuardedPipeline(self.model, self._optimizer, guard)
        batches = itertools.islice(self._batches, steps + _FIRST + _LAST)
        device, times = self.model.device, []
        dist.barrier()
        while True:
            began = Clock.now(device)
            try:
                pipeline.progress(batches)
            except StopIteration:
                break
            ended = Clock.now(device)
            times.append(Clock(ended.wall - began.wall, ended.cpu - began.cpu))
        pipeline.detach()
        return times[_FIRST:-_LAST]

    def state_bytes(self) -> int:
        """Parameters and optimizer state on this rank, after a step."""
        fused, dense = self.model.fused_optimizer.state_dict()["state"], self._optimizer
        states = [self.model.state_dict(), *fused.values()]
        states += [state for part in dense.dense_state().values() for state in part.values()]
        return sum(_local_bytes(value) for state in states for value in state.values())


def _local_bytes(value: object) -> int:
    if hasattr(value, "local_shards"):
        return sum(shard.tensor.nbytes for shard in value.local_shards())
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def stage_runs(
    configs: Mapping[str, RunConfig], data: DataSource, device: torch.device
) -> dict[tuple[str, str], StageRun]:
    """Every stage of every model in which it learns, on one stream of batches.

    Args:
        configs (Mapping[str, RunConfig]): by model; they differ in the model alone.
        data (DataSource): the data of all.
        device (torch.device): this rank's device.

    Returns:
        dict[tuple[str, str], StageRun]: by model and stage.
    """
    stream = BatchStream(data)
    runs = {}
    for name, config in configs.items():
        model = build_sharded(
            config.model,
            data.features,
            config.sharding,
            config.optimizer.tables,
            config.seed,
            device,
        )
        for stage in runnable_stages(model, config.training.stages):
            runs[name, stage] = StageRun(model, config, stage, stream)
    return runs


def take_turns(
    runs: Mapping[tuple[str, str], StageRun], rounds: int, steps: int
) -> tuple[Times, Times]:
    """Wall and CPU seconds of a step: in each round the median of a block of each run."""
    wall: dict[tuple[str, str], list[float]] = {case: [] for case in runs}
    cpu: dict[tuple[str, str], list[float]] = {case: [] for case in runs}
    for measured in [False] + [True] * rounds:
        for case, run in runs.items():
            run.enter()
            times = run.train(steps)
            if measured:
                wall[case].append(statistics.median(t.wall for t in times))
                cpu[case].append(statistics.median(t.cpu for t in times))
    return Times(wall), Times(cpu)


def describe(run: StageRun, steps: int) -> dict[str, object]:
    """Time split and memory of a run on this rank."""
    run.enter()
    run.train(1)
    seconds = time_split(lambda: run.train(steps), dist.get_world_size() > 1)
    total = sum(seconds.values())
    peak = peak_bytes(lambda: run.train(1), run.model.device)
    return {
        "time_share": {part: round(value / total, 4) for part, value in seconds.items()},
        "state_mb": round(run.state_bytes() / 1e6, 2),
        "step_peak_mb": round(peak / 1e6, 2),
    }


def loader_rate(data: DataSource, repetitions: int) -> Clock:
    """Rows per second of all ranks, of the loader alone, in wall and CPU time; medians."""
    rates = []
    for epoch in range(repetitions):
        dist.barrier()
        began = Clock.now(torch.device("cpu"))
        batches = itertools.islice(data.loader("train", epoch=epoch), _LOADED)
        rows = sum(len(batch.labels) for batch in batches) * dist.get_world_size()
        ended = Clock.now(torch.device("cpu"))
        rates.append(Clock(rows / (ended.wall - began.wall), rows / (ended.cpu - began.cpu)))
    return Clock(*(statistics.median(column) for column in zip(*rates, strict=True)))


def encoding_rate(data: DataConfig, rows: int) -> float | None:
    """Training rows per second from raw files to the cache, read twice: to fit and to encode.

    Encodes all of them once more, whatever the cache has.

    Args:
        data (DataConfig): the data set.
        rows (int): its training rows.

    Returns:
        float | None: by wall time, of one process; None for data without such a step.
    """
    if data.source == "synthetic":
        files = synthetic_files(data.synthetic, cache_root(data.cache_dir)) / "train.parquet"
        data = replace(data, source="tabular", train=str(files))
    if data.source != "tabular":
        return None
    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        prepare_data(replace(data, valid=None, test=None, cache_dir=cache))
        return rows / (time.perf_counter() - began)
