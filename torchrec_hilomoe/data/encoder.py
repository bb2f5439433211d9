"""The map from parsed rows to numbers: learned from the training rows, saved with the model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from torchrec_hilomoe.config import parse_config
from torchrec_hilomoe.data.config import CategoricalColumn, MultiValuedColumn, SchemaConfig
from torchrec_hilomoe.data.dense import Moments, transform
from torchrec_hilomoe.data.features import FeatureSpec, SparseFeature
from torchrec_hilomoe.data.files import RawFormat
from torchrec_hilomoe.data.hashing import fnv1a, hash_to_rows
from torchrec_hilomoe.data.parse import ParsedRows
from torchrec_hilomoe.data.rows import EncodedRows, IdBags, Int32Array
from torchrec_hilomoe.data.vocabulary import ValueCounts, VocabularyIndex, extended

#: Raised with every change of what encoded files hold, so that old caches are left alone.
FORMAT_VERSION = 3

SETTINGS_FILE = "encoder.json"
_VOCABULARY_FILE = "vocabularies.parquet"


class TabularEncoder:
    """Encodes rows of a tabular data set by the vocabularies and statistics of its train split.

    Args:
        schema (SchemaConfig): the columns.
        raw_format (RawFormat): how the raw files are written.
        vocabularies (dict[str, pa.LargeStringArray]): ids of the columns that are not hashed;
            position i is table row i + 1.
        moments (dict[str, Moments]): of the standardised columns.
    """

    kind: ClassVar[str] = "tabular"

    def __init__(
        self,
        schema: SchemaConfig,
        raw_format: RawFormat,
        vocabularies: dict[str, pa.LargeStringArray],
        moments: dict[str, Moments],
    ) -> None:
        self.schema = schema
        self.raw_format = raw_format
        self.vocabularies = vocabularies
        self.moments = moments
        self._indexes = {name: VocabularyIndex(ids) for name, ids in vocabularies.items()}

    @property
    def features(self) -> FeatureSpec:
        """The features of the encoded rows: categorical columns first, then multi-valued ones."""
        return FeatureSpec(
            dense=tuple(column.name for column in self.schema.dense),
            sparse=tuple(self._feature(column) for column in self.schema.sparse),
        )

    def vocabulary(self, feature: str) -> pa.LargeStringArray | None:
        """What the rows of a feature's table stand for, from row 1 on; None for hashed ids."""
        return self.vocabularies.get(feature)

    def _feature(self, column: CategoricalColumn) -> SparseFeature:
        size = column.hash_size or len(self.vocabularies[column.name])
        # One id has the same mean and sum; tables that are summed can be sharded by rows, too.
        pooling = column.pooling if isinstance(column, MultiValuedColumn) else "sum"
        return SparseFeature(column.name, size + 1, pooling)

    def encode(self, rows: ParsedRows) -> EncodedRows:
        """Encodes parsed rows, in order."""
        schema, n = self.schema, len(rows.labels)
        dense = [
            transform(values, column, self.moments.get(column.name))
            for column, values in zip(schema.dense, rows.dense, strict=True)
        ]
        ids = [
            self._encode_texts(column, texts)
            for column, texts in zip(schema.categorical, rows.categorical, strict=True)
        ]
        return EncodedRows(
            labels=rows.labels,
            dense=np.stack(dense, axis=1) if dense else np.empty((n, 0), np.float32),
            ids=np.stack(ids, axis=1) if ids else np.empty((n, 0), np.int32),
            bags=tuple(
                IdBags.of_lengths(bags.lengths, self._encode_texts(column, bags.values))
                for column, bags in zip(schema.multi_valued, rows.multi_valued, strict=True)
            ),
            group=None if rows.group is None else fnv1a(rows.group).view(np.int64),
        )

    def _encode_texts(self, column: CategoricalColumn, texts: pa.LargeStringArray) -> Int32Array:
        if column.hash_size is not None:
            return hash_to_rows(texts, column.hash_size)
        return self._indexes[column.name].look_up(texts)

    def save(self, folder: Path) -> None:
        """Writes everything that encoding raw files takes into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SETTINGS_FILE).write_text(json.dumps(self._settings(), indent=2))
        names = np.repeat(
            list(self.vocabularies) or [""], [len(v) for v in self.vocabularies.values()] or [0]
        )
        values = [*self.vocabularies.values(), pa.array([], pa.large_string())]
        table = pa.table(
            {"column": pa.array(names, pa.large_string()), "value": pa.chunked_array(values)}
        )
        pq.write_table(table, folder / _VOCABULARY_FILE, use_dictionary=["column"])

    @classmethod
    def load(cls, folder: Path) -> TabularEncoder:
        """Reads what :meth:`save` wrote."""
        settings = json.loads((folder / SETTINGS_FILE).read_text())
        schema = parse_config(SchemaConfig, settings["schema"], "data.schema")
        table = pq.read_table(folder / _VOCABULARY_FILE)
        vocabularies = {
            column.name: table.filter(pc.equal(table["column"], column.name))["value"]
            .cast(pa.large_string())
            .combine_chunks()
            for column in schema.sparse
            if column.hash_size is None
        }
        names = settings["raw_format"].pop("column_names")
        raw_format = RawFormat(**settings["raw_format"], column_names=names and tuple(names))
        moments = {name: Moments(**values) for name, values in settings["moments"].items()}
        return cls(schema, raw_format, vocabularies, moments)

    def digest(self) -> str:
        """Identifies what this encoder makes of rows."""
        settings = self._settings()
        del settings["raw_format"]
        state = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
        for name, vocabulary in self.vocabularies.items():
            # Without its length a vocabulary could end where the next one begins.
            state.update(json.dumps([name, len(vocabulary)]).encode())
            state.update(fnv1a(vocabulary).tobytes())
        return state.hexdigest()

    def _settings(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "format_version": FORMAT_VERSION,
            "schema": dataclasses.asdict(self.schema),
            "raw_format": dataclasses.asdict(self.raw_format),
            "moments": {name: dataclasses.asdict(m) for name, m in self.moments.items()},
        }


def fit_encoder(
    schema: SchemaConfig,
    raw_format: RawFormat,
    chunks: Iterable[ParsedRows],
    former: TabularEncoder | None = None,
) -> TabularEncoder:
    """Learns vocabularies and statistics from one pass over the training rows.

    Args:
        schema (SchemaConfig): the columns.
        raw_format (RawFormat): how the raw files are written.
        chunks (Iterable[ParsedRows]): the training rows; not read if there is nothing to learn.
        former (TabularEncoder | None): of earlier rows. Its values keep their rows, and those that
            it does not know come behind them if there are ``min_count`` of them in the chunks;
            statistics that it has stay as they are.

    Returns:
        TabularEncoder: the same for the same rows in any chunks.
    """
    counted = {column.name: ValueCounts() for column in schema.sparse if column.hash_size is None}
    moments = {
        column.name: Moments() for column in schema.dense if column.transform == "standardize"
    }
    for rows in chunks if counted or moments else ():
        texts = [*rows.categorical, *(bags.values for bags in rows.multi_valued)]
        for column, values in zip(schema.sparse, texts, strict=True):
            if column.name in counted:
                counted[column.name].add(values)
        for dense, numbers in zip(schema.dense, rows.dense, strict=True):
            if dense.name in moments:
                moments[dense.name].add(numbers)
    min_counts = {column.name: column.min_count for column in schema.sparse}
    vocabularies = {name: c.vocabulary(min_counts[name]) for name, c in counted.items()}
    if former is not None:
        for name in vocabularies.keys() & former.vocabularies.keys():
            vocabularies[name] = extended(former.vocabularies[name], vocabularies[name])
        known = {name: moment for name, moment in former.moments.items() if moment.count}
        moments |= {name: known[name] for name in moments.keys() & known.keys()}
    return TabularEncoder(schema, raw_format, vocabularies, moments)
