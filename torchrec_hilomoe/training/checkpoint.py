"""Checkpoints on disk: the sharded weights, and beside them all that scoring raw data needs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.data import DataSource, FeatureSpec, SparseFeature
from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.models import ModelConfig, model_config_dict, parse_model_config
from torchrec_hilomoe.training.distributed import broadcast, is_main_rank

_MODEL_FILE = "model.json"
_ENCODER = "encoder"
_WEIGHTS = "weights"


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of its model.

    Attributes:
        model (ModelConfig): the architecture.
        features (FeatureSpec): the features it was trained on.
        encoder (Path): folder of the saved schema and vocabularies.
    """

    model: ModelConfig
    features: FeatureSpec
    encoder: Path


class CheckpointFolder:
    """The ``checkpoints`` folder of a run.

    Each save is a new folder, renamed into place once it is whole; then the link ``best`` or
    ``last`` moves to it, and folders that no link names are removed. A process that dies
    half-way leaves the previous checkpoint untouched.

    Args:
        folder (Path): created on the first save.
        model_config (ModelConfig): saved with the weights.
        data (DataSource): its encoder is saved with the weights.
    """

    def __init__(self, folder: Path, model_config: ModelConfig, data: DataSource) -> None:
        self._folder = folder
        self._data = data
        self._saved: dict[int, str] = {}
        self._model_file = {
            "model": model_config_dict(model_config),
            "features": dataclasses.asdict(data.features),
        }

    def save(self, model: DistributedModelParallel, step: int, *links: str) -> None:
        """Saves the weights and moves links to them. Every rank must call it.

        Args:
            model (DistributedModelParallel): the model.
            step (int): global step, names the folder.
            *links (str): ``best``, ``last``.
        """
        if step not in self._saved:
            self._saved[step] = self._write(model, broadcast(self._free_name(step)))
        if is_main_rank():
            for link in links:
                _point(self._folder / link, self._saved[step])
            self._remove_unlinked()
        dist.barrier()

    def _free_name(self, step: int) -> str:
        """A name that no earlier run in the same folder has taken."""
        names = (f"step-{step:08d}" + (f".{i}" if i else "") for i in itertools.count())
        return next(name for name in names if not (self._folder / name).exists())

    def _write(self, model: DistributedModelParallel, name: str) -> str:
        """Writes a new folder aside and renames it into place when it is whole."""
        temporary = self._folder / f".{name}.incomplete"
        if is_main_rank():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier()
        dcp.save({"model": model.state_dict()}, checkpoint_id=str(temporary / _WEIGHTS))
        if is_main_rank():
            self._data.save(temporary / _ENCODER)
            (temporary / _MODEL_FILE).write_text(json.dumps(self._model_file, indent=2))
            os.replace(temporary, self._folder / name)
        return name

    def load_weights(self, model: DistributedModelParallel, link: str) -> None:
        """Loads the weights that a link names into the model. Every rank must call it.

        Args:
            model (DistributedModelParallel): built and sharded, under any plan.
            link (str): ``best`` or ``last``.
        """
        load_weights(model, self._folder / link)

    def _remove_unlinked(self) -> None:
        kept = {os.readlink(p) for p in self._folder.iterdir() if p.is_symlink()}
        for path in self._folder.glob("step-*"):
            if path.name not in kept:
                shutil.rmtree(path)


def read_info(checkpoint: Path) -> CheckpointInfo:
    """Reads what model a checkpoint holds.

    Args:
        checkpoint (Path): such as ``OUTPUT_DIR/checkpoints/best``.

    Returns:
        CheckpointInfo: architecture, features, encoder.

    Raises:
        ConfigError: there is no checkpoint.
    """
    try:
        content: dict[str, Any] = json.loads((checkpoint / _MODEL_FILE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"checkpoint: {checkpoint} is no checkpoint of this library ({error}); name a folder "
            "such as OUTPUT_DIR/checkpoints/best"
        ) from None
    features = FeatureSpec(
        dense=tuple(content["features"]["dense"]),
        sparse=tuple(SparseFeature(**feature) for feature in content["features"]["sparse"]),
    )
    return CheckpointInfo(parse_model_config(content["model"]), features, checkpoint / _ENCODER)


def load_weights(model: DistributedModelParallel, checkpoint: Path) -> None:
    """Loads a checkpoint's weights, whatever world size and plan saved them.

    Args:
        model (DistributedModelParallel): of the same architecture. Every rank must call it.
        checkpoint (Path): such as ``OUTPUT_DIR/checkpoints/best``.
    """
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=str(checkpoint / _WEIGHTS))
    model.load_state_dict(state["model"])


def _point(link: Path, target: str) -> None:
    """Moves a symbolic link in one step."""
    temporary = link.with_name(f".{link.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
