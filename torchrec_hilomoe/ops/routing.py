"""Hierarchical routing in score space: the same algebra, with only K-sized work in sequence."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def route(query: Tensor, keys: Tensor, top_k: int | None = None) -> tuple[Tensor, Tensor]:
    r"""Scores and logits of every layer, equal to :func:`route_reference`.

    The update of the query adds keys, so it need never be formed. With the Gram blocks
    :math:`G^{(l,m)} = \kappa^{(l)} \kappa^{(m)\top} / \sqrt{D_q}`, which the batch shares,

    .. math:: z^{(l)} = q^{(1)} \kappa^{(l)\top} / \sqrt{D_q} + \sum_{m<l} s^{(m)} G^{(l,m)\top}

    One product gives the first term of all layers; the rest works on scores alone:
    :math:`B K^2 L (L - 1) / 2` multiply-adds in L steps.

    Half-precision inputs are routed in float32, under autocast too; float64 stays float64.

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
    flat_keys = keys.flatten(0, 1)  # [LK, D_q]
    scaled_keys = flat_keys * (1.0 / math.sqrt(query_dim))

    # Experts lead and samples trail, so that a layer and all layers before it are contiguous.
    first_terms = _matmul(scaled_keys, query.t()).split(num_experts)  # L x [K, B]
    all_scores: list[Tensor] = []
    all_logits: list[Tensor] = []
    for layer in range(num_layers):
        logits = first_terms[layer]
        if layer > 0:
            start = layer * num_experts
            gram = _matmul(scaled_keys[start : start + num_experts], flat_keys[:start].t())
            logits = logits.clone().addmm_(gram, torch.cat(all_scores))
        all_scores.append(_gate(logits, top_k))
        all_logits.append(logits)
    return _samples_first(all_scores), _samples_first(all_logits)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` at full precision: autocast leaves in-place products alone, scripted ones too."""
    return a.new_zeros([a.size(0), b.size(1)]).addmm_(a, b)


def _gate(logits: Tensor, top_k: int | None) -> Tensor:
    """Softmax of ``[K, B]`` over the experts, or over the ``top_k`` largest of each sample."""
    if top_k is not None and top_k < logits.size(0):
        kept = logits.topk(top_k, dim=0).indices
        dropped = torch.ones_like(logits, dtype=torch.bool).scatter(0, kept, False)
        logits = logits.masked_fill(dropped, -math.inf)
    return logits.softmax(dim=0)


def _samples_first(layers: list[Tensor]) -> Tensor:
    """L tensors ``[K, B]`` as one ``[B, L, K]``, contiguous."""
    return torch.stack(layers).permute(2, 0, 1).contiguous()
