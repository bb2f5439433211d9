from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torchrec_hilomoe.ops import (
    hilomoe_linear,
    hilomoe_linear_reference,
    stacked_experts_linear,
    tiled,
    tiled_experts_linear,
    tiling_is_cheaper,
)

LARGE = (2200, 6, 40), 30, 2, 8  # x, o, L, K: more than one tile of two threads


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiled, "_TILE_TOKENS", 256)


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random_inputs(
    shape: tuple[int, ...], o: int, layers: int, experts: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape) + o)
    d = shape[-1]
    shapes = [shape, (o, d), (o,), (layers, experts, o), (layers, experts, d)]
    shapes.append((shape[0], layers, experts))
    draws = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
    return [draw.requires_grad_() for draw in draws]


# The last has fewer samples than it would need tiles.
@pytest.mark.parametrize(
    "shape", [(9001, 40), (1100, 3, 40), (4001, 3, 40), (2, 4000, 80), (0, 40), (7, 40), (2, 0, 40)]
)
def test_equals_reference_with_gradients(shape) -> None:
    inputs = random_inputs(shape, 30, 2, 3)
    expected = hilomoe_linear_reference(*inputs[:-1], inputs[-1] * 1.5)
    actual = tiled_experts_linear(*inputs, 1.5)
    upstream = torch.randn(expected.shape, dtype=expected.dtype)
    torch.testing.assert_close(
        (actual, *torch.autograd.grad(actual, inputs, upstream)),
        (expected, *torch.autograd.grad(expected, inputs, upstream)),
        rtol=1e-10,
        atol=1e-10,
    )


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(tiled_experts_linear, random_inputs((3, 2, 4), 3, 2, 3))


def test_strided_inputs_and_gradients() -> None:
    inputs = random_inputs(*LARGE)
    strided = inputs[0].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    upstream = torch.randn(30, 2200, 6, dtype=torch.float64).permute(1, 2, 0)
    expected = torch.autograd.grad(tiled_experts_linear(*inputs), inputs, upstream.contiguous())
    inputs[0] = strided
    actual = torch.autograd.grad(tiled_experts_linear(*inputs), inputs, upstream)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("frozen", [0, 1, 2, 3, 4, 5])
def test_frozen_inputs_leave_the_other_gradients_alone(frozen) -> None:
    inputs = random_inputs(*LARGE)
    expected = torch.autograd.grad(tiled_experts_linear(*inputs).square().sum(), inputs)
    inputs[frozen].requires_grad_(False)
    tiled_experts_linear(*inputs).square().sum().backward()
    for index, (tensor, grad) in enumerate(zip(inputs, expected, strict=True)):
        if index == frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, grad)


@pytest.mark.parametrize(
    ("shape", "o"), [((8099, 113), 77), ((1811, 5, 96), 128), ((5000, 432), 8), ((5000, 96), 1)]
)
def test_silent_experts_leave_the_linear_bit_equal(shape, o) -> None:
    x, weight, bias, expert_u, expert_v, scores = random_inputs(shape, o, 3, 8, torch.float32)
    y = hilomoe_linear(x, weight, bias, torch.zeros_like(expert_u), expert_v, scores)
    assert tiling_is_cheaper(x, weight, scores) == (o > 1)
    assert torch.equal(y, F.linear(x, weight, bias))


def test_taken_for_more_than_one_tile() -> None:
    large, small = random_inputs(*LARGE), random_inputs((50, 40), 30, 2, 8)
    assert "Tiled" in hilomoe_linear(*large).grad_fn.name()
    assert "Tiled" not in hilomoe_linear(*small).grad_fn.name()


def test_tiles_grow_with_the_threads(threads) -> None:
    tokens = 8 * (tiled._TILE_NUMEL // (40 + 30))
    x, y = torch.empty(tokens, 40), torch.empty(tokens, 30)
    assert len(list(tiled.tiles(x, y))) == 8 // threads


def test_not_taken_for_mixed_precision() -> None:
    inputs = random_inputs(*LARGE, torch.float32)
    halves = [t.bfloat16() for t in inputs[:-1]]
    assert not tiling_is_cheaper(halves[0], halves[1], inputs[-1])  # scores stay float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not tiling_is_cheaper(inputs[0], inputs[1], inputs[-1])


def test_autocast_around_the_backward_changes_nothing() -> None:
    inputs = random_inputs(*LARGE, torch.float32)
    y = tiled_experts_linear(*inputs)
    expected = torch.autograd.grad(y, inputs, torch.ones_like(y), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = torch.autograd.grad(y, inputs, torch.ones_like(y))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_keeps_the_expert_activations_once() -> None:
    inputs = random_inputs(*LARGE)
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}

    def kept(execution) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = execution(*inputs)
        assert y.requires_grad
        return sum(size for pointer, size in storages.items() if pointer not in known)

    activations = 2200 * 6 * 2 * 8 * 8  # [BN, LK] in float64
    assert kept(tiled_experts_linear) == activations
    assert kept(stacked_experts_linear) >= 2 * activations


@pytest.mark.parametrize("shape", [(2200, 40), (2200, 6, 40)])
def test_output_may_be_changed_in_place(shape) -> None:
    inputs = random_inputs(shape, *LARGE[1:])
    expected = torch.autograd.grad(tiled_experts_linear(*inputs).relu().sum(), inputs)
    actual = torch.autograd.grad(tiled_experts_linear(*inputs).relu_().sum(), inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_second_derivatives_are_refused() -> None:
    inputs = random_inputs((7, 4), 3, 2, 3)
    (grad,) = torch.autograd.grad(
        tiled_experts_linear(*inputs).square().sum(), inputs[:1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
