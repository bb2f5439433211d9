from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchrec_hilomoe.training import ScoreConfig, ShardingConfig, score
from torchrec_hilomoe.training.score import ScoreDataConfig


@pytest.fixture
def score_rows(tmp_path, tmp_path_factory):
    """Scores 50 raw rows of the data that `run_training` trains on, of which one is bad."""

    def run(checkpoint) -> tuple[dict, pa.Table]:
        valid = next((tmp_path_factory.getbasetemp() / "cache").rglob("valid.parquet"))
        rows = pq.read_table(valid).slice(0, 50).to_pylist()
        rows[3]["label"] = 2
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
        data = ScoreDataConfig(
            str(tmp_path / "rows.parquet"), 16, on_bad_row="skip", cache_dir=str(tmp_path / "cache")
        )
        scores = tmp_path / "scores.parquet"
        metrics = score(ScoreConfig(checkpoint, data, scores, ShardingConfig("row_wise")))
        return metrics, pq.read_table(scores)

    return run


def test_bad_rows_that_are_skipped_are_reported(run_training, score_rows, tmp_path):
    run_training(tmp_path / "run", "training.max_train_batches=1")
    metrics, table = score_rows(tmp_path / "run" / "checkpoints" / "best")
    assert sum(metrics["skipped"].values()) == 1
    assert metrics["samples"] == table.num_rows == 49
