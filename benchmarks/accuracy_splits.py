"""What the accuracy benchmark cuts out of a plan's files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from accuracy_plan import Entry
from omegaconf import OmegaConf
from pyarrow import parquet
from runs import composed

from torchrec_hilomoe.config import parse_config
from torchrec_hilomoe.data import DataConfig
from torchrec_hilomoe.data.bad_rows import BadRows
from torchrec_hilomoe.data.files import RawFormat
from torchrec_hilomoe.data.lines import read_header
from torchrec_hilomoe.data.readers import named_errors, read_chunks
from torchrec_hilomoe.data.tabular import find_raw_files


def data_of(entry: Entry, files: Mapping[str, str]) -> DataConfig:
    """The data set of an entry, as its runs read it.

    Args:
        entry (Entry): of the plan.
        files (Mapping[str, str]): its ``train`` and ``valid``.

    Returns:
        DataConfig: with these files.
    """
    values = OmegaConf.to_container(composed(entry.overrides).data, resolve=True)
    return dataclasses.replace(parse_config(DataConfig, values, "data"), **files)


def carve(data: DataConfig, halves: Sequence[Path]) -> None:
    """Cuts the valid split by chance, but always alike, into equal parts; rows keep their order.

    Args:
        data (DataConfig): with a valid split.
        halves (Sequence[Path]): Parquet files to be written.
    """
    rows = _read(data, "valid")
    order = np.random.default_rng(0).permutation(rows.num_rows)
    for half, chosen in zip(halves, np.array_split(order, len(halves)), strict=True):
        _write(rows.take(np.sort(chosen)), half)


def sample(data: DataConfig, target: Path, num_rows: int) -> None:
    """So many training rows by chance, but always the same, in their order.

    Args:
        data (DataConfig): with a train split.
        target (Path): Parquet file to be written.
        num_rows (int): rows of the sample; all rows if there are no more.
    """
    rows = _read(data, "train")
    chosen = np.random.default_rng(0).permutation(rows.num_rows)[:num_rows]
    _write(rows.take(np.sort(chosen)), target)


def _write(rows: pa.Table, path: Path) -> None:
    """Whole or not at all: a file that is there is taken for good."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    parquet.write_table(rows, unfinished)
    unfinished.replace(path)


def _read(data: DataConfig, split: str) -> pa.Table:
    """All columns as a training reads them: with types of Arrow's choice, ids would be others."""
    files = find_raw_files(data, split)
    tables = [
        pa.Table.from_batches([chunk.batch])
        for path in files.paths
        for chunk in read_chunks(
            path,
            _columns(path, files.raw_format),
            files.raw_format,
            BadRows(files.on_bad_row),
            advance=lambda _: None,
            labelled=False,
        )
    ]
    return pa.concat_tables(tables, promote_options="default")


def _columns(path: Path, raw_format: RawFormat) -> Sequence[str]:
    with named_errors(path, raw_format) as kind:
        if kind == "parquet":
            return list(parquet.read_schema(path).names)
        return read_header(path, raw_format).names
