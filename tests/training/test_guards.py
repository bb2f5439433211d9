from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import distributed as dist

from torchrec_hilomoe.errors import TrainingError
from torchrec_hilomoe.training import (
    OptimizerConfig,
    StageConfig,
    StageOptimizer,
    TableOptimizerConfig,
    enter_stage,
)
from torchrec_hilomoe.training.batch_norms import running_statistics
from torchrec_hilomoe.training.guards import GuardedPipeline, NonFiniteGuard, warn_if_not_learning
from torchrec_hilomoe.training.progress import Progress
from torchrec_hilomoe.training.stages import core_model

DENSE = TableOptimizerConfig(name="sgd", kernel="dense", learning_rate=0.1)
FUSED = TableOptimizerConfig(name="sgd", learning_rate=0.1)
ADAGRAD = TableOptimizerConfig(name="rowwise_adagrad", learning_rate=0.1)


def _weights(model) -> dict[str, torch.Tensor]:
    return {
        name: torch.cat([s.tensor for s in value.local_shards()]).clone()
        if hasattr(value, "local_shards")
        else value.clone()
        for name, value in model.state_dict().items()
    }


def _fused_state(model) -> dict[str, torch.Tensor]:
    state = model.fused_optimizer.state_dict()["state"]
    return {
        f"{table}/{name}": shard.tensor
        for table, values in state.items()
        for name, value in values.items()
        if hasattr(value, "local_shards")
        for shard in value.local_shards()
    }


def _train(model, batches, policy, folder, tables=FUSED, nan_of=None):
    stage = StageConfig(batches=1)
    enter_stage(model, stage)
    optimizer = StageOptimizer(model, OptimizerConfig(tables=tables), stage)
    progress = Progress()
    pipeline = GuardedPipeline(model, optimizer, NonFiniteGuard(policy, folder, progress))
    core = core_model(model)
    if nan_of == "dense part":
        core.over_arch.register_full_backward_hook(_nan_gradient)
    elif nan_of == "tables":
        core.sparse_arch.register_forward_hook(_nan_gradient_of_tables)
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
    expected, _ = _train(make_model(tables), good, "skip", tmp_path, tables)
    good.insert(bad, _with_nan(make_batch(9)))
    weights, progress = _train(make_model(tables), good, "skip", tmp_path, tables)
    assert progress.skipped == 1
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_the_offending_batch_is_saved(make_model, make_batch, tmp_path):
    batch = _with_nan(make_batch(9))
    with pytest.raises(TrainingError, match="on_non_finite=skip"):
        _train(make_model(FUSED), [make_batch(), batch], "raise", tmp_path)
    saved = torch.load(tmp_path / "batch-00000001-rank0.pt", weights_only=True)
    assert torch.equal(saved["dense_features"].isnan(), batch.dense_features.isnan())
    assert torch.equal(saved["labels"], batch.labels)
    assert torch.equal(saved["values"], batch.sparse_features.values())
    assert saved["keys"] == ["user", "item", "genres"]


def test_a_batch_that_another_rank_cannot_learn_from_is_skipped(
    make_batch, device, tmp_path, monkeypatch
):
    """Where tables learn alone, no gradient of a dense part tells this rank of it."""

    def all_reduce(finite, op):
        assert op == dist.ReduceOp.MIN
        finite.zero_()

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    guard = NonFiniteGuard("skip", tmp_path, Progress())
    assert not guard.accepts(torch.tensor(0.5), torch.tensor(0.1), make_batch())


def test_skipped_batches_fill_no_disk_and_need_none(make_batch, device, tmp_path, caplog):
    (tmp_path / "file").touch()
    for folder, saved in (("folder", 10), ("file/folder", 0)):
        progress = Progress()
        guard = NonFiniteGuard("skip", tmp_path / folder, progress)
        for progress.step in range(12):
            assert not guard.accepts(torch.tensor(math.nan), torch.tensor(0.1), make_batch())
        assert progress.skipped == 12
        assert len(list((tmp_path / folder).glob("*.pt"))) == saved
    assert "cannot write" in caplog.text


def _nan_gradient(module, grad_input, grad_output):
    return tuple(None if g is None else g * float("nan") for g in grad_input)


