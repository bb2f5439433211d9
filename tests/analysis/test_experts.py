from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from torchrec_hilomoe.analysis import ExpertUsage, experts
from torchrec_hilomoe.modules import HiLoMoEConfig, HiLoMoELinear, set_experts_enabled


def _model(**options: object) -> HiLoMoELinear:
    torch.manual_seed(0)
    config = HiLoMoEConfig(**{"num_layers": 2, "num_experts": 4, **options})
    return HiLoMoELinear(16, 8, config).eval()


def _health(model: nn.Module, *batches: torch.Tensor, keep: slice = slice(None)):
    with ExpertUsage(model) as usage:
        for x in batches:
            model(x)
            mask = torch.zeros(x.size(0), dtype=torch.bool)
            mask[keep] = True
            usage.add(mask)
    return usage.compute()


@pytest.mark.parametrize("rows", [0, 1 << 20])
def test_equals_the_definitions(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "_COMPACT_ROWS", rows)
    model, x = _model(), torch.randn(50, 16)
    scores = model.router(x).scores
    health = _health(model, x[:20], x[20:])["router"]
    mean = scores.mean(dim=0)
    usage = -(mean * mean.log()).sum(dim=1) / math.log(4)
    sample = -(scores * scores.log()).sum(dim=2).mean(dim=0) / math.log(4)
    assert health.usage_entropy == pytest.approx(usage.tolist(), abs=1e-5)
    assert health.sample_entropy == pytest.approx(sample.tolist(), abs=1e-5)
    assert health.paths == len({tuple(path) for path in scores.argmax(dim=2).tolist()})
    assert health.possible_paths == 16
    assert health.dead_share == (mean < 0.025).double().mean(dim=1).tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same() -> None:
    model, x = _model(), torch.randn(50, 16)
    expected = _health(model, x, keep=slice(3, 40))["router"]
    with ExpertUsage(model.cuda()) as usage:
        model(x.cuda())
        usage.add((torch.arange(50) >= 3).cuda() & (torch.arange(50) < 40).cuda())
    health = usage.compute()["router"]
    assert health.paths == expected.paths
    assert health.usage_entropy == pytest.approx(expected.usage_entropy, abs=1e-4)


def test_a_router_that_diverged_is_left_out() -> None:
    x = torch.randn(5, 16)
    x[2, 3] = float("nan")
    assert _health(_model(), x) == {}


def test_dead_experts_are_found() -> None:
    model = _model(query_dim=3)
    with torch.no_grad():  # the query is (1, 0, 0): expert 0 of layer 0 takes all
        model.router.query.projection.weight.zero_()
        model.router.query.projection.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
        model.router.keys.zero_()
        model.router.keys[0, 0, 0] = 40.0
    health = _health(model, torch.randn(9, 16))["router"]
    assert health.dead_share == [0.75, 0.0]
    assert health.usage_entropy[0] == pytest.approx(0.0, abs=1e-4)
    assert health.usage_entropy[1] == pytest.approx(1.0, abs=1e-4)
    assert health.paths == 1


def test_an_expert_is_dead_below_a_tenth_of_its_fair_share() -> None:
    model, shares = _model(num_layers=1, query_dim=1), torch.tensor([0.9, 0.05, 0.03, 0.02])
    with torch.no_grad():  # the query is 1
        model.router.query.projection.weight.zero_()
        model.router.query.projection.bias.fill_(1.0)
        model.router.keys.copy_(shares.log().view(1, 4, 1))
    assert _health(model, torch.randn(9, 16))["router"].dead_share == [0.25]


def test_paths_of_many_experts_are_told_apart() -> None:
    """Experts 43 and 299 are one, and 255 is none, in a byte."""
    model = _model(num_layers=1, num_experts=300, query_dim=3)
    with torch.no_grad():  # the query is the first three values, less their mean
        model.router.query.projection.bias.zero_()
        model.router.query.projection.weight.copy_(torch.eye(3, 16))
        model.router.keys.zero_()
        for i, expert in enumerate((43, 255, 299)):
            model.router.keys[0, expert, i] = 40.0
    assert _health(model, torch.eye(3, 16))["router"].paths == 3


def test_experts_that_top_k_never_keeps_are_dead() -> None:
    health = _health(_model(num_experts=64, top_k=1), torch.randn(8, 16))["router"]
    assert min(health.dead_share) >= (64 - 8) / 64
    assert health.sample_entropy == [0.0, 0.0]


def test_padding_is_left_out() -> None:
    model, x = _model(), torch.randn(10, 16)
    x[7] = float("nan")
    assert _health(model, x, keep=slice(6)) == _health(model, x[:6]) != {}


def test_routers_that_did_not_run_are_left_out() -> None:
    model = _model()
    set_experts_enabled(model, False)
    assert _health(model, torch.randn(3, 16)) == {}


def test_a_router_counts_in_the_batches_alone_in_which_it_ran() -> None:
    model, x = _model(), torch.randn(10, 16)
    with ExpertUsage(model) as usage:
        for batch, enabled in ((x[:4], True), (x[:4], False), (x[4:], True)):
            set_experts_enabled(model, enabled)
            model(batch)
            usage.add(torch.ones(len(batch), dtype=torch.bool))
    assert usage.compute() == _health(model, x)


def test_leaves_no_hook_behind() -> None:
    model = _model()
    _health(model, torch.randn(3, 16))
    assert not model.router._forward_hooks


def test_a_single_expert() -> None:
    health = _health(_model(num_experts=1), torch.randn(3, 16))["router"]
    assert health == ([0.0, 0.0], [1.0, 1.0], [1.0, 1.0], 1, 1)


def test_tokens_that_are_routed_one_by_one_are_counted_each() -> None:
    model, x = _model(), torch.randn(10, 3, 16)
    expected = _health(model, x[:4].flatten(0, 1))["router"]
    with ExpertUsage(model) as usage:
        model(x.flatten(0, 1))
        usage.add(torch.arange(10) < 4)
    assert usage.compute()["router"] == expected
    with ExpertUsage(model) as usage:
        model(x.flatten(0, 1))
        usage.add(torch.ones(7, dtype=torch.bool))
        model(x[:0].flatten(0, 1))
        usage.add(torch.ones(0, dtype=torch.bool))
    assert usage.compute() == {}
