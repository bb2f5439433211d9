"""DLRM around any interaction architecture, and DLRM_HiLoMoE.

Notation, as in `torchrec.models.dlrm`:

* B: batch size
* F: number of sparse features
* D: embedding dimension of the sparse features
* num_features: number of dense features
"""

# Annotations stay evaluated: TorchScript cannot read the strings that
# `from __future__ import annotations` would leave in an FX-traced forward.

from collections.abc import Sequence

import torch
from torch import nn
from torchrec.models.dlrm import DenseArch
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_hilomoe.models.over_arch import OverArch
from torchrec_hilomoe.models.sparse_arch import SparseArch, common_embedding_dim
from torchrec_hilomoe.modules import HiLoMoEConfig, HiLoMoETwoStreamArch, TwoStreamConfig


class InteractionDLRM(nn.Module):
    """DLRM with a given interaction architecture, with or without dense features.

    The parts and their names are those of `torchrec.models.dlrm.DLRM`. Without dense features
    there is no dense arch, and the first sparse feature takes the place of the embedded dense
    features. So every interaction architecture of TorchRec serves such data unchanged, and
    nothing is computed from a constant.

    Args:
        embedding_bag_collection (EmbeddingBagCollection): tables of one embedding dimension D.
        dense_arch (nn.Module | None): [B, num_features] → [B, D]; None without dense features.
        inter_arch (nn.Module): called as
            ``inter_arch(dense_features=[B, D], sparse_features=[B, F', D])`` with F' = F, or
            F - 1 without dense features; returns [B, width].
        over_arch (nn.Module): [B, width] → [B, 1].

    Raises:
        ValueError: there is no table, or their dimensions differ.

    Example:
        >>> from torchrec.models.dlrm import InteractionArch
        >>> from torchrec.modules.embedding_configs import EmbeddingBagConfig
        >>> table = EmbeddingBagConfig(
        ...     name="t", embedding_dim=4, num_embeddings=10, feature_names=["user", "item"]
        ... )
        >>> model = InteractionDLRM(
        ...     EmbeddingBagCollection(tables=[table]),
        ...     dense_arch=None,
        ...     inter_arch=InteractionArch(num_sparse_features=1),
        ...     over_arch=OverArch(4 + 1, [1]),
        ... )
        >>> features = KeyedJaggedTensor.from_lengths_sync(
        ...     keys=["user", "item"], values=torch.tensor([3, 1, 7, 2]),
        ...     lengths=torch.tensor([1, 1, 1, 1]),
        ... )
        >>> model(torch.empty(2, 0), features).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection,
        dense_arch: nn.Module | None,
        inter_arch: nn.Module,
        over_arch: nn.Module,
    ) -> None:
        super().__init__()
        self.sparse_arch = SparseArch(embedding_bag_collection)
        self.dense_arch = dense_arch
        self.inter_arch = inter_arch
        self.over_arch = over_arch

    def forward(
        self, dense_features: torch.Tensor, sparse_features: KeyedJaggedTensor
    ) -> torch.Tensor:
        """Computes the logits.

        Args:
            dense_features (torch.Tensor): [B, num_features]; not read without a dense arch.
            sparse_features (KeyedJaggedTensor): F features of B samples.

        Returns:
            torch.Tensor: logits, [B, 1].
        """
        embedded_sparse = self.sparse_arch(sparse_features)
        if self.dense_arch is None:
            # One split, not two slices: their gradients would each be as large as the whole.
            first, embedded_sparse = embedded_sparse.split([1, embedded_sparse.size(1) - 1], dim=1)
            embedded_dense = first.squeeze(1)
        else:
            embedded_dense = self.dense_arch(dense_features)
        interaction = self.inter_arch(
            dense_features=embedded_dense, sparse_features=embedded_sparse
        )
        return self.over_arch(interaction)


class DLRM_HiLoMoE(InteractionDLRM):  # noqa: N801 (named as torchrec's DLRM_DCN)
    """DLRM whose interaction is a `HiLoMoETwoStreamArch`: the model of `model=hilomoe`.

    Takes the arguments of `torchrec.models.dlrm.DLRM_DCN`, with the HiLoMoE's own in the place of
    the cross net's. For another interaction, give it to `InteractionDLRM`.

    Args:
        embedding_bag_collection (EmbeddingBagCollection): tables of one embedding dimension D.
        dense_in_features (int): num_features; 0 for data without dense features.
        dense_arch_layer_sizes (Sequence[int]): widths of the dense arch, the last one D.
        over_arch_layer_sizes (Sequence[int]): widths of the over arch, the last one 1.
        streams (TwoStreamConfig): widths and fusion of both streams.
        hilomoe (HiLoMoEConfig): layers, experts and routing.
        dense_device (torch.device | None): device of everything but the tables.

    Raises:
        ValueError: there is no table, their dimensions differ, ``dense_in_features`` is negative,
            the dense arch does not end in D, or the over arch not in 1.

    Example:
        >>> from torchrec.modules.embedding_configs import EmbeddingBagConfig
        >>> table = EmbeddingBagConfig(
        ...     name="t", embedding_dim=8, num_embeddings=100, feature_names=["user", "item"]
        ... )
        >>> model = DLRM_HiLoMoE(
        ...     EmbeddingBagCollection(tables=[table]),
        ...     dense_in_features=13,
        ...     dense_arch_layer_sizes=[16, 8],
        ...     over_arch_layer_sizes=[1],
        ...     streams=TwoStreamConfig(expert_width=32, plain_width=16, num_heads=4),
        ...     hilomoe=HiLoMoEConfig(num_layers=3, num_experts=4),
        ... )
        >>> features = KeyedJaggedTensor.from_lengths_sync(
        ...     keys=["user", "item"], values=torch.tensor([3, 1, 7, 2]),
        ...     lengths=torch.tensor([1, 1, 1, 1]),
        ... )
        >>> model(torch.rand(2, 13), features).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection,
        dense_in_features: int,
        dense_arch_layer_sizes: Sequence[int],
        over_arch_layer_sizes: Sequence[int],
        streams: TwoStreamConfig,
        hilomoe: HiLoMoEConfig,
        dense_device: torch.device | None = None,
    ) -> None:
        embedding_dim = common_embedding_dim(embedding_bag_collection)
        configs = embedding_bag_collection.embedding_bag_configs()
        num_sparse = sum(len(config.feature_names) for config in configs)
        if dense_in_features < 0:
            raise ValueError(f"dense_in_features must be at least 0, got {dense_in_features}")
        dense_arch = None
        if dense_in_features > 0:
            if not dense_arch_layer_sizes or dense_arch_layer_sizes[-1] != embedding_dim:
                raise ValueError(
                    f"dense_arch_layer_sizes must end in the embedding dimension {embedding_dim}, "
                    f"got {list(dense_arch_layer_sizes)}"
                )
            dense_arch = DenseArch(dense_in_features, list(dense_arch_layer_sizes), dense_device)
        inter_arch = HiLoMoETwoStreamArch(
            num_sparse if dense_arch is not None else num_sparse - 1,
            embedding_dim,
            streams,
            hilomoe,
            device=dense_device,
        )
        if not over_arch_layer_sizes or over_arch_layer_sizes[-1] != 1:
            raise ValueError(
                f"over_arch_layer_sizes must end in 1, got {list(over_arch_layer_sizes)}"
            )
        over_arch = OverArch(inter_arch.out_features, over_arch_layer_sizes, device=dense_device)
        super().__init__(embedding_bag_collection, dense_arch, inter_arch, over_arch)
