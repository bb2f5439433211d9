"""A sharding plan for people to read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torchrec.distributed.types import EnumerableShardingSpec, ParameterSharding, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig

_FLOAT_BYTES = 4
_MEBIBYTE = 1 << 20


def describe_plan(
    plan: ShardingPlan, configs: Iterable[EmbeddingBagConfig], world_size: int
) -> str:
    """Which table is where, and the memory of each rank.

    Args:
        plan (ShardingPlan): as the planner made it.
        configs (Iterable[EmbeddingBagConfig]): the tables.
        world_size (int): number of ranks.

    Returns:
        str: a line for each table, the largest first, and the sum of each rank. Memory is that
            of the float32 weights; optimizer states, gradients and buffers come on top.
    """
    shapes = {config.name: (config.num_embeddings, config.embedding_dim) for config in configs}
    total: dict[int, int] = defaultdict(int)
    lines = []
    tables = [item for module_plan in plan.plan.values() for item in module_plan.items()]
    tables.sort(key=lambda item: -shapes[item[0]][0] * shapes[item[0]][1])
    for name, sharding in tables:
        rows, dim = shapes[name]
        parts = _bytes_per_rank(sharding, rows * dim, world_size)
        for rank, size in parts.items():
            total[rank] += size
        placed = ", ".join(f"rank {rank}: {_mebibytes(size)}" for rank, size in parts.items())
        lines.append(f"  {name}: {rows:,} x {dim}, {sharding.sharding_type}; {placed}")
    sums = ", ".join(f"rank {rank}: {_mebibytes(total[rank])}" for rank in range(world_size))
    return "\n".join(["sharding plan (weights in MiB):", *lines, f"  together: {sums}"])


def _bytes_per_rank(sharding: ParameterSharding, numel: int, world_size: int) -> dict[int, int]:
    """Bytes of the weights of one table on each rank that has any."""
    spec = sharding.sharding_spec
    if not isinstance(spec, EnumerableShardingSpec):  # replicated
        return dict.fromkeys(range(world_size), numel * _FLOAT_BYTES)
    parts: dict[int, int] = defaultdict(int)
    for shard in spec.shards:
        rows, columns = shard.shard_sizes
        parts[shard.placement.rank()] += rows * columns * _FLOAT_BYTES
    return dict(sorted(parts.items()))


def _mebibytes(size: int) -> str:
    return f"{size / _MEBIBYTE:.2f}"
