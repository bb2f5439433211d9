"""From a path, folder or glob of the configuration to the files it means, and their format."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchrec_hilomoe.errors import ConfigError, DataError

#: Suffixes of compressed CSV files and the codecs Arrow reads them with.
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
_FORMATS = {".csv": "csv", ".tsv": "csv", ".txt": "csv", ".parquet": "parquet", ".pq": "parquet"}


@dataclass(frozen=True)
class RawFormat:
    """How raw files are written; the fields are those of ``DataConfig``.

    Args:
        format (str): ``"auto"``, ``"csv"`` or ``"parquet"``.
        delimiter (str | None): of CSV.
        column_names (tuple[str, ...] | None): of CSV without a header line.
        quote_char (str | None): of CSV; None where quotes mean nothing.
    """

    format: str = "auto"
    delimiter: str | None = None
    column_names: tuple[str, ...] | None = None
    quote_char: str | None = '"'

    def delimiter_of(self, path: Path) -> str:
        """The delimiter of a CSV file, by its suffix if none is configured."""
        return self.delimiter or ("\t" if plain_suffix(path) == ".tsv" else ",")


def resolve_files(paths: Sequence[str], key: str) -> list[Path]:
    """Lists the files that ``paths`` name, in a stable order.

    Args:
        paths (Sequence[str]): files, folders (searched deeply; names that begin with ``.`` or
            ``_`` are left out, as Spark writes them) or globs (``**`` included) of both.
        key (str): the configuration key, for messages.

    Returns:
        list[Path]: in the order of ``paths``, sorted within a folder or a glob.

    Raises:
        ConfigError: a path is empty, or a file is named twice.
        DataError: a path names nothing.
    """
    found = [(path, file) for path in paths for file in _resolve(path, key)]
    named: dict[Path, tuple[str, Path]] = {}
    for path, file in found:
        target = file.resolve()
        if target in named:
            earlier_path, earlier_file = named[target]
            # A folder names a file twice where it holds a link to it.
            names = (earlier_path, path) if earlier_path != path else (earlier_file, file)
            raise ConfigError(
                f"{key}: the file {target} is named twice, by {names[0]} and by {names[1]}; its "
                "rows would count twice, so leave one of them out"
            )
        named[target] = path, file
    return [file for _, file in found]


def _resolve(path: str, key: str) -> list[Path]:
    if not path:  # as of a shell variable that is not set; it would mean the current folder
        raise ConfigError(
            f"{key}: an empty path; name a file, a folder (. for this one) or a glob, or leave the "
            "key out"
        )
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        files = _files_inside(place)
        if not files:
            raise DataError(f"{key}: the folder {path} holds no files")
        return files
    files = _matches(place)
    if not files:
        kind = "no file matches" if glob.has_magic(path) else "no such file or folder:"
        raise DataError(f"{key}: {kind} {path} (looked from {Path.cwd()})")
    return files


def _files_inside(folder: Path) -> list[Path]:
    inside = (p for p in folder.rglob("*") if p.is_file())
    return sorted(p for p in inside if not any(q[0] in "._" for q in p.relative_to(folder).parts))


def _matches(pattern: Path) -> list[Path]:
    """The files that a glob matches, and those inside the folders that it matches."""
    files: set[Path] = set()  # ``**`` matches folders and what is in them
    for match in map(Path, glob.glob(str(pattern), recursive=True)):
        if match.is_file():
            files.add(match)
        elif not match.name.startswith((".", "_")) or match.name[0] == pattern.name[0]:
            files.update(_files_inside(match))
    return sorted(files)


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
        csv, parquet = (
            ", ".join(name for name, kind in _FORMATS.items() if kind == wanted)
            for wanted in ("csv", "parquet")
        )
        raise ConfigError(
            f"data.format: the suffix of {path} does not tell its format (known: {parquet}, and "
            f"{csv}, these also with {', '.join(COMPRESSED)}); set data.format to csv or parquet"
        )
    return _FORMATS[suffix]


def plain_suffix(path: Path) -> str:
    """The suffix in lower case, that of a compression left out."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""
