"""The folder that a run writes to."""

from __future__ import annotations

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


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds a folder for one launch, so that no two write over each other's files.

    The lock ends with the process that holds it, however that ends.

    Args:
        folder (Path): is made; has the lock in ``.lock``. Every rank calls it.

    Raises:
        ConfigError: another launch holds the folder, or it cannot be written to; on every rank.
    """
    lock = FileLock(folder / ".lock")

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
        except NotImplementedError:
            logger.warning("output_dir: %s is on a file system without locks", folder)
        except OSError as error:
            raise ConfigError(f"output_dir: cannot write {folder}: {error}") from None

    agree(acquire)
    try:
        yield
    finally:
        lock.release()
