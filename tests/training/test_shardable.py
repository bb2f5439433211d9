from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import (
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.feature_processor_ import PositionWeightedModule
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)

from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.training import ShardingConfig, TableOptimizerConfig, shard_model
from torchrec_hilomoe.training.shardable import check_tables


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


@pytest.mark.parametrize(
    ("data_type", "optimizer", "error"),
    [
        (DataType.FP16, TableOptimizerConfig("adam", kernel="dense"), r"adam .* underflows"),
        (DataType.BF16, TableOptimizerConfig("sgd"), r"no kernels on CPU for \['a'\] in BF16"),
    ],
)
def test_types_that_kernels_or_optimizers_lack_are_refused(data_type, optimizer, error):
    config = EmbeddingBagConfig(
        name="a", embedding_dim=4, num_embeddings=9, feature_names=["f"], data_type=data_type
    )
    collection = EmbeddingBagCollection([config], device=torch.device("meta"))
    with pytest.raises(ConfigError, match=error):
        shard_model(collection, ShardingConfig(), optimizer, torch.device("cpu"))


_ADAM = TableOptimizerConfig("adam")
_DENSE_ADAM = TableOptimizerConfig("adam", kernel="dense")
_DENSE_SGD = TableOptimizerConfig("sgd", kernel="dense")
_SGD = TableOptimizerConfig("sgd")
_HALF, _BFLOAT = {"data_type": DataType.FP16}, {"data_type": DataType.BF16}
_MEAN, _SUM = {"pooling": PoolingType.MEAN}, {"pooling": PoolingType.SUM}


@pytest.mark.parametrize(
    ("type_", "optimizer", "table", "device", "error"),
    [
        ("auto", _ADAM, {}, "cpu", "fused Adam does not exist on CPU"),
        ("auto", _ADAM, {}, "cuda", None),
        ("row_wise", _DENSE_SGD, {}, "cpu", r"dense kernel .* table_wise .* got row_wise"),
        ("column_wise", _DENSE_SGD, {}, "cuda", r"dense kernel .* got column_wise"),
        ("table_wise", _DENSE_SGD, {}, "cpu", None),
        ("data_parallel", _SGD, {}, "cpu", None),
        ("grid_shard", _SGD, _MEAN, "cpu", r"TorchRec sums what should be averaged in \['a'\]"),
        ("grid_shard", _SGD, _SUM, "cpu", None),
        ("row_wise", _SGD, _MEAN, "cpu", None),
        ("auto", _DENSE_ADAM, _HALF, "cuda", "underflows in FP16"),
        ("auto", _DENSE_SGD, _HALF, "cuda", None),
        ("auto", _ADAM, _HALF, "cuda", None),
        ("auto", _SGD, _BFLOAT, "cuda", None),
    ],
)
def test_what_goes_together_and_what_does_not(type_, optimizer, table, device, error):
    config = EmbeddingBagConfig(
        name="a", embedding_dim=4, num_embeddings=9, feature_names=["f"], **table
    )
    refused = pytest.raises(ConfigError, match=error) if error else contextlib.nullcontext()
    with refused:
        check_tables(ShardingConfig(type_), optimizer, [config], torch.device(device))


class OwnCollection(EmbeddingBagCollection):
    """TorchRec plans exact types: this one would stay as it is."""


def _position_weighted(bags: EmbeddingBagCollection) -> nn.Module:
    return FeatureProcessedEmbeddingBagCollection(bags, {"f": PositionWeightedModule(3)})


def _managed_collision(bags: EmbeddingBagCollection) -> nn.Module:
    rows = MCHManagedCollisionModule(9, torch.device("cpu"), DistanceLFU_EvictionPolicy(), 2)
    rows_of_ids = ManagedCollisionCollection({"a": rows}, bags.embedding_bag_configs())
    return ManagedCollisionEmbeddingBagCollection(bags, rows_of_ids)


def _unpooled(bags: EmbeddingBagCollection) -> nn.Module:
    config = EmbeddingConfig(name="a", embedding_dim=4, num_embeddings=9, feature_names=["f"])
    return EmbeddingCollection([config], device=bags.device)


def _subclass(bags: EmbeddingBagCollection) -> nn.Module:
    return OwnCollection(bags.embedding_bag_configs(), device=bags.device)


@pytest.mark.parametrize("around", [_position_weighted, _managed_collision, _unpooled, _subclass])
def test_collections_with_a_sharder_of_their_own_are_refused(around):
    config = EmbeddingBagConfig(name="a", embedding_dim=4, num_embeddings=9, feature_names=["f"])
    bags = EmbeddingBagCollection([config], is_weighted=True, device=torch.device("meta"))
    tables = around(bags)
    with pytest.raises(ConfigError, match=f"model: ids is of type {type(tables).__name__}, and sh"):
        shard_model(
            nn.ModuleDict({"ids": tables}),
            ShardingConfig(),
            TableOptimizerConfig(),
            torch.device("cpu"),
        )
