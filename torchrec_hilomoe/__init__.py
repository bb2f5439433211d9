"""HiLoMoE (hierarchical LoRA mixture of experts, arXiv 2510.10432) for TorchRec."""

from torchrec_hilomoe.models import (
    DLRM_HiLoMoE,
    DLRM_HiLoMoETrain,
    Interaction,
    InteractionContext,
    register_interaction,
)
from torchrec_hilomoe.modules import (
    AuxiliaryLoss,
    AuxiliaryLossConfig,
    HierarchicalRouter,
    HiLoMoEConfig,
    HiLoMoECrossNet,
    HiLoMoEInteractionArch,
    HiLoMoELinear,
    HiLoMoEMLP,
    HiLoMoETwoStreamArch,
    Routing,
    TwoStreamConfig,
)

__all__ = [
    "AuxiliaryLoss",
    "AuxiliaryLossConfig",
    "DLRM_HiLoMoE",
    "DLRM_HiLoMoETrain",
    "HiLoMoEConfig",
    "HiLoMoECrossNet",
    "HiLoMoEInteractionArch",
    "HiLoMoELinear",
    "HiLoMoEMLP",
    "HiLoMoETwoStreamArch",
    "HierarchicalRouter",
    "Interaction",
    "InteractionContext",
    "Routing",
    "TwoStreamConfig",
    "register_interaction",
]
