from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torchrec_hilomoe.ops import (
    RouterWeights,
    hilomoe_linear_reference,
    route_reference,
    self_routed_linear,
    self_routing_is_cheaper,
    tiled,
)

EPS = 1e-2  # not the default of torch


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiled, "_TILE_NUMEL", 0)
    monkeypatch.setattr(tiled, "_TILE_TOKENS", 500)


def random_inputs(
    batch: int, d: int, o: int, layers: int, experts: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """x, the linear's four parameters and the router's five, D_q 6."""
    generator = torch.Generator().manual_seed(batch + 10 * d + 100 * o + layers)
    shapes = [(batch, d), (o, d), (o,), (layers, experts, o), (layers, experts, d)]
    shapes += [(d,), (d,), (6, d), (6,), (layers, experts, 6)]
    draws = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
    return [draw.requires_grad_() for draw in draws]


def self_routed(*inputs: Tensor, top_k: int | None = None) -> tuple[Tensor, ...]:
    return self_routed_linear(*inputs[:5], RouterWeights(*inputs[5:], EPS), 1.5, top_k)


def reference(*inputs: Tensor, top_k: int | None = None) -> tuple[Tensor, ...]:
    x, weight, bias, u, v, norm_weight, norm_bias, projection, projection_bias, keys = inputs
    normalised = F.layer_norm(x, x.shape[1:], norm_weight, norm_bias, EPS)
    scores, logits = route_reference(F.linear(normalised, projection, projection_bias), keys, top_k)
    return hilomoe_linear_reference(x, weight, bias, u, v, scores * 1.5), scores, logits


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize(
    ("batch", "d", "o", "layers", "experts"),
    [(0, 7, 5, 2, 3), (1, 7, 5, 2, 3), (9, 1, 1, 1, 2), (1301, 43, 57, 1, 8), (803, 40, 90, 5, 3)],
)
def test_equals_reference_with_gradients(batch, d, o, layers, experts, top_k) -> None:
    inputs = random_inputs(batch, d, o, layers, experts)
    expected, actual = reference(*inputs, top_k=top_k), self_routed(*inputs, top_k=top_k)
    upstream = [torch.randn(t.shape, dtype=t.dtype) for t in expected]
    torch.testing.assert_close(
        (*actual, *torch.autograd.grad(actual, inputs, upstream)),
        (*expected, *torch.autograd.grad(expected, inputs, upstream)),
        rtol=1e-8,
        atol=1e-8,
    )


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(self_routed, random_inputs(3, 4, 3, 2, 3))


@pytest.mark.parametrize("used", [0, 1, 2])
def test_gradient_of_one_result_alone(used) -> None:
    inputs = random_inputs(803, 40, 90, 2, 3)
    options = {"allow_unused": True, "materialize_grads": True}
    expected = torch.autograd.grad(reference(*inputs)[used].square().sum(), inputs, **options)
    actual = torch.autograd.grad(self_routed(*inputs)[used].square().sum(), inputs, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("frozen", range(10))
def test_frozen_inputs_leave_the_other_gradients_alone(frozen) -> None:
    inputs = random_inputs(803, 40, 90, 2, 3)
    expected = torch.autograd.grad(sum(t.square().sum() for t in self_routed(*inputs)), inputs)
    inputs[frozen].requires_grad_(False)
    sum(t.square().sum() for t in self_routed(*inputs)).backward()
    for index, (tensor, grad) in enumerate(zip(inputs, expected, strict=True)):
        if index == frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, grad)


def test_a_frozen_base_or_input_is_left_out_of_the_work() -> None:
    inputs = random_inputs(9, 40, 90, 2, 3)

    def products() -> int:
        y, *_ = self_routed(*inputs)
        with torch.profiler.profile() as profiled:
            y.sum().backward()
        return sum(event.name in ("aten::mm", "aten::addmm_") for event in profiled.events())

    everything = products()
    inputs[1].requires_grad_(False)
    assert products() == everything - 1
    inputs[0].requires_grad_(False)
    assert products() == everything - 3


def test_silent_experts_leave_the_linear_bit_equal() -> None:
    inputs = random_inputs(4099, 113, 77, 3, 8, torch.float32)
    inputs[3] = torch.zeros_like(inputs[3])
    assert torch.equal(self_routed(*inputs)[0], F.linear(*inputs[:3]))


@pytest.mark.parametrize("mean", [0.0, 30.0, 1000.0])
def test_exact_to_the_rounding_of_inputs_far_from_zero(mean) -> None:
    inputs = random_inputs(803, 40, 90, 2, 3, torch.float32)
    with torch.no_grad():
        inputs[0] += mean
    upstream = [torch.randn(s) for s in ((803, 2, 3), (803, 2, 3))]

    def of_routing(function, inputs: list[Tensor]) -> list[Tensor]:
        """Scores, logits, and their gradients in x and the projection."""
        routing = function(*inputs)[1:]
        gradients = torch.autograd.grad(
            routing, (inputs[0], inputs[7]), [u.to(inputs[0].dtype) for u in upstream]
        )
        return [*routing, *gradients]

    exact = of_routing(reference, [t.detach().double().requires_grad_() for t in inputs])
    errors = [
        [(a - b).norm() / b.norm() for a, b in zip(of_routing(f, inputs), exact, strict=True)]
        for f in (self_routed, reference)
    ]
    for ours, plain in zip(*errors, strict=True):
        assert ours < 4 * plain + 4 * torch.finfo(torch.float32).eps * mean


def test_strided_input_and_gradient() -> None:
    inputs = random_inputs(803, 40, 90, 2, 3)
    upstream = torch.randn(90, 803, dtype=torch.float64).t()
    expected = torch.autograd.grad(self_routed(*inputs)[0], inputs, upstream.contiguous())
    inputs[0] = inputs[0].detach().t().contiguous().t().requires_grad_()
    actual = torch.autograd.grad(self_routed(*inputs)[0], inputs, upstream)
    torch.testing.assert_close(actual, expected)


def test_keeps_nothing_of_the_size_of_the_input() -> None:
    inputs = random_inputs(803, 400, 90, 1, 3)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        assert self_routed(*inputs)[0].requires_grad
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    sizes = [t.numel() for t in kept if t.untyped_storage().data_ptr() not in known]
    assert max(sizes) == 803 * 2 * 3


def test_autocast_around_the_backward_changes_nothing() -> None:
    inputs = random_inputs(803, 40, 90, 2, 3, torch.float32)
    y, *_ = self_routed(*inputs)
    expected = torch.autograd.grad(y, inputs[:5], torch.ones_like(y), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = torch.autograd.grad(y, inputs[:5], torch.ones_like(y))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_second_derivatives_are_refused() -> None:
    inputs = random_inputs(7, 4, 3, 2, 3)
    (grad,) = torch.autograd.grad(
        self_routed(*inputs)[0].square().sum(), inputs[:1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_taken_for_flat_inputs_of_one_dtype() -> None:
    x, weight = torch.randn(5, 4), torch.randn(3, 4)
    assert self_routing_is_cheaper(x, weight)
    assert not self_routing_is_cheaper(x.unsqueeze(1), weight)
    assert not self_routing_is_cheaper(x.bfloat16(), weight)
    assert not self_routing_is_cheaper(x, weight[:1])  # its rounding changes with the tiles
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not self_routing_is_cheaper(x, weight)
