"""Auxiliary losses of hierarchical routing, over the global batch under distributed training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from torchrec_hilomoe.config import STRICT
from torchrec_hilomoe.modules.checks import check_number
from torchrec_hilomoe.modules.linear import RoutedLinear
from torchrec_hilomoe.modules.router import HierarchicalRouter, Routing


class _BatchMeans(NamedTuple):
    """What the losses need to know of a batch, as means over its samples."""

    dispatch: Tensor  # [L, K], f: share of the samples dispatched to each expert, no gradient
    importance: Tensor  # [L, K], P: mean score of each expert
    squared_lse: Tensor  # [L], logsumexp(logits)^2


class _Wanted(NamedTuple):
    """Which of these are needed; the others are left at 0, without a gradient."""

    load_balance: bool = False
    z_loss: bool = False


def load_balance_loss(
    routing: Routing, top_k: int | None = None, group: dist.ProcessGroup | None = None
) -> Tensor:
    r"""Draws the experts of each layer towards equal use.

    .. math:: \sum_l K \sum_k f_k^{(l)} P_k^{(l)}

    with P the mean score and f the share of samples dispatched to an expert, without gradient
    [P: the loss; R: the sum over layers]. With ``top_k`` below K a sample is dispatched to its
    kept experts of a score above 0, as much to each; in dense routing to the expert of its highest
    score. Equal use gives L, all samples on one expert of each layer L K.

    Where ``torch.distributed`` is initialised, f and P are means over the global batch, of equal
    or unequal parts: the value is the same on every rank, and the gradient is right once averaged
    over ranks, as DDP does.

    Args:
        routing (Routing): scores, ``[B, L, K]``.
        top_k (int | None): of the router.
        group (dist.ProcessGroup | None): ranks that share the batch; None is the default group.

    Returns:
        Tensor: scalar; 0 for a routing of no samples.

    Example:
        >>> uniform = Routing(torch.full((6, 3, 4), 0.25), torch.zeros(6, 3, 4))
        >>> load_balance_loss(uniform)
        tensor(3.)
    """
    means = _batch_means([routing], [top_k], _Wanted(load_balance=True), group)
    return _load_balance(means[0])


def z_loss(routing: Routing, group: dist.ProcessGroup | None = None) -> Tensor:
    r"""Keeps logits small: the mean of :math:`\mathrm{logsumexp}(z^{(l)})^2`, summed over layers.

    Over the logits before any top-k mask; over the global batch, like :func:`load_balance_loss`.

    Args:
        routing (Routing): logits, ``[B, L, K]``.
        group (dist.ProcessGroup | None): ranks that share the batch; None is the default group.

    Returns:
        Tensor: scalar; 0 for a routing of no samples.
    """
    means = _batch_means([routing], [None], _Wanted(z_loss=True), group)
    return means[0].squared_lse.sum()


def expert_diversity_loss(expert_v: Tensor) -> Tensor:
    r"""Keeps the experts of one layer from becoming parallel [R].

    The mean over pairs of :math:`\cos^2(v_i, v_j)`, summed over layers: 0 where the experts of
    every layer are orthogonal, L where they are all parallel.

    Args:
        expert_v (Tensor): V, ``[L, K, d]``.

    Returns:
        Tensor: scalar; 0 for K = 1.

    Example:
        >>> expert_diversity_loss(torch.eye(4).expand(3, 4, 4))
        tensor(0.)
    """
    num_experts = expert_v.size(1)
    directions = F.normalize(expert_v, dim=-1)
    cosines = directions @ directions.transpose(1, 2)  # [L, K, K]
    pairs = cosines.square().triu(diagonal=1).sum()
    return pairs / max(num_experts * (num_experts - 1) / 2, 1)


@dataclass(frozen=True)
class AuxiliaryLossConfig:
    """Weights of the auxiliary losses; a loss of weight 0 is not computed.

    Args:
        load_balance (float): of :func:`load_balance_loss`.
        z_loss (float): of :func:`z_loss`.
        diversity (float): of :func:`expert_diversity_loss`.

    Raises:
        ValueError: a weight is no number, negative or not finite.
    """

    __pydantic_config__ = STRICT

    load_balance: float = 1e-3
    z_loss: float = 0.0
    diversity: float = 0.0

    def __post_init__(self) -> None:
        for name in ("load_balance", "z_loss", "diversity"):
            check_number(name, getattr(self, name))


class AuxiliaryLosses(NamedTuple):
    """Auxiliary losses of one training step, scalars.

    Attributes:
        load_balance (Tensor): unweighted, summed over routers.
        z_loss (Tensor): unweighted, summed over routers.
        diversity (Tensor): unweighted, summed over linears with experts.
        total (Tensor): the weighted sum, to be added to the task loss.
    """

    load_balance: Tensor
    z_loss: Tensor
    diversity: Tensor
    total: Tensor


class AuxiliaryLoss(nn.Module):
    """The auxiliary losses of every router and expert of a model, after its forward.

    Reads the routing that each :class:`HierarchicalRouter` keeps in training mode, so the losses
    need no way through the model's outputs. They are 0 in evaluation mode, while all experts are
    disabled, and where their weight is 0. The statistics of all routers travel in one all-reduce.

    Has no inputs: tracers have to take it for a leaf, as TorchRec's pipelines do, and the modules
    that own the routers as well. Set the mode of the whole model at once, this module with it. A
    layer that runs twice in one forward counts with its last run. One that a forward leaves out
    still has the routing of its run before: call ``skip()`` of its router instead of the layer.
    One whose last run was without gradients, as under reentrant activation checkpointing, has no
    gradient of these losses: use ``use_reentrant=False``.

    A collective: every rank has to call it equally often, also under DDP's ``join()``, which it
    does not know. With tied keys, FSDP2's ``fully_shard`` takes whole MLPs and cross nets, not
    single linears of them.

    Args:
        model (nn.Module): its routers and experts are found once, here. They stay the model's
            own: state dict and parameters of this module are empty.
        config (AuxiliaryLossConfig): the weights.
        process_group (dist.ProcessGroup | None): ranks that share the batch; None is the default
            group where ``torch.distributed`` is initialised.

    Raises:
        TypeError: ``config`` is no :class:`AuxiliaryLossConfig`.

    Example:
        >>> from torchrec_hilomoe.modules import HiLoMoEConfig, HiLoMoELinear
        >>> model = HiLoMoELinear(16, 8, HiLoMoEConfig(num_layers=3, num_experts=4))
        >>> auxiliary_loss = AuxiliaryLoss(model, AuxiliaryLossConfig())
        >>> output = model(torch.randn(5, 16))
        >>> bool(auxiliary_loss().load_balance > 0)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        config: AuxiliaryLossConfig,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, AuxiliaryLossConfig):
            raise TypeError(f"config must be an AuxiliaryLossConfig, got {config!r}")
        self.config = config
        self.process_group = process_group
        # Tuples, not module lists: a second registration would repeat names in the state dict.
        modules = tuple(model.modules())
        self._routers = tuple(m for m in modules if isinstance(m, HierarchicalRouter))
        self._linears = tuple(m for m in modules if isinstance(m, RoutedLinear))

    def forward(self) -> AuxiliaryLosses:
        """Computes the losses of the last training forward.

        Returns:
            AuxiliaryLosses: each loss unweighted, and their weighted total.
        """
        zero = torch.zeros(())
        load_balance = squared_lse = diversity = zero
        wanted = _Wanted(self.config.load_balance > 0.0, self.config.z_loss > 0.0)
        if self.training and self._routers and any(wanted):
            routings = [router.routing for router in self._routers]
            top_ks = [router.config.top_k for router in self._routers]
            means = _batch_means(routings, top_ks, wanted, self.process_group)
            load_balance = torch.stack([_load_balance(m) for m in means]).sum()
            squared_lse = torch.stack([m.squared_lse.sum() for m in means]).sum()
        experts = [linear.expert_v for linear in self._linears if linear.experts_enabled]
        if self.training and experts and self.config.diversity:
            whole = [v.full_tensor() if isinstance(v, DTensor) else v for v in experts]  # of FSDP2
            diversity = torch.stack([expert_diversity_loss(v) for v in whole]).sum()
        total = (
            self.config.load_balance * load_balance
            + self.config.z_loss * squared_lse
            + self.config.diversity * diversity
        )
        return AuxiliaryLosses(load_balance, squared_lse, diversity, total)

    def extra_repr(self) -> str:
        """Weights, as printed by ``repr``."""
        return (
            f"load_balance={self.config.load_balance}, z_loss={self.config.z_loss}, "
            f"diversity={self.config.diversity}"
        )


