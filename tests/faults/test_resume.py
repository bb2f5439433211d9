"""An interrupted and resumed run is the undisturbed one, bit for bit."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import sklearn.metrics

sys.path.insert(0, str(Path(__file__).parent))
from worker import Fault

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("step", [3, 30], ids=lambda step: f"batch{step}")
def test_sigterm_saves_and_the_next_start_resumes(
    launch, undisturbed, assert_same_run, tmp_path, step
):
    codes, log = launch(tmp_path, ranks=1, fault=Fault("batch", step, signal=signal.SIGTERM))
    assert codes == [143], log
    assert "SIGTERM" in log
    codes, log = launch(tmp_path, ranks=1)
    assert codes == [0], log
    assert_same_run(tmp_path, undisturbed(1))


@pytest.mark.slow
@pytest.mark.parametrize("point", ["batch", "evaluation", "save: tensors"])
def test_a_signal_to_one_rank_ends_both_and_they_resume(
    launch, undisturbed, assert_same_run, tmp_path, point
):
    number = signal.SIGINT if point == "batch" else signal.SIGTERM
    codes, log = launch(tmp_path, fault=Fault(point, 6, (1,), number))
    assert codes == [128 + number] * 2, log
    codes, log = launch(tmp_path)
    assert codes == [0, 0], log
    assert_same_run(tmp_path, undisturbed(2))


def test_saves_leave_no_trace_in_the_training(launch, undisturbed, tmp_path, assert_same_run):
    """Rank 0's clock pauses the training at other batches than every_batches does."""
    codes, log = launch(
        tmp_path, "checkpoint.every_batches=null", "checkpoint.every_minutes=0.003", ranks=1
    )
    assert codes == [0], log
    assert_same_run(tmp_path, undisturbed(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer=adam_dense", "optimizer.tables.l2=0.01", "sharding=auto"),
        ("optimizer=adam_dense", "sharding=table_wise", "model.batch_norm=true"),
        ("optimizer.tables.name=adagrad", "sharding=column_wise"),
        ("sharding=column_wise", "training.schedule.name=plateau"),
        ("sharding=data_parallel", "optimizer.backbone.name=sgd"),
        ("training=single_stage", "model=dcn", "training.schedule.name=cosine"),
        ("model=hilomoe_mlp", "training.early_stopping_patience=1"),
        ("data.num_workers=1", "training.evaluations_per_epoch=1"),
    ],
    ids=lambda overrides: ",".join(overrides),
)
def test_whatever_the_optimizers_and_plans(launch, tmp_path, assert_same_run, overrides):
    codes, log = launch(tmp_path / "whole", *overrides)
    assert codes == [0, 0], log
    fault = Fault("batch", 23, (0, 1), signal.SIGKILL)
    codes, log = launch(tmp_path / "resumed", *overrides, fault=fault)
    assert -signal.SIGKILL in codes, log
    codes, log = launch(tmp_path / "resumed", *overrides)
    assert codes == [0, 0], log
    assert "resuming" in log
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_in_the_last_evaluation_ends_the_run_and_it_is_repeated(
    launch, undisturbed, assert_same_run, tmp_path
):
    """Seven evaluations of four batches, each with a call that finds the end, come before it."""
    codes, log = launch(tmp_path, fault=Fault("evaluation", 7 * 5 + 2, (1,), signal.SIGTERM))
    assert codes == [143, 143], log
    assert not (tmp_path / "metrics.json").exists()
    codes, log = launch(tmp_path, fault=Fault("batch", 1))
    assert codes == [0, 0], log
    assert_same_run(tmp_path, undisturbed(2))


def test_a_finished_run_in_another_folder_reports_the_checkpoint_it_is_given(
    launch, undisturbed, tmp_path
):
    source = sorted((undisturbed(1) / "checkpoints").glob("step-*"))[-1]
    codes, log = launch(tmp_path / "run", f"checkpoint.resume={source}", ranks=1)
    assert codes == [0], log
    codes, log = launch.score(source, tmp_path / "scores.parquet", "row_wise", ranks=1)
    assert codes == [0], log
    scores = pq.read_table(tmp_path / "scores.parquet")
    expected = sklearn.metrics.log_loss(scores["label"], scores["prediction"])
    actual = json.loads((tmp_path / "run" / "metrics.json").read_text())["valid"]["logloss"]
    assert actual == pytest.approx(expected, abs=1e-6)


def test_a_finished_run_reports_the_cost_of_the_model_as_it_ended(launch, tmp_path):
    without = ["training=single_stage", "training.stages.joint.experts=false"]
    without += ["training.stages.joint.train=[tables,backbone]", "training.max_train_batches=2"]
    metrics = []
    for _ in range(2):
        codes, log = launch(tmp_path, *without, ranks=1)
        assert codes == [0], log
        metrics.append(json.loads((tmp_path / "metrics.json").read_text()))
    assert metrics[1] == metrics[0]


def test_a_finished_run_only_reports(launch, undisturbed, assert_same_run, tmp_path):
    codes, log = launch(tmp_path, ranks=1)
    assert codes == [0], log
    before = (tmp_path / "metrics.json").read_text()
    codes, log = launch(tmp_path, ranks=1, fault=Fault("batch", 1))
    assert codes == [0], log
    assert (tmp_path / "metrics.json").read_text() == before
