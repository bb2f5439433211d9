"""From a model to a DistributedModelParallel: the plan, the kernels, the initial weights."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import (
    EmbeddingShardingPlanner,
    ParameterConstraints,
    Topology,
)
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingEnv, ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.training.config import ShardingConfig, TableOptimizerConfig
from torchrec_hilomoe.training.distributed import broadcast, is_main_rank
from torchrec_hilomoe.training.optimizers import OPTIMIZERS
from torchrec_hilomoe.training.plan_report import describe_plan, weight_bytes
from torchrec_hilomoe.training.shardable import (
    check_collections,
    check_tables,
    uses_dense_kernel,
)

logger = logging.getLogger(__name__)

_TABLE_TYPES = [ShardingType.TABLE_WISE, ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE]
_ROW_TYPES = [ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE, ShardingType.GRID_SHARD]
_HOST_TYPES = [ShardingType.TABLE_ROW_WISE, ShardingType.GRID_SHARD]  # over the ranks of a host
_COLUMN_TYPES = [ShardingType.COLUMN_WISE, ShardingType.TABLE_COLUMN_WISE]


class _Sharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder with given sharding types on every device; on CPU it hides some.

    The types stand here and not in planner constraints, which TorchRec passes through sets: a
    choice among equals would change from process to process.

    Args:
        types (list[ShardingType]): what the planner may choose from.
    """

    def __init__(self, types: list[ShardingType]) -> None:
        super().__init__()
        self.types = [type_.value for type_ in types]

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return self.types


def shard_model(
    model: nn.Module,
    sharding: ShardingConfig,
    tables: TableOptimizerConfig,
    device: torch.device,
) -> DistributedModelParallel:
    """Shards the tables of ``model`` over the ranks and wraps the rest in DDP.

    Row-wise types place a table whole (table-wise) whose rows would not reach every rank.

    Args:
        model (nn.Module): tables on meta, in plain `EmbeddingBagCollection` modules, everything
            else on ``device``.
        sharding (ShardingConfig): the sharding type.
        tables (TableOptimizerConfig): the optimizer to fuse into the tables' backward pass.
        device (torch.device): this rank's device.

    Returns:
        DistributedModelParallel: with allocated, not yet initialised tables.

    Raises:
        ConfigError: the tables cannot be sharded or optimised so.
    """
    dense = uses_dense_kernel(sharding, tables)
    check_collections(model)
    collections = {
        path: m for path, m in model.named_modules() if isinstance(m, EmbeddingBagCollection)
    }
    tables_of = {path: m.embedding_bag_configs() for path, m in collections.items()}
    configs = [config for own in tables_of.values() for config in own]
    check_tables(sharding, tables, configs, device)
    if not dense:
        for collection in collections.values():
            # A fresh dict for each call: the kwargs are changed in place.
            apply_optimizer_in_backward(
                OPTIMIZERS[tables.name], collection.parameters(), _fused_kwargs(tables)
            )
    ranks_per_host = _ranks_per_host()
    types = _allowed_types(sharding, tables)
    if ranks_per_host is None:  # ranks would wait for each other without end
        types = [type_ for type_ in types if type_ not in _HOST_TYPES]
        if sharding.type in [type_.value for type_ in _HOST_TYPES]:
            raise ConfigError(
                f"sharding.type: {sharding.type} needs as many ranks on every host; start as many, "
                "or choose another sharding type"
            )
    sharder = _Sharder(types)
    plan = _plan(model, sharder, configs, sharding, device, ranks_per_host)
    if dense:
        for module_plan in plan.plan.values():
            for parameter in module_plan.values():
                parameter.compute_kernel = EmbeddingComputeKernel.DENSE.value
    if is_main_rank():
        logger.info("%s", describe_plan(plan, tables_of, dist.get_world_size()))
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    try:
        return DistributedModelParallel(
            model, env=env, device=device, plan=plan, sharders=[sharder], init_parameters=False
        )
    except RuntimeError as error:
        # On CPU it has no type of its own.
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise ConfigError(
            f"model: rank {dist.get_rank()} has no memory for its part of the tables: {error}. "
            f"{_largest(configs)}"
        ) from None


