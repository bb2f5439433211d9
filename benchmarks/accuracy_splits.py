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
from torchrec_hilomoe.data.tabular import RawFiles, find_raw_files


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


def carved(data: DataConfig, folder: Path, name: str) -> list[Path]:
    """Cuts the valid split by chance, but always alike, into equal parts; rows keep their order.

    Args:
        data (DataConfig): with a valid split.
        folder (Path): of the parts. Those of the same rows are not written again.
        name (str): what the names of the parts begin with.

    Returns:
        list[Path]: Parquet files of valid and test.
    """
    files = find_raw_files(data, "valid")
    halves = [_part(files, folder, f"{name}-{half}") for half in ("valid", "test")]
    if not all(half.exists() for half in halves):
        rows = _read(files)
        order = np.random.default_rng(0).permutation(rows.num_rows)
        for half, chosen in zip(halves, np.array_split(order, len(halves)), strict=True):
            _write(rows.take(np.sort(chosen)), half)
    return halves


def sampled(data: DataConfig, folder: Path, name: str, num_rows: int) -> Path:
    """So many training rows by chance, but always the same, in their order.

    Args:
        data (DataConfig): with a train split.
        folder (Path): of the sample. One of the same rows is not written again.
        name (str): what the name of the sample begins with.
        num_rows (int): rows of the sample; all rows if there are no more.

    Returns:
        Path: a Parquet file.
    """
    files = find_raw_files(data, "train")
    part = _part(files, folder, f"{name}-train-{num_rows}")
    if not part.exists():
        rows = _read(files)
        chosen = np.random.default_rng(0).permutation(rows.num_rows)[:num_rows]
        _write(rows.take(np.sort(chosen)), part)
    return part


def _part(files: RawFiles, folder: Path, name: str) -> Path:
    """Files that change have other parts."""
    return folder / f"{name}-{files.key(folder)[:12]}.parquet"


def _write(rows: pa.Table, path: Path) -> None:
    """Whole or not at all: a file that is there is taken for good."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    parquet.write_table(rows, unfinished)
    unfinished.replace(path)


def _read(files: RawFiles) -> pa.Table:
    """All columns as a training reads them: with types of Arrow's choice, ids would be others."""
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
