"""What data and names can do to a run: overflow, nothing to learn, other vocabularies, paths."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.faults

ROWS = 512


def _write(path: Path, users: str = "abcdefghij", huge_row: int | None = None) -> list[str]:
    """Writes clicks on ten users and two prices; returns the overrides that read them."""
    random_ = random.Random(3)
    lines = ["label,price,stars,user,item"]
    for row in range(ROWS):
        user = users[row % 10] if row < 10 else random_.choice(users)
        price = -3e38 if row == huge_row else random_.random()
        label = int(random_.random() < 0.2 + 0.06 * users.index(user))
        lines.append(f"{label},{price},{random_.random()},{user},{random_.randrange(20)}")
    path.write_text("\n".join(lines) + "\n")
    return [
        "data=tabular",
        f"data.train={path}",
        f"data.valid={path}",
        "data.schema.dense=[price,stars]",
        "data.schema.categorical=[user,item]",
    ]


@pytest.mark.multirank
@pytest.mark.parametrize("sharding", ["row_wise", "data_parallel"])
def test_one_policy_ends_the_run_and_the_other_goes_on_without_the_batch(
    launch, tmp_path, sharding
):
    """The row is on one rank; both leave its batch out, once in each of three epochs."""
    clean = _write(tmp_path / "clean.csv")
    huge = _write(tmp_path / "huge.csv", huge_row=300)
    huge[2] = clean[2]  # what is evaluated is finite
    # Dot products of huge numbers overflow.
    huge += ["model=dlrm", "training=single_stage", f"sharding={sharding}"]
    run = tmp_path / "run"
    codes, log = launch(run, *huge)
    assert codes == [1, 1], log
    assert log.count("or a gradient is not finite") == 2
    codes, log = launch(run, *huge, "training.on_non_finite=skip")
    assert codes == [0, 0], log
    assert "resuming" in log
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["skipped_batches"] == 3
    assert metrics["valid"]["auc"] > 0.6
    assert len(list((run / "non_finite").glob("*-rank*.pt"))) == 6


def test_predictions_that_are_all_equal_are_warned_about(launch, tmp_path):
    path = tmp_path / "clicks.csv"
    path.write_text("label,user\n" + "1,a\n0,a\n" * (ROWS // 2))
    overrides = ["data=tabular", f"data.train={path}", f"data.valid={path}"]
    codes, log = launch(tmp_path / "run", *overrides, "data.schema.categorical=[user]", ranks=1)
    assert codes == [0], log
    assert "all predictions are equal" in log


def test_other_vocabularies_of_the_same_sizes_are_another_run(launch, tmp_path):
    overrides = _write(tmp_path / "clicks.csv")
    codes, log = launch(tmp_path / "run", *overrides, "training.max_train_batches=2", ranks=1)
    assert codes == [0], log
    _write(tmp_path / "clicks.csv", users="klmnopqrst")
    codes, log = launch(tmp_path / "run", *overrides, "training.max_train_batches=2", ranks=1)
    assert codes == [1]
    assert "of another run: encoder" in log


@pytest.mark.multirank
def test_batch_norms_are_of_both_ranks_without_a_valid_split(launch, tmp_path, read_tensors):
    """One step from equal weights: the mean over a batch does not depend on who has its rows."""
    overrides = [o for o in _write(tmp_path / "clicks.csv") if not o.startswith("data.valid=")]
    overrides += ["model=dlrm", "training=single_stage", "training.max_train_batches=1"]
    overrides += ["model.batch_norm=true", "model.dropout=0"]
    means = []
    for ranks in (1, 2):
        codes, log = launch(tmp_path / str(ranks), *overrides, ranks=ranks)
        assert codes == [0] * ranks, log
        state = read_tensors(tmp_path / str(ranks) / "checkpoints" / "best")
        means.append(state["model.model.over_arch.model.1.running_mean"])
    assert means[0].abs().max() > 1e-3
    torch.testing.assert_close(means[1], means[0])


def test_names_in_a_configuration_lead_nowhere_out_of_the_output_folder(launch, tmp_path):
    escape = "../../escape"
    overrides = _write(tmp_path / "clicks.csv")
    values = [
        f"data.name={escape}",
        f"+training.stages={{{escape}:{{batches:2}}}}",
        "data.schema.categorical=[user,{name:item,hash_size:30}]",
    ]
    before = set(tmp_path.rglob("*"))
    codes, log = launch(tmp_path / "run", *overrides, *values, "training=single_stage", ranks=1)
    assert codes == [0], log
    assert escape in (tmp_path / "run" / "checkpoints" / "last" / "run.json").read_text()
    run = tmp_path / "run"
    assert set(tmp_path.rglob("*")) - before == {run, *run.rglob("*")}
