"""The interaction architectures that come registered: TorchRec's own and HiLoMoE's forms."""

# Annotations stay evaluated: TorchScript cannot read the strings that
# `from __future__ import annotations` would leave in an FX-traced forward.

from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import nn
from torchrec.models.dlrm import (
    DenseArch,
    InteractionArch,
    InteractionDCNArch,
    InteractionProjectionArch,
)
from torchrec.modules.crossnet import LowRankCrossNet, LowRankMixtureCrossNet

from torchrec_hilomoe.config import STRICT
from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.models.registry import Interaction, InteractionContext, register_interaction
from torchrec_hilomoe.modules import (
    HiLoMoEConfig,
    HiLoMoECrossNet,
    HiLoMoEInteractionArch,
    HiLoMoEMLP,
    HiLoMoETwoStreamArch,
    TwoStreamConfig,
)
from torchrec_hilomoe.ops import concatenate


class InteractionCatArch(nn.Module):
    """Concatenates all features and hands them to a tower.

    Args:
        tower (nn.Module): [B, (F + 1) * D] → [B, width].

    Example:
        >>> arch = InteractionCatArch(nn.Identity())
        >>> arch(dense_features=torch.rand(2, 4), sparse_features=torch.rand(2, 3, 4)).shape
        torch.Size([2, 16])
    """

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, dense_features: torch.Tensor, sparse_features: torch.Tensor) -> torch.Tensor:
        """Computes the interaction.

        Args:
            dense_features (torch.Tensor): [B, D].
            sparse_features (torch.Tensor): [B, F, D].

        Returns:
            torch.Tensor: [B, width].
        """
        return self.tower(concatenate(dense_features, sparse_features))


def _placed(module: nn.Module, context: InteractionContext) -> nn.Module:
    """Moves a module whose constructor takes no device (TorchRec's cross nets)."""
    if context.device is None:
        return module
    if context.device.type == "meta":
        return module.to_empty(device=context.device)
    return module.to(context.device)


@dataclass
class NoOptions:
    """Options of an architecture without any."""

    __pydantic_config__ = STRICT


