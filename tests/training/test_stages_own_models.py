"""Stages of models of one's own: TorchRec's DLRM, own train wrappers, tables, DDP and FSDP."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import (
    DataParallelWrapper,
    DefaultDataParallelWrapper,
    DistributedModelParallel,
)
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.models.dlrm import DLRM, SparseArch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.models import DLRM_HiLoMoETrain, TrainOutput, build_model, parse_model_config
from torchrec_hilomoe.modules import (
    AuxiliaryLoss,
    AuxiliaryLossConfig,
    HiLoMoEConfig,
    HiLoMoELinear,
    experts_enabled,
)
from torchrec_hilomoe.training import (
    ShardingConfig,
    StageConfig,
    TableOptimizerConfig,
    enter_stage,
    init_tables,
    make_tables,
    shard_model,
)

WARM_UP = StageConfig(train=["tables", "backbone"], experts=False, batches=1)
SPECIALISE = StageConfig(train=["experts", "router"], batches=1)
JOINT = StageConfig(batches=1)


class OwnSparseArch(nn.Module):
    """Looks tables up in a way of its own."""

    def __init__(self, tables: EmbeddingBagCollection) -> None:
        super().__init__()
        self.embedding_bag_collection = tables

    def forward(self, features):
        pooled = self.embedding_bag_collection(features)
        return torch.stack([pooled[name] for name in features.keys()], dim=1)  # noqa: SIM118


@pytest.fixture
def make_plain_dlrm(device, features):
    """TorchRec's own DLRM with a `HiLoMoELinear`, as the README has it, sharded."""

    def make(**replaced):
        model = DLRM(make_tables(features, 8), 2, [8], [6, 1])
        model.over_arch = HiLoMoELinear(8 + 6, 1, HiLoMoEConfig(num_layers=2, num_experts=4))
        for name, build in replaced.items():
            setattr(model, name, build(model))
        sharded = shard_model(
            DLRM_HiLoMoETrain(model), ShardingConfig(), TableOptimizerConfig(), device
        )
        init_tables(sharded, seed=0)
        return sharded

    return make


def test_stages_of_torchrecs_own_dlrm_move_just_their_parts(
    make_plain_dlrm, make_batch, train_batches, snapshot, changed_parts
):
    model = make_plain_dlrm()
    for seed, (stage, expected) in enumerate(
        [
            (SPECIALISE, {"experts", "router"}),
            (JOINT, {"tables", "backbone", "experts", "router"}),
            (SPECIALISE, {"experts", "router"}),
        ]
    ):
        enter_stage(model, stage)
        before = snapshot(model)
        train_batches(model, stage, [make_batch(10 * seed + i) for i in range(4)])
        assert changed_parts(before, snapshot(model)) == expected


class OwnSubclass(SparseArch):
    """Torchrec's, of which one's own forward might look up what it likes."""


@pytest.mark.parametrize("own", [OwnSparseArch, OwnSubclass])
def test_tables_that_cannot_be_frozen_are_an_error(make_plain_dlrm, own):
    model = make_plain_dlrm(sparse_arch=lambda dlrm: own(dlrm.sparse_arch.embedding_bag_collection))
    enter_stage(model, WARM_UP)
    with pytest.raises(ConfigError, match="in model.sparse_arch.embedding_bag_collection: only"):
        enter_stage(model, SPECIALISE)
    assert not experts_enabled(model), "the model is changed before the error"


class OwnTrain(nn.Module):
    """A train wrapper of one's own: ids in sequence beside the bags of a DLRM."""

    def __init__(self, model: nn.Module, tables: EmbeddingCollection) -> None:
        super().__init__()
        self.model, self.sequences = model, tables
        self.head = nn.Linear(8, 1)
        self.extra = AuxiliaryLoss(model, AuxiliaryLossConfig())

    def forward(self, batch):
        last = self.sequences(batch.sparse_features)["genres"].values().sum(0)
        logits = self.model(batch.dense_features, batch.sparse_features) + self.head(last)
        task = F.binary_cross_entropy_with_logits(logits.squeeze(1), batch.labels)
        auxiliary = self.extra().total
        return task + auxiliary, TrainOutput(task.detach(), logits, batch.labels, auxiliary)


