"""Embedding tables of a data set, and their initial weights."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.distributed.shards_wrapper import LocalShardsWrapper
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    EmbeddingBagConfig,
    PoolingType,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_hilomoe.data import FeatureSpec

#: Modules that hold tables, sharded or not.
COLLECTIONS = (
    EmbeddingBagCollection,
    EmbeddingCollection,
    ShardedEmbeddingBagCollection,
    ShardedEmbeddingCollection,
)

#: Rows of a table that are filled at a time.
BLOCK_ROWS = 65_536


def make_tables(features: FeatureSpec, embedding_dim: int) -> EmbeddingBagCollection:
    """One table for each sparse feature, on the meta device.

    Args:
        features (FeatureSpec): the features of the data.
        embedding_dim (int): D.

    Returns:
        EmbeddingBagCollection: without memory; sharding allocates it.
    """
    pooling = {"mean": PoolingType.MEAN, "sum": PoolingType.SUM}
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=table_name(feature.name),
                embedding_dim=embedding_dim,
                num_embeddings=feature.num_embeddings,
                feature_names=[feature.name],
                pooling=pooling[feature.pooling],
            )
            for feature in features.sparse
        ],
        device=torch.device("meta"),
    )


def table_name(feature: str) -> str:
    """The name of a feature's table, another one for each feature.

    Args:
        feature (str): any name.

    Returns:
        str: without dots, which torch refuses in names of modules.

    Example:
        >>> table_name("user"), table_name("user.id")
        ('t_user', 'dotted_user%2Eid')
    """
    if "." not in feature:
        return f"t_{feature}"
    escaped = feature.replace("%", "%25").replace(".", "%2E")
    return f"dotted_{escaped}"  # an own prefix: a column may be named user%2Eid, too


def table_of(parameter: str) -> str | None:
    """The table that a parameter is; None for all others.

    Args:
        parameter (str): name in a state dict.

    Returns:
        str | None: name of the table.

    Example:
        >>> table_of("model.ebc.embedding_bags.t_user.weight"), table_of("model.over_arch.0.bias")
        ('t_user', None)
    """
    return parameter.split(".")[-2] if ".embedding_bags." in f".{parameter}" else None


@torch.no_grad()
def init_tables(
    model: nn.Module, seed: int, std: float | None = None, unknown_row: bool = False
) -> None:
    """Initialises every table independently of world size and sharding plan.

    TorchRec's own initialisation depends on rank and plan. Here each block of rows has its own
    generator, seeded by (seed, table, block), and every shard fills just its own rows and columns.
    Where collections have tables of one name, the path of the collection is part of theirs.

    Args:
        model (nn.Module): a model wrapped by `DistributedModelParallel`, or a plain one; the tables
            of its `EmbeddingBagCollection` and `EmbeddingCollection` modules.
        seed (int): of the run.
        std (float | None): N(0, std²); None for the ``init_fn`` of each table's config, which is
            handed 65,536 whole rows at a time. TorchRec's default is uniform(-1/√n, 1/√n) over n
            rows.
        unknown_row (bool): row 0 is that of unknown values, and starts as zero. Where training
            rows lack none it never learns, and values that come later would get a random embedding.
    """
    tables = [
        (path, _config(module, name.split(".")[-2]), value)
        for path, module in get_unwrapped_module(model).named_modules()
        if isinstance(module, COLLECTIONS)
        for name, value in module.state_dict().items()
    ]
    times = Counter(config.name for _, config, _ in tables)
    for path, config, value in tables:
        table = config.name if times[config.name] == 1 else f"{path}.{config.name}"
        fill = config.init_fn if std is None else partial(nn.init.normal_, std=std)
        num_rows, dim = value.shape
        for shard, row, column in local_shards(value):
            end = row + shard.shape[0]
            for start in range(row - row % BLOCK_ROWS, end, BLOCK_ROWS):
                block = _block(f"{seed}/{table}/{start}", num_rows, dim, start, fill)
                first, last = max(start, row), min(start + block.shape[0], end)
                shard[first - row : last - row].copy_(
                    block[first - start : last - start, column : column + shard.shape[1]]
                )
            if unknown_row and row == 0 and len(shard):
                shard[0].zero_()


def _config(collection: Any, table: str) -> BaseEmbeddingConfig:
    """The config of a table; sharded collections have no public way to it."""
    bags = hasattr(collection, "_embedding_bag_configs")
    configs = collection._embedding_bag_configs if bags else collection._embedding_configs
    return next(config for config in configs if config.name == table)


def _block(
    key: str, num_rows: int, dim: int, start: int, fill: Callable[[torch.Tensor], object]
) -> torch.Tensor:
    """Initial weights of the rows from ``start``, whole width: [≤ BLOCK_ROWS, dim]."""
    digest = hashlib.sha256(key.encode()).digest()
    block = torch.empty(min(BLOCK_ROWS, num_rows - start), dim)
    with torch.random.fork_rng(devices=[]):  # an init_fn takes no generator
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        fill(block)
    return block


def local_shards(value: torch.Tensor) -> Iterator[tuple[torch.Tensor, int, int]]:
    """This rank's pieces of a table, each with its first row and column in the table.

    Args:
        value (torch.Tensor): of a state dict, sharded or not, ``[rows, D]``.

    Yields:
        tuple[torch.Tensor, int, int]: a piece and where it begins.
    """
    local = value.to_local() if isinstance(value, DTensor) else value
    if isinstance(local, LocalShardsWrapper):
        for piece, (row, column) in zip(local.local_shards(), local.local_offsets(), strict=True):
            yield piece, row, column
    elif isinstance(value, ShardedTensor):
        for shard in value.local_shards():
            row, column = shard.metadata.shard_offsets
            yield shard.tensor, row, column
    else:
        yield value, 0, 0
