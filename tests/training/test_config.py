from __future__ import annotations

import math

import pytest

from torchrec_hilomoe.config import parse_config
from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.training import (
    PartOptimizerConfig,
    ShardingConfig,
    StageConfig,
    TableOptimizerConfig,
    TrainingConfig,
)


def test_a_stage_in_which_nothing_would_learn_is_refused():
    stage = {"train": ["experts", "router"], "experts": False, "epochs": 1}
    message = "training.stages.only.train names nothing but experts and router"
    with pytest.raises(ConfigError, match=message):
        parse_config(TrainingConfig, {"stages": {"only": stage}}, "training")
    parse_config(StageConfig, {**stage, "train": ["experts", "router", "backbone"]})


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (TrainingConfig, {"stages": {"all": {"batches": 1}}, "timeout_minutes": float("inf")}),
        (ShardingConfig, {"memory_per_rank_gib": float("inf")}),
    ],
)
def test_no_limit_is_named_as_one_that_is_too_large(config, values):
    with pytest.raises(ConfigError, match="less than or equal to 1000000 .got inf"):
        parse_config(config, values, "key")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: StageConfig(batches=-5), "batches must be at least 1, got -5"),
        (lambda: StageConfig(batches=1, train=["tabels"]), "train must be one of .* got 'tabels'"),
        (
            lambda: StageConfig(batches=1, learning_rate_scale={"expert": 0.1}),
            "learning_rate_scale must be one of .* got 'expert'",
        ),
        (lambda: TableOptimizerConfig(kernel="dens"), "kernel must be one of .* got 'dens'"),
        (lambda: TableOptimizerConfig(name="adamw"), "name must be one of .* got 'adamw'"),
        (lambda: PartOptimizerConfig(name="adamw"), "name must be one of .* got 'adamw'"),
        (lambda: StageConfig(), "exactly one of epochs and batches"),
        (lambda: StageConfig(epochs=1.0, batches=1), "exactly one of epochs and batches"),
        (lambda: StageConfig(batches=1, train=[]), "train is empty"),
        (lambda: StageConfig(batches=1, train=["router", "router"]), "train names a part twice"),
        (lambda: TrainingConfig(stages={}), "stages is empty"),
        (lambda: TableOptimizerConfig(l2=0.1), "l2 covers whole tables and needs kernel=dense"),
        (lambda: TableOptimizerConfig(name="sgd", eps=0.1), "sgd has no eps"),
        (lambda: PartOptimizerConfig(name="sgd", eps=0.1), "sgd has no eps"),
        (lambda: ShardingConfig(type="rowwise"), "type must be one of .* got 'rowwise'"),
        (lambda: StageConfig(epochs=-1), "epochs must be finite and positive, got -1"),
        (lambda: StageConfig(epochs=math.inf), "epochs must be finite and positive, got inf"),
        (
            lambda: StageConfig(batches=1, learning_rate_scale={"tables": -1}),
            "learning_rate_scale.tables must be finite and at least 0, got -1",
        ),
        (lambda: TableOptimizerConfig(learning_rate=-0.1), "learning_rate must be finite and at l"),
        (lambda: PartOptimizerConfig(learning_rate="1e-3"), "learning_rate must be a number, got"),
        (lambda: PartOptimizerConfig(l2=math.nan), "l2 must be finite and at least 0, got nan"),
        (lambda: TableOptimizerConfig(eps=0), "eps must be finite and positive, got 0"),
        (lambda: ShardingConfig(memory_per_rank_gib=0), "memory_per_rank_gib must be finite and p"),
    ],
)
def test_configurations_that_are_built_in_python_are_checked_too(build, message):
    with pytest.raises(ValueError, match=message):
        build()
