"""Modules as steps to be timed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from profiles import peak_bytes
from timing import Step
from torch import Tensor, nn


def training_step(module: nn.Module, *inputs: Tensor) -> Step:
    """Forward and backward of ``module``, gradients of its parameters and inputs included."""
    leaves = [*inputs, *module.parameters()]
    upstream = torch.randn_like(module(*inputs))

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        module(*inputs).backward(upstream)

    return step


def inference_step(module: nn.Module, *inputs: Tensor) -> Step:
    """Forward of ``module`` in evaluation mode, without gradients."""

    def step() -> None:
        module.eval()
        with torch.no_grad():
            module(*inputs)
        module.train()

    return step


def training_steps(modules: Mapping[str, nn.Module], *inputs: Tensor) -> dict[str, Step]:
    """:func:`training_step` of each module."""
    return {name: training_step(module, *inputs) for name, module in modules.items()}


def activation_bytes(module: nn.Module, *inputs: Tensor) -> int:
    """Memory that a forward keeps for its backward, beside inputs and parameters."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*inputs, *module.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(*inputs)  # keeps the graph, and so the storages, until all are counted
        total = sum(kept.values())
    del output
    return total


def peak_activation_bytes(module: nn.Module, *inputs: Tensor) -> int:
    """The most memory that forward and backward take, their gradients included."""
    step = training_step(module, *inputs)
    step()
    for leaf in (*inputs, *module.parameters()):
        leaf.grad = None
    return peak_bytes(step, inputs[0].device)
