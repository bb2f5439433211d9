"""Folders that are built once, whole or not at all, and keys made of the content of files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from torchrec_hilomoe.errors import DataError

#: Codes of errors of file systems that have no locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_READ_BYTES = 1 << 22


def cache_root(configured: str | None) -> Path:
    """The folder of everything that can be made again.

    Args:
        configured (str | None): ``data.cache_dir``.

    Returns:
        Path: ``configured``, or the environment variable ``TORCHREC_HILOMOE_CACHE``, or
        ``torchrec_hilomoe`` in ``XDG_CACHE_HOME`` (``~/.cache``).
    """
    chosen = configured or os.environ.get("TORCHREC_HILOMOE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchrec_hilomoe"


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Builds a folder unless it is there, safely among processes.

    The folder appears under its name only when it is complete, so a build that is killed leaves
    nothing that looks whole; what it left is removed by the next one.

    Args:
        folder (Path): where the result belongs.
        build (Callable[[Path], None]): fills an empty folder.

    Returns:
        Path: ``folder``.

    Raises:
        DataError: the folder cannot be written or locked.
    """
    if folder.is_dir():
        return folder
    with _named_errors(folder), _locked(folder):
        if folder.is_dir():
            return folder
        # While the lock is held, no other process builds: what is there was left by a dead one.
        unfinished = folder.parent / f".{folder.name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            build(unfinished)
            os.replace(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def key_of(*parts: Any) -> str:
    """A short key of values that JSON can hold."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def content_digest(files: Sequence[Path], root: Path) -> str:
    """A digest of the bytes of files, in order.

    Args:
        files (Sequence[Path]): the files.
        root (Path): the cache, where digests are kept by path, size and time of change, so that
            unchanged files are read once only, by one of the processes that ask at once.

    Returns:
        str: hexadecimal.

    Raises:
        DataError: a file cannot be read, or the cache cannot be written or locked.
    """
    return key_of([_file_digest(file, root / "digests") for file in files])


def _file_digest(file: Path, memory: Path) -> str:
    with named_read_errors(file):
        stat = file.stat()
        known = memory / key_of(str(file.resolve()), stat.st_size, stat.st_mtime_ns)
        if known.is_file():
            return known.read_text()
    with _named_errors(known), _locked(known):
        if not known.is_file():  # no other process has read it meanwhile
            # Others may read it, unlike the files of tempfile.
            unfinished = memory / f".{known.name}.{uuid.uuid4().hex}"
            unfinished.write_text(_digest_of_bytes(file))
            os.replace(unfinished, known)
        return known.read_text()


def _digest_of_bytes(file: Path) -> str:
    state = hashlib.blake2b(digest_size=16)
    with named_read_errors(file), file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            state.update(block)
    return state.hexdigest()


@contextmanager
def named_read_errors(file: Path) -> Iterator[None]:
    """Says of an error of the file system which raw file it is of, on every rank.

    Args:
        file (Path): what is read.

    Raises:
        DataError: it cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(target.parent / f".{target.name}.lock").acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise DataError(
            f"data.cache_dir: {target.parent} is on a file system without locks ({error}); name a "
            "folder on another one by data.cache_dir or TORCHREC_HILOMOE_CACHE"
        ) from error
    with held:
        yield


@contextmanager
def _named_errors(target: Path) -> Iterator[None]:
    """Says of an error of the file system where the cache is chosen, on every rank."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"data.cache_dir: cannot write {target} ({error}); free space or give permission "
            "there, or name another folder by data.cache_dir or TORCHREC_HILOMOE_CACHE"
        ) from error
