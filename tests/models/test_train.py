from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_hilomoe.models import DLRM_HiLoMoE, DLRM_HiLoMoETrain, InteractionContext
from torchrec_hilomoe.models.registry import get_interaction
from torchrec_hilomoe.modules import AuxiliaryLossConfig, HiLoMoEConfig, TwoStreamConfig

STREAMS = TwoStreamConfig(expert_width=16, plain_width=8, num_heads=2)
LABELS = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])


def test_dense_features_are_none_or_some(collection):
    with pytest.raises(ValueError, match="dense_in_features must be at least 0, got -3"):
        DLRM_HiLoMoE(collection, -3, [8], [1], STREAMS, HiLoMoEConfig())


def test_the_over_arch_ends_in_one_logit(collection):
    with pytest.raises(ValueError, match=r"over_arch_layer_sizes must end in 1, got \[4\]"):
        DLRM_HiLoMoE(collection, 5, [8], [4], STREAMS, HiLoMoEConfig())


def test_loss_is_task_plus_auxiliary(collection, make_features):
    model = DLRM_HiLoMoE(collection, 5, [8], [1], STREAMS, HiLoMoEConfig(num_experts=4))
    batch = Batch(torch.rand(6, 5), make_features(), LABELS)
    loss, output = DLRM_HiLoMoETrain(model, AuxiliaryLossConfig(load_balance=0.5))(batch)
    logits = model(batch.dense_features, batch.sparse_features).squeeze(-1)
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.loss, binary_cross_entropy_with_logits(logits, LABELS))
    assert output.auxiliary >= 0.5 * 3  # load balance is at least 1 in each layer
    torch.testing.assert_close(loss, output.loss + output.auxiliary)


def test_auxiliary_loss_reaches_the_router(collection, make_features):
    model = DLRM_HiLoMoE(collection, 5, [8], [1], STREAMS, HiLoMoEConfig(num_experts=4))
    batch = Batch(torch.rand(6, 5), make_features(), LABELS)
    DLRM_HiLoMoETrain(model)(batch)[0].backward()
    router = model.inter_arch.routed_stream[0].router
    assert router.keys.grad.abs().sum() > 0


def test_auxiliary_losses_are_over_the_process_group_that_is_given(collection):
    model = DLRM_HiLoMoE(collection, 5, [8], [1], STREAMS, HiLoMoEConfig())
    group = object()
    assert DLRM_HiLoMoETrain(model, process_group=group).auxiliary_loss.process_group is group


def test_wraps_torchrecs_own_model(collection, make_features):
    model = DLRM(collection, 5, [8], [4, 1])
    batch = Batch(torch.rand(6, 5), make_features(), LABELS)
    loss, output = DLRM_HiLoMoETrain(model)(batch)
    assert output.auxiliary == 0
    assert torch.equal(loss, output.loss)


@pytest.mark.parametrize("weights", [AuxiliaryLossConfig(0.0, 0.0), AuxiliaryLossConfig()])
def test_losses_are_on_the_models_device(weights):
    meta = torch.device("meta")
    table = EmbeddingBagConfig(
        name="t", embedding_dim=8, num_embeddings=9, feature_names=["a", "b"]
    )
    tables = EmbeddingBagCollection(tables=[table], device=meta)
    model = DLRM_HiLoMoE(tables, 5, [8], [1], STREAMS, HiLoMoEConfig(num_experts=4), meta)
    features = KeyedJaggedTensor.from_lengths_sync(
        keys=["a", "b"], values=torch.ones(12).long(), lengths=torch.ones(12).int()
    )
    batch = Batch(torch.rand(6, 5), features, LABELS).to(meta)
    model.sparse_arch = FakeTables()  # the lookup does not run on meta
    loss, output = DLRM_HiLoMoETrain(model, weights)(batch)
    assert {loss.device, output.loss.device, output.auxiliary.device} == {meta}


class FakeTables(nn.Module):
    def forward(self, features):
        return torch.empty(6, 2, 8, device="meta")


def test_dlrm_hilomoe_is_the_registered_model(collection):
    config = HiLoMoEConfig(num_experts=4)
    model = DLRM_HiLoMoE(collection, 5, [8], [1], STREAMS, config)
    num_sparse = sum(len(t.feature_names) for t in collection.embedding_bag_configs())
    entry = get_interaction("hilomoe")
    registered = entry.build(
        InteractionContext(num_sparse, embedding_dim=8),
        entry.config(**{**asdict(STREAMS), **asdict(config)}),
    ).module
    registered.load_state_dict(model.inter_arch.state_dict())
    features = {"dense_features": torch.rand(6, 8), "sparse_features": torch.rand(6, num_sparse, 8)}
    assert torch.equal(registered(**features), model.inter_arch(**features))


def test_state_dict_holds_the_model_once(collection):
    model = DLRM_HiLoMoE(collection, 5, [8], [1], STREAMS, HiLoMoEConfig(num_experts=4))
    names = set(DLRM_HiLoMoETrain(model).state_dict())
    assert names == {f"model.{name}" for name in model.state_dict()}
