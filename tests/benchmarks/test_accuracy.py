"""The accuracy benchmark: its plan is valid, finished runs stay finished, the report adds up."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pyarrow import csv as pyarrow_csv
from pyarrow import parquet
from scipy import stats

from torchrec_hilomoe.models import parse_model_config

ROOT = Path(__file__).parents[2]
PLAN = """
trials: 3
seeds: [0, 1]
models:
  dlrm_cat:
    overrides: [model=dlrm_cat]
    space: {model.over_arch_layer_sizes: ["[4]", "[4, 4]"]}
  hilomoe:
    overrides:
      - model=hilomoe
      - model.expert_width=10
      - model.plain_width=10
      - plugins=[routing_variants] # of benchmarks/, where the runner has to look
    space: {model.num_experts: [2]}
data:
  synthetic:
    overrides: [data.synthetic.train_rows=3000, training.max_train_batches=2]
    space: {model.dropout: [0.0, 0.2]}
    variants:
      flat: {of: hilomoe, overrides: [model.num_layers=1]}
      shipped: {overrides: [model=dlrm]}
"""


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    return path


@pytest.mark.parametrize("name", ["accuracy", "ablations"])
def test_planned_runs_compose(load, name: str) -> None:
    plan = load("accuracy_plan").load_plan(ROOT / "benchmarks" / f"{name}.yaml")
    assert plan.entries
    load("routing_variants")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for entry in plan.entries:
            choices = [f"{key}={values[-1]}" for key, values in entry.space.items()]
            config = compose("config", [*entry.overrides, *choices, *entry.variant])
            parse_model_config(OmegaConf.to_container(config.model, resolve=True))


def test_variants_take_over_the_choices_of_their_model(load, plan) -> None:
    entries = {entry.name: entry for entry in load("accuracy_plan").load_plan(plan).entries}
    assert set(entries) == {
        "synthetic/dlrm_cat",
        "synthetic/hilomoe",
        "synthetic/flat",
        "synthetic/shipped",
    }
    flat = entries["synthetic/flat"]
    assert flat.of == "synthetic/hilomoe"
    assert flat.overrides == entries["synthetic/hilomoe"].overrides
    assert flat.variant == ["model.num_layers=1"]
    assert entries["synthetic/dlrm_cat"].space == {
        "model.dropout": ["0.0", "0.2"],
        "model.over_arch_layer_sizes": ["[4]", "[4,4]"],
    }


def test_table_counts_only_trials_within_the_space(load, plan, tmp_path: Path) -> None:
    entry = load("accuracy_plan").load_plan(plan).entries[0]
    table = load("accuracy_runs").RunTable(tmp_path / "runs.csv")
    for dropout, sizes, auc in (("0.0", "[4]", 0.6), ("0.2", "[4,4]", 0.7), ("0.2", "[9]", 0.9)):
        overrides = [f"model.dropout={dropout}", f"model.over_arch_layer_sizes={sizes}"]
        table.append(_row(load, entry, "trial", overrides, auc))
    again = load("accuracy_runs").RunTable(tmp_path / "runs.csv")
    assert [auc for _, auc in again.trials(entry)] == [0.6, 0.7]
    assert again.best_trial(entry) == ["model.dropout=0.2", "model.over_arch_layer_sizes=[4,4]"]


def test_carved_halves_are_the_valid_file(load, tmp_path: Path) -> None:
    valid = tmp_path / "valid.csv"
    valid.write_text("label,user\n" + "".join(f"{i % 2},{i}\n" for i in range(101)))
    paths = [[tmp_path / work / half for half in ("valid", "test")] for work in ("a", "b")]
    for halves in paths:
        load("accuracy_runs").carve(valid, halves)
    first, second = ([parquet.read_table(path) for path in halves] for halves in paths)
    assert first == second
    users = [set(half["user"].to_pylist()) for half in first]
    assert [len(half) for half in users] == [51, 50]
    assert users[0] | users[1] == set(pyarrow_csv.read_csv(valid)["user"].to_pylist())


def test_a_carving_that_was_cut_off_leaves_no_half(load, tmp_path: Path, monkeypatch) -> None:
    runs, half = load("accuracy_runs"), tmp_path / "half.parquet"
    (tmp_path / "valid.csv").write_text("label\n1\n0\n")

    def cut_off(rows, path) -> None:
        path.write_bytes(b"PAR1")
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.parquet, "write_table", cut_off)
    with pytest.raises(KeyboardInterrupt):
        runs.carve(tmp_path / "valid.csv", [half])
    assert not half.exists()


def test_tuning_sees_a_sample_and_no_test_rows(load, tmp_path: Path) -> None:
    for name in ("train", "valid"):
        (tmp_path / f"{name}.csv").write_text("label,user\n" + "1,2\n0,3\n" * 40)
    runs, files = load("accuracy_runs"), {"train": "train.csv", "valid": "valid.csv"}
    entry = load("accuracy_plan").Entry("shop", "m", files, [], tune_rows=30)
    runner = runs.Runner(runs.RunTable(tmp_path / "r.csv"), tmp_path, tmp_path, float("inf"))
    tuning = dict(override.split("=") for override in runner._files(entry, with_test=False))
    seed = dict(override.split("=") for override in runner._files(entry, with_test=True))
    assert parquet.read_table(tuning["data.train"]).num_rows == 30
    assert set(tuning) == {"data.train", "data.valid"}
    assert seed["data.train"] == str(tmp_path / "train.csv")
    assert set(seed) == {"data.train", "data.valid", "data.test"}


@pytest.mark.slow
def test_runs_once_and_goes_on_when_started_again(plan, tmp_path: Path) -> None:
    runs = tmp_path / "runs.csv"

    def start(*arguments: str) -> str:
        command = [sys.executable, "benchmarks/accuracy.py", "--plan", plan, "--runs", runs]
        done = subprocess.run(
            [*command, "--work", tmp_path / "work", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"TORCHREC_HILOMOE_CACHE": str(tmp_path / "cache")},
        )
        return done.stdout

    start("--only", "synthetic/hilomoe")
    assert "synthetic/hilomoe: 0 of 4 runs left" in start("--dry-run")
    start("--only", "*/hilomoe", "*/flat")
    with runs.open(newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = [(row["model"], row["kind"]) for row in rows]
    assert kinds == (
        [("hilomoe", "trial")] * 2 + [("hilomoe", "seed")] * 2 + [("flat", "seed")] * 2
    )
    assert len({row["overrides"] for row in rows[:2]}) == 2
    best = max(rows[:2], key=lambda row: float(row["valid_auc"]))
    assert rows[2]["overrides"] == best["overrides"]
    assert rows[0]["test_auc"] == ""
    assert 0 < float(rows[2]["test_auc"]) < 1
    assert rows[0]["valid_auc"] == rows[2]["valid_auc"] or best is rows[1]  # seed 0 again


def test_a_run_of_predictions_that_are_not_finite_is_no_row(load, plan, tmp_path, monkeypatch):
    runs, entry = load("accuracy_runs"), load("accuracy_plan").load_plan(plan).entries[0]
    table = runs.RunTable(tmp_path / "runs.csv")
    runner = runs.Runner(table, None, tmp_path, math.inf)
    metrics = {"valid": {"auc": 0.7}, "test": {"auc": None, "logloss": None}}
    done = subprocess.CompletedProcess([], 0, stdout=json.dumps(metrics), stderr="")
    monkeypatch.setattr(runs.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(runs.RunError, match="not finite"):
        runner.run(entry, "seed", 0, [])
    assert not table.rows


@pytest.mark.parametrize("stopped_after", [1, 4, 9])
def test_a_stopped_tuning_is_the_same_tuning(load, tmp_path: Path, stopped_after: int) -> None:
    accuracy, entry_of = load("accuracy"), load("accuracy_plan").Entry
    space = {f"model.{key}": ["1", "2", "3"] for key in ("num_layers", "num_heads", "query_dim")}
    entry = entry_of("synthetic", "hilomoe", {}, [], space)
    plan = load("accuracy_plan").Plan(10, [0], [entry])

    class Runner:
        """Knows the AUC of every choice, but stops."""

        def __init__(self, file: Path, runs: int) -> None:
            self.table, self.left = load("accuracy_runs").RunTable(file), runs

        def run(self, entry, kind: str, seed: int, chosen: list[str]) -> float:
            if not self.left:
                raise load("accuracy_runs").RunError("no time left")
            self.left -= 1
            value = random.Random(" ".join(chosen)).random()
            self.table.append(_row(load, entry, kind, chosen, value))
            return value

    def tune(file: Path, runs: int) -> list[str]:
        runner = Runner(file, runs)
        with contextlib.suppress(load("accuracy_runs").RunError):
            accuracy.tune(plan, entry, runner)
        return [row["overrides"] for row in runner.table.rows]

    whole = tune(tmp_path / "whole.csv", 10)
    assert len(set(whole)) == 10
    assert tune(tmp_path / "stopped.csv", stopped_after) == whole[:stopped_after]
    assert tune(tmp_path / "stopped.csv", 10) == whole


def test_report_compares_seed_by_seed(load) -> None:
    import pandas as pd

    report, stats_of = load("accuracy_report"), load("accuracy_stats")
    rng = np.random.default_rng(0)
    dlrm, ours = rng.normal(0.8, 0.01, 5), rng.normal(0.81, 0.01, 5)
    rows = [
        {"data": "shop", "model": model, "kind": "seed", "seed": seed, "test_auc": auc}
        | {"valid_auc": auc, "test_logloss": 0.5, "flops_per_sample": flops}
        | {"dense_parameters": 10, "seconds": 1}
        for model, aucs, flops in (("dlrm", dlrm, 2000.0), ("hilomoe", ours, 1000.0))
        for seed, auc in enumerate(aucs)
    ]
    runs = pd.DataFrame(rows).sample(frac=1, random_state=0)
    gain, p_value, seeds = stats_of.compare(runs, "shop", "hilomoe", "dlrm")
    assert seeds == 5
    assert gain == pytest.approx((ours - dlrm).mean())
    assert p_value == pytest.approx(stats.ttest_rel(ours, dlrm).pvalue)
    page = "\n".join(report.tables(runs))
    assert f"| `hilomoe` | {ours.mean():.5f} ± {ours.std(ddof=1):.5f} | {gain:+.5f} (p " in page
    assert "| `dlrm` | " in page


def test_variants_of_public_architectures_are_baselines(load) -> None:
    is_baseline = load("accuracy_stats").is_baseline
    assert all(map(is_baseline, ["dlrm", "dcn_mixture", "dlrm_cat_shipped", "dlrm_two_members"]))
    assert not any(map(is_baseline, ["hilomoe", "twin_wide", "cross_twin", "no_dot_products"]))


def test_report_draws_the_frontier(load, tmp_path: Path) -> None:
    import pandas as pd

    row = {"data": "shop", "model": "dlrm", "kind": "seed", "seed": 0, "test_auc": 0.8}
    row |= {"valid_auc": 0.8, "test_logloss": 0.5, "flops_per_sample": 2e3}
    runs = pd.DataFrame([row | {"dense_parameters": 10, "seconds": 1}])
    load("accuracy_report").plot_frontier(runs, tmp_path / "img" / "frontier.png")
    assert (tmp_path / "img" / "frontier.png").stat().st_size > 5000


def _row(load, entry, kind: str, overrides: list[str], auc: float) -> dict:
    """A run as it would be written today."""
    own = {"data": entry.data, "model": entry.model, "kind": kind, "seed": 0, "valid_auc": auc}
    digest = load("runs").config_digest((*entry.overrides, *overrides))
    return (
        dict.fromkeys(load("accuracy_runs").COLUMNS, "")
        | own
        | {"overrides": json.dumps(overrides), "config": digest}
    )


def test_a_variant_waits_for_all_trials_of_its_model(load, plan, tmp_path: Path) -> None:
    accuracy, plan = load("accuracy"), load("accuracy_plan").load_plan(plan)
    table, flat = load("accuracy_runs").RunTable(tmp_path / "r.csv"), plan.entry("synthetic/flat")
    trials = [
        ["model.dropout=0.0", "model.num_experts=2"],
        ["model.dropout=0.2", "model.num_experts=2"],
    ]
    hilomoe = plan.entry("synthetic/hilomoe")
    table.append(_row(load, hilomoe, "trial", trials[0], 0.6))
    assert accuracy.choices(plan, flat, table) is None
    table.append(_row(load, hilomoe, "trial", trials[1], 0.7))
    assert accuracy.choices(plan, flat, table) == [*trials[1], "model.num_layers=1"]


def test_seeds_of_other_choices_do_not_count(load, plan, tmp_path: Path) -> None:
    accuracy, plan = load("accuracy"), load("accuracy_plan").load_plan(plan)
    table, entry = (
        load("accuracy_runs").RunTable(tmp_path / "r.csv"),
        plan.entry("synthetic/shipped"),
    )
    table.append(_row(load, entry, "seed", ["model.dropout=0.9"], 0.6))
    assert accuracy.remaining(plan, entry, table) == 2
    table.append(_row(load, entry, "seed", [], 0.65) | {"config": "another"})
    assert accuracy.remaining(plan, entry, table) == 2
    table.append(_row(load, entry, "seed", [], 0.7))
    assert accuracy.remaining(plan, entry, table) == 1


def test_digest_is_of_what_decides_a_run(load) -> None:
    digest = load("runs").config_digest
    files = ("data.train=file", "data.quote_char=null")
    assert digest(("model=dlrm",)) == digest(("model=dlrm", "seed=3", *files))
    assert digest(("model=dlrm",)) != digest(("model=dlrm", "model.dropout=0.1"))
    assert digest(("model=dlrm",)) != digest(("model=dlrm", "training.monitor=gauc"))
    tuned = digest(("experiment=frappe_x1", "model=hilomoe"))
    assert tuned != digest(("experiment=frappe_x1", "model=hilomoe", "~tuned"))


def test_health_is_the_worst_after_the_last_stage(load) -> None:
    import pandas as pd

    def router(dead: list[float], paths: int) -> dict:
        entropies = {"usage_entropy": [0.9, 0.8], "sample_entropy": [0.5, 0.6]}
        return {"dead_share": dead, **entropies, "paths": paths, "possible_paths": 64}

    last = {"a": router([0.0, 0.25], 32), "b": router([0.0, 0.0], 8)}
    metrics = {"valid": {"samples": 16}, "stages": {"first": {"experts": {}}}}
    expert_health = load("accuracy_runs").expert_health
    assert expert_health(metrics) == {}
    metrics["stages"]["last"] = {"experts": last}
    worst = {"dead_share": 0.25, "usage_entropy": 0.8, "sample_entropy": 0.5, "path_share": 0.5}
    assert expert_health(metrics) == worst
    run = {"data": "shop", "kind": "seed", "seed": 0}
    runs = pd.DataFrame([run | {"model": "hilomoe"} | worst, run | {"model": "dlrm"}])
    table = list(load("accuracy_report").health_table(runs))
    assert table[1:-1] == ["| shop | `hilomoe` | 25.0% | 0.800 | 0.500 | 50.0% | 1 |"]
    assert not list(load("accuracy_report").health_table(runs[runs.model == "dlrm"]))
    later = [run | {"data": data, "model": "flat"} | worst for data in ("cafe", "shop")]
    table = load("accuracy_report").health_table(pd.concat([runs, pd.DataFrame(later)]))
    of_data = [line.split(" | ")[0] for line in list(table)[1:-1]]
    assert of_data == ["| cafe", "| shop", "| shop"]


def test_report_takes_the_newest_run_of_a_seed(load, plan) -> None:
    import pandas as pd

    entry = load("accuracy_plan").load_plan(plan).entry("synthetic/shipped")
    rows = [_row(load, entry, kind, [], auc) for kind in ("trial", "seed") for auc in (0.6, 0.7)]
    newest = load("accuracy_stats").newest
    assert newest(pd.DataFrame(rows)).valid_auc.tolist() == [0.6, 0.7, 0.7]
    # No mean is of two configurations.
    rows.append(_row(load, entry, "seed", ["model.dropout=0.1"], 0.8) | {"seed": 1})
    assert newest(pd.DataFrame(rows)).valid_auc.tolist() == [0.6, 0.7, 0.8]
