from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from torchrec_hilomoe.modules import (
    HierarchicalRouter,
    HiLoMoEConfig,
    HiLoMoECrossNet,
    HiLoMoEInteractionArch,
    HiLoMoELinear,
    HiLoMoEMLP,
    HiLoMoETwoStreamArch,
    RoutedLinear,
    Routing,
    TwoStreamConfig,
)

Case = tuple[Callable[..., nn.Module], tuple[object, ...], Callable[[int], tuple[object, ...]]]


def _flat(batch: int) -> tuple[Tensor]:
    return (torch.randn(batch, 12),)


def _sequence(batch: int) -> tuple[Tensor]:
    return (torch.randn(batch, 3, 12),)


def _long_sequence(batch: int) -> tuple[Tensor]:
    return (torch.randn(batch, 40, 12),)  # runs on built weights


def _dense_and_sparse(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 4), torch.randn(batch, 2, 4)


def _routed(batch: int) -> tuple[Tensor, Routing]:
    return torch.randn(batch, 12), Routing(torch.rand(batch, 3, 4), torch.randn(batch, 3, 4))


#: name -> (class, arguments before the config, inputs for a batch size)
CASES: dict[str, Case] = {
    "router": (HierarchicalRouter, (12,), _flat),
    "routed_linear": (RoutedLinear, (12, 10), _routed),
    "linear": (HiLoMoELinear, (12, 10), _flat),
    "linear_sequence": (HiLoMoELinear, (12, 10), _sequence),
    "linear_long_sequence": (HiLoMoELinear, (12, 10), _long_sequence),
    "mlp": (HiLoMoEMLP, (12, [10, 8]), _flat),
    "crossnet": (HiLoMoECrossNet, (12, 2), _flat),
    "two_stream": (HiLoMoETwoStreamArch, (2, 4, TwoStreamConfig(10, 8, 2)), _dense_and_sparse),
    "interaction": (HiLoMoEInteractionArch, (2, 4, 10), _dense_and_sparse),
}

CONFIGS = {
    "dense": HiLoMoEConfig(3, 4),
    "top_k": HiLoMoEConfig(3, 4, top_k=2, query_dim=6),
    "tied": HiLoMoEConfig(3, 4, tied_keys=True),
    "dropout": HiLoMoEConfig(3, 4, query_dropout=0.2, expert_dropout=0.2),
    "recompute": HiLoMoEConfig(3, 4, recompute=True),
}


class ModuleCase:
    """One public module under one config: makes instances and inputs."""

    def __init__(self, name: str, config: HiLoMoEConfig) -> None:
        self.module_class, self._arguments, self.inputs = CASES[name]
        self._config = config

    def make(self, **factory: object) -> nn.Module:
        return self.module_class(*self._arguments, self._config, **factory)

    def make_with_experts(self) -> nn.Module:
        """With U drawn at random, so that the experts have a say in the output."""
        module = self.make()
        for parameter_name, parameter in module.named_parameters():
            if parameter_name.endswith("expert_u"):
                nn.init.normal_(parameter, std=0.1)
        return module


@pytest.fixture(
    params=[
        (name, config)
        for name in CASES
        for config in CONFIGS
        if (name, config) != ("router", "tied")  # takes its keys from a linear: test_router.py
    ],
    ids=lambda param: "-".join(param),
)
def case(request: pytest.FixtureRequest) -> ModuleCase:
    torch.manual_seed(0)
    name, config = request.param
    return ModuleCase(name, CONFIGS[config])
