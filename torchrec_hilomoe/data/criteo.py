"""The npy binaries of TorchRec's Criteo 1TB preprocessing, through TorchRec's own reader."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torchrec.datasets.criteo import (
    CAT_FEATURE_COUNT,
    DEFAULT_CAT_NAMES,
    DEFAULT_INT_NAMES,
    INT_FEATURE_COUNT,
    InMemoryBinaryCriteoIterDataPipe,
)

from torchrec_hilomoe.data.cache import key_of
from torchrec_hilomoe.data.config import SPLITS, DataConfig
from torchrec_hilomoe.data.encoder import FORMAT_VERSION, SETTINGS_FILE
from torchrec_hilomoe.data.features import FeatureSpec, SparseFeature
from torchrec_hilomoe.data.files import resolve_files
from torchrec_hilomoe.data.rows import CHUNK_ROWS, EncodedRows
from torchrec_hilomoe.errors import ConfigError, DataError

_DENSE_SUFFIX = "_dense.npy"
_COLUMNS = {"dense": INT_FEATURE_COUNT, "sparse": CAT_FEATURE_COUNT, "labels": 1}


class CriteoEncoder:
    """What models must know of the binaries, whose encoding is done already.

    Args:
        hash_sizes (Sequence[int]): table rows of the 26 sparse features; ids are taken modulo.
    """

    kind: ClassVar[str] = "criteo_1tb"

    def __init__(self, hash_sizes: Sequence[int]) -> None:
        self.hash_sizes = list(hash_sizes)

    @property
    def features(self) -> FeatureSpec:
        """13 dense and 26 sparse features, named as TorchRec names them."""
        sparse = zip(DEFAULT_CAT_NAMES, self.hash_sizes, strict=True)
        return FeatureSpec(
            dense=tuple(DEFAULT_INT_NAMES),
            sparse=tuple(SparseFeature(name, size, "sum") for name, size in sparse),
        )

    def vocabulary(self, feature: str) -> None:
        """None: ids are taken modulo."""

    def save(self, folder: Path) -> None:
        """Writes the sizes into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SETTINGS_FILE).write_text(json.dumps(self._settings(), indent=2))

    def digest(self) -> str:
        """Identifies what this encoder makes of rows."""
        return key_of(self._settings())

    def _settings(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "format_version": FORMAT_VERSION,
            "hash_sizes": self.hash_sizes,
        }

    @classmethod
    def load(cls, folder: Path) -> CriteoEncoder:
        """Reads what :meth:`save` wrote."""
        return cls(json.loads((folder / SETTINGS_FILE).read_text())["hash_sizes"])


class CriteoStore:
    """Memory-mapped binaries of one split as a store of rows.

    Opening, halving of the last day and hash sizes are TorchRec's
    ``InMemoryBinaryCriteoIterDataPipe`` (``mmap_mode``), whose batches these rows make up when
    they are not shuffled. Copies of the store in other processes map the files anew.

    Args:
        dense_files (Sequence[Path]): the ``*_dense.npy`` files; each has its ``*_sparse.npy``
            and ``*_labels.npy`` beside it.
        hash_sizes (Sequence[int]): table rows of the sparse features.
        stage (str): TorchRec's: ``"train"`` reads whole files; ``"val"`` and ``"test"`` the first
            and the second half of the first file.

    Raises:
        ConfigError: TorchRec's reader cannot run because iopath is missing.
        DataError: a file is missing, unreadable or of the wrong shape.
    """

    def __init__(
        self, dense_files: Sequence[Path], hash_sizes: Sequence[int], stage: str = "train"
    ) -> None:
        if importlib.util.find_spec("iopath") is None:
            raise ConfigError(
                "data.source=criteo_1tb reads with torchrec.datasets, which needs iopath: "
                'pip install "torchrec-hilomoe[criteo]"'
            )
        paths = {kind: [_beside(dense, kind) for dense in dense_files] for kind in _COLUMNS}
        _check_files(paths)
        with _numpy_random_state_kept():
            reader = InMemoryBinaryCriteoIterDataPipe(
                stage=stage,
                dense_paths=[str(path) for path in paths["dense"]],
                sparse_paths=[str(path) for path in paths["sparse"]],
                labels_paths=[str(path) for path in paths["labels"]],
                batch_size=CHUNK_ROWS,
                rank=0,
                world_size=1,
                mmap_mode=True,
                hashes=list(hash_sizes),
            )
        self._arguments = (dense_files, hash_sizes, stage)
        self._reader = reader
        self._ends = np.cumsum(reader.num_rows_per_file)

    def __reduce__(self) -> tuple[Any, ...]:
        return CriteoStore, self._arguments  # numpy would pickle the rows of its memory maps

    @property
    def num_rows(self) -> int:
        """Rows of all files."""
        return int(self._ends[-1])

    def chunk(self, index: int) -> EncodedRows:
        """Copies ``CHUNK_ROWS`` rows (fewer at the end), across files where they meet."""
        reader, start = self._reader, index * CHUNK_ROWS
        stop = min(start + CHUNK_ROWS, self.num_rows)
        parts = []
        for file, end in enumerate(self._ends):
            begin = end - reader.num_rows_per_file[file]
            inside = slice(max(start - begin, 0), max(min(stop, end) - begin, 0))
            if inside.start < inside.stop:
                labels = reader.labels_arrs[file][inside, 0].astype(np.float32)
                _check_labels(labels, reader.labels_paths[file])
                parts.append(
                    EncodedRows(
                        labels,
                        np.asarray(reader.dense_arrs[file][inside], np.float32),
                        (reader.sparse_arrs[file][inside] % reader.hashes).astype(np.int32),
                        bags=(),
                        group=None,
                    )
                )
        return EncodedRows.concatenate(parts)


