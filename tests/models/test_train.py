from __future__ import annotations

import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM

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


def test_state_dict_holds_the_model_once(collection):
    model = DLRM_HiLoMoE(collection, 5, [8], [1], 16, HiLoMoEConfig(num_experts=4))
    names = set(DLRM_HiLoMoETrain(model).state_dict())
    assert names == {f"model.{name}" for name in model.state_dict()}
