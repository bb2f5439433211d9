from __future__ import annotations

import pytest
import torch
from torch import nn

from torchrec_hilomoe.modules import (
    HierarchicalRouter,
    HiLoMoEConfig,
    HiLoMoELinear,
    HiLoMoEMLP,
    RoutedLinear,
    Routing,
    shared_routing,
)
from torchrec_hilomoe.modules.linear import mean_over_tokens
from torchrec_hilomoe.ops import hilomoe_linear_reference, route_reference

CONFIG = HiLoMoEConfig(num_layers=3, num_experts=4)


def with_experts(linear: RoutedLinear) -> RoutedLinear:
    nn.init.normal_(linear.expert_u, std=0.1)
    return linear


def random_routing(batch: int) -> Routing:
    return Routing(torch.rand(batch, 3, 4), torch.randn(batch, 3, 4))


@pytest.mark.parametrize("gate_scale", [None, 0.5])
@pytest.mark.parametrize("shape", [(7, 12), (7, 3, 12), (7, 40, 12)])
def test_routed_linear_equals_reference(shape, gate_scale) -> None:
    linear = with_experts(RoutedLinear(12, 10, HiLoMoEConfig(3, 4, gate_scale=gate_scale)))
    x, routing = torch.randn(shape), random_routing(7)
    scale = 4 if gate_scale is None else gate_scale  # default: K
    expected = hilomoe_linear_reference(
        x, linear.weight, linear.bias, linear.expert_u, linear.expert_v, routing.scores * scale
    )
    torch.testing.assert_close(linear(x, routing), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", [(7, 12), (7, 5, 12)])
def test_linear_routes_a_sample_by_the_mean_of_its_tokens(shape, tied) -> None:
    linear = with_experts(HiLoMoELinear(12, 10, HiLoMoEConfig(3, 4, tied_keys=tied)))
    x = torch.randn(shape)
    mean = x if x.dim() == 2 else x.sum(1) / 5
    keys = linear.expert_v if tied else linear.router.keys
    scores, _ = route_reference(linear.router.query(mean), keys)
    expected = hilomoe_linear_reference(
        x, linear.weight, linear.bias, linear.expert_u, linear.expert_v, scores * 4
    )
    torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-5)


def test_starts_as_nn_linear_starts() -> None:
    torch.manual_seed(3)
    linear = HiLoMoELinear(12, 10, CONFIG)
    torch.manual_seed(3)
    dense = nn.Linear(12, 10)
    assert torch.equal(linear.weight, dense.weight)
    assert torch.equal(linear.bias, dense.bias)
    x = torch.randn(64, 12)
    assert torch.equal(linear(x), dense(x))


def test_initial_experts() -> None:
    torch.manual_seed(0)
    linear = RoutedLinear(400, 10, HiLoMoEConfig(3, 32))
    assert not linear.expert_u.any()
    torch.testing.assert_close(linear.expert_v.var().item(), 1 / 400, rtol=0.05, atol=0.0)


