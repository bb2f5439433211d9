"""What a model has to know about the features of a data set."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SparseFeature:
    """A feature of ids, looked up in an embedding table.

    Args:
        name (str): the key in the ``KeyedJaggedTensor``.
        num_embeddings (int): rows of its table, row 0 (unknown and missing ids) included.
        pooling (str): ``"mean"`` or ``"sum"``, how the embeddings of a bag are joined. For
            features with one id per row both are the same, and data sets say ``"sum"``.
    """

    name: str
    num_embeddings: int
    pooling: str = "mean"


@dataclass(frozen=True)
class FeatureSpec:
    """The features of a batch, in the order of its columns and keys.

    Args:
        dense (tuple[str, ...]): names of the columns of ``dense_features``; may be empty.
        sparse (tuple[SparseFeature, ...]): the keys of ``sparse_features``.

    Example:
        >>> spec = FeatureSpec(dense=("price",), sparse=(SparseFeature("user", 1001),))
        >>> [(feature.name, feature.num_embeddings) for feature in spec.sparse]
        [('user', 1001)]
    """

    dense: tuple[str, ...]
    sparse: tuple[SparseFeature, ...]
