"""The folder that a run writes to."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from torch import distributed as dist

from torchrec_hilomoe.data.cache import NO_LOCKS
from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.training.distributed import agree, broadcast, is_main_rank

logger = logging.getLogger(__name__)

# Data workers of a process that was killed end some seconds after it, and hold the lock until then.
_PATIENCE = 15.0
_POLL_SECONDS = 0.1


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds a folder for one launch, so that no two write over each other's files.

    The lock ends with the process that holds it, however that ends. On file systems that have no
    locks there is a warning instead.

    Args:
        folder (Path): is made; has the lock in ``.lock``. Every rank calls it.

    Raises:
        ConfigError: another launch holds the folder, it cannot be written to, or another host does
            not see it; on every rank.
    """
    # A marker instead of a lock would outlive a process that is killed.
    lock = FileLock(folder / ".lock", fallback_to_soft=False)

    def acquire() -> None:
        if not is_main_rank():
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=_PATIENCE)
        except Timeout:
            raise ConfigError(
                f"output_dir: another run is writing to {folder}; wait until it has ended, or "
                "choose another folder"
            ) from None
        except OSError as error:
            if error.errno in NO_LOCKS:
                logger.warning("output_dir: %s is on a file system without locks", folder)
                return
            raise ConfigError(f"output_dir: cannot write {folder}: {error}") from None

    agree(acquire)
    try:
        if dist.get_world_size() > 1:
            _check_shared(folder)
        yield
    finally:
        lock.release()


def _check_shared(folder: Path) -> None:
    """Every rank writes its part of a checkpoint there."""
    token = folder / f".{broadcast(uuid.uuid4().hex)}"

    def write() -> None:
        if is_main_rank():
            try:
                token.touch()
            except OSError as error:
                raise ConfigError(f"output_dir: cannot write {folder}: {error}") from None

    def look() -> None:
        deadline = time.monotonic() + _PATIENCE  # network file systems may show files late
        while not token.exists():
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"output_dir must be in a folder that all hosts share: rank {dist.get_rank()} "
                    f"does not see in {folder} what rank 0 wrote there"
                )
            time.sleep(_POLL_SECONDS)

    agree(write)
    try:
        agree(look)
    finally:
        if is_main_rank():
            token.unlink(missing_ok=True)
