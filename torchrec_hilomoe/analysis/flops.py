"""Parameters and FLOPs of the dense part of a model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from torchrec_hilomoe.models import InteractionDLRM
from torchrec_hilomoe.modules import HierarchicalRouter, RoutedLinear

logger = logging.getLogger(__name__)


class DenseCost(NamedTuple):
    """Cost of everything but the embedding tables.

    Attributes:
        parameters (int): dense parameters, without those of experts and routers that are disabled.
        flops_per_sample (float | None): floating-point operations (2 for each multiply-add) of one
            forward pass, over the batch size; what does not depend on the batch is spread over it.
            None where a forward pass of zeros fails.
    """

    parameters: int
    flops_per_sample: float | None


def dense_cost(
    model: InteractionDLRM, num_dense_features: int, batch_size: int = 4096
) -> DenseCost:
    """Counts the cost of dense arch, interaction and over arch as they serve (eval mode).

    The FLOPs are counted by `torch.utils.flop_counter` on a copy on the meta device, so that
    nothing is computed; where modules cannot be copied or run there, by a forward pass of zeros in
    evaluation mode.

    Args:
        model (InteractionDLRM): the model, sharded or not.
        num_dense_features (int): width of its dense input.
        batch_size (int): B of the counted forward pass.

    Returns:
        DenseCost: parameters and FLOPs per sample.
    """
    dense_arch = nn.Identity() if model.dense_arch is None else model.dense_arch
    parts = nn.ModuleList((dense_arch, model.inter_arch, model.over_arch))
    sizes = (batch_size, model.sparse_arch.F, model.sparse_arch.D)
    dense_features = None if model.dense_arch is None else num_dense_features
    flops = None
    for make in (_on_meta, _in_place):
        try:
            with make(parts) as runnable:
                flops = _flops(runnable, sizes, dense_features)
            break
        except Exception as error:  # of a third party's module, which need not know meta
            logger.debug("FLOPs cannot be counted by %s: %r", make.__name__, error)
    else:
        logger.warning("FLOPs are not counted: a forward pass of zeros fails")
    total = sum(_parameters(part) for part in parts)
    return DenseCost(total, None if flops is None else flops / batch_size)


@contextmanager
def _on_meta(parts: nn.ModuleList) -> Iterator[nn.ModuleList]:
    yield copy.deepcopy(parts).to("meta").eval()


@contextmanager
def _in_place(parts: nn.ModuleList) -> Iterator[nn.ModuleList]:
    modes = [(module, module.training) for module in parts.modules()]
    parts.eval()
    try:
        yield parts
    finally:
        for module, mode in modes:
            module.training = mode


def _flops(parts: nn.ModuleList, sizes: tuple[int, int, int], num_dense: int | None) -> int:
    """FLOPs of one forward pass; without a dense arch if ``num_dense`` is None."""
    dense_arch, inter_arch, over_arch = parts
    own = next(over_arch.parameters())
    sparse = torch.zeros(sizes, device=own.device, dtype=own.dtype)
    counter = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
    with counter, torch.no_grad():
        if num_dense is None:
            dense, sparse = sparse[:, 0], sparse[:, 1:]
        else:
            dense = dense_arch(sparse.new_zeros((sizes[0], num_dense)))
        over_arch(inter_arch(dense_features=dense, sparse_features=sparse))
    return counter.get_total_flops()


def _parameters(part: nn.Module) -> int:
    """Parameters that take part in the forward pass."""
    silent: set[nn.Parameter] = set()
    for module in part.modules():
        if isinstance(module, RoutedLinear) and not module.experts_enabled:
            silent |= {module.expert_u, module.expert_v}
        router = getattr(module, "router", None)
        if isinstance(router, HierarchicalRouter):
            linears = [m for m in module.modules() if isinstance(m, RoutedLinear)]
            if not any(linear.experts_enabled for linear in linears):
                silent |= set(router.parameters())
    return sum(parameter.numel() for parameter in part.parameters() if parameter not in silent)


def _addmm_flops(added: torch.Size, left: torch.Size, right: torch.Size, **kwargs: object) -> int:
    """FLOPs of ``added + left @ right``, as the counter has them for addmm."""
    return 2 * left[0] * left[1] * right[1]


def _weighted_rows_flops(
    table: torch.Size, rows: torch.Size, *args: object, **kwargs: object
) -> int:
    """FLOPs of summing so many rows of ``table`` with weights."""
    return 2 * rows[0] * table[1]


def _row_products_flops(
    tokens: torch.Size, table: torch.Size, rows: torch.Size, *args: object, **kwargs: object
) -> int:
    """FLOPs of the products of tokens with so many rows of ``table``."""
    return 2 * rows[0] * table[1]


# What the counter takes for free: addmm in place, and the gathered experts of sparse routing.
_UNCOUNTED = {
    torch.ops.aten.addmm_: _addmm_flops,
    torch.ops.aten._embedding_bag: _weighted_rows_flops,
    torch.ops.aten._embedding_bag_forward_only: _weighted_rows_flops,
    torch.ops.aten._embedding_bag_per_sample_weights_backward: _row_products_flops,
}
