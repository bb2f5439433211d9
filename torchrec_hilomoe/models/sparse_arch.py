"""A sparse arch whose tables can be frozen."""

# Annotations stay evaluated: TorchScript cannot read the strings that
# `from __future__ import annotations` would leave in an FX-traced forward.

import torch
from torchrec.models import dlrm
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    get_embedding_names_by_table,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


class SparseArch(dlrm.SparseArch):
    """`torchrec.models.dlrm.SparseArch` with a switch that freezes its tables.

    Fused optimizers update the tables during the backward pass, so that neither ``requires_grad``
    nor a learning rate of zero freezes them (the optimizer state would still move). Looking the
    embeddings up without autograd does: weights and optimizer state stay bit-identical, and the
    backward pass and its communication are saved. A training that freezes tables makes one of
    TorchRec's own.

    Args:
        embedding_bag_collection (EmbeddingBagCollection): tables of one embedding dimension D.

    Attributes:
        frozen (bool): look up without autograd. False by default.

    Raises:
        ValueError: there is no table, or their dimensions differ.
    """

    def __init__(self, embedding_bag_collection: EmbeddingBagCollection) -> None:
        common_embedding_dim(embedding_bag_collection)  # else [B, F, D] would cut across features
        super().__init__(embedding_bag_collection)
        # Of a feature in several tables each embedding has a name of its own, such as user@t.
        by_table = get_embedding_names_by_table(embedding_bag_collection.embedding_bag_configs())
        self._sparse_feature_names = [name for names in by_table for name in names]
        self.frozen = False

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        """Looks the pooled embeddings up.

        Args:
            features (KeyedJaggedTensor): the sparse features of B samples.

        Returns:
            torch.Tensor: [B, F, D], in the order of the tables and of the features of each; of a
            feature in several tables there are as many embeddings.
        """
        if self.frozen:
            with torch.no_grad():
                return super().forward(features)
        return super().forward(features)


def common_embedding_dim(embedding_bag_collection: EmbeddingBagCollection) -> int:
    """The embedding dimension D that all tables have.

    Args:
        embedding_bag_collection (EmbeddingBagCollection): sharded or not.

    Returns:
        int: D.

    Raises:
        ValueError: there is no table, or their dimensions differ.
    """
    dims = {c.name: c.embedding_dim for c in embedding_bag_collection.embedding_bag_configs()}
    if len(set(dims.values())) != 1:
        raise ValueError(
            "embedding_bag_collection: one or more tables, all of one embedding_dim, are needed, "
            f"got {dims or 'no table'}"
        )
    return next(iter(dims.values()))
