"""Nothing in a checkpoint is executed, and nothing outside of it is read."""

from __future__ import annotations

import enum
import os
import pathlib
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from torchrec_hilomoe.errors import CheckpointError
from torchrec_hilomoe.training.checkpoint.integrity import checksums, verify, write_manifest
from torchrec_hilomoe.training.checkpoint.safe_load import load_tensors, read_metadata


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    state = {"a": {"b": torch.arange(6.0).reshape(2, 3)}, "n": torch.tensor(3)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "weights"), no_dist=True)
    return tmp_path / "weights"


class _Attack:
    def __init__(self, *call: object) -> None:
        self._call = call

    def __reduce__(self) -> tuple:
        return self._call[0], self._call[1:]


def test_reads_what_dcp_wrote(weights):
    state = {"a": {"b": torch.zeros(2, 3)}, "n": torch.tensor(0)}
    load_tensors(state, weights)
    assert torch.equal(state["a"]["b"], torch.arange(6.0).reshape(2, 3))
    assert state["n"] == 3
    with (weights / ".metadata").open("rb") as file:
        assert read_metadata(weights).state_dict_metadata == pickle.load(file).state_dict_metadata


def _as_python_3_13(monkeypatch):
    monkeypatch.setitem(sys.modules, "pathlib._local", pathlib)
    monkeypatch.setattr(pathlib.PosixPath, "__module__", "pathlib._local")


def _as_python_3_11_2(monkeypatch):
    by_name = lambda member, protocol: (getattr, (type(member), member.name))  # noqa: E731
    monkeypatch.setattr(enum.Enum, "__reduce_ex__", by_name)


@pytest.mark.parametrize("as_python", [_as_python_3_13, _as_python_3_11_2])
def test_reads_what_other_versions_of_python_wrote(tmp_path, monkeypatch, as_python):
    with monkeypatch.context() as patched:
        as_python(patched)
        weights = tmp_path / "weights"
        dcp.save({"n": torch.tensor(3)}, storage_writer=dcp.FileSystemWriter(weights), no_dist=True)
    state = {"n": torch.tensor(0)}
    load_tensors(state, weights)
    assert state["n"] == 3


@pytest.mark.parametrize(
    "function", [os.mkdir, eval, getattr, torch.load], ids=lambda f: f.__name__
)
def test_a_pickle_that_calls_anything_is_refused_before_the_call(weights, tmp_path, function):
    mark = tmp_path / "executed"
    arguments = {eval: (f"open({str(mark)!r}, 'w')",), getattr: (os, "system")}
    attack = _Attack(function, *arguments.get(function, (str(mark),)))
    try:
        content = pickle.dumps(attack)
    except TypeError:  # a module cannot be pickled; its name can
        content = pickle.dumps(_Attack(function, "os", "system"))
    (weights / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{function.__name__}, which no checkpoint"):
        read_metadata(weights)
    assert not mark.exists()


def test_an_attack_inside_of_real_metadata_is_refused(weights, tmp_path):
    metadata = read_metadata(weights)
    metadata.planner_data = _Attack(os.mkdir, str(tmp_path / "executed"))
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="mkdir"):
        load_tensors({"n": torch.tensor(0)}, weights)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "..", "__0_0.distcp/../../x"])
def test_a_file_outside_of_the_folder_is_refused(weights, name):
    metadata = read_metadata(weights)
    next(iter(metadata.storage_data.values())).relative_path = name
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="no data file of its folder"):
        read_metadata(weights)


def test_values_that_are_no_tensors_are_not_unpickled(tmp_path):
    attack = {"n": _Attack(os.mkdir, str(tmp_path / "executed"))}
    weights = tmp_path / "weights"
    dcp.save(attack, storage_writer=dcp.FileSystemWriter(weights), no_dist=True)
    with pytest.raises(CheckpointError, match="is no tensor"):
        load_tensors({"n": 0}, weights)
    assert not (tmp_path / "executed").exists()


def test_a_tensor_file_that_holds_another_pickle_is_refused(weights, tmp_path):
    data = next(weights.glob("*.distcp"))
    torch.save(_Attack(os.mkdir, str(tmp_path / "executed")), data)
    metadata = read_metadata(weights)
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, data.stat().st_size
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError):
        load_tensors({"n": torch.tensor(0)}, weights)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("cut", [0, 1, 10, 100])
def test_torn_metadata_are_an_error(weights, cut):
    path = weights / ".metadata"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_metadata(weights)


@pytest.mark.parametrize("absolute", [False, True])
def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path, absolute):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "secret").write_text("x")
    digests = checksums(tmp_path, [tmp_path / "secret"])
    name = str(tmp_path / "secret") if absolute else "../secret"
    write_manifest(tmp_path / "checkpoint", {name: digests["secret"]})
    with pytest.raises(CheckpointError, match="outside of it"):
        verify(tmp_path / "checkpoint")


def test_every_share_of_a_manifest_is_verified(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path, checksums(tmp_path, [tmp_path / name for name in "abc"]))
    (tmp_path / "c").write_text("C")
    verify(tmp_path, 0, 3)
    verify(tmp_path, 1, 3)
    with pytest.raises(CheckpointError, match="c is damaged"):
        verify(tmp_path, 2, 3)
