"""From which checkpoint a run goes on, and whether it may."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import distributed as dist

from torchrec_hilomoe.config import flat_keys
from torchrec_hilomoe.data.config import SPLITS
from torchrec_hilomoe.errors import CheckpointError, ConfigError
from torchrec_hilomoe.training.checkpoint.description import (
    RunInfo,
    check_description,
    read_run,
)
from torchrec_hilomoe.training.checkpoint.folder import checkpoints_in
from torchrec_hilomoe.training.checkpoint.integrity import verify
from torchrec_hilomoe.training.config import CheckpointConfig
from torchrec_hilomoe.training.distributed import agree, broadcast, is_main_rank, once_per_launch

logger = logging.getLogger(__name__)

# What a run may change and still be the same run.
_FREE = ("checkpoint", "sharding", "output_dir", "data.cache_dir", "data.num_workers",
         "training.log_every", "training.timeout_minutes", "training.on_non_finite")  # fmt: skip
# Without these the saved position means nothing.
_FIXED = ("model", "seed", "features", "encoder", "rows.train", "data.batch_size", "data.shuffle",
          "data.shuffle_buffer", "data.vocabularies_from", "training.monitor")  # fmt: skip


def launch_id() -> str:
    """Tells launches apart, as `RunInfo.launch`; restarts by torchrun are the same one."""
    return once_per_launch("launch", uuid.uuid4().hex)


def check_named(folder: Path, config: CheckpointConfig) -> None:
    """Refuses paths in the configuration that are no checkpoints. Every rank must call it.

    It takes a moment and needs no data, to come before everything that takes long. Where the run
    may go on from a checkpoint of its own, they are not looked for: what a run has started from may
    be gone by then.

    Args:
        folder (Path): the run's checkpoints.
        config (CheckpointConfig): what the run starts from.

    Raises:
        ConfigError: names the key and the path; raised on every rank.
    """
    launch = launch_id()
    if broadcast(bool(_own(folder, config.resume, launch)) if is_main_rank() else False):
        return

    def check() -> None:
        if config.resume not in ("auto", "never"):
            check_description(Path(config.resume), "checkpoint.resume")
        elif config.warm_start is not None:
            check_description(config.warm_start, "checkpoint.warm_start")

    agree(check)


def resume_point(folder: Path, run: Mapping[str, Any], launch: str) -> Path | None:
    """Finds the checkpoint to resume. Every rank must call it.

    Under ``auto`` it is the newest whole one in the folder. Nothing else is done twice, ``never``
    in one launch, a path by the same run: that goes on from the newest that it wrote itself.

    Args:
        folder (Path): the run's checkpoints.
        run (Mapping[str, Any]): the configuration, as `RunInfo.config`.
        launch (str): this launch, as `RunInfo.launch`.

    Returns:
        Path | None: verified; None to start from the beginning.

    Raises:
        CheckpointError: the checkpoint at the path that ``checkpoint.resume`` gives is damaged.
    """
    resume = run["checkpoint"]["resume"]
    candidates = broadcast(_candidates(folder, run, launch) if is_main_rank() else [])
    for path in reversed(candidates):
        try:
            verify_on_all_ranks(path)
        except CheckpointError as error:
            if is_main_rank():
                logger.warning("%s; trying the one before it", error)
            continue
        return path
    if resume in ("auto", "never"):
        if candidates and is_main_rank():
            logger.warning("%s holds no whole checkpoint: starting from the beginning", folder)
        return None
    path = Path(resume).resolve()
    try:
        verify_on_all_ranks(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"checkpoint.resume={resume}: {error}. Give auto, never, or a checkpoint's path"
        ) from None
    return path


def _candidates(folder: Path, run: Mapping[str, Any], launch: str) -> list[Path]:
    """What the run may go on from without being told, oldest first."""
    resume = run["checkpoint"]["resume"]
    own = _own(folder, resume, launch)
    if resume == "auto":
        return own
    return [path for path in own if not _changes(read_run(path).config, run)]


def _own(folder: Path, resume: str, launch: str) -> list[Path]:
    """Under ``auto`` all in the folder, else those of runs that were started alike; oldest first.

    A path inside of the folder is gone on from by what came after it alone.
    """

    def own(checkpoint: Path) -> bool:
        try:
            saved = read_run(checkpoint)
        except ConfigError:
            return False  # damaged
        same = dict(flat_keys(saved.config)).get("checkpoint.resume") == resume
        return same and (resume != "never" or saved.launch == launch)

    found = checkpoints_in(folder)
    if resume == "auto":
        return found
    known, named = [path.resolve() for path in found], Path(resume).resolve()
    later = known.index(named) + 1 if named in known else 0
    return [*filter(own, found[later:])]


def verify_on_all_ranks(checkpoint: Path) -> None:
    """Checks that a checkpoint is whole; the ranks share the reading. Every rank must call it.

    Args:
        checkpoint (Path): its folder.

    Raises:
        CheckpointError: it is not; raised on every rank.
    """
    agree(lambda: verify(checkpoint, dist.get_rank(), dist.get_world_size()))


def check_same_run(saved: RunInfo, config: Mapping[str, Any], explicit: bool) -> None:
    """Refuses to continue what is another run.

    Args:
        saved (RunInfo): of the checkpoint.
        config (Mapping[str, Any]): of this run, as `RunInfo.config`.
        explicit (bool): the checkpoint was named by the user, who may then change what the run
            does from here on, though not the model or what the position in the data means, and
            not if the run is finished.

    Raises:
        ConfigError: names the keys that differ.
    """
    changed = _changes(saved.config, config)
    fixed = [key for key in changed if _under(key, _FIXED)]
    finished = saved.progress.finished
    if fixed or (changed and (finished or not explicit)):
        shown = ", ".join(
            f"{key} ({old!r} there, {new!r} here)"
            for key, (old, new) in changed.items()
            if key in fixed or not fixed
        )
        advice = ""
        if not fixed and finished:
            advice = ". It is finished: a new run can take its weights, checkpoint.warm_start=PATH"
        elif not fixed:
            advice = ", or checkpoint.resume=PATH to go on with the changes"
        raise ConfigError(
            f"checkpoint.resume: the checkpoint is of another run: {shown}. Choose another "
            f"output_dir, or checkpoint.resume=never to begin anew{advice}"
        )
    if changed and is_main_rank():
        logger.warning("resuming with changes in %s", ", ".join(changed))


def _changes(saved: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What makes two configurations different runs: the values by key."""
    old, new = dict(flat_keys(saved)), dict(flat_keys(config))
    if old.get("encoder") == new.get("encoder"):  # wherever the vocabularies came from
        new["data.vocabularies_from"] = old.get("data.vocabularies_from")
    for split in SPLITS:
        content = f"content.{split}"
        if content in old and old[content] == new.get(content):  # wherever the files lie
            new[f"data.{split}"] = old.get(f"data.{split}")
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _under(key, _FREE)
    }


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
