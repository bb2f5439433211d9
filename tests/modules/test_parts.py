from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from torchrec_hilomoe.modules import (
    AuxiliaryLoss,
    AuxiliaryLossConfig,
    HiLoMoEConfig,
    HiLoMoELinear,
    HiLoMoEMLP,
    parameter_part,
    set_experts_enabled,
)


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_has_its_part(tied) -> None:
    config = HiLoMoEConfig(3, 4, tied_keys=tied)
    model = nn.Sequential(
        nn.Linear(5, 12), HiLoMoELinear(12, 12, config), HiLoMoEMLP(12, [4], config)
    )
    parts = parameter_part(model)
    assert list(parts) == [name for name, _ in model.named_parameters()]
    for name, part in parts.items():
        leaf = name.rsplit(".", 1)[-1]
        expected = "experts" if leaf in ("expert_u", "expert_v") else "backbone"
        assert part == ("router" if ".router." in name else expected), name
    assert ("router" in parts.values()) != tied


def test_parametrized_and_pruned_experts_stay_experts() -> None:
    linear = HiLoMoELinear(4, 2, HiLoMoEConfig(num_layers=2, num_experts=3))
    nn.utils.parametrizations.weight_norm(linear, "expert_v")
    prune.random_unstructured(linear, "expert_u", 0.5)
    nn.utils.parametrizations.weight_norm(linear.router.query.projection)
    parts = parameter_part(linear)
    assert {name for name, part in parts.items() if part == "backbone"} == {"weight", "bias"}
    assert {name for name, part in parts.items() if part == "experts"} == {
        "expert_u_orig",
        "parametrizations.expert_v.original0",
        "parametrizations.expert_v.original1",
    }


def test_disabled_experts_make_the_model_dense_and_the_losses_zero() -> None:
    torch.manual_seed(0)
    config = HiLoMoEConfig(3, 4)
    model = nn.Sequential(HiLoMoELinear(12, 10, config), HiLoMoEMLP(10, [8, 6], config))
    for name, parameter in model.named_parameters():
        if name.endswith("expert_u"):
            nn.init.normal_(parameter)
    dense = nn.Sequential(
        nn.Linear(12, 10), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU()
    )
    twins = zip((0, 1, 3), (model[0], *model[1].linears), strict=True)
    for index, linear in twins:
        dense[index].load_state_dict(linear.state_dict(), strict=False)
    losses = AuxiliaryLoss(model, AuxiliaryLossConfig(diversity=1.0))
    x = torch.randn(7, 12)

    with_experts = model(x)
    assert losses().total > 0
    set_experts_enabled(model, False)
    assert torch.equal(model(x), dense(x))
    assert all(loss == 0 for loss in losses())
    set_experts_enabled(model, True)
    assert torch.equal(model(x), with_experts)
    assert losses().total > 0
