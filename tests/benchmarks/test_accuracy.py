"""The accuracy benchmark: its plan is valid, finished runs stay finished, the report adds up."""

from __future__ import annotations

import contextlib
import csv
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from torchrec_hilomoe.models import parse_model_config

ROOT = Path(__file__).parents[2]


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


def test_models_without_choices_are_taken_as_they_ship(load, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(
        "trials: 3\nseeds: [0]\nmodels: {dcn: {overrides: [model=dcn]}}\n"
        "data: {shop: {overrides: [data=tabular]}}\n"
    )
    plan = load("accuracy_plan").load_plan(path)
    table = load("accuracy_runs").RunTable(tmp_path / "runs.csv")
    (entry,) = plan.entries
    assert load("accuracy").planned(plan, entry) == 1
    assert load("accuracy").choices(plan, entry, table) == []


def test_a_choice_may_be_null(load, plan, tmp_path: Path) -> None:
    path = tmp_path / "nulls.yaml"
    path.write_text(plan.read_text().replace("[0.0, 0.2]", "[null, 0.2]"))
    tuned = load("accuracy_plan").load_plan(path).entry("synthetic/dlrm_cat")
    assert tuned.space["model.dropout"] == ["null", "0.2"]


@pytest.mark.slow
def test_paths_are_looked_for_from_where_it_is_started(plan, tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "accuracy.py"
    command = [sys.executable, script, "--plan", plan.name, "--dry-run"]
    command += ["--only", "*/flat", "--runs", "runs.csv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "synthetic/flat: 2 of 2 runs left\n"


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
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    assert rows[0]["device"] == device
    assert torch.__version__.startswith(rows[0]["torch"])


@pytest.mark.parametrize("stopped_after", [1, 4, 9])
def test_a_stopped_tuning_is_the_same_tuning(
    load, tmp_path: Path, stopped_after: int, row_of
) -> None:
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
            self.table.append(row_of(entry, kind, chosen, value))
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


def test_a_variant_waits_for_all_trials_of_its_model(load, plan, tmp_path: Path, row_of) -> None:
    accuracy, plan = load("accuracy"), load("accuracy_plan").load_plan(plan)
    table, flat = load("accuracy_runs").RunTable(tmp_path / "r.csv"), plan.entry("synthetic/flat")
    trials = [
        ["model.dropout=0.0", "model.num_experts=2"],
        ["model.dropout=0.2", "model.num_experts=2"],
    ]
    hilomoe = plan.entry("synthetic/hilomoe")
    table.append(row_of(hilomoe, "trial", trials[0], 0.6))
    assert accuracy.choices(plan, flat, table) is None
    table.append(row_of(hilomoe, "trial", trials[1], 0.7))
    assert accuracy.choices(plan, flat, table) == [*trials[1], "model.num_layers=1"]


def test_seeds_of_other_choices_do_not_count(load, plan, tmp_path: Path, row_of) -> None:
    accuracy, plan = load("accuracy"), load("accuracy_plan").load_plan(plan)
    table, entry = (
        load("accuracy_runs").RunTable(tmp_path / "r.csv"),
        plan.entry("synthetic/shipped"),
    )
    table.append(row_of(entry, "seed", ["model.dropout=0.9"], 0.6))
    assert accuracy.remaining(plan, entry, table) == 2
    table.append(row_of(entry, "seed", [], 0.65) | {"config": "another"})
    assert accuracy.remaining(plan, entry, table) == 2
    table.append(row_of(entry, "seed", [], 0.7))
    assert accuracy.remaining(plan, entry, table) == 1


def test_digest_is_of_what_decides_a_run(load) -> None:
    digest = load("runs").config_digest
    files = ("data.train=file", "data.quote_char=null")
    assert digest(("model=dlrm",)) == digest(("model=dlrm", "seed=3", *files))
    assert digest(("model=dlrm",)) != digest(("model=dlrm", "model.dropout=0.1"))
    assert digest(("model=dlrm",)) != digest(("model=dlrm", "training.monitor=gauc"))
    tuned = digest(("experiment=frappe_x1", "model=hilomoe"))
    assert tuned != digest(("experiment=frappe_x1", "model=hilomoe", "~tuned"))
