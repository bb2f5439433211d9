"""Which checkpoint `last` and `best` point to, and what is kept, over several starts of a run."""

from __future__ import annotations

import errno
import itertools
import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchrec_hilomoe.errors import CheckpointError, ConfigError
from torchrec_hilomoe.training import parse_run_config, train
from torchrec_hilomoe.training.checkpoint import folder, run_checkpoints


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


def test_a_metric_is_monitored_on_valid(device, write_clicks, tmp_path):
    values = {
        "data": {
            "train": str(write_clicks(tmp_path / "train.csv", 100, 0)),
            "schema": {"label": "clicked", "categorical": ["user", "item"]},
            "batch_size": 50,
            "cache_dir": str(tmp_path / "cache"),
        },
        "model": {"name": "dlrm_cat", "embedding_dim": 8},
        "training": {"stages": {"joint": {"batches": 1}}, "monitor": "logloss"},
        "optimizer": {},
        "sharding": {},
        "seed": 0,
        "output_dir": str(tmp_path / "run"),
    }
    with pytest.raises(ConfigError, match=r"^data\.valid: required by training\.monitor=logloss"):
        train(parse_run_config(values))
