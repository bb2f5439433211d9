"""Routing by its recurrence on queries, of many experts few kept, differentiated by hand."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@torch.jit.unused
def sparse_query_recurrence(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Scores and logits of every layer, by updating the query from layer to layer.

    Can be differentiated once, the scores and the logits. Products with all keys are left in the
    backward pass only where the logits have a gradient.

    Args:
        query (Tensor): ``[B, D_q]``.
        keys (Tensor): ``[L, K, D_q]``.
        top_k (int): experts kept in each layer, fewer than K.

    Returns:
        tuple[Tensor, Tensor]: scores and logits, ``[B, L, K]`` each, layer by layer in memory.
    """
    scores, logits = _SparseRecurrence.apply(query, keys, top_k)
    return scores.transpose(0, 1), logits.transpose(0, 1)


class _SparseRecurrence(torch.autograd.Function):
    # Writes every result once, into its place; autograd would stack the layers, and scatter the
    # gradients of the kept scores among zeros. Products in place are left alone by autocast.

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        num_layers, num_experts, _ = keys.shape
        logits = query.new_empty((num_layers, query.size(0), num_experts))
        scores = torch.zeros_like(logits)
        queries, all_kept, all_experts = [query], [], []
        for layer, layer_keys in enumerate(keys):
            logits[layer].addmm_(queries[-1], layer_keys.t(), beta=0, alpha=_scale(keys))
            kept, experts = logits[layer].topk(top_k, 1)
            kept = kept.softmax(1)
            scores[layer].scatter_(1, experts, kept)
            update = F.embedding_bag(experts, layer_keys, mode="sum", per_sample_weights=kept)
            queries.append(update.add_(queries[-1]))
            all_kept.append(kept)
            all_experts.append(experts)
        ctx.save_for_backward(keys, *queries[:-1], *all_kept, *all_experts)
        ctx.set_materialize_grads(False)
        return scores, logits

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_scores: Tensor | None, grad_logits: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        keys, *layers = ctx.saved_tensors
        num_layers = len(keys)
        queries, all_kept, all_experts = (
            layers[start : start + num_layers] for start in range(0, 3 * num_layers, num_layers)
        )
        grad_query, grad_keys = torch.zeros_like(queries[0]), torch.zeros_like(keys)
        for layer in reversed(range(num_layers)):
            query, kept, experts = queries[layer], all_kept[layer], all_experts[layer]
            kept_keys = keys[layer][experts]  # [B, top_k, D_q]
            from_kept = (kept_keys * grad_query.unsqueeze(1)).sum(2)
            if grad_scores is not None:
                from_kept += grad_scores[layer].gather(1, experts)
            from_kept = torch._softmax_backward_data(from_kept, kept, 1, kept.dtype)
            grad_kept_keys = kept.unsqueeze(2) * grad_query.unsqueeze(1)
            if grad_logits is None:
                from_kept *= _scale(keys)
                grad_kept_keys.addcmul_(from_kept.unsqueeze(2), query.unsqueeze(1))
                grad_query += (kept_keys * from_kept.unsqueeze(2)).sum(1)
            else:
                from_logits = grad_logits[layer].scatter_add(1, experts, from_kept)
                grad_keys[layer].addmm_(from_logits.t(), query, alpha=_scale(keys))
                grad_query.addmm_(from_logits, keys[layer], alpha=_scale(keys))
            grad_keys[layer].index_add_(0, experts.flatten(), grad_kept_keys.flatten(0, 1))
        return grad_query, grad_keys, None


def _scale(keys: Tensor) -> float:
    """Of products with keys of D_q features."""
    return 1.0 / math.sqrt(keys.size(-1))
