from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_hilomoe.data import FeatureSpec, SparseFeature
from torchrec_hilomoe.inference import load_for_serving
from torchrec_hilomoe.training import init_tables, make_tables, tables
from torchrec_hilomoe.training.tables import local_shards, table_name, table_of


def _tables(
    rows: int, seed: int, std: float | None = None, unknown_row: bool = False
) -> torch.Tensor:
    spec = FeatureSpec(dense=(), sparse=(SparseFeature("a", rows), SparseFeature("b", rows)))
    meta = make_tables(spec, 4)
    collection = EmbeddingBagCollection(
        tables=meta.embedding_bag_configs(), device=torch.device("cpu")
    )
    wrapper = torch.nn.ModuleDict({"ebc": collection})
    init_tables(wrapper, seed, std, unknown_row)
    return torch.stack([bag.weight.detach() for bag in collection.embedding_bags.values()])


def test_seed_table_and_block_decide():
    rows = 70_000  # more than one block
    first = _tables(rows, 0)
    assert torch.equal(first, _tables(rows, 0))
    assert not torch.equal(first, _tables(rows, 1))
    assert not torch.equal(first[0], first[1])
    assert first.unique(dim=1).shape[1] == rows


def test_pieces_of_a_table_start_as_parts_of_the_whole(monkeypatch):
    """Whichever rows and columns a rank has, and whatever blocks they are drawn in."""
    monkeypatch.setattr(tables, "BLOCK_ROWS", 4)
    whole = _tables(10, 0, unknown_row=True)

    def quarters(value):
        for rows in (slice(0, 3), slice(3, None)):
            for columns in (slice(0, 1), slice(1, None)):
                yield value[rows, columns], rows.start, columns.start

    monkeypatch.setattr(tables, "local_shards", quarters)
    assert torch.equal(_tables(10, 0, unknown_row=True), whole)


def test_the_row_of_unknown_values_starts_as_zero():
    drawn, known = _tables(50, 0), _tables(50, 0, unknown_row=True)
    assert torch.equal(known[:, 1:], drawn[:, 1:])
    assert not known[:, 0].any()


def test_values_that_training_lacks_add_nothing_to_a_model(run_training, tmp_path):
    run_training(tmp_path, "optimizer.tables.l2=0")
    model = load_for_serving(tmp_path / "checkpoints" / "last")
    tables = [module.weight for module in model.modules() if isinstance(module, nn.EmbeddingBag)]
    assert tables
    assert all(table[1:].any(dim=1).all() and not table[0].any() for table in tables)


def test_distribution():
    uniform = _tables(70_000, 0)
    bound = 1 / math.sqrt(70_000)
    assert uniform.abs().max() <= bound
    assert uniform.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert _tables(70_000, 0, std=1e-4).std().item() == pytest.approx(1e-4, rel=0.01)


def test_a_model_may_configure_the_deviation(make_model):
    model = make_model(embedding_init_std=1e-3)
    tables = [v for name, v in model.state_dict().items() if table_of(name)]
    rows = torch.cat([shard[1:] for table in tables for shard, _, _ in local_shards(table)])
    assert rows.std().item() == pytest.approx(1e-3, rel=0.1)


def test_pooling_and_sizes_follow_the_features(features):
    sums = SparseFeature("tags", 7, "sum")
    spec = FeatureSpec(features.dense, (*features.sparse, sums))
    configs = {c.feature_names[0]: c for c in make_tables(spec, 4).embedding_bag_configs()}
    assert configs["user"].num_embeddings == 40
    assert configs["genres"].pooling.name == "MEAN"
    assert configs["tags"].pooling.name == "SUM"


def test_a_name_with_dots_is_no_other_features_name():
    names = ["a.b", "a%2Eb", "a%.b", "dotted_a%2Eb", "a.b.c", "a.b%2Ec", "a_b", ".", "%"]
    tables = make_tables(FeatureSpec((), tuple(SparseFeature(name, 5) for name in names)), 4)
    assert [config.feature_names for config in tables.embedding_bag_configs()] == [
        [name] for name in names
    ]


