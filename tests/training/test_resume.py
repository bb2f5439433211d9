"""From which checkpoint a run goes on, and whether it may."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import shutil

import pytest
from torch import distributed as dist

from torchrec_hilomoe.errors import CheckpointError, ConfigError
from torchrec_hilomoe.training import run as run_module
from torchrec_hilomoe.training.checkpoint.description import read_run
from torchrec_hilomoe.training.checkpoint.resume import check_same_run
from torchrec_hilomoe.training.progress import Progress


def _checkpoints(run):
    return sorted((run / "checkpoints").glob("step-*"))


def test_fewer_training_rows_are_another_run(run_training, tmp_path):
    """Where ids are hashed, the encoders are the same."""
    hashed = (
        "~data.schema.multi_valued",
        "data.schema.dense=[]",
        "data.schema.group=null",
        "data.schema.categorical=[{name: user, hash_size: 50}, {name: brand, hash_size: 50}]",
    )
    run_training(tmp_path / "first", *hashed)
    (source, *_) = _checkpoints(tmp_path / "first")
    with pytest.raises(ConfigError, match=r"rows.train \(640 there, 320 here\)"):
        run_training(
            tmp_path / "second",
            *hashed,
            "data.synthetic.train_rows=320",
            f"checkpoint.resume={source}",
        )


FREE = ("output_dir", "sharding.type", "checkpoint.keep_last", "data.cache_dir", "data.num_workers")
FREE += tuple(f"training.{key}" for key in ("log_every", "timeout_minutes", "on_non_finite"))
MAY_CHANGE = ("optimizer.backbone.learning_rate", "training.stages.joint.epochs", "rows.valid")
FIXED = ("seed", "model.embedding_dim", "encoder", "features.dense", "rows.train")
FIXED += tuple(f"data.{key}" for key in ("batch_size", "shuffle", "shuffle_buffer"))


def test_what_may_change_in_a_run_that_goes_on(run_training, tmp_path, caplog):
    run_training(tmp_path, "training.max_train_batches=1")
    finished = read_run(tmp_path / "checkpoints" / "last")
    saved = dataclasses.replace(finished, progress=Progress(step=1))
    for key in (*FREE, *MAY_CHANGE, *FIXED):
        config = copy.deepcopy(saved.config)
        *path, last = key.split(".")
        group = functools.reduce(dict.__getitem__, path, config)
        group[last] = [group[last], "other"]
        for explicit in (False, True):
            caplog.clear()
            if key in FREE or (key in MAY_CHANGE and explicit):
                check_same_run(saved, config, explicit)
                assert (f"changes in {key}" in caplog.text) == (key in MAY_CHANGE)
            else:
                with pytest.raises(ConfigError, match=f"of another run: {key} "):
                    check_same_run(saved, config, explicit)


def test_data_are_known_by_their_content_wherever_they_lie(run_training, write_clicks, tmp_path):
    """Labels decide no vocabulary and no number of rows."""
    here, moved = tmp_path / "clicks.csv", tmp_path / "moved.csv"
    write_clicks(here, 640, 0)

    def run(path, **options):
        columns = ["categorical=[user,item]", "dense=[]", "multi_valued=[]", "group=null"]
        schema = [f"data.schema.{column}" for column in ("label=clicked", *columns)]
        files = [f"data.{key}" for key in ("source=tabular", f"train={path}", f"valid={path}")]
        return run_training(tmp_path / "run", *schema, *files, **options)

    run(here, kill_after=7)
    here.rename(moved)
    assert run(moved)["train_batches"] == 20
    header, *rows = moved.read_text().splitlines()
    others = [f"{1 - int(row[0])}{row[1:]}" for row in rows]
    moved.write_text("\n".join([header, *others]) + "\n")
    with pytest.raises(ConfigError, match=r"of another run: content.train .*, content.valid "):
        run(moved)


def test_a_finished_run_is_not_gone_on_with_by_changes(run_training, tmp_path):
    run_training(tmp_path / "run")
    unfinished, finished = _checkpoints(tmp_path / "run")
    longer = "training.stages.joint.epochs=3"
    for output_dir, resume in [("run", "auto"), ("other", finished)]:
        with pytest.raises(ConfigError, match=r"epochs \(2.0 there, 3.0 here\)") as error:
            run_training(tmp_path / output_dir, longer, f"checkpoint.resume={resume}")
        assert "It is finished" in str(error.value)
        assert "checkpoint.resume=PATH" not in str(error.value)
        assert "checkpoint.warm_start" in str(error.value)
    metrics = run_training(tmp_path / "other", longer, f"checkpoint.resume={unfinished}")
    assert metrics["train_batches"] == 30


def test_a_checkpoint_under_a_name_of_the_users_is_one_of_another_folder(run_training, tmp_path):
    run_training(tmp_path, kill_after=7)
    renamed = tmp_path / "checkpoints" / "good"
    (tmp_path / "checkpoints" / "step-00000005").rename(renamed)
    metrics = run_training(tmp_path, f"checkpoint.resume={renamed}")
    assert metrics["train_batches"] == 20
    assert renamed.exists()


def _resumed(caplog) -> list[str]:
    """Where each start since the last call began: the checkpoint, and its batch."""
    messages = [r.getMessage() for r in caplog.records if "resuming" in r.getMessage()]
    caplog.clear()
    return messages


def test_a_path_is_resumed_once_and_then_what_came_of_it(run_training, tmp_path, caplog):
    caplog.set_level(logging.INFO, "torchrec_hilomoe")
    run_training(tmp_path / "first")
    source = _checkpoints(tmp_path / "first")[0]  # of batch 15
    run, keep = tmp_path / "second", "training.stages.joint.epochs=3"
    overrides = (keep, f"checkpoint.resume={source}")
    run_training(run, *overrides, kill_after=7)
    run_training(run, *overrides, kill_after=3)
    starts = [message for message in _resumed(caplog) if "with changes" not in message]
    own = run / "checkpoints" / "step-00000020"
    assert starts == [f"resuming {source}, at batch 15", f"resuming {own}, at batch 20"]
    # Another training from that checkpoint is begun anew.
    run_training(run, *overrides, "optimizer.backbone.learning_rate=0.01", kill_after=3)
    assert f"resuming {source}, at batch 15" in _resumed(caplog)


def test_a_path_is_never_gone_back_from(run_training, tmp_path, caplog):
    """`last` moves on, and has moved on since it was given."""
    caplog.set_level(logging.INFO, "torchrec_hilomoe")
    run, keep = tmp_path / "run", ("checkpoint.keep_last=4", "training.stages.joint.epochs=3")
    last = f"checkpoint.resume={run}/checkpoints/last"
    run_training(run, *keep, kill_after=7)
    run_training(run, *keep, last, kill_after=6)  # writes 10
    run_training(run, *keep, kill_after=6)  # writes 15
    run_training(run, *keep, last, kill_after=1)
    starts = [message.rpartition(", at batch ")[2] for message in _resumed(caplog)]
    assert starts == ["5", "10", "15"]


@pytest.fixture
def start_torchrun(monkeypatch):
    """Makes the store in which torchrun keeps what outlives its workers."""
    stores = []

    def start() -> None:
        stores.append(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(stores[-1].port))

    return start


def test_never_begins_anew_once_in_a_launch(run_training, start_torchrun, tmp_path, caplog):
    caplog.set_level(logging.INFO, "torchrec_hilomoe")
    run_training(tmp_path)
    never = "checkpoint.resume=never"
    start_torchrun()
    run_training(tmp_path, never, kill_after=3)  # before its first save
    run_training(tmp_path, never, kill_after=7)
    assert _resumed(caplog) == []
    run_training(tmp_path, never, kill_after=7)
    assert _resumed(caplog) == [f"resuming {tmp_path}/checkpoints/step-00000005, at batch 5"]
    start_torchrun()
    run_training(tmp_path, never, kill_after=7)
    assert _resumed(caplog) == []


@pytest.mark.parametrize("key", ["checkpoint.warm_start", "checkpoint.resume"])
def test_a_path_that_is_no_checkpoint_is_refused_before_data_are_opened(
    run_training, tmp_path, monkeypatch, key
):
    def opened(*arguments, **options):
        raise AssertionError

    monkeypatch.setattr(run_module, "open_data", opened)
    (tmp_path / "other").mkdir()
    for path in ("/nowhere", tmp_path / "other"):
        with pytest.raises(ConfigError, match=rf"^{key}={path}: is no checkpoint of this library"):
            run_training(tmp_path / "run", f"{key}={path}")


def test_a_damaged_warm_start_is_named(run_training, tmp_path):
    run_training(tmp_path / "source", "training.max_train_batches=1")
    best = tmp_path / "source" / "checkpoints" / "best"
    next((best / "weights").glob("*.distcp")).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"^checkpoint.warm_start={best}: .*is damaged"):
        run_training(tmp_path / "run", f"checkpoint.warm_start={best}")


def test_a_run_goes_on_though_what_it_started_from_is_gone(
    run_training, start_torchrun, tmp_path, caplog
):
    caplog.set_level(logging.INFO, "torchrec_hilomoe")
    for resume in ("auto", "never"):
        run, source = tmp_path / resume, tmp_path / f"source of {resume}"
        run_training(source, "training.max_train_batches=1")
        start_torchrun()
        best = f"checkpoint.warm_start='{source / 'checkpoints' / 'best'}'"
        run_training(run, f"checkpoint.resume={resume}", best, kill_after=7)
        shutil.rmtree(source)
        _resumed(caplog)
        run_training(run, f"checkpoint.resume={resume}", best, kill_after=3)
        assert _resumed(caplog) == [f"resuming {run}/checkpoints/step-00000005, at batch 5"]


def test_schedule_and_patience_go_on_in_another_folder(run_training, tmp_path):
    """The best value stays that of the run; the links of the folder are to what is in it."""
    options = (
        "training.stages.joint.epochs=4",
        "training.schedule.name=plateau",
        "training.schedule.plateau_factor=0.5",
        "checkpoint.keep_last=99",
        "optimizer.tables.learning_rate=2",
    )
    whole = run_training(tmp_path / "whole", *options)
    *_, last = _checkpoints(tmp_path / "whole")
    expected = read_run(last).progress
    assert expected.plateau < 1
    for source in _checkpoints(tmp_path / "whole")[2:-1:2]:
        folder = tmp_path / source.name
        metrics = run_training(folder, *options, f"checkpoint.resume={source}")
        *_, last = _checkpoints(folder)
        progress = read_run(last).progress
        assert (progress.plateau, progress.since_best) == (expected.plateau, expected.since_best)
        assert progress.best == expected.best
        saved = read_run(folder / "checkpoints" / "best").progress
        assert saved.best_here == progress.best_here
        assert metrics["valid"]["auc"] == pytest.approx(saved.best_here, abs=1e-6)
        assert metrics["valid"]["auc"] <= whole["valid"]["auc"]
