"""What a checkpoint says of itself: the model, the data's features, the run and where it stands."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrec_hilomoe.config import parse_config
from torchrec_hilomoe.data import FeatureSpec, SparseFeature
from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.models import ModelConfig, model_config_dict, parse_model_config
from torchrec_hilomoe.training.progress import Progress

WEIGHTS = "weights"
ENCODER = "encoder"
_MODEL_FILE = "model.json"
_RUN_FILE = "run.json"
_OF_MODEL = ("model", "features", "experts")
_OF_RUN = ("config", "world_size", "progress", "best", "launch")


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of its model.

    Attributes:
        model (ModelConfig): the architecture.
        features (FeatureSpec): the features it was trained on.
        encoder (Path): folder of the saved schema and vocabularies.
        experts (bool): whether the experts took part when it was written.
    """

    model: ModelConfig
    features: FeatureSpec
    encoder: Path
    experts: bool


@dataclass(frozen=True)
class RunInfo:
    """What a checkpoint says of its run.

    Attributes:
        config (dict[str, Any]): the run's configuration as JSON holds it.
        world_size (int): number of ranks that wrote it.
        progress (Progress): where the run stood.
        best (bool): it was the best so far.
        launch (str): which launch wrote it; restarts by torchrun are the same one.
    """

    config: dict[str, Any]
    world_size: int
    progress: Progress
    best: bool
    launch: str


def write_info(checkpoint: Path, model: ModelConfig, features: FeatureSpec, experts: bool) -> None:
    """Writes what scoring needs to know.

    Args:
        checkpoint (Path): folder of the checkpoint.
        model (ModelConfig): the architecture.
        features (FeatureSpec): the features of the data.
        experts (bool): whether the experts take part.
    """
    content = {
        "model": model_config_dict(model),
        "features": dataclasses.asdict(features),
        "experts": experts,
    }
    (checkpoint / _MODEL_FILE).write_text(json.dumps(content, indent=2))


def check_description(checkpoint: Path, key: str) -> None:
    """Checks that there is a checkpoint at a path: it describes its model and its run.

    Args:
        checkpoint (Path): such as ``OUTPUT_DIR/checkpoints/best``.
        key (str): the configuration key that names it, for messages.

    Raises:
        ConfigError: there is none.
    """
    _read(checkpoint, _MODEL_FILE, *_OF_MODEL, key=key)
    _read(checkpoint, _RUN_FILE, *_OF_RUN, key=key)


def read_info(checkpoint: Path) -> CheckpointInfo:
    """Reads what model a checkpoint holds.

    Args:
        checkpoint (Path): such as ``OUTPUT_DIR/checkpoints/best``.

    Returns:
        CheckpointInfo: what it says.

    Raises:
        ConfigError: there is no checkpoint, or this cannot be read.
    """
    content = _read(checkpoint, _MODEL_FILE, *_OF_MODEL)
    try:
        features = FeatureSpec(
            dense=tuple(content["features"]["dense"]),
            sparse=tuple(SparseFeature(**feature) for feature in content["features"]["sparse"]),
        )
    except (KeyError, TypeError) as error:
        raise _no_checkpoint("checkpoint", checkpoint, error) from None
    return CheckpointInfo(
        parse_model_config(content["model"]),
        features,
        checkpoint / ENCODER,
        content["experts"],
    )


def write_run(checkpoint: Path, run: RunInfo) -> None:
    """Writes what resuming needs to know.

    Args:
        checkpoint (Path): folder of the checkpoint.
        run (RunInfo): the run.
    """
    (checkpoint / _RUN_FILE).write_text(json.dumps(dataclasses.asdict(run), indent=2))


def read_run(checkpoint: Path) -> RunInfo:
    """Reads where a run stood.

    Args:
        checkpoint (Path): such as ``OUTPUT_DIR/checkpoints/last``.

    Returns:
        RunInfo: what it says.

    Raises:
        ConfigError: there is no checkpoint.
    """
    content = _read(checkpoint, _RUN_FILE, *_OF_RUN)
    progress = parse_config(Progress, content["progress"], f"{checkpoint / _RUN_FILE}: progress")
    return RunInfo(
        content["config"],
        content["world_size"],
        progress,
        content["best"],
        content["launch"],
    )


def _read(checkpoint: Path, name: str, *required: str, key: str = "checkpoint") -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((checkpoint / name).read_text())
        if missing := [entry for entry in required if entry not in content]:
            raise ValueError(f"{name} lacks {', '.join(missing)}")
    except (OSError, ValueError) as error:
        raise _no_checkpoint(key, checkpoint, error) from None
    return content


def _no_checkpoint(key: str, checkpoint: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{key}={checkpoint}: is no checkpoint of this library ({error}); name a folder such as "
        "OUTPUT_DIR/checkpoints/best"
    )