def _load_balance(means: _BatchMeans) -> Tensor:
    return means.dispatch.size(1) * (means.dispatch * means.importance).sum()


def _batch_means(
    routings: Sequence[Routing],
    top_ks: Sequence[int | None],
    wanted: _Wanted,
    group: dist.ProcessGroup | None,
) -> list[_BatchMeans]:
    """Means over the batch of all ranks, of each routing, by one all-reduce of sums and counts."""
    sums = [
        _batch_sums(routing, top_k, wanted) for routing, top_k in zip(routings, top_ks, strict=True)
    ]
    # Routers that have not run may be on CPU.
    device = next((s.device for s in sums if s.device.type != "cpu"), sums[0].device)
    totals = _sum_over_ranks(torch.cat([s.to(device) for s in sums]), group).split(
        [s.numel() for s in sums]
    )
    means = []
    for routing, total in zip(routings, totals, strict=True):
        num_layers, num_experts = routing.scores.shape[1:]
        flat = total[:-1] / total[-1].clamp(min=1)  # a routing of no samples gives 0
        sizes = [num_layers * num_experts, num_layers * num_experts, num_layers]
        dispatch, importance, squared_lse = flat.split(sizes)
        shape = (num_layers, num_experts)
        means.append(_BatchMeans(dispatch.view(shape), importance.view(shape), squared_lse))
    return means


