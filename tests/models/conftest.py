from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_hilomoe.models import registry

EMBEDDING_DIM, NUM_SPARSE, ROWS, BATCH = 8, 4, 50, 6


@pytest.fixture(autouse=True)
def registry_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is known to it alone."""
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))


@pytest.fixture
def collection() -> EmbeddingBagCollection:
    torch.manual_seed(0)
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=f"t{i}",
                embedding_dim=EMBEDDING_DIM,
                num_embeddings=ROWS,
                feature_names=[f"f{i}"],
                pooling=PoolingType.MEAN if i % 2 else PoolingType.SUM,
            )
            for i in range(NUM_SPARSE)
        ]
    )


@pytest.fixture
def make_features() -> Callable[..., KeyedJaggedTensor]:
    """Bags of 0 to 3 ids."""

    def make(batch: int = BATCH, seed: int = 0) -> KeyedJaggedTensor:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, 4, (NUM_SPARSE * batch,), generator=generator)
        values = torch.randint(0, ROWS, (int(lengths.sum()),), generator=generator)
        keys = [f"f{i}" for i in range(NUM_SPARSE)]
        return KeyedJaggedTensor.from_lengths_sync(keys=keys, values=values, lengths=lengths)

    return make
