"""Interaction of dense and sparse features by routed experts."""

import torch
from torch import Tensor, nn

from torchrec_hilomoe.modules.checks import check_whole
from torchrec_hilomoe.modules.config import HiLoMoEConfig
from torchrec_hilomoe.modules.linear import HiLoMoELinear
from torchrec_hilomoe.ops import concatenate


class HiLoMoEInteractionArch(nn.Module):
    """Concatenated features through one :class:`HiLoMoELinear` and a ReLU.

    A drop-in for the ``inter_arch`` of ``torchrec.models.dlrm.DLRM``: keyword call, one 2-D tensor
    back. The routing query is the concatenation, so every feature has a say in it [R].

    Notation, as TorchRec's: B batch size, F number of sparse features, D embedding dimension.

    Args:
        num_sparse_features (int): F.
        embedding_dim (int): D.
        out_features (int): width of the output.
        config (HiLoMoEConfig): experts and routing.
        device (torch.device | None): default compute device.
        dtype (torch.dtype | None): dtype of the parameters.

    Raises:
        ValueError: ``num_sparse_features`` is negative, or a size is below 1.

    Example:
        >>> arch = HiLoMoEInteractionArch(2, 8, 32, HiLoMoEConfig(num_layers=3, num_experts=4))
        >>> arch(dense_features=torch.rand(5, 8), sparse_features=torch.rand(5, 2, 8)).shape
        torch.Size([5, 32])
    """

    def __init__(
        self,
        num_sparse_features: int,
        embedding_dim: int,
        out_features: int,
        config: HiLoMoEConfig,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_whole("num_sparse_features", num_sparse_features, at_least=0)
        check_whole("embedding_dim", embedding_dim, at_least=1)
        check_whole("out_features", out_features, at_least=1)
        self.out_features = out_features
        in_features = (num_sparse_features + 1) * embedding_dim
        self.linear = HiLoMoELinear(in_features, out_features, config, device, dtype)

    def forward(self, dense_features: Tensor, sparse_features: Tensor) -> Tensor:
        """Combines the outputs of dense and sparse arch.

        Args:
            dense_features (Tensor): ``[B, D]``.
            sparse_features (Tensor): ``[B, F, D]``.

        Returns:
            Tensor: ``[B, out_features]``.
        """
        return torch.relu(self.linear(concatenate(dense_features, sparse_features)))
