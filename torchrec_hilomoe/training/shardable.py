"""What TorchRec's sharding can take, and the errors of what it would crash on or get wrong."""

from __future__ import annotations

import torch
from torch import nn
from torchrec.distributed.sharding_plan import get_module_to_default_sharders
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.training.config import ShardingConfig, TableOptimizerConfig

#: What TorchRec's fused kernels, and all of FBGEMM's on CUDA, take columns of tables by.
COLUMN_MULTIPLE = 4
_DENSE_TYPES = [ShardingType.DATA_PARALLEL, ShardingType.TABLE_WISE]


def uses_dense_kernel(sharding: ShardingConfig, tables: TableOptimizerConfig) -> bool:
    """Whether the tables get whole-table gradients and a `torch.optim` optimizer.

    Args:
        sharding (ShardingConfig): the sharding type.
        tables (TableOptimizerConfig): the optimizer of the tables.

    Returns:
        bool: False for an optimizer that is fused into the tables' backward pass.
    """
    return tables.kernel == "dense" or sharding.type == "data_parallel"


def check_collections(model: nn.Module) -> None:
    """Refuses modules with tables that need a sharder of their own.

    The planner would leave them as they are, or shard the collection inside one alone: position
    weights would not learn then, and each rank would give ids rows in a way of its own.

    Args:
        model (nn.Module): to be sharded.

    Raises:
        ConfigError: there is one; the message names it.
    """
    known = tuple(get_module_to_default_sharders())
    for path, module in model.named_modules():
        if isinstance(module, known) and type(module) is not EmbeddingBagCollection:
            raise ConfigError(
                f"model: {path or 'it'} is of type {type(module).__name__}, and shard_model shards "
                "plain EmbeddingBagCollections alone; shard the model by TorchRec's "
                "DistributedModelParallel, or look the embeddings up in an EmbeddingBagCollection"
            )


def check_tables(
    sharding: ShardingConfig,
    tables: TableOptimizerConfig,
    configs: list[EmbeddingBagConfig],
    device: torch.device,
) -> None:
    """Refuses combinations that TorchRec would crash on or silently get wrong.

    Args:
        sharding (ShardingConfig): the sharding type.
        tables (TableOptimizerConfig): the optimizer of the tables.
        configs (list[EmbeddingBagConfig]): all tables.
        device (torch.device): this rank's device.

    Raises:
        ConfigError: the message names key and tables.
    """
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
