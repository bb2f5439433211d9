from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchrec_hilomoe.training import ScoreConfig, ShardingConfig, score
from torchrec_hilomoe.training.score import ScoreDataConfig


@pytest.fixture
def score_rows(tmp_path, tmp_path_factory):
    """Scores the valid rows that `run_training` evaluates on, of which one may be made bad."""

    def run(checkpoint, bad: int | None = None) -> tuple[dict, pa.Table]:
        valid = next((tmp_path_factory.getbasetemp() / "cache").rglob("valid.parquet"))
        rows = pq.read_table(valid).to_pylist()
        if bad is not None:
            rows[bad]["label"] = 2
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
    metrics, table = score_rows(tmp_path / "run" / "checkpoints" / "best", bad=3)
    assert sum(metrics["skipped"].values()) == 1
    assert metrics["samples"] == table.num_rows == 255


def test_experts_are_off_where_they_were_off_in_the_best_stage(run_training, score_rows, tmp_path):
    """The stages after it ruin the experts, which a warm start has brought along."""
    run_training(tmp_path / "source")
    run = tmp_path / "run"
    metrics = run_training(
        run,
        "training=three_stage",
        "training.stages.specialise.learning_rate_scale.experts=1e5",
        "training.stages.joint.learning_rate_scale={backbone: 1e3, experts: 1e3}",
        f"checkpoint.warm_start={tmp_path / 'source' / 'checkpoints' / 'best'}",
    )
    best = run / "checkpoints" / "best"
    saved = json.loads((best / "run.json").read_text())["progress"]
    assert [*saved["stages"]] == ["warm_up"]
    assert metrics["valid"]["auc"] == saved["best_auc"]
    assert score_rows(best)[0]["auc"] == pytest.approx(saved["best_auc"], abs=1e-6)
