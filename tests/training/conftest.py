from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_hilomoe.data import CTRBatch, FeatureSpec, SparseFeature
from torchrec_hilomoe.models import parse_model_config
from torchrec_hilomoe.training import (
    ShardingConfig,
    TableOptimizerConfig,
    build_sharded,
    init_process_group,
)


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    """A process group of this process alone."""
    yield init_process_group()
    dist.destroy_process_group()


@pytest.fixture
def features() -> FeatureSpec:
    return FeatureSpec(
        dense=("age", "price"),
        sparse=(
            SparseFeature("user", 40),
            SparseFeature("item", 30),
            SparseFeature("genres", 12, "mean"),
        ),
    )


@pytest.fixture
def make_batch(features: FeatureSpec) -> Callable[..., CTRBatch]:
    """Random batches; ids of ``user`` and ``item`` are single, ``genres`` are bags of 0 to 3."""

    def make(seed: int = 0, rows: int = 32) -> CTRBatch:
        generator = torch.Generator().manual_seed(seed)

        def integers(high: int, shape: tuple[int, ...]) -> torch.Tensor:
            return torch.randint(0, high, shape, generator=generator)

        bags = integers(4, (rows,))
        lengths = torch.cat((torch.ones(2 * rows, dtype=torch.long), bags))
        values = torch.cat(
            (integers(40, (rows,)), integers(30, (rows,)), integers(12, (int(bags.sum()),)))
        )
        return CTRBatch(
            dense_features=torch.rand(rows, 2, generator=generator),
            sparse_features=KeyedJaggedTensor.from_lengths_sync(
                keys=["user", "item", "genres"], values=values, lengths=lengths
            ),
            labels=integers(2, (rows,)).float(),
        )

    return make


@pytest.fixture
def make_model(
    device: torch.device, features: FeatureSpec
) -> Callable[..., DistributedModelParallel]:
    """A small sharded model; keyword arguments are model options."""

    def make(
        tables: TableOptimizerConfig | None = None, sharding: str = "auto", **options: Any
    ) -> DistributedModelParallel:
        values = {
            "name": "hilomoe",
            "embedding_dim": 8,
            "dense_arch_layer_sizes": [8],
            "over_arch_layer_sizes": [6],
        }
        return build_sharded(
            parse_model_config({**values, **options}),
            features,
            ShardingConfig(sharding),
            tables or TableOptimizerConfig(),
            seed=0,
            device=device,
        )

    return make
