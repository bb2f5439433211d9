"""Other readings of the method, to be measured against the library's: a plugin of the trainer.

python examples/train_dlrm_hilomoe.py plugins=[routing_variants] model.name=routing_variant \
    +model.gate=sigmoid    # with benchmarks/ on PYTHONPATH
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrec_hilomoe.config import STRICT
from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.models import Interaction, InteractionContext, register_interaction
from torchrec_hilomoe.models.interactions import HiLoMoEOptions
from torchrec_hilomoe.modules import (
    HierarchicalRouter,
    HiLoMoELinear,
    HiLoMoETwoStreamArch,
    RoutedLinear,
    Routing,
)

#: Output of a layer's experts, from the layer and its scores.
Experts = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class VariantOptions(HiLoMoEOptions):
    """Options beside those of ``hilomoe``; the defaults are what the library does.

    Attributes:
        gate (str): what makes scores of logits; ``sigmoid`` times 2/K lets every expert decide for
            itself, ``centred`` takes 1/K from the softmax, so that equal use is no use.
        temperature (float): divides the logits.
        hierarchy (str): what the query of the next layer reads: the ``scores`` so far, ``none``
            (all layers have the same query) or the ``outputs`` so far, layer after layer;
            ``scores_alone`` has no residual: a layer reads the scores of the one before it only.
        score_weight (float): factor on what the ``scores`` add to the query.
        query_fields (tuple[int, ...] | None): features the query is made of; None is all of them,
            none is a learned query that is the same for every sample.
        expert_relu (bool): a ReLU inside of each expert.
        expert_v_scale (float): factor on the deviation of V at the start.

    Raises:
        ValueError: an option of the library's routing that no variant has.
    """

    __pydantic_config__ = STRICT

    gate: Literal["softmax", "sigmoid", "centred"] = "softmax"
    temperature: float = 1.0
    hierarchy: Literal["scores", "scores_alone", "none", "outputs"] = "scores"
    score_weight: float = 1.0
    query_fields: tuple[int, ...] | None = None
    expert_relu: bool = False
    expert_v_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("top_k", "tied_keys", "recompute"):
            if getattr(self, name):
                raise ValueError(f"{name} is not for variants: leave it out, or use model=hilomoe")


class VariantRouter(HierarchicalRouter):
    """The literal recurrence, with other gates and other queries.

    Args:
        context (InteractionContext): features and their dimension.
        options (VariantOptions): of the routing.
        linear (RoutedLinear): whose input the query reads, and its output if asked to.

    Raises:
        ConfigError: a query field that there is not.
    """

    def __init__(
        self, context: InteractionContext, options: VariantOptions, linear: RoutedLinear
    ) -> None:
        num_fields, chosen = context.num_sparse_features + 1, options.query_fields
        unknown = set(chosen or ()) - set(range(num_fields))
        if unknown:
            raise ConfigError(
                f"model.query_fields: the features are 0 to {num_fields - 1}, got {min(unknown)}"
            )
        read = linear.in_features
        if chosen is not None:
            read = max(len(chosen), 1) * context.embedding_dim
        super().__init__(read, options, context.device)
        self.options = options
        self.width, self.num_fields = context.in_features, num_fields
        out_features = linear.out_features
        self.readers = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(out_features, device=context.device),
                nn.Linear(out_features, self.keys.size(2), device=context.device),
            )
            for _ in range(options.num_layers - 1 if options.hierarchy == "outputs" else 0)
        )

    def forward(self, x: Tensor, experts: Experts) -> Routing:  # type: ignore[override]
        """Routes a batch.

        Args:
            x (Tensor): all features first, ``[B, d]``.
            experts (Experts): asked where the query reads outputs.

        Returns:
            Routing: scores and logits, ``[B, L, K]``.
        """
        query, keys = self.query(self._source(x)), self.keys
        scale = 1.0 / (math.sqrt(keys.size(2)) * self.options.temperature)
        all_scores, all_logits, output = [], [], 0.0
        for layer, layer_keys in enumerate(keys):
            logits = query @ layer_keys.t() * scale
            scores = self._gate(logits)
            if self.options.hierarchy == "scores":
                query = query + self.options.score_weight * (scores @ layer_keys)
            elif self.options.hierarchy == "scores_alone":
                query = scores @ layer_keys
            elif self.options.hierarchy == "outputs" and layer + 1 < len(keys):
                output = output + experts(layer, scores)
                query = query + self.readers[layer](output)
            all_scores.append(scores)
            all_logits.append(logits)
        routing = Routing(torch.stack(all_scores, 1), torch.stack(all_logits, 1))
        if self.training:
            self.routing = routing
        return routing

    def _source(self, x: Tensor) -> Tensor:
        chosen = self.options.query_fields
        if chosen is None:
            return x
        fields = x[:, : self.width].unflatten(1, (self.num_fields, -1))
        return (fields[:, list(chosen)] if chosen else torch.zeros_like(fields[:, :1])).flatten(1)

    def _gate(self, logits: Tensor) -> Tensor:
        if self.options.gate == "sigmoid":
            return logits.sigmoid() * (2.0 / logits.size(1))
        return logits.softmax(1)


class VariantLinear(RoutedLinear):
    """A routed linear with a :class:`VariantRouter`, and other experts.

    Args:
        context (InteractionContext): features and their dimension.
        in_features (int): d, the features first.
        out_features (int): o.
        options (VariantOptions): of routing and experts.
    """

    def __init__(
        self,
        context: InteractionContext,
        in_features: int,
        out_features: int,
        options: VariantOptions,
    ) -> None:
        super().__init__(in_features, out_features, options, context.device)
        self.options = options
        self.router = VariantRouter(context, options, self)
        with torch.no_grad():
            self.expert_v *= options.expert_v_scale

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """``[B, d]`` to ``[B, o]``."""
        if not self.experts_enabled:
            self.router.skip()
            return F.linear(x, self.weight, self.bias)

        outputs: list[Tensor] = []  # layer by layer, once: a query may have read them before

        def experts(layer: int, scores: Tensor) -> Tensor:
            if layer == len(outputs):
                if self.options.gate == "centred":
                    scores = scores - 1.0 / scores.size(1)
                projected = x @ self.expert_v[layer].t()
                projected = projected.relu() if self.options.expert_relu else projected
                gated = projected * self.expert_dropout(scores)
                outputs.append(gated @ self.expert_u[layer] * self.gate_scale)
            return outputs[layer]

        y = F.linear(x, self.weight, self.bias)
        for layer, scores in enumerate(self.router(x, experts).scores.unbind(1)):
            y = y + experts(layer, scores)
        return y


@register_interaction("routing_variant", VariantOptions)
def build_routing_variant(context: InteractionContext, options: VariantOptions) -> Interaction:
    """``hilomoe`` with the layer above."""
    arch = _two_streams(context, options)
    in_features, width = arch.plain_stream[0].in_features, options.expert_width
    arch.routed_stream[0] = VariantLinear(context, in_features, width, options)
    return Interaction(arch, arch.out_features)


class ExpertsBeforeStreams(nn.Module):
    """Experts on the features themselves, then two streams without.

    Args:
        context (InteractionContext): features and their dimension.
        options (HiLoMoEOptions): of experts and streams.
    """

    def __init__(self, context: InteractionContext, options: HiLoMoEOptions) -> None:
        super().__init__()
        self.streams = _two_streams(context, options)
        in_features = self.streams.plain_stream[0].in_features
        plain = nn.Linear(in_features, options.expert_width, device=context.device)
        self.streams.routed_stream[0] = plain

    def forward(self, dense_features: Tensor, sparse_features: Tensor) -> Tensor:
        """``[B, D]`` and ``[B, F, D]`` to ``[B, out_features]``."""
        fields = torch.cat((dense_features.unsqueeze(1), sparse_features), dim=1)
        fields = self.transformed(fields)
        return self.streams(fields[:, 0], fields[:, 1:])


class FieldTokens(ExpertsBeforeStreams):
    """One HiLoMoE layer on each feature as a token, routed by all of them."""

    def __init__(self, context: InteractionContext, options: HiLoMoEOptions) -> None:
        super().__init__(context, options)
        d = context.embedding_dim
        self.router = HierarchicalRouter(context.in_features, options, context.device)
        self.linear = RoutedLinear(d, d, options, context.device)

    def transformed(self, fields: Tensor) -> Tensor:
        """``[B, F + 1, D]``."""
        routing = (
            self.router(fields.flatten(1)) if self.linear.experts_enabled else self.router.skip()
        )
        return self.linear(fields, routing)


class ResidualFieldTokens(FieldTokens):
    """What the layer makes of each feature, added to the feature."""

    def transformed(self, fields: Tensor) -> Tensor:
        """``[B, F + 1, D]``."""
        return fields + super().transformed(fields)


class FeatureGate(ExpertsBeforeStreams):
    """Every number of the features times a gate between 0 and 2, from a HiLoMoE layer on them."""

    def __init__(self, context: InteractionContext, options: HiLoMoEOptions) -> None:
        super().__init__(context, options)
        d = context.in_features
        self.linear = HiLoMoELinear(d, d, options, context.device)

    def transformed(self, fields: Tensor) -> Tensor:
        """``[B, F + 1, D]``."""
        gates = 2.0 * self.linear(fields.flatten(1)).sigmoid()
        return fields * gates.view_as(fields)


@register_interaction("field_tokens", HiLoMoEOptions)
def build_field_tokens(context: InteractionContext, options: HiLoMoEOptions) -> Interaction:
    """:class:`FieldTokens`."""
    arch = FieldTokens(context, options)
    return Interaction(arch, arch.streams.out_features)


@register_interaction("residual_field_tokens", HiLoMoEOptions)
def build_residual_field_tokens(
    context: InteractionContext, options: HiLoMoEOptions
) -> Interaction:
    """:class:`ResidualFieldTokens`."""
    arch = ResidualFieldTokens(context, options)
    return Interaction(arch, arch.streams.out_features)


@register_interaction("feature_gate", HiLoMoEOptions)
def build_feature_gate(context: InteractionContext, options: HiLoMoEOptions) -> Interaction:
    """:class:`FeatureGate`."""
    arch = FeatureGate(context, options)
    return Interaction(arch, arch.streams.out_features)


def _two_streams(context: InteractionContext, options: HiLoMoEOptions) -> HiLoMoETwoStreamArch:
    return HiLoMoETwoStreamArch(
        context.num_sparse_features,
        context.embedding_dim,
        options,
        options,
        device=context.device,
    )
