"""Scoring a raw file with a checkpoint."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import PositiveInt
from torch import distributed as dist

from torchrec_hilomoe.config import STRICT
from torchrec_hilomoe.data import open_encoded
from torchrec_hilomoe.data.rows import Int64Array
from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.training.alike import check_alike
from torchrec_hilomoe.training.checkpoint import (
    load_model,
    read_info,
    verify_on_all_ranks,
)
from torchrec_hilomoe.training.config import ShardingConfig
from torchrec_hilomoe.training.distributed import (
    PREPARATION_TIMEOUT,
    agree,
    init_process_group,
    is_main_rank,
)
from torchrec_hilomoe.training.evaluation import predict
from torchrec_hilomoe.training.metrics import Predictions
from torchrec_hilomoe.training.run import build_sharded

logger = logging.getLogger(__name__)


@dataclass
class ScoreDataConfig:
    """The file to score.

    Attributes:
        test (str | list[str]): raw file, folder or glob, in the format of the training files. Where
            there is a header, the label, and then also the group, may be left out.
        batch_size (int): global batch size.
        on_bad_row (str): ``raise`` or ``skip``.
        cache_dir (str | None): of the encoded file; None for the default.
        labels (bool | None): whether there are labels. None looks at the header; a file without one
            has labels, unless False says that their column is left out.
    """

    __pydantic_config__ = STRICT

    test: str | list[str]
    batch_size: PositiveInt = 8192
    on_bad_row: Literal["raise", "skip"] = "raise"
    cache_dir: str | None = None
    labels: bool | None = None


@dataclass
class ScoreConfig:
    """An evaluation of a checkpoint.

    Attributes:
        checkpoint (Path): such as ``OUTPUT_DIR/checkpoints/best``.
        data (ScoreDataConfig): the file to score.
        predictions (Path | None): Parquet file to write, with a row for each one that was not
            skipped, in the order of the files: ``row`` (its 0-based place over all files, skipped
            rows counted, header and blank lines not), ``label`` (null without labels) and
            ``prediction`` (probability of a click). Required where there are no labels.
        sharding (ShardingConfig): how the tables are spread.
    """

    __pydantic_config__ = STRICT

    checkpoint: Path
    data: ScoreDataConfig
    predictions: Path | None
    sharding: ShardingConfig


def score(config: ScoreConfig) -> dict[str, Any]:
    """Scores a raw file with the schema and vocabularies saved beside the weights.

    Every rank of the launch calls it. The checkpoint may come from another world size and plan.

    Args:
        config (ScoreConfig): the same on every rank.

    Returns:
        dict[str, Any]: ``auc``, ``logloss``, ``samples`` and the other metrics, None but for
        ``samples`` without labels; ``skipped``, how many bad rows were left out, by reason.

    Raises:
        HiLoMoEError: checkpoint or file cannot be used; raised on every rank.
    """
    device = init_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    info = agree(lambda: read_info(config.checkpoint))
    verify_on_all_ranks(config.checkpoint)
    data = agree(
        lambda: open_encoded(
            info.encoder,
            config.data.test,
            batch_size=config.data.batch_size,
            rank=rank,
            world_size=world_size,
            on_bad_row=config.data.on_bad_row,
            labels=config.data.labels,
            cache_dir=config.data.cache_dir,
            progress=rank == 0,
        ),
        PREPARATION_TIMEOUT,
    )
    check_alike({"data": {"batch_size": config.data.batch_size, **data.identity}})
    if not data.has_labels("test"):
        if config.predictions is None:
            raise ConfigError(
                f"data.test={config.data.test}: has no labels, so that there is nothing to report "
                "but predictions; to write these, give predictions=FILE"
            )
        if is_main_rank():
            logger.warning("data.test has no labels: predictions are written, metrics are null")
    model = build_sharded(
        info.model, info.features, config.sharding, tables=None, seed=0, device=device
    )
    load_model(model, config.checkpoint)
    predictions = predict(model, data.loader("test"), device)
    metrics = predictions.compute()
    if config.predictions is not None:
        write_predictions(config.predictions, predictions, data.positions("test"))
    return metrics | {"skipped": data.report["skipped"].get("test", {})}


def write_predictions(path: Path, predictions: Predictions, positions: Int64Array) -> None:
    """Writes place, label and probability of each row that was scored, in the order of the files.

    Args:
        path (Path): Parquet file, written by rank 0. Every rank must call it.
        predictions (Predictions): of all batches. Each rank scored its contiguous share of each
            global batch, so the shares are put together batch by batch.
        positions (Int64Array): from `DataSource.positions`.

    Raises:
        ConfigError: the file cannot be written.
    """
    shares: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(predictions.batches(), shares if is_main_rank() else None)

    def write() -> None:
        if not is_main_rank():
            return
        batches = [share for batch in zip(*shares, strict=True) for share in batch]
        logits, labels = (torch.cat(column) for column in zip(*batches, strict=True))
        table = pa.table(
            {
                "row": positions,
                "label": pa.array(labels.numpy(), from_pandas=True),  # NaN is null
                "prediction": logits.double().sigmoid().float().numpy(),
            }
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path)
        except OSError as error:
            raise ConfigError(f"predictions: cannot write {path}: {error}") from None

    agree(write)
