"""Configurations as the entry scripts compose them."""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from torchrec_hilomoe.training import RunConfig, parse_run_config

CONF = Path(__file__).resolve().parent.parent / "conf"
_COMPOSING = threading.Lock()  # Hydra composes one configuration at a time


def model_names() -> list[str]:
    """The models of ``conf/model``."""
    return [path.stem for path in sorted((CONF / "model").glob("[!_]*.yaml"))]


def run_config(model: str, overrides: Sequence[str]) -> RunConfig:
    """The run of an entry script with ``model=...`` and these overrides."""
    OmegaConf.register_new_resolver("launch", lambda: "benchmark", replace=True)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=[f"model={model}", *overrides])
    return parse_run_config(OmegaConf.to_container(config, resolve=True))


def composed(overrides: Sequence[str]) -> DictConfig:
    """The configuration that these overrides give an entry script, not yet checked."""
    with _COMPOSING, initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


_DECISIVE = ("data", "model", "training", "optimizer")
_FILES = ("train", "valid", "test", "quote_char")
_UNDECISIVE = (*_FILES, "cache_dir", "num_workers")


@functools.cache
def config_digest(overrides: tuple[str, ...], tune_rows: int | None = None) -> str:
    """Tells two configurations apart: of all that decides a run but its data files and seed.

    Args:
        overrides (tuple[str, ...]): as given to the entry scripts.
        tune_rows (int | None): rows of the sample that train was cut to; None for all rows.

    Returns:
        str: 12 hexadecimal digits.
    """
    config = composed(overrides)
    groups = {key: OmegaConf.to_container(config[key]) for key in _DECISIVE}
    for key in _UNDECISIVE:
        groups["data"].pop(key, None)
    # As all runs had them before the keys were there.
    for group, key, value in (("training", "monitor", "auc"), ("data", "vocabularies_from", None)):
        if groups[group][key] == value:
            del groups[group][key]
    if tune_rows is not None:
        groups["tune_rows"] = tune_rows
    return hashlib.sha256(json.dumps(groups, sort_keys=True).encode()).hexdigest()[:12]