def open_criteo(config: DataConfig) -> tuple[CriteoEncoder, dict[str, CriteoStore]]:
    """Opens the splits that the configuration names.

    Where ``data.valid`` and ``data.test`` name the same file, in whatever spelling, they are its
    two halves, as in TorchRec's DLRM example.

    Raises:
        ConfigError: ``data.hash_sizes`` is not given, or several files are to be halved.
    """
    sizes = config.hash_sizes
    if sizes is None:
        raise ConfigError("data.hash_sizes: required for data.source=criteo_1tb, but not given")
    encoder = CriteoEncoder([sizes] * CAT_FEATURE_COUNT if isinstance(sizes, int) else sizes)
    splits = [split for split in SPLITS if config.paths(split)]
    files = {split: dense_files(config.paths(split), split) for split in splits}
    stages = dict.fromkeys(splits, "train")
    if {"valid", "test"} <= files.keys() and _same(files["valid"], files["test"]):
        if len(files["valid"]) > 1:
            raise ConfigError(
                "data.valid and data.test name the same files; only a single file can be halved"
            )
        stages |= {"valid": "val", "test": "test"}
    stores = {
        split: CriteoStore(files[split], encoder.hash_sizes, stages[split]) for split in splits
    }
    return encoder, stores


def dense_files(paths: Sequence[str], split: str) -> list[Path]:
    """The ``*_dense.npy`` files among what ``paths`` name.

    Args:
        paths (Sequence[str]): files, folders or globs.
        split (str): its configuration key is named in messages.

    Returns:
        list[Path]: one or more.

    Raises:
        DataError: there is none.
    """
    files = resolve_files(paths, f"data.{split}")
    found = [file for file in files if file.name.endswith(_DENSE_SUFFIX)]
    if not found:
        raise DataError(f"data.{split}: no *{_DENSE_SUFFIX} file among {', '.join(paths)}")
    return found


def _same(files: Sequence[Path], others: Sequence[Path]) -> bool:
    """Whether these are the same files, however their paths are spelled."""
    return [file.resolve() for file in files] == [file.resolve() for file in others]


def _beside(dense: Path, kind: str) -> Path:
    return dense.with_name(dense.name.removesuffix(_DENSE_SUFFIX) + f"_{kind}.npy")


def _check_files(paths: dict[str, list[Path]]) -> None:
    """Raises unless all files are there, whole and of matching shapes."""
    for triple in zip(*paths.values(), strict=True):
        shapes = [_shape(path) for path in triple]
        for path, shape, columns in zip(triple, shapes, _COLUMNS.values(), strict=True):
            if len(shape) != 2 or shape[1] != columns or shape[0] != shapes[0][0] or not shape[0]:
                expected = f"({shapes[0][0]}, {columns})"
                raise DataError(f"{path}: the array has the shape {shape}, expected {expected}")


def _check_labels(labels: npt.NDArray[np.float32], path: str) -> None:
    wrong = labels[(labels != 0) & (labels != 1)]
    if wrong.size:
        raise DataError(f"{path}: {wrong.size} labels are not 0 or 1, such as {wrong[0]}")


def _shape(path: Path) -> tuple[int, ...]:
    try:
        return np.load(path, mmap_mode="r").shape
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as npy: {error}") from error


@contextmanager
def _numpy_random_state_kept() -> Iterator[None]:
    """TorchRec's reader seeds NumPy's global generator; this undoes it."""
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)
