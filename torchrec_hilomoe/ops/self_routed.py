"""A linear layer, its few experts and its router at once, on tiles of samples."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchrec_hilomoe.ops.recurrence import recurrence, recurrence_backward
from torchrec_hilomoe.ops.routing import gram_matrix
from torchrec_hilomoe.ops.tiled import may_run_on_tiles, tiles


class RouterWeights(NamedTuple):
    """What a router has learned: ``keys`` and the query ``Linear(LayerNorm(x))``.

    Attributes:
        norm_weight (Tensor): of the layer norm, ``[d]``.
        norm_bias (Tensor): of the layer norm, ``[d]``.
        weight (Tensor): of the projection, ``[D_q, d]``.
        bias (Tensor): of the projection, ``[D_q]``.
        keys (Tensor): ``[L, K, D_q]``.
        eps (float): of the layer norm.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor
    bias: Tensor
    keys: Tensor
    eps: float


def self_routing_is_cheaper(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`self_routed_linear` takes this input, if keys are to be projected.

    Args:
        x (Tensor): input of the layer.
        weight (Tensor): ``[o, d]``.

    Returns:
        bool: True for ``[B, d]`` of the weight's dtype on CPU, without autocast and outside of
        ``torch.compile`` and ``torch.export``.
    """
    return x.dim() == 2 and may_run_on_tiles(x, weight)


def self_routed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expert_u: Tensor,
    expert_v: Tensor,
    router: RouterWeights,
    gate_scale: float = 1.0,
    top_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Scores by projected keys and the linear under them, both from one product with x.

    The logits need no normalised input. With the rows of :math:`P = \kappa W_q
    \mathrm{diag}(\gamma)` centred, so that they are orthogonal to the mean of x,

    .. math:: \mathrm{LayerNorm}(x) W_q^\top \kappa^\top
        = x P^\top / \sigma + \kappa W_q \beta, \quad [A \mid Z] = x [V; P]^\top

    and nothing of the size of x is written but the output and, in the backward pass, the gradient
    of x, which is complete at once. Worth it for few experts, where
    :func:`~torchrec_hilomoe.ops.projecting_keys_is_cheaper`.

    A mean of x that is large beside its deviation costs digits of the logits, about one more than
    rounding x itself does. Can be differentiated once. Equal to
    :func:`~torchrec_hilomoe.ops.route_projected` of the layer norm and
    :func:`~torchrec_hilomoe.ops.hilomoe_linear`.

    Args:
        x (Tensor): ``[B, d]``, float32 or float64, like the rest.
        weight (Tensor): ``[o, d]``.
        bias (Tensor): ``[o]``.
        expert_u (Tensor): ``[L, K, o]``.
        expert_v (Tensor): ``[L, K, d]``.
        router (RouterWeights): of the router.
        gate_scale (float): factor on every score in the linear.
        top_k (int | None): experts kept in each layer; None keeps all.

    Returns:
        tuple[Tensor, Tensor, Tensor]: output ``[B, o]``; scores and logits, ``[B, L, K]`` each.
    """
    scaled_keys = router.keys.flatten(0, 1) * (1.0 / math.sqrt(router.keys.size(2)))
    projected_keys = scaled_keys @ router.weight  # [LK, d]
    key_bias = projected_keys @ router.norm_bias + scaled_keys @ router.bias
    projection = projected_keys * router.norm_weight
    y, scores, logits = _SelfRouted.apply(
        x,
        weight,
        bias,
        expert_u * gate_scale,
        expert_v,
        projection - projection.mean(1, keepdim=True),
        key_bias.unsqueeze(1),
        gram_matrix(router.keys),
        router.eps,
        top_k,
    )
    experts = router.keys.shape[:2]
    return y, scores.t().unflatten(1, experts), logits.t().unflatten(1, experts)


class _SelfRouted(torch.autograd.Function):
    # All but x and y lie experts first, samples last, as the score recurrence has them.

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        expert_u: Tensor,
        expert_v: Tensor,
        projection: Tensor,
        key_bias: Tensor,
        gram: Tensor,
        eps: float,
        top_k: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_layers, batch = expert_u.size(0), x.size(0)
        u = expert_u.flatten(0, 1)
        rows = torch.cat((expert_v.flatten(0, 1), projection))  # [2 LK, d]
        y = x.new_empty((batch, weight.size(0)))
        products = x.new_empty((2, u.size(0), batch))  # [A | Z]
        scores, logits = torch.empty_like(products).unbind()
        mean, rstd = x.new_empty((2, batch)).unbind()
        for tile in tiles(x, y):
            x_tile, y_tile = x[tile], y[tile]
            torch.mm(rows, x_tile.t(), out=products.flatten(0, 1)[:, tile])
            torch.addmm(bias, x_tile, weight.t(), out=y_tile)
            # Its first result lives in the cache and is dropped.
            _, *moments = torch.native_layer_norm(x_tile, x.shape[1:], None, None, eps)
            mean[tile], rstd[tile] = (moment.flatten() for moment in moments)
            projected, keyed = products[:, :, tile]
            logits_tile = torch.addcmul(key_bias, keyed, rstd[tile])
            scores_tile = recurrence(logits_tile, gram, num_layers, top_k)
            torch.addmm(y_tile, (projected * scores_tile).t(), u, out=y_tile)
            scores[:, tile], logits[:, tile] = scores_tile, logits_tile
        ctx.save_for_backward(x, weight, expert_u, rows, gram, products, scores, mean, rstd)
        ctx.set_materialize_grads(False)
        return y, scores, logits

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_scores: Tensor | None, grad_logits: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, expert_u, rows, gram, products, scores, mean, rstd = ctx.saved_tensors
        num_layers, u = expert_u.size(0), expert_u.flatten(0, 1)
        if grad_y is None:
            grad_y = x.new_zeros((1, 1)).expand(x.size(0), weight.size(0))
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        # Returned as allocated: autograd adds in place to a gradient that is nobody's view.
        grad_x = x.new_empty(x.shape) if needs_x else None
        grad_weight, grad_u, grad_rows, grad_gram = (
            torch.zeros_like(t) for t in (weight, u, rows, gram)
        )
        grad_bias, grad_key_bias = weight.new_zeros(weight.size(0)), u.new_zeros((u.size(0), 1))
        for tile in tiles(x, grad_y):
            x_tile, grad_tile = x[tile], grad_y[tile]
            (projected, keyed), scores_tile = products[:, :, tile], scores[:, tile].contiguous()
            grad_products = x.new_empty((2, u.size(0), x_tile.size(0)))
            grad_gated = torch.mm(u, grad_tile.t(), out=torch.empty_like(scores_tile))
            torch.addmm(grad_u, projected * scores_tile, grad_tile, out=grad_u)
            torch.mul(grad_gated, scores_tile, out=grad_products[0])
            from_scores = grad_gated.mul_(projected)
            if grad_scores is not None:
                from_scores += grad_scores[:, tile]
            from_logits = torch.zeros_like(from_scores)
            if grad_logits is not None:
                from_logits += grad_logits[:, tile]
            recurrence_backward(from_scores, from_logits, scores_tile, gram, grad_gram, num_layers)
            grad_key_bias += from_logits.sum(1, keepdim=True)
            torch.mul(from_logits, rstd[tile], out=grad_products[1])
            grad_rows.addmm_(grad_products.flatten(0, 1), x_tile)
            if needs_weight:
                grad_weight.addmm_(grad_tile.t(), x_tile)
            grad_bias += grad_tile.sum(0)
            if grad_x is not None:
                torch.mm(grad_tile, weight, out=grad_x[tile])
                grad_x[tile].addmm_(grad_products.flatten(0, 1).t(), rows)
                # 1 / sigma depends on x too: its gradient is a multiple of x less its mean.
                grad_rstd = (from_logits * keyed).sum(0)
                pull = grad_rstd.mul_(rstd[tile].pow(3)).div_(-x.size(1))
                grad_x[tile].addcmul_(x_tile, pull.unsqueeze(1))
                grad_x[tile] -= (pull * mean[tile]).unsqueeze(1)
        grad_v, grad_projection = grad_rows.split(u.size(0))
        return (
            grad_x,
            grad_weight if needs_weight else None,
            grad_bias,
            grad_u.view_as(expert_u),
            grad_v.view(*expert_u.shape[:2], -1),
            grad_projection,
            grad_key_bias,
            grad_gram,
            None,
            None,
        )
