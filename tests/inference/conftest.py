from __future__ import annotations

import csv
import random
from collections.abc import Iterator
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


def _write(path: Path, rows: int, seed: int) -> Path:
    source = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clicked", "price", "user", "item", "tags"])
        for _ in range(rows):
            user, item = source.randrange(20), source.randrange(30)
            clicked = int(source.random() < 0.2 + 0.6 * ((user + item) % 2))
            tags = "|".join(f"t{source.randrange(9)}" for _ in range(source.randrange(4)))
            writer.writerow([clicked, source.choice(["", "1.5", "-3"]), f"u{user}", item, tags])
    return path


class Trained:
    """A finished run, and what a rank of it makes of a raw file."""

    def __init__(self, folder: Path) -> None:
        self.file = _write(folder / "test.csv", 301, seed=1)
        self.checkpoint = folder / "out" / "checkpoints" / "best"
        self.predictions = folder / "predictions.parquet"
        self.cache = str(folder / "cache")
        train_file = _write(folder / "train.csv", 1000, seed=0)
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
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """Trained and scored in a process group that is gone afterwards."""
    run = Trained(tmp_path_factory.mktemp("trained"))
    dist.destroy_process_group()
    return run
