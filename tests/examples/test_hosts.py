"""Ranks that differ as those of several hosts may: other settings, files, folders, numbers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.multirank]

ROOT = Path(__file__).resolve().parents[2]
#: sh replaces $RANK, so that each rank has an override of its own.
EACH = f"exec {sys.executable} {ROOT}/examples/train_dlrm_hilomoe.py"
TABULAR = (
    "data=tabular data.schema.label=clicked data.schema.categorical=[user,item] "
    "data.schema.dense=[price] data.batch_size=64 training=single_stage "
    "training.stages.joint.epochs=1 model.expert_width=10 model.plain_width=10"
)


@pytest.fixture
def launch(tmp_path: Path, write_clicks) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Two ranks with overrides of their own, after the files 0.csv and 1.csv were written."""
    write_clicks(tmp_path / "0.csv", 200, 0)
    write_clicks(tmp_path / "1.csv", 200, 1)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

    def run(overrides: str, environment: str = "") -> subprocess.CompletedProcess[str]:
        cache = f"TORCHREC_HILOMOE_CACHE={tmp_path}/cache$RANK OMP_NUM_THREADS=1"
        command = f"export {cache} {environment}; {EACH} {TABULAR} {overrides}"
        return subprocess.run(
            [*start, "--no-python", "sh", "-c", command],
            capture_output=True,
            text=True,
            timeout=240,
            cwd=tmp_path,
            check=False,
        )

    return run


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("data.train=0.csv seed=$RANK", "seed (0 on rank 0, 1 on rank 1): must be the same"),
        ("data.train=$RANK.csv", "on rank 1): must be the same on every rank; start all hosts"),
        ("data.train=0.csv output_dir=out$RANK", "all hosts share: rank 1 does not see in"),
    ],
)
def test_what_has_to_be_alike_is(launch, overrides: str, expected: str) -> None:
    run = launch(overrides)
    assert run.returncode
    assert expected in run.stderr
    assert "error on rank 0: " in run.stderr
    assert "error on rank 1: " in run.stderr


def test_hosts_of_unequal_numbers_of_ranks(launch) -> None:
    """Rank 0 takes its host for one of 1 rank, rank 1 for one of 2."""
    unequal = "LOCAL_WORLD_SIZE=$((RANK + 1))"
    refused = launch("data.train=0.csv sharding=table_row_wise output_dir=out", unequal)
    assert "sharding.type: table_row_wise needs as many ranks on every host" in refused.stderr
    assert not launch("data.train=0.csv output_dir=out", unequal).returncode


def test_a_run_goes_on_where_each_host_has_the_data_in_a_path_of_its_own(launch) -> None:
    for _ in ("begun", "finished, so that it only reports"):
        run = launch("data.train=copy$RANK.csv output_dir=out", "; cp 0.csv copy$RANK.csv")
        assert not run.returncode, run.stderr
