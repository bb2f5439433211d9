from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchrec.distributed import comm
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.training import (
    ShardingConfig,
    TableOptimizerConfig,
    init_tables,
    shard_model,
    sharding,
)


@pytest.fixture
def four_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as the first of four, whose collectives do nothing."""
    for name in ("_INTRA_PG", "_CROSS_PG"):  # TorchRec keeps a host's groups for good
        monkeypatch.setattr(comm, name, None)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


def _types(
    type_: str, name: str = "rowwise_adagrad", kernel: str = "fused", columns: int = 4
) -> dict[int, str]:
    """The planned sharding type by number of rows."""
    tables = [
        EmbeddingBagConfig(
            name=f"t{n}", embedding_dim=columns, num_embeddings=n, feature_names=[f"f{n}"]
        )
        for n in (1, 3, 4, 5, 6, 7, 9, 10, 100)
    ]
    collection = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    optimizer = TableOptimizerConfig(name, kernel)
    model = shard_model(collection, ShardingConfig(type_), optimizer, torch.device("cpu"))
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


@pytest.mark.filterwarnings("ignore")
def test_what_the_planner_may_choose_goes_by_the_optimizer(four_ranks):
    """Row-wise Adagrad would train other models where columns are split."""
    assert _types("auto", "sgd", columns=512)[100] == "column_wise"
    assert "column_wise" not in _types("auto", "rowwise_adagrad", columns=512).values()
    assert set(_types("auto", "adam", kernel="dense").values()) == {"data_parallel"}


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


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 640 bytes"),
            ConfigError,
            r"rank 0 has no memory .* largest table is a, 9 x 4 ",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            ConfigError,
            r"rank 0 has no memory .* largest table is a, 9 x 4 ",
        ),
        (RuntimeError("what has no memory of it"), RuntimeError, "^what has no memory of it"),
    ],
    ids=["cpu", "cuda", "other"],
)
def test_tables_that_no_memory_holds_are_named(device, monkeypatch, error, raised, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(sharding, "DistributedModelParallel", fail)
    config = EmbeddingBagConfig(name="a", embedding_dim=4, num_embeddings=9, feature_names=["f"])
    model = nn.ModuleDict({"e": EmbeddingBagCollection([config], device=torch.device("meta"))})
    with pytest.raises(raised, match=message):
        shard_model(model, ShardingConfig(), TableOptimizerConfig(), device)
