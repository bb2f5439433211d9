"""MovieLens-100K as GroupLens publishes it: downloaded, verified, converted to Parquet."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import torch

from torchrec_hilomoe.data.cache import build_once, key_of, named_read_errors
from torchrec_hilomoe.errors import DataError

URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
SHA256 = "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229"

#: Raised with every change of the conversion.
_VERSION = 1

_POSITIVE_RATING = 4
_SPLIT_SEED = 0
_SPLIT_ENDS = {"train": 0.8, "valid": 0.9, "test": 1.0}


def movielens_files(archive: Path | None, root: Path, sha256: str = SHA256) -> Path:
    """Gets and converts the archive unless that is done already.

    Args:
        archive (Path | None): the archive, if the user has it; otherwise it is downloaded into
            ``downloads`` in the cache, unless it lies there.
        root (Path): the cache.
        sha256 (str): what the archive must hash to.

    Returns:
        Path: a folder with ``train.parquet``, ``valid.parquet`` and ``test.parquet``: a random
        80/10/10 split of the ratings joined with user and movie; the label is rating >= 4.

    Raises:
        DataError: the archive cannot be downloaded, or is not the published one.
    """

    def build(folder: Path) -> None:
        chosen = archive or _download(root / "downloads" / "ml-100k.zip", sha256)
        _verify(chosen, sha256)
        _convert(chosen, folder)

    return build_once(root / "movielens100k" / key_of(_VERSION, sha256), build)


def _download(target: Path, sha256: str) -> Path:
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL, str(target), hash_prefix=sha256)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"MovieLens-100K could not be downloaded ({error}). Download {URL} by other means and "
            f"put it at {target}, or give its path as data.train"
        ) from error
    return target


def _verify(archive: Path, sha256: str) -> None:
    with named_read_errors(archive):
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise DataError(
            f"{archive}: not the published archive: its SHA-256 is {found}, expected {sha256}. "
            f"Remove it and download {URL} anew"
        )


def _convert(archive: Path, folder: Path) -> None:
    """Writes the splits with the columns of ``conf/data/movielens100k.yaml``."""
    with zipfile.ZipFile(archive) as members:
        ratings = _read(members, "u.data", "\t", ("user_id", "item_id", "rating", "timestamp"))
        users = _read(
            members, "u.user", "|", ("user_id", "age", "gender", "occupation", "zip_code")
        )
        genres = tuple(_read(members, "u.genre", "|", ("genre", "number"))["genre"].to_pylist())
        titles = ("item_id", "title", "release_date", "video_release_date", "url")
        movies = _read(members, "u.item", "|", (*titles, *genres))
    order = np.random.default_rng(_SPLIT_SEED).permutation(ratings.num_rows)
    ratings = ratings.append_column("place", pa.array(np.argsort(order)))
    rows = ratings.join(users, "user_id").join(_movie_columns(movies, genres), "item_id")
    rows = rows.sort_by("place").drop_columns(["place"])
    label = pc.greater_equal(rows["rating"], _POSITIVE_RATING).cast(pa.int8())
    rows = rows.drop_columns(["rating"]).add_column(0, "label", label)
    begin = 0
    for split, share in _SPLIT_ENDS.items():
        end = round(share * rows.num_rows)
        pq.write_table(rows.slice(begin, end - begin), folder / f"{split}.parquet")
        begin = end


def _read(members: zipfile.ZipFile, name: str, delimiter: str, columns: Sequence[str]) -> pa.Table:
    return pa_csv.read_csv(
        io.BytesIO(members.read(f"ml-100k/{name}")),
        pa_csv.ReadOptions(column_names=list(columns), encoding="latin-1"),
        pa_csv.ParseOptions(delimiter=delimiter, quote_char=False),
        pa_csv.ConvertOptions(column_types={"zip_code": pa.string(), "release_date": pa.string()}),
    )


def _movie_columns(movies: pa.Table, genres: Sequence[str]) -> pa.Table:
    """Item id, year of release and the names of the genres, joined by ``|``."""
    flags = np.stack([movies[genre].to_numpy() for genre in genres], axis=1).astype(bool)
    offsets = np.concatenate([[0], np.cumsum(flags.sum(axis=1))]).astype(np.int32)
    names = pa.array(genres).take(pa.array(np.nonzero(flags)[1]))
    return pa.table(
        {
            "item_id": movies["item_id"],
            "release_year": pc.utf8_slice_codeunits(movies["release_date"], -4),
            "genres": pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), names), "|"),
        }
    )
