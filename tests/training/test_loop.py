"""Whole trainings: what ends them, what is taken for the best, what is reported."""

from __future__ import annotations

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchrec_hilomoe.errors import TrainingError
from torchrec_hilomoe.inference import load_for_serving

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


def test_a_decay_ends_at_its_final_factor_though_a_stage_stopped_early(run_training, tmp_path):
    stages = {
        name: f"training.stages.{name}={{train: [tables, backbone, experts, router], epochs: {n}}}"
        for name, n in (("long", 6), ("last", 1))
    }
    run_training(
        tmp_path,
        "~training.stages.joint",
        *(f"+{stage}" for stage in stages.values()),
        "training.early_stopping_patience=1",
        "training.schedule.name=linear",
        "training.log_every=1",
        "optimizer.backbone.learning_rate=1",
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    ran, last = (metrics["stages"][name]["batches"] for name in stages)
    assert ran < 6 * last
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rates = [event.value for event in events.Scalars("train/learning_rate/backbone")]
    assert rates[-1] == pytest.approx(1 / (7 * last))
    assert rates[ran] == pytest.approx(1 / 7)


def test_evaluations_are_of_as_many_batches_as_configured(run_training, tmp_path):
    limits = ("training.max_train_batches=1", "training.max_eval_batches=2")
    assert run_training(tmp_path, *limits)["valid"]["samples"] == 2 * 64


def test_frozen_batch_norms_stay_so_after_an_evaluation(run_training, tmp_path):
    """It leaves the model in eval mode, and `train()` alone would thaw them."""
    metrics = run_training(
        tmp_path,
        "training=three_stage",
        "training.max_train_batches=3",
        "model.batch_norm=true",
        "checkpoint.every_batches=null",
        "checkpoint.keep_last=99",
    )
    assert [stage["batches"] for stage in metrics["stages"].values()] == [3, 3, 3]
    warm_up, specialise, joint = (
        dict(load_for_serving(tmp_path / f"checkpoints/step-0000000{step}").named_buffers())
        for step in (3, 6, 9)
    )
    statistics = [name for name in joint if "running_" in name]
    assert statistics
    for name in statistics:
        assert torch.equal(specialise[name], warm_up[name])
        assert not torch.equal(joint[name], specialise[name])
