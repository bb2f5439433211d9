"""The main job as a user runs it: three stages on one and two ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = [pytest.mark.slow, pytest.mark.multirank]

THREE_STAGES = [
    "data.batch_size=1000",
    "data.synthetic.train_rows=20000",
    *(f"training.stages.{stage}.batches=17" for stage in ("warm_up", "specialise", "joint")),
    *(f"training.stages.{stage}.epochs=null" for stage in ("warm_up", "specialise", "joint")),
]
CONF_MODELS = Path(__file__).parents[2] / "conf" / "model"
VARYING = ("output_dir", "train_samples_per_second")


def _scalars(folder, name):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars(name)]


@pytest.fixture(scope="module")
def runs(launch, small, tmp_path_factory):
    """The same run on one rank, once more on one rank, and on two."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: (
            launch(*small, *THREE_STAGES, f"output_dir={folder / name}", ranks=ranks),
            folder / name,
        )
        for name, ranks in (("one", 1), ("again", 1), ("two", 2))
    }


def test_last_line_is_metrics_json(runs):
    run, folder = runs["two"]
    assert run.result == json.loads((folder / "metrics.json").read_text())
    result = run.result
    assert result["model"] == "hilomoe"
    assert result["world_size"] == 2
    assert result["train_batches"] == 51
    assert result["valid"]["samples"] == result["test"]["samples"] == 2000
    assert result["valid"]["auc"] > 0.55
    assert result["valid"]["bayes_auc"] > result["valid"]["auc"]
    assert 1 < result["dense_flops_per_sample"] / result["dense_parameters"] < 3
    assert list(result["stages"]) == ["warm_up", "specialise", "joint"]
    stages = result["stages"]
    assert stages["warm_up"]["valid_auc_after"] == stages["specialise"]["valid_auc_before"]
    assert stages["joint"]["valid_auc_after"] > stages["warm_up"]["valid_auc_before"]
    assert stages["warm_up"]["experts"] == {}
    for stage in ("specialise", "joint"):
        (health,) = stages[stage]["experts"].values()
        assert 0 < health["paths"] <= health["possible_paths"]


def test_output_folder(runs):
    _, folder = runs["two"]
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "checkpoints",
        "config.yaml",
        "metrics.json",
        "tensorboard",
    }
    assert (folder / "checkpoints" / "best" / "model.json").is_file()
    assert (folder / "checkpoints" / "last" / "model.json").is_file()
    assert "num_experts: 4" in (folder / "config.yaml").read_text()


def test_a_run_that_may_not_begin_leaves_the_folder_alone(launch, small, runs):
    _, folder = runs["one"]
    before = (folder / "config.yaml").read_text()
    refused = launch(*small, *THREE_STAGES, "seed=1", f"output_dir={folder}")
    assert refused.code == 1
    assert "of another run: seed" in refused.stderr
    assert (folder / "config.yaml").read_text() == before


def test_one_folder_takes_one_run_at_a_time(launch, small, tmp_path):
    with FileLock(tmp_path / ".lock"):
        refused = launch(*small, f"output_dir={tmp_path}", ranks=2)
    assert refused.code == 1
    assert refused.stderr.count(f"another run is writing to {tmp_path}") == 2
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_same_seed_gives_identical_metrics(runs):
    first, second = (
        {key: value for key, value in runs[name][0].result.items() if key not in VARYING}
        for name in ("one", "again")
    )
    assert first == second


def test_two_ranks_agree_with_one(runs):
    for name in ("train/loss", "train/auxiliary_loss"):
        one, two = (_scalars(runs[run][1], name) for run in ("one", "two"))
        assert len(one) == 51
        assert one == pytest.approx(two, abs=1e-4)
    auxiliary = _scalars(runs["one"][1], "train/auxiliary_loss")
    assert set(auxiliary[:17]) == {0.0}
    assert min(auxiliary[17:]) > 0


def test_no_pipelining_is_lost(runs):
    assert "NOT be pipelined" not in runs["two"][0].stderr


UNTRACEABLE = """
from torch import fx
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec_hilomoe.models import SparseArch

@fx.wrap
def double(features):
    return KeyedJaggedTensor(features.keys(), features.values() * 1, lengths=features.lengths())

plain = SparseArch.forward
SparseArch.forward = lambda self, features: plain(self, double(features))
"""


def test_a_lookup_that_cannot_be_pipelined_is_told(launch, small, tmp_path):
    (tmp_path / "untraceable.py").write_text(UNTRACEABLE)
    run = launch(
        *small,
        "plugins=[untraceable]",
        "training=single_stage",
        "training.max_train_batches=2",
        f"output_dir={tmp_path / 'out'}",
        PYTHONPATH=str(tmp_path),
    )
    assert run.code == 0, run.stderr[-4000:]
    assert "NOT be pipelined" in run.stderr


