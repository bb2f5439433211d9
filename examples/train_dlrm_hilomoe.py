"""Trains a CTR model, HiLoMoE or a baseline, in stages over sharded tables.

torchrun --standalone --nproc_per_node=2 examples/train_dlrm_hilomoe.py model=hilomoe
python examples/train_dlrm_hilomoe.py --help
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from launch import launch
from omegaconf import DictConfig, OmegaConf

from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.training import is_main_rank, parse_run_config, train

logger = logging.getLogger("torchrec_hilomoe.train")


def main(values: dict[str, Any], config: DictConfig) -> dict[str, Any]:
    """Runs one training.

    Args:
        values (dict[str, Any]): the composed configuration.
        config (DictConfig): the same, for saving.

    Returns:
        dict[str, Any]: the content of ``metrics.json``.
    """
    _check_tuned()
    output_dir = _output_dir(values)
    run_config = parse_run_config(values | {"output_dir": str(output_dir)})

    def save_config() -> None:
        if not is_main_rank():
            return
        saved = OmegaConf.merge(config, {"output_dir": str(output_dir)})
        try:
            OmegaConf.save(saved, output_dir / "config.yaml", resolve=True)
        except OSError as error:
            raise ConfigError(f"output_dir: cannot write {output_dir}: {error}") from None

    return train(run_config, on_start=save_config)


def monitored_on_valid(config: DictConfig, metrics: dict[str, Any]) -> float | None:
    """What a Hydra sweeper optimises: ``training.monitor`` on valid, None without valid data."""
    valid = metrics["valid"]
    return None if valid is None else valid[config.training.monitor]


def _output_dir(values: dict[str, Any]) -> Path:
    """Hydra's, since each job of a multirun has a subfolder of its own."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    given = Path(os.path.normpath(Path(hydra_config.runtime.cwd, values["output_dir"])))
    overridden = any(o.startswith("output_dir=") for o in hydra_config.overrides.task)
    if overridden and given not in (folder, *folder.parents):
        raise ConfigError(
            f"output_dir={values['output_dir']}: not heeded, since hydra.run.dir or "
            f"hydra.sweep.dir is {folder}; give that one in its place"
        )
    return folder


def _check_tuned() -> None:
    """Tells what is tuned; the group is optional, so that Hydra takes any name for it."""
    if not GlobalHydra.instance().is_initialized():
        return  # --experimental-rerun takes a configuration that was composed before
    chosen = HydraConfig.get().runtime.choices.get("tuned")
    known = GlobalHydra.instance().config_loader().get_group_options("tuned")
    given = any(override.startswith("tuned=") for override in HydraConfig.get().overrides.task)
    if chosen in known and is_main_rank():
        logger.info("settings of tuned/%s.yaml apply; ~tuned leaves them out", chosen)
    elif chosen not in known and given:
        raise ConfigError(f"tuned={chosen}: expected one of {', '.join(known)}, or ~tuned for none")


if __name__ == "__main__":
    launch(main, "config", monitored_on_valid)
