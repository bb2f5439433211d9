"""From a configuration, or from what is saved beside a model, to a data source."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from torchrec_hilomoe.data.cache import cache_root
from torchrec_hilomoe.data.config import SPLITS, DataConfig
from torchrec_hilomoe.data.criteo import CriteoEncoder, CriteoStore, dense_files, open_criteo
from torchrec_hilomoe.data.encoder import FORMAT_VERSION, SETTINGS_FILE, TabularEncoder
from torchrec_hilomoe.data.files import resolve_files
from torchrec_hilomoe.data.labels import labels_optional
from torchrec_hilomoe.data.loader import LoaderOptions
from torchrec_hilomoe.data.movielens import movielens_files
from torchrec_hilomoe.data.order import Shard
from torchrec_hilomoe.data.source import DataSource, Encoder, PreparedData
from torchrec_hilomoe.data.synthetic import bayes_auc, synthetic_files
from torchrec_hilomoe.data.tabular import (
    EncodedSplit,
    RawFiles,
    encode_cached,
    find_raw_files,
    fit_cached,
)
from torchrec_hilomoe.errors import ConfigError, DataError


def open_data(
    config: DataConfig, *, rank: int, world_size: int, seed: int, progress: bool = False
) -> DataSource:
    r"""Encodes a data set unless the cache has it, and opens it for one rank.

    Args:
        config (DataConfig): the data set.
        rank (int): this rank.
        world_size (int): number of ranks.
        seed (int): decides the order of training rows, with the epoch; encoding does not
            depend on it.
        progress (bool): whether to show a progress bar. Of several ranks only the one that
            encodes shows it.

    Returns:
        DataSource: the same data on every rank, dealt out.

    Raises:
        ConfigError: the configuration does not fit itself, the data or the number of ranks.
        DataError: a file cannot be used.

    Example:
        >>> import tempfile
        >>> from torchrec_hilomoe.config import parse_config
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "clicks.csv").write_text("clicked,user,price\n1,ann,3.5\n0,bob,2\n")
        >>> config = parse_config(
        ...     DataConfig,
        ...     {
        ...         "train": str(folder / "clicks.csv"),
        ...         "schema": {"label": "clicked", "dense": ["price"], "categorical": ["user"]},
        ...         "batch_size": 2,
        ...         "shuffle": False,
        ...         "cache_dir": str(folder / "cache"),
        ...     },
        ... )
        >>> source = open_data(config, rank=0, world_size=1, seed=0)
        >>> batch = next(iter(source.loader("train")))
        >>> batch.labels, batch.sparse_features["user"].values()
        (tensor([1., 0.]), tensor([1, 2]))
    """
    shard = _shard(config.batch_size, rank, world_size)
    prepared = _prepare(config, progress)
    train = LoaderOptions(
        shard,
        train=True,
        shuffle_seed=(seed,) if config.shuffle else None,
        window_rows=config.shuffle_buffer,
        num_workers=config.num_workers,
    )
    return DataSource(prepared, train, LoaderOptions(shard, num_workers=config.num_workers))


def prepare_data(config: DataConfig, *, progress: bool = False) -> None:
    """Does the part of :func:`open_data` that takes long: encodes what the cache lacks.

    Several processes may call it at once: one works, the others wait for it.

    Args:
        config (DataConfig): the data set.
        progress (bool): whether to show a progress bar.
    """
    _prepare(config, progress)


def open_encoded(
    folder: Path,
    files: str | list[str],
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    on_bad_row: str = "raise",
    labels: bool | None = None,
    cache_dir: str | None = None,
    progress: bool = False,
) -> DataSource:
    """Opens raw files by what was saved with a model; the training data are not needed.

    Args:
        folder (Path): what :meth:`DataSource.save` wrote.
        files (str | list[str]): file, folder or glob, or several, in the format of the training
            data.
        batch_size (int): rows of a batch over all ranks.
        rank (int): this rank.
        world_size (int): number of ranks.
        on_bad_row (str): ``"raise"`` or ``"skip"``.
        labels (bool | None): whether the files have the column of the label; None looks at their
            headers, and takes files without a header to have it. Labels are NaN without it.
        cache_dir (str | None): where encoded data live.
        progress (bool): whether to show a progress bar.

    Returns:
        DataSource: with the one split ``"test"``.

    Raises:
        ConfigError: the batch cannot be dealt out to the ranks, a file is named twice, or
            ``on_bad_row`` is neither of the two.
        DataError: a file cannot be used.
    """
    if on_bad_row not in ("raise", "skip"):
        raise ConfigError(f"data.on_bad_row: expected raise or skip, got {on_bad_row!r}")
    shard = _shard(batch_size, rank, world_size)
    encoder = load_encoder(folder)
    root = cache_root(cache_dir)
    paths = [files] if isinstance(files, str) else files
    if isinstance(encoder, CriteoEncoder):
        store = CriteoStore(dense_files(paths, "test"), encoder.hash_sizes)
        prepared = PreparedData(encoder, {"test": store}, {}, {}, root)
    else:
        found = resolve_files(paths, "data.test")
        raw = labels_optional(
            RawFiles("test", found, encoder.raw_format, on_bad_row), encoder.schema.label, labels
        )
        prepared = _prepared(encoder, {"test": encode_cached(encoder, raw, root, progress)}, root)
    options = LoaderOptions(shard)
    return DataSource(prepared, options, options)


def _prepare(config: DataConfig, progress: bool) -> PreparedData:
    root = cache_root(config.cache_dir)
    if config.source == "criteo_1tb":
        _require_train(config)
        if config.vocabularies_from is not None:
            raise ConfigError(
                "data.vocabularies_from: the ids of data.source=criteo_1tb are taken modulo, there "
                "are no vocabularies; leave it out"
            )
        encoder, stores = open_criteo(config)
        return PreparedData(encoder, stores, {}, {}, root)
    if config.source == "synthetic":
        _forbid_paths(config, SPLITS)
        folder = synthetic_files(config.synthetic, root)
        return replace(
            _prepare_tabular(_of_folder(config, folder), root, progress),
            bayes_auc=bayes_auc(folder),
        )
    if config.source == "movielens100k":
        _forbid_paths(config, ("valid", "test"))
        archives = resolve_files(config.paths("train"), "data.train")
        folder = movielens_files(archives[0] if archives else None, root)
        return _prepare_tabular(_of_folder(config, folder), root, progress)
    _require_train(config)
    return _prepare_tabular(config, root, progress)


def _prepare_tabular(config: DataConfig, root: Path, progress: bool) -> PreparedData:
    if not config.schema.sparse:
        raise ConfigError(
            "data.schema: names no categorical and no multi_valued column; a model needs at least "
            "one"
        )
    raw = {split: find_raw_files(config, split) for split in SPLITS if config.paths(split)}
    encoder = fit_cached(config.schema, raw["train"], root, progress, _former_encoder(config))
    encoded = {split: encode_cached(encoder, files, root, progress) for split, files in raw.items()}
    return _prepared(encoder, encoded, root)


def _former_encoder(config: DataConfig) -> TabularEncoder | None:
    if config.vocabularies_from is None:
        return None
    key = f"data.vocabularies_from={config.vocabularies_from}"
    try:
        encoder = load_encoder(Path(config.vocabularies_from).expanduser())
    except DataError as error:
        raise DataError(
            f"{key}: name the folder encoder of a checkpoint; {error} (A run that is resumed may "
            "take its own, OUTPUT_DIR/checkpoints/last/encoder.)"
        ) from None
    if not isinstance(encoder, TabularEncoder):
        raise ConfigError(f"{key}: data of {encoder.kind} have no vocabularies; leave it out")
    here, there = (
        {column.name for column in schema.sparse if column.hash_size is None}
        for schema in (config.schema, encoder.schema)
    )
    names = {column.name for column in encoder.schema.sparse}
    if strange := sorted(names & {c.name for c in config.schema.sparse} & (here ^ there)):
        raise ConfigError(
            f"{key}: {', '.join(strange)}: hashed there and not here, or here and not there; "
            "give the same columns hash_size as there"
        )
    if not here & there:
        raise ConfigError(f"{key}: has no vocabulary of a column of data.schema; leave it out")
    return encoder


def _prepared(encoder: Encoder, encoded: Mapping[str, EncodedSplit], root: Path) -> PreparedData:
    return PreparedData(
        encoder,
        stores={split: part.store for split, part in encoded.items()},
        skipped={split: part.skipped for split, part in encoded.items()},
        bayes_auc={},
        cache=root,
        gaps={split: part.gaps for split, part in encoded.items()},
        keys={split: part.key for split, part in encoded.items()},
    )


def _of_folder(config: DataConfig, folder: Path) -> DataConfig:
    """The same data set, read from the Parquet files that were made in ``folder``."""
    train, valid, test = (str(folder / f"{split}.parquet") for split in SPLITS)
    return replace(config, train=train, valid=valid, test=test, format="parquet")


def load_encoder(folder: Path) -> TabularEncoder | CriteoEncoder:
    """Loads what :meth:`DataSource.save` wrote; its ``features`` are those of the model.

    Args:
        folder (Path): where it was saved.

    Returns:
        TabularEncoder | CriteoEncoder: by what was saved.

    Raises:
        DataError: the folder holds nothing that this version reads.
    """
    path = folder / SETTINGS_FILE
    try:
        settings = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read: {error}; was the model saved here?") from error
    if settings.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: has the format version {settings.get('format_version')}, this version of "
            f"torchrec-hilomoe reads {FORMAT_VERSION}; train again, or use the version that saved "
            "it"
        )
    kinds = {kind.kind: kind for kind in (TabularEncoder, CriteoEncoder)}
    try:
        return kinds[settings["kind"]].load(folder)
    except (OSError, KeyError, TypeError, ConfigError, pa.ArrowException) as error:
        raise DataError(f"{folder}: cannot be read: {error}; was the model saved here?") from error


def _shard(batch_size: int, rank: int, world_size: int) -> Shard:
    if batch_size % world_size:
        raise ConfigError(
            f"data.batch_size: {batch_size} rows cannot be dealt out evenly to {world_size} ranks; "
            f"choose a multiple of {world_size}"
        )
    return Shard(batch_size, rank, world_size)


def _require_train(config: DataConfig) -> None:
    if not config.paths("train"):
        raise ConfigError(
            f"data.train: required for data.source={config.source}, but not given; name a file, "
            "folder or glob"
        )


def _forbid_paths(config: DataConfig, splits: tuple[str, ...]) -> None:
    given = [f"data.{split}" for split in splits if config.paths(split)]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: data.source={config.source} makes its own files; leave it out, "
            "or describe yours with data=tabular"
        )
