from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrec.models.dlrm import InteractionDCNArch

from torchrec_hilomoe.modules import HiLoMoEConfig, HiLoMoEInteractionArch


def test_linear_and_relu_over_the_concatenation_that_torchrec_builds() -> None:
    arch = HiLoMoEInteractionArch(2, 4, 10, HiLoMoEConfig(3, 4))
    nn.init.normal_(arch.linear.expert_u)
    torchrec_arch = InteractionDCNArch(2, nn.Sequential(arch.linear, nn.ReLU()))
    inputs = {"dense_features": torch.randn(5, 4), "sparse_features": torch.randn(5, 2, 4)}
    output = arch(**inputs)
    assert output.shape == (5, arch.out_features)
    torch.testing.assert_close(output, torchrec_arch(**inputs))


def test_every_feature_has_a_say_in_the_routing() -> None:
    arch = HiLoMoEInteractionArch(2, 4, 10, HiLoMoEConfig(3, 4))
    dense = torch.randn(5, 4, requires_grad=True)
    sparse = torch.randn(5, 2, 4, requires_grad=True)
    arch(dense, sparse)
    arch.linear.router.routing.logits[:, 0, 0].sum().backward()
    assert dense.grad.abs().min() > 0
    assert sparse.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ((-1, 4, 8), "num_sparse_features"),
        ((2, 0, 8), "embedding_dim"),
        ((2, 4, 0), "out_features"),
    ],
)
def test_sizes_out_of_range_are_named(sizes: tuple[int, int, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        HiLoMoEInteractionArch(*sizes, HiLoMoEConfig(3, 4))


def test_without_sparse_features() -> None:
    arch = HiLoMoEInteractionArch(0, 4, 10, HiLoMoEConfig(3, 4))
    assert arch(torch.randn(5, 4), torch.randn(5, 0, 4)).shape == (5, 10)
