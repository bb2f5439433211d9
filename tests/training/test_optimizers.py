"""StageOptimizer against torch.optim written out by hand on the unsharded model."""

from __future__ import annotations

import pytest
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel, get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.models import DLRM_HiLoMoETrain, build_model, parse_model_config
from torchrec_hilomoe.training import (
    OptimizerConfig,
    PartOptimizerConfig,
    StageConfig,
    StageOptimizer,
    TableOptimizerConfig,
    enter_stage,
    init_tables,
    make_tables,
    part_parameters,
)

OPTIONS = {
    "name": "dlrm_cat",
    "embedding_dim": 8,
    "dense_arch_layer_sizes": [8],
    "over_arch_layer_sizes": [6],
}
STAGE = StageConfig(batches=1)


def _plain_model(features):
    meta = make_tables(features, 8)
    tables = EmbeddingBagCollection(tables=meta.embedding_bag_configs(), device=torch.device("cpu"))
    torch.manual_seed(0)
    model = DLRM_HiLoMoETrain(build_model(parse_model_config(OPTIONS), tables, 2))
    init_tables(model, 0, unknown_row=True)
    return model


def _losses(model, optimizer, batches):
    enter_stage(model, STAGE)
    pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"))
    iterator = iter(batches)
    return [pipeline.progress(iterator).loss.item() for _ in batches]


def test_rates_hold_from_the_first_step(make_model):
    model = make_model(TableOptimizerConfig(name="sgd", learning_rate=0.5))
    scale = {"tables": 0.1, "backbone": 0.01}
    stage = StageConfig(batches=1, learning_rate_scale=scale)
    config = OptimizerConfig(tables=TableOptimizerConfig(name="sgd", learning_rate=0.5))
    optimizer = StageOptimizer(model, config, stage)
    assert optimizer.learning_rates["tables"] == pytest.approx(0.05)
    assert optimizer.learning_rates["backbone"] == pytest.approx(
        config.backbone.learning_rate / 100
    )
    optimizer.factor = 0.5
    optimizer.step()
    assert optimizer.learning_rates["tables"] == pytest.approx(0.025)


def test_fused_tables_have_the_rate_of_the_stage_in_the_first_backward_pass(make_model, make_batch):
    """In loops too that clear the gradients last: no call of the optimizer comes before it."""
    tables = TableOptimizerConfig(name="sgd", learning_rate=0.5)
    stage = StageConfig(batches=1, learning_rate_scale={"tables": 0.0})
    model = make_model(tables)
    enter_stage(model, stage)
    StageOptimizer(model, OptimizerConfig(tables=tables), stage)
    own = part_parameters(model)["tables"]
    before = {name: table.detach().clone() for name, table in own.items()}
    model(make_batch())[0].backward()
    assert all(torch.equal(table, before[name]) for name, table in own.items())


@pytest.mark.parametrize("sharding", ["auto", "table_wise", "data_parallel"])
def test_dense_adam_with_l2_and_clipping(make_model, make_batch, features, sharding):
    tables = TableOptimizerConfig(name="adam", kernel="dense", learning_rate=1e-2, l2=0.1)
    config = OptimizerConfig(tables=tables, backbone=PartOptimizerConfig(learning_rate=1e-2))
    model = make_model(tables, sharding, **OPTIONS)
    enter_stage(model, STAGE)
    optimizer = StageOptimizer(model, config, STAGE, gradient_clip_norm=0.05)
    batches = [make_batch(i) for i in range(8)]
    losses = _losses(model, optimizer, batches)

    plain = _plain_model(features)
    reference = torch.optim.Adam(plain.parameters(), lr=1e-2)
    expected = []
    for batch in batches:
        reference.zero_grad()
        loss, output = plain(batch)
        norm = sum(p.square().sum() for n, p in plain.named_parameters() if "embedding_bags" in n)
        (loss + 0.1 / 2 * norm).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        reference.step()
        expected.append(output.loss.item())
    assert losses == pytest.approx(expected, abs=1e-6)
    assert losses[0] != pytest.approx(losses[-1], abs=1e-4)


