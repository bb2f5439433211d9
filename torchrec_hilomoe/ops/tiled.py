"""A linear layer and its experts on tiles of samples that stay in the CPU's cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# For each thread. Of x and y together: 1.6 MB in float32. Times are flat from 1 to 2 MB.
_TILE_NUMEL = 400_000
# Likewise. With less, the number of operations shows, and that every tile reads the weight.
_TILE_TOKENS = 1500


def tiling_is_cheaper(x: Tensor, weight: Tensor, scores: Tensor) -> bool:
    """Whether :func:`tiled_experts_linear` takes these inputs and saves memory traffic on them.

    Args:
        x (Tensor): ``[B, d]`` or ``[B, N, d]``.
        weight (Tensor): ``[o, d]``.
        scores (Tensor): ``[B, L, K]``.

    Returns:
        bool: True on CPU for one dtype and more than one tile, without autocast and outside of
        ``torch.compile`` and ``torch.export``. Tiles grow with the threads, which all work on one.
    """
    return (
        may_run_on_tiles(x, weight)
        and weight.dtype == scores.dtype
        and _num_tiles(x, weight.size(0)) > 1
    )


def may_run_on_tiles(x: Tensor, weight: Tensor) -> bool:
    """Whether cutting x into tiles leaves the base's output as it is.

    Args:
        x (Tensor): ``[B, ..., d]``.
        weight (Tensor): ``[o, d]``.

    Returns:
        bool: True on CPU for one dtype, without autocast and outside of ``torch.compile`` and
        ``torch.export``. Bit for bit, but in float64, whose products round otherwise with another
        number of rows. One output feature, a product with a vector, does so in every dtype.
    """
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and weight.size(0) > 1
        and not torch.is_autocast_enabled("cpu")
    )


def tiled_experts_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expert_u: Tensor,
    expert_v: Tensor,
    scores: Tensor,
    gate_scale: float = 1.0,
) -> Tensor:
    r"""The products of :func:`stacked_experts_linear`, all of them on one tile after the other.

    Experts add few multiply-adds, but each of their products reads x or writes y anew. On tiles
    these come from the cache for all but the first product, in the backward pass too, and
    :math:`V x` (``[BN, LK]``) is the only intermediate result that is kept.

    Can be differentiated once. Arguments and result as in :func:`hilomoe_linear`.
    """
    return _TiledExperts.apply(x, weight, bias, expert_u, expert_v, scores, gate_scale)


class _TiledExperts(torch.autograd.Function):
    # Products with out= run in the dtype of their inputs under any autocast.

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        expert_u: Tensor,
        expert_v: Tensor,
        scores: Tensor,
        gate_scale: float,
    ) -> Tensor:
        samples = x if x.dim() == 3 else x.unsqueeze(1)  # [B, N, d]
        u, v = expert_u.flatten(0, 1), expert_v.flatten(0, 1)  # [LK, o], [LK, d]
        gates = (scores.flatten(1) * gate_scale).unsqueeze(1)  # [B, 1, LK]
        # Returned as allocated: what is a view here could not be changed in place, by a ReLU say.
        y = x.new_empty([*x.shape[:-1], weight.size(0)])
        projected = x.new_empty([*samples.shape[:2], v.size(0)])
        for tile in tiles(samples, y):
            x_tile = samples[tile].flatten(0, 1)
            y_tile = y[tile].view(x_tile.size(0), y.size(-1))
            torch.mm(x_tile, v.t(), out=projected[tile].flatten(0, 1))
            gated = (projected[tile] * gates[tile]).flatten(0, 1)
            torch.addmm(bias, x_tile, weight.t(), out=y_tile)
            torch.addmm(y_tile, gated, u, out=y_tile)
        ctx.save_for_backward(x, weight, expert_u, expert_v, scores, projected)
        ctx.gate_scale = gate_scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, expert_u, expert_v, scores, projected = ctx.saved_tensors
        samples = x if x.dim() == 3 else x.unsqueeze(1)
        grad_y = grad_output.reshape(*samples.shape[:2], weight.size(0))
        u, v = expert_u.flatten(0, 1), expert_v.flatten(0, 1)
        gates = (scores.flatten(1) * ctx.gate_scale).unsqueeze(1)

        needs_x, needs_weight, *_ = ctx.needs_input_grad
        # Returned as allocated: autograd adds in place to a gradient that is nobody's view.
        grad_x = x.new_empty(x.shape) if needs_x else None
        grad_samples = None if grad_x is None else grad_x.view(samples.shape)
        grad_weight, grad_u, grad_v = (torch.zeros_like(t) for t in (weight, u, v))
        grad_bias = weight.new_zeros(weight.size(0))
        grad_gates = torch.zeros_like(gates)  # there may be no tile
        for tile in tiles(samples, grad_y):
            x_tile, grad_tile = samples[tile].flatten(0, 1), grad_y[tile].flatten(0, 1)
            gated = (projected[tile] * gates[tile]).flatten(0, 1)
            grad_gated = torch.empty_like(projected[tile])
            torch.mm(grad_tile, u.t(), out=grad_gated.flatten(0, 1))
            torch.sum(projected[tile] * grad_gated, 1, keepdim=True, out=grad_gates[tile])
            grad_projected = grad_gated.mul_(gates[tile]).flatten(0, 1)
            torch.addmm(grad_u, gated.t(), grad_tile, out=grad_u)
            torch.addmm(grad_v, grad_projected.t(), x_tile, out=grad_v)
            if needs_weight:
                torch.addmm(grad_weight, grad_tile.t(), x_tile, out=grad_weight)
            if grad_samples is not None:
                grad_x_tile = grad_samples[tile].flatten(0, 1)
                torch.mm(grad_tile, weight, out=grad_x_tile)
                torch.addmm(grad_x_tile, grad_projected, v, out=grad_x_tile)
            grad_bias += grad_tile.sum(0)
        return (
            grad_x,
            grad_weight,
            grad_bias,
            grad_u.view(expert_u.shape),
            grad_v.view(expert_v.shape),
            (grad_gates * ctx.gate_scale).view(scores.shape),
            None,
        )


def _num_tiles(x: Tensor, out_features: int) -> int:
    """The fewest parts that fit a tile."""
    num_tokens = x.numel() // x.size(-1)
    of_a_thread = max(_TILE_NUMEL // (x.size(-1) + out_features), _TILE_TOKENS)
    return -(-num_tokens // (of_a_thread * torch.get_num_threads()))


def tiles(samples: Tensor, y: Tensor) -> Iterator[slice]:
    """Samples in parts that fit a tile, of equal size but for one sample.

    Args:
        samples (Tensor): input, ``[B, ..., d]``.
        y (Tensor): output, ``[B, ..., o]``.

    Yields:
        slice: of the B samples.
    """
    num_samples = samples.size(0)
    num_tiles = min(_num_tiles(samples, y.size(-1)), num_samples)
    for tile in range(num_tiles):
        yield slice(num_samples * tile // num_tiles, num_samples * (tile + 1) // num_tiles)
