from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchrec_hilomoe.errors import CheckpointError, ConfigError
from torchrec_hilomoe.training import ScoreConfig, ShardingConfig, score
from torchrec_hilomoe.training.score import ScoreDataConfig


@pytest.fixture
def score_rows(tmp_path, tmp_path_factory):
    """Scores the valid rows that `run_training` evaluates on.

    One may be made bad, and labels left out; predictions are written to ``tmp_path / to``.
    """

    def run(
        checkpoint,
        bad: int | None = None,
        labels: bool = True,
        sharding: str = "row_wise",
        to: str | None = "scores.parquet",
    ) -> tuple[dict, pa.Table | None]:
        valid = next((tmp_path_factory.getbasetemp() / "cache").rglob("valid.parquet"))
        rows = pq.read_table(valid).to_pylist()
        if bad is not None:
            rows[bad]["label"] = 2
        table = pa.Table.from_pylist(rows)
        pq.write_table(table if labels else table.drop_columns("label"), tmp_path / "rows.parquet")
        data = ScoreDataConfig(
            str(tmp_path / "rows.parquet"), 16, on_bad_row="skip", cache_dir=str(tmp_path / "cache")
        )
        scores = None if to is None else tmp_path / to
        metrics = score(ScoreConfig(checkpoint, data, scores, ShardingConfig(sharding)))
        return metrics, None if scores is None else pq.read_table(scores)

    return run


def test_bad_rows_that_are_skipped_are_reported(run_training, score_rows, tmp_path):
    run_training(tmp_path / "run", "training.max_train_batches=1")
    metrics, table = score_rows(tmp_path / "run" / "checkpoints" / "best", bad=3)
    assert sum(metrics["skipped"].values()) == 1
    assert metrics["samples"] == table.num_rows == 255
    assert table["row"].to_pylist() == [row for row in range(256) if row != 3]


def test_rows_without_labels_have_predictions_alone(run_training, score_rows, tmp_path, caplog):
    run_training(tmp_path / "run", "training.max_train_batches=1")
    best = tmp_path / "run" / "checkpoints" / "best"
    labelled, with_labels = score_rows(best)
    unlabelled, without = score_rows(best, labels=False)
    assert "data.test has no labels: predictions are written, metrics are null" in caplog.text
    assert labelled["auc"] is not None
    assert {key for key, value in unlabelled.items() if value} == {"samples"}
    assert unlabelled.keys() == labelled.keys() - {"gauc"}
    assert without["label"].null_count == without.num_rows == 256
    assert with_labels["label"].null_count == 0
    for column in ("row", "prediction"):
        assert without[column] == with_labels[column]


def test_predictions_go_where_they_can_be_written(run_training, score_rows, tmp_path):
    run_training(tmp_path / "run", "training.max_train_batches=1")
    best = tmp_path / "run" / "checkpoints" / "best"
    _, table = score_rows(best, to="new/folder/scores.parquet")
    assert table.num_rows == 256
    with pytest.raises(ConfigError, match="^predictions: cannot write .*rows.parquet/scores"):
        score_rows(best, to="rows.parquet/scores")
    with pytest.raises(ConfigError, match="has no labels.* give predictions=FILE"):
        score_rows(best, labels=False, to=None)
    assert score_rows(best, to=None)[0]["auc"] is not None


def test_a_damaged_checkpoint_scores_nothing(run_training, score_rows, tmp_path):
    run_training(tmp_path / "run", "training.max_train_batches=1")
    best = tmp_path / "run" / "checkpoints" / "best"
    weights = next(best.glob("weights/*.distcp"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        score_rows(best)


@pytest.mark.parametrize("sharding", ["auto", "table_wise"])
def test_tables_of_any_number_of_columns_are_scored(run_training, score_rows, tmp_path, sharding):
    run = tmp_path / "run"
    metrics = run_training(run, "optimizer=adam_dense", "model.embedding_dim=10")
    scored, _ = score_rows(run / "checkpoints" / "best", sharding=sharding)
    assert scored["auc"] == pytest.approx(metrics["valid"]["auc"], abs=1e-6)


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
    assert metrics["valid"]["auc"] == saved["best"]
    assert score_rows(best)[0]["auc"] == pytest.approx(saved["best"], abs=1e-6)
