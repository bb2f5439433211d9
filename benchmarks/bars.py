"""The bars: ratios of medians within one run, each against its own peer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from peers import (
    AllExpertsLinear,
    LiteralLinear,
    SequentialLinear,
    hilomoe_linear,
)
from steps import activation_bytes, peak_activation_bytes, training_steps
from timing import Product, Times, best_product, count_flops, take_turns
from torch import nn
from torchrec.modules.crossnet import LowRankMixtureCrossNet

from torchrec_hilomoe.modules import (
    HiLoMoEConfig,
    HiLoMoECrossNet,
    HiLoMoELinear,
    shared_routing,
)

SIZES = [(1, 8), (3, 8), (8, 16), (16, 8)]  # L, K
INPUTS = {"flat 432, B 4096": (4096, 432), "B 2048, N 27, D 128": (2048, 27, 128)}


class Bar(NamedTuple):
    """A measured ratio beside the value it should reach."""

    value: float
    quartiles: tuple[float, float]  # of the ratio within a repetition
    of_minima: float  # the same ratio of the shortest times
    bar: str
    of: str


class RouterOf(nn.Module):
    """The routing of a :class:`HiLoMoELinear` alone."""

    def __init__(self, linear: HiLoMoELinear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, d]`` or ``[B, N, d]`` to scores ``[B, L, K]``."""
        return shared_routing(self.linear.router, [self.linear], x).scores


