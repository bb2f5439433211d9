"""Hierarchical router: which experts of each layer a sample uses."""

# Modules keep their annotations evaluated: TorchScript cannot read the strings that
# `from __future__ import annotations` would leave in an FX-traced forward.

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchrec_hilomoe.modules.checks import check_whole
from torchrec_hilomoe.modules.config import HiLoMoEConfig
from torchrec_hilomoe.ops import (
    RouterWeights,
    projecting_keys_is_cheaper,
    route,
    route_projected,
)

torch.fx.wrap("route")

#: Features of query and keys unless the config tells; the projection to them is most of routing's
#: cost.
DEFAULT_QUERY_DIM = 64


class Routing(NamedTuple):
    """Routing of a batch, computed once and handed to every linear that shares it.

    Attributes:
        scores (Tensor): ``[B, L, K]``; the scores of a layer sum to 1, dropped experts have 0.
        logits (Tensor): ``[B, L, K]``, before any top-k mask.
    """

    scores: Tensor
    logits: Tensor


class HierarchicalRouter(nn.Module):
    r"""Scores every expert of every layer from one query per sample.

    .. math::
        s^{(l)} = \mathrm{softmax}(q^{(l)} \kappa^{(l)\top} / \sqrt{D_q}), \quad
        q^{(l+1)} = q^{(l)} + \sum_k s_k^{(l)} \kappa_k^{(l)}

    The recurrence over prior scores is the paper's [P]. With untied keys the query is
    ``Linear(LayerNorm(x))`` and the keys start as N(0, 1), so that logits start in the order of 1;
    with tied keys the query is x and the router has no parameters [R]. Scores and logits are
    float32 under autocast too.

    In training mode the last routing stays in ``self.routing``, where
    :class:`~torchrec_hilomoe.modules.losses.AuxiliaryLoss` reads it. Until then, after
    :meth:`skip`, and in copies and pickles it is the routing of no samples. It is no part of the
    state dict, and evaluation leaves it alone.

    Args:
        in_features (int): features of x.
        config (HiLoMoEConfig): layers, experts, top-k, and what the query is made of.
        device (torch.device | None): default compute device.
        dtype (torch.dtype | None): dtype of the parameters.

    Raises:
        ValueError: there are no features.

    Example:
        >>> router = HierarchicalRouter(16, HiLoMoEConfig(num_layers=3, num_experts=4))
        >>> routing = router(torch.randn(5, 16))
        >>> routing.scores.shape, bool(torch.allclose(routing.scores.sum(-1), torch.ones(5, 3)))
        (torch.Size([5, 3, 4]), True)
    """

    keys: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        config: HiLoMoEConfig,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_whole("in_features", in_features, at_least=1)
        self.in_features = in_features
        self.config = config
        query: OrderedDict[str, nn.Module] = OrderedDict()
        keys: nn.Parameter | None = None
        if not config.tied_keys:
            query_dim = config.query_dim or min(in_features, DEFAULT_QUERY_DIM)
            query["norm"] = nn.LayerNorm(in_features, device=device, dtype=dtype)
            query["projection"] = nn.Linear(in_features, query_dim, device=device, dtype=dtype)
            shape = (config.num_layers, config.num_experts, query_dim)
            keys = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        query["dropout"] = nn.Dropout(config.query_dropout)
        self.query = nn.Sequential(query)
        self.register_parameter("keys", keys)
        no_samples = torch.zeros((0, config.num_layers, config.num_experts), device=device)
        if no_samples.is_meta:  # which parameters may leave one by one, without a call of _apply()
            no_samples = torch.zeros(no_samples.shape, device="cpu")
        self.routing = Routing(no_samples, no_samples)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the keys anew; norm and projection reset their own parameters."""
        if self.keys is not None:
            nn.init.normal_(self.keys)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Routing:
        """Routes a batch.

        Args:
            x (Tensor): one row per sample, ``[B, in_features]``.
            keys (Tensor | None): with tied keys, V of the linear, ``[L, K, in_features]``; else
                the router has its own and this is left out.

        Returns:
            Routing: scores and logits, ``[B, L, K]``.

        Raises:
            ValueError: the keys are tied, but none were given.
        """
        if self.keys is not None:
            keys = self.keys
        if keys is None:
            raise ValueError("tied_keys: hand V of the linear to the router, router(x, expert_v)")
        traced = not isinstance(x, Tensor)  # by FX, which hands a proxy in
        if not traced and self.projects_keys(x):
            weights, normalised = self.weights(), self.query.norm(x)  # type: ignore[operator]
            scores, logits = route_projected(
                normalised, weights.weight, weights.bias, keys, self.config.top_k
            )
        else:
            recompute = self.config.recompute and self.training and not traced
            query = checkpoint(self.query, x, use_reentrant=False) if recompute else self.query(x)
            scores, logits = route(query, keys, self.config.top_k)
        routing = Routing(scores, logits)
        if self.training and not traced:
            self.routing = routing
        return routing

    def weights(self) -> RouterWeights:
        """The parameters of an untied router, for :func:`~torchrec_hilomoe.ops.self_routed_linear`.

        Returns:
            RouterWeights: of query and keys.

        Raises:
            ValueError: the keys are tied.
        """
        keys = self.keys
        if keys is None:
            raise ValueError("tied_keys: this router has no weights of its own")
        parts: Any = self.query  # a Sequential has its modules as attributes, of any type
        norm, projection = parts.norm, parts.projection
        return RouterWeights(
            norm.weight, norm.bias, projection.weight, projection.bias, keys, norm.eps
        )

    def skip(self) -> Routing:
        """Stands in for :meth:`forward` where all experts are silent.

        Returns:
            Routing: the routing of no samples, ``[0, L, K]``; in training mode it is kept too.
        """
        no_samples = Routing(*(tensor.detach()[:0] for tensor in self.routing))
        if self.training:
            self.routing = no_samples
        return no_samples

    def projects_keys(self, x: Tensor) -> bool:
        """Whether nothing but logits need be formed; in training alone, for large batches.

        Args:
            x (Tensor): one row per sample, ``[B, in_features]``.

        Returns:
            bool: True for few untied keys, without query dropout, ``recompute`` and autocast, and
            with modules of the query that are as they were built, no hook on them.
        """
        return (
            self.training
            and self.keys is not None
            and not self.config.recompute
            and self._query_is_plain()
            and x.dtype == self.keys.dtype
            and x.dtype in (torch.float32, torch.float64)
            and projecting_keys_is_cheaper(x.size(0), self.in_features, *self.keys.shape)
            and not _autocasts(x)  # it would round the logits
        )

    def _query_is_plain(self) -> bool:
        """Whether the parameters of an untied query say all that it does."""
        parts: Any = self.query
        return (
            type(parts.norm) is nn.LayerNorm
            and type(parts.projection) is nn.Linear
            and type(parts.dropout) is nn.Dropout
            and not parts.dropout.p
            and not any(map(has_hooks, (parts, parts.norm, parts.projection, parts.dropout)))
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HierarchicalRouter":
        super()._apply(fn, recurse)
        self.routing = Routing(*(fn(tensor.detach()[:0]) for tensor in self.routing))
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A routing belongs to an autograd graph, which can be neither copied nor pickled.
        no_samples = Routing(*(tensor.detach()[:0].clone() for tensor in self.routing))
        return super().__getstate__() | {"routing": no_samples}

    def extra_repr(self) -> str:
        """Sizes and gating, as printed by ``repr``."""
        gating = "dense" if self.config.top_k is None else f"top_k={self.config.top_k}"
        return (
            f"in_features={self.in_features}, num_layers={self.config.num_layers}, "
            f"num_experts={self.config.num_experts}, {gating}, tied_keys={self.config.tied_keys}"
        )


def has_hooks(module: nn.Module) -> bool:
    """Whether something waits for a call of the module."""
    return any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )


def _autocasts(x: Tensor) -> bool:
    device = x.device.type  # meta has no autocast
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