@register_interaction("dlrm", NoOptions)
def build_dlrm(context: InteractionContext, config: NoOptions) -> Interaction:
    """Dot products of all pairs, as in `torchrec.models.dlrm.DLRM`."""
    f = context.num_sparse_features
    return Interaction(InteractionArch(f), context.embedding_dim + f * (f + 1) // 2)


@register_interaction("dlrm_cat", NoOptions)
def build_dlrm_cat(context: InteractionContext, config: NoOptions) -> Interaction:
    """All features concatenated: a plain MLP over embeddings ("DLRM cat")."""
    return Interaction(InteractionCatArch(nn.Identity()), context.in_features)


@dataclass
class DCNOptions:
    """Options of `torchrec.modules.crossnet.LowRankCrossNet`.

    Attributes:
        num_layers (int): cross layers.
        low_rank_dim (int): rank of each layer's weight.
    """

    __pydantic_config__ = STRICT

    num_layers: PositiveInt = 3
    low_rank_dim: PositiveInt = 64


@register_interaction("dcn", DCNOptions)
def build_dcn(context: InteractionContext, config: DCNOptions) -> Interaction:
    """DCN v2 with low-rank weights, as in `torchrec.models.dlrm.DLRM_DCN`."""
    crossnet = LowRankCrossNet(context.in_features, config.num_layers, config.low_rank_dim)
    arch = InteractionDCNArch(context.num_sparse_features, _placed(crossnet, context))
    return Interaction(arch, context.in_features)


@dataclass
class DCNMixtureOptions:
    """Options of `torchrec.modules.crossnet.LowRankMixtureCrossNet`.

    Attributes:
        num_layers (int): cross layers.
        num_experts (int): experts of each layer.
        low_rank_dim (int): rank of each expert.
    """

    __pydantic_config__ = STRICT

    num_layers: PositiveInt = 3
    num_experts: PositiveInt = 4
    low_rank_dim: PositiveInt = 32


@register_interaction("dcn_mixture", DCNMixtureOptions)
def build_dcn_mixture(context: InteractionContext, config: DCNMixtureOptions) -> Interaction:
    """DCN v2 with a mixture of low-rank experts (DCN-Mix)."""
    crossnet = LowRankMixtureCrossNet(
        context.in_features,
        config.num_layers,
        num_experts=config.num_experts,
        low_rank=config.low_rank_dim,
    )
    arch = InteractionDCNArch(context.num_sparse_features, _placed(crossnet, context))
    return Interaction(arch, context.in_features)


@dataclass
class ProjectionOptions:
    """Options of `torchrec.models.dlrm.InteractionProjectionArch`.

    Attributes:
        hidden_layer_sizes (list[int]): hidden widths of both branches.
        num_projections (tuple[int, int]): F1 and F2: how many vectors of the embedding dimension
            D the branches end in; the interaction is their F1 * F2 dot products.
    """

    __pydantic_config__ = STRICT

    hidden_layer_sizes: list[PositiveInt] = field(default_factory=lambda: [128])
    num_projections: tuple[PositiveInt, PositiveInt] = (8, 8)


@register_interaction("projection", ProjectionOptions)
def build_projection(context: InteractionContext, config: ProjectionOptions) -> Interaction:
    """Products of two projections, as in `torchrec.models.dlrm.DLRM_Projection`.

    Raises:
        ConfigError: there is but one feature.
    """
    if context.num_sparse_features < 1:
        raise ConfigError("model.name=projection: needs more than one feature; take another model")
    d = context.embedding_dim
    branches = [
        DenseArch(context.in_features, [*config.hidden_layer_sizes, f * d], context.device)
        for f in config.num_projections
    ]
    arch = InteractionProjectionArch(context.num_sparse_features, *branches)
    f1, f2 = config.num_projections
    return Interaction(arch, d + f1 * f2)


@dataclass(frozen=True)
class HiLoMoEWideOptions(HiLoMoEConfig):
    """Options of `HiLoMoEInteractionArch`.

    Attributes:
        out_features (int): width of the layer.
    """

    __pydantic_config__ = STRICT

    out_features: PositiveInt = 400


@register_interaction("hilomoe_wide", HiLoMoEWideOptions)
def build_hilomoe_wide(context: InteractionContext, config: HiLoMoEWideOptions) -> Interaction:
    """One wide HiLoMoE layer over all features."""
    arch = HiLoMoEInteractionArch(
        context.num_sparse_features,
        context.embedding_dim,
        config.out_features,
        config,
        device=context.device,
    )
    return Interaction(arch, config.out_features)


@dataclass(frozen=True)
class HiLoMoECrossOptions(HiLoMoEConfig):
    """Options of `HiLoMoECrossNet`.

    Attributes:
        num_cross_layers (int): cross layers; L HiLoMoE layers of K experts stand in each.
    """

    __pydantic_config__ = STRICT

    num_cross_layers: PositiveInt = 3


@register_interaction("hilomoe_cross", HiLoMoECrossOptions)
def build_hilomoe_cross(context: InteractionContext, config: HiLoMoECrossOptions) -> Interaction:
    """HiLoMoE's cross net inside TorchRec's `InteractionDCNArch`."""
    crossnet = HiLoMoECrossNet(
        context.in_features, config.num_cross_layers, config, device=context.device
    )
    return Interaction(
        InteractionDCNArch(context.num_sparse_features, crossnet), context.in_features
    )


@dataclass(frozen=True)
class HiLoMoEMLPOptions(HiLoMoEConfig):
    """Options of `HiLoMoEMLP`.

    Attributes:
        layer_sizes (tuple[int, ...]): widths of its layers, which share one routing.
    """

    __pydantic_config__ = STRICT

    layer_sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (400, 400)


@register_interaction("hilomoe_mlp", HiLoMoEMLPOptions)
def build_hilomoe_mlp(context: InteractionContext, config: HiLoMoEMLPOptions) -> Interaction:
    """An MLP over all features whose linears are HiLoMoE layers with one shared routing."""
    mlp = HiLoMoEMLP(context.in_features, config.layer_sizes, config, device=context.device)
    return Interaction(InteractionCatArch(mlp), config.layer_sizes[-1])


@dataclass(frozen=True)
class HiLoMoEOptions(TwoStreamConfig, HiLoMoEConfig):
    """Options of `HiLoMoETwoStreamArch`, flat: of the streams and of the experts.

    ``batch_norm`` and ``dropout`` are the model's: they hold for streams and over arch alike.
    """

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        TwoStreamConfig.__post_init__(self)
        HiLoMoEConfig.__post_init__(self)


@register_interaction("hilomoe", HiLoMoEOptions)
def build_hilomoe(context: InteractionContext, config: HiLoMoEOptions) -> Interaction:
    """Two streams, one with routed experts, and their bilinear fusion."""
    arch = HiLoMoETwoStreamArch(
        context.num_sparse_features, context.embedding_dim, config, config, device=context.device
    )
    return Interaction(arch, arch.out_features)
