from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from torchrec_hilomoe.ops import (
    building_is_cheaper,
    built_weight_linear,
    hilomoe_linear,
    hilomoe_linear_reference,
    route,
    route_reference,
    stacked_experts_linear,
)

EXECUTIONS = [hilomoe_linear, stacked_experts_linear, built_weight_linear]

# leading shape of x, d, o, L, K
SHAPES = [
    ((1,), 1, 1, 1, 1),
    ((6,), 5, 7, 1, 4),
    ((6,), 9, 3, 4, 1),
    ((33,), 12, 10, 5, 6),
    ((2, 1), 4, 6, 3, 4),
    ((4, 3), 8, 8, 3, 4),
    ((3, 40), 6, 5, 2, 7),
    ((0,), 5, 7, 3, 4),
    ((0, 3), 5, 7, 3, 4),
]


def random_inputs(
    lead: tuple[int, ...], d: int, o: int, layers: int, experts: int
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(sum(lead) + 7 * d + 11 * o + 13 * layers + experts)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.requires_grad_()

    x, weight, bias = draw(*lead, d), draw(o, d), draw(o)
    expert_u, expert_v = draw(layers, experts, o), draw(layers, experts, d)
    return x, weight, bias, expert_u, expert_v, draw(lead[0], layers, experts)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(("lead", "d", "o", "layers", "experts"), SHAPES)
def test_equals_reference_with_gradients(execution, lead, d, o, layers, experts) -> None:
    inputs = random_inputs(lead, d, o, layers, experts)
    scale = 1.5
    expected = hilomoe_linear_reference(*inputs[:-1], inputs[-1] * scale)
    actual = execution(*inputs, scale)
    upstream = torch.randn(expected.shape, dtype=expected.dtype)
    expected_grads = torch.autograd.grad(expected, inputs, upstream)
    actual_grads = torch.autograd.grad(actual, inputs, upstream)
    torch.testing.assert_close(
        (actual, *actual_grads), (expected, *expected_grads), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("lead", [(3,), (2, 4)])
def test_gradcheck(execution, lead) -> None:
    assert torch.autograd.gradcheck(execution, random_inputs(lead, 4, 3, 2, 3))


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("lead", [(6,), (6, 9)])
def test_tied_keys_equal_reference_with_gradients(lead, top_k) -> None:
    """Keys are V and the query is the input: gradients reach V by both ways."""
    *parameters, _ = random_inputs(lead, 8, 5, 3, 4)
    x, expert_v = parameters[0], parameters[4]
    query = x.flatten(1, -2).mean(1) if x.dim() == 3 else x
    expected = hilomoe_linear_reference(*parameters, route_reference(query, expert_v, top_k)[0])
    actual = hilomoe_linear(*parameters, route(query, expert_v, top_k)[0])
    upstream = torch.randn(expected.shape, dtype=expected.dtype)
    expected_grads = torch.autograd.grad(expected, parameters, upstream)
    actual_grads = torch.autograd.grad(actual, parameters, upstream)
    torch.testing.assert_close(
        (actual, *actual_grads), (expected, *expected_grads), rtol=1e-10, atol=1e-10
    )


def test_silent_experts_leave_the_linear_bit_equal() -> None:
    x, weight, bias, expert_u, expert_v, scores = (
        t.detach().float() for t in random_inputs((257,), 65, 33, 3, 8)
    )
    y = stacked_experts_linear(x, weight, bias, torch.zeros_like(expert_u), expert_v, scores, 8.0)
    assert torch.equal(y, F.linear(x, weight, bias))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_order_of_experts_does_not_matter(execution) -> None:
    x, weight, bias, expert_u, expert_v, scores = random_inputs((5, 6), 8, 7, 3, 4)
    order = torch.tensor([2, 0, 3, 1])
    permuted = execution(
        x, weight, bias, expert_u[:, order], expert_v[:, order], scores[..., order]
    )
    expected = execution(x, weight, bias, expert_u, expert_v, scores)
    torch.testing.assert_close(permuted, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_inputs_need_not_be_contiguous(execution) -> None:
    x, *rest = random_inputs((6, 5), 8, 7, 3, 4)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    torch.testing.assert_close(execution(strided, *rest), execution(x, *rest))


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("lead", [(6,), (4, 9)])
def test_half_precision(execution, lead) -> None:
    inputs = [t.detach() for t in random_inputs(lead, 8, 7, 3, 4)]
    exact = hilomoe_linear_reference(*inputs)
    singles = [t.float() for t in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = execution(*singles)
    halves = execution(*(t.bfloat16() for t in singles[:-1]), singles[-1])  # scores stay float32
    assert autocast.dtype == halves.dtype == torch.bfloat16
    tolerance = 0.03 * exact.abs().max().item()
    torch.testing.assert_close(autocast.double(), exact, rtol=0, atol=tolerance)
    torch.testing.assert_close(halves.double(), exact, rtol=0, atol=tolerance)


def count_flops(execution, inputs: list[Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        execution(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize(("d", "o"), [(8, 8), (24, 8), (8, 40)])
@pytest.mark.parametrize("tokens", [1, 10, 20, 30, 40, 100])
def test_the_cheaper_execution_is_taken(tokens: int, d: int, o: int) -> None:
    inputs = [t.detach() for t in random_inputs((3, tokens), d, o, 2, 10)]
    stacked = count_flops(stacked_experts_linear, inputs)
    built = count_flops(built_weight_linear, inputs)
    builds = building_is_cheaper(tokens, d, o, num_experts=20)
    assert builds == (built + 3 * 2 * 64 * d * o < stacked)  # and the traffic of 3 weights
    assert count_flops(hilomoe_linear, inputs) == (built if builds else stacked)


# Measured: the number of tokens from which on a built weight takes less time.
@pytest.mark.parametrize(
    ("features", "experts", "tokens"), [(64, 8, 256), (64, 96, 90), (128, 24, 256), (128, 128, 128)]
)
def test_builds_about_where_measurement_says(features, experts, tokens) -> None:
    assert not building_is_cheaper(tokens // 2, features, features, experts)
    assert building_is_cheaper(tokens * 2, features, features, experts)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("lead", [(6,), (4, 9)])
def test_scripted_equals_eager(execution, lead) -> None:
    inputs = random_inputs(lead, 8, 7, 3, 4)
    scripted = torch.jit.script(execution)
    for _ in range(3):  # the profiling executor rewrites the graph after its first runs
        torch.testing.assert_close(scripted(*inputs, 2.0), execution(*inputs, 2.0))
