"""The folder that a run writes to."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.training.distributed import agree, is_main_rank

logger = logging.getLogger(__name__)

# Data workers of a process that was killed end some seconds after it, and hold the lock until then.
_PATIENCE = 15.0
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds a folder for one launch, so that no two write over each other's files.

    The lock ends with the process that holds it, however that ends. On file systems that have no
    locks there is a warning instead.

    Args:
        folder (Path): is made; has the lock in ``.lock``. Every rank calls it.

    Raises:
        ConfigError: another launch holds the folder, or it cannot be written to; on every rank.
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
            if error.errno in _NO_LOCKS:
                logger.warning("output_dir: %s is on a file system without locks", folder)
                return
            raise ConfigError(f"output_dir: cannot write {folder}: {error}") from None

    agree(acquire)
    try:
        yield
    finally:
        lock.release()
