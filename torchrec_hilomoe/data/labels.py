"""Files without labels, which can be scored all the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from torchrec_hilomoe.data.files import RawFormat
from torchrec_hilomoe.data.lines import read_header
from torchrec_hilomoe.data.readers import named_errors
from torchrec_hilomoe.data.tabular import RawFiles
from torchrec_hilomoe.errors import DataError


def labels_optional(files: RawFiles, label: str, labels: bool | None) -> RawFiles:
    """The files as they are read: without labels where they have none.

    Args:
        files (RawFiles): of one split.
        label (str): the column of the label.
        labels (bool | None): whether the files have it; None looks at their headers, and takes
            files without a header to have it: a row that is short does not say of what.

    Returns:
        RawFiles: ``files`` themselves if they have labels.

    Raises:
        DataError: a file cannot be read, or some have labels and others have none.
    """
    if labels is None:
        without = [path for path in files.paths if not _has_label(path, label, files.raw_format)]
    else:
        without = [] if labels else list(files.paths)
    if not without:
        return files
    if len(without) < len(files.paths):
        labelled = next(path for path in files.paths if path not in without)
        raise DataError(
            f"{without[0]}: no column {label!r}, the label, which {labelled} has; score files with "
            "labels and those without apart"
        )
    names = files.raw_format.column_names
    if names:
        names = tuple(name for name in names if name != label)
    return replace(files, raw_format=replace(files.raw_format, column_names=names), labelled=False)


def _has_label(path: Path, label: str, raw_format: RawFormat) -> bool:
    with named_errors(path, raw_format) as kind:
        if kind == "parquet":
            return label in pq.read_schema(path).names
        return label in read_header(path, raw_format).names
