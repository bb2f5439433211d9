"""Starting a new run from the weights of another one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.data import load_encoder
from torchrec_hilomoe.data.matching import matching_rows, other_columns
from torchrec_hilomoe.data.rows import Int32Array
from torchrec_hilomoe.data.source import Encoder
from torchrec_hilomoe.errors import CheckpointError, DataError
from torchrec_hilomoe.training.checkpoint.description import ENCODER, WEIGHTS
from torchrec_hilomoe.training.checkpoint.resume import verify_on_all_ranks
from torchrec_hilomoe.training.checkpoint.safe_load import load_tensors, read_metadata
from torchrec_hilomoe.training.distributed import agree, is_main_rank
from torchrec_hilomoe.training.tables import BLOCK_ROWS, local_shards, table_name, table_of

logger = logging.getLogger(__name__)

_PREFIX = "model."


def warm_start(
    model: DistributedModelParallel, checkpoint: Path, encoder: Encoder, strict: bool = True
) -> None:
    """Loads the weights of a checkpoint, and nothing else. Every rank must call it.

    Where a table's vocabulary is another one than the checkpoint's, each value takes its row along,
    wherever it stands now, and new values start as the mean of the checkpoint's (or as its row 0,
    if it has no others): a model that knows nothing of a value predicts what is usual. Such tables
    are read whole on every rank, one after the other; all else goes straight to its shards.

    Args:
        model (DistributedModelParallel): under any sharding plan.
        checkpoint (Path): such as ``OUTPUT_DIR/checkpoints/best``.
        encoder (Encoder): of the data that the model is to be trained on.
        strict (bool): fail if columns are others, or if weights are missing, unexpected, of
            another shape, or tables whose rows cannot be told. Otherwise these are reported and
            left as they are; of other columns all but the tables.

    Raises:
        CheckpointError: it is damaged, or does not fit under ``strict``.
    """
    try:
        verify_on_all_ranks(checkpoint)
        former = agree(lambda: load_encoder(checkpoint / ENCODER))
    except (CheckpointError, DataError) as error:
        raise CheckpointError(f"checkpoint.warm_start={checkpoint}: {error}") from None
    shapes = agree(lambda: _saved_shapes(checkpoint / WEIGHTS))
    own = model.state_dict()
    fitting, moved, problems = _compare(own, shapes, former, encoder)
    if problems and strict:
        raise CheckpointError(
            f"checkpoint.warm_start={checkpoint}: does not fit the model: {'; '.join(problems)}. "
            "Load what fits with checkpoint.strict=false"
        )
    if problems and is_main_rank():
        logger.warning("warm start without what does not fit: %s", "; ".join(problems))
    if fitting:
        load_tensors({"model": {name: own[name] for name in fitting}}, checkpoint / WEIGHTS)
    for name, old_rows in moved.items():
        _load_moved(name, own[name], shapes[name], old_rows, checkpoint / WEIGHTS)


def _saved_shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the model's tensors in a DCP folder, by name."""
    return {
        name.removeprefix(_PREFIX): tuple(tensor.size)
        for name, tensor in read_metadata(weights).state_dict_metadata.items()
        if name.startswith(_PREFIX) and isinstance(tensor, TensorStorageMetadata)
    }


def _compare(
    own: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    former: Encoder,
    encoder: Encoder,
) -> tuple[list[str], dict[str, Int32Array], list[str]]:
    """Weights that fit, tables whose rows stand elsewhere in the checkpoint, and what is wrong."""
    others = other_columns(former, encoder)
    problems = [f"layers, which know columns by their order: {'; '.join(others)}"] if others else []
    problems += [f"missing: {name}" for name in sorted(own.keys() - shapes.keys())]
    problems += [f"unexpected: {name}" for name in sorted(shapes.keys() - own.keys())]
    rows, strange = _moved_tables(former, encoder)
    fitting, moved = [], {}
    for name in sorted(own.keys() & shapes.keys()):
        here, there, table = tuple(own[name].shape), shapes[name], table_of(name)
        if table is None and others:
            continue  # a layer
        if table in strange:
            problems.append(f"{name}: {strange[table]}")
        elif table in rows and here[1:] == there[1:]:
            moved[name] = rows[table]
        elif here == there:
            fitting.append(name)
        else:
            problems.append(f"{name}: {there} there, {here} here")
    return fitting, moved, problems


def _moved_tables(
    former: Encoder, encoder: Encoder
) -> tuple[dict[str, Int32Array], dict[str, str]]:
    """By table: where its rows stood, if any moved; and why they cannot be told."""
    rows: dict[str, Int32Array] = {}
    strange: dict[str, str] = {}
    known = {feature.name for feature in former.features.sparse}
    for feature in encoder.features.sparse:
        if feature.name not in known:
            continue
        table = table_name(feature.name)
        try:
            found = matching_rows(feature.name, former, encoder)
        except DataError as error:
            strange[table] = str(error)
            continue
        if found is not None:
            rows[table] = found
    return rows, strange


@torch.no_grad()
def _load_moved(
    name: str, table: Tensor, saved_shape: tuple[int, ...], old_rows: Int32Array, weights: Path
) -> None:
    """Fills this rank's pieces of a table from rows that stand elsewhere in the checkpoint."""
    num_rows, dim = saved_shape
    saved = torch.empty((num_rows + 1, dim), dtype=table.dtype)
    load_tensors({"model": {name: saved[:-1]}}, weights)
    saved[-1] = saved[min(1, num_rows - 1) : -1].mean(0)  # where -1, a new value, finds it
    source = torch.from_numpy(old_rows).long()
    for piece, row, column in local_shards(table):
        of_piece = source[row : row + piece.size(0)].split(BLOCK_ROWS)
        for block, rows in zip(piece.split(BLOCK_ROWS), of_piece, strict=True):
            block.copy_(saved[rows, column : column + block.size(1)])
    if is_main_rank():
        num_known, total = int((source > 0).sum()), len(source) - 1
        logger.info(
            "warm start: %s: %d of %d values are known to the checkpoint",
            table_of(name),
            num_known,
            total,
        )
