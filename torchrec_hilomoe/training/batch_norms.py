"""The running statistics of batch norms, of which each rank has its own."""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def average_statistics(model: nn.Module) -> None:
    """Averages the running statistics of batch norms over the ranks, each of which has its own.

    So that all ranks evaluate the model that is saved. Every rank must call it.

    Args:
        model (nn.Module): batch norms in eval mode are frozen, and left as they are.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.training and dist.get_world_size() > 1:
            for statistic in (module.running_mean, module.running_var):
                if statistic is not None:
                    dist.all_reduce(statistic)
                    statistic /= dist.get_world_size()


def running_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """The running statistics of all batch norms.

    Args:
        model (nn.Module): any model.

    Returns:
        dict[str, torch.Tensor]: by name; the tensors themselves.
    """
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for name, value in module.named_buffers()
    }
