from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torchrec.fx import symbolic_trace
from torchrec.models.dlrm import InteractionArch

from torchrec_hilomoe.modules import HiLoMoEConfig, HiLoMoETwoStreamArch, TwoStreamConfig
from torchrec_hilomoe.ops import pairwise_dot_products, with_dot_products


def reference(dense: Tensor, sparse: Tensor, padding: int) -> Tensor:
    """Pair by pair."""
    features = [dense, *sparse.unbind(1)]
    pairs = [
        (features[i] * features[j]).sum(1)
        for i in range(len(features))
        for j in range(i + 1, len(features))
    ]
    zeros = [torch.zeros_like(dense[:, 0])] * padding
    return torch.cat([*features, *(one.unsqueeze(1) for one in [*pairs, *zeros])], dim=1)


def random_features(batch: int, num_sparse: int, dim: int) -> tuple[Tensor, Tensor]:
    dense = torch.randn(batch, dim, dtype=torch.float64, requires_grad=True)
    sparse = torch.randn(batch, num_sparse, dim, dtype=torch.float64, requires_grad=True)
    return dense, sparse


def test_products_equal_torchrecs() -> None:
    dense, sparse = torch.randn(5, 4), torch.randn(5, 3, 4)
    features = torch.cat((dense.unsqueeze(1), sparse), dim=1)
    products = torch.cat((dense, pairwise_dot_products(features)), dim=1)
    torch.testing.assert_close(products, InteractionArch(3)(dense, sparse))


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(("batch", "num_sparse"), [(5, 3), (5, 1), (5, 0), (0, 3), (1, 26)])
def test_equals_reference_with_gradients(batch: int, num_sparse: int, padding: int) -> None:
    features = random_features(batch, num_sparse, 4)
    actual, expected = with_dot_products(*features, padding), reference(*features, padding)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        (actual, *torch.autograd.grad(actual, features, upstream, materialize_grads=True)),
        (expected, *torch.autograd.grad(expected, features, upstream, materialize_grads=True)),
    )


def test_features_may_be_columns_of_wider_ones() -> None:
    dense, sparse = random_features(5, 3, 8)
    parts = dense[:, 4:], sparse[..., 4:]
    torch.testing.assert_close(with_dot_products(*parts), reference(*parts, 0))
    with_dot_products(*parts).square().sum().backward()
    gradients = dense.grad, sparse.grad
    dense.grad = sparse.grad = None
    reference(*parts, 0).square().sum().backward()
    torch.testing.assert_close(gradients, (dense.grad, sparse.grad))


@pytest.mark.parametrize("learns", ["dense", "sparse", "neither"])
def test_features_that_do_not_learn(learns: str) -> None:
    dense, sparse = random_features(5, 3, 4)
    dense.requires_grad_(learns == "dense")
    sparse.requires_grad_(learns == "sparse")
    combined = with_dot_products(dense, sparse)
    assert combined.requires_grad == (learns != "neither")
    for features in (dense, sparse):
        if features.requires_grad:
            (gradient,) = torch.autograd.grad(combined.sum(), features)
            (expected,) = torch.autograd.grad(reference(dense, sparse, 0).sum(), features)
            torch.testing.assert_close(gradient, expected)


def test_the_wider_dtype_is_the_results() -> None:
    dense, sparse = torch.randn(5, 4), torch.randn(5, 3, 4, dtype=torch.float64)
    combined = with_dot_products(dense, sparse)
    assert combined.dtype == torch.float64
    torch.testing.assert_close(combined, reference(dense.double(), sparse, 0))


@pytest.mark.parametrize("shape", [(1, 4), (5, 1), (5, 3)])
def test_features_of_other_sizes_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        with_dot_products(torch.randn(shape), torch.randn(5, 3, 4))


def test_nothing_but_the_result_is_kept_for_the_gradients() -> None:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        combined = with_dot_products(*random_features(5, 3, 4))
    assert [t.data_ptr() for t in kept] == [combined.data_ptr()]


def test_autocast_keeps_the_features_as_they_are() -> None:
    dense, sparse = torch.randn(5, 4, requires_grad=True), torch.randn(5, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        combined = with_dot_products(dense, sparse)
    assert torch.equal(combined[:, :16], torch.cat((dense, sparse.flatten(1)), dim=1))
    torch.testing.assert_close(combined, reference(dense, sparse, 0), rtol=0.05, atol=0.05)
    combined.sum().backward()
    torch.testing.assert_close(dense.grad, 1 + sparse.sum(1))


def test_compiled_and_scripted_forms_give_the_same() -> None:
    streams = TwoStreamConfig(expert_width=8, plain_width=8, num_heads=2)
    arch = HiLoMoETwoStreamArch(3, 4, streams, HiLoMoEConfig(2, 4)).eval()
    nn.init.normal_(arch.routed_stream[0].expert_u)
    inputs = {"dense_features": torch.randn(5, 4), "sparse_features": torch.randn(5, 3, 4)}
    expected = arch(**inputs)
    scripted = torch.jit.script(symbolic_trace(copy.deepcopy(arch)))
    exported = torch.export.export(arch, (), inputs).module()
    compiled = torch.compile(arch, backend="aot_eager", fullgraph=True)
    for form in (scripted, exported, compiled):
        torch.testing.assert_close(form(**inputs), expected)
