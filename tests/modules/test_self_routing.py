"""A layer that routes itself in training, router and linear in one operation."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from torchrec_hilomoe.modules import (
    AuxiliaryLoss,
    AuxiliaryLossConfig,
    HierarchicalRouter,
    HiLoMoEConfig,
    HiLoMoELinear,
    Routing,
)

FEW_EXPERTS = HiLoMoEConfig(num_layers=2, num_experts=4, query_dim=32)


def few_experts(config: HiLoMoEConfig = FEW_EXPERTS) -> HiLoMoELinear:
    """A layer that is small enough to route itself, its experts heard."""
    linear = HiLoMoELinear(40, 10, config)
    nn.init.normal_(linear.expert_u, std=0.1)
    return linear


def with_router_apart(linear: HiLoMoELinear) -> HiLoMoELinear:
    """The same layer, whose router is called, since a hook waits for it."""
    apart = copy.deepcopy(linear)
    apart.router.register_forward_hook(lambda *_: None)
    return apart


def routes_itself(linear: HiLoMoELinear, x: Tensor) -> bool:
    return "SelfRouted" in linear(x).grad_fn.name()


@pytest.mark.parametrize("z_weight", [0.0, 0.1])
@pytest.mark.parametrize("top_k", [None, 2])
def test_few_experts_route_themselves_to_the_same_numbers(top_k, z_weight) -> None:
    linear, x = few_experts(replace(FEW_EXPERTS, top_k=top_k)), torch.randn(64, 40)
    nn.init.normal_(linear.router.query.norm.weight)
    linear.router.query.norm.eps = 0.5

    def results(linear: HiLoMoELinear, fused: bool) -> list[Tensor]:
        inputs = x.clone().requires_grad_()
        assert routes_itself(linear, inputs) == fused
        auxiliary_loss = AuxiliaryLoss(linear, AuxiliaryLossConfig(0.1, z_weight))
        loss = linear(inputs).square().sum() + auxiliary_loss().total
        return [loss, *linear.router.routing, *grad(loss, [inputs, *linear.parameters()])]

    grad = torch.autograd.grad
    expected = results(with_router_apart(linear), fused=False)
    torch.testing.assert_close(results(linear, fused=True), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"query_dropout": 0.2},
        {"expert_dropout": 0.2},
        {"recompute": True},
        {"query_dim": 1},
        {"num_experts": 9, "top_k": 1},  # gathering is cheaper
    ],
)
def test_does_not_route_itself_with(options) -> None:
    linear = HiLoMoELinear(40, 10, replace(FEW_EXPERTS, **options))
    assert not routes_itself(linear, torch.randn(64, 40))


class Adapted(nn.Linear):
    """A linear with a low-rank adapter beside its weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        self.adapter = nn.Linear(linear.in_features, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.adapter(x)


def _adapt(query: nn.Module) -> None:
    query.projection = Adapted(query.projection)


def _normalise(query: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(query.projection)
    nn.init.ones_(query.projection.parametrizations.weight.original0)


def _hook(query: nn.Module) -> None:
    query.projection.register_forward_hook(lambda module, inputs, output: 2.0 * output)


def _hook_before(query: nn.Module) -> None:
    query.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0].square(),))


@pytest.mark.parametrize("change", [_adapt, _normalise, _hook, _hook_before])
def test_what_stands_in_the_query_works_in_training_too(change) -> None:
    linear, x = few_experts(), torch.randn(64, 40)
    change(linear.router.query)
    y = linear(x)
    torch.testing.assert_close(y, linear.eval()(x), rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in linear.parameters())


@pytest.mark.parametrize("part", ["", "query.projection"])
@pytest.mark.parametrize(
    "register", ["register_full_backward_hook", "register_full_backward_pre_hook"]
)
def test_hooks_of_the_backward_pass_are_called(register, part) -> None:
    linear, calls = few_experts(), []
    getattr(linear.router.get_submodule(part), register)(lambda *_: calls.append(part))
    linear(torch.randn(64, 40).requires_grad_()).sum().backward()
    assert calls == [part]


def test_a_router_with_a_forward_of_its_own_is_called() -> None:
    class Uniform(HierarchicalRouter):
        def forward(self, x: Tensor, keys: Tensor | None = None) -> Routing:
            return super().forward(torch.zeros_like(x), keys)

    linear, x = few_experts(), torch.randn(64, 40)
    linear.router = Uniform(40, FEW_EXPERTS)
    assert not routes_itself(linear, x)
    torch.testing.assert_close(linear(x), linear.eval()(x), rtol=1e-4, atol=1e-4)


def test_query_dropout_that_is_set_later_works() -> None:
    linear, x = few_experts(), torch.randn(64, 40)
    linear.router.query.dropout.p = 0.5
    assert not torch.equal(linear(x), linear(x))


def test_routes_itself_in_training_on_flat_inputs_alone() -> None:
    linear, x = few_experts(), torch.randn(64, 40)
    assert routes_itself(linear, x)
    assert not routes_itself(with_router_apart(linear), x)
    assert not routes_itself(linear, x.unsqueeze(1))
    assert not routes_itself(linear.eval(), x)
    linear.train().experts_enabled = False
    assert not routes_itself(linear, x)
    assert linear.router.routing.scores.size(0) == 0


def test_compiles_where_it_would_route_itself() -> None:
    torch.compiler.reset()
    linear, x = few_experts(), torch.randn(64, 40)
    expected = linear(x)
    linear.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-4)
