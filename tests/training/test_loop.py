"""Whole trainings: what ends them, what is taken for the best, what is reported."""

from __future__ import annotations

import json

import pytest

from torchrec_hilomoe.errors import TrainingError

# One batch, whose loss and gradients are finite, and then nothing is.
DIVERGES = ("training.max_train_batches=1", "optimizer.backbone.learning_rate=1e38")


def test_a_model_that_predicts_nan_ends_the_training(run_training, tmp_path):
    with pytest.raises(TrainingError, match="after batch 1: predictions on valid are not finite"):
        run_training(tmp_path, *DIVERGES)
    assert not (tmp_path / "checkpoints").exists()


def test_a_model_that_predicts_nan_has_no_metrics_where_training_goes_on(run_training, tmp_path):
    run_training(tmp_path, *DIVERGES, "training.on_non_finite=skip")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    metrics = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse)
    assert metrics["valid"]["auc"] is None
    assert metrics["stages"]["joint"]["valid_auc_after"] is None
    assert metrics["stages"]["joint"]["experts"] == {}
