"""Times of a training step over layers, experts, tokens and whole interaction archs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from peers import (
    AllExpertsLinear,
    SequentialLinear,
    hilomoe_linear,
    interaction_archs,
)
from steps import inference_step, training_step, training_steps
from timing import count_flops, take_turns
from torch import Tensor, nn

from torchrec_hilomoe.modules import HiLoMoEConfig, RoutedLinear
from torchrec_hilomoe.ops import (
    building_is_cheaper,
    built_weight_linear,
    gathering_is_cheaper,
    stacked_experts_linear,
    tiled_experts_linear,
)

Row = dict[str, object]


def sweep_layers(layers: Iterable[int], repetitions: int) -> list[Row]:
    """HiLoMoELinear beside its base and conventional stacking, K 8, flat 432, B 4096."""
    x = torch.randn(4096, 432, requires_grad=True)
    rows = []
    for num_layers in layers:
        layer = hilomoe_linear(432, 432, HiLoMoEConfig(num_layers, 8))
        modules = {
            "base": nn.Linear(432, 432),
            "HiLoMoELinear": layer,
            "sequential": SequentialLinear(layer),
        }
        rows.append({"L": num_layers, **_compare(modules, x, repetitions=repetitions)})
    return rows


def sweep_experts(experts: Iterable[int], repetitions: int) -> list[Row]:
    """All experts and the gathered top 4 under the same routing, L 3, flat 432, B 2048."""
    x = torch.randn(2048, 432, requires_grad=True)
    rows = []
    for num_experts in experts:
        layer = hilomoe_linear(432, 432, HiLoMoEConfig(3, num_experts, top_k=4))
        modules = {"chosen": layer, "all experts": AllExpertsLinear(layer)}
        compared = _compare(modules, x, repetitions=repetitions)
        rows.append({"K": num_experts, "gathers": gathering_is_cheaper(num_experts, 4), **compared})
    return rows


class _Execution(nn.Module):
    def __init__(self, execution: object, linear: RoutedLinear) -> None:
        super().__init__()
        self.execution, self.linear = execution, linear

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        linear = self.linear
        return self.execution(
            x, linear.weight, linear.bias, linear.expert_u, linear.expert_v, scores
        )


def sweep_tokens(tokens: Iterable[int], repetitions: int) -> list[Row]:
    """Each execution of a routed linear on sequences, L 3, K 8, D 64, 16384 tokens in all."""
    executions = {
        "stacked": stacked_experts_linear,
        "tiled": tiled_experts_linear,
        "built": built_weight_linear,
    }
    rows = []
    for num_tokens in tokens:
        linear = RoutedLinear(64, 64, HiLoMoEConfig(3, 8))
        x = torch.randn(16384 // num_tokens, num_tokens, 64, requires_grad=True)
        scores = torch.rand(x.size(0), 3, 8, requires_grad=True)
        modules = {name: _Execution(fn, linear) for name, fn in executions.items()}
        compared = _compare(modules, x, scores, repetitions=repetitions)
        rows.append(
            {"N": num_tokens, "builds": building_is_cheaper(num_tokens, 64, 64, 24), **compared}
        )
    return rows


def compare_archs(sizes: Iterable[tuple[int, int]], repetitions: int) -> list[Row]:
    """Whole interaction archs at F 26, L 3, K 8 and 512 output features where they are free.

    Training step and inference. TorchRec's mixture keeps about ten copies of its input for each
    expert and layer; where these take more than 8 GB it is left out.

    Args:
        sizes (Iterable[tuple[int, int]]): B and D.
        repetitions (int): rounds of each size.

    Returns:
        list[Row]: times by arch, for each size.
    """
    rows = []
    for batch_size, dim in sizes:
        inputs = torch.randn(batch_size, dim), torch.randn(batch_size, 26, dim)
        for tensor in inputs:
            tensor.requires_grad_()
        archs = interaction_archs(26, dim, 512, HiLoMoEConfig(3, 8))
        if 10 * 3 * 8 * 4 * batch_size * 27 * dim > 8e9:
            del archs["DCN LowRankMixtureCrossNet"]
        forwards = {name: inference_step(arch, *inputs) for name, arch in archs.items()}
        compared = _compare(archs, *inputs, repetitions=repetitions)
        inference = take_turns(forwards, repetitions).summary()
        rows.append({"B": batch_size, "D": dim, **compared, "inference_ms": inference})
    return rows


def _compare(modules: Mapping[str, nn.Module], *inputs: Tensor, repetitions: int) -> Row:
    steps = training_steps(modules, *inputs)
    times = take_turns(steps, repetitions)
    rates = {
        name: count_flops(training_step(module, *inputs)) / times.median(name) / 1e9
        for name, module in modules.items()
    }
    return {"ms": times.summary(), "gflops": rates}
