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
from torchrec.distributed.sharding_plan import get_module_to_default_sharders
from torchrec.distributed.types import ShardingEnv, ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.training.config import ShardingConfig, TableOptimizerConfig
from torchrec_hilomoe.training.distributed import broadcast, is_main_rank
from torchrec_hilomoe.training.optimizers import OPTIMIZERS
from torchrec_hilomoe.training.plan_report import describe_plan, weight_bytes

logger = logging.getLogger(__name__)

_TABLE_TYPES = [ShardingType.TABLE_WISE, ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE]
_ROW_TYPES = [ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE, ShardingType.GRID_SHARD]
_HOST_TYPES = [ShardingType.TABLE_ROW_WISE, ShardingType.GRID_SHARD]  # over the ranks of a host
_COLUMN_TYPES = [ShardingType.COLUMN_WISE, ShardingType.TABLE_COLUMN_WISE]
_DENSE_TYPES = [ShardingType.DATA_PARALLEL, ShardingType.TABLE_WISE]

#: What TorchRec's fused kernels, and all of FBGEMM's on CUDA, take columns of tables by.
COLUMN_MULTIPLE = 4


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


def uses_dense_kernel(sharding: ShardingConfig, tables: TableOptimizerConfig) -> bool:
    """Whether the tables get whole-table gradients and a `torch.optim` optimizer."""
    return tables.kernel == "dense" or sharding.type == "data_parallel"


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
    _check_collections(model)
    collections = {
        path: m for path, m in model.named_modules() if isinstance(m, EmbeddingBagCollection)
    }
    tables_of = {path: m.embedding_bag_configs() for path, m in collections.items()}
    configs = [config for own in tables_of.values() for config in own]
    _check(sharding, tables, configs, device)
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


def _check_collections(model: nn.Module) -> None:
    """Refuses modules with tables that need a sharder of their own.

    The planner would leave them as they are, or shard the collection inside one alone: position
    weights would not learn then, and each rank would give ids rows in a way of its own.
    """
    known = tuple(get_module_to_default_sharders())
    for path, module in model.named_modules():
        if isinstance(module, known) and type(module) is not EmbeddingBagCollection:
            raise ConfigError(
                f"model: {path or 'it'} is of type {type(module).__name__}, and shard_model shards "
                "plain EmbeddingBagCollections alone; shard the model by TorchRec's "
                "DistributedModelParallel, or look the embeddings up in an EmbeddingBagCollection"
            )


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


def _check(
    sharding: ShardingConfig,
    tables: TableOptimizerConfig,
    configs: list[EmbeddingBagConfig],
    device: torch.device,
) -> None:
    """Refuses combinations that TorchRec would crash on or silently get wrong."""
    dense = uses_dense_kernel(sharding, tables)
    if not dense and tables.name == "adam" and device.type == "cpu":
        raise ConfigError(
            "optimizer.tables.name: fused Adam does not exist on CPU; set "
            "optimizer.tables.kernel=dense, or choose rowwise_adagrad, adagrad or sgd"
        )
    dense_types = [type_.value for type_ in _DENSE_TYPES]
    if dense and sharding.type not in ("auto", *dense_types):
        raise ConfigError(
            "sharding.type: the dense kernel (optimizer.tables.kernel=dense; in an evaluation, "
            f"columns that are no multiple of {COLUMN_MULTIPLE}) works with "
            f"{', '.join(dense_types)} (auto takes data_parallel), got {sharding.type}"
        )
    odd = [f"{c.name} ({c.embedding_dim})" for c in configs if c.embedding_dim % COLUMN_MULTIPLE]
    if odd and (device.type == "cuda" or not dense):
        raise ConfigError(
            "model.embedding_dim: FBGEMM's fused kernels, and all of CUDA, need tables whose "
            f"columns are a multiple of {COLUMN_MULTIPLE}, got {', '.join(odd)}; take the next "
            "multiple, or on CPU optimizer.tables.kernel=dense (evaluation takes it by itself)"
        )
    half = [config.name for config in configs if config.data_type == DataType.FP16]
    if half and dense and tables.name != "sgd":
        raise ConfigError(
            f"optimizer.tables.name: the dense kernel keeps the state of {tables.name} in the type "
            f"of the tables, and that of {half} underflows in FP16; take the fused kernel, sgd, or "
            "FP32"
        )
    bfloat = [config.name for config in configs if config.data_type == DataType.BF16]
    if bfloat and device.type == "cpu":
        raise ConfigError(f"model: FBGEMM has no kernels on CPU for {bfloat} in BF16; take FP16")
    means = [config.name for config in configs if config.pooling == PoolingType.MEAN]
    if sharding.type == "grid_shard" and means:
        raise ConfigError(
            f"sharding.type: under grid_shard TorchRec sums what should be averaged in {means}; "
            "set pooling: sum in the data schema, or choose another sharding type"
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