class BesideTheBags(nn.Module):
    """A DLRM that also looks up a small table, in a collection of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        small = EmbeddingBagConfig(
            name="t_user", embedding_dim=1, num_embeddings=40, feature_names=["user"]
        )
        self.small = EmbeddingBagCollection([small])

    def forward(self, dense_features, sparse_features):
        logits = self.model(dense_features, sparse_features)
        return logits + self.small(sparse_features).values()


def test_tables_that_no_plan_has_learn_and_freeze_as_tables(
    device, features, make_batch, train_batches, snapshot, changed_parts
):
    """DDP replicates them with the dense part."""
    config = parse_model_config({"name": "hilomoe", "embedding_dim": 8, "num_experts": 4})
    bags = build_model(config, make_tables(features, 8), 2)
    apply_optimizer_in_backward(torch.optim.SGD, bags.sparse_arch.parameters(), {"lr": 0.1})
    model = DLRM_HiLoMoETrain(BesideTheBags(bags))
    planner = EmbeddingShardingPlanner(topology=Topology(1, "cpu"))
    plan = planner.plan(model, [EmbeddingBagCollectionSharder()])
    del plan.plan["model.small"]
    model = DistributedModelParallel(model, device=device, plan=plan)
    without = StageConfig(train=["backbone", "experts", "router"], batches=1)
    for stage in (WARM_UP, without, JOINT, SPECIALISE):
        enter_stage(model, stage)
        before = snapshot(model)
        train_batches(model, stage, [make_batch(i) for i in range(4)])
        after = snapshot(model)
        assert changed_parts(before, after) == set(stage.train)
        small = "tables", "model.small.embedding_bags.t_user.weight"
        assert torch.equal(before[small], after[small]) == ("tables" not in stage.train)


@pytest.fixture
def own_model(device, features):
    """`OwnTrain`, sharded with settings of DDP that are not TorchRec's."""
    tables = EmbeddingBagCollection(tables=make_tables(features, 8).embedding_bag_configs())
    dlrm = DLRM(tables, 2, [8], [6, 1])
    dlrm.over_arch = HiLoMoELinear(8 + 6, 1, HiLoMoEConfig(num_layers=2, num_experts=4))
    config = EmbeddingConfig(
        name="s_genres", embedding_dim=8, num_embeddings=12, feature_names=["genres"]
    )
    model = OwnTrain(dlrm, EmbeddingCollection(tables=[config]))
    for collection in (tables, model.sequences):
        apply_optimizer_in_backward(torch.optim.SGD, collection.parameters(), {"lr": 0.1})
    wrapper = DefaultDataParallelWrapper(
        bucket_cap_mb=7, static_graph=False, find_unused_parameters=True
    )
    return DistributedModelParallel(model, device=device, data_parallel_wrapper=wrapper)


def test_a_model_of_ones_own_enters_stages(own_model, make_batch, train_batches):
    weights = AuxiliaryLossConfig(load_balance=0.5)
    stage = StageConfig(train=["experts", "router", "backbone"], batches=1, auxiliary=weights)
    enter_stage(own_model, dataclasses.replace(stage, train=[*stage.train, "tables"]))
    assert own_model.module.extra.config == weights
    before = {name: p.detach().clone() for name, p in own_model.named_parameters()}
    assert "sequences.embeddings.s_genres.weight" in before
    train_batches(own_model, JOINT, [make_batch(i) for i in range(4)])
    still = {n for n, p in own_model.named_parameters() if torch.equal(p, before[n])}
    assert not still
    with pytest.raises(ConfigError, match="cannot be frozen in sequences: only"):
        enter_stage(own_model, stage)


def test_stages_keep_the_settings_of_ddp(own_model):
    def settings():
        ddp = own_model._dmp_wrapped_module
        return ddp.find_unused_parameters, ddp.static_graph, ddp.bucket_bytes_cap

    wrapped, expected = own_model._dmp_wrapped_module, settings()
    enter_stage(own_model, JOINT)
    assert own_model._dmp_wrapped_module is wrapped, "nothing has changed"
    enter_stage(own_model, WARM_UP)
    assert own_model._dmp_wrapped_module is not wrapped
    assert settings() == expected


class _FullyShardedWrapper(DataParallelWrapper):
    def wrap(self, dmp, env, device):
        fully_shard(dmp.module.model.inter_arch)


def test_a_stage_that_would_wrap_fsdp_anew_is_refused(make_model):
    model = make_model()
    model._data_parallel_wrapper = _FullyShardedWrapper()
    enter_stage(model, WARM_UP)  # which wraps by it
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    enter_stage(model, WARM_UP)
    with pytest.raises(ConfigError, match="under FSDP"):
        enter_stage(model, JOINT)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not experts_enabled(model)


def test_stages_are_of_a_distributed_model_parallel(make_model):
    with pytest.raises(TypeError, match="must be a DistributedModelParallel, got DLRM_HiLoMoETr"):
        enter_stage(make_model().module, WARM_UP)


def test_a_dense_part_on_meta_is_materialised_by_torchrec(device, features, make_batch):
    meta = torch.device("meta")
    config = parse_model_config({"name": "hilomoe", "embedding_dim": 8, "num_experts": 4})
    model = DLRM_HiLoMoETrain(build_model(config, make_tables(features, 8), 2, meta))
    apply_optimizer_in_backward(torch.optim.SGD, model.model.sparse_arch.parameters(), {"lr": 0.1})
    sharded = DistributedModelParallel(model, device=device)
    enter_stage(sharded, WARM_UP)
    assert sharded(make_batch())[0].isfinite()
