"""The part of routing in score space that runs layer after layer, differentiated by hand."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Compute capabilities of GPUs on which the Triton kernel was measured to take less time (H200).
_KERNEL_IS_FASTER_ON = frozenset({(9, 0)})


@torch.jit.unused
def score_recurrence(
    first_terms: Tensor, gram: Tensor, num_layers: int, top_k: int | None
) -> tuple[Tensor, Tensor]:
    """Scores and logits of every layer from what the batch has of its own and what it shares.

    Can be differentiated once, the scores and the logits.

    Args:
        first_terms (Tensor): ``[LK, B]``.
        gram (Tensor): Gram matrix of the keys, ``[LK, LK]``.
        num_layers (int): L.
        top_k (int | None): experts kept in each layer; None keeps all.

    Returns:
        tuple[Tensor, Tensor]: scores and logits, ``[B, L, K]`` each.
    """
    # Views are made here: those of an autograd function cannot be changed in place.
    scores, logits = _ScoreRecurrence.apply(first_terms, gram, num_layers, top_k)
    return scores.unflatten(1, (num_layers, -1)), logits.t().unflatten(1, (num_layers, -1))


class _ScoreRecurrence(torch.autograd.Function):
    """Works on ``[LK, B]``, so that softmax and products run along the batch.

    Layers are halved again and again: once the first half of a block has its scores, one product
    adds them to the logits of the second half. Differentiated by hand, because autograd would copy
    every slice that these products update in place.
    """

    @staticmethod
    def forward(
        ctx: Any, first_terms: Tensor, gram: Tensor, num_layers: int, top_k: int | None
    ) -> tuple[Tensor, Tensor]:
        logits = first_terms.clone(memory_format=torch.contiguous_format)
        if kernel_is_cheaper(first_terms, top_k):
            from torchrec_hilomoe.ops.triton_routing import fused_recurrence  # triton loads slowly

            scores = fused_recurrence(logits, gram.contiguous(), num_layers)
        else:
            scores = recurrence(logits, gram, num_layers, top_k)
        ctx.save_for_backward(scores, gram)
        ctx.num_layers = num_layers
        ctx.set_materialize_grads(False)
        # The linears multiply by the scores row by row; the logits serve reductions alone.
        # Copied, since contiguous() makes an exported batch more than one sample.
        rows = scores.new_empty((scores.size(1), scores.size(0))).copy_(scores.t())
        return rows, logits

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_scores: Tensor | None, grad_logits: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        scores, gram = ctx.saved_tensors
        from_scores = _own(None if grad_scores is None else grad_scores.t(), scores)
        from_logits = _own(grad_logits, scores)
        grad_gram = torch.zeros_like(gram)
        recurrence_backward(from_scores, from_logits, scores, gram, grad_gram, ctx.num_layers)
        return from_logits, grad_gram, None, None


def recurrence(logits: Tensor, gram: Tensor, num_layers: int, top_k: int | None) -> Tensor:
    """Turns first terms into logits, layer after layer, and gives the scores.

    Args:
        logits (Tensor): first terms, ``[LK, B]``; become the logits.
        gram (Tensor): ``[LK, LK]``.
        num_layers (int): L.
        top_k (int | None): experts kept in each layer; None keeps all.

    Returns:
        Tensor: scores, ``[LK, B]``.
    """
    num_experts = logits.size(0) // num_layers
    scores = torch.empty_like(logits)
    for layer in range(num_layers):
        here = slice(layer * num_experts, (layer + 1) * num_experts)
        if layer > 0:
            first, second = _halves(layer, num_layers, num_experts)
            logits[second].addmm_(gram[second, first], scores[first])
        scores[here] = _gate(logits[here], top_k)
    return scores


def recurrence_backward(
    from_scores: Tensor,
    from_logits: Tensor,
    scores: Tensor,
    gram: Tensor,
    grad_gram: Tensor,
    num_layers: int,
) -> None:
    """Turns gradients of scores and logits into those of the first terms and the Gram matrix.

    Args:
        from_scores (Tensor): gradient that reaches the scores, ``[LK, B]``; is changed.
        from_logits (Tensor): gradient that reaches the logits, ``[LK, B]``; becomes that of the
            first terms.
        scores (Tensor): as :func:`recurrence` gave them, ``[LK, B]``.
        gram (Tensor): ``[LK, LK]``.
        grad_gram (Tensor): ``[LK, LK]``; the gradient of ``gram`` is added.
        num_layers (int): L.
    """
    num_experts = scores.size(0) // num_layers
    for layer in reversed(range(num_layers)):
        here = slice(layer * num_experts, (layer + 1) * num_experts)
        from_logits[here] += torch._softmax_backward_data(
            from_scores[here], scores[here], 0, scores.dtype
        )
        if layer > 0:
            first, second = _halves(layer, num_layers, num_experts)
            from_scores[first].addmm_(gram[second, first].t(), from_logits[second])
            grad_gram[second, first].addmm_(from_logits[second], scores[first].t())


def _halves(layer: int, num_layers: int, num_experts: int) -> tuple[slice, slice]:
    """Rows of the block that ``layer`` halves: the layers before it, and from it on.

    A block of ``2 p`` layers, p a power of two, is halved by its middle layer, an odd multiple of
    p. Over all layers, every pair of an earlier and a later layer lies in one block's halves.
    """
    half = layer & -layer
    stop = min(layer + half, num_layers)
    return (
        slice((layer - half) * num_experts, layer * num_experts),
        slice(layer * num_experts, stop * num_experts),
    )


def kernel_is_cheaper(first_terms: Tensor, top_k: int | None) -> bool:
    """Whether the score recurrence runs as one Triton kernel.

    On an H200 it took 0.10 to 0.94 of the device time of the separate operations
    (docs/performance.md). Until another GPU is measured and listed, the answer is no there.

    Args:
        first_terms (Tensor): ``[LK, B]``.
        top_k (int | None): experts kept in each layer.

    Returns:
        bool: True on the GPUs listed, for dense float32 routing outside of ``torch.compile``.
    """
    return (
        not torch.compiler.is_compiling()
        and first_terms.is_cuda
        and first_terms.dtype == torch.float32
        and top_k is None
        and torch.cuda.get_device_capability(first_terms.device) in _KERNEL_IS_FASTER_ON
        and importlib.util.find_spec("triton") is not None
    )


def _gate(logits: Tensor, top_k: int | None) -> Tensor:
    """Softmax of ``[K, B]`` over the experts, or over the ``top_k`` largest of each sample."""
    if top_k is None or top_k == logits.size(0):
        return logits.softmax(0)
    kept, experts = logits.topk(top_k, 0)
    return torch.zeros_like(logits).scatter_(0, experts, kept.softmax(0))


def _own(grad: Tensor | None, like: Tensor) -> Tensor:
    """A gradient in memory of its own; zeros where there is none."""
    return torch.zeros_like(like) if grad is None else torch.empty_like(like).copy_(grad)
