"""A sharding plan for people to read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from torchrec.distributed.types import EnumerableShardingSpec, ParameterSharding, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig, data_type_to_dtype

_MEBIBYTE = 1 << 20


def describe_plan(
    plan: ShardingPlan, collections: Mapping[str, Iterable[EmbeddingBagConfig]], world_size: int
) -> str:
    """Which table is where, and the memory of each rank.

    Args:
        plan (ShardingPlan): as the planner made it.
        collections (Mapping[str, Iterable[EmbeddingBagConfig]]): the tables of each collection, by
            its path in the model.
        world_size (int): number of ranks.

    Returns:
        str: a line for each table, the largest first, and the sum of each rank. Memory is that
            of the weights; optimizer states, gradients and buffers come on top.
    """
    total: dict[int, int] = defaultdict(int)
    lines = []
    tables = [
        (config, plan.plan[path][config.name])
        for path, configs in collections.items()
        for config in configs
    ]
    tables.sort(key=lambda table: -weight_bytes(table[0]))
    for config, sharding in tables:
        parts = _bytes_per_rank(sharding, config, world_size)
        for rank, size in parts.items():
            total[rank] += size
        placed = ", ".join(f"rank {rank}: {_mebibytes(size)}" for rank, size in parts.items())
        shape = f"{config.num_embeddings:,} x {config.embedding_dim}"
        lines.append(f"  {config.name}: {shape}, {sharding.sharding_type}; {placed}")
    sums = ", ".join(f"rank {rank}: {_mebibytes(total[rank])}" for rank in range(world_size))
    return "\n".join(["sharding plan (weights in MiB):", *lines, f"  together: {sums}"])


def weight_bytes(config: EmbeddingBagConfig) -> int:
    """What the weights of a table take.

    Args:
        config (EmbeddingBagConfig): the table.

    Returns:
        int: bytes, without optimizer state.
    """
    return config.num_embeddings * config.embedding_dim * _element_bytes(config)


def _element_bytes(config: EmbeddingBagConfig) -> int:
    return data_type_to_dtype(config.data_type).itemsize


def _bytes_per_rank(
    sharding: ParameterSharding, config: EmbeddingBagConfig, world_size: int
) -> dict[int, int]:
    """Bytes of the weights of one table on each rank that has any."""
    spec = sharding.sharding_spec
    if not isinstance(spec, EnumerableShardingSpec):  # replicated
        return dict.fromkeys(range(world_size), weight_bytes(config))
    parts: dict[int, int] = defaultdict(int)
    for shard in spec.shards:
        rows, columns = shard.shard_sizes
        parts[shard.placement.rank()] += rows * columns * _element_bytes(config)
    return dict(sorted(parts.items()))


def _mebibytes(size: int) -> str:
    return f"{size / _MEBIBYTE:.2f}"
