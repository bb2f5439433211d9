"""Hierarchical routing in score space: the same algebra, with only K-sized work in sequence."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Compute capabilities of GPUs on which the Triton kernel was measured to take less time.
_KERNEL_IS_FASTER_ON: frozenset[tuple[int, int]] = frozenset()


def route(
    query: Tensor, keys: Tensor, top_k: int | None = None, gram: Tensor | None = None
) -> tuple[Tensor, Tensor]:
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
        gram (Tensor | None): :func:`gram_matrix` of the keys, where it is known already.

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
    if torch.jit.is_scripting() or query_space_is_cheaper(num_layers, num_experts, query_dim):
        return _route_in_query_space(query, keys, top_k)
    scaled_keys = keys.flatten(0, 1) * (1.0 / math.sqrt(query_dim))  # [LK, D_q]
    first_terms = _matmul(scaled_keys, query.t())  # [LK, B]
    if gram is None:
        gram = gram_matrix(keys)
    return _route_in_score_space(first_terms, gram, num_layers, top_k)


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


def kernel_is_cheaper(first_terms: Tensor, top_k: int | None) -> bool:
    """Whether the score recurrence runs as one Triton kernel.

    No GPU was at hand to time it: until one is measured and listed, the answer is no. The kernel
    itself is tested in Triton's interpreter, and compiles for compute capability 8.0 and 9.0.

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


@torch.jit.unused
def _route_in_score_space(
    first_terms: Tensor, gram: Tensor, num_layers: int, top_k: int | None
) -> tuple[Tensor, Tensor]:
    scores, logits = _ScoreRecurrence.apply(first_terms, gram, num_layers, top_k)
    return scores, logits


class _ScoreRecurrence(torch.autograd.Function):
    r"""Scores from first terms ``[LK, B]`` and the Gram matrix ``[LK, LK]``.

    Experts lead and samples trail, so that softmax and products run along the batch. Layers are
    halved again and again: once the first half of a block has its scores, one product adds them to
    the logits of the second half. Differentiated by hand, because autograd would copy every slice
    that these products update in place.
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
            scores = _recurrence(logits, gram, num_layers, top_k)
        ctx.save_for_backward(scores, gram)
        ctx.num_layers = num_layers
        ctx.set_materialize_grads(False)
        # The linears multiply by the scores row by row; the logits serve reductions alone.
        return (
            scores.t().contiguous().unflatten(1, (num_layers, -1)),
            logits.t().unflatten(1, (num_layers, -1)),
        )

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_scores: Tensor | None, grad_logits: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        scores, gram = ctx.saved_tensors
        num_experts = scores.size(0) // ctx.num_layers
        from_scores = _experts_first(grad_scores, scores)
        from_logits = _experts_first(grad_logits, scores)
        grad_gram = torch.zeros_like(gram)
        for layer in reversed(range(ctx.num_layers)):
            here = slice(layer * num_experts, (layer + 1) * num_experts)
            from_logits[here] += torch._softmax_backward_data(
                from_scores[here], scores[here], 0, scores.dtype
            )
            if layer > 0:
                first, second = _halves(layer, ctx.num_layers, num_experts)
                from_scores[first].addmm_(gram[second, first].t(), from_logits[second])
                grad_gram[second, first].addmm_(from_logits[second], scores[first].t())
        return from_logits, grad_gram, None, None


def _recurrence(logits: Tensor, gram: Tensor, num_layers: int, top_k: int | None) -> Tensor:
    """Turns first terms ``[LK, B]`` into logits, and gives the scores."""
    num_experts = logits.size(0) // num_layers
    scores = torch.empty_like(logits)
    for layer in range(num_layers):
        here = slice(layer * num_experts, (layer + 1) * num_experts)
        if layer > 0:
            first, second = _halves(layer, num_layers, num_experts)
            logits[second].addmm_(gram[second, first], scores[first])
        scores[here] = _gate(logits[here], top_k)
    return scores


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


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` at full precision: autocast leaves in-place products alone, scripted ones too."""
    return a.new_empty([a.size(0), b.size(1)]).addmm_(a, b, beta=0)


def _gate(logits: Tensor, top_k: int | None) -> Tensor:
    """Softmax of ``[K, B]`` over the experts, or over the ``top_k`` largest of each sample."""
    if top_k is None or top_k == logits.size(0):
        return logits.softmax(0)
    kept, experts = logits.topk(top_k, 0)
    return torch.zeros_like(logits).scatter_(0, experts, kept.softmax(0))


def _experts_first(grad: Tensor | None, like: Tensor) -> Tensor:
    """A gradient ``[B, L, K]`` as ``[LK, B]``, in memory of its own; zeros where there is none."""
    if grad is None:
        return torch.zeros_like(like)
    return torch.empty_like(like).copy_(grad.flatten(1).t())
