"""One rank of a training in a process of its own, with a fault planted in it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.optim
from torch.distributed import checkpoint as dcp
from torchrec.distributed.train_pipeline import EvalPipelineSparseDist, TrainPipelineSparseDist

from torchrec_hilomoe.config import parse_config
from torchrec_hilomoe.errors import HiLoMoEError
from torchrec_hilomoe.training import (
    ScoreConfig,
    TrainingInterrupted,
    init_process_group,
    parse_run_config,
    score,
    shutdown,
    train,
)
from torchrec_hilomoe.training.checkpoint import folder

#: Where a fault can strike: the calls that are counted.
POINTS: dict[str, tuple[Any, str]] = {
    "batch": (TrainPipelineSparseDist, "progress"),
    "evaluation": (EvalPipelineSparseDist, "progress"),
    "save: begin": (folder, "_make_empty"),
    "save: tensors": (dcp.FileSystemWriter, "write_data"),
    "save: checksums": (folder, "checksums"),
    "save: manifest": (folder, "write_manifest"),
    "save: links": (folder, "_point"),
}


@dataclass(frozen=True)
class Fault:
    """A signal that ranks send themselves.

    Attributes:
        point (str): of `POINTS`, or ``seconds``.
        count (float): the how manieth call, or the seconds after the first batch.
        ranks (tuple[int, ...]): which ranks.
        signal (int): SIGKILL, SIGTERM, SIGSTOP.
    """

    point: str
    count: float
    ranks: tuple[int, ...] = (0,)
    signal: int = signal.SIGKILL


def train_rank(
    rank: int, world_size: int, port: int, log: str, values: dict[str, Any], fault: Fault | None
) -> None:
    """Trains, as the entry script does, and exits with its codes."""
    if fault is not None and rank in fault.ranks:
        _plant(fault)
    _run(rank, world_size, port, log, lambda: train(parse_run_config(values)))


def score_rank(rank: int, world_size: int, port: int, log: str, values: dict[str, Any]) -> None:
    """Scores a file, as the entry script does."""
    _run(rank, world_size, port, log, lambda: score(parse_config(ScoreConfig, values)))


def _run(rank: int, world_size: int, port: int, log: str, work: Callable[[], Any]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # The launcher's start method is inherited; loaders are to fork, as under torchrun.
    multiprocessing.set_start_method("fork", force=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("torchrec_hilomoe").setLevel(logging.INFO)
    torch.set_num_threads(1)
    code = 0
    try:
        init_process_group()
        work()
    except TrainingInterrupted as interrupted:
        print(interrupted)
        code = interrupted.exit_code
    except HiLoMoEError as error:
        print(f"error on rank {rank}: {error}")
        code = 1
    except Exception as error:
        print(f"rank {rank}: {error!r}")
        code = 2
    shutdown(code)


def _plant(fault: Fault) -> None:
    def strike() -> None:
        os.kill(os.getpid(), fault.signal)

    if fault.point == "seconds":
        timer = threading.Timer(fault.count, strike)
        timer.daemon = True
        _before_call(*POINTS["batch"], 1, timer.start)
    else:
        _before_call(*POINTS[fault.point], int(fault.count), strike)


def _before_call(owner: Any, name: str, count: int, act: Callable[[], None]) -> None:
    original, calls = getattr(owner, name), 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            act()
        return original(*args, **kwargs)

    setattr(owner, name, counting)
