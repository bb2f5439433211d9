"""The over arch: the MLP behind the interaction."""

# Annotations stay evaluated: TorchScript cannot read the strings that
# `from __future__ import annotations` would leave in an FX-traced forward.

from collections.abc import Sequence

import torch
from torch import nn


class OverArch(nn.Module):
    """MLP from the interaction's output to the logit.

    As `torchrec.models.dlrm.OverArch`, with batch normalisation and dropout, which the public CTR
    benchmarks use, and with a single linear layer allowed. Each hidden layer is
    ``Linear → [BatchNorm] → ReLU → [Dropout]``; the last layer is linear alone.

    Args:
        in_features (int): width of the interaction's output.
        layer_sizes (Sequence[int]): widths of all layers, the output's included.
        batch_norm (bool): normalise each hidden layer before its ReLU.
        dropout (float): probability of dropping a hidden activation.
        device (torch.device | None): device of the parameters.

    Raises:
        ValueError: ``layer_sizes`` is empty, or ``dropout`` is no probability.

    Example:
        >>> OverArch(10, [5, 1])(torch.rand(2, 10)).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        in_features: int,
        layer_sizes: Sequence[int],
        batch_norm: bool = False,
        dropout: float = 0.0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        layer_sizes = list(layer_sizes)
        if not layer_sizes:
            raise ValueError("OverArch needs at least one layer: layer_sizes is empty")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must lie in [0, 1], got {dropout}")
        layers: list[nn.Module] = []
        for width in layer_sizes[:-1]:
            layers.append(nn.Linear(in_features, width, device=device))
            if batch_norm:
                layers.append(nn.BatchNorm1d(width, device=device))
            layers.append(nn.ReLU())
            if dropout:
                layers.append(nn.Dropout(dropout))
            in_features = width
        layers.append(nn.Linear(in_features, layer_sizes[-1], device=device))
        self.model = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Computes the logits.

        Args:
            features (torch.Tensor): [B, in_features].

        Returns:
            torch.Tensor: [B, layer_sizes[-1]].
        """
        return self.model(features)
