"""Deep cross network with hierarchically routed experts."""

import torch
from torch import Tensor, nn

from torchrec_hilomoe.modules.checks import check_whole
from torchrec_hilomoe.modules.config import HiLoMoEConfig
from torchrec_hilomoe.modules.linear import RoutedLinear, shared_routing
from torchrec_hilomoe.modules.router import HierarchicalRouter


class HiLoMoECrossNet(nn.Module):
    r"""Full-rank cross layers (DCN v2) plus routed experts, all under one routing.

    .. math:: x_{l+1} = x_0 \circ (W_l x_l + b_l + \text{experts}_l(x_l)) + x_l

    Fits ``torchrec.models.dlrm.InteractionDCNArch``. Its native rival there,
    ``LowRankMixtureCrossNet``, gates by the output of the layer before, so that its layers wait
    for each other's gates; here the routing is known before the first layer.

    Args:
        in_features (int): d, of input and output.
        num_cross_layers (int): cross layers, each a linear with L layers of K experts.
        config (HiLoMoEConfig): experts of each linear, and the routing.
        device (torch.device | None): default compute device.
        dtype (torch.dtype | None): dtype of the parameters.

    Raises:
        ValueError: a size is no whole number, or below 1.

    Example:
        >>> crossnet = HiLoMoECrossNet(16, 2, HiLoMoEConfig(num_layers=3, num_experts=4))
        >>> crossnet(torch.randn(5, 16)).shape
        torch.Size([5, 16])
    """

    def __init__(
        self,
        in_features: int,
        num_cross_layers: int,
        config: HiLoMoEConfig,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_whole("num_cross_layers", num_cross_layers, at_least=1)
        self.router = HierarchicalRouter(in_features, config, device, dtype)
        self.linears = nn.ModuleList(
            RoutedLinear(in_features, in_features, config, device, dtype)
            for _ in range(num_cross_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Applies the cross layers.

        Args:
            x (Tensor): :math:`x_0`, ``[B, d]`` or ``[B, N, d]``.

        Returns:
            Tensor: the shape of x.
        """
        routing = shared_routing(self.router, self.linears, x)
        x_l = x
        for linear in self.linears:
            x_l = torch.addcmul(x_l, x, linear(x_l, routing))
        return x_l
