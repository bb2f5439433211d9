"""A CTR model that takes tensors alone, as runtimes do that know of no ``KeyedJaggedTensor``."""

# Annotations stay evaluated: TorchScript cannot read the strings that
# `from __future__ import annotations` would leave in an FX-traced forward.

from collections.abc import Sequence

import torch
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

#: Dense features, ids and bag lengths, as `FlatInputs` takes them.
Request = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class FlatInputs(nn.Module):
    """Wraps a model for requests of three tensors.

    Args:
        model (nn.Module): ``(dense_features, sparse_features) → logits [B, 1]``, unsharded;
            TorchRec's own DLRMs too, int8 or scripted as well.
        keys (Sequence[str]): the F sparse features, in the order of a request.
        num_dense (int): dense features of the data, 0 if there are none.

    Example:
        >>> from torchrec.models.dlrm import DLRM
        >>> from torchrec.modules.embedding_configs import EmbeddingBagConfig
        >>> from torchrec.modules.embedding_modules import EmbeddingBagCollection
        >>> table = EmbeddingBagConfig(
        ...     name="t", embedding_dim=8, num_embeddings=100, feature_names=["user", "item"]
        ... )
        >>> dlrm = DLRM(EmbeddingBagCollection(tables=[table]), 3, [8], [4, 1])
        >>> model = FlatInputs(dlrm, ["user", "item"], num_dense=3)
        >>> users, items = [7, 9], [1, 2, 3]  # the second sample has two items
        >>> model(torch.rand(2, 3), torch.tensor(users + items), torch.tensor([1, 1, 1, 2])).shape
        torch.Size([2, 1])
    """

    def __init__(self, model: nn.Module, keys: Sequence[str], num_dense: int) -> None:
        super().__init__()
        self.model = model
        self.keys = list(keys)
        self.num_dense = num_dense

    def forward(
        self, dense_features: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Computes the logits of B samples; their sigmoid is the probability of a click.

        Args:
            dense_features (torch.Tensor): float32, [B, num_dense].
            values (torch.Tensor): int64, all ids, feature by feature, sample by sample in each.
            lengths (torch.Tensor): int32, [F * B], ids of each feature and sample in that order.

        Returns:
            torch.Tensor: logits, [B, 1].
        """
        return self.model(dense_features, KeyedJaggedTensor(self.keys, values, lengths=lengths))


def flat_tensors(batch: Batch) -> Request:
    """A batch, as the loaders make it, as a request.

    Args:
        batch (Batch): its sparse features have the keys of the model, in their order.

    Returns:
        Request: its dense features, ids and lengths.
    """
    sparse = batch.sparse_features
    return batch.dense_features, sparse.values(), sparse.lengths()
