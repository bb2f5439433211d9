"""What HiLoMoE is compared with, each as a module that stands in the same place."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.models.dlrm import InteractionArch, InteractionDCNArch
from torchrec.modules.crossnet import LowRankCrossNet, LowRankMixtureCrossNet

from torchrec_hilomoe.modules import (
    HiLoMoEConfig,
    HiLoMoECrossNet,
    HiLoMoEInteractionArch,
    HiLoMoELinear,
)
from torchrec_hilomoe.ops import (
    hilomoe_linear_reference,
    route_reference,
    stacked_experts_linear,
)


def hilomoe_linear(in_features: int, out_features: int, config: HiLoMoEConfig) -> HiLoMoELinear:
    """A :class:`HiLoMoELinear` whose experts are not silent."""
    linear = HiLoMoELinear(in_features, out_features, config)
    nn.init.normal_(linear.expert_u, std=0.1)
    return linear


class LiteralLinear(nn.Module):
    """The same layer by the literal loops over layers and experts."""

    def __init__(self, linear: HiLoMoELinear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """``[B, d]`` to ``[B, o]``."""
        layer = self.linear
        scores, _ = route_reference(layer.router.query(x), layer.router.keys)
        gates = scores * layer.gate_scale
        return hilomoe_linear_reference(
            x, layer.weight, layer.bias, layer.expert_u, layer.expert_v, gates
        )


class SequentialLinear(nn.Module):
    """The same layer by conventional stacking: one layer after the other, routed by queries."""

    def __init__(self, linear: HiLoMoELinear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """``[B, d]`` to ``[B, o]``."""
        layer = self.linear
        y = F.linear(x, layer.weight, layer.bias)
        query, keys = layer.router.query(x), layer.router.keys
        for u, v, layer_keys in zip(layer.expert_u, layer.expert_v, keys, strict=True):
            scores = F.softmax(query @ layer_keys.t() / math.sqrt(keys.size(-1)), dim=-1)
            y = y + (scores * layer.gate_scale * F.linear(x, v)) @ u
            query = query + scores @ layer_keys
        return y


class AllExpertsLinear(nn.Module):
    """The same layer with its routing, but every expert computed, whatever its score."""

    def __init__(self, linear: HiLoMoELinear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """``[B, d]`` to ``[B, o]``."""
        layer = self.linear
        scores = layer.router(x).scores
        return stacked_experts_linear(
            x,
            layer.weight,
            layer.bias,
            layer.expert_u,
            layer.expert_v,
            scores,
            layer.gate_scale,
        )


class DenseMixture(nn.Module):
    """A flat mixture of dense experts, as in MMoE: K full linears under one softmax gate."""

    def __init__(self, in_features: int, out_features: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.experts = nn.Linear(in_features, num_experts * out_features)
        self.gate = nn.Linear(in_features, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, d]`` to ``[B, o]``."""
        gates = self.gate(x).softmax(dim=-1).unsqueeze(1)  # [B, 1, K]
        return (gates @ self.experts(x).unflatten(1, (self.num_experts, -1))).squeeze(1)


class Concatenated(nn.Module):
    """An interaction arch of one module on the concatenated features, and a ReLU."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, dense_features: Tensor, sparse_features: Tensor) -> Tensor:
        """``[B, D]`` and ``[B, F, D]`` to ``[B, out_features]``."""
        combined = torch.cat((dense_features, sparse_features.flatten(1)), dim=1)
        return torch.relu(self.module(combined))


def interaction_archs(
    num_sparse_features: int, embedding_dim: int, out_features: int, config: HiLoMoEConfig
) -> dict[str, nn.Module]:
    """Interaction archs of TorchRec, HiLoMoE's, and those between, at equal L and K.

    L is the number of TorchRec's cross layers; HiLoMoE's cross net has one, of L layers of experts.
    """
    f, d, o = num_sparse_features, embedding_dim, out_features
    num_layers, num_experts, width = config.num_layers, config.num_experts, (f + 1) * d
    mixture = LowRankMixtureCrossNet(width, num_layers, num_experts, low_rank=1)
    low_rank = LowRankCrossNet(width, num_layers, low_rank=num_experts)
    return {
        "InteractionArch": InteractionArch(f),
        "DCN LowRankCrossNet": InteractionDCNArch(f, low_rank),
        "DCN LowRankMixtureCrossNet": InteractionDCNArch(f, mixture),
        "DCN HiLoMoECrossNet": InteractionDCNArch(f, HiLoMoECrossNet(width, 1, config)),
        "linear": Concatenated(nn.Linear(width, o)),
        "HiLoMoEInteractionArch": HiLoMoEInteractionArch(f, d, o, config),
        "dense mixture (MMoE)": Concatenated(DenseMixture(width, o, num_experts)),
    }
