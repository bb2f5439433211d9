"""Frozen means bit for bit: weights, optimizer state, statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from torchrec_hilomoe.modules import AuxiliaryLossConfig
from torchrec_hilomoe.training import (
    OptimizerConfig,
    PartOptimizerConfig,
    StageConfig,
    StageOptimizer,
    TableOptimizerConfig,
    enter_stage,
)

WARM_UP = StageConfig(train=["tables", "backbone"], experts=False, batches=1)
SPECIALISE = StageConfig(train=["experts", "router"], batches=1)
JOINT = StageConfig(batches=1)
DENSE_ADAM = TableOptimizerConfig(name="adam", kernel="dense", learning_rate=0.01)


def _train(model, stage, batches, tables=None):
    optimizer = StageOptimizer(
        model,
        OptimizerConfig(tables=tables or TableOptimizerConfig()),
        stage,
        dense_tables=tables is DENSE_ADAM,
        gradient_clip_norm=None,
    )
    pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"))
    iterator, outputs = iter(batches), []
    while True:
        try:
            outputs.append(pipeline.progress(iterator))
        except StopIteration:
            pipeline.detach()
            return outputs


def _snapshot(model):
    """Every tensor of the model and of the fused optimizer, by part."""
    state = {}
    for name, value in model.state_dict().items():
        part = "backbone"
        if ".embedding_bags." in name:
            part = "tables"
        elif "expert_" in name:
            part = "experts"
        elif ".router." in name:
            part = "router"
        state[part, name] = _local(value)
    for name, values in model.fused_optimizer.state_dict()["state"].items():
        for key, value in values.items():
            state["tables", f"{name}/{key}"] = _local(value)
    return state


def _local(value):
    if hasattr(value, "local_shards"):
        return torch.cat([shard.tensor.flatten() for shard in value.local_shards()]).clone()
    return copy.deepcopy(value)


def _changed_parts(before, after):
    return {
        part for (part, name), value in before.items() if not torch.equal(value, after[part, name])
    }


@pytest.mark.parametrize("tables", [TableOptimizerConfig(), DENSE_ADAM], ids=["fused", "dense"])
@pytest.mark.parametrize("name", ["hilomoe", "hilomoe_cross", "hilomoe_mlp"])
def test_each_stage_moves_just_its_parts(make_model, make_batch, name, tables):
    model = make_model(tables, name=name, batch_norm=True)
    for seed, (stage, expected) in enumerate(
        [
            (WARM_UP, {"tables", "backbone"}),
            (SPECIALISE, {"experts", "router"}),
            (JOINT, {"tables", "backbone", "experts", "router"}),
            (SPECIALISE, {"experts", "router"}),
        ]
    ):
        enter_stage(model, stage)
        before = _snapshot(model)
        _train(model, stage, [make_batch(10 * seed + i) for i in range(4)], tables)
        assert _changed_parts(before, _snapshot(model)) == expected


def test_first_step_of_specialise_moves_only_u_by_the_task_loss(make_model, make_batch):
    silent = AuxiliaryLossConfig(load_balance=0.0, z_loss=0.0, diversity=0.0)
    stage = StageConfig(train=["experts", "router"], batches=1, auxiliary=silent)
    model = make_model()
    enter_stage(model, stage)
    before = _snapshot(model)
    _train(model, stage, [make_batch()])
    after = _snapshot(model)
    moved = {
        name for (part, name), value in before.items() if not torch.equal(value, after[part, name])
    }
    assert moved == {"model.inter_arch.routed_stream.0.expert_u"}


def test_silent_experts_are_bit_equal_to_none(make_model, make_batch):
    logits = []
    for stage in (WARM_UP, JOINT):  # U = 0 before the first step of joint
        model = make_model()
        enter_stage(model, stage)
        logits.append(_train(model, stage, [make_batch()])[0].logits)
    assert torch.equal(*logits)


def test_warm_up_has_no_auxiliary_loss(make_model, make_batch):
    model = make_model()
    enter_stage(model, WARM_UP)
    assert [o.auxiliary.item() for o in _train(model, WARM_UP, [make_batch()])] == [0.0]
    enter_stage(model, JOINT)
    assert all(o.auxiliary > 0 for o in _train(model, JOINT, [make_batch()]))


def test_learning_rate_scale_of_a_part(make_model, make_batch):
    rates = {"tables": 0.5, "backbone": 0.1}
    stage = StageConfig(batches=1, learning_rate_scale=rates)
    model = make_model()
    enter_stage(model, stage)
    optimizer = StageOptimizer(
        model,
        OptimizerConfig(experts=PartOptimizerConfig(learning_rate=0.7)),
        stage,
        dense_tables=False,
        gradient_clip_norm=None,
    )
    optimizer.factor = 0.5
    optimizer.zero_grad()
    assert optimizer.learning_rates == pytest.approx(
        {"tables": 0.5 * 0.05 * 0.5, "backbone": 1e-3 * 0.1 * 0.5, "experts": 0.35, "router": 5e-4}
    )
