from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_hilomoe.data import CTRBatch, FeatureSpec, SparseFeature
from torchrec_hilomoe.models import parse_model_config
from torchrec_hilomoe.training import (
    OptimizerConfig,
    ShardingConfig,
    StageOptimizer,
    TableOptimizerConfig,
    build_sharded,
    init_process_group,
    parse_run_config,
    train,
)
from torchrec_hilomoe.training.recorder import Recorder

CONF = Path(__file__).parents[2] / "conf"
SMALL = (
    "data.synthetic.train_rows=640",
    "data.synthetic.valid_rows=256",
    "data.synthetic.test_rows=64",
    "data.batch_size=64",
    "model.embedding_dim=8",
    "model.dense_arch_layer_sizes=[8]",
    "model.expert_width=10",
    "model.plain_width=10",
    "model.num_experts=4",
    "training=single_stage",
    "training.stages.joint.epochs=2",
    "checkpoint.every_batches=5",
)


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    """A process group of this process alone."""
    yield init_process_group()
    dist.destroy_process_group()


@pytest.fixture
def features() -> FeatureSpec:
    return FeatureSpec(
        dense=("age", "price"),
        sparse=(
            SparseFeature("user", 40),
            SparseFeature("item", 30),
            SparseFeature("genres", 12, "mean"),
        ),
    )


@pytest.fixture
def make_batch(features: FeatureSpec) -> Callable[..., CTRBatch]:
    """Random batches; ids of ``user`` and ``item`` are single, ``genres`` are bags of 0 to 3."""

    def make(seed: int = 0, rows: int = 32) -> CTRBatch:
        generator = torch.Generator().manual_seed(seed)

        def integers(high: int, shape: tuple[int, ...]) -> torch.Tensor:
            return torch.randint(0, high, shape, generator=generator)

        bags = integers(4, (rows,))
        lengths = torch.cat((torch.ones(2 * rows, dtype=torch.long), bags))
        values = torch.cat(
            (integers(40, (rows,)), integers(30, (rows,)), integers(12, (int(bags.sum()),)))
        )
        return CTRBatch(
            dense_features=torch.rand(rows, 2, generator=generator),
            sparse_features=KeyedJaggedTensor.from_lengths_sync(
                keys=["user", "item", "genres"], values=values, lengths=lengths
            ),
            labels=integers(2, (rows,)).float(),
        )

    return make


@pytest.fixture
def make_model(
    device: torch.device, features: FeatureSpec
) -> Callable[..., DistributedModelParallel]:
    """A small sharded model; keyword arguments are model options."""

    def make(
        tables: TableOptimizerConfig | None = None, sharding: str = "auto", **options: Any
    ) -> DistributedModelParallel:
        values = {
            "name": "hilomoe",
            "embedding_dim": 8,
            "dense_arch_layer_sizes": [8],
            "over_arch_layer_sizes": [6],
        }
        return build_sharded(
            parse_model_config({**values, **options}),
            features,
            ShardingConfig(sharding),
            tables or TableOptimizerConfig(),
            seed=0,
            device=device,
        )

    return make


class Killed(Exception):  # noqa: N818 (no error)
    """Ends a training between two batches, as kill -9 does."""


@pytest.fixture
def run_training(
    device: torch.device, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Runs a whole training of 2 epochs of 10 batches in this process; returns its metrics.

    Takes overrides of the configuration, and the batch after which it is `Killed`.
    """
    cache = tmp_path_factory.getbasetemp() / "cache"

    def run(output_dir: Path, *overrides: str, kill_after: int | None = None) -> dict[str, Any]:
        own = [f"output_dir={output_dir}", f"data.cache_dir={cache}"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", [*SMALL, *own, *overrides])
        values = OmegaConf.to_container(config, resolve=True)
        values = {k: v for k, v in values.items() if k not in ("experiment", "logging")}
        advance, batches = Recorder.advance, 0

        def advance_or_die(recorder: Recorder, *losses: float | None) -> None:
            nonlocal batches
            batches += 1
            if batches == kill_after:
                raise Killed
            advance(recorder, *losses)

        with monkeypatch.context() as patch:
            patch.setattr(Recorder, "advance", advance_or_die)
            if kill_after is None:
                return train(parse_run_config(values))
            with pytest.raises(Killed):
                train(parse_run_config(values))
            return {}

    return run


@pytest.fixture
def train_batches():
    """Trains a stage that was entered on some batches; returns the outputs."""

    def train(model, stage, batches, tables=None):
        optimizer = StageOptimizer(
            model,
            OptimizerConfig(tables=tables or TableOptimizerConfig()),
            stage,
        )
        pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"))
        iterator, outputs = iter(batches), []
        while True:
            try:
                outputs.append(pipeline.progress(iterator))
            except StopIteration:
                pipeline.detach()
                return outputs

    return train


@pytest.fixture
def snapshot():
    """Every tensor of a model and of its fused optimizer, by part and name."""

    def take(model):
        state = {}
        for name, value in model.state_dict().items():
            part = "backbone"
            if ".embedding_bags." in name:
                part = "tables"
            elif "expert_" in name:
                part = "experts"
            elif ".router." in name:
                part = "router"
            state[part, name] = _local(value)
        for name, values in model.fused_optimizer.state_dict()["state"].items():
            for key, value in values.items():
                state["tables", f"{name}/{key}"] = _local(value)
        return state

    return take


def _local(value):
    if hasattr(value, "local_shards"):
        return torch.cat([shard.tensor.flatten() for shard in value.local_shards()]).clone()
    return copy.deepcopy(value)


@pytest.fixture
def changed_parts():
    """The parts of which two snapshots differ."""

    def changed(before, after):
        return {
            part
            for (part, name), value in before.items()
            if not torch.equal(value, after[part, name])
        }

    return changed
