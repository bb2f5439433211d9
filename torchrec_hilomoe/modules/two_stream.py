"""Two streams of features, one of them with routed experts, joined by a bilinear fusion."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from torchrec_hilomoe.config import STRICT
from torchrec_hilomoe.modules.checks import check_type, check_whole
from torchrec_hilomoe.modules.config import HiLoMoEConfig
from torchrec_hilomoe.modules.linear import HiLoMoELinear
from torchrec_hilomoe.ops import concatenate, with_dot_products

torch.fx.wrap("with_dot_products")

# Rows of other lengths than multiples of 32 bytes made products 1.0 to 1.5 times slower (AVX2 CPU).
_ALIGNMENT = 8


@dataclass(frozen=True)
class TwoStreamConfig:
    """Shape of the streams of :class:`HiLoMoETwoStreamArch`.

    Args:
        expert_width (int): width of the stream with routed experts.
        plain_width (int): width of the stream without.
        num_heads (int): heads of the bilinear fusion; divides both widths.
        fusion_scale (float): factor on the products. At 1 a linear layer behind them, as
            ``nn.Linear`` initialises it, gives products and streams the same small weights; at 30
            the products weigh about as much as in FinalMLP, which adds them to the logit as they
            are. Products that weigh more learn pairs by heart sooner [R].
        batch_norm (bool): normalise each stream before its ReLU.
        dropout (float): dropout on each stream.
        dot_products (bool): both streams also read the dot products of all pairs of features, as
            TorchRec's ``InteractionArch`` takes them: (F + 1) F / 2 more inputs, which a ReLU layer
            would need far more units to approximate [R]; and zeros, to a multiple of 8 inputs.

    Raises:
        ValueError: a value is of another type or out of range; the message names its field.
    """

    __pydantic_config__ = STRICT

    expert_width: int = 200
    plain_width: int = 200
    num_heads: int = 10
    fusion_scale: float = 1.0
    batch_norm: bool = False
    dropout: float = 0.0
    dot_products: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_norm", "dot_products"):
            check_type(name, getattr(self, name), bool)
        for name in ("expert_width", "plain_width", "num_heads"):
            check_whole(name, getattr(self, name), at_least=1)
        for name in ("fusion_scale", "dropout"):
            check_type(name, getattr(self, name), Real)
        _check_fusion(self.expert_width, self.plain_width, self.num_heads, self.fusion_scale)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")


class BilinearFusion(nn.Module):
    r"""Products of two streams, head by head.

    .. math:: z_h = c\, x_h^\top W_h\, y_h

    x and y are cut into equal parts, one per head, so that H heads cost
    ``x_features * y_features / H`` multiply-adds; the fusion of FinalMLP (Mao et al., AAAI 2023),
    with the heads handed on instead of summed.

    Args:
        x_features (int): features of x, a multiple of ``num_heads``.
        y_features (int): features of y, a multiple of ``num_heads``.
        num_heads (int): H.
        scale (float): factor on the products.
        device (torch.device | None): default compute device.
        dtype (torch.dtype | None): dtype of the parameters.

    Raises:
        ValueError: a stream cannot be cut into so many heads, or the scale is not finite.

    Example:
        >>> BilinearFusion(12, 8, num_heads=4)(torch.rand(5, 12), torch.rand(5, 8)).shape
        torch.Size([5, 4])
    """

    def __init__(
        self,
        x_features: int,
        y_features: int,
        num_heads: int,
        scale: float = 1.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_fusion(x_features, y_features, num_heads, scale)
        self.num_heads = num_heads
        self.scale = scale
        shape = (num_heads, x_features // num_heads, y_features // num_heads)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights of each head as Xavier's normal distribution has them."""
        _, x_part, y_part = self.weight.shape
        nn.init.normal_(self.weight, std=(2.0 / (x_part + y_part)) ** 0.5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Multiplies the streams.

        Args:
            x (Tensor): ``[B, x_features]``.
            y (Tensor): ``[B, y_features]``.

        Returns:
            Tensor: ``[B, H]``.
        """
        x_heads = x.unflatten(1, (self.num_heads, -1)).transpose(0, 1)  # [H, B, x_part]
        y_heads = y.unflatten(1, (self.num_heads, -1)).transpose(0, 1)  # [H, B, y_part]
        products = torch.bmm(x_heads, self.weight) * y_heads
        # TorchScript's autocast sums in float32, and would hand that on where eager does not.
        return (self.scale * products.sum(dim=2)).t().type_as(x)


class HiLoMoETwoStreamArch(nn.Module):
    """Two wide layers over all features, one with routed experts, and the products of both.

    A drop-in for the ``inter_arch`` of ``torchrec.models.dlrm.DLRM``. Each stream is a linear
    layer over the concatenated features and their dot products, batch normalisation if asked for, a
    ReLU and dropout; the first stream's linear is a :class:`HiLoMoELinear`, the second's is plain.
    Output are both streams and their :class:`BilinearFusion`, so that a single linear layer behind
    it makes the logit of FinalMLP. One stream with experts and one without was better than two
    with, and two narrow streams better than one wide [R].

    Notation, as TorchRec's: B batch size, F number of sparse features, D embedding dimension.

    Args:
        num_sparse_features (int): F.
        embedding_dim (int): D.
        streams (TwoStreamConfig): widths, heads, normalisation and dropout of the streams.
        config (HiLoMoEConfig): experts and routing of the first stream.
        device (torch.device | None): default compute device.
        dtype (torch.dtype | None): dtype of the parameters.

    Attributes:
        out_features (int): width of the output: both streams and the heads.

    Raises:
        ValueError: ``num_sparse_features`` is negative, or ``embedding_dim`` is below 1.

    Example:
        >>> streams = TwoStreamConfig(expert_width=32, plain_width=16, num_heads=4)
        >>> arch = HiLoMoETwoStreamArch(2, 8, streams, HiLoMoEConfig(num_layers=3, num_experts=4))
        >>> arch(dense_features=torch.rand(5, 8), sparse_features=torch.rand(5, 2, 8)).shape
        torch.Size([5, 52])
    """

    def __init__(
        self,
        num_sparse_features: int,
        embedding_dim: int,
        streams: TwoStreamConfig,
        config: HiLoMoEConfig,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_whole("num_sparse_features", num_sparse_features, at_least=0)
        check_whole("embedding_dim", embedding_dim, at_least=1)
        self.dot_products, self.padding = streams.dot_products, 0
        d = (num_sparse_features + 1) * embedding_dim
        if streams.dot_products:
            d += (num_sparse_features + 1) * num_sparse_features // 2
            self.padding = -d % _ALIGNMENT
            d += self.padding
        wide, plain = streams.expert_width, streams.plain_width
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.out_features = wide + plain + streams.num_heads
        self.routed_stream = nn.Sequential(
            HiLoMoELinear(d, wide, config, device, dtype), *_activation(wide, streams, **factory)
        )
        self.plain_stream = nn.Sequential(
            nn.Linear(d, plain, **factory), *_activation(plain, streams, **factory)
        )
        self.fusion = BilinearFusion(
            wide, plain, streams.num_heads, streams.fusion_scale, device, dtype
        )

    def forward(self, dense_features: Tensor, sparse_features: Tensor) -> Tensor:
        """Combines the outputs of dense and sparse arch.

        Args:
            dense_features (Tensor): ``[B, D]``.
            sparse_features (Tensor): ``[B, F, D]``.

        Returns:
            Tensor: ``[B, out_features]``.
        """
        if self.dot_products:
            combined = with_dot_products(dense_features, sparse_features, self.padding)
        else:
            combined = concatenate(dense_features, sparse_features)
        x, y = self.routed_stream(combined), self.plain_stream(combined)
        return torch.cat((x, y, self.fusion(x, y)), dim=1)


def _check_fusion(x_features: int, y_features: int, num_heads: int, scale: float) -> None:
    if (
        min(num_heads, x_features, y_features) < 1
        or x_features % num_heads
        or y_features % num_heads
    ):
        raise ValueError(
            f"num_heads must divide the widths of both streams, {x_features} and {y_features}; "
            f"got {num_heads}"
        )
    if not math.isfinite(scale):
        raise ValueError(f"fusion_scale must be a finite number, got {scale}")


def _activation(width: int, streams: TwoStreamConfig, **factory: Any) -> list[nn.Module]:
    """What follows a stream's linear."""
    norm = [nn.BatchNorm1d(width, **factory)] if streams.batch_norm else []
    dropout = [nn.Dropout(streams.dropout)] if streams.dropout else []
    return [*norm, nn.ReLU(), *dropout]
