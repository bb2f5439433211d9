"""Linear layers with hierarchically routed experts."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torchrec_hilomoe.modules.checks import check_whole
from torchrec_hilomoe.modules.config import HiLoMoEConfig
from torchrec_hilomoe.modules.router import HierarchicalRouter, Routing, has_hooks
from torchrec_hilomoe.ops import (
    gathering_is_cheaper,
    hilomoe_linear,
    self_routed_linear,
    self_routing_is_cheaper,
)

torch.fx.wrap("hilomoe_linear")


class RoutedLinear(nn.Module):
    r"""A linear layer whose experts follow a routing computed elsewhere.

    .. math:: y = W x + b + c \sum_l U^{(l)\top} \mathrm{diag}(s^{(l)}) V^{(l)} x

    with c the gate scale. ``weight`` and ``bias`` have the names, shapes and initial values of
    ``nn.Linear``, whose checkpoints load with ``strict=False``. U starts at 0, so that the output
    equals the dense layer's bit for bit, and V as N(0, 1/d) [R]. (Long sequences run on built
    weights, and large batches of float64 on tiles on CPU, equal up to rounding.) In place of a
    linear without bias, fill ``bias`` with 0, which its checkpoint lacks, and let it require no
    gradient.

    Args:
        in_features (int): d.
        out_features (int): o.
        config (HiLoMoEConfig): layers, experts, dropout and gate scale.
        device (torch.device | None): default compute device.
        dtype (torch.dtype | None): dtype of the parameters.

    Attributes:
        experts_enabled (bool): False leaves the experts out, at the cost of ``nn.Linear``.

    Raises:
        ValueError: there are no features in or out.

    Example:
        >>> config = HiLoMoEConfig(num_layers=3, num_experts=4)
        >>> router, linear = HierarchicalRouter(16, config), RoutedLinear(16, 8, config)
        >>> x = torch.randn(5, 16)
        >>> torch.equal(linear(x, router(x)), F.linear(x, linear.weight, linear.bias))
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: HiLoMoEConfig,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_whole("in_features", in_features, at_least=1)
        check_whole("out_features", out_features, at_least=1)
        self.in_features = in_features
        self.out_features = out_features
        self.top_k = config.top_k
        self.gate_scale = float(config.gate_scale or config.num_experts)
        self.recompute = config.recompute
        self.experts_enabled = True

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = parameter(out_features, in_features)
        self.bias = parameter(out_features)
        self.expert_u = parameter(config.num_layers, config.num_experts, out_features)
        self.expert_v = parameter(config.num_layers, config.num_experts, in_features)
        self.expert_dropout = nn.Dropout(config.expert_dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weight and bias as ``nn.Linear`` does, V as N(0, 1/d), and sets U to 0."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1.0 / math.sqrt(self.in_features)
        nn.init.uniform_(self.bias, -bound, bound)
        nn.init.zeros_(self.expert_u)
        nn.init.normal_(self.expert_v, std=bound)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Applies base and experts.

        Args:
            x (Tensor): ``[B, d]`` or ``[B, N, d]``.
            routing (Routing): of the same B samples, with no more than ``top_k`` scores above 0 in
                a layer; not read while the experts are disabled.

        Returns:
            Tensor: ``[B, o]`` or ``[B, N, o]``.

        Raises:
            ValueError: the routing is of another number of samples, layers or experts.
        """
        if not self.experts_enabled:
            return F.linear(x, self.weight, self.bias)
        if isinstance(x, Tensor):  # FX traces with proxies
            expected = (x.size(0), *self.expert_u.shape[:2])
            if routing.scores.shape != expected:
                raise ValueError(
                    f"routing of [samples, layers, experts] = {list(expected)} needed, got scores "
                    f"of {list(routing.scores.shape)}"
                )
        # On gates rather than on activations: the same product, and either execution can use it.
        gates = self.expert_dropout(routing.scores)
        experts = self.expert_u, self.expert_v, gates, self.gate_scale, self.top_k
        if self.recompute and self.training and isinstance(x, Tensor):  # FX traces with proxies
            linear = x, self.weight, self.bias
            return checkpoint(hilomoe_linear, *linear, *experts, use_reentrant=False)
        return hilomoe_linear(x, self.weight, self.bias, *experts)

    def extra_repr(self) -> str:
        """Sizes, as printed by ``repr``."""
        num_layers, num_experts = self.expert_u.shape[:2]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"num_layers={num_layers}, num_experts={num_experts}"
        )


class HiLoMoELinear(RoutedLinear):
    """A :class:`RoutedLinear` with a router of its own: stands wherever an ``nn.Linear`` is called.

    ``nn.MultiheadAttention`` takes the weight of its ``out_proj`` without a call, and would leave
    the experts out. ``nn.TransformerEncoder`` with padding needs ``enable_nested_tensor=False``.

    Args:
        in_features (int): d.
        out_features (int): o.
        config (HiLoMoEConfig): experts and routing.
        device (torch.device | None): default compute device.
        dtype (torch.dtype | None): dtype of the parameters.

    Example:
        >>> linear = HiLoMoELinear(16, 8, HiLoMoEConfig(num_layers=3, num_experts=4))
        >>> linear(torch.randn(5, 16)).shape, linear(torch.randn(5, 7, 16)).shape
        (torch.Size([5, 8]), torch.Size([5, 7, 8]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: HiLoMoEConfig,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, config, device, dtype)
        self.router = HierarchicalRouter(in_features, config, device, dtype)
        # In evaluation nn.TransformerEncoderLayer takes weight and bias of its linears and calls
        # none of them, experts left out, unless one has a hook.
        self.register_forward_pre_hook(_needs_the_call)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Routes each sample by its input, the mean of its tokens, and applies base and experts.

        Args:
            x (Tensor): ``[B, d]`` or ``[B, N, d]``.

        Returns:
            Tensor: ``[B, o]`` or ``[B, N, o]``.

        Raises:
            ValueError: x has another number of dimensions.
        """
        if not self._routes_itself(x):
            return super().forward(x, shared_routing(self.router, [self], x))
        experts = self.expert_u, self.expert_v, self.router.weights(), self.gate_scale, self.top_k
        y, *routing = self_routed_linear(x, self.weight, self.bias, *experts)
        self.router.routing = Routing(*routing)
        return y

    def _routes_itself(self, x: Tensor) -> bool:
        """Whether router and linear run as one operation, in training alone."""
        return (
            isinstance(x, Tensor)  # FX traces with proxies
            and self.experts_enabled
            and not self.expert_dropout.p
            and type(self.router).forward is HierarchicalRouter.forward
            and not has_hooks(self.router)
            and self_routing_is_cheaper(x, self.weight)
            and self.router.projects_keys(x)
            and (self.top_k is None or not gathering_is_cheaper(self.expert_u.size(1), self.top_k))
        )


def _needs_the_call(linear: nn.Module, inputs: tuple[Tensor]) -> None:
    pass


def shared_routing(router: HierarchicalRouter, linears: Iterable[nn.Module], x: Tensor) -> Routing:
    """The one routing of several linears, from the input of the first.

    Args:
        router (HierarchicalRouter): takes V of the first linear as keys where they are tied.
        linears (Iterable[nn.Module]): each a :class:`RoutedLinear`, in order of use.
        x (Tensor): ``[B, d]`` or ``[B, N, d]``; a sample is routed by the mean of its tokens.

    Returns:
        Routing: of no samples while the experts of every linear are disabled.

    Raises:
        ValueError: x has another number of dimensions.
    """
    linears = list(linears)
    if not any(linear.experts_enabled for linear in linears):
        if isinstance(x, Tensor):  # FX traces with proxies
            _check_shape(x)
        return router.skip()
    return router(mean_over_tokens(x), linears[0].expert_v if router.config.tied_keys else None)


@torch.fx.wrap
def mean_over_tokens(x: Tensor) -> Tensor:
    """The mean over the tokens of each sample.

    Args:
        x (Tensor): ``[B, d]`` or ``[B, N, d]``.

    Returns:
        Tensor: ``[B, d]``; flat inputs as they are, 0 for N = 0.

    Raises:
        ValueError: x has another number of dimensions.
    """
    _check_shape(x)
    if x.dim() == 2:
        return x
    # Not mean(): its backward would write a gradient of the size of x, where sum's is a view. A sum
    # of float16 soon leaves its range.
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    return (x.sum(dim=1, dtype=dtype) * (1.0 / max(x.size(1), 1))).to(x.dtype)


def _check_shape(x: Tensor) -> None:
    if x.dim() < 2 or x.dim() > 3:
        raise ValueError("x has the shape [B, d] or [B, N, d]: reshape it, a sample a row")
