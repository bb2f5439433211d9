"""Parameters and FLOPs of the dense part of a model."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from torchrec_hilomoe.models import InteractionDLRM


class DenseCost(NamedTuple):
    """Cost of everything but the embedding tables.

    Attributes:
        parameters (int): dense parameters.
        flops_per_sample (float): floating-point operations (2 for each multiply-add) of one
            forward pass, over the batch size; what does not depend on the batch is spread over it.
    """

    parameters: int
    flops_per_sample: float


def dense_cost(
    model: InteractionDLRM, num_dense_features: int, batch_size: int = 4096
) -> DenseCost:
    """Counts the cost of dense arch, interaction and over arch as they serve (eval mode).

    The FLOPs are counted by `torch.utils.flop_counter` on a copy on the meta device, so nothing
    is computed and the model is left as it was.

    Args:
        model (InteractionDLRM): the model, sharded or not.
        num_dense_features (int): width of its dense input.
        batch_size (int): B of the counted forward pass.

    Returns:
        DenseCost: parameters and FLOPs per sample.
    """
    f, d = model.sparse_arch.F, model.sparse_arch.D
    dense_arch, inter_arch, over_arch = (
        copy.deepcopy(part if part is not None else nn.Identity()).to("meta").eval()
        for part in (model.dense_arch, model.inter_arch, model.over_arch)
    )
    sparse = torch.empty(batch_size, f, d, device="meta")
    # The counter knows addmm, but takes its in-place form for free.
    in_place = {torch.ops.aten.addmm_: _addmm_flops}
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with counter, torch.no_grad():
        if model.dense_arch is None:
            dense, sparse = sparse[:, 0], sparse[:, 1:]
        else:
            dense = dense_arch(torch.empty(batch_size, num_dense_features, device="meta"))
        over_arch(inter_arch(dense_features=dense, sparse_features=sparse))
    return DenseCost(
        sum(p.numel() for part in (dense_arch, inter_arch, over_arch) for p in part.parameters()),
        counter.get_total_flops() / batch_size,
    )


def _addmm_flops(added: torch.Size, left: torch.Size, right: torch.Size, **kwargs: object) -> int:
    """FLOPs of ``added + left @ right``, as the counter has them for addmm."""
    return 2 * left[0] * left[1] * right[1]