def _ranks_per_host() -> int | None:
    """As TorchRec's kernels take it; None where hosts have different numbers of ranks."""
    world_size = dist.get_world_size()
    if world_size == 1:
        return 1
    own = torch.tensor(get_local_size(world_size))
    sizes = [own.clone() for _ in range(world_size)]
    dist.all_gather(sizes, own)
    return int(own) if all(size == own for size in sizes) else None


def _largest(configs: list[EmbeddingBagConfig]) -> str:
    """What to do about tables that are too large."""
    largest = max(configs, key=weight_bytes)
    return (
        f"The largest table is {largest.name}, {largest.num_embeddings:,} x "
        f"{largest.embedding_dim} "
        f"({weight_bytes(largest) / (1 << 20):,.1f} MiB without "
        "optimizer state). Shard it by rows, hash its ids (hash_size), or start more ranks"
    )


def _allowed_types(sharding: ShardingConfig, tables: TableOptimizerConfig) -> list[ShardingType]:
    """What the planner may choose from."""
    if sharding.type != "auto":
        type_ = ShardingType(sharding.type)
        return [type_, ShardingType.TABLE_WISE] if type_ in _ROW_TYPES else [type_]
    if uses_dense_kernel(sharding, tables):
        return [ShardingType.DATA_PARALLEL]
    # Not data parallel: it ignores fused optimizers without a word. Row-wise Adagrad has one
    # state for each row and shard, so that splitting columns would change the training.
    return _TABLE_TYPES + ([] if tables.name == "rowwise_adagrad" else _COLUMN_TYPES)


def _constraints(
    sharding: ShardingConfig,
    sharder: _Sharder,
    configs: list[EmbeddingBagConfig],
    topology: Topology,
) -> dict[str, ParameterConstraints]:
    """The type of those tables that leave the planner no choice.

    A table whose rows do not reach every rank is placed whole: FBGEMM's kernels fail at random on
    shards of no rows.
    """
    by_rows = not {type_.value for type_ in _ROW_TYPES}.isdisjoint(sharder.types)
    # TorchRec splits over all ranks or those of a node, into as many rows each, rounded up.
    sizes = (topology.world_size, topology.local_world_size)

    def misses_a_rank(rows: int) -> bool:
        return any(-(-rows // size) * (size - 1) >= rows for size in sizes)

    # By name, as TorchRec's constraints are: tables in several collections may share one.
    whole = {c.name for c in configs if by_rows and misses_a_rank(c.num_embeddings)}
    constraints = {}
    for config in configs:
        if config.name in whole:
            only = ShardingType.TABLE_WISE.value
        elif sharding.type != "auto":
            only = sharding.type  # the planner takes some types only where they are constrained
        else:
            continue
        constraints[config.name] = ParameterConstraints(sharding_types=[only])
    return constraints


def _fused_kwargs(tables: TableOptimizerConfig) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"lr": tables.learning_rate}
    return kwargs if tables.eps is None else kwargs | {"eps": tables.eps}


def _plan(
    model: nn.Module,
    sharder: _Sharder,
    configs: list[EmbeddingBagConfig],
    sharding: ShardingConfig,
    device: torch.device,
    ranks_per_host: int | None,
) -> ShardingPlan:
    """Rank 0 plans for all; every rank raises if it cannot."""

    def plan_here() -> ShardingPlan | str:
        world_size = dist.get_world_size()
        limit = sharding.memory_per_rank_gib
        capacity = None if limit is None else int(limit * (1 << 30))
        topology = Topology(
            world_size=world_size,
            local_world_size=ranks_per_host or world_size,
            compute_device=device.type,
            hbm_cap=capacity if device.type == "cuda" else None,
            ddr_cap=capacity if device.type == "cpu" else None,
        )
        constraints = _constraints(sharding, sharder, configs, topology)
        planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
        try:
            return planner.plan(model, [sharder])
        except (PlannerError, RuntimeError) as error:
            return str(error)

    plan = broadcast(plan_here() if is_main_rank() else "")
    if isinstance(plan, str):
        raise ConfigError(
            f"sharding.type={sharding.type}: the planner found no plan. {_largest(configs)}. "
            f"The planner: {plan}"
        )
    return plan
