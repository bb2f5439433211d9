"""Hierarchical routing in score space: the same algebra, with only K-sized work in sequence."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrec_hilomoe.ops.query_recurrence import sparse_query_recurrence
from torchrec_hilomoe.ops.recurrence import score_recurrence


def route(query: Tensor, keys: Tensor, top_k: int | None = None) -> tuple[Tensor, Tensor]:
    r"""Scores and logits of every layer, equal to :func:`route_reference`.

    The update of the query adds keys, so it need never be formed. With the Gram blocks
    :math:`G^{(l,m)} = \kappa^{(l)} \kappa^{(m)\top} / \sqrt{D_q}`, which the batch shares,

    .. math:: z^{(l)} = q^{(1)} \kappa^{(l)\top} / \sqrt{D_q} + \sum_{m<l} s^{(m)} G^{(l,m)\top}

    One product gives the first term of all layers; the rest works on scores alone:
    :math:`B K^2 L (L - 1) / 2` multiply-adds in one product for each layer. Where there are so many
    experts that it takes longer (:func:`query_space_is_cheaper`), and in TorchScript, the query is
    updated instead.

    Half-precision inputs are routed in float32, under autocast too; float64 stays float64. The
    scores can be differentiated once.

    Args:
        query (Tensor): ``[B, D_q]``.
        keys (Tensor): ``[L, K, D_q]``.
        top_k (int | None): experts kept in each layer; None keeps all.

    Returns:
        tuple[Tensor, Tensor]: scores and logits (before any top-k mask), ``[B, L, K]`` each.

    Example:
        >>> scores, logits = route(torch.randn(5, 16), torch.randn(3, 4, 16), top_k=2)
        >>> scores.shape, (scores > 0).sum(-1).unique()
        (torch.Size([5, 3, 4]), tensor([2]))
    """
    if query.dtype != torch.float64:
        query, keys = query.float(), keys.float()
    num_layers, num_experts, query_dim = keys.shape
    if torch.jit.is_scripting():
        return _route_in_query_space(query, keys, top_k)
    if query_space_is_cheaper(num_layers, num_experts, query_dim):
        if top_k is None or top_k == num_experts:
            return _route_in_query_space(query, keys, top_k)
        return sparse_query_recurrence(query, keys, top_k)
    scaled_keys = keys.flatten(0, 1) * (1.0 / math.sqrt(query_dim))  # [LK, D_q]
    first_terms = _matmul(scaled_keys, query.t())  # [LK, B]
    return score_recurrence(first_terms, gram_matrix(keys), num_layers, top_k)


def route_projected(
    x: Tensor, weight: Tensor, bias: Tensor, keys: Tensor, top_k: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""Equal to ``route(F.linear(x, weight, bias), keys, top_k)``, without forming the query.

    Score space needs :math:`q \kappa^\top = x (\kappa W)^\top + \kappa b` alone: LK products with x
    instead of :math:`D_q`, and one small product of keys and weight for the whole batch. Worth it
    for few experts (:func:`projecting_keys_is_cheaper`).

    Args:
        x (Tensor): ``[B, d]``.
        weight (Tensor): W, ``[D_q, d]``.
        bias (Tensor): b, ``[D_q]``.
        keys (Tensor): ``[L, K, D_q]``, float32 or float64, like the rest.
        top_k (int | None): experts kept in each layer; None keeps all.

    Returns:
        tuple[Tensor, Tensor]: scores and logits, ``[B, L, K]`` each.
    """
    scaled_keys = keys.flatten(0, 1) * (1.0 / math.sqrt(keys.size(2)))  # [LK, D_q]
    key_bias = (scaled_keys @ bias).unsqueeze(1)
    first_terms = torch.addmm(key_bias, scaled_keys @ weight, x.t())  # [LK, B]
    return score_recurrence(first_terms, gram_matrix(keys), keys.size(0), top_k)


def projecting_keys_is_cheaper(
    batch_size: int, in_features: int, num_layers: int, num_experts: int, query_dim: int
) -> bool:
    """Whether :func:`route_projected` takes fewer multiply-adds than forming the query.

    Args:
        batch_size (int): B.
        in_features (int): d.
        num_layers (int): L.
        num_experts (int): K.
        query_dim (int): D_q.

    Returns:
        bool: False where routing runs in query space.

    Example:
        >>> [projecting_keys_is_cheaper(4096, 432, layers, 8, 64) for layers in (1, 3, 16)]
        [True, True, False]
    """
    if query_space_is_cheaper(num_layers, num_experts, query_dim):
        return False
    total = num_layers * num_experts
    with_query = batch_size * query_dim * (in_features + total)
    return (batch_size + query_dim) * total * in_features < with_query


def gram_matrix(keys: Tensor) -> Tensor:
    r"""Products of all keys, :math:`\kappa \kappa^\top / \sqrt{D_q}`, in float32 or float64.

    Args:
        keys (Tensor): ``[L, K, D_q]``.

    Returns:
        Tensor: ``[LK, LK]``.
    """
    flat_keys = keys.flatten(0, 1)
    if flat_keys.dtype != torch.float64:
        flat_keys = flat_keys.float()
    return _matmul(flat_keys * (1.0 / math.sqrt(keys.size(2))), flat_keys.t())


def query_space_is_cheaper(num_layers: int, num_experts: int, query_dim: int) -> bool:
    """Whether updating the query takes less time than working on scores alone.

    Beside the first terms, a sample costs ``L K D_q`` multiply-adds in query space and
    ``K^2 L (L - 1) / 2`` in score space; but query space also writes L queries and takes the
    softmax along rows of K numbers, which is slow for less than a vector register of them.

    Args:
        num_layers (int): L.
        num_experts (int): K.
        query_dim (int): D_q.

    Returns:
        bool: True for many experts or small queries, by measured times.

    Example:
        >>> [query_space_is_cheaper(3, k, query_dim=64) for k in (8, 16, 32)]
        [False, False, True]
    """
    return num_experts > 16 and num_layers * num_experts >= query_dim


def _route_in_query_space(query: Tensor, keys: Tensor, top_k: int | None) -> tuple[Tensor, Tensor]:
    """The recurrence of :func:`route_reference`, at full precision."""
    num_layers, num_experts, query_dim = keys.shape
    scale = 1.0 / math.sqrt(query_dim)
    all_scores: list[Tensor] = []
    all_logits: list[Tensor] = []
    for layer in range(num_layers):
        logits = _matmul(query, keys[layer].t() * scale)
        is_last = layer + 1 == num_layers
        if top_k is None or top_k == num_experts:
            scores = logits.softmax(1)
            if not is_last:
                query = query.clone().addmm_(scores, keys[layer])
        else:
            kept, experts = logits.topk(top_k, 1)
            kept = kept.softmax(1)
            scores = torch.zeros_like(logits).scatter_(1, experts, kept)
            if not is_last:
                query = query + F.embedding_bag(
                    experts, keys[layer], mode="sum", per_sample_weights=kept
                )
        all_scores.append(scores)
        all_logits.append(logits)
    return torch.stack(all_scores, dim=1), torch.stack(all_logits, dim=1)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` at full precision: autocast leaves in-place products alone, scripted ones too."""
    return a.new_empty([a.size(0), b.size(1)]).addmm_(a, b, beta=0)
