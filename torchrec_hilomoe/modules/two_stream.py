"""Two streams of features, one of them with routed experts, joined by a bilinear fusion."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchrec_hilomoe.modules.config import HiLoMoEConfig
from torchrec_hilomoe.modules.linear import HiLoMoELinear


class BilinearFusion(nn.Module):
    r"""Products of two streams, head by head.

    .. math:: z_h = x_h^\top W_h\, y_h

    x and y are cut into equal parts, one per head, so that H heads cost
    ``x_features * y_features / H`` multiply-adds; the fusion of FinalMLP (Mao et al., AAAI 2023),
    with the heads handed on instead of summed.

    Args:
        x_features (int): features of x, a multiple of ``num_heads``.
        y_features (int): features of y, a multiple of ``num_heads``.
        num_heads (int): H.
        device (torch.device | None): default compute device.
        dtype (torch.dtype | None): dtype of the parameters.

    Raises:
        ValueError: a stream cannot be cut into so many heads.

    Example:
        >>> BilinearFusion(12, 8, num_heads=4)(torch.rand(5, 12), torch.rand(5, 8)).shape
        torch.Size([5, 4])
    """

    def __init__(
        self,
        x_features: int,
        y_features: int,
        num_heads: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or x_features % num_heads or y_features % num_heads:
            raise ValueError(
                f"num_heads must divide the widths of both streams, {x_features} and "
                f"{y_features}; got {num_heads}"
            )
        self.num_heads = num_heads
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
        return (torch.bmm(x_heads, self.weight) * y_heads).sum(dim=2).t()
