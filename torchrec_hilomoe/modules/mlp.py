"""Multi-layer perceptron with hierarchically routed experts."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchrec_hilomoe.modules.config import HiLoMoEConfig
from torchrec_hilomoe.modules.linear import RoutedLinear, shared_routing
from torchrec_hilomoe.modules.router import HierarchicalRouter


class HiLoMoEMLP(nn.Module):
    """A stack of linear + ReLU like ``torchrec.modules.mlp.MLP``, its linears routed as one.

    The routing is computed once, from the input, before any heavy work, and shared by all linears:
    expert k of layer l means the same throughout the stack.

    Args:
        in_features (int): features of the input.
        layer_sizes (Sequence[int]): output features of each linear, at least one.
        config (HiLoMoEConfig): experts of each linear, and the routing.
        device (torch.device | None): default compute device.
        dtype (torch.dtype | None): dtype of the parameters.

    Raises:
        ValueError: ``layer_sizes`` is empty, or a size is below 1.

    Example:
        >>> mlp = HiLoMoEMLP(16, [32, 8], HiLoMoEConfig(num_layers=3, num_experts=4))
        >>> mlp(torch.randn(5, 16)).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        in_features: int,
        layer_sizes: Sequence[int],
        config: HiLoMoEConfig,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        layer_sizes = list(layer_sizes)
        if not layer_sizes:
            raise ValueError("layer_sizes must name the width of at least one layer, got none")
        self.router = HierarchicalRouter(in_features, config, device, dtype)
        self.linears = nn.ModuleList(
            RoutedLinear(size_in, size_out, config, device, dtype)
            for size_in, size_out in zip([in_features, *layer_sizes], layer_sizes, strict=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Applies the stack.

        Args:
            x (Tensor): ``[B, in_features]`` or ``[B, N, in_features]``.

        Returns:
            Tensor: ``[B, layer_sizes[-1]]`` or ``[B, N, layer_sizes[-1]]``.
        """
        routing = shared_routing(self.router, self.linears, x)
        for linear in self.linears:
            x = torch.relu(linear(x, routing))
        return x
