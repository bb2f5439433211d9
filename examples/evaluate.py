"""Scores a raw file with a checkpoint, with the schema and vocabularies saved in it.

python examples/evaluate.py checkpoint=OUTPUT_DIR/checkpoints/best data.test=FILE
"""

from __future__ import annotations

from typing import Any

from launch import launch
from omegaconf import DictConfig

from torchrec_hilomoe.config import parse_config
from torchrec_hilomoe.models import import_plugins
from torchrec_hilomoe.training import ScoreConfig, score


def main(values: dict[str, Any], config: DictConfig) -> dict[str, Any]:
    """Scores one file.

    Args:
        values (dict[str, Any]): the composed configuration.
        config (DictConfig): the same, not needed here.

    Returns:
        dict[str, Any]: ``auc``, ``logloss``, ``samples`` and the other metrics, and ``skipped``.
    """
    import_plugins(values.pop("plugins"))
    values.pop("output_dir")
    return score(parse_config(ScoreConfig, values))


if __name__ == "__main__":
    launch(main, "evaluate")
