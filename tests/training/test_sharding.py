from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
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
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.training import (
    ShardingConfig,
    TableOptimizerConfig,
    init_tables,
    shard_model,
    sharding,
)


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


@pytest.fixture
def four_ranks() -> Iterator[None]:
    """This process as the first of four, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


def _types(type_: str, name: str = "rowwise_adagrad") -> dict[int, str]:
    """The planned sharding type by number of rows."""
    tables = [
        EmbeddingBagConfig(name=f"t{n}", embedding_dim=4, num_embeddings=n, feature_names=[f"f{n}"])
        for n in (1, 3, 4, 5, 6, 7, 9, 10, 100)
    ]
    collection = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    model = shard_model(
        collection, ShardingConfig(type=type_), TableOptimizerConfig(name), torch.device("cpu")
    )
    return {int(key[1:]): table.sharding_type for key, table in model.plan.plan[""].items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("type_", ["row_wise", "table_row_wise", "grid_shard"])
def test_tables_that_would_leave_a_rank_without_rows_are_placed_whole(four_ranks, type_):
    # Four ranks get as many rows each, rounded up: 5 rows are 2, 2, 1 and none.
    types = _types(type_, "sgd")
    assert [rows for rows, placed in types.items() if placed == "table_wise"] == [1, 3, 5, 6, 9]
    assert {types[rows] for rows in (4, 7, 10, 100)} == {type_}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", [(3, 100), (100, 3)])
def test_tables_of_one_name_are_all_placed_whole_where_one_has_to_be(four_ranks, rows):
    model = nn.ModuleDict()
    for path, num_rows in zip(("left", "right"), rows, strict=True):
        table = EmbeddingBagConfig(
            name="t", embedding_dim=4, num_embeddings=num_rows, feature_names=[path]
        )
        model[path] = EmbeddingBagCollection([table], device=torch.device("meta"))
    tables = TableOptimizerConfig("sgd")
    sharded = shard_model(model, ShardingConfig("row_wise"), tables, torch.device("cpu"))
    placed = {path: plan["t"].sharding_type for path, plan in sharded.plan.plan.items()}
    assert placed == {"left": "table_wise", "right": "table_wise"}


@pytest.mark.filterwarnings("ignore")
def test_other_types_take_tables_of_few_rows(four_ranks):
    assert set(_types("column_wise", "sgd").values()) == {"column_wise"}
    assert _types("auto")[3] == "table_wise"


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


@pytest.mark.filterwarnings("ignore")
def test_the_dense_kernel_has_the_gradients_of_torch(device):
    """Autograd warns of the kernel, that its gradients may be wrong."""
    config = EmbeddingBagConfig(
        name="a", embedding_dim=4, num_embeddings=9, feature_names=["f"], pooling=PoolingType.MEAN
    )
    model = nn.ModuleDict({"e": EmbeddingBagCollection([config], device=torch.device("meta"))})
    optimizer = TableOptimizerConfig("adam", kernel="dense")
    sharded = shard_model(model, ShardingConfig(), optimizer, device)
    init_tables(sharded, seed=0)
    lengths, values = torch.tensor([2, 0, 3]), torch.tensor([1, 1, 8, 3, 1])
    weights = torch.randn(3, 4)

    (table,) = sharded.parameters()
    features = KeyedJaggedTensor(["f"], values, lengths=lengths)
    pooled = sharded.module["e"](features).wait().values()
    (pooled * weights).sum().backward()

    expected = table.detach().clone().requires_grad_()
    offsets = torch.tensor([0, 2, 2])
    bags = nn.functional.embedding_bag(values, expected, offsets, mode="mean")
    (bags * weights).sum().backward()
    torch.testing.assert_close(pooled, bags)
    torch.testing.assert_close(table.grad, expected.grad)


def test_tables_that_no_memory_holds_are_named(device, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 640 bytes")

    monkeypatch.setattr(sharding, "DistributedModelParallel", full)
    config = EmbeddingBagConfig(name="a", embedding_dim=4, num_embeddings=9, feature_names=["f"])
    model = nn.ModuleDict({"e": EmbeddingBagCollection([config], device=torch.device("meta"))})
    with pytest.raises(ConfigError, match=r"rank 0 has no memory .* largest table is a, 9 x 4 "):
        shard_model(model, ShardingConfig(), TableOptimizerConfig(), device)
