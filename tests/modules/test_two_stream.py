from __future__ import annotations

import pytest
import torch
from torch import nn

from torchrec_hilomoe.modules import (
    BilinearFusion,
    HiLoMoEConfig,
    HiLoMoETwoStreamArch,
    TwoStreamConfig,
)
from torchrec_hilomoe.ops import pairwise_dot_products


def test_fusion_equals_torchs_bilinear_head_by_head() -> None:
    fusion = BilinearFusion(12, 8, num_heads=4)
    x, y = torch.randn(5, 12), torch.randn(5, 8)
    expected = torch.stack(
        [
            nn.functional.bilinear(x[:, 3 * h : 3 * h + 3], y[:, 2 * h : 2 * h + 2], w[None])[:, 0]
            for h, w in enumerate(fusion.weight)
        ],
        dim=1,
    )
    torch.testing.assert_close(fusion(x, y), expected)


def test_fusion_weights_keep_the_scale_of_a_head() -> None:
    torch.manual_seed(0)
    fusion = BilinearFusion(1000, 600, num_heads=2)
    assert fusion.weight.std().item() == pytest.approx((2 / 800) ** 0.5, rel=0.02)


@pytest.mark.parametrize("num_heads", [0, 5, 24])
def test_heads_must_divide_both_streams(num_heads: int) -> None:
    with pytest.raises(ValueError, match=f"num_heads must divide .* 12 and 8; got {num_heads}"):
        BilinearFusion(12, 8, num_heads)


def test_the_fusion_has_features() -> None:
    with pytest.raises(ValueError, match="num_heads must divide .* 0 and 8; got 4"):
        BilinearFusion(0, 8, 4)


@pytest.mark.parametrize("sizes", [(-1, 4), (2, 0)])
def test_there_are_features(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"(num_sparse_features|embedding_dim) must be at least"):
        HiLoMoETwoStreamArch(*sizes, TwoStreamConfig(), HiLoMoEConfig(3, 4))


@pytest.mark.parametrize("width", [0, -10])
@pytest.mark.parametrize("stream", ["expert_width", "plain_width"])
def test_streams_have_features(stream: str, width: int) -> None:
    with pytest.raises(ValueError, match=f"{stream} must be at least 1, got {width}"):
        TwoStreamConfig(**{stream: width})


def _arch(**streams: object) -> HiLoMoETwoStreamArch:
    torch.manual_seed(0)
    shape = TwoStreamConfig(expert_width=10, plain_width=8, num_heads=2, **streams)
    arch = HiLoMoETwoStreamArch(2, 4, shape, HiLoMoEConfig(3, 4))
    nn.init.normal_(arch.routed_stream[0].expert_u)
    return arch


@pytest.mark.parametrize("dot_products", [True, False])
def test_output_is_both_streams_and_their_products(dot_products: bool) -> None:
    arch = _arch(dot_products=dot_products)
    inputs = {"dense_features": torch.randn(5, 4), "sparse_features": torch.randn(5, 2, 4)}
    flat = torch.cat((inputs["dense_features"], inputs["sparse_features"].flatten(1)), dim=1)
    if dot_products:
        dots = pairwise_dot_products(flat.unflatten(1, (3, 4)))
        flat = torch.cat((flat, dots, torch.zeros(5, 1)), dim=1)  # 12 + 3 + 1 inputs
    x, y = torch.relu(arch.routed_stream[0](flat)), torch.relu(arch.plain_stream[0](flat))
    output = arch(**inputs)
    assert output.shape == (5, arch.out_features)
    torch.testing.assert_close(output, torch.cat((x, y, arch.fusion(x, y)), dim=1))


def test_fusion_scale_is_a_factor_on_the_products() -> None:
    inputs = {"dense_features": torch.randn(5, 4), "sparse_features": torch.randn(5, 2, 4)}
    one, thirty = _arch()(**inputs), _arch(fusion_scale=30.0)(**inputs)
    torch.testing.assert_close(thirty[:, :18], one[:, :18])
    torch.testing.assert_close(thirty[:, 18:], 30 * one[:, 18:])


def test_batch_norm_and_dropout_of_both_streams() -> None:
    arch = _arch(batch_norm=True, dropout=0.5)
    for stream, width in ((arch.routed_stream, 10), (arch.plain_stream, 8)):
        _, norm, relu, dropout = stream
        assert isinstance(norm, nn.BatchNorm1d)
        assert norm.num_features == width
        assert isinstance(relu, nn.ReLU)
        assert dropout.p == 0.5


def test_only_the_first_stream_has_experts() -> None:
    names = {name for name, _ in _arch().named_parameters() if "expert_u" in name}
    assert names == {"routed_stream.0.expert_u"}
