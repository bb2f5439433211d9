"""A data set ready for training: its features, loaders, report and everything to save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa

from torchrec_hilomoe.data.features import FeatureSpec
from torchrec_hilomoe.data.gaps import positions_beside
from torchrec_hilomoe.data.loader import BatchLoader, LoaderOptions
from torchrec_hilomoe.data.rows import Int64Array, RowStore
from torchrec_hilomoe.errors import ConfigError


class Encoder(Protocol):
    """What a data set knows about encoding; it is saved with the model.

    Attributes:
        kind (str): by which it is found again when it is loaded.
    """

    kind: ClassVar[str]

    @property
    def features(self) -> FeatureSpec:
        """The features of the encoded rows."""

    def vocabulary(self, feature: str) -> pa.LargeStringArray | None:
        """What the rows of a feature's table stand for, from row 1 on; None for hashed ids."""

    def save(self, folder: Path) -> None:
        """Writes everything that encoding raw files takes into ``folder``."""

    def digest(self) -> str:
        """Identifies what this encoder makes of rows."""


@dataclass(frozen=True)
class PreparedData:
    """Encoded splits, before they are dealt out to ranks.

    Args:
        encoder (Encoder): how they were encoded.
        stores (Mapping[str, RowStore]): by split.
        skipped (Mapping[str, Mapping[str, int]]): rows left out, by split and reason.
        bayes_auc (Mapping[str, float]): the best possible AUC, by split, where it is known.
        cache (Path): the folder of encoded and generated data.
        gaps (Mapping[str, Int64Array]): the data rows that were left out, by split, over all files;
            none of a split that is not named.
        keys (Mapping[str, str]): identify the encoded rows by content, by split; none of a split
            that is not encoded here.
    """

    encoder: Encoder
    stores: Mapping[str, RowStore]
    skipped: Mapping[str, Mapping[str, int]]
    bayes_auc: Mapping[str, float]
    cache: Path
    gaps: Mapping[str, Int64Array] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)


class DataSource:
    """The splits of a data set as batches for one rank.

    Args:
        prepared (PreparedData): the encoded splits.
        train (LoaderOptions): for ``"train"``; its seed is extended by the epoch.
        evaluation (LoaderOptions): for the other splits.

    Raises:
        ConfigError: a split cannot fill a single batch on every rank.
    """

    def __init__(
        self, prepared: PreparedData, train: LoaderOptions, evaluation: LoaderOptions
    ) -> None:
        self._prepared = prepared
        self._train = train
        self._evaluation = evaluation
        for split, store in prepared.stores.items():
            if not len(self.loader(split)):
                raise ConfigError(
                    f"data.batch_size: the {store.num_rows} rows of data.{split} cannot fill one "
                    f"batch on {train.shard.world_size} ranks, two rows each; start fewer ranks "
                    "or give more data"
                )

    @property
    def features(self) -> FeatureSpec:
        """The features of the batches."""
        return self.encoder.features

    @property
    def encoder(self) -> Encoder:
        """How rows were encoded."""
        return self._prepared.encoder

    @property
    def report(self) -> dict[str, Any]:
        """Rows and skipped rows by split, training rows dropped per epoch, and the cache."""
        return {
            "rows": {split: store.num_rows for split, store in self._prepared.stores.items()},
            "skipped": {split: dict(counts) for split, counts in self._prepared.skipped.items()},
            "dropped_per_epoch": self.loader("train").dropped_rows
            if self.has_split("train")
            else 0,
            "cache": str(self._prepared.cache),
        }

    @property
    def identity(self) -> dict[str, Any]:
        """Tells these data from others by content: vocabularies, rows, keys of encoded splits."""
        return {
            "vocabularies": self.encoder.digest(),
            "rows": self.report["rows"],
            "content": dict(self._prepared.keys),
        }

    def has_split(self, split: str) -> bool:
        """Whether there is data for ``"train"``, ``"valid"`` or ``"test"``."""
        return split in self._prepared.stores

    def has_labels(self, split: str) -> bool:
        """Whether the rows of a split have labels; all have them, or all are NaN."""
        return not np.isnan(self._prepared.stores[split].chunk(0).labels[0])

    def positions(self, split: str) -> Int64Array:
        """Which rows of the raw files the rows of a split are.

        Args:
            split (str): ``"train"``, ``"valid"`` or ``"test"``.

        Returns:
            Int64Array: 0-based, over the files in their order; rows that were left out count,
            header and blank lines do not.
        """
        gaps = self._prepared.gaps.get(split, np.empty(0, np.int64))
        return positions_beside(gaps, self._prepared.stores[split].num_rows)

    def loader(self, split: str, *, epoch: int = 0, start: int = 0) -> BatchLoader:
        """The batches of this rank.

        Args:
            split (str): ``"train"``, ``"valid"`` or ``"test"``. Only ``"train"`` is shuffled and
                cut to equal parts; the others are complete, in file order, and padded.
            epoch (int): decides the order of ``"train"``, with the seed.
            start (int): number of the first batch, for going on within an epoch.

        Returns:
            BatchLoader: as many batches on every rank.

        Raises:
            ConfigError: the split was not given.
        """
        if not self.has_split(split):
            raise ConfigError(f"data.{split}: required, but not given")
        options = replace(self._train if split == "train" else self._evaluation, start=start)
        if options.shuffle_seed is not None:
            options = replace(options, shuffle_seed=(*options.shuffle_seed, epoch))
        return BatchLoader(self._prepared.stores[split], self.features, options)

    def save(self, folder: Path) -> None:
        """Saves schema, vocabularies and statistics, all that encoding raw files later takes.

        Args:
            folder (Path): made if need be; see :func:`~torchrec_hilomoe.data.load_encoder`.
        """
        self.encoder.save(folder)

    def bayes_auc(self, split: str) -> float | None:
        """The AUC of the best possible model on a split; None where it is not known."""
        return self._prepared.bayes_auc.get(split)
