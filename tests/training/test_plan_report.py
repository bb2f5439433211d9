from __future__ import annotations

import pytest
from torchrec.distributed.planner import Topology
from torchrec.distributed.types import (
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
    ShardMetadata,
)
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig

from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.models import parse_model_config
from torchrec_hilomoe.training import ShardingConfig, TableOptimizerConfig, build_sharded, sharding
from torchrec_hilomoe.training.plan_report import describe_plan

MIB_ROWS = (1 << 20) // 4 // 8  # rows of 8 floats in a mebibyte


def _table(name: str, rows: int, data_type: DataType = DataType.FP32) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=name,
        embedding_dim=8,
        num_embeddings=rows,
        feature_names=[name],
        data_type=data_type,
    )


def _split(rows: tuple[int, ...], ranks: tuple[int, ...] = (0, 1)) -> ParameterSharding:
    starts = [sum(rows[:i]) for i in range(len(rows))]
    shards = [
        ShardMetadata(shard_offsets=[start, 0], shard_sizes=[size, 8], placement=f"rank:{rank}/cpu")
        for rank, start, size in zip(ranks, starts, rows, strict=False)
    ]
    return ParameterSharding(
        sharding_type="row_wise",
        compute_kernel="fused",
        ranks=list(ranks),
        sharding_spec=EnumerableShardingSpec(shards),
    )


def test_every_table_and_the_memory_of_each_rank():
    replicated = ParameterSharding(sharding_type="data_parallel", compute_kernel="dense")
    plan = ShardingPlan({"ebc": {"small": replicated, "large": _split((3 * MIB_ROWS, MIB_ROWS))}})
    tables = [_table("small", MIB_ROWS), _table("large", 4 * MIB_ROWS)]
    assert describe_plan(plan, {"ebc": tables}, world_size=2).splitlines() == [
        "sharding plan (weights in MiB):",
        f"  large: {4 * MIB_ROWS:,} x 8, row_wise; rank 0: 3.00, rank 1: 1.00",
        f"  small: {MIB_ROWS:,} x 8, data_parallel; rank 0: 1.00, rank 1: 1.00",
        "  together: rank 0: 4.00, rank 1: 2.00",
    ]


def test_tables_of_one_name_and_of_half_precision():
    plan = ShardingPlan({"a": {"t": _split((MIB_ROWS,))}, "b": {"t": _split((3 * MIB_ROWS,))}})
    tables = {"a": [_table("t", MIB_ROWS)], "b": [_table("t", 3 * MIB_ROWS, DataType.FP16)]}
    assert describe_plan(plan, tables, world_size=1).splitlines()[1:] == [
        f"  t: {3 * MIB_ROWS:,} x 8, row_wise; rank 0: 1.50",
        f"  t: {MIB_ROWS:,} x 8, row_wise; rank 0: 1.00",
        "  together: rank 0: 2.50",
    ]


def test_several_shards_of_a_table_on_one_rank_count_together():
    plan = ShardingPlan({"ebc": {"t": _split((MIB_ROWS, 2 * MIB_ROWS), ranks=(0, 0))}})
    lines = describe_plan(plan, {"ebc": [_table("t", 3 * MIB_ROWS)]}, world_size=1).splitlines()
    assert lines[1:] == [
        f"  t: {3 * MIB_ROWS:,} x 8, row_wise; rank 0: 3.00",
        "  together: rank 0: 3.00",
    ]


@pytest.mark.filterwarnings("ignore")
def test_memory_is_in_gib(device, features, monkeypatch):
    capacities = []

    def noting(**options):
        capacities.append(options["ddr_cap"])
        return Topology(**options)

    monkeypatch.setattr(sharding, "Topology", noting)
    config = parse_model_config({"name": "dlrm", "embedding_dim": 8})
    build_sharded(config, features, ShardingConfig(memory_per_rank_gib=1.5), None, 0, device)
    assert capacities == [3 * 2**29]


def test_a_plan_that_does_not_fit_names_the_table(device, features):
    with pytest.raises(ConfigError, match="The largest table is t_user, 40 x 8"):
        build_sharded(
            parse_model_config({"name": "hilomoe", "embedding_dim": 8}),
            features,
            ShardingConfig("table_wise", memory_per_rank_gib=1e-7),
            TableOptimizerConfig(),
            seed=0,
            device=device,
        )
