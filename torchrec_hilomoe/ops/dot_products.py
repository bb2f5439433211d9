"""Features, and the dot products of all their pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def with_dot_products(dense_features: Tensor, sparse_features: Tensor, padding: int = 0) -> Tensor:
    """The features of a sample one after the other, then the dot product of each pair, then zeros.

    In eager mode the features are written once and only the result is kept for the backward pass,
    which can be differentiated no further.

    Args:
        dense_features (Tensor): ``[B, D]``.
        sparse_features (Tensor): ``[B, F, D]``.
        padding (int): number of zeros.

    Returns:
        Tensor: ``[B, (F + 1) D + (F + 1) F / 2 + padding]``, the pairs as
        :func:`pairwise_dot_products` has them.

    Raises:
        RuntimeError: dense and sparse features differ in B or D.

    Example:
        >>> dense, sparse = torch.tensor([[1.0, 2.0]]), torch.tensor([[[3.0, 4.0], [5.0, 6.0]]])
        >>> with_dot_products(dense, sparse, padding=1)
        tensor([[ 1.,  2.,  3.,  4.,  5.,  6., 11., 17., 39.,  0.]])
    """
    if torch.jit.is_scripting():
        return _concatenated(dense_features, sparse_features, padding)
    else:  # noqa: RET505 - TorchScript compiles what follows a return, but no else of this
        by_hand = (
            not torch.compiler.is_compiling()
            and dense_features.dtype == sparse_features.dtype
            and sparse_features.size(1) > 0  # there are pairs
        )
        execution = _WithDotProducts.apply if by_hand else _concatenated
        return execution(dense_features, sparse_features, padding)


def concatenate(dense_features: Tensor, sparse_features: Tensor) -> Tensor:
    """The features of a sample one after the other.

    Args:
        dense_features (Tensor): ``[B, D]``.
        sparse_features (Tensor): ``[B, F, D]``.

    Returns:
        Tensor: ``[B, (F + 1) D]``.
    """
    # Not flattened first: torch.export would then take two samples and more only.
    return torch.cat((dense_features.unsqueeze(1), sparse_features), dim=1).flatten(1)


def pairwise_dot_products(features: Tensor) -> Tensor:
    """The dot product of each pair of features, once.

    Args:
        features (Tensor): ``[B, N, D]``.

    Returns:
        Tensor: ``[B, N (N - 1) / 2]``, the pairs (0, 1), (0, 2), ... (N - 2, N - 1).

    Example:
        >>> pairwise_dot_products(torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]))
        tensor([[11., 17., 39.]])
    """
    num_features = features.size(1)
    products = torch.bmm(features, features.transpose(1, 2)).flatten(1)
    # Built here and not kept: a buffer on meta would be lost in to_empty().
    pairs = torch.triu_indices(num_features, num_features, 1, device=features.device)
    return products.index_select(1, pairs[0] * num_features + pairs[1])


def _concatenated(dense_features: Tensor, sparse_features: Tensor, padding: int) -> Tensor:
    """The same by operations that compilers and autograd know."""
    features = torch.cat((dense_features.unsqueeze(1), sparse_features), dim=1)
    zeros = features.new_zeros((features.size(0), padding))
    return torch.cat((features.flatten(1), pairwise_dot_products(features), zeros), dim=1)


class _WithDotProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dense: Tensor, sparse: Tensor, padding: int) -> Tensor:
        num_features, dim = sparse.size(1) + 1, dense.size(1)
        num_pairs = num_features * (num_features - 1) // 2
        parts = [num_features * dim, num_pairs, padding]
        combined = dense.new_empty((dense.size(0), sum(parts)))
        flat, products, zeros = combined.split(parts, dim=1)
        features = flat.unflatten(1, (num_features, dim))  # a view
        # Not by assignment, which would broadcast features of other sizes.
        torch.cat((dense.unsqueeze(1), sparse), dim=1, out=features)
        products.copy_(pairwise_dot_products(features))
        zeros.zero_()
        ctx.save_for_backward(combined)
        ctx.parts, ctx.shape = parts, (num_features, dim)
        return combined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (combined,) = ctx.saved_tensors
        features = combined[:, : ctx.parts[0]].unflatten(1, ctx.shape)
        grad_flat, grad_products, _ = grad.split(ctx.parts, dim=1)
        # Of x_i . x_j goes x_j to x_i and x_i to x_j: a symmetric matrix for each sample.
        grad_pairs = grad_products.index_select(1, _pair_of(ctx.shape[0], grad.device).flatten())
        grad_pairs = grad_pairs.unflatten(1, (ctx.shape[0], -1))
        grad_pairs.diagonal(dim1=1, dim2=2).zero_()
        grad_features = torch.baddbmm(grad_flat.unflatten(1, ctx.shape), grad_pairs, features)
        return grad_features[:, 0], grad_features[:, 1:], None


def _pair_of(num_features: int, device: torch.device) -> Tensor:
    """``[N, N]``: the place of each pair among all, in both orders; 0 on the diagonal."""
    pairs = torch.triu_indices(num_features, num_features, 1, device=device)
    places = torch.zeros((num_features, num_features), dtype=torch.long, device=device)
    places[pairs[0], pairs[1]] = torch.arange(pairs.size(1), device=device)
    return places + places.t()
