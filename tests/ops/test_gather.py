from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchrec_hilomoe.ops import (
    gathered_experts_linear,
    gathering_is_cheaper,
    hilomoe_linear,
    hilomoe_linear_reference,
    route,
    stacked_experts_linear,
)

IN, OUT, LAYERS, EXPERTS, TOP_K = 6, 5, 3, 40, 2


def random_inputs(lead: tuple[int, ...]) -> tuple[list[Tensor], Tensor, Tensor]:
    """x and the parameters of the linear; query; keys."""
    generator = torch.Generator().manual_seed(sum(lead))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    linear = [
        draw(*lead, IN),
        draw(OUT, IN),
        draw(OUT),
        draw(LAYERS, EXPERTS, OUT),
        draw(LAYERS, EXPERTS, IN),
    ]
    return linear, draw(lead[0], IN), draw(LAYERS, EXPERTS, IN)


@pytest.mark.parametrize("execution", [gathered_experts_linear, hilomoe_linear])
@pytest.mark.parametrize("lead", [(7,), (5, 3), (5, 1), (0,), (0, 3)])
def test_equals_reference_with_gradients(execution, lead) -> None:
    linear, query, keys = random_inputs(lead)
    inputs = [*linear, query, keys]
    scores, _ = route(query, keys, TOP_K)
    actual = execution(*linear, scores, 1.5, TOP_K)
    expected = hilomoe_linear_reference(*linear, scores * 1.5)
    upstream = torch.randn(expected.shape, dtype=expected.dtype)
    torch.testing.assert_close(
        (actual, *torch.autograd.grad(actual, inputs, upstream, retain_graph=True)),
        (expected, *torch.autograd.grad(expected, inputs, upstream)),
        rtol=1e-10,
        atol=1e-10,
    )


def test_gradcheck() -> None:
    linear, query, keys = random_inputs((4,))
    kept = route(query, keys, TOP_K)[0].detach() > 0

    def gathered(*inputs: Tensor) -> Tensor:
        scores = torch.where(kept, inputs[-1], 0.0)
        return gathered_experts_linear(*inputs[:-1], scores, 1.5, TOP_K)

    positive = torch.rand(kept.shape, dtype=torch.float64).add(0.1).requires_grad_()
    assert torch.autograd.gradcheck(gathered, (*linear, positive))


def test_an_expert_kept_by_many_samples_or_none() -> None:
    linear, *_ = random_inputs((7,))
    scores = torch.zeros(7, LAYERS, EXPERTS, dtype=torch.float64)
    scores[:, :, 3] = 0.75
    scores[::2, :, 8] = 0.25
    gathered_experts_linear(*linear, scores, 1.0, TOP_K).sum().backward()
    used = linear[3].grad.abs().sum(-1) > 0
    assert used.sum(-1).tolist() == [2] * LAYERS
    assert used[:, [3, 8]].all()


def test_is_taken_where_few_of_many_are_kept() -> None:
    linear, query, keys = random_inputs((7,))
    scores, _ = route(query, keys, TOP_K)
    gathered = hilomoe_linear(*linear, scores, 1.0, TOP_K)
    assert torch.equal(gathered, gathered_experts_linear(*linear, scores, 1.0, TOP_K))
    stacked = hilomoe_linear(*linear, scores, 1.0)
    assert torch.equal(stacked, stacked_experts_linear(*linear, scores, 1.0))
    assert not torch.equal(gathered, stacked)  # equal up to the order of the sum
    assert gathering_is_cheaper(EXPERTS, TOP_K)
    assert not gathering_is_cheaper(EXPERTS, 8)


def test_does_not_copy_the_kept_rows() -> None:
    linear, query, keys = random_inputs((7,))
    scores = route(query, keys, TOP_K)[0].detach()
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gathered_experts_linear(*linear, scores, 1.0, TOP_K)
    assert max(sizes) == LAYERS * EXPERTS * IN  # V; kept rows would be 7 * L * top_k * IN
    assert 7 * LAYERS * TOP_K * IN not in sizes


@pytest.mark.parametrize("lead", [(33,), (9, 4)])
def test_half_precision(lead) -> None:
    linear, query, keys = random_inputs(lead)
    linear = [t.detach() for t in linear]
    scores = route(query, keys, TOP_K)[0].detach()
    exact = hilomoe_linear_reference(*linear, scores)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        singles = (t.float() for t in linear)
        autocast = gathered_experts_linear(*singles, scores.float(), 1.0, TOP_K)
    halves = gathered_experts_linear(*(t.bfloat16() for t in linear), scores.float(), 1.0, TOP_K)
    assert autocast.dtype == halves.dtype == torch.bfloat16
    tolerance = 0.03 * exact.abs().max().item()
    torch.testing.assert_close(autocast.double(), exact, rtol=0, atol=tolerance)
    torch.testing.assert_close(halves.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("lead", [(7,), (5, 3)])
def test_scripted_equals_eager(lead) -> None:
    linear, query, keys = random_inputs(lead)
    inputs = [t.detach() for t in (*linear, route(query, keys, TOP_K)[0])]
    scripted = torch.jit.script(gathered_experts_linear)
    for _ in range(3):  # the profiling executor rewrites the graph after its first runs
        expected = gathered_experts_linear(*inputs, 1.5, TOP_K)
        torch.testing.assert_close(scripted(*inputs, 1.5, TOP_K), expected)


@pytest.mark.slow
def test_compiles_without_graph_break() -> None:
    torch.compiler.reset()
    linear, query, keys = random_inputs((7,))
    inputs = [t.detach().requires_grad_() for t in (*linear, route(query, keys, TOP_K)[0])]

    def run(execution) -> tuple[Tensor, ...]:
        y = execution(*inputs, 1.5, TOP_K)
        return y, *torch.autograd.grad(y.square().sum(), inputs)

    compiled = torch.compile(gathered_experts_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(gathered_experts_linear))
