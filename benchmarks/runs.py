"""Configurations as the entry scripts compose them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from torchrec_hilomoe.training import RunConfig, parse_run_config

CONF = Path(__file__).resolve().parent.parent / "conf"


def model_names() -> list[str]:
    """The models of ``conf/model``."""
    return [path.stem for path in sorted((CONF / "model").glob("[!_]*.yaml"))]


def run_config(model: str, overrides: Sequence[str]) -> RunConfig:
    """The run of an entry script with ``model=...`` and these overrides."""
    OmegaConf.register_new_resolver("launch_time", lambda: "benchmark", replace=True)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=[f"model={model}", *overrides])
    return parse_run_config(OmegaConf.to_container(config, resolve=True))
