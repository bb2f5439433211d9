from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_hilomoe.models import DLRM_HiLoMoE, DLRM_HiLoMoETrain
from torchrec_hilomoe.modules import AuxiliaryLossConfig, HiLoMoEConfig

LABELS = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])


def test_loss_is_task_plus_auxiliary(collection, make_features):
    model = DLRM_HiLoMoE(collection, 5, [8], [1], 16, HiLoMoEConfig(num_experts=4))
    batch = Batch(torch.rand(6, 5), make_features(), LABELS)
    loss, output = DLRM_HiLoMoETrain(model, AuxiliaryLossConfig(load_balance=0.5))(batch)
    logits = model(batch.dense_features, batch.sparse_features).squeeze(-1)
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.loss, binary_cross_entropy_with_logits(logits, LABELS))
    assert output.auxiliary >= 0.5 * 3  # load balance is at least 1 in each layer
    torch.testing.assert_close(loss, output.loss + output.auxiliary)


def test_auxiliary_loss_reaches_the_router(collection, make_features):
    model = DLRM_HiLoMoE(collection, 5, [8], [1], 16, HiLoMoEConfig(num_experts=4))
    batch = Batch(torch.rand(6, 5), make_features(), LABELS)
    DLRM_HiLoMoETrain(model)(batch)[0].backward()
    router = model.inter_arch.linear.router
    assert router.keys.grad.abs().sum() > 0


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
    model = DLRM_HiLoMoE(tables, 5, [8], [1], 16, HiLoMoEConfig(num_experts=4), meta)
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


def test_state_dict_holds_the_model_once(collection):
    model = DLRM_HiLoMoE(collection, 5, [8], [1], 16, HiLoMoEConfig(num_experts=4))
    names = set(DLRM_HiLoMoETrain(model).state_dict())
    assert names == {f"model.{name}" for name in model.state_dict()}
