"""The manifest of a checkpoint: the checksum of each of its files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from torchrec_hilomoe.errors import CheckpointError

MANIFEST = "manifest.json"
_READ_BYTES = 1 << 20


def checksums(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Computes the SHA-256 of files.

    Args:
        folder (Path): what they are named relative to.
        files (Iterable[Path]): in ``folder``.

    Returns:
        dict[str, str]: relative name to hexadecimal digest.
    """
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in files}


def write_manifest(folder: Path, digests: Mapping[str, str]) -> None:
    """Writes the manifest, the last file of a checkpoint, through to the disk.

    Args:
        folder (Path): of the checkpoint.
        digests (Mapping[str, str]): from `checksums`, of every other file.
    """
    with (folder / MANIFEST).open("w") as file:
        json.dump({"sha256": dict(sorted(digests.items()))}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def verify(folder: Path, share: int = 0, shares: int = 1) -> None:
    """Checks that a checkpoint is whole, or this rank's share of it.

    Args:
        folder (Path): of the checkpoint.
        share (int): which of the files to read: number ``share``, ``share + shares``, …
        shares (int): how many verify it together.

    Raises:
        CheckpointError: a file is missing, or not what was written.
    """
    try:
        digests = json.loads((folder / MANIFEST).read_text())["sha256"]
        for name in sorted(digests)[share::shares]:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise CheckpointError(f"{folder}: its manifest names {name!r}, outside of it")
            if _sha256(folder / name) != digests[name]:
                raise CheckpointError(f"{folder}: {name} is damaged: its checksum differs")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: is not a whole checkpoint: {error!r}") from None


def _sha256(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            state.update(block)
    return state.hexdigest()