def test_loads_the_checkpoint_of_nn_linear() -> None:
    dense, linear = nn.Linear(12, 10), HiLoMoELinear(12, 10, CONFIG)
    result = linear.load_state_dict(dense.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert all("expert_" in key or key.startswith("router.") for key in result.missing_keys)
    x = torch.randn(7, 12)
    assert torch.equal(linear(x), dense(x))


def test_stands_for_a_linear_without_bias() -> None:
    dense, linear = nn.Linear(12, 10, bias=False), HiLoMoELinear(12, 10, CONFIG)
    linear.load_state_dict(dense.state_dict(), strict=False)
    nn.init.zeros_(linear.bias).requires_grad_(False)
    x = torch.randn(700, 12)
    y = linear(x)
    assert torch.equal(y, dense(x))
    y.sum().backward()
    assert linear.bias.grad is None


@pytest.mark.parametrize("tied", [False, True])
def test_in_the_first_step_u_alone_of_the_experts_learns(tied) -> None:
    linear = HiLoMoELinear(12, 10, HiLoMoEConfig(3, 4, tied_keys=tied))
    linear(torch.randn(7, 12)).square().sum().backward()
    assert linear.expert_u.grad.abs().min() > 0
    assert linear.weight.grad.abs().min() > 0
    silent = [linear.expert_v, *linear.router.parameters()]
    assert all(not parameter.grad.any() for parameter in silent)
    with torch.no_grad():
        linear.expert_u -= linear.expert_u.grad
    linear.zero_grad()
    linear(torch.randn(7, 12)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in silent)


@pytest.mark.parametrize("training", [True, False])
def test_disabled_experts_leave_nn_linear(training) -> None:
    linear = with_experts(HiLoMoELinear(12, 10, CONFIG)).train(training)
    dense = nn.Linear(12, 10)
    dense.load_state_dict(linear.state_dict(), strict=False)
    x = torch.randn(7, 12)
    assert not torch.equal(linear(x), dense(x))
    linear.experts_enabled = False
    assert torch.equal(linear(x), dense(x))
    linear(x).sum().backward()
    assert linear.expert_u.grad is None
    assert linear.router.keys.grad is None


def test_experts_take_part_in_a_transformer_that_evaluates() -> None:
    """Its fast path would call no linear."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    layer.linear1 = with_experts(HiLoMoELinear(8, 16, CONFIG))
    layer.linear2 = with_experts(HiLoMoELinear(16, 8, CONFIG))
    x = torch.randn(3, 5, 8)
    expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected)


def test_disabled_experts_skip_the_router() -> None:
    linear = HiLoMoELinear(12, 10, CONFIG)
    calls: list[nn.Module] = []
    linear.router.register_forward_hook(lambda module, *_: calls.append(module))
    linear(torch.randn(7, 12))
    linear.experts_enabled = False
    linear(torch.randn(7, 12))
    assert len(calls) == 1


def test_expert_dropout_drops_whole_experts_of_a_sample() -> None:
    """Each gate is 0 or doubled, by a mask of its own for each sample, shared by its tokens."""
    linear = RoutedLinear(12, 12, HiLoMoEConfig(1, 12, expert_dropout=0.5, gate_scale=1.0))
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
        linear.expert_u.copy_(torch.eye(12)[None])
        linear.expert_v.copy_(torch.eye(12)[None])
    routing = Routing(torch.ones(50, 1, 12), torch.zeros(50, 1, 12))
    y = linear(torch.ones(50, 3, 12), routing)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(y[:, 0], y[:, 2])
    assert not torch.equal(y[0], y[1])
    assert torch.equal(linear.eval()(torch.ones(50, 3, 12), routing), torch.ones(50, 3, 12))


def test_shared_routing_runs_while_any_linear_has_experts() -> None:
    router = HierarchicalRouter(12, CONFIG)
    linears = [RoutedLinear(12, 10, CONFIG), RoutedLinear(10, 10, CONFIG)]
    x = torch.randn(7, 12)
    linears[0].experts_enabled = False
    assert torch.equal(shared_routing(router, linears, x).scores, router(x).scores)
    linears[1].experts_enabled = False
    assert shared_routing(router, linears, x).scores.shape == (0, 3, 4)


@pytest.mark.parametrize("shape", [(7, 4, 6), (7, 3, 2), (1, 3, 4), (7, 12)])
def test_a_routing_of_another_shape_is_refused(shape) -> None:
    linear = with_experts(RoutedLinear(12, 10, CONFIG))
    routing = Routing(torch.rand(shape), torch.randn(shape))
    with pytest.raises(ValueError, match=r"experts\] = \[7, 3, 4\] needed, got scores of \["):
        linear(torch.randn(7, 12), routing)


def test_no_tokens_have_no_outputs() -> None:
    linear = with_experts(HiLoMoELinear(12, 10, HiLoMoEConfig(3, 4)))
    assert linear(torch.randn(7, 0, 12)).shape == (7, 0, 10)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("shape", [(12,), (2, 3, 4, 12)])
def test_other_shapes_are_refused(shape, enabled) -> None:
    """Not only once a later stage enables the experts."""
    linear = HiLoMoELinear(12, 10, HiLoMoEConfig(3, 4))
    linear.experts_enabled = enabled
    with pytest.raises(ValueError, match=r"\[B, d\] or \[B, N, d\]"):
        linear(torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_mean_over_tokens_is_that_of_torch(dtype) -> None:
    x = (torch.rand(2, 2000, 16) * 80.0).to(dtype)  # their sum is no float16
    torch.testing.assert_close(mean_over_tokens(x), x.mean(1))
    linear = HiLoMoELinear(16, 8, HiLoMoEConfig(3, 4)).to(dtype)
    assert linear(x).isfinite().all()


MANY_EXPERTS = HiLoMoEConfig(num_layers=3, num_experts=40, top_k=2)


@pytest.mark.parametrize("shape", [(7, 12), (7, 3, 12)])
def test_many_experts_equal_reference(shape) -> None:
    linear, x = with_experts(HiLoMoELinear(12, 10, MANY_EXPERTS)), torch.randn(shape)
    mean = x.reshape(7, -1, 12).mean(1)
    scores, _ = route_reference(linear.router.query(mean), linear.router.keys, top_k=2)
    expected = hilomoe_linear_reference(
        x, linear.weight, linear.bias, linear.expert_u, linear.expert_v, scores * 40
    )
    torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_many_experts_trace_script_and_export() -> None:
    linear, x = with_experts(HiLoMoELinear(12, 10, MANY_EXPERTS)).eval(), torch.randn(7, 12)
    expected = linear(x)
    traced = torch.fx.symbolic_trace(linear)
    batch = {0: torch.export.Dim.AUTO}
    exported = torch.export.export(linear, (torch.randn(5, 12),), dynamic_shapes=(batch,))
    for graph in (traced, torch.jit.script(traced), exported.module()):
        torch.testing.assert_close(graph(x), expected)


@pytest.mark.parametrize("num_experts", [4, 40])  # routed in score space, and in query space
def test_an_exported_layer_takes_one_sample(num_experts) -> None:
    config = HiLoMoEConfig(3, num_experts, query_dim=32)
    linear, x = with_experts(HiLoMoELinear(12, 10, config)).eval(), torch.randn(1, 12)
    batch = {0: torch.export.Dim.AUTO}
    # By itself torch.export takes it that a batch is never one sample.
    with torch.no_grad(), torch.fx.experimental._config.patch(backed_size_oblivious=True):
        exported = torch.export.export(linear, (torch.randn(5, 12),), dynamic_shapes=(batch,))
        torch.testing.assert_close(exported.module()(x), linear(x))


@pytest.mark.parametrize("num_tokens", [1, 40, 4000])
def test_an_exported_layer_takes_any_number_of_tokens(num_tokens) -> None:
    linear = with_experts(HiLoMoELinear(12, 10, CONFIG)).eval()
    shape = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    x = torch.randn(3, num_tokens, 12)
    with torch.no_grad():
        exported = torch.export.export(linear, (torch.randn(5, 7, 12),), dynamic_shapes=(shape,))
        actual = exported.module()(x)
        torch.testing.assert_close(actual, linear(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_many_experts_compile_without_graph_break() -> None:
    torch.compiler.reset()
    linear, x = with_experts(HiLoMoELinear(12, 10, MANY_EXPERTS)), torch.randn(7, 12)
    expected = torch.autograd.grad(linear(x).square().sum(), list(linear.parameters()))
    linear.compile(fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(linear(x).square().sum(), list(linear.parameters()))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("sizes", [(0, 8), (16, 0), (16, -8), (16, 2.5)])
def test_sizes_are_whole_and_at_least_1(sizes) -> None:
    with pytest.raises(ValueError, match="(in|out)_features must be"):
        HiLoMoELinear(*sizes, HiLoMoEConfig())
    with pytest.raises(ValueError, match="(in|out)_features must be"):
        HiLoMoEMLP(sizes[0], [sizes[1]], HiLoMoEConfig())
