"""Starting a new run from the weights of another one."""

from __future__ import annotations

import logging
from pathlib import Path

from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.errors import CheckpointError
from torchrec_hilomoe.training.checkpoint.description import WEIGHTS
from torchrec_hilomoe.training.checkpoint.resume import verify_on_all_ranks
from torchrec_hilomoe.training.checkpoint.safe_load import load_tensors, read_metadata
from torchrec_hilomoe.training.distributed import agree, is_main_rank

logger = logging.getLogger(__name__)

_PREFIX = "model."


def warm_start(model: DistributedModelParallel, checkpoint: Path, strict: bool = True) -> None:
    """Loads the weights of a checkpoint, and nothing else. Every rank must call it.

    Tables are taken row by row: both runs must have the same vocabularies.

    Args:
        model (DistributedModelParallel): under any sharding plan.
        checkpoint (Path): such as ``OUTPUT_DIR/checkpoints/best``.
        strict (bool): fail if weights are missing, unexpected or of another shape. Otherwise
            these are reported and left as they are.

    Raises:
        CheckpointError: it is damaged, or does not fit under ``strict``.
    """
    try:
        verify_on_all_ranks(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint.warm_start={checkpoint}: {error}") from None
    saved = agree(lambda: read_metadata(checkpoint / WEIGHTS)).state_dict_metadata
    shapes = {
        name.removeprefix(_PREFIX): tuple(tensor.size)
        for name, tensor in saved.items()
        if name.startswith(_PREFIX) and isinstance(tensor, TensorStorageMetadata)
    }
    own = model.state_dict()
    problems = [f"missing: {name}" for name in sorted(own.keys() - shapes.keys())]
    problems += [f"unexpected: {name}" for name in sorted(shapes.keys() - own.keys())]
    fitting = {}
    for name in sorted(own.keys() & shapes.keys()):
        if tuple(own[name].shape) == shapes[name]:
            fitting[name] = own[name]
        else:
            problems.append(f"{name}: {shapes[name]} there, {tuple(own[name].shape)} here")
    if problems and strict:
        raise CheckpointError(
            f"checkpoint.warm_start={checkpoint}: does not fit the model: {'; '.join(problems)}. "
            "Load what fits with checkpoint.strict=false"
        )
    if problems and is_main_rank():
        logger.warning("warm start without what does not fit: %s", "; ".join(problems))
    if fitting:
        load_tensors({"model": fitting}, checkpoint / WEIGHTS)
