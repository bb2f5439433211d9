"""The tensors of a run: weights, optimizer states, random generators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.errors import CheckpointError
from torchrec_hilomoe.modules import set_experts_enabled
from torchrec_hilomoe.training.batch_norms import running_statistics
from torchrec_hilomoe.training.checkpoint.description import WEIGHTS, read_info
from torchrec_hilomoe.training.checkpoint.safe_load import (
    first_failure,
    load_tensors,
    read_metadata,
)
from torchrec_hilomoe.training.distributed import agree
from torchrec_hilomoe.training.optimizers import StageOptimizer, fused_modules


def save_tensors(
    weights: Path, model: DistributedModelParallel, optimizer: StageOptimizer | None
) -> None:
    """Writes all tensors of a run. Every rank must call it.

    Args:
        weights (Path): the DCP folder, empty.
        model (DistributedModelParallel): no pipeline attached.
        optimizer (StageOptimizer | None): of the stage; None between two stages.

    Raises:
        CheckpointError: a rank could not write; raised on every rank.
    """
    state = _weights_and_fused_state(model)
    state |= _state_of_rank(model)
    if optimizer is not None:
        state["dense"] = optimizer.dense_state()
    iteration = torch.tensor(max((int(m.iter) for m in fused_modules(model)), default=0))
    dist.all_reduce(iteration, dist.ReduceOp.MAX)
    state["fused_iteration"] = iteration
    try:
        dcp.save(_pruned(state), storage_writer=dcp.FileSystemWriter(weights))
    except dcp.CheckpointException as error:
        raise CheckpointError(f"cannot write {weights}: {first_failure(error)}") from None


def load_model(model: DistributedModelParallel, checkpoint: Path) -> None:
    """Loads what predicts: the weights, with the experts on or off as they were.

    Every rank must call it.

    Args:
        model (DistributedModelParallel): of the same architecture, under any plan.
        checkpoint (Path): verified.
    """
    info = agree(lambda: read_info(checkpoint))
    state = {"model": model.state_dict()}
    load_tensors(state, checkpoint / WEIGHTS)
    model.load_state_dict(state["model"])
    set_experts_enabled(model, info.experts)


def load_training(
    model: DistributedModelParallel,
    optimizer: StageOptimizer,
    weights: Path,
    same_world: bool,
) -> None:
    """Loads weights and optimizer states, and at the same world size what each rank has of its own.

    Args:
        model (DistributedModelParallel): of the same architecture, under any plan.
        optimizer (StageOptimizer): of the stage in which the checkpoint was written.
        weights (Path): the DCP folder.
        same_world (bool): whether as many ranks wrote it.

    Raises:
        CheckpointError: a tensor is missing or does not fit; raised on every rank.
    """
    saved = read_metadata(weights).state_dict_metadata
    state = _weights_and_fused_state(model) | {"fused_iteration": torch.tensor(0)}
    state["dense"] = optimizer.init_state(
        lambda part, parameter: any(k.startswith(f"dense.{part}.{parameter}.") for k in saved)
    )
    own = _state_of_rank(model)
    same_world &= {f"rank.{dist.get_rank()}.random.{d}" for d in _devices(model)} <= saved.keys()
    if same_world:
        state |= own
    try:
        load_tensors(_pruned(state), weights)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. Optimizer states fit the optimizers and kernels that they were saved with, "
            "and row-wise Adagrad's under column-wise types fits that very plan. Resume with "
            "these, or begin a new run from the weights with checkpoint.warm_start"
        ) from None
    model.load_state_dict(state["model"])
    model.fused_optimizer.load_state_dict(state["fused"])
    for module in fused_modules(model):
        module.set_optimizer_step(int(state["fused_iteration"]))
    if same_world:
        _set_state_of_rank(own, model)


def _weights_and_fused_state(model: DistributedModelParallel) -> dict[str, Any]:
    return {"model": model.state_dict(), "fused": model.fused_optimizer.state_dict()}


def _pruned(state: dict[str, Any]) -> dict[str, Any]:
    """Without empty dicts, which DCP would pickle."""
    pruned = {k: _pruned(v) if isinstance(v, dict) else v for k, v in state.items()}
    return {k: v for k, v in pruned.items() if not isinstance(v, dict) or v}


def _state_of_rank(model: DistributedModelParallel) -> dict[str, Any]:
    """Random generators, and the batch norms' statistics: not the same on every rank."""
    random = {"cpu": torch.get_rng_state()}
    if "cuda" in _devices(model):
        random["cuda"] = torch.cuda.get_rng_state(model.device)
    own = {
        "random": random,
        "statistics": {k: v.clone() for k, v in running_statistics(model).items()},
    }
    return {"rank": {str(dist.get_rank()): own}}


def _devices(model: DistributedModelParallel) -> set[str]:
    return {"cpu", model.device.type}


def _set_state_of_rank(state: dict[str, Any], model: DistributedModelParallel) -> None:
    own = state["rank"][str(dist.get_rank())]
    torch.set_rng_state(own["random"]["cpu"])
    if "cuda" in _devices(model):
        torch.cuda.set_rng_state(own["random"]["cuda"], model.device)
    for name, value in running_statistics(model).items():
        value.copy_(own["statistics"][name])