def measure_bars(repetitions: int) -> tuple[dict[str, Bar], list[dict[str, object]]]:
    """Measures every bar, forward and backward.

    Args:
        repetitions (int): rounds of each comparison.

    Returns:
        tuple[dict[str, Bar], list[dict[str, object]]]: the bars by name, and one row for each shape
        and size of the layer with its times, rates and memory.
    """
    product = best_product(repetitions)
    rows, floors, shares = [], [], []
    for shape_name, shape in INPUTS.items():
        for num_layers, num_experts in SIZES:
            row, floor, share = _layer(shape, num_layers, num_experts, product, repetitions)
            rows.append({"input": shape_name, "L": num_layers, "K": num_experts, **row})
            at = f"{shape_name}, L {num_layers}, K {num_experts}"
            floors.append(floor._replace(of=f"{floor.of}: {at}"))
            if (num_layers, num_experts) == (16, 8):
                shares.append(share._replace(of=f"{share.of}: {at}"))
    rates = [row for row in rows if (row["L"], row["K"]) == (16, 8)]
    efficiency = min(rates, key=lambda row: row["gemm_efficiency"])
    bars = {
        "floor_ratio_max": max(floors, key=lambda bar: bar.value),
        "hilomoe_over_lowrank_mixture": _over_lowrank_mixture(repetitions),
        "sequential_over_fused": _over_fused(SequentialLinear, 16, 8, ">= 1.5", repetitions),
        "reference_over_fused": _over_fused(
            LiteralLinear, 8, 16, ">= 10", max(3, repetitions // 3)
        ),
        "routing_share": max(shares, key=lambda bar: bar.value),
        "gemm_efficiency": Bar(
            efficiency["gemm_efficiency"],
            efficiency["gemm_efficiency_quartiles"],
            efficiency["gemm_efficiency_of_minima"],
            ">= 0.85",
            f"FLOP/s over those of the fastest product: {efficiency['input']}, L 16, K 8",
        ),
        "gather_over_dense": _gather_over_dense(max(3, repetitions // 3)),
    }
    return bars, [{"best_product_gflops": product.rate / 1e9}, *rows]


def _layer(
    shape: tuple[int, ...], num_layers: int, num_experts: int, product: Product, repetitions: int
) -> tuple[dict[str, object], Bar, Bar]:
    """One size of the layer: beside its base linear, and with the routing given."""
    x = torch.randn(shape, requires_grad=True)
    config = HiLoMoEConfig(num_layers, num_experts)
    layer = hilomoe_linear(shape[-1], shape[-1], config)
    base = nn.Linear(shape[-1], shape[-1])
    cases = training_steps({"base": base, "layer": layer, "routing": RouterOf(layer)}, x)
    times = take_turns({**cases, "product": product.step}, repetitions)
    flops = {name: count_flops(step) for name, step in cases.items()}
    flop_ratio = flops["layer"] / flops["base"]
    low, high = times.ratio_quartiles("layer", "base")
    floor = Bar(
        times.ratio("layer", "base") / flop_ratio,
        (low / flop_ratio, high / flop_ratio),
        times.ratio_of_minima("layer", "base") / flop_ratio,
        "<= 1.08",
        "time over the base linear's, divided by the same ratio in FLOPs",
    )
    share = Bar(
        times.ratio("routing", "layer"),
        times.ratio_quartiles("routing", "layer"),
        times.ratio_of_minima("routing", "layer"),
        "<= 0.08",
        "query, logits and scores alone over the whole layer",
    )
    work = {name: flops[name] / product.flops for name in ("base", "layer")}
    recomputing = hilomoe_linear(shape[-1], shape[-1], replace(config, recompute=True))
    row = {
        "ms": times.summary(),
        "flop_ratio": flop_ratio,
        "routing_flop_share": flops["routing"] / flops["layer"],
        "floor_ratio": floor.value,
        "routing_share": share.value,
        "gemm_efficiency": work["layer"] * times.ratio("product", "layer"),
        "gemm_efficiency_quartiles": tuple(
            work["layer"] * ratio for ratio in times.ratio_quartiles("product", "layer")
        ),
        "gemm_efficiency_of_minima": work["layer"] * times.ratio_of_minima("product", "layer"),
        "base_gemm_efficiency": work["base"] * times.ratio("product", "base"),
        "output_mb": x.numel() * 4 / 1e6,
        "kept_mb": activation_bytes(layer, x) / 1e6,
        "peak_mb": peak_activation_bytes(layer, x) / 1e6,
        "base_peak_mb": peak_activation_bytes(base, x) / 1e6,
        "recompute_kept_mb": activation_bytes(recomputing, x) / 1e6,
        "recompute_peak_mb": peak_activation_bytes(recomputing, x) / 1e6,
    }
    return row, floor, share


def _over_lowrank_mixture(repetitions: int) -> Bar:
    x = torch.randn(4096, 432, requires_grad=True)
    modules = {
        "ours": HiLoMoECrossNet(432, 1, HiLoMoEConfig(3, 8)),
        "peer": LowRankMixtureCrossNet(432, num_layers=3, num_experts=8, low_rank=1),
    }
    times = take_turns(training_steps(modules, x), repetitions)
    of = (
        "HiLoMoECrossNet of one cross layer (L 3) over LowRankMixtureCrossNet of three: "
        "K 8, rank 1, flat 432, B 4096"
    )
    return _bar(times, "ours", "peer", "<= 0.12", of)


def _over_fused(
    peer: Callable[[HiLoMoELinear], nn.Module],
    num_layers: int,
    num_experts: int,
    bar: str,
    repetitions: int,
) -> Bar:
    x = torch.randn(4096, 432, requires_grad=True)
    layer = hilomoe_linear(432, 432, HiLoMoEConfig(num_layers, num_experts))
    modules = {"peer": peer(layer), "ours": layer}
    times = take_turns(training_steps(modules, x), repetitions)
    of = f"over HiLoMoELinear: L {num_layers}, K {num_experts}, flat 432, B 4096"
    return _bar(times, "peer", "ours", bar, of)


def _gather_over_dense(repetitions: int) -> Bar:
    x = torch.randn(4096, 432, requires_grad=True)
    layer = hilomoe_linear(432, 432, HiLoMoEConfig(3, 1024, top_k=4))
    modules = {"ours": layer, "peer": AllExpertsLinear(layer)}
    times = take_turns(training_steps(modules, x), repetitions)
    of = "routing and kept experts over routing and all experts: L 3, K 1024, top 4, flat 432"
    return _bar(times, "ours", "peer", "<= 0.25", of)


def _bar(times: Times, case: str, over: str, bar: str, of: str) -> Bar:
    return Bar(
        times.ratio(case, over),
        times.ratio_quartiles(case, over),
        times.ratio_of_minima(case, over),
        bar,
        of,
    )
