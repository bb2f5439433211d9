"""CSV, TSV and Parquet files: encoded once into the cache, then read from there."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from torchrec_hilomoe.data.bad_rows import BadRows
from torchrec_hilomoe.data.cache import build_once, content_digest, key_of
from torchrec_hilomoe.data.config import DataConfig, SchemaConfig
from torchrec_hilomoe.data.encoder import FORMAT_VERSION, TabularEncoder, fit_encoder
from torchrec_hilomoe.data.files import RawFormat, plain_suffix, resolve_files
from torchrec_hilomoe.data.gaps import Gaps
from torchrec_hilomoe.data.parse import ParsedRows, parse_rows
from torchrec_hilomoe.data.readers import read_chunks
from torchrec_hilomoe.data.rows import Int64Array
from torchrec_hilomoe.data.store import ArrowStore, to_record_batch, write_store
from torchrec_hilomoe.data.unknown import UnknownValues
from torchrec_hilomoe.errors import DataError

logger = logging.getLogger(__name__)

_ROWS_FILE = "rows.arrow"
_REPORT_FILE = "report.json"
_GAPS_FILE = "gaps.npy"


@dataclass(frozen=True)
class RawFiles:
    """The raw files of one split.

    Args:
        split (str): ``"train"``, ``"valid"`` or ``"test"``, for messages.
        paths (Sequence[Path]): the files, in order.
        raw_format (RawFormat): how they are written.
        on_bad_row (str): ``"raise"`` or ``"skip"``.
        labelled (bool): whether they have a column of labels.
    """

    split: str
    paths: Sequence[Path]
    raw_format: RawFormat
    on_bad_row: str
    labelled: bool = True

    def parsed(
        self, schema: SchemaConfig, bad_rows: BadRows, task: str, progress: bool
    ) -> Iterator[ParsedRows]:
        """Streams the usable rows of all files.

        Args:
            schema (SchemaConfig): the columns.
            bad_rows (BadRows): told of the other rows.
            task (str): what the progress bar says.
            progress (bool): whether there is one, by bytes read.

        Yields:
            ParsedRows: in the order of files and rows; their positions are over all files.
        """
        columns = schema.columns
        if not self.labelled:  # groups serve a metric alone
            schema = dataclasses.replace(schema, group=None)
            columns = [name for name in schema.columns if name != schema.label]
        size = sum(path.stat().st_size for path in self.paths)
        bar = tqdm(
            total=size, desc=f"{task} {self.split}", unit="B", unit_scale=True, disable=not progress
        )
        kept = 0
        with bar:
            for path in self.paths:
                before = kept + bad_rows.counts.total()
                for chunk in read_chunks(
                    path, columns, self.raw_format, bad_rows, bar.update, self.labelled
                ):
                    rows = parse_rows(chunk, schema, bad_rows)
                    kept += len(rows.labels)
                    yield dataclasses.replace(rows, positions=rows.positions + before)

    def names(self) -> str:
        """The files as a message shows them."""
        shown = ", ".join(str(path) for path in self.paths[:3])
        return shown if len(self.paths) <= 3 else f"{shown} and {len(self.paths) - 3} more"

    def key(self, root: Path) -> str:
        """Identifies the rows these files hold, by content."""
        suffixes = [plain_suffix(path) for path in self.paths]
        content = content_digest(self.paths, root)
        return key_of(content, suffixes, dataclasses.asdict(self.raw_format), self.on_bad_row)


@dataclass(frozen=True)
class EncodedSplit:
    """An encoded split in the cache.

    Args:
        store (ArrowStore): its rows.
        skipped (dict[str, int]): rows left out, by reason.
        gaps (Int64Array): the 0-based data rows, over all files, that were left out before the last
            one that is there; ascending.
        key (str): identifies encoder and rows by content.
    """

    store: ArrowStore
    skipped: dict[str, int]
    gaps: Int64Array
    key: str


def find_raw_files(config: DataConfig, split: str) -> RawFiles:
    """Finds the files of a split that the configuration names.

    Raises:
        ConfigError: a file is named twice.
        DataError: a path names nothing.
    """
    raw_format = RawFormat(
        format=config.format,
        delimiter=config.delimiter,
        column_names=tuple(config.column_names) if config.column_names else None,
        quote_char=config.quote_char,
    )
    paths = resolve_files(config.paths(split), f"data.{split}")
    return RawFiles(split, paths, raw_format, config.on_bad_row)


def fit_cached(
    schema: SchemaConfig,
    train: RawFiles,
    root: Path,
    progress: bool = False,
    former: TabularEncoder | None = None,
) -> TabularEncoder:
    """Learns the encoder from the training rows, or takes it from the cache.

    Args:
        schema (SchemaConfig): the columns.
        train (RawFiles): the training rows.
        root (Path): the cache.
        progress (bool): whether to show a progress bar.
        former (TabularEncoder | None): of earlier rows, to be extended.

    Returns:
        TabularEncoder: vocabularies and statistics of ``train``, and of ``former``.
    """

    def build(folder: Path) -> None:
        rows = train.parsed(schema, BadRows(train.on_bad_row), "Learning vocabularies of", progress)
        fit_encoder(schema, train.raw_format, rows, former).save(folder)

    content = [train.key(root), *([former.digest()] if former else [])]
    key = key_of(FORMAT_VERSION, dataclasses.asdict(schema), *content)
    return TabularEncoder.load(build_once(root / "encoders" / key, build))


def encode_cached(
    encoder: TabularEncoder, files: RawFiles, root: Path, progress: bool = False
) -> EncodedSplit:
    """Encodes the rows of a split, or takes them from the cache.

    Args:
        encoder (TabularEncoder): how to encode.
        files (RawFiles): the rows.
        root (Path): the cache.
        progress (bool): whether to show a progress bar.

    Returns:
        EncodedSplit: the encoded rows and how many were left out.

    Raises:
        DataError: the files cannot be read or hold no usable row.
    """

    def build(folder: Path) -> None:
        bad_rows = BadRows(files.on_bad_row)
        parsed = files.parsed(encoder.schema, bad_rows, "Encoding", progress)
        bags = [column.name for column in encoder.schema.multi_valued]
        gaps, unknown = Gaps(), UnknownValues(encoder)

        def batches() -> Iterator[pa.RecordBatch]:
            for rows in gaps.noted(parsed):
                encoded = encoder.encode(rows)
                unknown.add(rows, encoded)
                yield to_record_batch(encoded, bags)

        rows = write_store(folder / _ROWS_FILE, batches())
        skipped = dict(bad_rows.counts)
        if not rows:
            reasons = f" ({_listed(skipped)})" if skipped else ""
            raise DataError(f"data.{files.split}: no usable row in {files.names()}{reasons}")
        if skipped:
            logger.warning("data.%s: rows left out: %s", files.split, _listed(skipped))
        if files.split != "train" and (report := unknown.report()):
            logger.warning(
                "data.%s: nearly all values of %s are unknown to the model; are they written as in "
                "the training data? %s",
                files.split,
                files.names(),
                report,
            )
        (folder / _REPORT_FILE).write_text(json.dumps(skipped))
        np.save(folder / _GAPS_FILE, gaps.positions)

    # Rows without labels must not pass for those of a split that needs them.
    key = key_of(_GAPS_FILE, encoder.digest(), files.key(root), files.labelled)
    folder = build_once(root / "rows" / key, build)
    skipped = json.loads((folder / _REPORT_FILE).read_text())
    gaps = np.load(folder / _GAPS_FILE)
    return EncodedSplit(ArrowStore(folder / _ROWS_FILE), skipped, gaps, key)


def _listed(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count} because {reason}" for reason, count in skipped.items())
