"""``HiLoMoEConfig.recompute``: less memory, the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchrec_hilomoe.modules import (
    AuxiliaryLoss,
    AuxiliaryLossConfig,
    HiLoMoEConfig,
    HiLoMoELinear,
    HiLoMoEMLP,
)
from torchrec_hilomoe.ops import projecting_keys_is_cheaper


def loss_and_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)  # of dropout
    auxiliary = AuxiliaryLoss(model, AuxiliaryLossConfig())
    x = x.clone().requires_grad_()
    loss = model(x).square().sum() + auxiliary().total
    return [loss, *torch.autograd.grad(loss, [x, *model.parameters()])]


@pytest.mark.parametrize("shape", [(9, 12), (9, 3, 12)])
@pytest.mark.parametrize("options", [{}, {"query_dropout": 0.4, "expert_dropout": 0.4}])
@pytest.mark.parametrize("make", [HiLoMoELinear, lambda d, o, c: HiLoMoEMLP(d, [o, o], c)])
def test_losses_and_gradients_are_the_same(make, options, shape) -> None:
    kept = make(12, 10, HiLoMoEConfig(3, 4, **options))
    recomputed = make(12, 10, HiLoMoEConfig(3, 4, recompute=True, **options))
    recomputed.load_state_dict(kept.state_dict())
    for model in (kept, recomputed):
        for name, parameter in model.named_parameters():
            if name.endswith("expert_u"):
                nn.init.constant_(parameter, 0.1)
    x = torch.randn(shape)
    expected = loss_and_gradients(kept, x)
    torch.testing.assert_close(loss_and_gradients(recomputed, x), expected, rtol=0, atol=0)


def test_the_query_is_formed_where_keys_would_be_projected() -> None:
    """Then numbers agree to rounding."""
    kept = HiLoMoELinear(40, 10, HiLoMoEConfig(3, 4, query_dim=32))
    recomputed = HiLoMoELinear(40, 10, HiLoMoEConfig(3, 4, query_dim=32, recompute=True))
    nn.init.normal_(kept.expert_u)
    recomputed.load_state_dict(kept.state_dict())
    x = torch.randn(64, 40)
    assert projecting_keys_is_cheaper(64, 40, 3, 4, 32)
    expected = loss_and_gradients(kept, x)
    torch.testing.assert_close(loss_and_gradients(recomputed, x), expected, rtol=1e-3, atol=1e-3)


def count_matmuls(model: nn.Module, x: Tensor) -> int:
    with torch.profiler.profile() as profiled:
        model(x).sum().backward()
    return sum(event.name in ("aten::mm", "aten::addmm") for event in profiled.events())


def test_evaluation_recomputes_nothing() -> None:
    recomputed, plain = (
        HiLoMoELinear(12, 10, HiLoMoEConfig(3, 4, recompute=recompute)).eval()
        for recompute in (True, False)
    )
    x = torch.randn(9, 12)
    assert count_matmuls(recomputed, x) == count_matmuls(plain, x)
    assert count_matmuls(recomputed.train(), x) > count_matmuls(plain.train(), x)
