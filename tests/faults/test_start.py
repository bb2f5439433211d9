"""What a run may start from: its own checkpoint, a named one, another run's weights."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from worker import Fault

pytestmark = pytest.mark.faults


def test_another_run_in_the_same_folder_is_an_error(launch, undisturbed):
    for overrides, key in [
        (["seed=1"], "seed (0 there, 1 here)"),
        (["model.embedding_dim=4"], "model.embedding_dim"),
        (["training.stages.joint.epochs=2"], "training.stages.joint.epochs"),
    ]:
        codes, log = launch(undisturbed(1), *overrides, ranks=1)
        assert codes == [1]
        assert f"of another run: {key}" in log
        assert "checkpoint.resume=never" in log


@pytest.mark.slow
def test_never_begins_anew_and_replaces_what_is_there(
    launch, undisturbed, assert_same_run, tmp_path
):
    codes, log = launch(tmp_path, "seed=1", ranks=1, fault=Fault("batch", 30))
    assert codes == [-signal.SIGKILL], log
    codes, log = launch(tmp_path, "checkpoint.resume=never", ranks=1)
    assert codes == [0], log
    assert "resuming" not in log
    assert_same_run(tmp_path, undisturbed(1))


@pytest.mark.slow
def test_a_named_checkpoint_goes_on_with_another_training(launch, undisturbed, tmp_path):
    source = sorted((undisturbed(1) / "checkpoints").glob("step-*"))[4]
    codes, log = launch(
        tmp_path,
        f"checkpoint.resume={source}",
        "training.stages.joint.epochs=2",
        ranks=1,
    )
    assert codes == [0], log
    assert re.search("resuming with changes in .*training.stages.joint.epochs", log)
    assert json.loads((tmp_path / "metrics.json").read_text())["train_batches"] == 64


def test_the_last_and_the_best_are_kept(launch, undisturbed, tmp_path):
    codes, log = launch(tmp_path, "checkpoint.keep_last=3", ranks=1)
    assert codes == [0], log
    kept = {path.name for path in (tmp_path / "checkpoints").glob("step-*")}
    every = sorted(path.name for path in (undisturbed(1) / "checkpoints").glob("step-*"))
    best = (tmp_path / "checkpoints" / "best").resolve().name
    assert kept == {*every[-3:], best}
    assert (tmp_path / "checkpoints" / "last").resolve().name == every[-1]


@pytest.mark.slow
def test_warm_start_takes_the_weights_alone(launch, tmp_path):
    codes, log = launch(tmp_path / "source", "model=dlrm_cat", ranks=1)
    assert codes == [0], log
    best = tmp_path / "source" / "checkpoints" / "best"
    overrides = ["model=dlrm_cat", f"checkpoint.warm_start={best}", "seed=5"]
    codes, log = launch(tmp_path / "run", *overrides, ranks=2)
    assert codes == [0, 0], log
    source, run = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("source", "run")
    )
    assert run["train_batches"] == source["train_batches"]
    before = run["stages"]["warm_up"]["valid_auc_before"]
    assert before == pytest.approx(source["valid"]["auc"], abs=1e-4)


@pytest.mark.slow
def test_warm_start_reports_what_does_not_fit(launch, undisturbed, tmp_path):
    best = undisturbed(1) / "checkpoints" / "best"
    overrides = [f"checkpoint.warm_start={best}", "model.over_arch_layer_sizes=[6,8]"]
    codes, log = launch(tmp_path, *overrides, ranks=1)
    assert codes == [1]
    assert "missing: model.over_arch" in log
    assert "there, (6, 30) here" in log
    codes, log = launch(tmp_path, *overrides, "checkpoint.strict=false", ranks=1)
    assert codes == [0], log
    assert "warm start without what does not fit: missing: model.over_arch" in log
