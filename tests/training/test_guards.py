from __future__ import annotations

import logging

import pytest
import torch

from torchrec_hilomoe.errors import TrainingError
from torchrec_hilomoe.training import (
    OptimizerConfig,
    StageConfig,
    StageOptimizer,
    TableOptimizerConfig,
    enter_stage,
)
from torchrec_hilomoe.training.guards import GuardedPipeline, NonFiniteGuard, warn_if_not_learning
from torchrec_hilomoe.training.progress import Progress

DENSE = TableOptimizerConfig(name="sgd", kernel="dense", learning_rate=0.1)
FUSED = TableOptimizerConfig(name="sgd", learning_rate=0.1)


def _weights(model) -> dict[str, torch.Tensor]:
    return {
        name: torch.cat([s.tensor for s in value.local_shards()]).clone()
        if hasattr(value, "local_shards")
        else value.clone()
        for name, value in model.state_dict().items()
    }


def _train(make_model, batches, policy, folder, tables=FUSED, hook=None):
    model = make_model(tables)
    stage = StageConfig(batches=1)
    enter_stage(model, stage)
    optimizer = StageOptimizer(
        model, OptimizerConfig(tables=tables), stage, tables is DENSE, gradient_clip_norm=None
    )
    if hook is not None:
        model.module.model.over_arch.register_full_backward_hook(hook)
    progress = Progress()
    pipeline = GuardedPipeline(model, optimizer, NonFiniteGuard(policy, folder, progress))
    iterator = iter(batches)
    while True:
        try:
            pipeline.progress(iterator)
        except StopIteration:
            pipeline.detach()
            return _weights(model), progress
        progress.step += 1


def _with_nan(batch):
    batch.dense_features[3, 0] = float("nan")
    return batch


@pytest.mark.parametrize("bad", [0, 2, 4])
@pytest.mark.parametrize("tables", [FUSED, DENSE], ids=["fused", "dense"])
def test_skip_trains_as_if_the_batch_had_not_been(make_model, make_batch, tmp_path, tables, bad):
    good = [make_batch(seed) for seed in range(4)]
    expected, _ = _train(make_model, good, "skip", tmp_path, tables)
    good.insert(bad, _with_nan(make_batch(9)))
    weights, progress = _train(make_model, good, "skip", tmp_path, tables)
    assert progress.skipped == 1
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_the_offending_batch_is_saved(make_model, make_batch, tmp_path):
    batch = _with_nan(make_batch(9))
    with pytest.raises(TrainingError, match="on_non_finite=skip"):
        _train(make_model, [make_batch(), batch], "raise", tmp_path)
    saved = torch.load(tmp_path / "batch-00000001-rank0.pt", weights_only=True)
    assert torch.equal(saved["dense_features"].isnan(), batch.dense_features.isnan())
    assert torch.equal(saved["labels"], batch.labels)
    assert torch.equal(saved["values"], batch.sparse_features.values())
    assert saved["keys"] == ["user", "item", "genres"]


def _nan_gradient(module, grad_input, grad_output):
    return tuple(None if g is None else g * float("nan") for g in grad_input)


def test_gradients_that_are_not_finite_are_skipped(make_model, make_batch, tmp_path):
    expected = _weights(make_model(DENSE))
    weights, progress = _train(
        make_model, [make_batch()], "skip", tmp_path, DENSE, hook=_nan_gradient
    )
    assert progress.skipped == 1
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_gradients_that_fused_tables_have_taken_end_the_training(
    make_model, make_batch, tmp_path, policy
):
    with pytest.raises(TrainingError, match="last checkpoint" if policy == "skip" else "=skip"):
        _train(make_model, [make_batch()], policy, tmp_path, FUSED, hook=_nan_gradient)


def test_a_model_that_does_not_learn_is_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        for auc in (None, 0.51, 0.9, 0.1):
            warn_if_not_learning(auc, 100)
        assert not caplog.records
        warn_if_not_learning(0.5, 100)
        warn_if_not_learning(0.5004, 100)
    assert ["all predictions are equal" in r.message for r in caplog.records] == [True, False]
    assert "no better than random" in caplog.records[1].message