def test_every_part_has_an_l2_of_its_own(make_model, make_batch):
    """One step of SGD with it and one without differ by the rate times l2 times the weights."""
    l2 = {"tables": 0.5, "backbone": 0.1, "experts": 0.2, "router": 0.3}
    before, after = {}, []
    for scale in (0, 1):
        parts = {
            part: PartOptimizerConfig("sgd", learning_rate=0.1, l2=scale * weight)
            for part, weight in l2.items()
            if part != "tables"
        }
        tables = TableOptimizerConfig("sgd", "dense", learning_rate=0.1, l2=scale * l2["tables"])
        model = make_model(tables)
        enter_stage(model, STAGE)
        before = {
            (part, name): parameter.detach().clone()
            for part, parameters in part_parameters(model).items()
            for name, parameter in parameters.items()
        }
        config = OptimizerConfig(tables=tables, **parts)
        _losses(model, StageOptimizer(model, config, STAGE), [make_batch(0)])
        after.append(dict(model.named_parameters()))
    assert {part for part, _ in before} == set(l2)
    for (part, name), value in before.items():
        decayed = after[0][name] - after[1][name]
        torch.testing.assert_close(decayed, 0.1 * l2[part] * value, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "sharding",
    [
        "auto",
        "table_wise",
        "row_wise",
        "column_wise",
        "table_row_wise",
        "table_column_wise",
    ],
)
def test_fused_sgd_and_a_changing_rate(make_model, make_batch, features, sharding):
    tables = TableOptimizerConfig(name="sgd", learning_rate=0.5)
    config = OptimizerConfig(
        tables=tables, backbone=PartOptimizerConfig(name="sgd", learning_rate=0.5)
    )
    model = make_model(tables, sharding, **OPTIONS)
    enter_stage(model, STAGE)
    optimizer = StageOptimizer(model, config, STAGE)
    pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"))
    plain = _plain_model(features)
    batches = [make_batch(i) for i in range(8)]
    iterator = iter(batches)
    for step, batch in enumerate(batches):
        optimizer.factor = 1 / (1 + step)
        sharded = pipeline.progress(iterator).loss.item()
        plain.zero_grad()
        loss, _ = plain(batch)
        loss.backward()
        assert sharded == pytest.approx(loss.item(), abs=1e-6)
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.sub_(parameter.grad, alpha=0.5 / (1 + step))


@pytest.mark.parametrize("kernel", ["fused", "dense"])
def test_eps_is_that_of_tables_and_parts(make_model, make_batch, features, kernel):
    options = {"name": "adagrad", "learning_rate": 0.1, "eps": 0.01}
    tables = TableOptimizerConfig(kernel=kernel, **options)
    model = make_model(tables, **OPTIONS)
    config = OptimizerConfig(tables=tables, backbone=PartOptimizerConfig(**options))
    batches = [make_batch(i) for i in range(4)]
    losses = _losses(model, StageOptimizer(model, config, STAGE), batches)

    plain = _plain_model(features)
    reference = torch.optim.Adagrad(plain.parameters(), lr=0.1, eps=0.01)
    for batch, sharded in zip(batches, losses, strict=True):
        reference.zero_grad()
        loss, _ = plain(batch)
        assert sharded == pytest.approx(loss.item(), abs=1e-6)
        loss.backward()
        reference.step()


def test_row_wise_adagrad_learns_under_data_parallel(make_model, make_batch):
    model = make_model(TableOptimizerConfig(), "data_parallel", **OPTIONS)
    enter_stage(model, STAGE)
    optimizer = StageOptimizer(model, OptimizerConfig(), STAGE)
    before = {n: v.clone() for n, v in model.state_dict().items() if "embedding_bags" in n}
    _losses(model, optimizer, [make_batch(0)])
    after = model.state_dict()
    assert all(not torch.equal(value, after[name]) for name, value in before.items())


def test_tables_of_one_plan_learn_by_the_kernels_that_they_have(device, make_batch, features):
    """Data parallel tables have dense kernels, whatever optimizer was to be fused into them."""
    model = _plain_model(features)
    apply_optimizer_in_backward(RowWiseAdagrad, model.model.sparse_arch.parameters(), {"lr": 0.05})
    constraints = {
        "t_user": ParameterConstraints(sharding_types=["data_parallel"]),
        "t_item": ParameterConstraints(sharding_types=["table_wise"]),
        "t_genres": ParameterConstraints(sharding_types=["table_wise"]),
    }
    planner = EmbeddingShardingPlanner(topology=Topology(1, "cpu"), constraints=constraints)
    plan = planner.plan(model, get_default_sharders())
    kernels = {t: s.compute_kernel for m in plan.plan.values() for t, s in m.items()}
    assert kernels == {"t_user": "dense", "t_item": "fused", "t_genres": "fused"}
    sharded = DistributedModelParallel(model, device=device, plan=plan)
    enter_stage(sharded, STAGE)
    optimizer = StageOptimizer(sharded, OptimizerConfig(), STAGE)
    before = {n: p.detach().clone() for n, p in sharded.named_parameters()}
    _losses(sharded, optimizer, [make_batch(0)])
    still = {n for n, p in sharded.named_parameters() if torch.equal(p, before[n])}
    assert not {name for name in still if "embedding_bags" in name}
    assert optimizer.learning_rates["tables"] == 0.05
    decaying = OptimizerConfig(
        tables=TableOptimizerConfig(name="adam", kernel="dense", learning_rate=1e-2, l2=0.1)
    )
    with pytest.raises(ConfigError, match="optimizer.tables.l2: 0.1 needs tables with the kernel"):
        StageOptimizer(sharded, decaying, STAGE)
