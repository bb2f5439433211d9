"""torchrun restarts what was killed, and the run goes on by itself; on one host and on two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from conftest import SMALL

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.multirank]

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SCRIPT = str(ROOT / "examples" / "train_dlrm_hilomoe.py")
LONGER = ["training.stages.warm_up.epochs=12", "model.expert_width=10", "model.plain_width=10"]


@pytest.fixture
def overrides(tmp_path) -> list[str]:
    return [*SMALL, *LONGER, f"data.cache_dir={tmp_path / 'cache'}"]


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a process in a folder of its own, and ends it with the test."""
    processes = []

    def begin(command: list[str], **variables: str) -> subprocess.Popen:
        log = (tmp_path / f"log{len(processes)}.txt").open("w")
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
        processes.append(
            subprocess.Popen(
                command, cwd=tmp_path, env=environment, stdout=log, stderr=log, process_group=0
            )
        )
        return processes[-1]

    yield begin
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def _workers(torchrun: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text()
    return [int(pid) for pid in children.split()]


def _metrics(run: Path) -> dict:
    metrics = json.loads((run / "metrics.json").read_text())
    return {key: metrics[key] for key in ("valid", "test", "stages", "train_batches")}


def _new_checkpoint(folder: Path) -> Callable[[], bool]:
    """Whether there is one more than now."""
    before = len(list(folder.glob("**/step-*")))
    return lambda: len(list(folder.glob("**/step-*"))) > before


def test_torchrun_restarts_and_the_run_goes_on(start, overrides, tmp_path):
    """In the default output folder, which is named after the time of the launch."""
    one_host = [*TORCHRUN, "--standalone", "--nproc_per_node=2"]
    whole = start([*one_host, SCRIPT, *overrides, f"output_dir={tmp_path / 'whole'}"])
    assert whole.wait(120) == 0
    torchrun = start([*one_host, "--max-restarts=3", SCRIPT, *overrides])
    for victim in (1, 0):
        _wait_for(_new_checkpoint(tmp_path / "outputs"), 60, "a checkpoint")
        os.kill(_workers(torchrun)[victim], signal.SIGKILL)
    assert torchrun.wait(180) == 0
    (run,) = (tmp_path / "outputs").iterdir()
    assert _metrics(run) == _metrics(tmp_path / "whole")


def test_sigterm_to_torchrun_saves_before_it_ends(start, overrides, tmp_path):
    run = tmp_path / "run"
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", SCRIPT]
    command += [*overrides, "checkpoint.every_batches=null", f"output_dir={run}"]
    torchrun = start(command)
    _wait_for((run / "tensorboard").exists, 60, "the training to start")
    time.sleep(3)
    torchrun.terminate()
    assert torchrun.wait(60) != 0
    saved = json.loads((run / "checkpoints" / "last" / "run.json").read_text())
    assert saved["progress"]["step"] > 0


@pytest.fixture
def hosts(start) -> Iterator[list[list[str]]]:
    """Two hosts on this machine: the commands that run a command on each."""
    names = [f"hilomoe{os.getpid() % 10000}{letter}" for letter in "ab"]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces are not permitted here (ip netns add)")
    try:
        ip("link", "add", "eth0", "netns", names[0], "type", "veth",
           "peer", "name", "eth0", "netns", names[1])  # fmt: skip
        for i, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.9.8.{i}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def test_two_hosts_of_which_one_is_cut_off_and_brought_back(start, overrides, hosts, tmp_path):
    def launch(run: Path, host: int) -> subprocess.Popen:
        return start(
            [*hosts[host], *TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3",
             "--rdzv-backend=c10d", "--rdzv-endpoint=10.9.8.1:29400", "--rdzv-id=run",
             f"--rdzv-conf=is_host={int(host == 0)}", f"--local-addr=10.9.8.{host + 1}", SCRIPT,
             *overrides, "training.timeout_minutes=0.1", f"output_dir={run}"],
            GLOO_SOCKET_IFNAME="eth0",
        )  # fmt: skip

    both = [launch(tmp_path / "whole", host) for host in (0, 1)]
    assert [process.wait(120) for process in both] == [0, 0]

    run = tmp_path / "cut"
    first, second = launch(run, 0), launch(run, 1)
    _wait_for(_new_checkpoint(run), 60, "a checkpoint")
    link = [*hosts[1], "ip", "link", "set", "eth0"]
    subprocess.run([*link, "down"], check=True)
    time.sleep(20)  # the workers give up after 6
    subprocess.run([*link, "up"], check=True)
    assert [first.wait(240), second.wait(60)] == [0, 0]
    assert _metrics(run) == _metrics(tmp_path / "whole")
