"""From a path, folder or glob of the configuration to the files it means."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from torchrec_hilomoe.errors import ConfigError, DataError

#: Suffixes of compressed CSV files and the codecs Arrow reads them with.
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
_FORMATS = {".csv": "csv", ".tsv": "csv", ".txt": "csv", ".parquet": "parquet", ".pq": "parquet"}


def resolve_files(paths: Sequence[str], key: str) -> list[Path]:
    """Lists the files that ``paths`` name, in a stable order.

    Args:
        paths (Sequence[str]): files, folders (searched deeply; names that begin with ``.`` or
            ``_`` are left out, as Spark writes them) or globs (``**`` included).
        key (str): the configuration key, for messages.

    Returns:
        list[Path]: in the order of ``paths``, sorted within a folder or a glob.

    Raises:
        DataError: a path names nothing.
    """
    return [file for path in paths for file in _resolve(path, key)]


def _resolve(path: str, key: str) -> list[Path]:
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        inside = (p for p in place.rglob("*") if p.is_file())
        files = sorted(
            p for p in inside if not any(q[0] in "._" for q in p.relative_to(place).parts)
        )
        if not files:
            raise DataError(f"{key}: the folder {path} holds no files")
        return files
    matches = sorted(Path(p) for p in glob.glob(str(place), recursive=True))
    files = [p for p in matches if p.is_file()]
    if not files:
        kind = "no file matches" if glob.has_magic(path) else "no such file or folder:"
        raise DataError(f"{key}: {kind} {path} (looked from {Path.cwd()})")
    return files


def file_format(path: Path, declared: str) -> str:
    """``"csv"`` or ``"parquet"``, as declared or by the suffix.

    Raises:
        ConfigError: the suffix tells nothing.

    Example:
        >>> file_format(Path("train.csv.gz"), "auto")
        'csv'
    """
    if declared != "auto":
        return declared
    suffix = plain_suffix(path)
    if suffix not in _FORMATS:
        raise ConfigError(
            f"data.format: the suffix of {path} does not tell its format (known: "
            f"{', '.join(_FORMATS)}, also with {', '.join(COMPRESSED)}); set data.format "
            "to csv or parquet"
        )
    return _FORMATS[suffix]


def plain_suffix(path: Path) -> str:
    """The suffix in lower case, that of a compression left out."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""