def test_multirun_over_all_models(launch, small, tmp_path):
    """Bags of several ids and dense features; every model through the same loop."""
    models = ",".join(sorted(path.stem for path in CONF_MODELS.glob("[!_]*.yaml")))
    run = launch(
        "--multirun",
        f"model={models}",
        *(option for option in small if "num_experts" not in option),
        "training.max_train_batches=3",
        f"output_dir={tmp_path}",
        timeout=600,
    )
    assert run.code == 0, run.stderr[-4000:]
    for number, model in enumerate(models.split(",")):
        metrics = json.loads((tmp_path / str(number) / "metrics.json").read_text())
        assert metrics["model"] == model
        assert 0 < metrics["valid"]["auc"] < 1


def test_a_job_that_fails_leaves_the_others_of_a_multirun(launch, small, tmp_path):
    run = launch(
        "--multirun",
        "model.embedding_dim=6,8",
        *small,
        "training.max_train_batches=2",
        f"output_dir={tmp_path}",
    )
    assert run.code == 1
    assert "error on rank 0, job 0: model.embedding_dim: " in run.stderr
    assert "Traceback" not in run.stderr
    assert (tmp_path / "1" / "metrics.json").exists()


CALLBACK = """
import json
from hydra.experimental.callback import Callback

class Record(Callback):
    def __init__(self, path): self.path = path
    def on_job_end(self, config, job_return, **kwargs):
        with open(self.path, "a") as file: print(json.dumps(job_return.return_value), file=file)
"""


def test_sweepers_are_given_what_is_monitored_on_valid(launch, small, tmp_path):
    """What Hydra's sweepers get of each job, here read by a callback of Hydra."""
    (tmp_path / "recording.py").write_text(CALLBACK)
    run = launch(
        "--multirun",
        "+hydra.callbacks.record._target_=recording.Record",
        f"+hydra.callbacks.record.path={tmp_path}/values",
        "training.monitor=auc,logloss",
        *small,
        "training.max_train_batches=2",
        f"output_dir={tmp_path}/runs",
        PYTHONPATH=str(tmp_path),
    )
    assert run.code == 0, run.stderr[-4000:]
    values = [json.loads(line) for line in (tmp_path / "values").read_text().splitlines()]
    metrics = [json.loads((tmp_path / "runs" / n / "metrics.json").read_text()) for n in "01"]
    assert values == [metrics[0]["valid"]["auc"], metrics[1]["valid"]["logloss"]]


def test_a_folder_that_hydra_would_not_write_to_is_refused(launch, small, tmp_path):
    """A run's own config.yaml, say, has no settings of Hydra, and so not the folder either."""
    run = launch(*small, f"output_dir={tmp_path / 'a'}", f"hydra.run.dir={tmp_path / 'b'}")
    assert run.code == 1
    assert f"not heeded, since hydra.run.dir or hydra.sweep.dir is {tmp_path / 'b'}" in run.stderr


def test_hydra_repeats_a_run(launch, small, tmp_path):
    pickled = "hydra.experimental.callbacks.PickleJobInfoCallback"
    first = launch(
        f"+hydra.callbacks.pickle._target_={pickled}",
        "hydra.output_subdir=.hydra",
        "checkpoint.resume=never",
        *small,
        "training.max_train_batches=2",
        f"output_dir={tmp_path}",
    )
    again = launch("--experimental-rerun", str(tmp_path / ".hydra" / "config.pickle"))
    assert "resuming" not in again.stderr
    for key, value in first.result.items():
        assert key in VARYING or again.result[key] == value


def test_replicated_tables_train_without_warnings(launch, small):
    run = launch(*small, "training.max_train_batches=2", "optimizer=adam_dense")
    assert run.code == 0, run.stderr[-4000:]
    assert "Sharding spec not found" not in run.stderr
    assert "UserWarning" not in run.stderr


def test_multirun_under_torchrun(launch, small, tmp_path):
    run = launch(
        "--multirun",
        "seed=0,1",
        *small,
        "training.max_train_batches=2",
        f"output_dir={tmp_path}",
        ranks=2,
    )
    assert run.code == 0, run.stderr[-4000:]
    for number in (0, 1):
        folder = tmp_path / str(number)
        assert json.loads((folder / "metrics.json").read_text())["seed"] == number
        assert f"output_dir: {folder}\n" in (folder / "config.yaml").read_text()


def test_default_output_folder_is_one_for_all_ranks(launch, small):
    run = launch(*small, "training.max_train_batches=1", "training=single_stage", ranks=2)
    folder = Path(run.result["output_dir"])
    assert folder.parent.name == "outputs"
    # Two launches may start within a second.
    assert re.fullmatch(r"[\d-]{10}_[\d-]{8}-[0-9a-f]{6}", folder.name)
    assert run.stdout.count('{"model"') == 1
