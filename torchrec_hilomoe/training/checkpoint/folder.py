"""The folder of a run's checkpoints: whole or not there at all, with links to the last and best."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import distributed as dist

from torchrec_hilomoe.errors import CheckpointError
from torchrec_hilomoe.training.checkpoint.integrity import checksums, write_manifest
from torchrec_hilomoe.training.distributed import agree, broadcast, is_main_rank

_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_RANK_FILE = re.compile(r"__(\d+)_")


class CheckpointFolder:
    """The checkpoints of a run.

    Each is a new folder ``step-…``, written aside and renamed when it is whole; then the links
    ``last`` and ``best`` move. A process that dies half-way leaves the earlier ones untouched, and
    one that dies before the links have moved is made up for by `relink`.

    Every rank makes one, and calls its methods together with all others.

    Args:
        folder (Path): seen by all ranks; created on the first save.
        keep_last (int): older checkpoints than so many are removed, but for the best one.
        resumed_from (Path | None): the checkpoint that the run continues. What is in the folder
            and does not lead up to it is another run's, and is removed after the first save.
    """

    def __init__(self, folder: Path, keep_last: int, resumed_from: Path | None = None) -> None:
        self.path = folder
        self._keep_last = keep_last
        self._own = broadcast(_lineage(folder, resumed_from) if is_main_rank() else [])

    @property
    def own(self) -> list[Path]:
        """The run's checkpoints, oldest first, from those that the resumed one came after."""
        return [self.path / name for name in self._own]

    def write(self, step: int, fill: Callable[[Path], None], *links: str) -> Path:
        """Adds a checkpoint.

        Args:
            step (int): global step, names the folder.
            fill (Callable[[Path], None]): writes into an empty folder; called on every rank.
            *links (str): ``best``, ``last``; moved to the new checkpoint.

        Returns:
            Path: the checkpoint.

        Raises:
            CheckpointError: it could not be written; raised on every rank.
        """
        name = broadcast(self._free_name(step) if is_main_rank() else "")
        temporary = self.path / f".{name}.incomplete"
        try:
            self.on_main_rank(lambda: _make_empty(temporary))
            fill(temporary)
            digests = self._digests(temporary)
            own = [*self._own, name]

            def complete() -> None:
                # In one step on rank 0: if another rank dies, the links move all the same.
                _complete(temporary, digests, self.path / name)
                self._move_links(dict.fromkeys(links, name), own)
                self._prune(own)

            self.on_main_rank(complete)
        except BaseException:
            if is_main_rank():
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._own = own
        return self.path / name

    def on_main_rank(self, work: Callable[[], None]) -> None:
        """Writes what rank 0 alone writes.

        Args:
            work (Callable[[], None]): called on rank 0.

        Raises:
            CheckpointError: it could not write; raised on every rank.
        """

        def attempt() -> None:
            try:
                if is_main_rank():
                    work()
            except OSError as error:
                raise CheckpointError(
                    f"cannot write a checkpoint into {self.path}: {error}. The previous ones are "
                    "untouched; make room or choose another output_dir, and start again to resume"
                ) from None

        agree(attempt)

    def relink(self, best: Path | None) -> None:
        """Points ``last`` to the checkpoint that is resumed, and ``best`` to the best one.

        Args:
            best (Path | None): one of ``own``; None if it is not among them.

        Raises:
            CheckpointError: a link could not be moved; raised on every rank.
        """
        if self._own:
            links = {"last": self._own[-1]} | ({"best": best.name} if best else {})
            self.on_main_rank(lambda: self._move_links(links, self._own))

    def link(self, name: str) -> Path | None:
        """What a link points to.

        Args:
            name (str): ``best`` or ``last``.

        Returns:
            Path | None: None if it is no checkpoint of this run.
        """
        path = self.path / name
        target = os.readlink(path) if path.is_symlink() else None
        return self.path / target if target in self._own else None

    def _free_name(self, step: int) -> str:
        """A name that is not taken, as by a damaged checkpoint of the same step."""
        names = (f"step-{step:08d}" + (f".{i}" if i else "") for i in itertools.count())
        return next(name for name in names if not (self.path / name).exists())

    def _digests(self, folder: Path) -> dict[str, str]:
        """Checksums of all files; each rank reads those that it wrote."""

        def own() -> dict[str, str]:
            try:
                return checksums(folder, (path for path in folder.rglob("*") if _is_own(path)))
            except OSError as error:
                raise CheckpointError(f"cannot read back {folder}: {error}") from None

        parts: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, agree(own))
        return {name: digest for part in parts for name, digest in part.items()}

    def _move_links(self, links: Mapping[str, str], own: list[str]) -> None:
        """Moves links, and removes those to what is not the run's own."""
        present = self._links()
        for link, name in links.items():
            if present.get(link) != name:
                _point(self.path / link, name)
        for link in ("last", "best"):
            if link in present.keys() - links.keys() and present[link] not in own:
                (self.path / link).unlink()

    def _links(self) -> dict[str, str]:
        """All links in the folder, by name; users may have added some."""
        return {path.name: os.readlink(path) for path in self.path.iterdir() if path.is_symlink()}

    def _prune(self, own: list[str]) -> None:
        """Removes all but the last of the run's checkpoints and those that are linked to."""
        kept = {*own[-self._keep_last :]} | ({*own} & {*self._links().values()})
        for path in checkpoints_in(self.path):
            if path.name not in kept:
                # First under a name that no one takes for whole: removing takes time.
                os.replace(path, path.with_name(f".{path.name}.incomplete"))
        for path in self.path.glob(".step-*.incomplete"):
            shutil.rmtree(path)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first; some may be damaged.

    Args:
        folder (Path): such as ``OUTPUT_DIR/checkpoints``; need not exist.

    Returns:
        list[Path]: in the order of their steps.
    """
    found = [
        (int(match[1]), int(match[2] or 0), path)
        for path in folder.glob("step-*")
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, _, path in sorted(found)]


def _lineage(folder: Path, resumed_from: Path | None) -> list[str]:
    """Names of the resumed checkpoint and those before it; none if it is not among them."""
    known = [path.resolve() for path in checkpoints_in(folder)]
    resumed = resumed_from.resolve() if resumed_from else None
    return [path.name for path in known[: known.index(resumed) + 1]] if resumed in known else []


def _is_own(path: Path) -> bool:
    """Whether this rank wrote a file: DCP names its files after ranks, rank 0 writes the rest."""
    match = _RANK_FILE.match(path.name)
    return path.is_file() and (int(match[1]) if match else 0) == dist.get_rank()


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _complete(temporary: Path, digests: dict[str, str], final: Path) -> None:
    """Adds the manifest and renames the folder; both survive a loss of power."""
    for name in digests:
        if not (temporary / name).exists():
            raise CheckpointError(
                f"{temporary / name}: written by another rank, not seen by rank 0; output_dir must "
                "be in a folder that all hosts share"
            )
    write_manifest(temporary, digests)
    os.replace(temporary, final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point(link: Path, target: str) -> None:
    """Moves a symbolic link in one step."""
    temporary = link.with_name(f".{link.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
