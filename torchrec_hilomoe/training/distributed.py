"""The process group and device of a launch; what all ranks must agree on."""

from __future__ import annotations

import gc
import os
import sys
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
from torch import distributed as dist

from torchrec_hilomoe.errors import HiLoMoEError, TrainingError

T = TypeVar("T")

#: For `agree`: one rank may encode a large data set while the others wait.
PREPARATION_TIMEOUT = timedelta(hours=24)
_POLL_SECONDS = 0.02
_LAST_WORDS_SECONDS = 2.0


def init_process_group() -> torch.device:
    """Joins the launch's process group, or makes one of a single process without torchrun.

    Uses NCCL and one GPU a rank where CUDA is available, gloo on CPU. Object collectives always
    run on gloo.

    Returns:
        torch.device: this rank's device.

    Raises:
        TrainingError: another rank of the launch did not start.
    """
    use_cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if use_cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        rank, world_size = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
        store: dist.Store | None = None  # the environment says where
        if "WORLD_SIZE" not in os.environ:
            store = dist.HashStore()
        elif (shared := torchrun_store()) is not None:
            store = _store_of_attempt(shared, rank, world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return device


def torchrun_store() -> dist.TCPStore | None:
    """Torchrun's own store, which outlives workers that it restarts.

    Returns:
        TCPStore | None: None without torchrun, or where it keeps the store to itself.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, wait_for_workers=False)


def _store_of_attempt(shared: dist.TCPStore, rank: int, world_size: int) -> dist.Store:
    """A part of torchrun's store in which nothing is left from the workers before a restart.

    Otherwise ranks would find the addresses of dead ones there and fail to connect. torchrun
    numbers the restarts of each host apart, so that the ranks must agree on a name themselves:
    each says hello under a name of its own, which only rank 0 of the same attempt answers.
    """
    if rank == 0:
        attempt = uuid.uuid4().hex
        deadline = time.monotonic() + dist.default_pg_timeout.total_seconds()
        for other in range(1, world_size):
            while not shared.check([f"{attempt}/{other}"]):
                if time.monotonic() > deadline:
                    raise TrainingError(
                        f"rank {other} of {world_size} did not start within "
                        f"{dist.default_pg_timeout}; see what its host says"
                    )
                if shared.check([f"hello/{other}"]):
                    shared.set(f"welcome/{shared.get(f'hello/{other}').decode()}", attempt)
                time.sleep(_POLL_SECONDS)
    else:
        name = uuid.uuid4().hex
        shared.set(f"hello/{rank}", name)
        attempt = shared.get(f"welcome/{name}").decode()
        shared.set(f"{attempt}/{rank}", "")
    return dist.PrefixStore(attempt, shared)


def shutdown(exit_code: int = 0) -> NoReturn:
    """Ends the process after the work is done; for entry scripts only.

    gloo's and TorchRec's threads at times abort a process that has finished its work. So the
    objects go first, then the process group, then the process, without interpreter teardown.

    Args:
        exit_code (int): of the process.
    """
    if dist.is_initialized():
        if exit_code == 0:
            dist.barrier()
        elif dist.get_world_size() > 1:
            # torchrun kills the other ranks once one is gone: let them say what stopped them.
            time.sleep(_LAST_WORDS_SECONDS)
        gc.collect()
        if exit_code == 0:
            dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def is_main_rank() -> bool:
    """Whether this is the rank that writes files and the console: rank 0 or no process group."""
    return not dist.is_initialized() or dist.get_rank() == 0


def broadcast(value: T) -> T:
    """Rank 0's value on every rank.

    Args:
        value (T): any picklable object; read on rank 0 only.

    Returns:
        T: rank 0's value.
    """
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def once_per_launch(name: str, value: str) -> str:
    """A value of the launch, which lasts when torchrun restarts the workers.

    Args:
        name (str): what it is.
        value (str): taken from the first rank that asks, in the first attempt.

    Returns:
        str: the same on every rank.
    """
    store = torchrun_store()
    if store is None:
        return broadcast(value)
    # What the first attempt wrote is still there.
    return store.compare_set(f"torchrec_hilomoe/{name}", "", value).decode()


def set_timeout(timeout: timedelta) -> None:
    """Sets how long ranks wait for each other before they end with an error.

    Args:
        timeout (timedelta): for every later collective of the process group.
    """
    # torch has no public setter; torchtitan uses this one too.
    dist.distributed_c10d._set_pg_timeout(timeout, dist.group.WORLD)


def agree(work: Callable[[], T], timeout: timedelta | None = None) -> T:
    """Runs ``work`` on every rank; if any rank fails, all raise that rank's error.

    For work that may fail on one rank alone (a file is missing on one host): no rank goes on to
    a collective in which it would wait for ranks that are gone.

    Args:
        work (Callable[[], T]): without collectives inside.
        timeout (timedelta | None): how long the slowest rank may take; None for the process
            group's own timeout.

    Returns:
        T: this rank's result.

    Raises:
        HiLoMoEError: the first failing rank's error.
    """
    result: T
    error: HiLoMoEError | None = None
    try:
        result = work()
    except HiLoMoEError as caught:
        error = caught
    group = dist.new_group(backend="gloo", timeout=timeout) if timeout else None
    errors: list[HiLoMoEError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error, group=group)
    if group is not None:
        dist.destroy_process_group(group)
    first = next((e for e in errors if e is not None), None)
    if first is not None:
        raise error or first
    return result
