"""Columns of which a vocabulary knows nothing: as a rule they are written otherwise in its file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from torchrec_hilomoe.data.encoder import TabularEncoder
from torchrec_hilomoe.data.parse import ParsedRows
from torchrec_hilomoe.data.rows import EncodedRows, Int32Array

_FEWEST_VALUES = 100
_SHARE = 0.99


@dataclass
class _Counts:
    present: int = 0
    unknown: int = 0
    example: str | None = None

    def add(self, texts: pa.LargeStringArray, ids: Int32Array) -> None:
        present = len(texts) - texts.null_count
        unknown = present - np.count_nonzero(ids)
        self.present += present
        self.unknown += unknown
        if unknown and self.example is None:
            self.example = texts.filter(pa.array(ids == 0)).drop_null()[0].as_py()


class UnknownValues:
    """Counts the values of encoded rows that the vocabularies of an encoder lack.

    Args:
        encoder (TabularEncoder): what encodes the rows.
    """

    def __init__(self, encoder: TabularEncoder) -> None:
        self._encoder = encoder
        self._counts = {name: _Counts() for name in encoder.vocabularies}

    def add(self, rows: ParsedRows, encoded: EncodedRows) -> None:
        """Counts the values of some rows.

        Args:
            rows (ParsedRows): n rows.
            encoded (EncodedRows): what the encoder made of them.
        """
        texts = [*rows.categorical, *(bags.values for bags in rows.multi_valued)]
        ids = [*encoded.ids.T, *(bags.values for bags in encoded.bags)]
        for column, values, numbers in zip(self._encoder.schema.sparse, texts, ids, strict=True):
            if column.name in self._counts:
                self._counts[column.name].add(values, numbers)

    def report(self) -> str:
        """Says of which columns nearly all values are unknown; empty if there are none.

        Returns:
            str: the columns with their shares and examples.
        """
        return "; ".join(
            f"column {name!r}: {counts.unknown / counts.present:.1%} of {counts.present} values, "
            f"such as {counts.example!r} ({self._known(name)})"
            for name, counts in self._counts.items()
            if counts.present >= _FEWEST_VALUES and counts.unknown >= _SHARE * counts.present
        )

    def _known(self, name: str) -> str:
        first = self._encoder.vocabularies[name].slice(0, 1).to_pylist()
        return f"the vocabulary has {first[0]!r}" if first else "the vocabulary is empty"
