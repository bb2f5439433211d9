from __future__ import annotations

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.training import ShardingConfig, TableOptimizerConfig, shard_model


@pytest.mark.parametrize(
    ("kernel", "device"), [("fused", "cuda"), ("dense", "cuda"), ("fused", "cpu")]
)
def test_columns_that_kernels_cannot_read_are_refused(kernel, device):
    tables = [
        EmbeddingBagConfig(name=f"t_{dim}", embedding_dim=dim, num_embeddings=5, feature_names=[])
        for dim in (10, 12)
    ]
    collection = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    optimizer = TableOptimizerConfig(name="sgd", kernel=kernel)
    with pytest.raises(ConfigError, match=r"a multiple of 4, got t_10 \(10\);"):
        shard_model(collection, ShardingConfig(), optimizer, torch.device(device))