def test_names_without_dots_are_those_of_older_checkpoints():
    assert [table_name(name) for name in ("user", "a b", "50%")] == ["t_user", "t_a b", "t_50%"]


class _Collections(nn.Module):
    def __init__(self, device: str, **tables: str) -> None:
        super().__init__()
        for path, name in tables.items():
            config = EmbeddingConfig(
                name=name, embedding_dim=4, num_embeddings=9, feature_names=[name]
            )
            self.add_module(path, EmbeddingCollection([config], device=torch.device(device)))


def test_unpooled_tables_and_those_of_one_name():
    model = _Collections("cpu", left="id", right="id", other="user")
    init_tables(model, seed=0)
    left, right, other = (table.detach() for table in model.parameters())
    assert not torch.equal(left, right)
    assert max(table.abs().max() for table in (left, right, other)) <= 1 / 3
    alone = _Collections("cpu", anywhere="user")
    init_tables(alone, seed=0)
    assert torch.equal(other, alone.anywhere.embeddings["user"].weight)


def test_a_collection_that_is_the_model():
    config = EmbeddingConfig(name="user", embedding_dim=4, num_embeddings=9, feature_names=["user"])
    model = EmbeddingCollection([config])
    init_tables(model, seed=0)
    inner = _Collections("cpu", inner="user")
    init_tables(inner, seed=0)
    assert torch.equal(*model.parameters(), *inner.parameters())


class _OwnInit(nn.Module):
    """Tables with an ``init_fn`` of their own, pooled and unpooled."""

    def __init__(self, device: str) -> None:
        super().__init__()
        own = {"embedding_dim": 4, "num_embeddings": 9, "feature_names": ["f"]}
        far = partial(nn.init.normal_, mean=100.0)
        wide = EmbeddingBagConfig(name="wide", weight_init_min=50.0, weight_init_max=60.0, **own)
        bags = [EmbeddingBagConfig(name="far", init_fn=far, **own), wide]
        self.bags = EmbeddingBagCollection(bags, device=torch.device(device))
        ids = EmbeddingConfig(name="ids", init_fn=far, **own)
        self.ids = EmbeddingCollection([ids], device=torch.device(device))
        self.head = nn.Linear(1, 1)  # DDP needs a parameter


@pytest.mark.filterwarnings("ignore")
def test_tables_start_as_their_configs_say(device):
    plain, sharded = _OwnInit("cpu"), DistributedModelParallel(_OwnInit("meta"), device=device)
    global_state = torch.get_rng_state()
    for model in (plain, sharded):
        init_tables(model, seed=0)
    assert torch.equal(torch.get_rng_state(), global_state)
    far, wide, ids = (value for name, value in plain.state_dict().items() if "head" not in name)
    assert far.min() > 90
    assert 50 <= wide.min() <= wide.max() <= 60
    assert ids.min() > 90
    assert not torch.equal(far, ids)
    for name, value in sharded.state_dict().items():
        for shard, _, _ in local_shards(value) if "head" not in name else ():
            assert torch.equal(shard, plain.state_dict()[name])
    init_tables(plain, seed=0, std=1.0)
    assert far.max() < 10


@pytest.mark.parametrize("dtensor", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_a_sharded_model_of_ones_own(device, dtensor):
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    env.output_dtensor = dtensor
    plain, sharded = _Collections("cpu", ids="user"), _Collections("meta", ids="user")
    sharded.add_module("head", nn.Linear(1, 1))  # DDP needs a parameter
    sharded = DistributedModelParallel(sharded, env=env, device=device)
    for model in (plain, sharded):
        init_tables(model, seed=0)
    value = sharded.state_dict()["ids.embeddings.user.weight"]
    assert isinstance(value, DTensor) == dtensor
    ((shard, row, column),) = local_shards(value)
    assert (row, column) == (0, 0)
    assert torch.equal(shard, plain.ids.embeddings["user"].weight)
