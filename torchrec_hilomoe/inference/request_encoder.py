"""From raw rows to the inputs of a model, by what its checkpoint knows of the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from torchrec_hilomoe.data import TabularEncoder, load_encoder, to_batch
from torchrec_hilomoe.data.bad_rows import BadRows
from torchrec_hilomoe.data.files import RawFormat
from torchrec_hilomoe.data.parse import parse_rows
from torchrec_hilomoe.data.readers import RawChunk
from torchrec_hilomoe.errors import ConfigError, DataError
from torchrec_hilomoe.inference.flat_inputs import Request, flat_tensors
from torchrec_hilomoe.training.checkpoint import read_info

_SOURCE = Path("request")  # in the place of a file's path, in messages


class RequestEncoder:
    """Encodes rows as the training rows were: vocabularies, hashing, transforms, missing values.

    Reads the checkpoint's small files alone; `load_for_serving` verifies them with all others.

    Args:
        checkpoint (Path | str): such as ``OUTPUT_DIR/checkpoints/best``.

    Raises:
        ConfigError: there is no checkpoint, its description cannot be read, or its data were
            encoded before they were read.
        DataError: what it says of the data cannot be read.
    """

    def __init__(self, checkpoint: Path | str) -> None:
        checkpoint = Path(checkpoint)
        encoder = load_encoder(read_info(checkpoint).encoder)
        if not isinstance(encoder, TabularEncoder):
            raise ConfigError(
                f"checkpoint: {checkpoint} was trained on the ids of data=criteo_1tb, not on raw "
                "rows; give its model tensors, ids modulo the rows of their tables"
            )
        self._encoder = encoder
        self._schema = replace(encoder.schema, group=None)
        self._keys = [feature.name for feature in encoder.features.sparse]

    @property
    def columns(self) -> list[str]:
        """The columns of a row: those of the features."""
        return self._schema.columns[1:]

    def encode(self, rows: pa.RecordBatch | pa.Table) -> Request:
        """Encodes the rows of one request.

        Args:
            rows (pa.RecordBatch | pa.Table): B rows with the `columns`, null where a value is
                missing. Others, label and group among them, are not read.

        Returns:
            Request: for `FlatInputs`, on the CPU.

        Raises:
            DataError: a column is missing, is there twice or holds what cannot be used, there are
                no rows, or they are of another type.
        """
        if not isinstance(rows, pa.RecordBatch | pa.Table):
            raise DataError(
                f"{_SOURCE}: is a {type(rows).__name__}, no Arrow RecordBatch or Table; make one "
                "by pyarrow.RecordBatch.from_pylist (of dicts, a row each) or from_pandas"
            )
        wrong = [name for name in self.columns if rows.schema.names.count(name) != 1]
        if wrong:
            raise DataError(
                f"{_SOURCE}: missing or there twice: {', '.join(map(repr, wrong))}; the model "
                f"reads the columns {', '.join(map(repr, self.columns))}, null where a value is "
                "missing"
            )
        if not rows.num_rows:
            raise DataError(f"{_SOURCE}: has no rows, and a model takes at least one")
        columns = pa.record_batch({name: _whole(rows.column(name)) for name in self.columns})
        chunk = RawChunk(_SOURCE, columns, np.arange(rows.num_rows), RawFormat(format="parquet"))
        parsed = parse_rows(chunk, self._schema, _NoBadRows("raise"))
        return flat_tensors(to_batch(self._encoder.encode(parsed), self._keys))


def _whole(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


class _NoBadRows(BadRows):
    """Raises without advice for files: a request has an answer for each of its rows or none."""

    def reject(self, reason: str, count: int, describe_first: Callable[[], str]) -> None:
        raise DataError(f"{describe_first()}: {reason}")
