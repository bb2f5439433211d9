"""Experts by gathering: of many, only the few that a sample has kept are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def gathering_is_cheaper(num_experts: int, top_k: int) -> bool:
    """Whether gathering ``top_k`` experts of each layer takes less time than using all of them.

    A multiply-add on gathered rows was measured to take as long as 8 in a matrix product.

    Args:
        num_experts (int): K.
        top_k (int): experts with a score, in each layer.

    Returns:
        bool: True where :func:`gathered_experts_linear` is the cheaper one.

    Example:
        >>> [gathering_is_cheaper(k, top_k=4) for k in (8, 32, 64, 1024)]
        [False, False, True, True]
    """
    return num_experts > 8 * top_k


def gathered_experts_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expert_u: Tensor,
    expert_v: Tensor,
    scores: Tensor,
    gate_scale: float,
    top_k: int,
) -> Tensor:
    r"""The ``top_k`` experts of highest score in each layer, as an embedding bag.

    The kept rows of U, weighted by :math:`s\, v^\top x`, are summed by ``F.embedding_bag``: time
    and traffic grow with ``L top_k (d + o)`` a token, however many experts there are. Equal to
    :func:`hilomoe_linear` where no layer has more than ``top_k`` scores above 0.

    Can be differentiated once (not at all in TorchScript).

    Args:
        x (Tensor): ``[B, d]`` or ``[B, N, d]``.
        weight (Tensor): ``[o, d]``.
        bias (Tensor): ``[o]``.
        expert_u (Tensor): ``[L, K, o]``.
        expert_v (Tensor): ``[L, K, d]``.
        scores (Tensor): ``[B, L, K]``.
        gate_scale (float): factor on every score.
        top_k (int): experts kept in each layer.

    Returns:
        Tensor: ``[B, o]`` or ``[B, N, o]``.
    """
    kept, experts = scores.topk(top_k, dim=-1)  # [B, L, top_k]
    first_rows = torch.arange(scores.size(1), device=scores.device) * scores.size(2)
    rows = (experts + first_rows.view(-1, 1)).flatten(1)  # [B, J], J = L top_k
    gates = (kept.flatten(1) * gate_scale).to(expert_u.dtype)
    if x.dim() == 3:
        rows = rows.repeat_interleave(x.size(1), dim=0)  # [BN, J]
        gates = gates.repeat_interleave(x.size(1), dim=0)
    tokens = x.flatten(0, -2)
    y = F.linear(tokens, weight, bias)
    u, v = expert_u.flatten(0, 1), expert_v.flatten(0, 1)
    tokens = tokens.to(v.dtype)
    if torch.jit.is_scripting():
        experts_y = _weighted_sums(rows, _dot_products(rows, v, tokens) * gates, u)
    else:
        experts_y = _gathered_experts(tokens, u, v, rows, gates)
    return (y + experts_y.to(y.dtype)).view(x.shape[:-1] + y.shape[-1:])


@torch.jit.unused
def _gathered_experts(tokens: Tensor, u: Tensor, v: Tensor, rows: Tensor, gates: Tensor) -> Tensor:
    return _GatheredExperts.apply(tokens, u, v, rows, gates)


class _GatheredExperts(torch.autograd.Function):
    # Autograd of the same would copy the kept rows of V for every token, J times the size of x.

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, u: Tensor, v: Tensor, rows: Tensor, gates: Tensor
    ) -> Tensor:
        projected = _dot_products(rows, v, tokens)
        ctx.save_for_backward(tokens, u, v, rows, gates, projected)
        return _weighted_sums(rows, projected * gates, u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        tokens, u, v, rows, gates, projected = ctx.saved_tensors
        grad_y = grad_y.contiguous()
        grad_gated = _dot_products(rows, u, grad_y)
        grad_projected = grad_gated * gates
        sorted_rows, order = rows.flatten().sort()
        starts = torch.searchsorted(sorted_rows, torch.arange(len(u), device=rows.device))
        bags = order // rows.size(1), starts  # for each expert, the tokens that kept it
        return (
            _weighted_sums(rows, grad_projected, v),
            _expert_sums(bags, (projected * gates).flatten()[order], grad_y),
            _expert_sums(bags, grad_projected.flatten()[order], tokens),
            None,
            grad_gated * projected,
        )


def _weighted_sums(rows: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """``[T, n]``: for each token the sum of its rows of ``table`` times their weights."""
    return F.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)


def _expert_sums(bags: tuple[Tensor, Tensor], weights: Tensor, tokens: Tensor) -> Tensor:
    """``[LK, n]``: for each expert the weighted sum of the tokens in its bag."""
    return F.embedding_bag(bags[0], tokens, bags[1], mode="sum", per_sample_weights=weights)


def _dot_products(rows: Tensor, table: Tensor, tokens: Tensor) -> Tensor:
    """``[T, J]``: each token times each of its rows of ``table``.

    The gradient of :func:`_weighted_sums` in its weights, which ATen has in closed form.
    """
    bag_of = torch.arange(rows.size(0), device=rows.device).repeat_interleave(rows.size(1))
    starts = torch.arange(0, rows.numel(), rows.size(1), device=rows.device)
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        tokens.contiguous(), table, rows.flatten(), starts, bag_of, 0
    )
    return products.view(rows.shape)
