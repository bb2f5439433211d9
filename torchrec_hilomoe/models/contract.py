"""What a builder of an interaction has promised, checked before it is trained."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.models.registry import Interaction, InteractionContext

_ROWS = 2


def check_interaction(name: str, built: Any, context: InteractionContext) -> Interaction:
    """Checks what a builder returned.

    The width is that of a forward pass of a copy in evaluation mode: the module with all that it
    keeps, and the random generators, stay as they are. A module that cannot be copied is believed.

    Args:
        name (str): the model, for messages.
        built (Any): what the builder returned.
        context (InteractionContext): what it was told.

    Returns:
        Interaction: ``built``.

    Raises:
        ConfigError: it is no `Interaction`, its module's output has another width, or its state
            dict has other values than tensors.
    """
    if not isinstance(built, Interaction) or not isinstance(built.module, nn.Module):
        raise ConfigError(
            f"model.name={name}: its builder must return Interaction(module, out_features), got "
            f"{_shown(built)}"
        )
    for key, value in built.module.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise ConfigError(
                f"model.name={name}: {key} in the state dict of its module is no tensor but a "
                f"{type(value).__name__}, and checkpoints hold tensors alone; keep it in a buffer "
                "instead of get_extra_state"
            )
    try:
        copied = copy.deepcopy(built.module)
    except Exception:  # it holds what cannot be copied, such as a tensor with a history
        return built
    output = _output(copied, context)
    expected = _ROWS, built.out_features
    if not isinstance(output, torch.Tensor) or output.shape != expected:
        raise ConfigError(
            f"model.name={name}: its builder promises out_features={built.out_features}, so that "
            f"{_ROWS} rows are [{_ROWS}, {built.out_features}], but its module returns "
            f"{_shown(output)}; correct one of them"
        )
    return built


def _output(copied: nn.Module, context: InteractionContext) -> Any:
    """What a copy of the module makes of a few rows."""
    d, device = context.embedding_dim, context.device
    copied.eval()
    if device is not None:  # where training will move it
        copied.to(device)
    dense = torch.zeros(_ROWS, d, device=device)
    sparse = torch.zeros(_ROWS, context.num_sparse_features, d, device=device)
    gpus = [device] if device is not None and device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=gpus):
        return copied(dense_features=dense, sparse_features=sparse)


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return str(list(value.shape))
    if isinstance(value, Interaction):
        return f"Interaction of {_shown(value.module)}"
    return type(value).__name__