def _batch_sums(routing: Routing, top_k: int | None, wanted: _Wanted) -> Tensor:
    """Sums over the samples of one rank and their count, ``[LK + LK + L + 1]``."""
    # A sum over samples soon leaves the range or the digits of half precision.
    scores, logits = (t if t.dtype == torch.float64 else t.float() for t in routing)
    num_samples, num_layers, num_experts = scores.shape
    dispatch = importance = scores.new_zeros((num_layers, num_experts))
    squared_lse = scores.new_zeros(num_layers)
    if wanted.load_balance:
        dense = top_k is None or top_k == num_experts  # all kept: their highest tells them apart
        dispatched = scores == scores.amax(dim=-1, keepdim=True) if dense else scores > 0
        # Ties share a sample.
        shares = dispatched.to(scores.dtype) / dispatched.sum(dim=-1, keepdim=True)
        dispatch = shares.sum(dim=0)
        importance = scores.sum(dim=0)
    if wanted.z_loss:
        squared_lse = logits.logsumexp(dim=-1).square().sum(dim=0)
    count = scores.new_full((1,), num_samples)
    return torch.cat([s.flatten() for s in (dispatch, importance, squared_lse, count)])


def _sum_over_ranks(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over ranks, whose gradient averaged over ranks is that of the sum.

    Each rank's gradient reaches its own part only, times the number of ranks, because DDP divides
    the sum of gradients by it.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return local
    total = local.detach().clone()
    dist.all_reduce(total, group=group)
    gradient = local * dist.get_world_size(group)
    return total + (gradient - gradient.detach())  # adds exactly 0
