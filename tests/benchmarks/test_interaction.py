from __future__ import annotations

import pytest
import torch
from torch import nn

from torchrec_hilomoe.modules import HiLoMoEConfig


@pytest.mark.parametrize("peer", ["LiteralLinear", "SequentialLinear", "AllExpertsLinear"])
@pytest.mark.parametrize("top_k", [None, 2])
def test_peers_compute_the_same(load, peer, top_k) -> None:
    if top_k is not None and peer != "AllExpertsLinear":
        pytest.skip("dense routing alone")
    peers = load("peers")
    layer = peers.hilomoe_linear(24, 20, HiLoMoEConfig(3, 40, top_k=top_k))
    x = torch.randn(7, 24)
    torch.testing.assert_close(getattr(peers, peer)(layer)(x), layer(x), rtol=1e-4, atol=1e-4)


def test_every_arch_takes_dense_and_sparse_features(load) -> None:
    dense, sparse = torch.randn(5, 8), torch.randn(5, 3, 8)
    for arch in load("peers").interaction_archs(3, 8, 16, HiLoMoEConfig(2, 4)).values():
        assert arch(dense_features=dense, sparse_features=sparse).shape[0] == 5


def test_times(load) -> None:
    timing = load("timing")
    times = timing.Times({"a": [1.0, 2.0, 4.0], "b": [1.0, 1.0, 2.0]})
    assert times.median("a") == 2.0
    assert times.ratio("a", "b") == 2.0
    low, high = times.ratio_quartiles("a", "b")
    assert low <= 2.0 <= high


def test_cases_take_turns(load) -> None:
    order: list[str] = []
    cases = {name: lambda name=name: order.append(name) for name in "ab"}
    times = load("timing").take_turns(cases, 3)
    assert order == ["a", "b"] * 5  # two rounds of warm-up
    assert set(times.summary()) == {"a", "b"}


def test_flops_of_a_training_step(load) -> None:
    step = load("steps").training_step(nn.Linear(6, 5), torch.randn(4, 6, requires_grad=True))
    assert load("timing").count_flops(step) == 3 * 2 * 4 * 6 * 5


def test_activation_memory(load) -> None:
    activation_bytes = load("steps").activation_bytes
    x = torch.randn(4, 6, requires_grad=True)
    assert activation_bytes(nn.Linear(6, 5), x) == 0
    assert activation_bytes(nn.Sequential(nn.Linear(6, 5), nn.Sigmoid()), x) == 4 * 4 * 5


# Flat with keys worth projecting, a layer keeps little anyway: router and linear are one operation.
@pytest.mark.parametrize(
    ("shape", "query_dim", "share"),
    [((4000, 48), 16, 0.8), ((4000, 48), None, 0.9), ((400, 10, 48), None, 0.8)],
)
def test_recomputing_takes_less_memory(load, shape, query_dim, share) -> None:
    """In a stack: one layer at a time is computed again."""
    peers, steps = load("peers"), load("steps")
    x = torch.randn(shape, requires_grad=True)
    peaks = []
    for recompute in (False, True):
        config = HiLoMoEConfig(8, 8, query_dim=query_dim, recompute=recompute)
        stack = nn.Sequential(*(peers.hilomoe_linear(48, 48, config) for _ in range(4)))
        peaks.append(steps.peak_activation_bytes(stack, x))
    assert peaks[1] < share * peaks[0]


def test_peak_memory(load) -> None:
    def step() -> None:
        first, second = torch.empty(250, 1000), torch.empty(250, 1000)
        del first
        third = torch.empty(250, 1000)
        del second, third

    assert load("profiles").peak_bytes(step, torch.device("cpu")) == 2 * 4 * 250 * 1000


def test_peak_memory_whatever_was_profiled_before(load) -> None:
    """What stood before a step may or may not be known to the profiler when the step frees it."""
    peak_bytes, cpu, kept = load("profiles").peak_bytes, torch.device("cpu"), []
    peak_bytes(lambda: kept.append(torch.empty(250, 1000)), cpu)

    def step() -> None:
        kept.clear()
        kept.append(torch.empty(250, 1000))

    assert peak_bytes(step, cpu) == 4 * 250 * 1000
