"""One training run, and one evaluation, from configuration to metrics."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic_core import to_jsonable_python
from torch import distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.analysis import dense_cost
from torchrec_hilomoe.config import parse_config, unknown_key
from torchrec_hilomoe.data import DataConfig, DataSource, FeatureSpec, open_data
from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.models import (
    DLRM_HiLoMoETrain,
    ModelConfig,
    build_model,
    import_plugins,
    model_config_dict,
    parse_model_config,
)
from torchrec_hilomoe.training.alike import check_alike
from torchrec_hilomoe.training.checkpoint import RunCheckpoints, check_named, warm_start
from torchrec_hilomoe.training.config import (
    CheckpointConfig,
    OptimizerConfig,
    ShardingConfig,
    TableOptimizerConfig,
    TrainingConfig,
)
from torchrec_hilomoe.training.distributed import (
    PREPARATION_TIMEOUT,
    agree,
    broadcast,
    init_process_group,
    is_main_rank,
    set_timeout,
)
from torchrec_hilomoe.training.loop import Trainer
from torchrec_hilomoe.training.output_folder import exclusive
from torchrec_hilomoe.training.recorder import Recorder
from torchrec_hilomoe.training.shardable import COLUMN_MULTIPLE
from torchrec_hilomoe.training.sharding import shard_model
from torchrec_hilomoe.training.stages import core_model
from torchrec_hilomoe.training.tables import init_tables, make_tables


@dataclass
class RunConfig:
    """Everything that decides a run.

    Attributes:
        data (DataConfig): the data set.
        model (ModelConfig): the architecture.
        training (TrainingConfig): stages and schedule.
        optimizer (OptimizerConfig): one optimizer for each part.
        sharding (ShardingConfig): how the tables are spread.
        seed (int): of initialisation, shuffling and dropout.
        output_dir (Path): the run's folder, the same on every rank.
        checkpoint (CheckpointConfig): when checkpoints are written and what the run starts from.
    """

    data: DataConfig
    model: ModelConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    sharding: ShardingConfig
    seed: int
    output_dir: Path
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        grouped = self.data.schema.group and self.data.source != "criteo_1tb"
        if self.training.monitor == "gauc" and not grouped:
            raise ConfigError(
                "training.monitor: gauc needs data.schema.group, the column that rows are grouped "
                "by; name it, or take auc or logloss"
            )


@dataclass
class _Scalars:
    """The keys of a run that stand in no group."""

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    output_dir: Path


def parse_run_config(values: Mapping[str, Any]) -> RunConfig:
    """Builds the configuration of a run from plain values, as Hydra composes them.

    Args:
        values (Mapping[str, Any]): with the keys of `RunConfig`, and ``plugins``: the modules to
            import first, which register third parties' interactions.

    Returns:
        RunConfig: validated.

    Raises:
        ConfigError: names the keys that are wrong, in one group at a time.
    """
    values = dict(values)
    import_plugins(values.pop("plugins", None))
    known = ("data", "model", "training", "optimizer", "sharding", "seed", "output_dir")
    unknown = sorted(set(values) - {*known, "checkpoint"})
    if unknown:
        raise ConfigError(unknown_key(unknown[0], (*known, "checkpoint", "plugins")))
    missing = [key for key in known if values.get(key) is None]
    if missing:
        raise ConfigError(f"{missing[0]}: required, but not given")
    scalars = {key: values[key] for key in ("seed", "output_dir")}
    return RunConfig(
        data=parse_config(DataConfig, values["data"], "data"),
        model=parse_model_config(values["model"]),
        training=parse_config(TrainingConfig, values["training"], "training"),
        optimizer=parse_config(OptimizerConfig, values["optimizer"], "optimizer"),
        sharding=parse_config(ShardingConfig, values["sharding"], "sharding"),
        **dataclasses.asdict(parse_config(_Scalars, scalars)),
        checkpoint=parse_config(CheckpointConfig, values.get("checkpoint") or {}, "checkpoint"),
    )


def train(config: RunConfig, on_start: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Trains a model and evaluates its best weights. Every rank of the launch calls it.

    Writes to ``output_dir``: ``metrics.json``, ``checkpoints/best`` and ``checkpoints/last``,
    ``tensorboard``.

    Args:
        config (RunConfig): the same on every rank.
        on_start (Callable[[], None]): called on every rank once data and checkpoints are found to
            fit the configuration, before anything is written to ``output_dir``.

    Returns:
        dict[str, Any]: the content of ``metrics.json``.

    Raises:
        HiLoMoEError: configuration or data cannot be used; raised on every rank.
        TrainingInterrupted: SIGTERM or SIGINT came, in the training or in the last evaluation;
            the checkpoint that it goes on from is written.
    """
    device = init_process_group()
    set_timeout(timedelta(minutes=config.training.timeout_minutes))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    check_alike(_of_every_host(config))
    check_named(config.output_dir / "checkpoints", config.checkpoint)
    data = agree(
        lambda: open_data(
            config.data, rank=rank, world_size=world_size, seed=config.seed, progress=rank == 0
        ),
        PREPARATION_TIMEOUT,
    )
    check_alike({"data": data.identity})
    _check_fits(config, data, world_size)
    with exclusive(config.output_dir):
        checkpoints = RunCheckpoints(
            config.output_dir / "checkpoints",
            config.checkpoint,
            config.model,
            data,
            broadcast(_plain(config, data)),  # of which rank 0's is saved; paths may differ
        )
        agree(on_start)
        model = build_sharded(
            config.model,
            data.features,
            config.sharding,
            config.optimizer.tables,
            config.seed,
            device,
        )
        if checkpoints.resumed is None and config.checkpoint.warm_start is not None:
            warm_start(model, config.checkpoint.warm_start, data.encoder, config.checkpoint.strict)
        torch.manual_seed(config.seed + rank)  # dropout differs between ranks
        recorder = Recorder(config.output_dir, config.data.batch_size)
        trainer = Trainer(model, data, config.training, config.optimizer, checkpoints, recorder)
        with trainer.watch:
            try:
                trainer.run()
            finally:
                recorder.close()
            metrics = _summary(config, trainer, data, model)
        if is_main_rank():
            _write_json(config.output_dir / "metrics.json", metrics)
    return metrics


