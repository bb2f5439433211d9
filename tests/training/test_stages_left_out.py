"""What takes part in no stage: parameters that were frozen before, parts that a model lacks."""

from __future__ import annotations

import copy

import pytest
import torch

from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.modules import HierarchicalRouter
from torchrec_hilomoe.training import (
    OptimizerConfig,
    StageConfig,
    StageOptimizer,
    enter_stage,
    part_parameters,
    stages,
)
from torchrec_hilomoe.training.stages import runnable_stages

WARM_UP = StageConfig(train=["tables", "backbone"], experts=False, batches=1)
SPECIALISE = StageConfig(train=["experts", "router"], batches=1)
JOINT = StageConfig(batches=1)


def test_what_was_frozen_before_the_stages_stays_frozen(make_model, make_batch):
    model = make_model()
    fixed = model.module.model.over_arch.model[-1].requires_grad_(False)
    before = copy.deepcopy(fixed.state_dict())
    for stage in (WARM_UP, JOINT):
        enter_stage(model, stage)
        assert not any(p.requires_grad for p in fixed.parameters())
        optimizer = StageOptimizer(model, OptimizerConfig(), stage)
        optimizer.zero_grad()
        model(make_batch())[0].backward()
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in fixed.state_dict().items())
    enter_stage(model, SPECIALISE)
    enter_stage(model, JOINT)
    frozen = {name for name, p in model.module.named_parameters() if not p.requires_grad}
    assert len(frozen) == 2, "what a stage has frozen learns in the next"


def test_stages_of_parts_without_parameters_are_skipped(make_model):
    model, route = make_model(), StageConfig(["router"], batches=1)
    planned = {"warm_up": WARM_UP, "route": route}
    assert list(runnable_stages(model, planned)) == ["warm_up", "route"]
    for router in model.modules():
        if isinstance(router, HierarchicalRouter):
            del router.keys, router.query
    assert list(runnable_stages(model, planned)) == ["warm_up"]
    with pytest.raises(ConfigError, match="no parameters of what the stages train"):
        runnable_stages(model, {"route": route})


def test_a_stage_of_tables_that_are_all_on_other_ranks_is_run(make_model, monkeypatch):
    """A rank that skipped it would leave the others waiting."""
    elsewhere = {"tables": {}}
    monkeypatch.setattr(stages, "part_parameters", lambda m: {**part_parameters(m), **elsewhere})
    stage = StageConfig(["tables"], batches=1)
    assert runnable_stages(make_model(), {"tables": stage}) == {"tables": stage}


def test_experts_that_are_off_have_no_gradient_to_wait_for(make_model):
    model = make_model()
    enter_stage(model, StageConfig(experts=False, batches=1))
    waiting = {name for name, p in model.module.named_parameters() if p.requires_grad}
    assert waiting
    assert not [name for name in waiting if ".expert_" in name or ".router." in name]
