"""HiLoMoE as modules that stand where TorchRec's stand."""

from torchrec_hilomoe.modules.config import HiLoMoEConfig
from torchrec_hilomoe.modules.crossnet import HiLoMoECrossNet
from torchrec_hilomoe.modules.interaction import HiLoMoEInteractionArch
from torchrec_hilomoe.modules.linear import HiLoMoELinear, RoutedLinear, shared_routing
from torchrec_hilomoe.modules.losses import (
    AuxiliaryLoss,
    AuxiliaryLossConfig,
    AuxiliaryLosses,
    expert_diversity_loss,
    load_balance_loss,
    z_loss,
)
from torchrec_hilomoe.modules.mlp import HiLoMoEMLP
from torchrec_hilomoe.modules.parts import (
    DensePart,
    experts_enabled,
    parameter_part,
    set_experts_enabled,
)
from torchrec_hilomoe.modules.router import HierarchicalRouter, Routing
from torchrec_hilomoe.modules.two_stream import (
    BilinearFusion,
    HiLoMoETwoStreamArch,
    TwoStreamConfig,
)

__all__ = [
    "AuxiliaryLoss",
    "AuxiliaryLossConfig",
    "AuxiliaryLosses",
    "BilinearFusion",
    "HiLoMoEConfig",
    "HiLoMoECrossNet",
    "HiLoMoEInteractionArch",
    "HiLoMoELinear",
    "HiLoMoEMLP",
    "HiLoMoETwoStreamArch",
    "HierarchicalRouter",
    "DensePart",
    "RoutedLinear",
    "Routing",
    "TwoStreamConfig",
    "expert_diversity_loss",
    "experts_enabled",
    "load_balance_loss",
    "parameter_part",
    "set_experts_enabled",
    "shared_routing",
    "z_loss",
]
