"""The parts of a HiLoMoE model that training treats differently."""

from __future__ import annotations

import re
from typing import Literal

from torch import nn

from torchrec_hilomoe.modules.linear import RoutedLinear
from torchrec_hilomoe.modules.router import HierarchicalRouter

# By name: parametrized or pruned, U and V are made of parameters named after them.
_EXPERT = re.compile(r"(^|\.)expert_[uv](_orig)?($|\.)").search

DensePart = Literal["backbone", "experts", "router"]


def parameter_part(model: nn.Module) -> dict[str, DensePart]:
    """Tells the part that each parameter belongs to.

    Args:
        model (nn.Module): any model, wrapped for distributed training or not.

    Returns:
        dict[str, DensePart]: by the name in ``model.named_parameters()``: ``experts`` are U and V
        of every :class:`RoutedLinear`, ``router`` is all of every :class:`HierarchicalRouter`, and
        ``backbone`` is the rest.

    Example:
        >>> from torchrec_hilomoe.modules import HiLoMoEConfig, HiLoMoELinear
        >>> for name, part in parameter_part(HiLoMoELinear(4, 2, HiLoMoEConfig())).items():
        ...     print(name, part)
        weight backbone
        bias backbone
        expert_u experts
        expert_v experts
        router.keys router
        router.query.norm.weight router
        router.query.norm.bias router
        router.query.projection.weight router
        router.query.projection.bias router
    """
    parts: dict[int, DensePart] = {}
    for module in model.modules():
        if isinstance(module, HierarchicalRouter):
            parts.update((id(parameter), "router") for parameter in module.parameters())
        elif isinstance(module, RoutedLinear):
            own = module.named_parameters()
            parts.update((id(parameter), "experts") for name, parameter in own if _EXPERT(name))
    return {
        name: parts.get(id(parameter), "backbone") for name, parameter in model.named_parameters()
    }


def set_experts_enabled(model: nn.Module, enabled: bool) -> None:
    """Lets every :class:`RoutedLinear` of ``model`` use its experts, or only its base.

    Without experts the routers do not run and the auxiliary losses are 0: the warm-up stage.
    What is already traced or exported, or wrapped in DDP with a static graph, keeps the setting it
    was made with.

    Args:
        model (nn.Module): searched with all of its submodules.
        enabled (bool): whether the experts take part.

    Example:
        >>> from torchrec_hilomoe.modules import HiLoMoEConfig, HiLoMoELinear
        >>> linear = HiLoMoELinear(4, 2, HiLoMoEConfig())
        >>> set_experts_enabled(linear, False)
        >>> linear.experts_enabled
        False
    """
    for module in model.modules():
        if isinstance(module, RoutedLinear):
            module.experts_enabled = enabled


def experts_enabled(model: nn.Module) -> bool:
    """Whether the experts of ``model`` take part, as `set_experts_enabled` left them.

    Args:
        model (nn.Module): searched with all of its submodules.

    Returns:
        bool: False if any :class:`RoutedLinear` uses only its base.
    """
    return all(m.experts_enabled for m in model.modules() if isinstance(m, RoutedLinear))
