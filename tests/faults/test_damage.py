"""Damaged checkpoints are passed over; what cannot be written leaves the rest alone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from worker import Fault

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def killed(launch, tmp_path_factory) -> Path:
    """A run of one rank, killed in its second stage."""
    run = tmp_path_factory.mktemp("killed")
    codes, log = launch(run, ranks=1, fault=Fault("batch", 33))
    assert codes == [-signal.SIGKILL], log
    return run


def _flip_a_bit(checkpoint: Path) -> None:
    path = next((checkpoint / "weights").glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _truncate(checkpoint: Path) -> None:
    path = next((checkpoint / "weights").glob("*.distcp"))
    os.truncate(path, path.stat().st_size // 2)


def _half_write_the_manifest(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text()[:200])


DAMAGES: list[Callable[[Path], None]] = [
    _flip_a_bit,
    _truncate,
    _half_write_the_manifest,
    lambda checkpoint: (checkpoint / "manifest.json").unlink(),
    lambda checkpoint: (checkpoint / "weights" / ".metadata").unlink(),
    lambda checkpoint: (checkpoint / "encoder" / "encoder.json").write_text("{}"),
    lambda checkpoint: (checkpoint / "run.json").write_text("{}"),
    lambda checkpoint: shutil.rmtree(checkpoint / "weights"),
]
NAMES = [
    "bit",
    "truncated",
    "half manifest",
    "no manifest",
    "no metadata",
    "encoder",
    "run",
    "gone",
]
QUICK = ("bit", "no manifest")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(damage, id=name, marks=[] if name in QUICK else pytest.mark.slow)
        for name, damage in zip(NAMES, DAMAGES, strict=True)
    ],
)
def test_the_newest_whole_checkpoint_is_taken(
    launch, killed, undisturbed, assert_same_run, tmp_path, damage
):
    run = tmp_path / "run"
    shutil.copytree(killed, run, symlinks=True)
    newest, before = sorted((run / "checkpoints").glob("step-*"))[:-3:-1]
    damage(newest)
    codes, log = launch(run, ranks=1)
    assert codes == [0], log
    assert f"{newest}" in log
    assert f"resuming {before}" in log
    assert_same_run(run, undisturbed(1))


@pytest.mark.slow
def test_without_any_whole_checkpoint_it_starts_anew(
    launch, killed, undisturbed, assert_same_run, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(killed, run, symlinks=True)
    for checkpoint in (run / "checkpoints").glob("step-*"):
        _flip_a_bit(checkpoint)
    codes, log = launch(run, ranks=1)
    assert codes == [0], log
    assert "no whole checkpoint" in log
    assert_same_run(run, undisturbed(1))


@pytest.mark.slow
def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(launch, killed, tmp_path):
    named = tmp_path / "checkpoint"
    shutil.copytree(sorted((killed / "checkpoints").glob("step-*"))[-1], named)
    _flip_a_bit(named)
    codes, log = launch(tmp_path / "run", f"checkpoint.resume={named}", ranks=2)
    assert codes == [1, 1]
    assert f"{named}: weights/" in log


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system for a few checkpoints of a run."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1300k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_an_error_and_leaves_what_is_there(
    launch, undisturbed, assert_same_run, small_disk
):
    run = small_disk / "run"
    codes, log = launch(run)
    assert codes == [1, 1], log
    assert "No space left on device" in log
    whole = sorted((run / "checkpoints").glob("step-*"))
    assert len(whole) > 3
    assert not list((run / "checkpoints").glob(".step-*")), "the incomplete one takes up space"
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    codes, log = launch(run)
    assert codes == [0, 0], log
    assert f"resuming {whole[-1]}" in log
    assert_same_run(run, undisturbed(2))


@pytest.mark.slow
def test_a_read_only_folder_is_an_error(launch, small_disk):
    run = small_disk / "run"
    (run / "checkpoints").mkdir(parents=True)
    bind = ["mount", "--bind", str(run / "checkpoints"), str(run / "checkpoints")]
    subprocess.run(bind, check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(run / "checkpoints")], check=True)
    codes, log = launch(run)
    subprocess.run(["umount", "--lazy", str(run / "checkpoints")], check=True)
    assert codes == [1, 1], log
    assert log.count("Read-only file system") == 2
