"""A model of one's own learns in every stage, and goes on bit for bit from a plain checkpoint."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp

SCRIPT = Path(__file__).parents[2] / "examples" / "own_model.py"

pytestmark = [pytest.mark.slow]


@pytest.mark.multirank
@pytest.mark.parametrize("ranks", [1, 2])
def test_three_stages(launch, tmp_path, ranks):
    auc = launch(str(tmp_path / "checkpoint"), script="own_model", ranks=ranks).result
    assert 0.9 < auc["warm_up"] < auc["joint"]
    assert auc["specialise"] > 0.9
    assert auc["restored"] == auc["joint"]


@pytest.mark.multirank
def test_optimizers_without_state_are_restored(launch, tmp_path):
    """Whole tables of SGD: no rank has the states of all of them."""
    (tmp_path / "own_sgd.py").write_text(
        f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import own_model
from torchrec_hilomoe import training
own_model.OPTIMIZERS = training.OptimizerConfig(tables=training.TableOptimizerConfig(name="sgd"))
shard = training.shard_model
training.shard_model = lambda model, sharding, *rest: shard(
    model, training.ShardingConfig(type="table_wise"), *rest
)
own_model.main(sys.argv[1])
training.shutdown()
"""
    )
    auc = launch(str(tmp_path / "saved"), script=str(tmp_path / "own_sgd"), ranks=2).result
    assert auc["restored"] == auc["joint"]


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("own_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_a_loaded_model_learns_on_as_the_saved_one(example, tmp_path):
    stage = example.STAGES["joint"]
    device = example.hilomoe.init_process_group()
    saved = example.make_model(device)
    optimizer = example.enter(saved, stage)
    example.train(saved, optimizer, example.clicks(5, seed=0))
    state = example.tensors(example.state(saved, optimizer.dense_state()))
    dcp.save(state, checkpoint_id=tmp_path / "saved")

    loaded = example.make_model(device)
    new_optimizer = example.enter(loaded, stage)
    example.load(loaded, new_optimizer, tmp_path / "saved")
    example.train(saved, optimizer, example.clicks(5, seed=1))
    example.train(loaded, new_optimizer, example.clicks(5, seed=1))
    for (name, one), other in zip(saved.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other), name
