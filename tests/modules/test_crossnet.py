from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrec.models.dlrm import InteractionDCNArch
from torchrec.modules.crossnet import CrossNet

from torchrec_hilomoe.modules import HiLoMoEConfig, HiLoMoECrossNet
from torchrec_hilomoe.ops import hilomoe_linear_reference, route_reference


def test_cross_formula_under_one_routing() -> None:
    crossnet = HiLoMoECrossNet(12, 3, HiLoMoEConfig(3, 4, top_k=2))
    for linear in crossnet.linears:
        nn.init.normal_(linear.expert_u, std=0.1)
    x_0 = torch.randn(7, 12)
    scores, _ = route_reference(crossnet.router.query(x_0), crossnet.router.keys, top_k=2)
    x_l = x_0
    for linear in crossnet.linears:
        parameters = (linear.weight, linear.bias, linear.expert_u, linear.expert_v)
        x_l = x_0 * hilomoe_linear_reference(x_l, *parameters, scores * 4) + x_l
    torch.testing.assert_close(crossnet(x_0), x_l, rtol=1e-5, atol=1e-5)


def test_silent_experts_equal_torchrec_crossnet() -> None:
    crossnet, dense = HiLoMoECrossNet(12, 2, HiLoMoEConfig(3, 4)), CrossNet(12, 2)
    with torch.no_grad():
        for linear, kernel, bias in zip(crossnet.linears, dense.kernels, dense.bias, strict=True):
            linear.weight.copy_(kernel)
            linear.bias.copy_(bias.squeeze(1))
    x = torch.randn(7, 12)
    torch.testing.assert_close(crossnet(x), dense(x))


def test_fits_torchrec_interaction_dcn_arch() -> None:
    crossnet = HiLoMoECrossNet(3 * 4, 2, HiLoMoEConfig(3, 4))
    arch = InteractionDCNArch(num_sparse_features=2, crossnet=crossnet)
    dense, sparse = torch.randn(5, 4), torch.randn(5, 2, 4)
    combined = torch.cat((dense, sparse.flatten(1)), dim=1)
    output = arch(dense_features=dense, sparse_features=sparse)
    torch.testing.assert_close(output, crossnet(combined))


@pytest.mark.parametrize("number", [0, 2.0, True, "2"])
def test_needs_a_whole_number_of_cross_layers(number) -> None:
    with pytest.raises(ValueError, match=f"num_cross_layers must be .*, got {number!r}"):
        HiLoMoECrossNet(8, number, HiLoMoEConfig())