def _nan_gradient_of_tables(module, inputs, pooled):
    """Only the tables' gradient; the dense part's stay as they are."""
    if isinstance(pooled, torch.Tensor) and pooled.requires_grad:
        pooled = pooled * 1.0
        pooled.register_hook(lambda gradient: gradient * float("nan"))
    return pooled


@pytest.mark.parametrize("tables", [FUSED, ADAGRAD, DENSE], ids=["sgd", "adagrad", "dense"])
@pytest.mark.parametrize("of", ["dense part", "tables"])
def test_gradients_that_are_not_finite_are_skipped(make_model, make_batch, tmp_path, tables, of):
    model = make_model(tables)
    expected = _weights(model)
    state = {k: v.clone() for k, v in _fused_state(model).items()}
    assert bool(state) == (tables is ADAGRAD)
    weights, progress = _train(model, [make_batch()], "skip", tmp_path, tables, nan_of=of)
    assert progress.skipped == 1
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert all(torch.equal(_fused_state(model)[name], value) for name, value in state.items())


@pytest.mark.parametrize("of", ["dense part", "tables"])
def test_gradients_that_are_not_finite_end_the_training(make_model, make_batch, tmp_path, of):
    with pytest.raises(TrainingError, match="=skip"):
        _train(make_model(FUSED), [make_batch()], "raise", tmp_path, FUSED, nan_of=of)


@pytest.mark.parametrize("tables", [FUSED, ADAGRAD, DENSE], ids=["sgd", "adagrad", "dense"])
def test_skip_changes_nothing_where_all_is_finite(make_model, make_batch, tmp_path, tables):
    """The backward pass in two parts gives the same bits as TorchRec's."""
    batches = [make_batch(seed) for seed in range(4)]
    raising, skipping = (
        _train(make_model(tables), batches, policy, tmp_path, tables)[0]
        for policy in ("raise", "skip")
    )
    assert all(torch.equal(skipping[name], value) for name, value in raising.items())


def test_training_goes_on_in_another_pipeline(make_model, make_batch, tmp_path):
    """As after each evaluation: what the first one had hooked is gone."""
    trained = []
    for policy in ("raise", "skip"):
        model = make_model(FUSED)
        for seed in range(3):
            weights, _ = _train(model, [make_batch(seed)], policy, tmp_path)
        trained.append(weights)
    assert all(torch.equal(trained[1][name], value) for name, value in trained[0].items())


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_an_ensemble_learns_in_a_pipeline_as_by_hand(make_model, make_batch, tmp_path, policy):
    batches = [make_batch(seed) for seed in range(4)]
    model, stage = make_model(FUSED, ensemble_size=2), StageConfig(batches=1)
    before = _weights(model)
    enter_stage(model, stage)
    optimizer = StageOptimizer(model, OptimizerConfig(tables=FUSED), stage)
    for batch in batches:
        optimizer.zero_grad()
        model(batch)[0].backward()
        optimizer.step()
    expected = _weights(model)
    assert not any(torch.equal(before[n], expected[n]) for n in expected if "over_arch" in n)
    weights, _ = _train(make_model(FUSED, ensemble_size=2), batches, policy, tmp_path)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_a_skipped_batch_leaves_batch_norms_as_they_were(make_model, make_batch, tmp_path):
    batches = [make_batch(0), _with_nan(make_batch(9)), make_batch(1)]
    model = make_model(FUSED, batch_norm=True)
    _train(model, batches, "skip", tmp_path)
    expected = make_model(FUSED, batch_norm=True)
    _train(expected, [batches[0], batches[2]], "skip", tmp_path)
    for name, value in running_statistics(expected).items():
        assert torch.equal(running_statistics(model)[name], value), name


def test_a_model_that_does_not_learn_is_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        for auc in (None, 0.51, 0.9, 0.1):
            warn_if_not_learning(auc, 100)
        assert not caplog.records
        warn_if_not_learning(0.5, 100)
        warn_if_not_learning(0.5004, 100)
    assert ["all predictions are equal" in r.message for r in caplog.records] == [True, False]
    assert "no better than random" in caplog.records[1].message
