from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrec.modules.mlp import MLP

from torchrec_hilomoe.modules import HiLoMoEConfig, HiLoMoEMLP
from torchrec_hilomoe.ops import hilomoe_linear_reference, route_reference


@pytest.mark.parametrize("tied", [False, True])
def test_one_routing_from_the_input_serves_all_linears(tied) -> None:
    mlp = HiLoMoEMLP(12, [10, 8], HiLoMoEConfig(3, 4, tied_keys=tied))
    for linear in mlp.linears:
        nn.init.normal_(linear.expert_u, std=0.1)
    x = torch.randn(7, 12)
    keys = mlp.linears[0].expert_v if tied else mlp.router.keys
    scores, _ = route_reference(mlp.router.query(x), keys)
    expected = x
    for linear in mlp.linears:
        parameters = (linear.weight, linear.bias, linear.expert_u, linear.expert_v)
        expected = hilomoe_linear_reference(expected, *parameters, scores * 4).relu()
    torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-5)


def test_silent_experts_equal_torchrec_mlp_bit_for_bit() -> None:
    mlp, dense = HiLoMoEMLP(12, [10, 8], HiLoMoEConfig(3, 4)), MLP(12, [10, 8])
    with torch.no_grad():
        for linear, perceptron in zip(mlp.linears, dense._mlp, strict=True):
            linear.weight.copy_(perceptron._linear.weight)
            linear.bias.copy_(perceptron._linear.bias)
    x = torch.randn(64, 12)
    assert torch.equal(mlp(x), dense(x))


@pytest.mark.parametrize("sizes", [[], iter(())])
def test_needs_a_layer(sizes) -> None:
    with pytest.raises(ValueError, match="layer_sizes"):
        HiLoMoEMLP(12, sizes, HiLoMoEConfig())


def test_takes_any_iterable_of_sizes() -> None:
    mlp = HiLoMoEMLP(12, (size for size in (8, 4)), HiLoMoEConfig())
    assert mlp(torch.randn(5, 12)).shape == (5, 4)
