"""The method as the paper writes it: one loop per layer and expert, readable and slow.

Everything fast in this package is tested for equality with these functions, gradients included.

Notation used throughout ``torchrec_hilomoe``:
    B: batch size
    N: tokens of one sample (1 where the input is ``[B, d]``)
    d, o: input and output features of a linear layer
    L: layers of experts
    K: experts of one layer
    D_q: features of the query and of the keys
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def route_reference(query: Tensor, keys: Tensor, top_k: int | None = None) -> tuple[Tensor, Tensor]:
    r"""Hierarchical routing by its recurrence on queries.

    .. math::
        z^{(l)} = q^{(l)} \kappa^{(l)\top} / \sqrt{D_q}, \quad
        s^{(l)} = \mathrm{softmax}(z^{(l)}), \quad
        q^{(l+1)} = q^{(l)} + \sum_k s_k^{(l)} \kappa_k^{(l)}

    A layer reads the scores of the layers before it, never their outputs [P]. With ``top_k`` the
    softmax runs over the kept logits alone, and every other score is 0 [R].

    Args:
        query (Tensor): q of the first layer, ``[B, D_q]``.
        keys (Tensor): :math:`\kappa`, ``[L, K, D_q]``.
        top_k (int | None): experts kept in each layer; None keeps all.

    Returns:
        tuple[Tensor, Tensor]: scores s and logits z, ``[B, L, K]`` each.
    """
    all_scores, all_logits = [], []
    for layer_keys in keys:
        logits = query @ layer_keys.t() / math.sqrt(keys.size(-1))
        if top_k is None:
            scores = logits.softmax(dim=-1)
        else:
            kept, experts = logits.topk(top_k, dim=-1)
            scores = torch.zeros_like(logits).scatter(-1, experts, kept.softmax(dim=-1))
        query = query + scores @ layer_keys
        all_scores.append(scores)
        all_logits.append(logits)
    return torch.stack(all_scores, dim=1), torch.stack(all_logits, dim=1)


def hilomoe_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expert_u: Tensor,
    expert_v: Tensor,
    scores: Tensor,
) -> Tensor:
    r"""A linear layer plus every rank-1 expert of every layer, weighted by its score.

    .. math:: y = W^{(0)} x + b + \sum_l \sum_k s_k^{(l)} u_k^{(l)} v_k^{(l)\top} x

    The experts of rank 1 and the shared base are the paper's [P]; that the layers add up is our
    reading [R].

    Args:
        x (Tensor): ``[B, d]`` or ``[B, N, d]``.
        weight (Tensor): :math:`W^{(0)}`, ``[o, d]``.
        bias (Tensor): b, ``[o]``.
        expert_u (Tensor): u of each expert, ``[L, K, o]``.
        expert_v (Tensor): v of each expert, ``[L, K, d]``.
        scores (Tensor): s of each sample, the same for all of its tokens, ``[B, L, K]``.

    Returns:
        Tensor: y, ``[B, o]`` or ``[B, N, o]``.
    """
    y = F.linear(x, weight, bias)
    num_layers, num_experts = scores.shape[1:]
    for layer in range(num_layers):
        for expert in range(num_experts):
            projected = x @ expert_v[layer, expert]  # [B] or [B, N]
            score = scores[:, layer, expert].view(-1, *[1] * (projected.dim() - 1))
            y = y + (score * projected).unsqueeze(-1) * expert_u[layer, expert]
    return y
