"""One rank and two, under every sharding type: the same losses, the same predictions."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parent))
from worker import Fault

pytestmark = [pytest.mark.multirank, pytest.mark.faults, pytest.mark.slow]

# Row-wise Adagrad has a state for each row and shard: splitting columns changes it.
SGD = ("optimizer.tables.name=sgd", "optimizer.tables.learning_rate=1.0")
SUM = "data.schema.multi_valued=[{name:interests,separator:null,pooling:sum}]"
WIDE = "model.embedding_dim=256"  # columns are split into pieces of at least 128
# A bag is summed in another order where its rows are on several ranks.
NO_BAGS = "data.schema.multi_valued=[]"
TYPES = [
    ("auto",),
    ("table_wise",),
    ("row_wise",),
    ("table_row_wise",),
    ("column_wise", *SGD, WIDE),
    ("table_column_wise", *SGD, WIDE),
    ("grid_shard", *SGD, SUM, WIDE),
    ("data_parallel",),
    ("data_parallel", "optimizer=adam_dense"),
    ("table_wise", "optimizer=adam_dense"),
]
# Strong enough to be compared: the default's few thousandths would hide an error.
AUXILIARY = [
    f"training.stages.{stage}.auxiliary.{weight}"
    for stage in ("specialise", "joint")
    for weight in ("load_balance=0.01", "z_loss=0.001")
]
RESHARDED = ("model.dropout=0", *SGD, WIDE, NO_BAGS)


def _losses(run: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return {
        name: [event.value for event in events.Scalars(f"train/{name}")]
        for name in ("loss", "auxiliary_loss")
    }


@pytest.mark.parametrize("sharding", TYPES, ids=",".join)
def test_losses_of_one_rank_and_two(launch, tmp_path, sharding):
    type_, *optimizer = sharding
    common = [
        *optimizer,
        *AUXILIARY,
        "model.dropout=0",
        "training.log_every=1",
        "checkpoint.every_batches=null",
    ]
    for ranks in (1, 2):
        run = tmp_path / str(ranks)
        codes, log = launch(run, f"sharding={type_}", *common, ranks=ranks)
        assert codes == [0] * ranks, log
    assert type_ == "auto" or f", {type_};" in log, "the plan has another type"
    one, two = _losses(tmp_path / "1"), _losses(tmp_path / "2")
    assert len(one["loss"]) == 48
    assert max(one["auxiliary_loss"]) > 0.01
    for name, values in one.items():
        assert two[name] == pytest.approx(values, abs=1e-5), name


@pytest.fixture(scope="module")
def killed(launch, tmp_path_factory) -> Path:
    """A run of two ranks without dropout, killed in its second stage."""
    run = tmp_path_factory.mktemp("killed")
    codes, log = launch(run, *RESHARDED, fault=Fault("batch", 25, (0, 1)))
    assert -signal.SIGKILL in codes, log
    return run


@pytest.mark.parametrize(
    ("ranks", "type_"),
    [(1, "row_wise"), (2, "table_wise"), (2, "column_wise"), (2, "table_row_wise")],
)
def test_a_run_goes_on_at_another_world_size_and_sharding(launch, killed, tmp_path, ranks, type_):
    codes, log = launch(tmp_path / "whole", *RESHARDED)
    assert codes == [0, 0], log
    run = tmp_path / "resumed"
    shutil.copytree(killed, run, symlinks=True)
    codes, log = launch(run, *RESHARDED, f"sharding={type_}", ranks=ranks)
    assert codes == [0] * ranks, log
    assert "resuming" in log
    actual, expected = (
        json.loads((folder / "metrics.json").read_text()) for folder in (run, tmp_path / "whole")
    )
    assert actual["valid"]["logloss"] == pytest.approx(expected["valid"]["logloss"], abs=1e-5)
    assert actual["train_batches"] == expected["train_batches"]


def test_predictions_are_the_same_bits_under_every_plan(launch, killed, tmp_path):
    scores = {}
    for ranks, type_ in [(2, "row_wise"), (1, "row_wise"), (2, "table_wise"), (2, "column_wise")]:
        out = tmp_path / f"{ranks}{type_}.parquet"
        codes, log = launch.score(killed / "checkpoints" / "last", out, type_, ranks)
        assert codes == [0] * ranks, log
        scores[ranks, type_] = pq.read_table(out)["prediction"].to_pylist()
    reference = scores.pop((2, "row_wise"))
    assert len(set(reference)) > 100
    assert all(score == reference for score in scores.values())


def test_row_wise_adagrad_does_not_change_between_rows_and_columns(launch, tmp_path):
    """Its state under column types depends on the plan; the error says what to do."""
    codes, log = launch(tmp_path, WIDE, fault=Fault("batch", 25, (0, 1)))
    assert -signal.SIGKILL in codes, log
    codes, log = launch(tmp_path, WIDE, "sharding=column_wise")
    assert codes == [1, 1], log
    assert "checkpoint.warm_start" in log
