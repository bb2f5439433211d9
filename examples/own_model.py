"""A model of one's own in three stages: TorchRec's tables, pipeline and checkpoints around HiLoMoE.

torchrun --standalone --nproc_per_node=2 examples/own_model.py NEW_CHECKPOINT_FOLDER
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torchrec.datasets.random import RandomRecDataset
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.mlp import MLP
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_hilomoe import DLRM_HiLoMoETrain, HiLoMoEConfig, HiLoMoELinear
from torchrec_hilomoe import training as hilomoe
from torchrec_hilomoe.models import SparseArch

FEATURES = ["user", "item"]
NUM_IDS, NUM_DENSE, DIM = 100, 4, 16
OPTIMIZERS = hilomoe.OptimizerConfig()
STAGES = {
    "warm_up": hilomoe.StageConfig(train=["tables", "backbone"], experts=False, batches=20),
    "specialise": hilomoe.StageConfig(train=["experts", "router"], batches=20),
    "joint": hilomoe.StageConfig(batches=20),
}


class ClickModel(nn.Module):
    """Any tree of modules: routers, experts and tables are found wherever they stand in it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        tables = [
            EmbeddingBagConfig(
                name=name, embedding_dim=DIM, num_embeddings=NUM_IDS, feature_names=[name]
            )
            for name in FEATURES
        ]
        # Sharding allocates the tables; those of a SparseArch can be frozen.
        self.sparse = SparseArch(EmbeddingBagCollection(tables, device=torch.device("meta")))
        self.dense = MLP(NUM_DENSE, [32, DIM], device=device)
        width = (1 + len(FEATURES)) * DIM
        self.hidden = HiLoMoELinear(width, 64, HiLoMoEConfig(num_experts=4), device=device)
        self.head = nn.Linear(64, 1, device=device)

    def forward(
        self, dense_features: torch.Tensor, sparse_features: KeyedJaggedTensor
    ) -> torch.Tensor:
        """Dense features [B, 4] and ids of B samples to logits [B, 1]."""
        embedded = self.sparse(sparse_features).flatten(1)
        combined = torch.cat((self.dense(dense_features), embedded), dim=1)
        return self.head(torch.relu(self.hidden(combined)))


def make_model(device: torch.device) -> DistributedModelParallel:
    """Sharded by TorchRec's planner, with the tables' optimizer in their backward pass."""
    torch.manual_seed(0)
    train_model = DLRM_HiLoMoETrain(ClickModel(device))
    model = hilomoe.shard_model(train_model, hilomoe.ShardingConfig(), OPTIMIZERS.tables, device)
    hilomoe.init_tables(model, seed=0)
    return model


def clicks(num_batches: int, seed: int) -> Iterator[Batch]:
    """This rank's batches; a click is where the item has the larger id."""
    batches = RandomRecDataset(
        keys=FEATURES,
        batch_size=256,
        hash_size=NUM_IDS,
        ids_per_feature=1,
        num_dense=NUM_DENSE,
        num_batches=num_batches,
        num_generated_batches=-1,  # none of them twice
        manual_seed=seed * dist.get_world_size() + dist.get_rank(),
    )
    for batch in batches:
        user, item = (batch.sparse_features[name].values() for name in FEATURES)
        batch.labels = (user < item).float()
        yield batch


def enter(model: DistributedModelParallel, stage: hilomoe.StageConfig) -> hilomoe.StageOptimizer:
    """What the stage does not train is frozen bit for bit; a stage has an optimizer of its own."""
    hilomoe.enter_stage(model, stage)
    return hilomoe.StageOptimizer(model, OPTIMIZERS, stage)


def train(
    model: DistributedModelParallel, optimizer: hilomoe.StageOptimizer, batches: Iterator[Batch]
) -> None:
    """TorchRec's loop; a pipeline is detached before the model is evaluated or saved."""
    pipeline = TrainPipelineSparseDist(model, optimizer, model.device)
    try:
        while True:
            pipeline.progress(batches)
    except StopIteration:
        pipeline.detach()


def state(model: DistributedModelParallel, dense: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds: weights, and the states of fused and dense optimizers."""
    tables = model.fused_optimizer.state_dict()
    return {"model": model.state_dict(), "tables": tables, "dense": dense}


def tensors(state: dict[str, Any]) -> dict[str, Any]:
    """The state without empty dicts, such as SGD's: DCP would save those of rank 0 alone."""
    kept = {k: tensors(v) if isinstance(v, dict) else v for k, v in state.items()}
    return {k: v for k, v in kept.items() if not isinstance(v, dict) or v}


def load(
    model: DistributedModelParallel, optimizer: hilomoe.StageOptimizer, checkpoint: str
) -> None:
    """Loads what any number of ranks saved in the same stage."""
    # An optimizer has no state before its first step, and nothing is loaded into none.
    loaded = state(model, optimizer.init_state())
    dcp.load(tensors(loaded), checkpoint_id=checkpoint)  # in place
    model.load_state_dict(loaded["model"])
    model.fused_optimizer.load_state_dict(loaded["tables"])


def main(checkpoint: str) -> None:
    """Trains stage by stage, saves, and loads into a new model."""
    device = hilomoe.init_process_group()
    model, auc = make_model(device), {}
    for seed, (name, stage) in enumerate(STAGES.items()):
        optimizer = enter(model, stage)
        train(model, optimizer, clicks(stage.batches or 0, seed))
        auc[name] = hilomoe.predict(model, clicks(10, seed=9), device).compute()["auc"]
    dcp.save(tensors(state(model, optimizer.dense_state())), checkpoint_id=checkpoint)

    restored = make_model(device)
    load(restored, enter(restored, stage), checkpoint)
    auc["restored"] = hilomoe.predict(restored, clicks(10, seed=9), device).compute()["auc"]
    if hilomoe.is_main_rank():
        print(json.dumps(auc))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="folder to be written")
    main(parser.parse_args().checkpoint)
    hilomoe.shutdown()
