from __future__ import annotations

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_hilomoe.models import SparseArch


def test_frozen_lookup_has_no_gradient(collection, make_features):
    arch = SparseArch(collection)
    thawed = arch(make_features())
    arch.frozen = True
    frozen = arch(make_features())
    assert thawed.requires_grad
    assert not frozen.requires_grad
    assert thawed.equal(frozen)


def test_tables_have_one_dimension():
    tables = [
        EmbeddingBagConfig(name=name, embedding_dim=dim, num_embeddings=9, feature_names=[name])
        for name, dim in (("a", 8), ("b", 4))
    ]
    with pytest.raises(ValueError, match=r"all of one embedding_dim, .* got {'a': 8, 'b': 4}"):
        SparseArch(EmbeddingBagCollection(tables=tables, device=torch.device("meta")))
    with pytest.raises(ValueError, match="got no table"):
        SparseArch(EmbeddingBagCollection(tables=[]))


def test_a_feature_in_several_tables():
    tables = [
        EmbeddingBagConfig(name=name, embedding_dim=4, num_embeddings=9, feature_names=features)
        for name, features in (("left", ["user", "item"]), ("right", ["user"]))
    ]
    collection = EmbeddingBagCollection(tables=tables)
    features = KeyedJaggedTensor.from_lengths_sync(
        ["user", "item"], torch.tensor([3, 5, 8, 1]), torch.tensor([1, 1, 1, 1])
    )
    left, right = (collection.embedding_bags[name].weight for name in ("left", "right"))
    expected = torch.stack((left[[3, 5]], left[[8, 1]], right[[3, 5]]), dim=1)
    assert torch.equal(SparseArch(collection)(features), expected)
