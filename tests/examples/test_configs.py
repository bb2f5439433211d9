"""Every shipped configuration composes and is valid."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from torchrec_hilomoe.models import interaction_names, parse_model_config
from torchrec_hilomoe.modules import HiLoMoEConfig, TwoStreamConfig
from torchrec_hilomoe.training import parse_run_config

CONF = Path(__file__).resolve().parents[2] / "conf"
GROUPS = ("data", "model", "training", "optimizer", "sharding", "experiment")
CHOICES = [
    f"{group}={path.stem}" for group in GROUPS for path in sorted((CONF / group).glob("[!_]*.yaml"))
]


@pytest.fixture
def composed():
    OmegaConf.register_new_resolver("launch", lambda: "now", replace=True)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):

        def parse(*overrides):
            return parse_run_config(
                OmegaConf.to_container(compose("config", overrides), resolve=True)
            )

        yield parse


@pytest.mark.parametrize("choice", CHOICES)
def test_choice_composes(composed, choice):
    group, name = choice.split("=")
    config = composed(choice)
    if group in ("data", "model"):
        assert getattr(config, group).name == name


def test_every_interaction_has_a_config():
    assert {path.stem for path in (CONF / "model").glob("[!_]*.yaml")} >= {
        name for name in interaction_names() if name.startswith(("d", "p", "hilomoe"))
    }


def test_fixed_override_names(composed):
    config = composed(
        "model=hilomoe",
        "model.num_layers=2",
        "model.num_experts=16",
        "model.top_k=4",
        "data.train=a",
        "data.valid=b",
        "data.test=c",
        "data.batch_size=64",
        "training.max_train_batches=5",
        "training.max_eval_batches=6",
        "seed=7",
        "output_dir=d",
    )
    assert (config.model.interaction.num_layers, config.model.interaction.num_experts) == (2, 16)
    assert config.model.interaction.top_k == 4
    assert (config.data.train, config.data.valid, config.data.test) == ("a", "b", "c")
    assert config.data.batch_size == 64
    assert (config.training.max_train_batches, config.training.max_eval_batches) == (5, 6)
    assert config.seed == 7
    assert str(config.output_dir) == "d"


def test_the_defaults_of_the_library_are_those_of_the_default_model(composed):
    assert composed("model=hilomoe").model == parse_model_config({"name": "hilomoe"})
    own = composed("model=hilomoe").model.interaction
    for options in (HiLoMoEConfig(), TwoStreamConfig()):
        for name, value in dataclasses.asdict(options).items():
            assert getattr(own, name, value) == value, name


def test_frappe_protocol(composed):
    config = composed("experiment=frappe_x1", "model=dlrm_cat")
    assert config.model.name == "dlrm_cat"
    assert config.model.over_arch_layer_sizes == [400, 400, 400]
    assert (config.model.embedding_dim, config.model.embedding_init_std) == (10, 1e-4)
    assert (config.model.batch_norm, config.model.dropout) == (True, 0.4)
    tables = config.optimizer.tables
    assert (tables.name, tables.kernel, tables.learning_rate) == ("adam", "dense", 1e-3)
    assert 0.05 <= tables.l2 <= 0.1
    assert config.data.batch_size == 4096
    assert config.training.schedule.name == "plateau"
    assert config.training.early_stopping_patience == 2
    assert config.training.gradient_clip_norm == 10


def test_an_experiment_has_settings_for_one_model(composed):
    model = composed("experiment=frappe_x1", "model=hilomoe").model
    assert (model.embedding_dim, model.dropout) == (10, 0.4)
    assert (model.interaction.num_experts, model.interaction.query_dropout) == (8, 0.4)
    assert model.ensemble_size == 2
    assert model.interaction.fusion_scale == 30.0
    assert composed("model=hilomoe").model.interaction.query_dropout == 0.0
    overridden = composed("experiment=frappe_x1", "model=hilomoe", "model.num_experts=5").model
    assert overridden.interaction.num_experts == 5


@pytest.mark.parametrize("path", sorted((CONF / "tuned").glob("*.yaml")), ids=lambda p: p.stem)
def test_settings_belong_to_an_experiment_and_a_model(path):
    names = [
        f"{experiment.stem}_{model.stem}"
        for experiment in (CONF / "experiment").glob("*.yaml")
        for model in (CONF / "model").glob("[!_]*.yaml")
    ]
    assert path.stem in names
