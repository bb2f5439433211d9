from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "training.py"
SMALL = (
    "data.synthetic.train_rows=4000",
    "data.synthetic.valid_rows=500",
    "data.synthetic.test_rows=500",
    "data.batch_size=64",
    "model.embedding_dim=4",
)


def _measure(models: str, tmp_path: Path, *overrides: str, ranks: int = 1) -> tuple[str, dict]:
    """Runs the benchmark; returns what it printed and its results."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    results_file = tmp_path / "results.json"
    options = ("--quick", "--models", models, "--json", str(results_file))
    done = subprocess.run(
        [*start, str(SCRIPT), *options, *SMALL, *overrides],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHREC_HILOMOE_CACHE": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout, json.loads(results_file.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.multirank)])
def test_measures_every_stage(ranks, tmp_path) -> None:
    printed, results = _measure("hilomoe,dlrm_cat", tmp_path, ranks=ranks)
    for key in ("stage2_over_stage3_step", "hilomoe_over_dlrm_cat_step", "loader_over_training"):
        assert results[key] > 0
        assert f"`{key}`" in printed
    assert set(results["cases"]) == {
        "hilomoe/warm_up", "hilomoe/specialise", "hilomoe/joint",
        "dlrm_cat/warm_up", "dlrm_cat/joint",
    }  # fmt: skip
    assert results["encoded_rows_per_second"] > 0
    for case in results["cases"].values():
        assert sum(case["time_share"].values()) == pytest.approx(1.0, abs=1e-3)
        assert case["time_share"]["lookup"] > 0
        assert case["time_share"]["optimizer"] > 0
        assert case["step_peak_mb"] > 0
    # Neither optimizer state nor gradients of what is frozen.
    frozen, joint = (results["cases"][f"hilomoe/{stage}"] for stage in ("specialise", "joint"))
    assert frozen["state_mb"] < joint["state_mb"]
    assert frozen["step_peak_mb"] < joint["step_peak_mb"]


@pytest.mark.slow
def test_work_of_the_loader_s_processes_counts(tmp_path) -> None:
    _, results = _measure("dlrm", tmp_path, "data.num_workers=1")
    assert results["run"]["clock"] == "wall"  # the CPU clock is that of this process alone
    case = results["cases"]["dlrm/joint"]
    assert case["ms"] == pytest.approx(results["wall_ms"]["dlrm/joint"]["median"], abs=0.01)


def test_time_belongs_to_the_innermost_range_with_a_part(load) -> None:
    def step() -> None:
        with torch.profiler.record_function("[lookup]_tables"):
            torch.randn(300, 300) @ torch.randn(300, 300)

    seconds = load("profiles").time_split(step, several_ranks=False)
    assert seconds["lookup"] > 0.9 * sum(seconds.values())


def test_every_model_of_conf_is_measured(load) -> None:
    names = load("runs").model_names()
    assert {"hilomoe", "dlrm_cat"} <= set(names)
    assert not any(name.startswith("_") for name in names)
