from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchrec_hilomoe.ops import route_reference
from torchrec_hilomoe.ops.query_recurrence import sparse_query_recurrence


def random_inputs(
    batch: int, layers: int, experts: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch + 10 * layers + 100 * experts)
    query = torch.randn(batch, 5, generator=generator, dtype=dtype)
    keys = torch.randn(layers, experts, 5, generator=generator, dtype=dtype)
    return query.requires_grad_(), keys.requires_grad_()


@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("top_k", [1, 3, 8])
@pytest.mark.parametrize(("batch", "layers"), [(0, 3), (1, 1), (7, 1), (33, 6)])
def test_equals_reference_with_gradients_of_either_result(batch, layers, top_k, used) -> None:
    inputs = random_inputs(batch, layers, 9)
    expected, actual = (
        [function(*inputs, top_k)[index] for index in used]
        for function in (route_reference, sparse_query_recurrence)
    )
    upstream = [torch.randn(t.shape, dtype=t.dtype) for t in expected]
    torch.testing.assert_close(
        (*actual, *torch.autograd.grad(actual, inputs, upstream)),
        (*expected, *torch.autograd.grad(expected, inputs, upstream)),
        rtol=1e-10,
        atol=1e-10,
    )


def test_autocast_changes_nothing() -> None:
    inputs = random_inputs(33, 4, 9, torch.float32)

    def results() -> list[Tensor]:
        routing = sparse_query_recurrence(*inputs, 2)
        loss = sum(t.square().sum() for t in routing)
        return [*routing, *torch.autograd.grad(loss, inputs)]

    expected = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(results(), expected, rtol=0, atol=0)


def test_no_product_with_all_keys_is_left_in_the_backward_of_kept_scores() -> None:
    query, keys = random_inputs(33, 4, 900)
    scores, logits = sparse_query_recurrence(query, keys, 2)

    def products(loss: Tensor) -> int:
        with torch.profiler.profile() as profiled:
            loss.backward(retain_graph=True)
        return sum(event.name == "aten::addmm_" for event in profiled.events())

    assert products(scores.square().sum()) == 0
    assert products(logits.square().sum()) == 8


def test_second_derivatives_are_refused() -> None:
    inputs = random_inputs(7, 2, 5)
    scores, _ = sparse_query_recurrence(*inputs, 2)
    (grad,) = torch.autograd.grad(scores.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
