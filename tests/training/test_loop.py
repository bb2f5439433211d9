"""Whole trainings: what ends them, what is taken for the best, what is reported."""

from __future__ import annotations

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchrec_hilomoe.errors import TrainingError
from torchrec_hilomoe.inference import load_for_serving
from torchrec_hilomoe.training import loop
from torchrec_hilomoe.training.checkpoint import read_run

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


def test_a_stage_stops_after_as_many_evaluations_without_a_best_as_configured(
    run_training, tmp_path, monkeypatch
):
    values = iter([0.5, 0.6, 0.7, 0.65, 0.7, 0.8])  # the first comes before training
    monkeypatch.setattr(loop, "monitored", lambda metric, metrics: next(values))
    metrics = run_training(
        tmp_path, "training.stages.joint.epochs=9", "training.early_stopping_patience=2"
    )
    assert metrics["train_batches"] == 4 * 10
    assert next(values) == 0.8


@pytest.mark.parametrize(("epochs", "batches"), [(0.001, 1), (0.26, 3), (1.5, 15)])
def test_a_stage_is_as_long_as_configured(run_training, tmp_path, epochs, batches):
    metrics = run_training(tmp_path, f"training.stages.joint.epochs={epochs}")
    assert metrics["train_batches"] == metrics["stages"]["joint"]["batches"] == batches
    assert read_run(tmp_path / "checkpoints" / "last").progress.samples == 64 * batches


def test_what_is_recorded_and_when(run_training, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(loop, "warn_if_not_learning", lambda auc, step: steps.append(step))
    metrics = run_training(
        tmp_path,
        "training=three_stage",
        "training.max_train_batches=5",
        "training.log_every=4",
        "training.schedule.warmup_batches=5",
    )
    assert steps == [10, 15], "not in the warm-up"
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [4, 8, 12]
    valid = events.Scalars("valid/auc")
    assert [event.step for event in valid] == [0, 5, 10, 15]
    before, after = (
        [stage[f"valid_auc_{when}"] for stage in metrics["stages"].values()]
        for when in ("before", "after")
    )
    assert before + after[-1:] == pytest.approx([event.value for event in valid])
    assert before[1:] == after[:-1]