def _check_fits(config: RunConfig, data: DataSource, world_size: int) -> None:
    """Refuses what is valid by itself, but not for this data and launch."""
    if config.model.batch_norm and config.data.batch_size < 2 * world_size:
        raise ConfigError(
            f"data.batch_size: batch norm needs at least 2 rows on each of {world_size} rank(s), "
            f"got {config.data.batch_size}; raise it, or set model.batch_norm=false"
        )
    needs_valid = {
        "training.schedule.name=plateau": config.training.schedule.name == "plateau",
        f"training.monitor={config.training.monitor}": config.training.monitor != "auc",
        "training.early_stopping_patience": config.training.early_stopping_patience is not None,
    }
    for key, needed in needs_valid.items():
        if needed and not data.has_split("valid"):
            raise ConfigError(f"data.valid: required by {key}, but not given")


def build_sharded(
    config: ModelConfig,
    features: FeatureSpec,
    sharding: ShardingConfig,
    tables: TableOptimizerConfig | None,
    seed: int,
    device: torch.device,
) -> DistributedModelParallel:
    """Builds, shards and initialises a model, alike for every world size and sharding plan.

    Args:
        config (ModelConfig): the architecture.
        features (FeatureSpec): the features of the data.
        sharding (ShardingConfig): how the tables are spread.
        tables (TableOptimizerConfig | None): the tables' optimizer; None for a model that will not
            be trained, whose tables may have any number of columns on CPU.
        seed (int): of the initialisation.
        device (torch.device): this rank's device.

    Returns:
        DistributedModelParallel: around a `DLRM_HiLoMoETrain`.
    """
    if tables is None:  # fused kernels can be sharded in more ways, where they take the columns
        odd = config.table_dim % COLUMN_MULTIPLE
        tables = TableOptimizerConfig(kernel="dense" if odd else "fused")
    torch.manual_seed(seed)
    collection = make_tables(features, config.table_dim)
    dense = build_model(config, collection, len(features.dense), device)
    model = shard_model(DLRM_HiLoMoETrain(dense), sharding, tables, device)
    init_tables(model, seed, config.embedding_init_std, unknown_row=True)
    return model


def _summary(
    config: RunConfig, trainer: Trainer, data: DataSource, model: DistributedModelParallel
) -> dict[str, Any]:
    """The content of metrics.json: the best weights' metrics, cost and speed."""
    progress = trainer.progress
    splits = [split for split in ("valid", "test") if data.has_split(split)]
    evaluated = {split: trainer.evaluate(split) for split in splits}
    for split, metrics in evaluated.items():
        if data.bayes_auc(split) is not None:
            metrics["bayes_auc"] = data.bayes_auc(split)
    cost = dense_cost(core_model(model), len(data.features.dense))
    return {
        "model": config.model.name,
        "data": config.data.name,
        "seed": config.seed,
        "world_size": dist.get_world_size(),
        "valid": None,
        **evaluated,
        "dense_parameters": cost.parameters,
        "dense_flops_per_sample": cost.flops_per_sample,
        "train_samples_per_second": round(progress.samples / max(progress.seconds, 1e-9), 1),
        "train_batches": progress.step,
        "skipped_batches": progress.skipped,
        "stages": progress.stages,
        "data_report": data.report,
        "output_dir": str(config.output_dir),
    }


def _of_every_host(config: RunConfig) -> dict[str, Any]:
    """The configuration less what a host may have of its own: paths, and workers."""
    own = ("train", "valid", "test", "vocabularies_from", "cache_dir", "num_workers")
    data = {k: v for k, v in dataclasses.asdict(config.data).items() if k not in own}
    values = dataclasses.asdict(config) | {"model": model_config_dict(config.model), "data": data}
    del values["output_dir"]
    plain: dict[str, Any] = to_jsonable_python(values)
    return plain


def _plain(config: RunConfig, data: DataSource) -> dict[str, Any]:
    """What decides a run, as JSON holds it."""
    values = dataclasses.asdict(config) | {
        "model": model_config_dict(config.model),
        "features": dataclasses.asdict(data.features),
        "encoder": data.encoder.digest(),
        "rows": data.report["rows"],
        "content": data.identity["content"],
    }
    plain: dict[str, Any] = to_jsonable_python(values)
    return plain


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)
