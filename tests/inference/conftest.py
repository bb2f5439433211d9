from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import distributed as dist

from torchrec_hilomoe.config import parse_config
from torchrec_hilomoe.data import CTRBatch, open_encoded
from torchrec_hilomoe.training import ScoreConfig, parse_run_config, score, train
from torchrec_hilomoe.training.checkpoint import read_info

SCHEMA = {
    "label": "clicked",
    "dense": [{"name": "price", "transform": "standardize"}],
    "categorical": ["user", {"name": "item", "hash_size": 50}],
    "multi_valued": ["tags"],
    "group": "user",
}


class Trained:
    """A finished run, and what a rank of it makes of a raw file."""

    def __init__(self, folder: Path, write_clicks: Callable[[Path, int, int], Path]) -> None:
        self.file = write_clicks(folder / "test.csv", 301, 1)
        self.checkpoint = folder / "out" / "checkpoints" / "best"
        self.predictions = folder / "predictions.parquet"
        self.cache = str(folder / "cache")
        train_file = write_clicks(folder / "train.csv", 1000, 0)
        values = {
            "data": {
                "train": str(train_file),
                "valid": str(self.file),
                "schema": SCHEMA,
                "batch_size": 100,
                "cache_dir": self.cache,
            },
            "model": {"name": "hilomoe", "embedding_dim": 8, "num_experts": 4},
            "training": {"stages": {"joint": {"batches": 20}}},
            "optimizer": {},
            "sharding": {},
            "seed": 0,
            "output_dir": str(folder / "out"),
        }
        train(parse_run_config(values))
        scored = {"test": str(self.file), "batch_size": 64, "cache_dir": self.cache}
        evaluation = {
            "checkpoint": str(self.checkpoint),
            "data": scored,
            "predictions": str(self.predictions),
            "sharding": {},
        }
        score(parse_config(ScoreConfig, evaluation))

    def batch(self) -> CTRBatch:
        """The raw file as one batch of the loader that evaluations use."""
        encoder = read_info(self.checkpoint).encoder
        data = open_encoded(
            encoder,
            str(self.file),
            batch_size=301,
            rank=0,
            world_size=1,
            cache_dir=self.cache,
        )
        (batch,) = data.loader("test")
        return batch


@pytest.fixture(scope="session")
def trained(
    write_clicks: Callable[[Path, int, int], Path], tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    """Trained and scored in a process group that is gone afterwards."""
    run = Trained(tmp_path_factory.mktemp("trained"), write_clicks)
    dist.destroy_process_group()
    return run
