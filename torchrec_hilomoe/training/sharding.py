"""From a model to a DistributedModelParallel: the plan, the kernels, the initial weights."""

from __future__ import annotations

import os
from typing import Any

import torch
import torchrec
from torch import distributed as dist
from torch import nn
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
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.training.config import ShardingConfig, TableOptimizerConfig

_FUSED_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": torchrec.optim.RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
}

# Data parallel ignores fused optimizers without a word, so the planner must not choose it for them.
_FUSED_TYPES = [
    ShardingType.TABLE_WISE.value,
    ShardingType.ROW_WISE.value,
    ShardingType.COLUMN_WISE.value,
    ShardingType.TABLE_ROW_WISE.value,
    ShardingType.TABLE_COLUMN_WISE.value,
    ShardingType.GRID_SHARD.value,
]
_DENSE_TYPES = [ShardingType.DATA_PARALLEL.value, ShardingType.TABLE_WISE.value]


class _Sharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder with every sharding type on every device; on CPU it hides some."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [*_FUSED_TYPES, ShardingType.DATA_PARALLEL.value]


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

    Args:
        model (nn.Module): tables on meta, everything else on ``device``.
        sharding (ShardingConfig): the sharding type.
        tables (TableOptimizerConfig): the optimizer to fuse into the tables' backward pass.
        device (torch.device): this rank's device.

    Returns:
        DistributedModelParallel: with allocated, not yet initialised tables.

    Raises:
        ConfigError: the tables cannot be sharded or optimised so.
    """
    dense = uses_dense_kernel(sharding, tables)
    _check(sharding, tables, device, dense)
    if not dense:
        for module in model.modules():
            if isinstance(module, EmbeddingBagCollection):
                # A fresh dict for each call: the kwargs are changed in place.
                apply_optimizer_in_backward(
                    _FUSED_OPTIMIZERS[tables.name], module.parameters(), _fused_kwargs(tables)
                )
    plan = _plan(model, sharding, device, dense)
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    return DistributedModelParallel(
        model, env=env, device=device, plan=plan, sharders=[_Sharder()], init_parameters=False
    )


def _check(
    sharding: ShardingConfig, tables: TableOptimizerConfig, device: torch.device, dense: bool
) -> None:
    """Refuses combinations that TorchRec would crash on or silently ignore."""
    if not dense and tables.name == "adam" and device.type == "cpu":
        raise ConfigError(
            "optimizer.tables.name: fused Adam does not exist on CPU; set "
            "optimizer.tables.kernel=dense, or choose rowwise_adagrad, adagrad or sgd"
        )
    if dense and sharding.type not in ("auto", *_DENSE_TYPES):
        raise ConfigError(
            f"sharding.type: optimizer.tables.kernel=dense works with "
            f"{', '.join(_DENSE_TYPES)} (auto takes data_parallel), got {sharding.type}"
        )


def _fused_kwargs(tables: TableOptimizerConfig) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"lr": tables.learning_rate}
    return kwargs if tables.eps is None else kwargs | {"eps": tables.eps}


def _plan(
    model: nn.Module, sharding: ShardingConfig, device: torch.device, dense: bool
) -> ShardingPlan:
    """Plans on each rank: the planner is deterministic, and no rank waits if it fails."""
    if sharding.type != "auto":
        types = [sharding.type]
    else:
        types = [ShardingType.DATA_PARALLEL.value] if dense else _FUSED_TYPES
    constraints = {
        config.name: ParameterConstraints(sharding_types=types)
        for module in model.modules()
        if isinstance(module, EmbeddingBagCollection)
        for config in module.embedding_bag_configs()
    }
    world_size = dist.get_world_size()
    topology = Topology(
        world_size=world_size,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        compute_device=device.type,
    )
    try:
        plan = EmbeddingShardingPlanner(topology=topology, constraints=constraints).plan(
            model, [_Sharder()]
        )
    except (PlannerError, RuntimeError) as error:
        raise ConfigError(
            f"sharding.type={sharding.type}: the planner found no plan for {world_size} rank(s): "
            f"{error}"
        ) from error
    if dense:
        for module_plan in plan.plan.values():
            for parameter in module_plan.values():
                parameter.compute_kernel = EmbeddingComputeKernel.DENSE.value
    return plan
