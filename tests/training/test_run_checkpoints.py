"""Which checkpoint `last` and `best` point to, and what is kept, over several starts of a run."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchrec_hilomoe.errors import CheckpointError, ConfigError
from torchrec_hilomoe.training import enter_stage, loop, parse_run_config, train
from torchrec_hilomoe.training.checkpoint import folder, run_checkpoints
from torchrec_hilomoe.training.interruption import TrainingInterrupted


class Died(Exception):  # noqa: N818 (no error)
    """The end of a process in a save."""


def _links(run) -> dict[str, str]:
    return {
        path.name: path.readlink().name
        for path in (run / "checkpoints").iterdir()
        if path.is_symlink()
    }


def _metrics(run) -> dict:
    metrics = json.loads((run / "metrics.json").read_text())
    return {k: v for k, v in metrics.items() if k not in ("output_dir", "train_samples_per_second")}


def test_links_that_a_dead_process_left_behind_are_moved_on(run_training, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        calls, point = itertools.count(1), folder._point

        def die(*arguments) -> None:
            if next(calls) == 2:  # of step 10, whole and the first best
                raise Died
            point(*arguments)

        patch.setattr(folder, "_point", die)
        with pytest.raises(Died):
            run_training(tmp_path / "run")
    assert _links(tmp_path / "run") == {"last": "step-00000005"}
    run_training(tmp_path / "run", kill_after=1)
    assert _links(tmp_path / "run") == {"last": "step-00000010", "best": "step-00000010"}
    run_training(tmp_path / "run")
    run_training(tmp_path / "whole")
    assert _metrics(tmp_path / "run") == _metrics(tmp_path / "whole")


def test_a_run_goes_on_in_the_stage_that_it_was_in(run_training, tmp_path):
    """With the random numbers and the statistics that it had there."""
    options = (
        "training=three_stage",
        "training.max_train_batches=6",
        "model.dropout=0.2",
        "model.batch_norm=true",
        "checkpoint.every_batches=4",
    )
    run_training(tmp_path / "run", *options, kill_after=10)
    assert _links(tmp_path / "run")["last"] == "step-00000008"
    run_training(tmp_path / "run", *options)
    run_training(tmp_path / "whole", *options)
    assert _metrics(tmp_path / "run") == _metrics(tmp_path / "whole")


def test_a_signal_before_the_first_batch_costs_nothing(run_training, tmp_path, monkeypatch):
    """The optimizers have no state then."""
    with monkeypatch.context() as patch:

        def enter_late(*arguments: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            enter_stage(*arguments)

        patch.setattr(loop, "enter_stage", enter_late)
        with pytest.raises(TrainingInterrupted):
            run_training(tmp_path / "run")
    assert _links(tmp_path / "run") == {"last": "step-00000000"}
    run_training(tmp_path / "run")
    run_training(tmp_path / "whole")
    assert _metrics(tmp_path / "run") == _metrics(tmp_path / "whole")


def test_half_of_a_checkpoint_is_removed_by_the_next_save(run_training, tmp_path):
    half = tmp_path / "checkpoints" / ".step-00000003.incomplete"
    (half / "weights").mkdir(parents=True)
    run_training(tmp_path, "training.max_train_batches=1")
    assert not half.exists()


def test_a_checkpoint_that_a_user_has_linked_to_is_kept(run_training, tmp_path):
    keep = "checkpoint.keep_last=1"
    run_training(tmp_path, keep, kill_after=7)
    (tmp_path / "checkpoints" / "mine").symlink_to("step-00000005")
    run_training(tmp_path, keep)
    kept = {path.name for path in (tmp_path / "checkpoints").glob("step-*")}
    assert kept == {"step-00000005", *_links(tmp_path).values()}
    assert "step-00000005" not in {_links(tmp_path)["best"], _links(tmp_path)["last"]}


def test_a_best_of_the_run_before_is_not_taken_for_that_of_a_new_one(run_training, tmp_path):
    run = tmp_path / "run"
    run_training(run, "training.stages.joint.epochs=3")
    assert int(_links(run)["best"][5:]) > 5
    # Saved once, before its first evaluation.
    run_training(run, "seed=1", "checkpoint.resume=never", kill_after=7)
    assert _links(run) == {"last": "step-00000005"}
    run_training(run, "seed=1")
    run_training(tmp_path / "whole", "seed=1")
    assert _metrics(run) == _metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    ("keep_last", "best"), [(100, "step-00000010"), (2, "step-00000020.1")], ids=["kept", "removed"]
)
def test_a_best_of_an_abandoned_branch_is_not_reported(run_training, tmp_path, keep_last, best):
    """The branch begins between the evaluations, at 10 and 20, and gets worse."""
    run, keep = tmp_path / "run", f"checkpoint.keep_last={keep_last}"
    run_training(run, keep)
    assert _links(run)["best"] == "step-00000020"
    branch = run / "checkpoints" / "step-00000015"
    worse = "optimizer.backbone.learning_rate=1"
    metrics = run_training(run, keep, worse, f"checkpoint.resume={branch}")
    assert _links(run) == {"last": "step-00000020.1", "best": best}
    saved = json.loads((run / "checkpoints" / best / "run.json").read_text())
    assert metrics["valid"]["auc"] == saved["progress"]["best_here"]


def test_a_start_that_is_refused_leaves_the_links_alone(run_training, tmp_path):
    run = tmp_path / "run"
    run_training(run, "checkpoint.keep_last=4")
    before = _links(run)
    assert before == {"last": "step-00000020", "best": "step-00000020"}
    stages = "training.stages={other:{train:[tables,backbone,experts,router],epochs:2}}"
    first = f"checkpoint.resume={run}/checkpoints/step-00000005"
    with pytest.raises(ConfigError, match="is in the stage 'joint', which is not among other"):
        run_training(run, "~training.stages.joint", f"+{stages}", first)
    assert _links(run) == before


def test_a_run_from_a_checkpoint_elsewhere_has_a_best_of_its_own(run_training, tmp_path):
    """Though it gets worse from there on."""
    run_training(tmp_path / "source")
    source = tmp_path / "source" / "checkpoints" / "step-00000015"
    run, worse = tmp_path / "run", "optimizer.backbone.learning_rate=1"
    metrics = run_training(run, worse, f"checkpoint.resume={source}")
    assert _links(run) == {"last": "step-00000020", "best": "step-00000020"}
    saved = json.loads((run / "checkpoints" / "best" / "run.json").read_text())
    assert metrics["valid"]["auc"] == saved["progress"]["best_here"]


def test_a_finished_run_from_elsewhere_is_reported_not_the_one_in_the_folder(
    run_training, tmp_path
):
    finished = run_training(tmp_path / "source")
    run_training(tmp_path / "run", "seed=1")
    source = tmp_path / "source" / "checkpoints" / "step-00000020"
    assert source.samefile(source.parent / "best")
    metrics = run_training(tmp_path / "run", f"checkpoint.resume={source}")
    assert metrics["valid"] == finished["valid"]


def test_a_disk_that_is_full_for_rank_0_alone_is_an_error_of_all(
    run_training, tmp_path, monkeypatch
):
    """What only rank 0 writes; the others learn of it by the same `CheckpointError`."""
    with monkeypatch.context() as patch:

        def full(*arguments) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(run_checkpoints, "write_run", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            run_training(tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("monitor", ["auc", "gauc", "logloss"])
def test_the_best_weights_are_best_in_what_is_monitored(run_training, tmp_path, monitor):
    # Rates so high that the three do not agree.
    rates = [f"optimizer.{part}.learning_rate=0.02" for part in ("tables", "backbone")]
    often = ["training.evaluations_per_epoch=5", "training.stages.joint.epochs=4"]
    metrics = run_training(tmp_path, *rates, *often, f"training.monitor={monitor}")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    best = {
        name: choose(events.Scalars(f"valid/{name}")[1:], key=lambda event: event.value)
        for name, choose in {"auc": max, "gauc": max, "logloss": min}.items()
    }
    assert len({event.step for event in best.values()}) == 3
    assert _links(tmp_path)["best"] == f"step-{best[monitor].step:08}"
    assert metrics["valid"][monitor] == pytest.approx(best[monitor].value)


def test_what_is_monitored_stays(run_training, tmp_path):
    run_training(tmp_path)
    first = f"checkpoint.resume={tmp_path}/checkpoints/step-00000015"
    with pytest.raises(ConfigError, match=r"training\.monitor \('auc' there, 'logloss' here\)"):
        run_training(tmp_path, first, "training.monitor=logloss")


@pytest.mark.parametrize("change", ["data.schema.group=null", "data.source=criteo_1tb"])
def test_a_grouped_auc_needs_a_group(run_training, tmp_path, change):
    with pytest.raises(ConfigError, match=r"^training\.monitor: gauc needs data\.schema\.group"):
        run_training(tmp_path, "training.monitor=gauc", change)


def test_a_monitored_metric_needs_rows_that_define_it(run_training, tmp_path):
    """A group of one row has one class alone."""
    with pytest.raises(ConfigError, match=r"^training\.monitor: gauc is not defined, no group of"):
        run_training(tmp_path, "training.monitor=gauc", "data.schema.group=price")


@pytest.fixture
def without_valid(device, write_clicks, tmp_path) -> dict[str, Any]:
    """A run on data without a valid split."""
    return {
        "data": {
            "train": str(write_clicks(tmp_path / "train.csv", 100, 0)),
            "schema": {"label": "clicked", "categorical": ["user", "item"]},
            "batch_size": 50,
            "cache_dir": str(tmp_path / "cache"),
        },
        "model": {"name": "dlrm_cat", "embedding_dim": 8},
        "training": {"stages": {"joint": {"batches": 3}}},
        "optimizer": {},
        "sharding": {},
        "seed": 0,
        "output_dir": str(tmp_path / "run"),
    }


def test_a_metric_is_monitored_on_valid(without_valid):
    without_valid["training"]["monitor"] = "logloss"
    with pytest.raises(ConfigError, match=r"^data\.valid: required by training\.monitor=logloss"):
        train(parse_run_config(without_valid))


@pytest.mark.parametrize(
    ("training", "key"),
    [
        ({"early_stopping_patience": 1}, r"training\.early_stopping_patience"),
        ({"schedule": {"name": "plateau"}}, r"training\.schedule\.name=plateau"),
    ],
)
def test_evaluations_that_something_waits_for_need_valid(without_valid, training, key):
    without_valid["training"].update(training)
    with pytest.raises(ConfigError, match=rf"^data\.valid: required by {key}, but not given"):
        train(parse_run_config(without_valid))


def test_without_valid_the_last_weights_are_the_best(without_valid, tmp_path):
    without_valid["checkpoint"] = {"every_batches": 1}
    metrics = train(parse_run_config(without_valid))
    assert metrics["valid"] is None
    assert _links(tmp_path / "run") == {"last": "step-00000003", "best": "step-00000003"}


def test_the_last_weights_are_taken_where_the_best_are_damaged(
    run_training, tmp_path, caplog, monkeypatch
):
    values = iter([0.5, 0.9, 0.1])  # the first comes before training
    monkeypatch.setattr(loop, "monitored", lambda metric, metrics: next(values))
    best = run_training(tmp_path)["valid"]["auc"]
    assert _links(tmp_path) == {"last": "step-00000020", "best": "step-00000010"}
    for path in (tmp_path / "checkpoints" / "best" / "weights").glob("*.distcp"):
        path.write_bytes(b"")
    metrics = run_training(tmp_path)
    assert "is damaged" in caplog.text
    assert "taking the last weights instead" in caplog.text
    assert metrics["valid"]["auc"] == metrics["stages"]["joint"]["valid_auc_after"] != best
