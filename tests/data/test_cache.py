from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from torchrec_hilomoe.data.cache import build_once, cache_root, content_digest
from torchrec_hilomoe.errors import DataError


def test_builds_once(tmp_path: Path) -> None:
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        (folder / "x").write_text("done")

    for _ in range(2):
        assert (build_once(tmp_path / "thing", build) / "x").read_text() == "done"
    assert len(calls) == 1


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "x").write_text("half")
        raise OSError("disk full")

    with pytest.raises(DataError, match=r"data.cache_dir: cannot write .*thing \(disk full\);"):
        build_once(tmp_path / "thing", build)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []


def test_a_build_that_is_killed_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from torchrec_hilomoe.data.cache import build_once
def build(folder):
    (folder / "x").write_text("half")
    print("started", flush=True)
    time.sleep(60)
build_once(Path(sys.argv[1]), build)
"""
    target = tmp_path / "thing"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()

    def build(folder: Path) -> None:
        assert list(folder.iterdir()) == []
        (folder / "x").write_text("whole")

    assert (build_once(target, build) / "x").read_text() == "whole"


def test_digest_is_of_content_and_order(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    a.write_text("1")
    b.write_text("2")
    c.write_text("1")
    cache = tmp_path / "cache"
    assert content_digest([a, b], cache) == content_digest([c, b], cache)
    assert content_digest([a, b], cache) != content_digest([b, a], cache)


def test_digest_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path, cache = tmp_path / "a", tmp_path / "cache"
    path.write_text("1")
    os.utime(path, ns=(0, 1000))
    first = content_digest([path], cache)
    path.write_text("2")
    os.utime(path, ns=(0, 1000))
    assert content_digest([path], cache) == first  # same size and time: not read again
    os.utime(path, ns=(0, time.time_ns()))
    assert content_digest([path], cache) != first


def test_a_remembered_digest_is_of_one_path_and_size(tmp_path: Path) -> None:
    digests = set()
    for folder, content in (("x", "1"), ("x", "12"), ("y", "2")):
        path = tmp_path / folder / "a"
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        os.utime(path, ns=(0, 1000))
        digests.add(content_digest([path], tmp_path / "cache"))
    assert len(digests) == 3


def test_processes_that_ask_at_once_read_a_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, reads, open_plainly = tmp_path / "a", [], Path.open
    file.write_text("1")

    def open_slowly(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path == file:
            reads.append(path)
            time.sleep(0.2)
        return open_plainly(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_slowly)
    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(lambda _: content_digest([file], tmp_path / "cache"), range(4))
        assert len(set(digests)) == 1
    assert reads == [file]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    message = rf"^data\.cache_dir: {tmp_path}/\S+ is on a file system without locks \(.*another one"
    with pytest.raises(DataError, match=message):
        build_once(tmp_path / "rows" / "key", lambda folder: None)
    (tmp_path / "a").write_text("1")
    with pytest.raises(DataError, match=message):
        content_digest([tmp_path / "a"], tmp_path / "cache")


@pytest.mark.parametrize("file", ["missing", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, file: str) -> None:
    with pytest.raises(DataError, match=f"{tmp_path / file}: cannot be read: "):
        content_digest([tmp_path / file], tmp_path / "cache")


def test_a_remembered_digest_may_be_read_by_all_that_may_read_the_cache(tmp_path: Path) -> None:
    file, umask = tmp_path / "a", os.umask(0o022)
    try:
        file.write_bytes(b"1")
        content_digest([file], tmp_path / "cache")
    finally:
        os.umask(umask)
    (remembered,) = (tmp_path / "cache" / "digests").glob("[!.]*")
    assert stat.S_IMODE(remembered.stat().st_mode) == 0o644


def test_places_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHREC_HILOMOE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root(None) == Path("/xdg/torchrec_hilomoe")
    monkeypatch.setenv("TORCHREC_HILOMOE_CACHE", "/mine")
    assert cache_root(None) == Path("/mine")
    assert cache_root("/given") == Path("/given")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataError, match="data.cache_dir: cannot write .*file.rows.key"):
        build_once(tmp_path / "file" / "rows" / "key", lambda folder: None)
    with pytest.raises(DataError, match="data.cache_dir: cannot write .*another folder"):
        content_digest([tmp_path / "file"], tmp_path / "file")
