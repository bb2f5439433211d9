"""Options of hierarchical routing and its experts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

from torchrec_hilomoe.config import STRICT
from torchrec_hilomoe.modules.checks import check_type, check_whole


@dataclass(frozen=True)
class HiLoMoEConfig:
    """Shape of the experts and of their routing, shared by every HiLoMoE module.

    Args:
        num_layers (int): L, layers of experts.
        num_experts (int): K, rank-1 experts of one layer.
        top_k (int | None): experts kept in each layer, their scores renormalised; None is the
            dense softmax.
        tied_keys (bool): the keys are V of the (first) linear and the query is its input, with no
            parameters of the router's own; else keys and a projection of the query are learned.
        query_dim (int | None): features of query and keys where they are untied; None is the
            router's ``in_features``, at most 64 [R]: projecting to the full width would cost as
            much as a linear of that width.
        query_dropout (float): dropout on the query.
        expert_dropout (float): dropout on each expert's contribution to a linear; all tokens of a
            sample share its mask.
        gate_scale (float | None): factor on the scores inside a linear; None is K, for a mean
            gate of 1 [R].
        recompute (bool): in training, keep no activations of query and experts for the backward
            pass, but compute them again: less memory for one more forward of the layer. The query
            is then always formed, never replaced by projected keys, so that scores may round
            otherwise.

    Raises:
        ValueError: a value is of another type or out of range; the message names its field.

    Example:
        >>> HiLoMoEConfig(num_layers=2, num_experts=8, top_k=2).top_k
        2
        >>> HiLoMoEConfig(num_experts=4, top_k=5)
        Traceback (most recent call last):
        ...
        ValueError: top_k must lie in 1..num_experts (4), got 5
    """

    __pydantic_config__ = STRICT

    num_layers: int = 3
    num_experts: int = 8
    top_k: int | None = None
    tied_keys: bool = False
    query_dim: int | None = None
    query_dropout: float = 0.0
    expert_dropout: float = 0.0
    gate_scale: float | None = None
    recompute: bool = False

    def __post_init__(self) -> None:
        for name in ("tied_keys", "recompute"):
            check_type(name, getattr(self, name), bool)
        for name in ("num_layers", "num_experts"):
            check_whole(name, getattr(self, name), at_least=1)
        if self.top_k is not None:
            check_type("top_k", self.top_k, Integral)
            if not 1 <= self.top_k <= self.num_experts:
                raise ValueError(
                    f"top_k must lie in 1..num_experts ({self.num_experts}), got {self.top_k}"
                )
        if self.query_dim is not None:
            check_whole("query_dim", self.query_dim, at_least=1)
        if self.query_dim is not None and self.tied_keys:
            raise ValueError("query_dim has no meaning with tied_keys: leave one of them out")
        for name in ("query_dropout", "expert_dropout"):
            check_type(name, getattr(self, name), Real)
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.gate_scale is not None:
            check_type("gate_scale", self.gate_scale, Real)
            if not 0.0 < self.gate_scale < math.inf:
                raise ValueError(f"gate_scale must be positive and finite, got {self.gate_scale}")
