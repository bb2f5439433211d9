"""Frozen means bit for bit: weights, optimizer state, statistics."""

from __future__ import annotations

import pytest
import torch

from torchrec_hilomoe.modules import AuxiliaryLossConfig
from torchrec_hilomoe.training import (
    OptimizerConfig,
    PartOptimizerConfig,
    StageConfig,
    StageOptimizer,
    TableOptimizerConfig,
    enter_stage,
    part_parameters,
)

WARM_UP = StageConfig(train=["tables", "backbone"], experts=False, batches=1)
SPECIALISE = StageConfig(train=["experts", "router"], batches=1)
JOINT = StageConfig(batches=1)
DENSE_ADAM = TableOptimizerConfig(name="adam", kernel="dense", learning_rate=0.01)


@pytest.mark.parametrize("tables", [TableOptimizerConfig(), DENSE_ADAM], ids=["fused", "dense"])
@pytest.mark.parametrize("name", ["hilomoe", "hilomoe_cross", "hilomoe_mlp"])
def test_each_stage_moves_just_its_parts(
    make_model, make_batch, name, tables, train_batches, snapshot, changed_parts
):
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
        before = snapshot(model)
        train_batches(model, stage, [make_batch(10 * seed + i) for i in range(4)], tables)
        assert changed_parts(before, snapshot(model)) == expected


@pytest.mark.parametrize("tables", [TableOptimizerConfig(), DENSE_ADAM], ids=["fused", "dense"])
def test_what_is_frozen_keeps_no_gradient_of_the_stage_before(
    make_model, make_batch, tables, train_batches
):
    """It would count where all gradients are clipped, and take as much memory as the weights."""
    model = make_model(tables)
    enter_stage(model, JOINT)
    train_batches(model, JOINT, [make_batch()], tables)
    enter_stage(model, SPECIALISE)
    parts = part_parameters(model)
    frozen = [*parts["tables"].values(), *parts["backbone"].values()]
    assert frozen
    assert all(parameter.grad is None for parameter in frozen)


def test_tables_may_learn_alone(make_model, make_batch, train_batches, snapshot, changed_parts):
    """DDP would refuse a dense part in which nothing learns."""
    stage = StageConfig(train=["tables"], batches=1)
    model = make_model()
    enter_stage(model, stage)
    before = snapshot(model)
    train_batches(model, stage, [make_batch(i) for i in range(2)])
    assert changed_parts(before, snapshot(model)) == {"tables"}


def test_first_step_of_specialise_moves_only_u_by_the_task_loss(
    make_model, make_batch, train_batches, snapshot
):
    silent = AuxiliaryLossConfig(load_balance=0.0, z_loss=0.0, diversity=0.0)
    stage = StageConfig(train=["experts", "router"], batches=1, auxiliary=silent)
    model = make_model()
    enter_stage(model, stage)
    before = snapshot(model)
    train_batches(model, stage, [make_batch()])
    after = snapshot(model)
    moved = {
        name for (part, name), value in before.items() if not torch.equal(value, after[part, name])
    }
    assert moved == {"model.inter_arch.routed_stream.0.expert_u"}


def test_silent_experts_are_bit_equal_to_none(make_model, make_batch, train_batches):
    logits = []
    for stage in (WARM_UP, JOINT):  # U = 0 before the first step of joint
        model = make_model()
        enter_stage(model, stage)
        logits.append(train_batches(model, stage, [make_batch()])[0].logits)
    assert torch.equal(*logits)


def test_warm_up_has_no_auxiliary_loss(make_model, make_batch, train_batches):
    model = make_model()
    enter_stage(model, WARM_UP)
    assert [o.auxiliary.item() for o in train_batches(model, WARM_UP, [make_batch()])] == [0.0]
    enter_stage(model, JOINT)
    assert all(o.auxiliary > 0 for o in train_batches(model, JOINT, [make_batch()]))


def test_learning_rate_scale_of_a_part(make_model, make_batch):
    rates = {"tables": 0.5, "backbone": 0.1}
    stage = StageConfig(batches=1, learning_rate_scale=rates)
    model = make_model()
    enter_stage(model, stage)
    optimizer = StageOptimizer(
        model,
        OptimizerConfig(experts=PartOptimizerConfig(learning_rate=0.7)),
        stage,
    )
    optimizer.factor = 0.5
    optimizer.zero_grad()
    assert optimizer.learning_rates == pytest.approx(
        {"tables": 0.5 * 0.05 * 0.5, "backbone": 1e-3 * 0.1 * 0.5, "experts": 0.35, "router": 5e-4}
    )
