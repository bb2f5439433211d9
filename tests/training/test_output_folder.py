"""The lock of a run's folder."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest
from filelock import FileLock

from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.training import output_folder
from torchrec_hilomoe.training.output_folder import _check_shared, exclusive


@pytest.fixture(autouse=True)
def _impatient(device, monkeypatch):
    monkeypatch.setattr(output_folder, "_PATIENCE", 0.1)


def test_a_folder_is_held_until_the_end(tmp_path):
    folder = tmp_path / "new" / "run"
    message = f"another run is writing to {folder}"
    with exclusive(folder), pytest.raises(ConfigError, match=message), exclusive(folder):
        pass
    with exclusive(folder), pytest.raises(ZeroDivisionError), exclusive(tmp_path):
        1 / 0  # noqa: B018
    FileLock(tmp_path / ".lock", blocking=False).acquire().lock.release()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_systems_without_locks_are_warned_about(tmp_path, monkeypatch, caplog, code):
    def flock(*_):
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    with exclusive(tmp_path):
        assert "file system without locks" in caplog.text
    with exclusive(tmp_path):
        pass  # nothing is left behind that would refuse the next one


def test_other_errors_name_the_folder(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ConfigError, match=f"output_dir: cannot write {tmp_path}: .*broken"):
        exclusive(tmp_path).__enter__()


def test_what_shows_that_a_folder_is_shared_is_removed(tmp_path):
    _check_shared(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_shared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "touch", lambda path: None)
    with pytest.raises(ConfigError, match=f"rank 0 does not see in {tmp_path} what rank 0 wrote"):
        _check_shared(tmp_path)
